"""Vectors from contrasts: one recording pass, then a direction for every site and every component of the state."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypedDict, Unpack, final, get_args

import torch

from exegete.errors import InputError, unknown
from exegete.progress import Progress
from exegete.steering.behaviour_files import Row
from exegete.steering.estimate import Method, Shrinkage, check_options, direction_of
from exegete.steering.pairs import Pair
from exegete.steering.questions import Contrast, ReadAt, label_contrasts, text_contrasts
from exegete.steering.recording import Recorded, record
from exegete.steering.templates import template_of
from exegete.steering.vector import Normalise, SteeringVector, about, check_normalise, joined, normalised
from exegete.subjects import Subject
from exegete.subjects.sites import n_blocks

LEANING: Final = 0.8
"""The largest share of rows that match with one letter; of the published sets the most leaning one has .62."""
_FEW = 5
MOST_BYTES: Final = 4 << 30
"""What the rows of all parts may take that a method other than the mean keeps at once."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A vector; and of labelled rows the vector of the letter, A minus B, a control for leanings to a letter."""

    vector: SteeringVector
    letters: SteeringVector | None


@final
class VectorOptions(TypedDict, total=False):
    """What a vector is made of and how: options that ``fit_vector`` and what is built on it share.

    Attributes:
        sites: Where the residual stream is read, −1 for the embedding; None for every block.
        state: Whether the recurrent state is read as well, or which components of it.
        method: ``mean`` difference, ``lda``, ``logistic``, ``pca-diff`` or ``pca-center``; see ``estimate``.
        read: Which tokens; see ``ReadAt``.
        normalise: ``none`` leaves a direction as long as the method gives it; ``unit`` makes every part 1 long;
            ``rms`` as long as the activations there are in root mean square over the texts read.
        shrinkage: For ``lda``: ``auto``, or a number from 0 to 1.
        penalty: For ``logistic``, above 0: scikit-learn's 1 / C.
        source: What the pairs are, to be written down.
        progress: How far it is.
    """

    sites: Sequence[int] | None
    state: bool | Collection[str]
    method: Method
    read: str
    normalise: Normalise
    shrinkage: Shrinkage
    penalty: float
    source: str
    progress: Progress | None


def behaviour_vector(
    subject: Subject,
    rows: Sequence[Row],
    *,
    template: str = "plain",
    unbalanced: bool = False,
    **options: Unpack[VectorOptions],
) -> Made:
    """Return the vector of A/B rows: contrastive activation addition (arXiv 2312.06681, 2404.05971).

    A row's prompt ends in an open bracket; it is read with the label that shows the behaviour and with the other one.

    Args:
        subject: The model.
        rows: Questions with two labelled options; see ``balanced``.
        template: A name or a text; see ``template_of``.
        unbalanced: Whether rows may nearly all match with one letter, which makes the vector one of the letter.
        **options: See ``VectorOptions``; a mean difference over every block by default.

    Raises:
        InputError: For rows that cannot be read as asked, or that nearly all match with one letter; a state that the
            subject lacks; more rows than memory takes.
        NotFoundError: For another method, template, site or component.
    """
    found = template_of(template)
    if not unbalanced:
        _check_balance(rows)
    return fit_vector(subject, label_contrasts(rows, found, subject.tokenizer), template=template, **options)


def _check_balance(rows: Sequence[Row]) -> None:
    first = sum(row.match == row.labels[0] for row in rows)
    most = max(first, len(rows) - first)
    if len(rows) >= _FEW and most > LEANING * len(rows):
        label = rows[0].labels[0] if first == most else rows[0].labels[1]
        raise InputError(
            f"{most} of {len(rows)} rows match with ({label}), so their vector is mostly the letter's; balance them "
            f"with balanced(rows) (--balance swap), or allow it with unbalanced=True (--unbalanced)"
        )


def pair_vector(subject: Subject, pairs: Sequence[Pair], **options: Unpack[VectorOptions]) -> SteeringVector:
    """Return the vector of pairs of texts, read as they are. Options and errors as ``behaviour_vector``."""
    return fit_vector(subject, text_contrasts(pairs, subject.tokenizer), **options).vector


def fit_vector(
    subject: Subject,
    contrasts: Sequence[Contrast],
    *,
    template: str = "",
    sites: Sequence[int] | None = None,
    state: bool | Collection[str] = False,
    method: Method = "mean",
    read: str = "last",
    normalise: Normalise = "none",
    shrinkage: Shrinkage = "auto",
    penalty: float = 1.0,
    source: str = "",
    progress: Progress | None = None,
) -> Made:
    """Return the vector of pairs of token sequences: what the other two are built on. See ``VectorOptions``."""
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    check_options(shrinkage=shrinkage, penalty=penalty)
    check_normalise(normalise)
    where = tuple(range(n_blocks(subject))) if sites is None else tuple(sites)
    wanted = None if isinstance(state, bool) else frozenset(state)
    sums = _Sums(contrasts, keep=method != "mean")
    recorded = record(subject, contrasts, sites=where, state=bool(state), read=ReadAt(rule=read), progress=progress)
    for batch in recorded:
        sums.add(batch, _parts(batch, wanted))
    if method == "mean":
        directions = {name: sums.difference(name) for name in sums.names}
    else:
        how: dict[str, Any] = {"method": method, "shrinkage": shrinkage, "penalty": penalty}
        directions = {name: direction_of(*sums.rows(name), **how) for name in sums.names}
    sizes = {name: sums.rms(name) for name in sums.names}
    norms = {name: float(part.norm()) for name, part in directions.items()}
    parts = {name: part.to(sums.dtypes[name]) for name, part in normalised(directions, sizes, normalise).items()}
    residual, carried, _ = joined({name: part.reshape(sums.shapes[name]) for name, part in parts.items()})
    centres = {site: sums.middle(f"residual.{site}").float() for site in residual}
    facts = {"source": source, "template": template, "read": read, "n_pairs": len(contrasts)}
    given = {"lda": {"shrinkage": shrinkage}, "logistic": {"penalty": penalty}}.get(method, {})
    own = about(subject, method, normalise=normalise, norms=norms, options=given, **facts)
    vector = SteeringVector(residual=residual, state=carried, centres=centres, about=own)
    letters = None
    if all(contrast.first is not None for contrast in contrasts):
        found = {name: sums.letters(name).to(sums.dtypes[name]) for name in sums.names}
        residual, carried, _ = joined({name: part.reshape(sums.shapes[name]) for name, part in found.items()})
        of_letters = about(subject, "letters", **facts)
        letters = SteeringVector(residual=residual, state=carried, centres=centres, about=of_letters)
    return Made(vector=vector, letters=letters)


def _parts(batch: Recorded, wanted: frozenset[str] | None) -> dict[str, torch.Tensor]:
    found = {f"residual.{site}": values for site, values in batch.residual.items()}
    names = {name for part in batch.state.parts.values() for name in part}
    if wanted is not None and (strange := sorted(wanted - names)):
        raise unknown("state component", strange[0], names)
    for layer, part in batch.state.parts.items():
        for name, values in part.items():
            if wanted is None or name in wanted:
                found[f"state.{layer}.{name}"] = values
    return found


@final
class _Sums:
    """Sums over texts of every part, in float64; with ``keep`` the rows themselves."""

    def __init__(self, contrasts: Sequence[Contrast], *, keep: bool) -> None:
        self._first = torch.tensor([bool(contrast.first) for contrast in contrasts])
        self._n, self._keep = len(contrasts), keep
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._squares: dict[str, float] = {}
        self._rows: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The parts, in order."""
        return tuple(self.shapes)

    def add(self, batch: Recorded, parts: Mapping[str, torch.Tensor]) -> None:
        """Take in a batch of texts."""
        if not self.shapes:
            self._begin(parts)
        first = self._first[batch.pair] == batch.positive  # reads A: the positive where that is A, else the negative
        groups = torch.stack([batch.positive, ~batch.positive, first, ~first]).double()
        for name, values in parts.items():
            flat = values.flatten(1).double()
            self._sums[name] += groups @ flat
            self._squares[name] += float(flat.square().sum())
            if self._keep:
                self._rows[name][(~batch.positive).long(), batch.pair] = values.flatten(1).to(self.dtypes[name])

    def _begin(self, parts: Mapping[str, torch.Tensor]) -> None:
        self.shapes = {name: values.shape[1:] for name, values in parts.items()}
        # float64 where the model keeps a state so: numerators and denominators of exponentials span many powers of ten.
        self.dtypes = {n: v.dtype if v.dtype == torch.float64 else torch.float32 for n, v in parts.items()}
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        need = 2 * self._n * sum(size * self.dtypes[name].itemsize for name, size in sizes.items())
        if self._keep and need > MOST_BYTES:
            raise InputError(
                f"this method keeps every text's activations, {need / 2**30:.1f} GiB of them; use the method mean, or "
                f"fewer pairs, sites or state components (at most {MOST_BYTES / 2**30:.0f} GiB)"
            )
        for name, size in sizes.items():
            self._sums[name] = torch.zeros((4, size), dtype=torch.float64)
            self._squares[name] = 0.0
            if self._keep:
                self._rows[name] = torch.zeros((2, self._n, size), dtype=self.dtypes[name])

    def difference(self, name: str) -> torch.Tensor:
        """Return mean(positive) − mean(negative)."""
        return (self._sums[name][0] - self._sums[name][1]) / self._n

    def letters(self, name: str) -> torch.Tensor:
        """Return the mean over texts that end in the first label minus that over the others."""
        return (self._sums[name][2] - self._sums[name][3]) / self._n

    def middle(self, name: str) -> torch.Tensor:
        """Return the mean over all texts, as many of each class."""
        return (self._sums[name][0] + self._sums[name][1]) / (2 * self._n)

    def rms(self, name: str) -> float:
        """Return the root mean square, over texts, of the length of the activations."""
        return math.sqrt(self._squares[name] / (2 * self._n))

    def rows(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of the positives and of the negatives [n, size]."""
        return self._rows[name][0], self._rows[name][1]
