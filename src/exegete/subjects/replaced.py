"""Functions of transformers' model files that others take the place of, within a block of code and one thread."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch

_offering = threading.Lock()


@final
class Replaced:
    """A function that the files of several families have under one name, and what is called instead.

    Layers look such a function up in their module whenever they run. So a choice is put in its place there, once and
    for good, which calls the stock function but for threads within ``taken``.
    """

    def __init__(self, name: str, instead: Callable[..., Any]) -> None:
        """Take the name, and what is called instead: ``instead(stock, setting, *args, **kwargs)``."""
        self._name, self._instead = name, instead
        self._setting: ContextVar[tuple[Any] | None] = ContextVar(name, default=None)
        self._choices: dict[str, Callable[..., Any]] = {}

    @contextmanager
    def taken(self, model: torch.nn.Module, setting: Any = None) -> Iterator[None]:
        """Have the layers of a model's family call the other function within the block, in this thread."""
        self._offer(type(model).__module__)
        before = self._setting.set((setting,))
        try:
            yield
        finally:
            self._setting.reset(before)

    def _offer(self, module: str) -> None:
        home = vars(sys.modules[module])
        with _offering:
            if self._name in home and home[self._name] is not self._choices.get(module):
                self._choices[module] = home[self._name] = self._choice(home[self._name])

    def _choice(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            # A layer that torch.compile builds keeps what it was built of.
            setting = None if torch.compiler.is_compiling() else self._setting.get()
            return stock(*args, **kwargs) if setting is None else self._instead(stock, setting[0], *args, **kwargs)

        return chosen
