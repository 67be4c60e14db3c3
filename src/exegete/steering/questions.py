"""Prompts as tokens: questions with the tokens that answer them, contrasts, and where a contrast is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from exegete.errors import InputError
from exegete.steering.behaviour_files import Row
from exegete.steering.pairs import Pair
from exegete.steering.templates import Template, adds_special, prompt_text

if TYPE_CHECKING:
    from exegete.subjects import Subject

Tokens = tuple[int, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt, and the tokens of each of its two answers in that context: ``match`` shows the behaviour."""

    prompt: Tokens
    match: Tokens
    other: Tokens

    @property
    def single(self) -> bool:
        """Whether each answer is one token, so that one softmax scores both."""
        return len(self.match) == len(self.other) == 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Two token sequences and how many tokens they share at their beginning; what comes after are their answers.

    ``first`` says whether the positive is the first of the two labels (A), None where there are no labels.
    """

    positive: Tokens
    negative: Tokens
    shared: int
    first: bool | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ReadAt:
    """Which tokens of a text are read: their mean where they are several; a state is read after the last of them.

    ``last`` · ``answer``, the tokens behind what the pair shares · a number, from the end where negative (−1 is the
    last) · ``after TEXT``, the token that ends the last occurrence of a text.
    """

    rule: str = "last"

    def __post_init__(self) -> None:
        if self.rule not in ("last", "answer") and not re.fullmatch(r"-?\d+|after .+", self.rule, re.DOTALL):
            raise InputError(f"read at last, answer, a number such as -1, or after TEXT; got {self.rule!r}")

    def span(self, tokens: Tokens, shared: int, subject: Subject) -> tuple[int, int]:
        """Return the first position read and the one after the last. Raises InputError where the text has none."""
        if self.rule == "last":
            return len(tokens) - 1, len(tokens)
        if self.rule == "answer":
            if shared >= len(tokens):
                raise InputError("one text of a pair begins with the whole other, so it has no answer of its own")
            return shared, len(tokens)
        if self.rule.startswith("after "):
            at = _end_of(self.rule.removeprefix("after "), tokens, subject)
            return at, at + 1
        at = int(self.rule)
        place = at + len(tokens) if at < 0 else at
        if not 0 <= place < len(tokens):
            raise InputError(f"a text of {len(tokens)} tokens has no token {at}")
        return place, place + 1


def encode(tokenizer: Any, text: str, *, special: bool = True) -> Tokens:
    """Return the ids of a text, with those special tokens before it that the tokenizer puts there, and none after it.

    Raises InputError for a text without tokens.
    """
    plain = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if special:
        whole = tuple(tokenizer(text)["input_ids"])
        at = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), 0)
        plain = whole[:at] + plain
    if not plain:
        raise InputError(f"the text {text[:40]!r} has no tokens")
    return plain


def questions(rows: Sequence[Row], template: Template, tokenizer: Any) -> tuple[Question, ...]:
    """Return rows as prompts that end in an open bracket, with the label that each answer begins with.

    Label tokens are found in context: prompt and label are encoded together, for a tokenizer may join the bracket and
    the letter. The prompt is then what both encodings share. Raises InputError, with its number, for a row whose labels
    are the same tokens.
    """
    found = []
    for i, row in enumerate(rows, start=1):
        match, other = _answered(row, template, tokenizer)
        shared = _shared(match, other)
        if shared in (len(match), len(other)):
            raise InputError(f"row {i}: the tokens of one answer begin with the other's; choose other labels")
        found.append(Question(prompt=match[:shared], match=match[shared:], other=other[shared:]))
    return tuple(found)


def label_contrasts(rows: Sequence[Row], template: Template, tokenizer: Any) -> tuple[Contrast, ...]:
    """Return rows as pairs: the prompt with the label that shows the behaviour, and with the other label."""
    found = []
    for row in rows:
        match, other = _answered(row, template, tokenizer)
        first = row.match == row.labels[0]
        found.append(Contrast(positive=match, negative=other, shared=_shared(match, other), first=first))
    return tuple(found)


def text_contrasts(pairs: Sequence[Pair], tokenizer: Any) -> tuple[Contrast, ...]:
    """Return pairs of texts as they are, without a template."""
    found = []
    for pair in pairs:
        positive, negative = encode(tokenizer, pair.positive), encode(tokenizer, pair.negative)
        found.append(Contrast(positive=positive, negative=negative, shared=_shared(positive, negative)))
    return tuple(found)


def open_prompt(question: str, template: Template, tokenizer: Any) -> Tokens:
    """Return the prompt of an open question, without a bracket."""
    text = prompt_text(template, question, tokenizer, bracket=False)
    return encode(tokenizer, text, special=adds_special(template))


def _answered(row: Row, template: Template, tokenizer: Any) -> tuple[Tokens, Tokens]:
    prompt, special = prompt_text(template, row.question, tokenizer), adds_special(template)
    match, other = (encode(tokenizer, prompt + label, special=special) for label in (row.match, row.other))
    return match, other


def _shared(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _end_of(marker: str, tokens: Tokens, subject: Subject) -> int:
    """Return the token in which the last occurrence of a marker ends, in bytes, so that it may lie across tokens."""
    pieces = [subject.token_table().pieces[token] for token in tokens]
    at = b"".join(pieces).rfind(marker.encode())
    if at < 0:
        raise InputError(f"a text has no {marker!r} to read after; it ends in {b''.join(pieces)[-40:]!r}")
    end, seen = at + len(marker.encode()), 0
    for place, piece in enumerate(pieces):
        seen += len(piece)
        if seen >= end:
            return place
    raise AssertionError("the marker ends within the text")
