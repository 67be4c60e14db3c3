"""What detection and fuzzing share: items in an order that carries no label, a judge, and scores beside their nulls.

Nulls are the same judge on the same items in the same order, given other explanations (``scorers.controls``).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exegete.llm.client import gather_all, run_closing
from exegete.llm.protocol import PROMPTS, Kind
from exegete.metrics import FrameCounts
from exegete.prompts import prompt_hash
from exegete.scorers.asked import Asked, Question
from exegete.scorers.controls import by_control, named_controls, needs_of, panel
from exegete.scorers.judge import MAX_TOKENS, Judge, JudgeChoice, JudgeOptions, Verdict, judge_request, write_batches
from exegete.scorers.scorer import Scorer, Scoring
from exegete.scorers.sequential import MARGIN, Outcome, Rounds, Stopping, Tested
from exegete.scorers.window_scores import control_scores, outside_score, own_scores, stopped_scores
from exegete.streams import stream
from exegete.types import Array, Explanation, LLMRequest
from exegete.views import LatentView, Need

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient

DEFAULT_CONTROLS = ("other_latent",)
Item = tuple[Explanation, LatentView]


class JudgedScorer(Scorer, ABC):
    """Asks a judge about every test window, firing or silent.

    ``judge`` is ``rule`` (the explanation's program, executed), ``llm``, or ``auto``: the language model where there is
    one, else the rule. ``per_request`` examples go into one request to a language model. ``probabilities`` asks it for
    log probabilities too: P(yes) of every window, what rests on it (AUROC, calibration), and the mean probability mass
    on neither yes nor no (``outside_mass``); only a language model can judge then. A reply may take ``max_tokens``: a
    model that reasons before it answers needs more. ``controls`` are the nulls judged beside the explanation: of
    ``other_latent``, ``shuffled_words`` and ``empty``, or ``all``, or ``none``; an executed rule knows the first alone.

    With ``certify`` or ``stop_when`` the windows are judged in rounds, all latents of a block together, until it is
    decided whether balanced accuracy is at least ``certify`` or at most that less ``margin``, or until its interval is
    at most ``stop_when`` wide to either side (``scorers.sequential``). Intervals then hold at whatever time it stopped.
    Nulls are judged on the windows that were asked about, their intervals and those of lifts as if that many had been
    planned; what else needs a fixed number of windows is left out.
    """

    def __init__(
        self,
        *,
        judge: JudgeChoice = "auto",
        per_request: int = 5,
        probabilities: bool = False,
        max_tokens: int = MAX_TOKENS,
        controls: str | Sequence[str] = DEFAULT_CONTROLS,
        certify: float | None = None,
        margin: float = MARGIN,
        stop_when: float | None = None,
    ) -> None:
        self._options = JudgeOptions(
            judge=judge, per_request=per_request, probabilities=probabilities, max_tokens=max_tokens
        )
        self._controls = named_controls(controls)
        self._stopping = Stopping(certify=certify, margin=margin, stop_when=stop_when)

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Which question the judge is asked."""

    @abstractmethod
    def units(self, view: LatentView) -> Asked:
        """Return what the judge is asked of a latent, in any order."""

    def order(self, view: LatentView, units: Asked) -> Array:
        """Return in which order the units are asked about [n]: a seeded random one."""
        found: Array = stream(view.examples.seed, view.latent, self.label, "order").permutation(len(units))
        return found

    @property
    def in_frame(self) -> bool:
        """Whether the units are windows of the test frame, so that their scores extend to all of it."""
        return True

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        return {"name": self.kind, "args": self._args()}

    def _args(self) -> dict[str, Any]:
        return {
            **self._options.args,
            "controls": list(self._controls),
            "certify": self._stopping.certify,
            "margin": self._stopping.margin,
            "stop_when": self._stopping.stop_when,
        }

    @property
    def prompt_hash(self) -> str:
        """That of the question to a language model."""
        return prompt_hash(PROMPTS[self.kind])

    @property
    def needs(self) -> frozenset[Need]:
        """Examples; donors for their null; a language model when only that may judge, log probabilities for P(yes)."""
        needed: set[Need] = {"examples"}
        return frozenset(needed | needs_of(self._controls) | self._options.needs)

    def asked(self, view: LatentView) -> Asked:
        """Return what the judge is asked of a latent, in the order in which it is asked."""
        units = self.units(view)
        return units.take(self.order(view, units))

    def questions(self, view: LatentView) -> list[Question]:
        """Return ``asked`` one by one."""
        return self.asked(view).questions()

    def requests(self, explanation: Explanation, view: LatentView) -> list[LLMRequest]:
        """Return the requests to a language model that judge an explanation with a text, unless one has to be repaired.

        Nothing is sent, and the view needs no language model; controls are asked about in the same way.
        """
        temperature = 0.0 if view.llm is None else view.llm.temperature
        return [
            judge_request(
                self.kind,
                str(explanation.text),
                batch,
                temperature=temperature,
                probabilities=self._options.probabilities,
                max_tokens=self._options.max_tokens,
            )
            for batch in write_batches(self.asked(view).items, view.tokens, self._options.per_request)
        ]

    def score(self, items: Sequence[Item], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, as each is ready; no scores where there is no explanation to judge.

        Raises InputError when an explanation without a program is to be judged without a language model, LLMError when
        the language model cannot be used at all.
        """
        gate = asyncio.Semaphore(concurrency)

        async def work(item: Item) -> Scoring:
            explanation, view = item
            return await self._scoring(explanation, view, self._options.choose(self.kind, explanation, view, gate))

        async def in_rounds(block: Sequence[Item]) -> list[Scoring]:
            choose = self._options.choose
            return await self._in_rounds([(e, v, choose(self.kind, e, v, gate)) for e, v in block])

        usable = [item for item in items if item[0].status == "ok"]
        for explanation, _ in items:
            if explanation.status != "ok":
                yield Scoring(explanation=explanation, scores=(), judgements={})
        used = [view.llm for _, view in items]
        if not self._stopping.active:
            yield from run_closing(usable, work, concurrency, used)
        elif usable:
            for scorings in run_closing([usable], in_rounds, 1, used):
                yield from scorings

    def executes(self, view: LatentView) -> bool:
        """Say whether the judge of a view's explanation is its own program, executed."""
        return self._options.executes(view)

    def judged_by(self, llm: LLMClient | None) -> str:
        """The language model or the rule, as ``judge`` says."""
        return self._options.judged_by(llm)

    def asks(self, view: LatentView) -> bool:
        """Whether the judge is the view's language model."""
        return view.llm is not None and not self.executes(view)

    async def _scoring(self, explanation: Explanation, view: LatentView, judge: Judge) -> Scoring:
        asked = self.asked(view)
        others = panel(explanation, view, self._controls, takes=judge.takes)
        own, *rest = await judge.panel([explanation, *(e for _, e in others)], asked.items)
        return self._scored(explanation, view, asked, own, by_control(self._controls, others, rest))

    async def _in_rounds(self, block: Sequence[tuple[Explanation, LatentView, Judge]]) -> list[Scoring]:
        """Judge a block of latents until each is settled, then their nulls on what they were asked about."""
        units = [self.units(view) for _, view, _ in block]
        tested = [
            Tested(seed=view.examples.seed, latent=view.latent, windows=unit.tested)
            for (_, view, _), unit in zip(block, units, strict=True)
        ]
        rounds = Rounds(self._stopping, tested, per_request=self._options.per_request)
        told: list[dict[int, Verdict]] = [{} for _ in block]

        async def ask(place: int, which: Array) -> None:
            explanation, _, judge = block[place]
            verdicts = await judge.verdicts(explanation, units[place].items.take(which))
            told[place].update(zip(which.tolist(), verdicts, strict=True))
            rounds.tell(place, [verdict.prediction for verdict in verdicts])

        while drawn := rounds.draw():
            await gather_all(ask(place, which) for place, which in drawn)

        async def finish(place: int) -> Scoring:
            explanation, view, judge = block[place]
            outcome = rounds.outcome(place)
            asked = units[place].take(outcome.asked)
            own = [told[place][i] for i in outcome.asked.tolist()]
            others = panel(explanation, view, self._controls, takes=judge.takes)
            rest = await judge.panel([e for _, e in others], asked.items)
            return self._scored(explanation, view, asked, own, by_control(self._controls, others, rest), outcome)

        return await gather_all(map(finish, range(len(block))))

    def _scored(
        self,
        explanation: Explanation,
        view: LatentView,
        asked: Asked,
        own: Sequence[Verdict],
        controls: Mapping[str, Sequence[Sequence[Verdict]]],
        outcome: Outcome | None = None,
    ) -> Scoring:
        """Return the scoring of an explanation from its verdicts and those of its controls."""
        of, observed = (self.label, view.latent), asked.observed(own)
        ranked = self._options.probabilities and outcome is None
        if outcome is None:
            frame = FrameCounts.of(view.examples) if self.in_frame else None
            scores = list(own_scores(*of, observed, frame=frame, probabilities=ranked, seed=view.examples.seed))
        else:
            scores = list(stopped_scores(*of, observed, outcome.figures))
        if self._options.probabilities:
            scores.append(outside_score(*of, [v.outside for v in own]))
        judgements = {"none": asked.judgements(own)}
        for control, panels in controls.items():
            others = [asked.observed(verdicts) for verdicts in panels]
            scores += control_scores(*of, control, observed, others, probabilities=ranked)
            judgements[control] = tuple(j for verdicts in panels for j in asked.judgements(verdicts))
        detail = {} if outcome is None else outcome.detail
        return Scoring(explanation=explanation, scores=tuple(scores), judgements=judgements, detail=detail)
