"""What a model carries from one call to the next, behind one interface: begun, fed, copied, read and written.

A ``Memory`` does what the model's own code does, right or wrong; whether that equals a whole pass is measured by
``verdicts.py``, and ``running.py`` feeds it the way that is exact. Everything read is a copy in the real domain, in
float32 or wider; whatever is written back and did not change keeps every bit of what the model had.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, final

import torch

from exegete.errors import InputError
from exegete.subjects.fast_scan import fast_scan
from exegete.subjects.names import layers
from exegete.subjects.step_limits import step_limits
from exegete.subjects.subject import Subject

Parts = dict[int, dict[str, torch.Tensor]]
"""Tensors [rows, ...] by block and component."""
CACHES = ("past_key_values", "cache_params")
"""How models name the cache that they take and give."""


class Memory(ABC):
    """What some rows left behind in a model; every call of ``feed`` advances it."""

    @abstractmethod
    def feed(self, tokens: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """Run the model once over the next tokens [rows, positions] and return their logits, in the model's dtype.

        With ``last`` only those of the last position, [rows, 1, V], where the model can leave the others out.
        """

    @abstractmethod
    def copied(self, rows: torch.Tensor | None = None) -> Memory:
        """Return a deep copy, of the given rows [n] in this order; this one stays as it is."""

    @abstractmethod
    def names(self) -> dict[int, tuple[str, ...]]:
        """Return the components of every block that carries a state, of some families once anything was read."""

    @abstractmethod
    def read(self, blocks: Collection[int] | None = None) -> Parts:
        """Return copies of the recurrent state by block and component, of all blocks that have one or of some."""

    @abstractmethod
    def write(self, block: int, parts: Mapping[str, torch.Tensor]) -> int:
        """Set components of one block to these values, and return how many entries were held at a bound.

        An entry that equals what was read keeps the bits that the model had.
        """


def called(model: Any, tokens: torch.Tensor, *, last: bool = False, **options: Any) -> Mapping[str, Any]:
    """Call a model on tokens with those of the options that it knows."""
    with fast_scan(model):
        return _called(model, tokens, last=last, **options)


def _called(model: Any, tokens: torch.Tensor, *, last: bool, **options: Any) -> Mapping[str, Any]:
    known = inspect.signature(model.forward).parameters
    given = {**({"logits_to_keep": 1} if last else {}), **options}
    output: Mapping[str, Any] = model(input_ids=tokens, **{n: v for n, v in given.items() if n in known})
    return output


@contextlib.contextmanager
def going_on(model: Any, cache: Any = None) -> Iterator[None]:
    """Have calls go on from a cache as a whole pass does, within the block and this thread.

    Stock layers of the Mamba kind begin their scans at no state, and keep no limits in single steps. The states of
    ``cache`` serve the next call alone.
    """
    with fast_scan(model, initial=recurrent_states(cache)), step_limits(model):
        yield


def recurrent_states(cache: Any) -> list[torch.Tensor]:
    """Return the states that scans go on from, in the order of the scans; none where it is no cache of transformers.

    That is layer after layer, and head after head where a layer scans each of them by itself (Zamba).
    """
    layers = getattr(cache, "layers", None)
    held = [vars(layer).get("recurrent_states") or {} for layer in layers] if isinstance(layers, list) else []
    states = [state for named in held for state in named.values() if torch.is_tensor(state)]
    return [one for state in states for one in (state.unbind(1) if state.ndim == 4 else (state,))]


def kept(raw: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return new values in the dtype of ``raw``, and ``raw`` itself where they equal the old ones that were read."""
    return torch.where(new == old, raw, new.to(raw.dtype))


@final
class CacheMemory(Memory):
    """A cache object of transformers: keys and values, states of linear attention, or both by layer.

    States of a mixer of the Mamba kind are ``conv`` [rows, channels, window] and ``ssm``; of the delta-net kind
    ``conv`` and ``kv`` [rows, heads, d_key, d_value]. Several convolutions of one layer are one component, channels
    after channels. Mended, the model is told the positions of its tokens, for some count from 0 in every call (Bamba),
    single steps keep within the limits of whole passes (Zamba 2, Nemotron-H), and scans of several tokens begin at the
    states behind those before (Mamba, FalconMamba, Jamba, Zamba).
    """

    def __init__(self, subject: Subject, cache: Any = None, *, mended: bool = True, length: int = 0) -> None:
        self._subject, self._cache, self._mended, self._length = subject, cache, mended, length
        known = inspect.signature(subject.model.forward).parameters
        self._name = next(name for name in CACHES if name in known)

    def feed(self, tokens: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """See ``Memory``."""
        options = {} if self._cache is None else {self._name: self._cache}
        if self._mended:
            options["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None] + self._length
        model = self._subject.model
        with going_on(model, self._cache) if self._mended else fast_scan(model):
            output = _called(model, tokens, last=last, use_cache=True, **options)
        self._cache = output[self._name]
        self._length += tokens.shape[1]
        logits: torch.Tensor = output["logits"]
        return logits

    def copied(self, rows: torch.Tensor | None = None) -> CacheMemory:
        """See ``Memory``."""
        cache = copy.deepcopy(self._cache)
        if rows is not None and cache is not None:
            cache.reorder_cache(rows)
        return CacheMemory(self._subject, cache, mended=self._mended, length=self._length)

    def names(self) -> dict[int, tuple[str, ...]]:
        """See ``Memory``."""
        found = {block: tuple(self._raw(block)) for block in range(len(self._layers))}
        return {block: names for block, names in found.items() if names}

    def read(self, blocks: Collection[int] | None = None) -> Parts:
        """See ``Memory``."""
        chosen = [block for block in self.names() if blocks is None or block in blocks]
        return {
            block: {name: torch.cat(parts, dim=1).float().clone() for name, parts in self._raw(block).items()}
            for block in chosen
        }

    def write(self, block: int, parts: Mapping[str, torch.Tensor]) -> int:
        """See ``Memory``."""
        raw = self._raw(block)
        for name, value in parts.items():
            tensors = raw[name]
            pieces = torch.split(value.to(tensors[0].device), [t.shape[1] for t in tensors], dim=1)
            for tensor, piece in zip(tensors, pieces, strict=True):
                tensor.copy_(kept(tensor, tensor.float(), piece))
        return 0

    @property
    def _layers(self) -> Sequence[Any]:
        found: Sequence[Any] = vars(self._cache).get("layers", ()) if self._cache is not None else ()
        return found

    def _raw(self, block: int) -> dict[str, list[torch.Tensor]]:
        """Return the model's own tensors of one block by component."""
        layer = self._layers[block] if block < len(self._layers) else None
        held = {} if layer is None else vars(layer)
        found: dict[str, list[torch.Tensor]] = {}
        for field in ("conv_states", "recurrent_states"):
            tensors = [t for t in held.get(field, {}).values() if torch.is_tensor(t)]
            if tensors:
                name = "conv" if field == "conv_states" else self._recurrent(block)
                found[name] = tensors
        return found

    def _recurrent(self, block: int) -> str:
        module = self._subject.model.base_model.get_submodule(layers(self._subject.hookpoints())[block])
        # Mixers of the Mamba kind have a skip connection D over their state; those of the delta-net kind have none.
        return "ssm" if any(name.rpartition(".")[2] == "D" for name, _ in module.named_parameters()) else "kv"


def entries(state: Any, count: int) -> list[torch.Tensor]:
    """Return a state that is a list of some tensors. Raises InputError for anything else."""
    if not isinstance(state, (list, tuple)) or len(state) != count or not all(map(torch.is_tensor, state)):
        raise InputError(f"a state is a list of {count} tensors in this family, the model gave {type(state).__name__}")
    return list(state)
