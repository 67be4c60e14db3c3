"""How much less surprising an explanation is after an edited text: what the intervention score reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np

from exegete.llm.client import gather_all
from exegete.llm.reader import Reader
from exegete.prompts import messages, prompt_hash
from exegete.types import Array

PROMPT: Final = "effect-reading-1"
HASH: Final = prompt_hash(PROMPT)


@cache
def opening() -> str:
    """Return what stands before every passage that is read: what it is about, and passages with their themes."""
    first, *shots, _ = messages(PROMPT, {"passage": ""})
    pairs = zip(shots[::2], shots[1::2], strict=True)
    return "\n\n".join([first["content"], *(user["content"] + said["content"] for user, said in pairs)]) + "\n\n"


def beginning(passage: str) -> str:
    """Return the text that an explanation goes on from."""
    return opening() + messages(PROMPT, {"passage": passage})[-1]["content"]


async def read_nats(reader: Reader, texts: Sequence[Sequence[str]], explanations: Sequence[str]) -> Array:
    """Return log p(explanation | passage) in nats, float64 [conditions, prompts]; NaN where the reader gave none.

    ``texts`` [conditions][prompts] are passages; the explanation of each prompt is read after all of them. What is
    summed are all tokens of the explanation and of the quotation mark that closes it. The passages of one prompt are
    read in one call: they begin alike.
    """

    async def one(prompt: int) -> list[float | None]:
        said = f'{explanations[prompt]}"'
        return await reader.logprobs([(beginning(passages[prompt]), said) for passages in texts])

    read = await gather_all(one(prompt) for prompt in range(len(explanations)))
    found = np.array([[math.nan if nats is None else nats for nats in row] for row in read], np.float64)
    return found.reshape(len(explanations), len(texts)).T
