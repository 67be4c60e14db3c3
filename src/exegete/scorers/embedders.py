"""Texts as vectors: what the embedding scorers and the intruder's embedding judge compare."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, final

import numpy as np

from exegete.examples.similar import DEFAULT_MODEL, sentence_model
from exegete.types import Array

INSTRUCTION: Final = "Instruct: Retrieve sentences that could be related to the interpretation.\nQuery:"
"""What stands before a query to a model that takes instructions (arXiv 2410.13928, App. D.4)."""
_INSTRUCTED: Final = "Instruct:"
_KEPT_BYTES: Final = 64 << 20


class Embedder(ABC):
    """Gives texts vectors of length 1, so that their dot product is their cosine."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The model as named on the command line."""

    @property
    @abstractmethod
    def natural(self) -> bool:
        """Whether it was trained on natural language; what another finds checks only that a pipeline works."""

    @abstractmethod
    def check(self) -> None:
        """Raise InputError where it cannot be had: an extra that is not installed, a model that is not there."""

    @abstractmethod
    def embed(self, texts: Sequence[str], *, query: bool = False) -> Array:
        """Return the vectors of texts, float32 [n, d]; of queries (explanations), or of documents (windows)."""


@final
class SentenceEmbedder(Embedder):
    """A sentence-transformers model by hub name or folder, loaded when first needed.

    ``instruction`` stands before a query. Left open, it is the paper's (``INSTRUCTION``) for a model that comes with
    prompts that begin with ``Instruct:``; any other gets the query prompt it comes with, if any (all-MiniLM has none).
    Documents get the model's own document prompt, if any.

    Vectors depend on the texts that are embedded together, by rounding: a list of texts always goes to the model as it
    is, and the last lists are kept (64 MB), so that scorers that embed the same windows share the work.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, instruction: str | None = None) -> None:
        self._name, self._instruction = model, instruction
        self._model: Any = None
        self._kept: OrderedDict[tuple[bool, tuple[str, ...]], Array] = OrderedDict()

    @property
    def name(self) -> str:
        """The model's hub name or folder."""
        return self._name

    @property
    def natural(self) -> bool:
        """True: what is published as a sentence-transformers model was trained on natural language."""
        return True

    def check(self) -> None:
        """Load the model. Raises MissingExtraError without sentence-transformers, NotFoundError without the model."""
        if self._model is None:
            self._model = sentence_model(self._name)

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Array:
        """Return the vectors of texts, float32 [n, d]; not to be changed, since they are kept."""
        key = query, tuple(texts)
        if key not in self._kept:
            self.check()
            found = np.asarray(self._encode(list(texts), query), np.float32)
            found.setflags(write=False)
            self._kept[key] = found
        self._kept.move_to_end(key)
        while sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _encode(self, texts: list[str], query: bool) -> Any:
        options = {"convert_to_numpy": True, "normalize_embeddings": True, "show_progress_bar": False}
        if not texts:
            return np.zeros((0, self._model.get_embedding_dimension()), np.float32)
        if not query:
            return self._model.encode_document(texts, **options)
        before = self._instruction
        if before is None and any(text.startswith(_INSTRUCTED) for text in self._model.prompts.values()):
            before = INSTRUCTION
        return self._model.encode_query(texts, prompt=before, **options)


@lru_cache(maxsize=8)
def _sentence_embedder(model: str, instruction: str | None) -> SentenceEmbedder:
    return SentenceEmbedder(model, instruction=instruction)


def embedder_of(model: str | Embedder, instruction: str | None = None) -> Embedder:
    """Return the embedder of a name, one for this process; an embedder as it is."""
    return model if isinstance(model, Embedder) else _sentence_embedder(model, instruction)
