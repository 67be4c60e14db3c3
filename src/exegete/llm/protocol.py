"""How excerpts stand in our prompts, written and read back: the one place that knows the form.

Every excerpt stands between ``<example N>`` and ``</example N>`` lines of its own, numbered from 1, so that text with
line breaks, or with words such as "Example 3:", cannot be taken for the next one. ``protocol_simulation`` knows the
form of questions about single tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, final

from exegete.errors import InputError
from exegete.examples.render import parse_marked
from exegete.llm import protocol_simulation as simulation
from exegete.prompts import messages, turns

Kind = Literal["detection", "fuzzing"]
Asked = Literal["explain", "detection", "fuzzing", "intruder", "generate", "effect"] | simulation.Form
STRENGTHS = "\nActivations: "
GAINS = "\nGained: "
PROMPTS: Mapping[str, str] = {
    "explain": "explain-1",
    "detection": "detection-2",
    "fuzzing": "fuzzing-2",
    "intruder": "intruder-1",
    "generate": "generate-1",
    "effect": "effect-1",
    **simulation.PROMPTS,
}
_GAIN = re.compile(r'\(("(?:[^"\\]|\\.)*") : ([0-9.eE+-]+|inf|nan)\)')
_quoted = json.JSONEncoder(ensure_ascii=False).encode


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One excerpt as read back: its plain text, and the marked spans of characters (None where nothing is marked)."""

    text: str
    spans: tuple[tuple[int, int], ...] | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt of ours as read back.

    ``tokens`` are those a simulation asks about (the last of them in ``simulate_token``); ``wanted`` is how many texts
    that fit, and how many that do not, are to be written; ``gains`` are the tokens an edit made likelier after each
    excerpt, each with its factor.
    """

    kind: Asked
    explanation: str
    excerpts: tuple[Shown, ...] = ()
    tokens: tuple[str, ...] = ()
    wanted: tuple[int, int] = (0, 0)
    gains: tuple[tuple[tuple[str, float], ...], ...] = ()


def write_excerpts(texts: Sequence[str]) -> str:
    """Return numbered excerpts in the form every prompt uses."""
    return "\n".join(f"<example {i}>\n{text}\n</example {i}>" for i, text in enumerate(texts, start=1))


def judge_messages(kind: Kind, explanation: str, texts: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    """Return the chat messages that ask whether an explanation fits each text."""
    return judge_messages_of(kind, explanation, write_excerpts(texts))


def judge_messages_of(kind: Kind, explanation: str, excerpts: str) -> tuple[Mapping[str, str], ...]:
    """Return ``judge_messages`` of excerpts written before: several explanations are asked about the same ones."""
    return messages(PROMPTS[kind], {"explanation": explanation, "examples": excerpts})


@cache
def verdicts_schema(n: int) -> Mapping[str, Any]:
    """Return the JSON schema of an answer about ``n`` excerpts. The same object every time, and not to be changed."""
    verdicts = {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": n, "maxItems": n}
    return {
        "type": "object",
        "properties": {"verdicts": verdicts},
        "required": ["verdicts"],
        "additionalProperties": False,
    }


def explain_messages(texts: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    """Return the chat messages that ask for an explanation of marked texts, each ``with_strengths``."""
    return messages(PROMPTS["explain"], {"examples": write_excerpts(texts)})


def with_strengths(text: str, active: Sequence[tuple[str, int]]) -> str:
    """Return a marked text and the line of its active tokens with their strengths 0–10."""
    return text + STRENGTHS + ", ".join([f"({_quoted(token)} : {strength})" for token, strength in active])


def intruder_messages(texts: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    """Return the chat messages that ask which of these marked texts does not belong to the others."""
    return messages(PROMPTS["intruder"], {"examples": write_excerpts(texts)})


@cache
def intruder_schema(n: int) -> Mapping[str, Any]:
    """Return the JSON schema of an answer about ``n`` texts. The same object every time, and not to be changed."""
    return {
        "type": "object",
        "properties": {"intruder": {"type": "integer", "enum": list(range(1, n + 1))}},
        "required": ["intruder"],
        "additionalProperties": False,
    }


def generate_messages(explanation: str, fitting: int, other: int) -> tuple[Mapping[str, str], ...]:
    """Return the chat messages that ask for texts that fit an explanation, and for texts that do not."""
    holes = {"explanation": explanation, "fitting": str(fitting), "other": str(other)}
    return messages(PROMPTS["generate"], holes)


@cache
def generate_schema(fitting: int, other: int) -> Mapping[str, Any]:
    """Return the JSON schema of so many texts. The same object every time, and not to be changed."""

    def texts(n: int) -> Mapping[str, Any]:
        return {"type": "array", "items": {"type": "string"}, "minItems": n, "maxItems": n}

    return {
        "type": "object",
        "properties": {"fitting": texts(fitting), "other": texts(other)},
        "required": ["fitting", "other"],
        "additionalProperties": False,
    }


def effect_messages(texts: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    """Return the chat messages that ask what an edit makes a model say, from texts each ``with_gains``."""
    return messages(PROMPTS["effect"], {"examples": write_excerpts(texts)})


def with_gains(text: str, gains: Sequence[tuple[str, float]]) -> str:
    """Return a text and the line of the tokens that an edit made likelier to follow, with the factor of each."""
    return text + GAINS + ", ".join([f"({_quoted(token)} : {factor:.1f})" for token, factor in gains])


def read_question(asked: Sequence[Mapping[str, str]] | str) -> Question:
    """Read back a prompt of ours, chat messages or a text to complete. Raises InputError on any other."""
    if isinstance(asked, str):
        if asked.startswith(simulation.opening()):
            return _simulated("simulate_all", asked.removeprefix(simulation.opening()))
        asked = ()
    for kind, name in PROMPTS.items():
        shots = turns(name)
        if len(asked) < len(shots) or asked[0]["content"] != shots[0][1]:
            continue
        last = asked[len(shots) - 1]["content"]  # a repair request repeats the question and goes on after it
        return _question(kind, last)
    raise InputError("the simulated judge reads only the prompts of exegete")


def _question(kind: Any, content: str) -> Question:
    if kind in simulation.PROMPTS:
        return _simulated(kind, content)
    if kind == "generate":
        return _generated(content)
    explanation, texts = _judged(content) if kind in ("detection", "fuzzing") else ("", content)
    written = _excerpts(texts)
    excerpts = tuple(_shown(kind, text) for text in written)
    gains = tuple(map(_gains, written)) if kind == "effect" else ()
    return Question(kind=kind, explanation=explanation, excerpts=excerpts, gains=gains)


def _simulated(kind: simulation.Form, content: str) -> Question:
    found = simulation.read_asked(kind, content)
    if found is None:
        raise InputError("the prompt holds no description and tokens")
    return Question(kind=kind, explanation=found[0], tokens=found[1])


def _generated(content: str) -> Question:
    form = r"<description>\n(.*)\n</description>\n\n<wanted>\nfitting: (\d+)\nother: (\d+)\n</wanted>"
    found = re.fullmatch(form, content, re.DOTALL)
    if found is None:
        raise InputError("the prompt does not say how many texts are wanted")
    return Question(kind="generate", explanation=found.group(1), wanted=(int(found.group(2)), int(found.group(3))))


def _gains(text: str) -> tuple[tuple[str, float], ...]:
    return tuple((str(json.loads(token)), float(gain)) for token, gain in _GAIN.findall(text.rpartition(GAINS)[2]))


def _judged(content: str) -> tuple[str, str]:
    found = re.fullmatch(r"<description>\n(.*?)\n</description>\n\n(<example 1>\n.*)", content, re.DOTALL)
    if found is None:
        raise InputError("the prompt holds no description")
    return found.group(1), found.group(2)


def _excerpts(content: str) -> list[str]:
    texts: list[str] = []
    rest = content
    while rest:
        number = len(texts) + 1
        opening, closing = f"<example {number}>\n", f"\n</example {number}>"
        body, more, rest = rest.removeprefix(opening).partition(f"{closing}\n<example {number + 1}>\n")
        if more:
            rest = f"<example {number + 1}>\n{rest}"
        texts.append(body if more else body.removesuffix(closing))
    return texts


def _shown(kind: str, text: str) -> Shown:
    if kind in ("detection", "effect"):
        return Shown(text=text.rpartition(GAINS)[0] if kind == "effect" else text, spans=None)
    plain, spans = unmark(text.rpartition(STRENGTHS)[0] if kind == "explain" else text)
    return Shown(text=plain, spans=spans)


def unmark(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a marked text without its marks, and the spans of characters they held.

    Raises InputError on marks that do not pair up.
    """
    plain, spans = "", []
    for part, marked in parse_marked(text):
        if marked:
            spans.append((len(plain), len(plain) + len(part)))
        plain += part
    return plain, tuple(spans)
