"""How excerpts stand in our prompts, written and read back: the one place that knows the form.

Every excerpt stands between ``<example N>`` and ``</example N>`` lines of its own, numbered from 1, so that text with
line breaks, or with words such as "Example 3:", cannot be taken for the next one.
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
from exegete.prompts import messages, turns

Kind = Literal["detection", "fuzzing"]
STRENGTHS = "\nActivations: "
PROMPTS: Mapping[str, str] = {"explain": "explain-1", "detection": "detection-2", "fuzzing": "fuzzing-2"}
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
    """A prompt of ours as read back."""

    kind: Literal["explain", "detection", "fuzzing"]
    explanation: str
    excerpts: tuple[Shown, ...]


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


def read_question(asked: Sequence[Mapping[str, str]]) -> Question:
    """Read back a prompt of ours. Raises InputError on any other."""
    for kind, name in PROMPTS.items():
        shots = turns(name)
        if len(asked) < len(shots) or asked[0]["content"] != shots[0][1]:
            continue
        last = asked[len(shots) - 1]["content"]  # a repair request repeats the question and goes on after it
        explanation, texts = ("", last) if kind == "explain" else _judged(last)
        excerpts = tuple(_shown(kind, text) for text in _excerpts(texts))
        return Question(kind=kind, explanation=explanation, excerpts=excerpts)  # type: ignore[arg-type]
    raise InputError("the simulated judge reads only the prompts of exegete")


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
    if kind == "detection":
        return Shown(text=text, spans=None)
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
