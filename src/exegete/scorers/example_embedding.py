"""Example embedding: are held-out firing windows nearer to the latent's train windows than silent ones are?

No explanation is read: the score is the latent's own, what embeddings can tell of it by examples alone, and a mark for
explanations to pass. A window's number is its mean cosine to the texts of the firing train windows; the score is the
AUROC between firing and silent test windows. (Delphi's example embedding draws both sides from the same windows, in
random batches of one decile, marks the active tokens in firing windows alone, and reports differences of means. Here
the two sides share no document, nothing is marked, since marks would tell the two apart, and nothing is drawn.)

The null is the same for other latents' train windows, drawn around firings that fire about as often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete.errors import ConfigError
from exegete.examples.render import plain_texts
from exegete.examples.similar import DEFAULT_MODEL
from exegete.scorers.controls import OTHER_LATENT
from exegete.scorers.embedders import Embedder, embedder_of
from exegete.scorers.embedding import cosines
from exegete.scorers.scorer import Scorer, Scoring
from exegete.scorers.valued import value_judgements, value_scores
from exegete.streams import stream
from exegete.types import Array, Explanation, LatentId
from exegete.views import LatentView, Need, SplitData

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient

_SPARE: Final = 2
"""Windows tried for each one wanted: some leave their document."""
Item = tuple[Explanation, LatentView]


@final
class ExampleEmbeddingScorer(Scorer):
    """Compares the first ``shown`` firing train windows with every test window; judgements hold mean cosines.

    ``embedder`` names a sentence-transformers model (extra ``embed``). ``donors`` latents stand beside it as a null.
    """

    def __init__(self, *, embedder: str | Embedder = DEFAULT_MODEL, shown: int = 20, donors: int = 5) -> None:
        if shown < 1 or donors < 0:
            raise ConfigError(f"shown is at least 1 and donors at least 0, got {shown} and {donors}")
        self._embedder, self._shown, self._donors = embedder_of(embedder), shown, donors

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        args = {"embedder": self._embedder.name, "shown": self._shown, "donors": self._donors}
        return {"name": "example_embedding", "args": args}

    @property
    def needs(self) -> frozenset[Need]:
        """Examples, and for the null donors and the firings of these."""
        return frozenset({"examples", "donors", "data"}) if self._donors else frozenset({"examples"})

    def check(self) -> None:
        """Load the embedder. Raises MissingExtraError or NotFoundError where it cannot be had."""
        self._embedder.check()

    def judged_by(self, llm: LLMClient | None) -> str:
        """The embedder."""
        return self._embedder.name

    def plumbing(self, view: LatentView) -> bool:
        """Whether the embedder knows no language."""
        return not self._embedder.natural

    def score(self, items: Sequence[Item], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, whatever its explanation; no scores for a latent without firing train windows."""
        for explanation, view in items:
            shown = view.examples.part("train", fires=True)[: self._shown]
            if not len(shown):
                yield Scoring(explanation=explanation, scores=(), judgements={}, reason="no firing train window")
            else:
                yield self._scoring(explanation, view, shown.tokens)

    def _scoring(self, explanation: Explanation, view: LatentView, shown: Array) -> Scoring:
        windows = view.examples.part("test")
        own = self._nearness(shown, view)
        nulls = [self._nearness(tokens, view) for tokens in self._of_others(view, *shown.shape)]
        return Scoring(
            explanation=explanation,
            scores=value_scores(self.label, view, windows, own, {OTHER_LATENT: nulls}),
            judgements={
                "none": value_judgements(windows, own),
                OTHER_LATENT: tuple(j for values in nulls for j in value_judgements(windows, values)),
            },
            detail={"embedder": self._embedder.name, "shown": len(shown)},
        )

    def _nearness(self, tokens: Array, view: LatentView) -> Array:
        """Return the mean cosine of every test window to windows ``tokens`` [m, window], float64 [n]."""
        mean = self._embedder.embed(plain_texts(tokens, view.tokens)).mean(axis=0, dtype=np.float64)
        return cosines(self._embedder, mean, view.examples.part("test"), view)

    def _of_others(self, view: LatentView, n: int, window: int) -> list[Array]:
        """Return train windows of each donor, tokens [up to n, window], where there are any."""
        if view.data is None:
            return []
        ranked = sorted(view.donors, key=lambda donor: donor.rank)[: self._donors]
        latents = [donor.explanation.latent for donor in ranked]
        found = (train_windows(view.data, latent, n, window, seed=view.examples.seed) for latent in latents)
        return [tokens for tokens in found if len(tokens)]


def train_windows(data: SplitData, latent: LatentId, n: int, window: int, *, seed: int) -> Array:
    """Return the tokens of up to n train windows centred on random firings of a latent, uint32 [n, window].

    Windows that would leave the firing's document or row are left out.
    """
    rows, (firings,) = data.rows("train"), data.firings([latent.index], "train")
    if not len(firings) or rows.length < window:
        return np.zeros((0, window), np.uint32)
    drawn = stream(seed, latent, "example_embedding").permutation(len(firings))[: _SPARE * n]
    row, start = firings.rows[drawn], firings.positions[drawn].astype(np.int64) - window // 2
    document = rows.documents[row, firings.positions[drawn]]
    places = np.clip(start, 0, rows.length - window)[:, None] + np.arange(window)
    inside = (rows.documents[row[:, None], places] == document[:, None]).all(axis=1)
    found: Array = rows.tokens[row[:, None], places][inside][:n]
    return found
