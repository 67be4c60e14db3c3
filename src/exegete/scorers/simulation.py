"""Simulation: how strongly does the latent fire at every token? (arXiv 2410.13928, section 3.3; Bills et al. 2023).

The explanation is used to predict the activation at each token of held-out windows; the score is the correlation of the
predictions with the activations over all these tokens together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

import numpy as np

from exegete.errors import ConfigError, InputError
from exegete.files import hash_json
from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient, gather_all, run_closing
from exegete.llm.protocol import PROMPTS
from exegete.llm.protocol_simulation import Level
from exegete.metrics import Interval, Observed
from exegete.prompts import prompt_hash
from exegete.scorers.asked import judgements_of
from exegete.scorers.controls import (
    LIFT,
    OTHER_LATENT,
    by_control,
    control_score,
    named_controls,
    needs_of,
    of_donors,
    panel,
    score_of,
)
from exegete.scorers.judge import Verdict
from exegete.scorers.scorer import Scorer, Scoring
from exegete.scorers.simulation_scores import (
    calibrate,
    correlation,
    correlation_lift,
    explained,
    population_correlation,
)
from exegete.scorers.simulators import Answer, How, LLMSimulator, RuleSimulator, Simulator, Tokens
from exegete.types import STRATA, Array, Explanation, Judgement, LatentId, Score, Windows
from exegete.views import LatentView, Need

NAME: Final = "simulation"
HEADLINE: Final = "pearson"
MAX_TOKENS: Final = 800
_HOW: Final = ("auto", "all_at_once", "token_by_token", "whole_window")
_DECILES: Final = tuple(f"decile_{i}" for i in range(10))


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shown:
    """Windows whose tokens are simulated."""

    windows: Windows
    tokens: Tokens

    @classmethod
    def of(cls, windows: Windows, view: LatentView) -> Shown:
        """Return windows with their tokens as they are shown."""
        return cls(windows=windows, tokens=Tokens.of(windows, view.tokens))

    def observed(self, answers: Sequence[Answer]) -> Observed:
        """Return answers as columns: ``score`` is what was predicted, NaN where nothing was."""
        expected = [answer.expected if isinstance(answer, Level) else np.nan for answer in answers]
        return Observed.of_windows(
            self.windows,
            score=np.array(expected, np.float64),
            truth=self.tokens.activation > 0,
            activation=self.tokens.activation,
            place=self.tokens.window,
        )

    def judgements(self, answers: Sequence[Answer]) -> tuple[Judgement, ...]:
        """Return one judgement per token: ``start`` is its position in the row, ``value`` what was predicted."""
        return judgements_of(
            self.windows,
            [_said(answer) for answer in answers],
            truth=self.tokens.activation > 0,
            activation=self.tokens.activation,
            place=self.tokens.window,
            column=self.tokens.column,
        )


def _said(answer: Answer) -> Verdict:
    if isinstance(answer, Level):
        return Verdict(prediction=None, value=answer.expected)
    return Verdict(prediction=None, status=answer)


@final
class SimulationScorer(Scorer):
    """Predicts the activation at every token of held-out windows.

    ``how`` a language model is asked: ``all_at_once`` reads the expected level at every token from the log
    probabilities of one prompt per window, ``token_by_token`` sends a request per token, ``whole_window`` one per
    window that answers with JSON; ``auto`` is all at once where the server gives log probabilities of prompts, else
    whole windows, which any server can do. ``judge`` is ``rule`` (the program, executed: its mean activation where it
    matches), ``llm``, or ``auto``: the language model where there is one. ``windows`` are ``firing`` ones, as in the
    paper, ``all`` test windows, or ``auto``: all where a rule is executed, since that is free.

    Scores: ``pearson`` over the tokens of firing windows, and by decile (``pearson_decile_0`` is the strongest);
    ``pearson_all`` over those of silent windows too and ``population_pearson`` with every window at its weight in the
    test frame. With ``calibrate`` a line from predictions to activations is fitted on the validation windows (train
    windows where there are none), and ``rsquared`` and ``absolute_dev_explained`` are of its values; an executed rule
    predicts activations as they are. Controls are simulated by up to ``donors`` other explanations.

    Unlike the released code, levels go from 0 to 9 (see ``protocol_simulation``), tokens are asked about independently
    of the levels predicted before them, and a constant prediction has correlation 0 instead of none.
    """

    def __init__(
        self,
        *,
        how: How = "auto",
        judge: Literal["auto", "rule", "llm"] = "auto",
        windows: Literal["auto", "firing", "all"] = "auto",
        calibrate: bool = False,
        controls: str | Sequence[str] = (OTHER_LATENT,),
        donors: int = 2,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        for name, given, allowed in (
            ("how", how, _HOW),
            ("judge", judge, ("auto", "rule", "llm")),
            ("windows", windows, ("auto", "firing", "all")),
        ):
            if given not in allowed:
                raise ConfigError(f"{name} is one of {', '.join(allowed)}, got {given!r}")
        if donors < 0 or max_tokens < 1:
            raise ConfigError(f"donors is at least 0 and max_tokens at least 1, got {donors} and {max_tokens}")
        if how != "auto" and judge == "rule":
            raise ConfigError("an executed rule is not asked; leave out how, or judge with llm")
        self._how, self._judge, self._windows = how, "llm" if how != "auto" else judge, windows
        self._calibrate, self._controls = calibrate, named_controls(controls)
        self._donors, self._max_tokens = donors, max_tokens

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        args = {
            "how": self._how,
            "judge": self._judge,
            "windows": self._windows,
            "calibrate": self._calibrate,
            "controls": list(self._controls),
            "donors": self._donors,
            "max_tokens": self._max_tokens,
        }
        return {"name": NAME, "args": args}

    @property
    def prompt_hash(self) -> str:
        """That of the three forms together: which of them is asked may depend on the server."""
        return hash_json([prompt_hash(PROMPTS[form]) for form in ("simulate", "simulate_token", "simulate_all")])

    @property
    def needs(self) -> frozenset[Need]:
        """Examples; donors for their null; a language model, and what of it the form needs, where one must be asked."""
        needed: set[Need] = {"examples", *needs_of(self._controls, self._donors)}
        if self._judge == "llm":
            needed.add("llm")
        if self._how == "all_at_once":
            needed.add("prompt_logprobs")
        return frozenset(needed)

    def judged_by(self, llm: LLMClient | None) -> str:
        """Who predicts: the language model or the rule, as ``judge`` says."""
        return "rule" if llm is None or self._judge == "rule" else llm.name

    def asks(self, view: LatentView) -> bool:
        """Whether the view's language model predicts."""
        return view.llm is not None and self._judge != "rule"

    def score(self, items: Sequence[tuple[Explanation, LatentView]], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, as each is ready; no scores where there is no explanation to go by.

        Raises InputError when a free text is to be executed, LLMError when the model cannot be used at all.
        """
        gate = asyncio.Semaphore(concurrency)
        seen: dict[int, asyncio.Future[Capabilities]] = {}

        async def can(llm: LLMClient) -> Capabilities:
            if id(llm) not in seen:  # a server is asked once what it can do, not by every latent at the same time
                seen[id(llm)] = asyncio.ensure_future(llm.capabilities())
            return await seen[id(llm)]

        async def work(item: tuple[Explanation, LatentView]) -> Scoring:
            explanation, view = item
            if explanation.status != "ok":
                return Scoring(explanation=explanation, scores=(), judgements={})
            if not self.asks(view):
                return await self._scoring(explanation, view, self._executed(explanation, view))
            llm = view.require_llm()
            model = LLMSimulator(llm, self._how, await can(llm), gate=gate, max_tokens=self._max_tokens)
            return await self._scoring(explanation, view, model)

        yield from run_closing(items, work, concurrency, (view.llm for _, view in items))

    def _executed(self, explanation: Explanation, view: LatentView) -> Simulator:
        if self._judge == "llm":
            view.require_llm()
        if explanation.program is None:
            raise InputError(
                f"{view.latent}: an explanation in free text is simulated by a language model; give one with --llm "
                "URL#MODEL, or explain with rules"
            )
        return RuleSimulator(view.tokens)

    async def _scoring(self, explanation: Explanation, view: LatentView, simulator: Simulator) -> Scoring:
        everything = self._windows == "all" or (self._windows == "auto" and not self.asks(view))
        shown = Shown.of(view.examples.part("test", fires=None if everything else True), view)
        asked = self._panel(explanation, view, simulator)
        answers = await gather_all(
            simulator.simulate(e, shown.windows, shown.tokens) for e in (explanation, *(e for _, e in asked))
        )
        own = shown.observed(answers[0])
        firing = shown.windows.fires[shown.tokens.window]
        scores = own_scores(view.latent, own, firing, everything=everything)
        line: tuple[float, float] | None = (0.0, 1.0) if simulator.in_units else None
        if line is None and self._calibrate:
            line = await _line(explanation, view, simulator)
        if line is not None:
            scores += calibrated_scores(view.latent, own.take(firing), line)
        judgements = {"none": shown.judgements(answers[0])}
        for control, said in by_control(self._controls, asked, answers[1:]).items():
            others = [shown.observed(a).take(firing) for a in said]
            scores += control_scores(view.latent, control, own.take(firing), others)
            judgements[control] = tuple(j for a in said for j in shown.judgements(a))
        detail = _detail(simulator, answers[0], line)
        return Scoring(explanation=explanation, scores=scores, judgements=judgements, detail=detail)

    def _panel(
        self, explanation: Explanation, view: LatentView, simulator: Simulator
    ) -> Sequence[tuple[str, Explanation]]:
        asked = panel(explanation, view, self._controls, takes=simulator.takes)
        donors = [(name, other) for name, other in asked if name == OTHER_LATENT]
        return [*donors[: self._donors], *((name, other) for name, other in asked if name != OTHER_LATENT)]


def own_scores(latent: LatentId, own: Observed, firing: Array, *, everything: bool) -> tuple[Score, ...]:
    """Return the correlations of one explanation's predictions; ``firing`` [t] are the tokens of firing windows."""
    strong = own.take(firing)
    scores = [_score(latent, HEADLINE, correlation(strong), strong)]
    for stratum in sorted(set(strong.stratum.tolist())):
        if STRATA[stratum] in _DECILES:
            part = strong.take(strong.stratum == stratum)
            scores.append(_score(latent, f"{HEADLINE}_{STRATA[stratum]}", correlation(part), part))
    if everything:
        scores.append(_score(latent, f"{HEADLINE}_all", correlation(own), own))
        scores.append(_score(latent, f"population_{HEADLINE}", population_correlation(own), own))
    return tuple(scores)


def calibrated_scores(latent: LatentId, own: Observed, line: tuple[float, float]) -> tuple[Score, ...]:
    """Return how much of the activation the predictions explain, once they are on its scale."""
    intercept, slope = line
    found = explained(replace(own, score=intercept + slope * own.score))
    return tuple(_score(latent, metric, interval, own) for metric, interval in found.items())


def control_scores(latent: LatentId, control: str, own: Observed, others: Sequence[Observed]) -> tuple[Score, ...]:
    """Return the correlation under one control, and the own one's lift over it on the same tokens."""
    n_total, n_scored = sum(map(len, others)), sum(map(_scored, others))
    intervals = [correlation(other) for other in others]
    beside = control_score(
        latent, NAME, HEADLINE, control, intervals, n_total=n_total, n_scored=n_scored, bounds=(-1.0, 1.0)
    )
    lift = of_donors(correlation_lift(own, others), control, len(others))
    return beside, score_of(latent, NAME, HEADLINE + LIFT, lift, len(own) if others else 0, lift.n, control)


def _score(latent: LatentId, metric: str, interval: Interval, of: Observed) -> Score:
    return score_of(latent, NAME, metric, interval, len(of), _scored(of))


def _scored(observed: Observed) -> int:
    return int((~np.isnan(observed.score)).sum())


async def _line(explanation: Explanation, view: LatentView, simulator: Simulator) -> tuple[float, float] | None:
    """Return the line from predictions to activations, fitted where nothing is scored; None where nothing is said."""
    windows = view.examples.part("validation", fires=True)
    if not len(windows):
        windows = view.examples.part("train", fires=True)
    shown = Shown.of(windows, view)
    learnt = shown.observed(await simulator.simulate(explanation, shown.windows, shown.tokens))
    known = ~np.isnan(learnt.score)
    return calibrate(learnt.score[known], learnt.activation[known]) if known.any() else None


def _detail(simulator: Simulator, answers: Sequence[Answer], line: tuple[float, float] | None) -> dict[str, Any]:
    if not isinstance(simulator, LLMSimulator):
        return {"form": "executed"}
    detail: dict[str, Any] = {"form": simulator.form}
    outside = [a.outside for a in answers if isinstance(a, Level) and a.outside is not None]
    if outside:
        detail["outside_mass"] = float(np.mean(outside))
    if line is not None:
        detail["calibration"] = {"intercept": line[0], "slope": line[1]}
    return detail
