"""What models of this process share: loaded once, in a thread, when first needed, and told of by their tokenizer."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Generic, TypeVar

from exegete.errors import ExegeteError, InputError, LLMError
from exegete.llm.backend import Backend
from exegete.llm.identity import is_demo
from exegete.llm.tokenised import folder_identity, prompt_ids
from exegete.types import LLMRequest

M = TypeVar("M")


class InProcess(Backend, ABC, Generic[M]):
    """A model of type M with its tokenizer; ``service`` is the word before the model's name on the command line.

    A model that could not be loaded is not tried again. ``_running`` is held while it works: an earlier event loop's
    batch may still be ending.
    """

    service: str

    def __init__(self, model: str) -> None:
        if not model:
            raise InputError(
                f"{self.service}/ names no model; write {self.service}/MODEL with a folder or a Hugging Face id"
            )
        self._model = model
        self._loading, self._running = threading.Lock(), threading.Lock()
        self._loaded: tuple[M, Any] | None = None
        self._failed: ExegeteError | None = None

    @property
    def name(self) -> str:
        """The model as named on the command line."""
        return f"{self.service}/{self._model}"

    @cached_property
    def identity(self) -> str:
        """The name; of a folder, what lies in it: others may stand under the same path, and change."""
        return folder_identity(self._model) or self.name

    @cached_property
    def natural(self) -> bool:
        """Whether it is another model than the demo's, which was trained on Python code alone."""
        return not is_demo(self.name)

    @property
    def unlimited(self) -> bool:
        """True: requests wait here until they are taken together, and none is throttled."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._model!r})"

    def count(self, request: LLMRequest) -> int | None:
        """Return the prompt's tokens; None before the model is loaded, and for messages that it cannot read."""
        if self._loaded is None:
            return None
        try:
            return len(prompt_ids(self._loaded[1], request, self.name))
        except LLMError:
            return None

    @abstractmethod
    def _read(self) -> tuple[M, Any]:
        """Load model and tokenizer."""

    async def _ready(self) -> tuple[M, Any]:
        return await asyncio.to_thread(self._load) if self._loaded is None else self._loaded

    def _load(self) -> tuple[M, Any]:
        with self._loading:
            if self._failed is not None:
                raise self._failed
            if self._loaded is None:
                try:
                    self._loaded = self._read()
                except ExegeteError as error:
                    self._failed = error  # the next request would only find the same
                    raise
            return self._loaded
