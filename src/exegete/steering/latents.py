"""Between steering vectors and latents: a latent's direction as a vector, and the latents that a vector is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch

from exegete.errors import InputError, MismatchError
from exegete.steering.vector import Normalise, SteeringVector, about, normalised, width
from exegete.subjects.sites import n_blocks, site_point

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.runs import Run
    from exegete.subjects import Subject

_ENTRIES: Final = 1 << 24  # of decoder rows that exist at once
_TOKENS: Final = 5
_ENOUGH: Final = 1e-6  # of the vector's squared length that a latent must still explain


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One latent in a vector.

    Attributes:
        index: Of the latent.
        coefficient: How much of its decoder row, in the units of its values; below 0 the vector leads away from it.
        cosine: Of the vector and the row.
        gain: By how much the explained share of the squared length grew with it.
        explanation: What the run says of it, None where it says nothing.
        tokens: What it fires on most often in the run, most first; none without a run.
    """

    index: int
    coefficient: float
    cosine: float
    gain: float
    explanation: str | None = None
    tokens: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """What a vector is made of at one site.

    Attributes:
        coder: Name of the coder.
        site: Where.
        norm: Length of the vector there.
        explained: Share of its squared length that the pieces add up to.
        chance: The same share for a random vector of the same pieces' number, the mean of some draws.
        pieces: Latents, largest contribution first.
        nearest: The latents of largest |cosine|, whether or not they are pieces.
    """

    coder: str
    site: int
    norm: float
    explained: float
    chance: float
    pieces: tuple[Piece, ...]
    nearest: tuple[Piece, ...]


def latent_vector(
    coder: SparseCoder, index: int, subject: Subject, *, normalise: Normalise = "none", source: str = ""
) -> SteeringVector:
    """Return a latent's decoder direction as a vector at the site that its coder writes to.

    With ``none`` the multiplier is in units of the latent's value.

    Raises InputError for a latent that the coder does not have, a coder that writes elsewhere than to the residual
    stream, or the normalisation ``rms``, which needs activations; MismatchError for a coder of another size.
    """
    if not 0 <= index < coder.width:
        raise InputError(f"coder {coder.name!r} has the latents 0 to {coder.width - 1}, got {index}")
    if normalise == "rms":
        raise InputError("a latent's direction comes without activations to measure; normalise by none or unit")
    site = site_of(coder, subject)
    row = coder.decoder_rows(torch.tensor([index], device=coder.device))[0].float().cpu()
    name = f"residual.{site}"
    norms = {name: float(row.norm())}
    part = normalised({name: row}, {}, normalise)[name]
    own = about(subject, "latent", source=source or f"{coder.name}/{index}", normalise=normalise, norms=norms)
    return SteeringVector(residual={site: part}, about=own)


def site_of(coder: SparseCoder, subject: Subject) -> int:
    """Return the site that a coder writes to.

    Raises InputError where that is no site (an MLP's output, say), MismatchError where it has another size.
    """
    if coder.d_out != width(subject):
        raise MismatchError(
            f"coder {coder.name!r} writes {coder.d_out} dimensions, the residual stream of {subject.name} has "
            f"{width(subject)}"
        )
    (target,) = subject.points(*coder.target)
    for site in range(-1, n_blocks(subject)):
        if site_point(subject, site) == target:
            return site
    raise InputError(
        f"coder {coder.name!r} writes to the {target[1]} of {target[0]!r}, which is no site of the residual stream; "
        f"use a coder on the output of a block"
    )


@torch.no_grad()
def compose(
    vector: SteeringVector, coder: SparseCoder, subject: Subject, *, k: int = 16, draws: int = 8, seed: int = 0
) -> Composition:
    """Return the latents that a vector is made of at the coder's site.

    Nonnegative orthogonal matching pursuit over the decoder rows and their opposites: the row nearest to what is left
    joins, then all coefficients are fitted anew by nonnegative least squares; at most ``k`` rows, and never a row and
    its opposite. An explained share says little by itself, for any vector is partly made of any rows: ``chance``
    is that of random vectors.

    Raises:
        InputError: For a vector that has nothing at the site, or a k below 1.
        MismatchError: For a vector of another model.
    """
    from exegete.streams import stream

    vector.require(subject)
    site = site_of(coder, subject)
    if site not in vector.residual:
        have = ", ".join(map(str, vector.sites)) or "none"
        raise InputError(f"coder {coder.name!r} writes to site {site}, the vector has the sites {have}")
    if k < 1:
        raise InputError(f"a composition has at least one piece, got {k}")
    target = vector.residual[site].double()
    if not bool(target.norm() > 0):
        raise InputError(f"the vector is zero at site {site}, so it is made of nothing")
    draw = stream(seed, "steering", "compose", coder.name, site)
    drawn = torch.from_numpy(draw.standard_normal((draws, len(target))))
    own, *others = _pursued(torch.cat([target[None], drawn]), coder, k)
    cosines = own.cosines
    near = torch.topk(cosines.abs(), min(k, coder.width)).indices.tolist()
    pieces = own.pieces()
    held = {piece.index: piece for piece in pieces}
    nearest = [held.get(i) or Piece(index=i, coefficient=0.0, cosine=float(cosines[i]), gain=0.0) for i in near]
    return Composition(
        coder=coder.name,
        site=site,
        norm=float(target.norm()),
        explained=own.explained,
        chance=float(np.mean([other.explained for other in others])) if others else float("nan"),
        pieces=tuple(pieces),
        nearest=tuple(nearest),
    )


@final
class _Pursuit:
    """A vector on its way to being taken apart."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target, self.left = target, target.clone()
        self.size = float(target.square().sum())
        self.explained, self.over = 0.0, False
        self.cosines = torch.zeros(0)
        self.chosen: list[int] = []
        self._columns: list[torch.Tensor] = []
        self._signs: list[float] = []
        self._gains: list[float] = []
        self._weights = np.zeros(0)

    def join(self, index: int, sign: float, row: torch.Tensor) -> None:
        """Take in a row, and fit all coefficients anew; ends where that explains nothing more."""
        from scipy.optimize import nnls

        columns = torch.stack([*self._columns, sign * row], dim=1)
        weights, _ = nnls(columns.numpy(), self.target.numpy())
        rest = self.target - columns @ torch.from_numpy(weights)
        share = 1 - float(rest.square().sum()) / self.size
        if share - self.explained < _ENOUGH:
            self.over = True
            return
        self.chosen.append(index)
        self._columns.append(sign * row)
        self._signs.append(sign)
        self._gains.append(share - self.explained)
        self._weights, self.left, self.explained = weights, rest, share

    def pieces(self) -> list[Piece]:
        """Return the rows taken in, largest contribution first."""
        lengths = [float(column.norm()) for column in self._columns]
        order = sorted(range(len(self.chosen)), key=lambda i: -self._weights[i] * lengths[i])
        return [
            Piece(
                index=self.chosen[i],
                coefficient=float(self._weights[i]) * self._signs[i],
                cosine=float(self.cosines[self.chosen[i]]),
                gain=self._gains[i],
            )
            for i in order
        ]


def _pursued(targets: torch.Tensor, coder: SparseCoder, k: int) -> list[_Pursuit]:
    """Take several vectors [n, d] apart at once, so that the rows are gone through once for each piece."""
    found = [_Pursuit(target) for target in targets]
    for step in range(min(k, coder.width)):
        products = _products(torch.stack([one.left for one in found]), coder)
        for one, own in zip(found, products.T, strict=True):
            if step == 0:
                one.cosines = own / one.size**0.5
            if one.over:
                continue
            own[one.chosen] = 0
            best = int(own.abs().argmax())
            row = coder.decoder_rows(torch.tensor([best], device=coder.device))[0].double().cpu()
            one.join(best, 1.0 if float(own[best]) > 0 else -1.0, row)
    return found


def _products(vectors: torch.Tensor, coder: SparseCoder) -> torch.Tensor:
    """Return the products of vectors [n, d] with all decoder rows at length 1 [width, n] float32, part by part."""
    found = []
    for rows in _rows(coder):
        length = rows.norm(dim=1, keepdim=True)
        products = (rows @ vectors.T.to(rows)) / length.clamp_min(torch.finfo(rows.dtype).tiny)
        found.append(torch.where(length > 0, products, 0.0).cpu())
    return torch.cat(found)


def _rows(coder: SparseCoder) -> Iterator[torch.Tensor]:
    size = max(1, _ENTRIES // coder.d_out)
    for first in range(0, coder.width, size):
        indices = torch.arange(first, min(first + size, coder.width), device=coder.device)
        yield coder.decoder_rows(indices).float()


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """A coder of a run, the subject it was collected on, and the latest explanation of each latent."""

    run: Run
    subject: Subject
    coder: SparseCoder
    explanations: dict[int, str]


def load_from_run(run: Run | str | Path, coder: str | None = None) -> Loaded:
    """Load a coder of a run with its subject; the coder may be left out where there is only one.

    Raises NotFoundError for a run or coder that is not there, InputError where the run has several.
    """
    from exegete.errors import unknown
    from exegete.preparing import Loader
    from exegete.runs import open_run

    made = open_run(run) if isinstance(run, str | Path) else run
    known = [name for name in made.coders() if "@" not in name]
    if coder is None and len(known) != 1:
        raise InputError(f"the run {made.folder} has the coders {', '.join(known) or 'none'}; name one of them")
    name = known[0] if coder is None else coder
    if name not in known:
        raise unknown("coder", name, known)
    loader = Loader(made.config, made)
    return Loaded(
        run=made, subject=loader.subject(name), coder=loader.coder(name), explanations=_explanations(made, name)
    )


def explain_vector(
    vector: SteeringVector, run: Run | str | Path, coder: str | None = None, *, k: int = 16
) -> Composition:
    """Return what a vector is made of in latents of a run's coder, with the run's explanations. See ``compose``."""
    loaded = load_from_run(run, coder)
    found = compose(vector, loaded.coder, loaded.subject, k=k)
    return described(found, loaded)


def described(found: Composition, loaded: Loaded) -> Composition:
    """Return a composition with what the run says of each latent, and what it fires on most."""
    indices = sorted({piece.index for piece in (*found.pieces, *found.nearest)})
    texts = loaded.subject.token_table().texts
    stats = loaded.run.store(loaded.coder.name).stats(indices)
    tokens = {one.latent.index: tuple(texts[token] for token, _ in one.top_tokens[:_TOKENS]) for one in stats}

    def told(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        said = loaded.explanations
        return tuple(dataclasses.replace(p, explanation=said.get(p.index), tokens=tokens[p.index]) for p in pieces)

    return dataclasses.replace(found, pieces=told(found.pieces), nearest=told(found.nearest))


def run_latent_vector(spec: str, *, normalise: Normalise = "none") -> tuple[SteeringVector, Any]:
    """Return the vector of a latent written ``RUN:CODER/INDEX``, RUN a run folder, and the run's subject.

    Raises InputError for another form, NotFoundError for what is not there.
    """
    from exegete.types import LatentId

    folder, colon, name = spec.rpartition(":")
    if not colon or not folder:
        raise InputError(f"a latent of a run is written RUN:CODER/INDEX, got {spec!r}")
    latent = LatentId.parse(name)
    loaded = load_from_run(folder, latent.coder)
    vector = latent_vector(loaded.coder, latent.index, loaded.subject, normalise=normalise, source=spec)
    return vector, loaded.subject


def _explanations(run: Run, coder: str) -> dict[int, str]:
    """Return the latest text that was said of each latent; none where nothing is explained yet."""
    from exegete.errors import NotFoundError

    try:
        results = run.results()
    except NotFoundError:
        return {}
    try:
        held = results.explanations(coder)
    finally:
        results.close()
    return {held[i].latent.index: str(held[i].text) for i in sorted(held) if held[i].text is not None}
