"""How a question becomes a prompt: words around it, and an open bracket at its end, so that a letter comes next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

from exegete.errors import InputError, unknown

OPEN: Final = "("


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A named way to write prompts; ``text`` has ``{}`` where the question goes, None for the tokenizer's own chat."""

    name: str
    text: str | None


TEMPLATES: Final = {
    # The last two are the forms of the published scripts (arXiv 2404.05971's repository).
    "plain": "{}\n\nAnswer: ",
    "llama-2": "[INST] {} [/INST] ",
    "hermes": "\x16user\n{}\x17\n\x16assistant\n",
}


def template_of(name: str) -> Template:
    """Return a template by name, or of a text with ``{}`` in it.

    Named are ``plain``, ``llama-2``, ``hermes``, and ``chat``, whatever the tokenizer's own chat template says.
    Raises NotFoundError for another word, InputError for a text in which ``{}`` is more than once.
    """
    if name in TEMPLATES:
        return Template(name=name, text=TEMPLATES[name])
    if name == "chat":
        return Template(name=name, text=None)
    if "{}" not in name:
        raise unknown("template", name, (*TEMPLATES, "chat", "a text with {} in it"))
    if name.count("{}") > 1:
        raise InputError(f"a template has {{}} once, where the question goes; got {name!r}")
    return Template(name="own", text=name.removesuffix(OPEN))


def prompt_text(template: Template, question: str, tokenizer: Any, *, bracket: bool = True) -> str:
    """Return the prompt of one question, up to and with the open bracket; without it for an open-ended answer.

    Raises InputError for ``chat`` where the tokenizer has no chat template.
    """
    if template.text is None:
        if not tokenizer.chat_template:
            allowed = ", ".join(TEMPLATES)
            raise InputError(f"the tokenizer has no chat template; choose another template: {allowed}")
        asked = [{"role": "user", "content": question}]
        written = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    else:
        written = template.text.replace("{}", question)
    return written + OPEN if bracket else written.rstrip(" ")


def adds_special(template: Template) -> bool:
    """Tell whether the tokenizer puts its special tokens before a prompt; a chat template writes them itself."""
    return template.text is not None
