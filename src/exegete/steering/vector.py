"""A steering vector: directions in the residual stream at sites and in the recurrent state, and what they are of."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, final, get_args

import torch

from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.subjects.recurrent_state import StateVector

if TYPE_CHECKING:
    import numpy as np

    from exegete.subjects import Subject

Normalise = Literal["none", "unit", "rms"]
NO_STATE = StateVector({})
_Key = TypeVar("_Key", int, str)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Where a vector is from.

    Attributes:
        model: Name of the model, hub id or folder.
        model_hash: Content hash of the subject; empty where it is not known (a control vector from a GGUF file).
        model_type: The architecture's name in transformers.
        revision: Commit of the hub, None for a local folder.
        d: Size of the residual stream.
        method: mean, lda, logistic, pca-diff, pca-center, latent, letters, random or import.
        source: What it was made of: a file, a behaviour, a latent.
        template: Which words stood around the questions; empty for texts as they are.
        read: Which tokens were read, as ``ReadAt`` spells it.
        n_pairs: How many pairs.
        normalise: none, unit, or rms (see ``fit_vector``).
        options: What else the method was given: ``shrinkage`` of lda, ``penalty`` of logistic.
        dtype: What the subject computed in.
        version: Of exegete.
        norms: The length that each part had before it was normalised, by part.
    """

    model: str
    model_hash: str
    model_type: str
    d: int
    method: str
    revision: str | None = None
    source: str = ""
    template: str = ""
    read: str = ""
    n_pairs: int = 0
    normalise: str = "none"
    dtype: str = "float32"
    version: str = ""
    norms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    options: Mapping[str, float | str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**dataclasses.asdict(self), "norms": dict(self.norms), "options": dict(self.options)}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringVector:
    """Directions to steer with, float32 on the CPU; float64 where given so, as are states that a model keeps so.

    Attributes:
        residual: By site, [d].
        state: By block and component; empty where the vector has no state part.
        centres: By site, the middle between the two classes [d], from which projections are measured; 0 where absent.
        about: What it is of.
    """

    residual: Mapping[int, torch.Tensor]
    about: About
    state: StateVector = NO_STATE
    centres: Mapping[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("residual", "centres"):
            object.__setattr__(self, name, _held(getattr(self, name)))
        state = {layer: _held(part) for layer, part in self.state.parts.items()}
        if any(held is not self.state.parts[layer] for layer, held in state.items()):
            object.__setattr__(self, "state", StateVector(state))
        if not self.residual and not self.state.parts:
            raise InputError("a steering vector has a residual part, a state part, or both; this has none")
        for site, vector in (*self.residual.items(), *self.centres.items()):
            if vector.shape != (self.about.d,):
                raise MismatchError(
                    f"site {site} has shape {tuple(vector.shape)}, the residual stream of {self.about.model} has "
                    f"{self.about.d} dimensions"
                )
        for name, part in self.parts():
            if not bool(torch.isfinite(part).all()):
                raise InputError(f"the part {name} of the vector holds NaN or infinity")

    @property
    def sites(self) -> tuple[int, ...]:
        """The sites of the residual part, in order."""
        return tuple(sorted(self.residual))

    @property
    def components(self) -> tuple[str, ...]:
        """The components of the state part, sorted."""
        return tuple(sorted({name for part in self.state.parts.values() for name in part}))

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every part with its name: ``residual.3``, ``state.3.conv``."""
        for site in self.sites:
            yield f"residual.{site}", self.residual[site]
        for layer in self.state.layers:
            for name in sorted(self.state.components(layer)):
                yield f"state.{layer}.{name}", self.state.parts[layer][name]

    @property
    def hash(self) -> str:
        """Content hash of all parts as they are kept, 16 hex digits; those given in half floats are kept in float32."""
        found = hashlib.sha256()
        for name, part in (*self.parts(), *((f"centre.{s}", self.centres[s]) for s in sorted(self.centres))):
            found.update(f"{name} {part.dtype} {list(part.shape)}".encode())
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def only(
        self,
        *,
        sites: Collection[int] | None = None,
        components: Collection[str] | None = None,
        mode: Literal["residual", "state", "both"] = "both",
    ) -> SteeringVector:
        """Return the parts at some sites (blocks, of the state) and components, of one kind or both.

        Raises NotFoundError for a site that it has nothing at, InputError that names the missing part when nothing is
        left.
        """
        known = {*self.residual, *self.state.layers}
        if absent := sorted(set(sites or ()) - known):
            have = ", ".join(map(str, sorted(known)))
            raise NotFoundError(f"the vector has nothing at site {absent[0]}; it has the sites {have}")
        residual = {s: v for s, v in self.residual.items() if mode != "state" and (sites is None or s in sites)}
        layers = [i for i in self.state.layers if sites is None or i in sites]
        if components is not None and mode != "residual" and not layers:
            raise InputError(f"no {', '.join(sorted(components))} to choose: {self._lacking('state ', sites)}")
        state = self.state.only(layers=layers, components=components) if mode != "residual" and layers else NO_STATE
        if not residual and not state.parts:
            raise InputError(self._lacking("" if mode == "both" else f"{mode} ", sites))
        centres = {s: c for s, c in self.centres.items() if s in residual}
        return dataclasses.replace(self, residual=residual, state=state, centres=centres)

    def _lacking(self, kind: str, sites: Collection[int] | None) -> str:
        where = "" if sites is None else f" at site {', '.join(map(str, sorted(sites)))}"
        held = {"residual": self.sites, "state": self.state.layers}
        have = [f"a {name} part at site {', '.join(map(str, at))}" for name, at in held.items() if at]
        return f"the vector has no {kind}part{where}; it has {' and '.join(have)}"

    def random_like(self, rng: np.random.Generator) -> SteeringVector:
        """Return a vector in random directions, every part as long as here: a control."""
        residual = {}
        for site in self.sites:
            drawn = torch.from_numpy(rng.standard_normal(self.about.d))
            residual[site] = (drawn * (self.residual[site].double().norm() / drawn.norm())).float()
        state = self.state.random_like(rng) if self.state.parts else NO_STATE
        about = dataclasses.replace(self.about, method="random")
        return SteeringVector(residual=residual, state=state, centres=self.centres, about=about)

    def as_long_as(self, other: SteeringVector) -> SteeringVector:
        """Return it with every part as long as that of another vector; a part of length 0 stays as it is."""

        def scaled(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            length = float(mine.double().norm())
            return mine * (float(theirs.double().norm()) / length) if length > 0 else mine

        residual = {s: scaled(v, other.residual[s]) for s, v in self.residual.items() if s in other.residual}
        state = {
            i: {n: scaled(v, other.state.parts[i][n]) for n, v in part.items()}
            for i, part in self.state.parts.items()
            if i in other.state.parts
        }
        return dataclasses.replace(self, residual=residual, state=StateVector(state))

    def require(self, subject: Subject) -> None:
        """Raise MismatchError when the vector is of another model than the subject."""
        d = width(subject)
        if self.about.d != d:
            raise MismatchError(
                f"the vector is for {self.about.model} of {self.about.d} dimensions, {subject.name} has {d}; make one "
                f"for this model with: exegete steer vector"
            )
        if self.about.model_hash and self.about.model_hash != subject.hash:
            raise MismatchError(
                f"the vector was made on {self.about.model} (hash {self.about.model_hash}), not on {subject.name} "
                f"(hash {subject.hash}); load it with other_model=True (--other-model) if that is meant"
            )


def _held(parts: Mapping[_Key, torch.Tensor]) -> Mapping[_Key, torch.Tensor]:
    """Return parts as they are kept, the same object where they are so already; float16 and bfloat16 lose nothing."""
    held = {
        name: part.detach().to("cpu", torch.float64 if part.dtype == torch.float64 else torch.float32)
        for name, part in parts.items()
    }
    return parts if all(held[name] is part for name, part in parts.items()) else held


def width(subject: Subject) -> int:
    """Return the size of the residual stream."""
    from exegete.subjects.sites import site_point

    return subject.d(*site_point(subject, 0))


def about(subject: Subject, method: str, **more: Any) -> About:
    """Return where a vector is from that was made on a subject now."""
    from importlib.metadata import version

    config = subject.model.config
    return About(
        model=subject.name,
        model_hash=subject.hash,
        model_type=str(config.model_type),
        revision=getattr(config, "_commit_hash", None),
        d=width(subject),
        method=method,
        dtype=str(subject.dtype).removeprefix("torch."),
        version=version("exegete"),
        **more,
    )


def check_normalise(how: str) -> None:
    """Raise InputError for another word than none, unit and rms."""
    if how not in get_args(Normalise):
        raise InputError(f"a vector is normalised by none, unit or rms, got {how!r}")


def normalised(
    parts: Mapping[str, torch.Tensor], sizes: Mapping[str, float], how: Normalise
) -> dict[str, torch.Tensor]:
    """Return parts by name in the length that is asked for; ``sizes`` are those of the activations, for ``rms``.

    Raises InputError for another word, and for a part of length 0 that should get another.
    """
    check_normalise(how)
    if how == "none":
        return dict(parts)
    found = {}
    for name, part in parts.items():
        length = float(part.double().norm())
        if length == 0:
            raise InputError(f"the part {name} of the vector is zero, so it has no direction; leave it out")
        found[name] = part * ((1.0 if how == "unit" else sizes[name]) / length)
    return found


def joined(parts: Mapping[str, torch.Tensor]) -> tuple[dict[int, torch.Tensor], StateVector, dict[int, torch.Tensor]]:
    """Return residual, state and centres of parts by the names that ``SteeringVector.parts`` gives them.

    Raises InputError for a name of another form.
    """
    residual: dict[int, torch.Tensor] = {}
    centres: dict[int, torch.Tensor] = {}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, part in parts.items():
        kind, *rest = name.split(".")
        place = _number(rest)
        if place is None or (kind, len(rest)) not in (("residual", 1), ("centre", 1), ("state", 2)):
            raise InputError(
                f"{name!r} is no part of a steering vector: residual.SITE, centre.SITE, state.BLOCK.COMPONENT"
            )
        if kind == "state":
            state.setdefault(place, {})[rest[1]] = part
        else:
            (residual if kind == "residual" else centres)[place] = part
    return residual, StateVector(state), centres


def _number(rest: Sequence[str]) -> int | None:
    try:
        return int(rest[0])
    except (IndexError, ValueError):
        return None
