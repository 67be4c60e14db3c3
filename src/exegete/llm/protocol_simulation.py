"""How simulation asks for the activation at every token, and how the answers are read: three forms of one question.

``simulate`` asks a chat model for the active tokens of a whole window at once; ``simulate_token`` asks for the last
token of the text so far; ``simulate_all`` is a text to complete, with a question mark where each level would stand: how
probable each level is there is read from the log probabilities of the prompt itself, and nothing is generated.

Levels are the digits 0 to 9. The code released with the paper asks for 0 to 10, as OpenAI's did; most tokenizers of
today write 10 as two tokens, of which the first would be read as a 1. Correlations do not know the difference.

Tokens are written as JSON strings, one to a line, so that no text of theirs can be taken for a line break or a tab.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Final, Literal, final

from exegete.prompts import messages
from exegete.types import TokenLogprob

Form = Literal["simulate", "simulate_token", "simulate_all"]
LEVELS: Final = tuple(range(10))
"""The levels a token can have: digits, each of them one token of every tokenizer."""
UNKNOWN: Final = "?"
"""What stands in ``simulate_all`` where a level would."""
PROMPTS: Final[Mapping[str, str]] = {
    "simulate": "simulate-1",
    "simulate_token": "simulate-token-1",
    "simulate_all": "simulate-all-1",
}
_PLACE = re.compile(rf"\t\{UNKNOWN}")
_ASKED = re.compile(r"<description>\n(.*)\n</description>\n\n<tokens>\n(.*?)(?:\n</tokens>)?", re.DOTALL)
_DIGIT = re.compile(r"\W*(?:level\W+)?([0-9])\W*", re.IGNORECASE)
_GLYPHS = str.maketrans("Ġ▁Ċĉ", "  \n\t")  # spaces, line breaks and tabs as some servers spell them in tokens
_BYTES: Final = (("<0x09>", "\t"), ("<0x0A>", "\n"))
_quoted = json.JSONEncoder(ensure_ascii=False).encode


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A simulated level: its expected value, how probable each level was, and the mass on what is no level.

    ``values`` and ``probabilities`` are as long as each other; where only an answer is known it is the one value.
    """

    expected: float
    values: tuple[int, ...]
    probabilities: tuple[float, ...]
    outside: float | None = None


def simulate_messages(explanation: str, tokens: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    """Return the chat messages that ask at which tokens of a window the unit is active, and how strongly."""
    lines = "\n".join(f"{i}: {_quoted(token)}" for i, token in enumerate(tokens, start=1))
    return messages(PROMPTS["simulate"], {"explanation": explanation, "tokens": lines})


def simulate_token_messages(explanation: str, tokens: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    """Return the chat messages that ask for the level of the last of these tokens."""
    lines = "\n".join(map(_quoted, tokens))
    return messages(PROMPTS["simulate_token"], {"explanation": explanation, "tokens": lines})


def simulate_prompt(explanation: str, tokens: Sequence[str]) -> str:
    """Return the text whose log probabilities say how active the unit is at every token (all at once)."""
    lines = "\n".join(f"{_quoted(token)}\t{UNKNOWN}" for token in tokens)
    asked = messages(PROMPTS["simulate_all"], {"explanation": explanation, "tokens": lines})
    return opening() + asked[-1]["content"] + "\n"


@cache
def opening() -> str:
    """Return what every ``simulate_prompt`` begins with."""
    first, *shots, _ = messages(PROMPTS["simulate_all"], {"explanation": "", "tokens": ""})
    shown = [m["content"] + ("\n" if m["role"] == "user" else "\n\n") for m in shots]
    return first["content"] + "\n\n" + "".join(shown)


@cache
def active_schema(n: int) -> Mapping[str, Any]:
    """Return the JSON schema of an answer about ``n`` tokens. The same object every time, and not to be changed."""
    token = {"type": "integer", "enum": list(range(1, n + 1))}
    level = {"type": "integer", "enum": list(LEVELS)}
    one = {
        "type": "object",
        "properties": {"token": token, "level": level},
        "required": ["token", "level"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"active": {"type": "array", "items": one, "maxItems": n}},
        "required": ["active"],
        "additionalProperties": False,
    }


def read_asked(form: str, content: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the explanation and the tokens of a question's last message; None when it is none of ours."""
    found = _ASKED.fullmatch(content.rstrip("\n"))
    if found is None:
        return None
    lines = found.group(2).split("\n")
    if form == "simulate":
        lines = [line.partition(": ")[2] for line in lines]
    elif form == "simulate_all":
        lines = [line.removesuffix(f"\t{UNKNOWN}") for line in lines]
    try:
        return found.group(1), tuple(str(json.loads(line)) for line in lines)
    except json.JSONDecodeError:
        return None


def parse_active(text: str, n: int) -> list[int] | None:
    """Return the level of each of ``n`` tokens from an answer to ``simulate``; None when it is no such answer.

    The last object with a list ``active`` counts, since a model may think aloud before it answers. A token that is not
    there, a level that is none, and a token named twice make the whole answer unreadable.
    """
    for match in reversed(list(re.finditer(r'\{\s*"active"', text))):
        try:
            data, _ = json.JSONDecoder().raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        return _levels(data.get("active"), n)
    return None


def _levels(active: Any, n: int) -> list[int] | None:
    if not isinstance(active, list):
        return None
    found: dict[int, int] = {}
    for one in active:
        token, level = (one.get("token"), one.get("level")) if isinstance(one, dict) else (None, None)
        if type(token) is not int or type(level) is not int:
            return None
        if not 1 <= token <= n or token in found or level not in LEVELS:
            return None
        found[token] = level
    return [found.get(i, 0) for i in range(1, n + 1)]


def parse_level(text: str, tokens: Sequence[TokenLogprob] | None = None) -> Level | None:
    """Return the level in an answer to ``simulate_token``; None when it holds none.

    With the log probabilities of the reply's tokens the expected value is over the alternatives to the digit.
    """
    found = _DIGIT.fullmatch(text)
    if found is None:
        return None
    level = int(found.group(1))
    weighed = None
    for token in tokens or ():
        if re.search(r"[0-9]", token.token):
            weighed = weigh(token) if _level_of(token.token) == level else None
            break
    return weighed or Level(expected=float(level), values=(level,), probabilities=(1.0,))


def parse_all(tokens: Sequence[TokenLogprob] | None, n: int) -> list[Level | None] | None:
    """Return the level at each of ``n`` tokens from the log probabilities of a ``simulate_prompt``'s own tokens.

    The places are found by the tab and the question mark before each line's end, the last ``n`` of them. None where
    the server gave no log probabilities or the places are not all there; None at a place where no alternative is a
    level, and never 0.
    """
    if not tokens:
        return None
    texts = [_plain(token.token) for token in tokens]
    places = [match.end() - 1 for match in _PLACE.finditer("".join(texts))][-n:]
    if len(places) < n:
        return None
    ends = list(accumulate(map(len, texts)))
    found: list[Level | None] = []
    at = 0
    for place in places:
        while ends[at] <= place:
            at += 1
        found.append(weigh(tokens[at]))
    return found


def weigh(token: TokenLogprob) -> Level | None:
    """Return the expected level over the alternatives to a token; None where none of them is a level."""
    chosen = {} if token.logprob is None else {token.token: token.logprob}
    mass = dict.fromkeys(LEVELS, 0.0)
    for text, logprob in {**chosen, **token.alternatives}.items():
        level = _level_of(text)
        if level is not None and not math.isnan(logprob):
            mass[level] += math.exp(min(logprob, 0.0))
    known = {level: p for level, p in mass.items() if p > 0}
    total = sum(known.values())
    if not total or not token.alternatives:
        return None
    return Level(
        expected=sum(level * p for level, p in known.items()) / total,
        values=tuple(known),
        probabilities=tuple(p / total for p in known.values()),
        outside=max(0.0, 1.0 - total),
    )


def _level_of(text: str) -> int | None:
    digit = _plain(text).strip()
    return int(digit) if len(digit) == 1 and digit in "0123456789" else None


def _plain(token: str) -> str:
    for spelled, meant in _BYTES:
        token = token.replace(spelled, meant)
    return token.translate(_GLYPHS)
