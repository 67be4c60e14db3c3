"""How well lenses read: cross-entropy, KL to the model and entropy at every site, and across sites.

All three are taken in nats over the same predictions and given in bits per byte of the text predicted as well: nats per
token · tokens / bytes / ln 2. KL is KL(model ‖ lens). The transfer matrix holds lens i on the stream of site j: its
cross-entropy, and KL(lens j on j ‖ lens i on j), as the tuned-lens package has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch

from exegete.errors import InputError, MismatchError
from exegete.lens.intervals import clustered_mean
from exegete.lens.lens import Lens
from exegete.lens.reading import Piece, cross_entropy, divergence, entropy, read_pieces
from exegete.lens.states import StateReader
from exegete.lens.text import LensText, Part, as_text, fixed_batches
from exegete.metrics import Interval
from exegete.progress import Progress, Silent
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.store.corpus import Corpus
    from exegete.subjects import Subject

METRICS: Final = ("ce", "kl", "entropy")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How lenses read a text.

    Attributes:
        subject: The model.
        part: Which part of the text.
        sites: Where, ascending.
        nats: Per token, by lens, metric (``ce``, ``kl``, ``entropy``) and site, with intervals clustered by document.
        differences: Of each further lens less the first, in the same places: paired, so tighter than the intervals.
        baseline: Of the model itself, ``ce`` and ``entropy``.
        transfer: By lens and metric (``ce``, ``kl``) a matrix [sites, sites] in nats: lens i (row) on site j (column).
        n_tokens: Predictions.
        n_bytes: Bytes of the tokens predicted.
        n_documents: Documents that they lie in.
        level: Of the intervals.
    """

    subject: str
    part: str
    sites: tuple[int, ...]
    nats: Mapping[str, Mapping[str, Mapping[int, Interval]]]
    differences: Mapping[str, Mapping[str, Mapping[int, Interval]]]
    baseline: Mapping[str, Interval]
    transfer: Mapping[str, Mapping[str, Array]]
    n_tokens: int
    n_bytes: int
    n_documents: int
    level: float

    @property
    def bits_per_byte(self) -> float:
        """What nats per token are multiplied by to be bits per byte: tokens / bytes / ln 2."""
        return self.n_tokens / self.n_bytes / math.log(2)

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row per lens, metric and site, the model itself under the lens ``model``, site None."""
        found = [
            self._row(lens, metric, site, one)
            for lens, by_metric in self.nats.items()
            for metric, by_site in by_metric.items()
            for site, one in by_site.items()
        ]
        return found + [self._row("model", metric, None, one) for metric, one in self.baseline.items()]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data; bounds that are infinite are None."""
        first = next(iter(self.nats))
        return {
            "subject": self.subject,
            "part": self.part,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
            "n_documents": self.n_documents,
            "nats_to_bits_per_byte": self.bits_per_byte,
            "level": self.level,
            "rows": self.rows(),
            "differences": [
                {**self._row(lens, metric, site, one), "less": first}
                for lens, by_metric in self.differences.items()
                for metric, by_site in by_metric.items()
                for site, one in by_site.items()
            ],
            "transfer_nats": {
                lens: {metric: matrix.tolist() for metric, matrix in by_metric.items()}
                for lens, by_metric in self.transfer.items()
            },
            "transfer_sites": list(self.sites),
        }

    def _row(self, lens: str, metric: str, site: int | None, one: Interval) -> dict[str, Any]:
        by = self.bits_per_byte
        return {
            "lens": lens,
            "metric": metric,
            "site": site,
            "nats_per_token": _plain(one.value),
            "nats_low": _plain(one.low),
            "nats_high": _plain(one.high),
            "bits_per_byte": _plain(one.value * by),
            "bits_low": _plain(one.low * by),
            "bits_high": _plain(one.high * by),
        }


def evaluate_lenses(
    lenses: Mapping[str, Lens],
    text: LensText | Corpus,
    *,
    part: Part = "test",
    sites: Sequence[int] | None = None,
    tokens: int | None = None,
    transfer: bool = False,
    level: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure lenses of one subject on a part of a text.

    Args:
        lenses: By name; differences are to the first.
        text: The text. A corpus is split by the seed.
        part: ``test``, ``validation``, ``train`` or ``all``.
        sites: Where; by default the sites that all lenses have, without the model's own output.
        tokens: Most predictions, at least one; more are thinned out by whole rows, drawn by ``seed``.
        transfer: Take the transfer matrix of every tuned lens, the logit lens being the same at every site, and states
            fitting their own. Costs sites² readouts.
        level: Of the intervals.
        seed: Of that draw.
        progress: Told of predictions.

    Raises:
        InputError: When there is no lens, no text in this part, or NaN in the model's logits.
        MismatchError: When the lenses are not of one subject.
    """
    if not lenses:
        raise InputError("give at least one lens to measure")
    if tokens is not None and tokens < 1:
        raise InputError(f"at least one token is measured, got {tokens}")
    subject = next(iter(lenses.values())).subject
    if any(lens.subject is not subject for lens in lenses.values()):
        raise MismatchError("the lenses are of several subjects; measure each subject by itself")
    text = as_text(text, seed=seed)
    chosen = _sites(lenses) if sites is None else tuple(sorted(set(sites)))
    sums = _Sums(lenses, chosen, len(text.corpus.documents), transfer=transfer)
    need = tuple(sorted({site for lens in lenses.values() for site in lens.state_sites if site in chosen}))
    states = StateReader(subject, need) if need else None
    shown = progress or Silent()
    held = int(text.predictions(part).sum())
    shown.start("measure the lenses", held if tokens is None else min(held, tokens), "tokens")
    with torch.no_grad():
        for batch in fixed_batches(text, part, seed=seed, most=tokens, tokens=1 << 13):
            for piece in read_pieces(subject, batch, chosen, states=states):
                sums.add(piece)
            sums.count(batch.labels.numpy(), text.corpus.table.pieces)
            shown.advance(len(batch))
    shown.end()
    if not sums.n_tokens:
        raise InputError(f"the {part} part of the text has nothing to predict; give more text, or part all")
    return sums.evaluation(subject, part, level)


def _sites(lenses: Mapping[str, Lens]) -> tuple[int, ...]:
    first = next(iter(lenses.values()))
    common = set.intersection(*(set(lens.sites) for lens in lenses.values()))
    found = tuple(sorted(common - {first.last})) or tuple(sorted(common))
    if not found:
        raise InputError("the lenses have no site in common")
    return found


@final
class _Sums:
    """Sums over predictions, by document where an interval rests on them."""

    def __init__(self, lenses: Mapping[str, Lens], sites: tuple[int, ...], documents: int, *, transfer: bool) -> None:
        self._lenses, self._sites, self._documents = lenses, sites, documents
        self._values = np.zeros((len(lenses), len(METRICS), len(sites), documents))
        self._model = np.zeros((2, documents))
        self._sizes = np.zeros(documents)
        free = [name for name, lens in lenses.items() if transfer and lens.kind == "tuned"]
        self._transfer = {name: np.zeros((2, len(sites), len(sites))) for name in free}
        self.n_tokens, self.n_bytes = 0, 0

    def add(self, piece: Piece) -> None:
        """Add the predictions of a piece."""
        self._sizes += self._by_document(torch.ones(len(piece)), piece)
        self._model[0] += self._by_document(cross_entropy(piece.target, piece.labels), piece)
        self._model[1] += self._by_document(entropy(piece.target), piece)
        for i, lens in enumerate(self._lenses.values()):
            for k, site in enumerate(self._sites):
                state = piece.states[site] if lens.reads_state(site) else None
                log_p = lens.logits(site, piece.hidden[site], state).log_softmax(dim=-1)
                found = (cross_entropy(log_p, piece.labels), divergence(piece.target, log_p), entropy(log_p))
                for m, values in enumerate(found):
                    self._values[i, m, k] += self._by_document(values, piece)
        for name, matrix in self._transfer.items():
            self._across(self._lenses[name], piece, matrix)

    def count(self, labels: Array, pieces: Sequence[bytes]) -> None:
        """Count tokens and the bytes that they stand for."""
        found, times = np.unique(labels, return_counts=True)
        self.n_tokens += len(labels)
        self.n_bytes += sum(len(pieces[token]) * int(n) for token, n in zip(found.tolist(), times, strict=True))

    def evaluation(self, subject: Subject, part: str, level: float) -> Evaluation:
        """Return what came out."""
        held = self._sizes > 0
        sizes = self._sizes[held]

        def mean(values: Array, least: float = 0.0) -> Interval:
            return clustered_mean(values[held], sizes, level=level, least=least)

        def means(values: Array, least: float = 0.0) -> dict[str, dict[int, Interval]]:
            return {
                metric: {s: mean(values[m, k], least) for k, s in enumerate(self._sites)}
                for m, metric in enumerate(METRICS)
            }

        names = list(self._lenses)
        return Evaluation(
            subject=subject.name,
            part=part,
            sites=self._sites,
            nats={name: means(self._values[i]) for i, name in enumerate(names)},
            differences={
                name: means(self._values[i] - self._values[0], -math.inf) for i, name in enumerate(names) if i
            },
            baseline={metric: mean(self._model[m]) for m, metric in enumerate(("ce", "entropy"))},
            transfer={
                name: {"ce": matrix[0] / self.n_tokens, "kl": matrix[1] / self.n_tokens}
                for name, matrix in self._transfer.items()
            },
            n_tokens=self.n_tokens,
            n_bytes=self.n_bytes,
            n_documents=int(held.sum()),
            level=level,
        )

    def _across(self, lens: Lens, piece: Piece, matrix: Array) -> None:
        for j, site in enumerate(self._sites):
            own = lens.logits(site, piece.hidden[site]).log_softmax(dim=-1)
            for i, other in enumerate(self._sites):
                log_p = own if i == j else lens.logits(other, piece.hidden[site]).log_softmax(dim=-1)
                matrix[0, i, j] += float(cross_entropy(log_p, piece.labels).double().sum())
                matrix[1, i, j] += 0.0 if i == j else float(divergence(own, log_p).double().sum())

    def _by_document(self, values: torch.Tensor, piece: Piece) -> Array:
        found: Array = np.bincount(piece.documents, weights=values.double().cpu().numpy(), minlength=self._documents)
        return found


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
