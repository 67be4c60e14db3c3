"""The probes by name, and what each is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, final

from exegete.elk.facts import Feature
from exegete.elk.probes import Discriminant, Logistic, MeanDifference, Probe, RandomDirections
from exegete.elk.probes_pair import ContrastConsistent, ContrastPrincipal, Norm, VarianceInvariance
from exegete.elk.whitening import Whitening
from exegete.errors import unknown
from exegete.types import Array

RANK: Final = 256
"""Vectors of more dimensions than ``WIDE`` are fitted on so many whitened principal components."""
WIDE: Final = 1024
Whitens = Literal["rows", "answers"]
"""Wide vectors are whitened as one for each row (those of both answers side by side), or as one for each answer."""
_SINGLE: Final[tuple[Feature, ...]] = ("last", "state")
_PAIRS: Final[tuple[Feature, ...]] = ("pair", "state-pair")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What probes are made with.

    Attributes:
        rank: Of the whitening; None for none.
        seed: Of what is random.
        groups: Numbers [n] of the claims that the rows to fit on are wordings of; None where each is its own.
        shared: The whitening, where it was found already.
    """

    rank: int | None = None
    seed: int = 0
    groups: Array | None = None
    shared: Whitening | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of probe: the feature sets it reads, how one is made, and how it whitens wide vectors, if it does."""

    features: tuple[Feature, ...]
    make: Callable[[Making], Probe]
    whitens: Whitens | None = None


def _logistic(on_pair: bool) -> Callable[[Making], Probe]:
    return lambda m: Logistic(on_pair=on_pair, rank=m.rank, shared=m.shared)


def _discriminant(on_pair: bool, shrinkage: float | None = 0.0) -> Callable[[Making], Probe]:
    return lambda m: Discriminant(on_pair=on_pair, rank=m.rank, shared=m.shared, shrinkage=shrinkage)


def _consistent(norm: Norm) -> Callable[[Making], Probe]:
    return lambda m: ContrastConsistent(norm=norm, rank=m.rank, shared=m.shared, seed=m.seed)


KINDS: Final[Mapping[str, Kind]] = {
    "lr": Kind(features=_SINGLE, whitens="rows", make=_logistic(False)),
    "lr-on-pair": Kind(features=_PAIRS, whitens="rows", make=_logistic(True)),
    "mean-diff": Kind(features=_SINGLE, make=lambda m: MeanDifference()),
    "mean-diff-on-pair": Kind(features=_PAIRS, make=lambda m: MeanDifference(on_pair=True)),
    "lda": Kind(features=_SINGLE, whitens="rows", make=_discriminant(False)),
    "lda-on-pair": Kind(features=_PAIRS, whitens="rows", make=_discriminant(True)),
    "lda-shrunk": Kind(features=_SINGLE, whitens="rows", make=_discriminant(False, None)),
    "ccs": Kind(features=_PAIRS, whitens="answers", make=_consistent("leace")),
    "ccs-mean": Kind(features=_PAIRS, whitens="answers", make=_consistent("mean")),
    "ccs-mean-scale": Kind(features=_PAIRS, whitens="answers", make=_consistent("mean-scale")),
    "crc": Kind(features=_PAIRS, whitens="answers", make=lambda m: ContrastPrincipal(rank=m.rank, shared=m.shared)),
    "vinc": Kind(
        features=_PAIRS,
        whitens="answers",
        make=lambda m: VarianceInvariance(groups=m.groups, rank=m.rank, shared=m.shared),
    ),
    "random": Kind(features=_SINGLE, make=lambda m: RandomDirections(seed=m.seed)),
}
DEFAULT: Final = ("lr", "lr-on-pair", "mean-diff", "mean-diff-on-pair", "lda", "ccs", "crc", "vinc", "random")


def kind_of(name: str) -> Kind:
    """Return a kind of probe. Raises NotFoundError for another name."""
    if name not in KINDS:
        raise unknown("probe", name, KINDS)
    return KINDS[name]


def make_probe(name: str, making: Making | None = None) -> Probe:
    """Return a probe that is not fitted yet. Raises NotFoundError for another name."""
    return kind_of(name).make(making or Making())
