"""Discrimination: does an explanation pick out its own latent among the nearest ones?

An explanation may fit every window of its latent and fit its neighbours' as well: it says what they have in common. So
the latent's firing test windows are judged by the explanations of the k nearest latents too. Only windows count on
which none of these fires, or else more than one explanation would be right. The score is in bits:
log2(k + 1) + mean log2 p(own), with p(own) as in ``scorers.contrast``. It is log2(k + 1) for an explanation that is
always told from the others, 0 for one that says no more than they do, and below 0 for one whose neighbours' fit better.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete.errors import ConfigError
from exegete.examples.data import StoreData
from exegete.llm.client import run_closing
from exegete.llm.protocol import PROMPTS
from exegete.prompts import prompt_hash
from exegete.scorers.asked import Asked
from exegete.scorers.contrast import SURE, Contrast, log_odds, mean_bits, mean_credit, mean_difference
from exegete.scorers.controls import (
    LIFT,
    by_control,
    control_score,
    named_controls,
    needs_of,
    of_donors,
    panel,
    score_of,
)
from exegete.scorers.judge import MAX_TOKENS, Items, Judge, JudgeChoice, JudgeOptions, Verdict
from exegete.scorers.judged import DEFAULT_CONTROLS, Item
from exegete.scorers.scorer import Scorer, Scoring
from exegete.streams import stream
from exegete.types import Array, Judgement, JudgementStatus, LatentId, Score, Windows
from exegete.views import LatentView, Near, Need, SplitData

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient

NAME: Final = "discrimination"


@final
class DiscriminationScorer(Scorer):
    """Judges a latent's firing test windows by its explanation and by those of its ``near`` nearest latents.

    Scores: ``bits``; ``accuracy``, the share of windows whose own explanation is the likeliest (equal ones share), at
    chance 1 / (k + 1); intervals are clustered by document. The nulls (``controls``) put another explanation in the
    own one's place, against the same neighbours. P(yes) is the language model's with ``probabilities``; else a verdict
    is taken to be right with probability 1 − ``smoothing``. Where there is no language model, programs are executed.

    The detail tells of each neighbour in which share of windows the own explanation was likelier than its (equal ones
    count half, windows that neither fits do not); ``contrast.collisions`` makes clusters of that. A latent of whose
    windows none is left, as when a neighbour fires at all the same places, gets NaN and the count of what was left out;
    one without explained neighbours gets no score.
    """

    def __init__(
        self,
        *,
        near: int = 4,
        smoothing: float = 0.1,
        judge: JudgeChoice = "auto",
        per_request: int = 5,
        probabilities: bool = False,
        max_tokens: int = MAX_TOKENS,
        controls: str | Sequence[str] = DEFAULT_CONTROLS,
    ) -> None:
        if near < 1:
            raise ConfigError(f"an explanation is told from at least 1 near one, got near={near}")
        if not SURE <= smoothing < 0.5:
            raise ConfigError(f"smoothing is how often a verdict is wrong, {SURE} at least, below 0.5, got {smoothing}")
        self._options = JudgeOptions(
            judge=judge, per_request=per_request, probabilities=probabilities, max_tokens=max_tokens
        )
        self._near, self._smoothing, self._controls = near, smoothing, named_controls(controls)

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        own = {"near": self._near, "smoothing": self._smoothing, "controls": list(self._controls)}
        return {"name": NAME, "args": {**own, **self._options.args}}

    @property
    def prompt_hash(self) -> str:
        """That of the question to a language model, which is detection's."""
        return prompt_hash(PROMPTS["detection"])

    @property
    def needs(self) -> frozenset[Need]:
        """Examples, all firings, the explanations of the nearest latents, donors for their null; the judge's."""
        needed: set[Need] = {"examples", "data", "near"}
        return frozenset(needed | needs_of(self._controls) | self._options.needs)

    def judged_by(self, llm: LLMClient | None) -> str:
        """The language model or the rule, as ``judge`` says."""
        return self._options.judged_by(llm)

    def asks(self, view: LatentView) -> bool:
        """Whether the judge is the view's language model."""
        return view.llm is not None and not self._options.executes(view)

    def score(self, items: Sequence[Item], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item; no scores where there is no explanation, or no neighbour with one.

        Raises InputError when an explanation without a program is to be judged without a language model, LLMError when
        the language model cannot be used at all.
        """
        gate = asyncio.Semaphore(concurrency)

        async def work(item: Item) -> Scoring:
            explanation, view = item
            if explanation.status != "ok":
                return Scoring(explanation=explanation, scores=(), judgements={})
            return await self._scoring(item, self._options.choose("detection", explanation, view, gate, NAME))

        yield from run_closing(items, work, concurrency, (view.llm for _, view in items))

    async def _scoring(self, item: Item, judge: Judge) -> Scoring:
        explanation, view = item
        near = [n for n in view.near if n.explanation.status == "ok" and judge.takes(n.explanation)][: self._near]
        if not near:
            return Scoring(explanation=explanation, scores=(), judgements={}, reason="no explained latent is near")
        asked = self._asked(view, near)
        others = panel(explanation, view, self._controls, takes=judge.takes)
        given = (explanation, *(n.explanation for n in near), *(e for _, e in others))
        said = await judge.panel(given, asked.items)
        own, beside, rest = said[0], said[1 : len(near) + 1], said[len(near) + 1 :]
        odds = np.stack([self._odds(verdicts) for verdicts in beside])
        contrast = Contrast(own=self._odds(own), others=odds)
        controls = by_control(self._controls, others, rest)
        nulls = {
            name: [Contrast(own=self._odds(verdicts), others=odds) for verdicts in panels]
            for name, panels in controls.items()
        }
        judgements = {"none": _judgements(asked, contrast, [own, *beside])}
        for name, panels in controls.items():
            parts = (_judgements(asked, c, [v, *beside]) for c, v in zip(nulls[name], panels, strict=True))
            judgements[name] = tuple(judgement for part in parts for judgement in part)
        return Scoring(
            explanation=explanation,
            scores=self._scores(view.latent, contrast, nulls, asked.examples.document),
            judgements=judgements,
            detail=_detail(near, contrast, asked, len(view.examples.part("test", fires=True))),
        )

    def _asked(self, view: LatentView, near: Sequence[Near]) -> Asked:
        """Return the firing test windows on which no near latent fires, in a seeded random order."""
        fired = view.examples.part("test", fires=True)
        alone = fired.take(~shared(fired, view.require_data(), [n.explanation.latent for n in near]))
        chosen = alone.take(stream(view.examples.seed, view.latent, NAME, "order").permutation(len(alone)))
        return Asked.whole(chosen, Items(tokens=chosen.tokens))

    def _odds(self, verdicts: Sequence[Verdict]) -> Array:
        """Return the log odds that an explanation fits each window [n]; NaN where the judge did not say."""
        right = 1.0 - self._smoothing
        if self._options.probabilities:
            yes = [v.probability for v in verdicts]
        else:
            yes = [None if v.prediction is None else right if v.prediction else self._smoothing for v in verdicts]
        return log_odds(np.array([np.nan if p is None else p for p in yes], np.float64))

    def _scores(
        self, latent: LatentId, own: Contrast, nulls: Mapping[str, Sequence[Contrast]], document: Array
    ) -> tuple[Score, ...]:
        surest = SURE if self._options.probabilities else self._smoothing
        lowest = own.lowest(surest)
        bits, credit = own.bits, own.credit
        counts = len(bits), int((~np.isnan(bits)).sum())
        scores = [
            score_of(latent, NAME, "bits", mean_bits(bits, document, own.most, lowest), *counts),
            score_of(latent, NAME, "accuracy", mean_credit(credit, document), *counts),
        ]
        for control, given in nulls.items():
            values = [null.bits for null in given]
            by_metric = (
                ("bits", [mean_bits(v, document, own.most, lowest) for v in values], (lowest, own.most)),
                ("accuracy", [mean_credit(null.credit, document) for null in given], (0.0, 1.0)),
            )
            n_total, n_scored = len(bits) * len(given), int(sum((~np.isnan(v)).sum() for v in values))
            for metric, found, bounds in by_metric:
                told = control_score(
                    latent, NAME, metric, control, found, n_total=n_total, n_scored=n_scored, bounds=bounds
                )
                scores.append(told)
            lift = of_donors(mean_difference(bits, values, document, own.most, lowest), control, len(given))
            scores.append(score_of(latent, NAME, f"bits{LIFT}", lift, len(bits) if given else 0, lift.n, control))
        return tuple(scores)


def shared(windows: Windows, data: SplitData, latents: Sequence[LatentId]) -> Array:
    """Return in which test windows any of some latents fires, bool [n]."""
    rows = data.rows("test")
    # Windows name rows by their number in the corpus, firings by their place among the rows of the split.
    numbers = data.numbers("test") if isinstance(data, StoreData) else np.arange(len(rows))
    begins = windows.row * rows.length + windows.start
    found = np.zeros(len(windows), bool)
    for firings in data.firings([latent.index for latent in latents], "test"):
        places = np.sort(numbers[firings.rows] * rows.length + firings.positions)
        found |= np.searchsorted(places, begins) < np.searchsorted(places, begins + windows.tokens.shape[1])
    return found


def _judgements(asked: Asked, contrast: Contrast, said: Sequence[Sequence[Verdict]]) -> tuple[Judgement, ...]:
    """Return one judgement per window: the bits, and whether the first explanation alone was the likeliest."""
    verdicts = [
        _failed(all_said) if np.isnan(bits) else Verdict(prediction=credit == 1.0, value=bits)
        for bits, credit, all_said in zip(
            contrast.bits.tolist(), contrast.credit.tolist(), zip(*said, strict=True), strict=True
        )
    ]
    return asked.judgements(verdicts)


def _failed(said: Sequence[Verdict]) -> Verdict:
    """Return what became of a window of which something is missing: no reply before no reading of it."""
    states = {verdict.status for verdict in said}
    order: tuple[JudgementStatus, ...] = ("failed", "refused", "unparsed")
    return Verdict(prediction=None, status=next((state for state in order if state in states), "unparsed"))


def _detail(near: Sequence[Near], contrast: Contrast, asked: Asked, fired: int) -> dict[str, Any]:
    found = []
    for place, neighbour in enumerate(near):
        apart = mean_credit(contrast.against(place), asked.examples.document)
        known = apart.n > 0
        found.append(
            {
                "latent": str(neighbour.explanation.latent),
                "similarity": neighbour.similarity,
                "told_apart": apart.value if known else None,
                "low": apart.low if known else None,
                "high": apart.high if known else None,
                "n": apart.n,
            }
        )
    return {"near": found, "windows": len(asked), "left_out": fired - len(asked)}
