"""Reading what a judge answered: its verdicts, and how probable each was by the tokens it chose among."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

from exegete.types import TokenLogprob

WORDS: Mapping[str, bool] = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
# One letter might begin anything.
_BEGUN = {word[:size]: verdict for word, verdict in WORDS.items() for size in range(2, len(word))}
_LIST = re.compile(r"\[([^\[\]]*)\]")
_NUMBERED = re.compile(r"\{([^{}]*)\}")
_KEY = re.compile(r"\s*[\"']?(?:example|excerpt)?[ _]*(\d{1,4})[\"']?\s*:", re.IGNORECASE)
_WORD = re.compile(r"-?[^\W_]+")
_AROUND = " \t\r\n\"'"
_GLYPHS = str.maketrans("Ġ▁Ċ", "  \n")  # spaces and line breaks as some servers spell them in tokens


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Leaning:
    """How a judge leaned on one item: ``yes``, P(yes) among yes and no; ``outside``, the mass on neither."""

    yes: float
    outside: float


def parse_verdicts(text: str, n: int) -> list[bool] | None:
    """Return the verdicts of a reply to ``n`` items; None when it holds no list of exactly ``n``.

    The last such list counts, alone or in an object, since a model may think aloud before it answers; so does an object
    whose keys number the items from 1. Items are 0 and 1, true and false, yes and no, quoted or not: the *text* "0" is
    a no, although Python takes it for true.
    """
    found = _located(text, n)
    return None if found is None else [verdict for verdict, _ in found]


def read_leanings(tokens: Sequence[TokenLogprob] | None, verdicts: Sequence[bool]) -> list[Leaning | None]:
    """Return the leaning behind each of a reply's ``verdicts``, from the tokens of that reply.

    The verdicts are found again in the tokens' joined text, and each is weighed where its first character was chosen:
    P(yes) is the mass of yes-like alternatives over that of yes-like and no-like ones. None, and never 0, where the
    server gave no log probabilities or no alternatives, or where the tokens do not spell the verdicts.
    """
    nothing: list[Leaning | None] = [None] * len(verdicts)
    if not tokens:
        return nothing
    texts = [token.token.translate(_GLYPHS) for token in tokens]
    found = _located("".join(texts), len(verdicts))
    if found is None or [verdict for verdict, _ in found] != list(verdicts):
        return nothing
    starts = [0, *accumulate(map(len, texts))][:-1]
    chosen = [bisect_right(starts, at) - 1 for _, at in found]
    return [_leaning(tokens[i], at - starts[i]) for i, (_, at) in zip(chosen, found, strict=True)]


def _located(text: str, n: int) -> list[tuple[bool, int]] | None:
    """Return each verdict of the last answer to ``n`` items, and the place of its first character in the text."""
    candidates = [(match, False) for match in _LIST.finditer(text)]
    candidates += [(match, True) for match in _NUMBERED.finditer(text)]
    for match, numbered in sorted(candidates, key=lambda c: c[0].start(), reverse=True):
        found = _items(match.group(1), match.start(1), numbered)
        if found is not None and len(found) == n:
            return found
    return None


def _items(body: str, at: int, numbered: bool) -> list[tuple[bool, int]] | None:
    """Read a list's, or a numbered object's, items; ``at`` is where the body begins. None when any is no verdict."""
    found = []
    for number, piece in enumerate(body.rstrip(", \n").split(","), start=1):
        key = _KEY.match(piece) if numbered else None
        if numbered and (key is None or int(key.group(1)) != number):
            return None
        value = piece[key.end() :] if key else piece
        word = value.lstrip(_AROUND)
        verdict = WORDS.get(word.rstrip(_AROUND).lower())
        if verdict is None:
            return None
        found.append((verdict, at + len(piece) - len(word)))
        at += len(piece) + 1
    return found


def _leaning(token: TokenLogprob, at: int) -> Leaning | None:
    """Weigh the alternatives of the token whose character ``at`` begins a verdict."""
    if len(token.alternatives) < 2:  # the chosen token alone says nothing of what it was chosen over
        return None
    chosen = {} if token.logprob is None else {token.token: token.logprob}
    before = _words(token.token[:at])
    mass = {True: 0.0, False: 0.0}
    for text, logprob in {**chosen, **token.alternatives}.items():
        verdict = _verdict(text, before)
        if verdict is not None and not math.isnan(logprob):
            mass[verdict] += math.exp(min(logprob, 0.0))
    both = mass[True] + mass[False]
    return Leaning(yes=mass[True] / both, outside=max(0.0, 1.0 - both)) if both > 0 else None


def _verdict(text: str, before: Sequence[str]) -> bool | None:
    """Return the verdict that a token begins after the words ``before``; None when it goes on in another way."""
    words = _words(text)
    if len(words) <= len(before) or words[: len(before)] != before:
        return None
    word = words[len(before)]
    unfinished = len(words) == len(before) + 1 and text.lower().endswith(word)
    return WORDS.get(word, _BEGUN.get(word) if unfinished else None)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.translate(_GLYPHS).lower())
