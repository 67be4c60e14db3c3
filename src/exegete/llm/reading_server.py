"""A language model behind a client that reads: log probabilities of a prompt's tokens, laid beside its characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from exegete.llm.client import LLMClient, gather_all
from exegete.llm.reader import Reader
from exegete.types import LLMRequest, TokenLogprob

STAGE = "reading"
_REACH = 8
"""Characters, at most, that a token may stand for that is no text by itself, such as a part of a character."""


def reading_request(text: str) -> LLMRequest:
    """Return the request that reads a whole text.

    Of the tokens that follow none is wanted, but several servers refuse to make none.
    """
    return LLMRequest(prompt=text, max_tokens=1, prompt_logprobs=True, stage=STAGE)


@final
class ServerReader(Reader):
    """Reads through a client whose model gives the log probabilities of a prompt's tokens: one request per pair.

    A continuation gives None when the request failed, when a token that counts has no log probability (the first of a
    prompt, where the server puts no BOS before it), or when tokens cannot be told apart at the border.
    """

    def __init__(self, client: LLMClient, *, natural: bool = True) -> None:
        """Read through a client; ``natural`` says whether its model was trained on natural language."""
        self._client, self._natural = client, natural

    @property
    def name(self) -> str:
        """That of the client."""
        return self._client.name

    @property
    def natural(self) -> bool:
        """As the one who made the reader said, and never where nothing is asked behind the client."""
        return self._natural and not self._client.simulated

    async def logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return log p(continuation | beginning) in nats of each pair; a whole text is asked about once."""
        texts = list(dict.fromkeys(beginning + continuation for beginning, continuation in pairs if continuation))
        read = dict(zip(texts, await gather_all(map(self._read, texts)), strict=True))
        return [summed(read[b + c], b + c, len(b)) if c else 0.0 for b, c in pairs]

    async def close(self) -> None:
        """Give back the client's connections."""
        await self._client.close()

    async def _read(self, text: str) -> tuple[TokenLogprob, ...]:
        """Return the tokens of a text; none where it was not read."""
        reply = await self._client.reply(reading_request(text))
        return () if reply.finish == "error" else reply.prompt_logprobs or ()


def summed(tokens: Sequence[TokenLogprob], text: str, border: int) -> float | None:
    """Return the sum over the tokens of a text that hold a character from place ``border`` on.

    None where one of them has no log probability, or where it cannot be told which they are.
    """
    ends = token_ends([token.token for token in tokens], text, border)
    if ends is None:
        return None
    nats = [token.logprob for token, end in zip(tokens, ends, strict=True) if end > border]
    known = [value for value in nats if value is not None and math.isfinite(value)]
    return sum(known) if len(known) == len(nats) else None


def token_ends(tokens: Sequence[str], text: str, border: int) -> list[int] | None:
    """Return where in the text each token ends; None when they do not spell it, or not clearly so at ``border``.

    Tokens that are no text by themselves (a part of a character, a BOS that was not asked for) end where the next one
    begins that is; when ``border`` lies among the characters of several such tokens, it cannot be told whose they are.
    Empty tokens end where the next one does: some servers give a character's whole text to the last of its tokens.
    """
    known = _ends([token for token in tokens if token], text, border)
    if known is None:
        return None
    ends, end = [], len(text)
    for token in reversed(tokens):
        end = known.pop() if token else end
        ends.append(end)
    return ends[::-1]


def _ends(tokens: Sequence[str], text: str, border: int) -> list[int] | None:
    ends: list[int] = []
    at, odd = 0, 0
    for token in (*tokens, ""):
        start = _found(text, token, at, odd) if token else _end(text, at, odd)
        if start is None:
            odd += 1
            continue
        if odd > 1 and at < border < start:
            return None
        ends += [start] * odd
        at, odd = start + len(token), 0
        ends.append(at)
    return ends[:-1] if at == len(text) and not odd else None


def _found(text: str, token: str, at: int, odd: int) -> int | None:
    """Return where a token begins, at most as far on as the odd ones before it reach."""
    place = text.find(token, at, at + odd * _REACH + len(token))
    return place if place >= 0 else None


def _end(text: str, at: int, odd: int) -> int | None:
    """Return the end of the text where the odd tokens before it reach so far."""
    return len(text) if len(text) <= at + odd * _REACH else None
