"""How a simulated judge puts what it feels into words: verdicts, levels, texts, and the tokens behind them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from exegete.llm.protocol import Question, Shown
from exegete.llm.protocol_simulation import LEVELS, UNKNOWN
from exegete.llm.scripted.predicates import Predicate
from exegete.types import LLMReply, TokenLogprob

UNPARSED: Final = "I would rather not say."
HIGHEST: Final = LEVELS[-1]
_PLACE = re.compile(rf"\t\{UNKNOWN}")
_NAMED = re.compile(r"`([^`]+)`")


def reply_of(text: str, words: int, tokens: tuple[TokenLogprob, ...] | None = None) -> LLMReply:
    """Return a reply that stopped by itself, to a prompt of so many words."""
    return LLMReply(text=text, finish="stop", prompt_tokens=words, completion_tokens=len(text.split()), logprobs=tokens)


def verdict_tokens(yes: Sequence[float]) -> tuple[TokenLogprob, ...]:
    """Return the tokens of a list of verdicts from P(yes) of each; each verdict stands beside its alternative."""
    tokens = []
    for number, p in enumerate(yes):
        tokens.append(TokenLogprob(token=", " if number else "[", logprob=0.0))
        tokens.append(_choice({"1": p, "0": 1.0 - p}))
    return (*tokens, TokenLogprob(token="]", logprob=0.0))


def level_of(active: float) -> int:
    """Return the level of a token that is active with this probability."""
    return round(HIGHEST * active)


def level_token(active: float) -> TokenLogprob:
    """Return the token of a level, whose expected value is the highest one times the probability of being active."""
    return _choice({str(HIGHEST): active, "0": 1.0 - active})


def levels_text(active: Sequence[float]) -> str:
    """Return the answer for a whole window: its active tokens and their levels."""
    levels = [(number, level_of(p)) for number, p in enumerate(active, start=1)]
    return json.dumps({"active": [{"token": number, "level": level} for number, level in levels if level]})


def prompt_tokens(prompt: str, active: Sequence[float]) -> tuple[TokenLogprob, ...]:
    """Return the tokens of a prompt in which the last places of levels have the probabilities behind these."""
    places = [match.end() - len(UNKNOWN) for match in _PLACE.finditer(prompt)][-len(active) :]
    tokens, at = [], 0
    for place, p in zip(places, active, strict=True):
        tokens.append(TokenLogprob(token=prompt[at:place], logprob=None if at == 0 else -1.0))
        chosen = level_token(p)
        tokens.append(TokenLogprob(token=UNKNOWN, logprob=-20.0, alternatives=chosen.alternatives))
        at = place + len(UNKNOWN)
    return (*tokens, TokenLogprob(token=prompt[at:], logprob=-1.0))


def commonest_mark(excerpts: Iterable[Shown]) -> str:
    """Return an explanation: the text that is marked most often."""
    return _quoting(Counter(e.text[start:stop] for e in excerpts for start, stop in e.spans or ()))


def likeliest_gain(question: Question) -> str:
    """Return an explanation of an edit: the token that it made likelier by the most, over all texts."""
    gains: Counter[str] = Counter()
    for shown in question.gains:
        for token, factor in shown:
            gains[token] += round(1000 * math.log(max(factor, 1.0)))
    return _quoting(gains)


def alike(excerpts: Sequence[Shown]) -> list[bool]:
    """Return of each marked text whether it shares a marked text with any other."""
    marked = [{e.text[start:stop].strip() for start, stop in e.spans or ()} for e in excerpts]
    return [any(own & other for other in marked[:i] + marked[i + 1 :]) for i, own in enumerate(marked)]


def written(explanation: str, predicate: Predicate | None, known: Sequence[str], fits: bool) -> list[str]:
    """Return texts that an explanation fits, or does not: known ones, else what it names itself, or other words."""
    found = [text for text in known if predicate is not None and predicate(text, None) == fits]
    if found:
        return found
    if not fits:
        return ["an unrelated remark", "nothing of the kind", "some other words"]
    quoted = re.search(r'the text ("(?:[^"\\]|\\.)*")', explanation, re.IGNORECASE)
    named = [str(json.loads(quoted.group(1), strict=False))] if quoted else _NAMED.findall(explanation)
    return named or [explanation or "a text"]


def _choice(chances: dict[str, float]) -> TokenLogprob:
    alternatives = {text: math.log(max(p, 1e-12)) for text, p in chances.items()}
    said = max(alternatives, key=lambda text: alternatives[text])
    return TokenLogprob(token=said, logprob=alternatives[said], alternatives=alternatives)


def _quoting(texts: Counter[str]) -> str:
    commonest = min(texts, key=lambda text: (-texts[text], text), default="")
    return f"the text {json.dumps(commonest, ensure_ascii=False)}"
