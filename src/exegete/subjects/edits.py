"""Edits of what flows through a subject: what is added to the activations at a point, and where.

An edit says what is added, so one that adds nothing leaves every activation as it is, bit for bit. That is also how a
latent is edited with its coder's error kept (arXiv 2410.13928, section 3.3.5 and App. G): with h the activation, c its
code and c′ the edited code, h′ = decode(c′) + (h − decode(c)) = h + decode(c′) − decode(c). Decoders are linear in
the values of their latents, so the last two terms are a multiple of the latent's own direction, and nothing else of the
reconstruction has to be computed.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch

from exegete.errors import InputError, MismatchError
from exegete.subjects.names import Point
from exegete.subjects.subject import Subject
from exegete.types import SparseCode

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder

Strength = float | torch.Tensor
"""How much of an edit: a number, or one for each row [rows]."""
Where = slice | torch.Tensor
"""Positions of a pass that are edited: a slice of every row, or a mask [rows, positions] bool."""
LatentEditKind = Literal["add", "clamp", "ablate"]
_LOCAL = threading.local()


class Edit(ABC):
    """What is added to the activations at ``target``, given those at ``source`` where there is one.

    ``source`` lies before ``target`` in the forward pass or is the same point; it is read, never changed.
    """

    target: Point
    source: Point | None

    @abstractmethod
    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Return what is added to the activations ``y`` [n, d] at the target.

        ``x`` [n, d_in] are those at the source (``y`` itself where the two are the same point), ``rows`` [n] int64 the
        row of the pass that each belongs to.
        """


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AddVector(Edit):
    """Add ``strength`` times a vector [d] (contrastive activation addition, a random direction, a probe's)."""

    target: Point
    vector: torch.Tensor
    strength: Strength = 1.0
    source: Point | None = None

    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Return the vector times each row's strength. Raises MismatchError for a vector of another size."""
        if self.vector.shape != y.shape[1:]:
            have, want = tuple(self.vector.shape), int(y.shape[1])
            raise MismatchError(f"the vector has shape {have}, {self.target[0]!r} has {want} dimensions")
        vector = self.vector.to(y.device)
        return _each(self.strength, rows).to(vector)[:, None] * vector


@final
class EditLatent(Edit):
    """Change one latent of a coder and keep the coder's error.

    ``add`` adds ``strength`` to the latent's value, ``clamp`` sets the value to ``strength``, ``ablate`` sets it to 0.
    The value is what the coder's own encoder gives; no other latent changes, also under TopK.

    Raises InputError for another kind, or a latent that the coder does not have.
    """

    def __init__(
        self, coder: SparseCoder, index: int, *, kind: LatentEditKind = "add", strength: Strength = 0.0
    ) -> None:
        if kind not in get_args(LatentEditKind):
            raise InputError(f"a latent is edited by {', '.join(get_args(LatentEditKind))}, got {kind!r}")
        if not 0 <= index < coder.width:
            raise InputError(f"coder {coder.name!r} has the latents 0 to {coder.width - 1}, got {index}")
        self.coder, self.index, self.kind, self.strength = coder, index, kind, strength
        self.source, self.target = coder.point, coder.target

    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Return the latent's direction times the change of its value."""
        given = y if x is None else x
        by = torch.zeros(len(given)) if self.kind == "ablate" else _each(self.strength, rows)
        by = by.to(self.coder.device, self.coder.dtype)
        if self.kind != "add":
            by = by - latent_values(self.coder, self.index, given)
        return by[:, None] * direction(self.coder, self.index, given)


def direction(coder: SparseCoder, index: int, x: torch.Tensor) -> torch.Tensor:
    """Return what one unit of a latent adds to the reconstruction of each input ``x`` [n, d_in], [n, d_out].

    That is its decoder row, times the input's scale where the coder norms its input. The scale is read off two
    reconstructions, of one unit and of none; the row is taken as it is, because in half floats their difference would
    hold the rounding errors of everything else in them.
    """
    x = x.to(coder.device, coder.dtype)
    indices = torch.full((len(x), 1), index, device=coder.device)
    values = torch.ones((len(x), 1), device=coder.device, dtype=coder.dtype)
    one = SparseCode(indices=indices, values=values, width=coder.width)
    none = SparseCode(indices=indices, values=torch.zeros_like(values), width=coder.width)
    row = coder.decoder_rows(indices[:1, 0])[0].float()
    more = (coder.decode(one, x) - coder.decode(none, x)).float()
    scale = more @ row / (row @ row).clamp_min(torch.finfo(torch.float32).tiny)
    return (scale[:, None] * row).to(coder.dtype)


def latent_values(coder: SparseCoder, index: int, x: torch.Tensor) -> torch.Tensor:
    """Return the value [n] of one latent on inputs ``x`` [n, d_in], 0 where it is silent."""
    code = coder.encode(x)
    mine = torch.where(code.indices == index, code.values, torch.zeros_like(code.values))
    if code.offsets is None:
        return mine.sum(dim=1)
    row = torch.repeat_interleave(torch.arange(len(x), device=mine.device), code.offsets.diff().to(mine.device))
    return torch.zeros(len(x), device=mine.device, dtype=mine.dtype).index_add_(0, row, mine)


def _each(strength: Strength, rows: torch.Tensor) -> torch.Tensor:
    """Return the strength of each of n activations [n]."""
    if isinstance(strength, torch.Tensor) and strength.ndim:
        return strength.to(rows.device)[rows]
    return torch.full((len(rows),), float(strength), device=rows.device)


@contextlib.contextmanager
def edited(subject: Subject, edits: Sequence[Edit], where: Where = slice(None)) -> Iterator[None]:
    """Let forward passes of the subject's model in this thread be edited, for as long as the context lasts.

    ``where`` are positions of each pass: of a pass over one new token after a cached beginning, that token. Edits of
    one point are made in the order given. A module that runs several times in a pass is edited the first time, as it
    is captured then. Activations are never changed in place.

    Raises InputError for a point that no pass reached or that holds no activations per position, and for an edit that
    reads behind where it writes; NotFoundError for unknown points.
    """
    hooks = _Hooks([_placed(subject, edit) for edit in edits], where)
    try:
        hooks.install(subject.model)
        yield
    finally:
        hooks.remove()
    hooks.check()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Let forward passes in this thread be as if nothing was edited, for as long as the context lasts."""
    before = getattr(_LOCAL, "paused", False)
    _LOCAL.paused = True
    try:
        yield
    finally:
        _LOCAL.paused = before


def _placed(subject: Subject, edit: Edit) -> _Place:
    target = _canonical(subject, edit.target)
    source = None if edit.source is None else _canonical(subject, edit.source)
    return _Place(edit=edit, target=target, source=None if source == target else source)


def _canonical(subject: Subject, point: Point) -> Point:
    found = subject.points(*point)
    if len(found) != 1:
        raise InputError(f"{point[0]!r} stands for {len(found)} hookpoints; name one of them")
    return found[0]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """An edit with canonical points; ``source`` is None where it reads what it writes."""

    edit: Edit
    target: Point
    source: Point | None


@final
class _Hooks:
    """The hooks of some edits, and what they read in the pass under way."""

    def __init__(self, places: Sequence[_Place], where: Where) -> None:
        self._places, self._where = places, where
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self._shape = (0, 0)
        self._read: dict[Point, torch.Tensor] = {}
        self._reached: set[Point] = set()
        self._passes = 0

    def install(self, model: Any) -> None:
        """Put the hooks on the modules of a model with its head."""
        base: torch.nn.Module = model.base_model
        for whole in (model, base):  # a pass may begin at either, and some heads go past the base model (OPT)
            self._handles.append(whole.register_forward_pre_hook(self._begin, with_kwargs=True))
        sources = {place.source for place in self._places if place.source is not None}
        for point in {place.target: None for place in self._places} | dict.fromkeys(sources):
            module = base.get_submodule(point[0])
            if point[1] == "input":
                self._handles.append(module.register_forward_pre_hook(self._before(point), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._after(point)))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Raise InputError when passes were made and a point was never reached."""
        missing = sorted({place.target[0] for place in self._places if place.target not in self._reached})
        if self._passes and missing:
            raise InputError(f"the forward pass never runs {', '.join(map(repr, missing))}; choose another hookpoint")

    @property
    def _elsewhere(self) -> bool:
        """Whether the pass under way is none of those that are edited."""
        return threading.get_ident() != self._thread or getattr(_LOCAL, "paused", False)

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._elsewhere:
            return
        given = read_by(args, kwargs)
        self._shape = int(given.shape[0]), int(given.shape[1])
        self._read.clear()
        self._passes += 1

    def _before(self, point: Point) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._elsewhere:
                return None
            # The same tensor that ``capture`` reads.
            at = next((i for i, value in enumerate(args) if torch.is_tensor(value)), None)
            if at is not None:
                return (*args[:at], self._through(point, args[at]), *args[at + 1 :]), kwargs
            name = next((n for n in ("hidden_states", "x", *kwargs) if torch.is_tensor(kwargs.get(n))), None)
            given = None if name is None else kwargs[name]
            return args, {**kwargs, str(name): self._through(point, given)}

        return hook

    def _after(self, point: Point) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._elsewhere:
                return None
            return _with_first(output, lambda value: self._through(point, value))

        return hook

    def _through(self, point: Point, value: torch.Tensor | None) -> torch.Tensor:
        """Read an activation, and return it edited."""
        rows, length = self._shape
        if value is None or not value.is_floating_point() or value.numel() % max(1, rows * length):
            raise InputError(f"the {point[1]} of hookpoint {point[0]!r} holds no activations; choose another hookpoint")
        if point in self._read:
            return value  # a module shared between layers runs again
        if value.shape[:2] != (rows, length) and not (value.ndim == 2 and len(value) == rows * length):
            have = tuple(value.shape)
            raise InputError(
                f"the {point[1]} of hookpoint {point[0]!r} has shape {have}, not [rows, positions, …] = "
                f"[{rows}, {length}, …]; choose another hookpoint"
            )
        flat = value.reshape(rows, length, -1)
        self._read[point] = flat
        for place in self._places:
            if place.target == point:
                flat = self._edited(place, flat)
        self._reached.add(point)
        return value if flat is self._read[point] else flat.reshape(value.shape)

    def _edited(self, place: _Place, y: torch.Tensor) -> torch.Tensor:
        if place.source is not None and place.source not in self._read:
            reads, writes = place.source[0], place.target[0]
            raise InputError(f"an edit of {writes!r} reads {reads!r}, which comes after it in the forward pass")
        chosen = self._where
        if isinstance(chosen, slice):
            mask = torch.zeros(y.shape[:2], dtype=torch.bool, device=y.device)
            mask[:, chosen] = True
        else:
            mask = chosen.to(y.device)
        mine = y[mask]
        x = mine if place.source is None else self._read[place.source][mask.to(self._read[place.source].device)]
        rows = mask.nonzero()[:, 0]
        new = y.clone()
        new[mask] = mine + place.edit.change(mine, x, rows).to(y)
        return new


def read_by(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the tokens or embeddings [rows, positions, ...] that a model is called on, never a mask."""
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
    return next(value for value in (*args[:1], *named, *args, *kwargs.values()) if torch.is_tensor(value))


def _with_first(output: Any, through: Any) -> Any:
    """Return a module's output with its first tensor passed through a function; the others stay as they are."""
    if torch.is_tensor(output):
        return through(output)
    if isinstance(output, Mapping):
        name = next((n for n, value in output.items() if torch.is_tensor(value)), None)
        if name is None:
            return through(None)
        changed = type(output)(**output)
        changed[name] = through(output[name])  # type: ignore[index]
        return changed
    parts = list(output) if isinstance(output, Sequence) else []
    at = next((i for i, value in enumerate(parts) if torch.is_tensor(value)), None)
    if at is None:
        return through(None)
    parts[at] = through(parts[at])
    return tuple(parts) if isinstance(output, tuple) else parts
