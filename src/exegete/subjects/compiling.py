"""Compiled layers whose hooks still fire.

``torch.compile`` does not see hooks that are put on the inside of a compiled module afterwards: they are silently not
called. So each layer's ``forward`` is compiled by itself, which leaves the hooks of the layer outside, and is in place
only during a pass, and only on layers with nothing hooked inside; the others run as they are. Layers of one shape
share one compilation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import torch

from exegete.errors import InputError


@final
class CompiledLayers:
    """The compiled forward of every layer of a model, compiled when first run."""

    def __init__(self, layers: Mapping[str, torch.nn.Module], backend: str) -> None:
        """Take the layers by name, and a backend of torch.compile.

        Raises InputError for a backend that this machine does not have.
        """
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise InputError(f"unknown compiler backend {backend!r}; allowed: {', '.join(known)}")
        self._layers = layers
        self._forwards: Mapping[str, Any] = {
            name: torch.compile(layer.forward, backend=backend) for name, layer in layers.items()
        }

    @contextlib.contextmanager
    def installed(self, hooked: Iterable[str]) -> Iterator[None]:
        """Run compiled every layer that none of the hooked modules lies inside, for as long as the context lasts.

        Raises InputError when the compiler fails.
        """
        inside = tuple(hooked)
        chosen = [name for name in self._layers if not any(point.startswith(f"{name}.") for point in inside)]
        before = {name: self._layers[name].__dict__.get("forward") for name in chosen}
        for name in chosen:
            self._layers[name].__dict__["forward"] = self._forwards[name]
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            line = " ".join(str(error).partition("\n\n")[0].split())[:200]
            raise InputError(f"the layers cannot be compiled ({line}); load the subject without compile") from error
        finally:
            for name, forward in before.items():
                if forward is None:
                    del self._layers[name].__dict__["forward"]
                else:
                    self._layers[name].__dict__["forward"] = forward
