"""Intervention: does an explanation say what a latent makes its subject write? (arXiv 2410.13928, 3.3.5, App. G)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, final, get_args

import numpy as np

from exegete.errors import ConfigError
from exegete.explainers.default import parse_explanation
from exegete.llm.client import run_closing
from exegete.llm.protocol import PROMPTS, effect_messages, with_gains
from exegete.prompts import prompt_hash
from exegete.scorers import intervention_reading as reading
from exegete.scorers.controls import OTHER_LATENT, named_controls, needs_of, panel, with_text
from exegete.scorers.intervention_measuring import (
    Case,
    Sampled,
    again,
    continued,
    describe,
    faithfulness,
    masses,
    nats,
    token_set,
)
from exegete.scorers.intervention_prompts import Prompt, draw_prompts
from exegete.scorers.intervention_scores import MIN_PROMPTS, Measured, Unmet, Values
from exegete.scorers.judge import Item, LLMJudge
from exegete.scorers.scorer import Scorer, Scoring
from exegete.streams import stream
from exegete.types import Explanation, LLMRequest, Score, Split
from exegete.views import LatentView, Need

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient
    from exegete.scorers.intervention_effects import Effects, Gains

NAME: Final = "intervention"
TARGETS: Final = (0.1, 0.33, 1.0, 3.0)
Kind = Literal["reader", "tokens"]
Explain = Literal["own", "effect"]
EditKind = Literal["add", "clamp", "ablate"]
Nulls = Literal["headline", "all"]
PLUMBING: Final = 5
"""Prompts after which a reader reads that was not trained on natural language."""
STAND_IN: Final = 8
"""Tokens that stand for a continuation when requests are planned."""


@final
class InterventionScorer(Scorer):
    """Strengthens a latent while its subject reads and writes, and asks whether the explanation says what comes of it.

    Prompts end just after the first token at which the latent fires: ``n_score`` of them from the test split, and
    ``n_explain`` from the train split on which its effect is explained. From the last prompt token on, through up to 8
    sampled tokens (temperature 1), a multiple of the latent's decoder direction is added and the coder's error kept.
    The multiple is such that KL(clean ‖ edited) of the next token after the scoring prompts is one of ``targets``,
    within 10 %, averaged over prompts. A target that cannot be had gives no number.

    ``kind``
        ``reader`` scores in nats: log p(explanation | edited text) − log p(explanation | clean text), over all tokens
        of the explanation and the quotation mark that closes it, averaged over prompts; metrics ``nats_kl_TARGET``.
        One continuation is sampled of each prompt with and one without the edit, from the same random numbers. A
        reader that was not trained on natural language shows only that all this works, and that after 5 prompts.
        ``tokens`` needs no language model: a set of tokens is scored by the probability that it gains as the next
        token, averaged over prompts; metrics ``mass_kl_TARGET``, from −1 to 1.
    ``explain``
        ``own`` scores the explanation; under ``tokens``, the tokens that its rule names for the token it fires on, and
        nothing where there is no such rule. ``effect`` scores what the effect itself looks like: the ``n_tokens``
        tokens that the edit of the ``headline`` target makes likelier on the explaining prompts, or (``reader``) what
        the language model says of them, drawn once. The released code drew five and showed the best of them in places.
    ``edit``
        ``add``; ``clamp`` to a value, found in the same way; ``ablate`` to 0, with the one metric ``nats_ablate``, low
        where the ablation makes the explanation less likely.

    Beside every score stand the same explanation after a push in a random direction at equal KL
    (``random_direction``), and ``controls``: other latents' explanations (the shuffled explanations of the paper, which
    take turns over the prompts), the explanation's own words shuffled, none. A reader reads controls at the
    ``headline`` target only, unless ``nulls`` is ``all``. The random coder is a null of the run.

    Of a share ``retest`` of the latents the continuations are drawn under ``seeds`` seeds, and the mean of each stands
    in the detail, for ``reliability``. With ``faithful`` a language model judges whether the explanation fits the
    continuations alone: ``faithful_kl_TARGET`` is the share that it fits among edited ones less that among clean ones
    (FADE takes the greatest of several strengths; each stands alone here, since a greatest is biased upward).
    """

    def __init__(
        self,
        *,
        kind: Kind = "reader",
        explain: Explain = "own",
        edit: EditKind = "add",
        targets: str | float | Sequence[float] = TARGETS,
        headline: float = 1.0,
        n_explain: int = 10,
        n_score: int = 30,
        context: int = 64,
        n_tokens: int = 10,
        controls: str | Sequence[str] = (OTHER_LATENT,),
        nulls: Nulls = "headline",
        seeds: int = 5,
        retest: float = 0.1,
        faithful: bool = False,
        max_tokens: int = 500,
    ) -> None:
        for name, given, allowed in (
            ("kind", kind, get_args(Kind)),
            ("explain", explain, get_args(Explain)),
            ("edit", edit, get_args(EditKind)),
            ("nulls", nulls, get_args(Nulls)),
        ):
            if given not in allowed:
                raise ConfigError(f"{name} is one of {', '.join(allowed)}, got {given!r}")
        least = min(n_explain, n_score, context, n_tokens, max_tokens)
        if least < 1:
            raise ConfigError(f"n_explain, n_score, context, n_tokens and max_tokens are at least 1, got {least}")
        if seeds < 2 or not 0.0 <= retest <= 1.0:
            raise ConfigError(f"seeds are at least 2 and retest is a share, got {seeds} and {retest}")
        self._kind, self._explain, self._edit, self._nulls = kind, explain, edit, nulls
        self._targets, self._headline = _targets(targets, headline), float(headline)
        self._n_explain, self._n_score, self._context, self._n_tokens = n_explain, n_score, context, n_tokens
        self._controls, self._seeds, self._retest = named_controls(controls), seeds, float(retest)
        self._faithful, self._max_tokens = bool(faithful), max_tokens

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        args = {
            "kind": self._kind,
            "explain": self._explain,
            "edit": self._edit,
            "targets": list(self._targets),
            "headline": self._headline,
            "n_explain": self._n_explain,
            "n_score": self._n_score,
            "context": self._context,
            "n_tokens": self._n_tokens,
            "controls": list(self._controls),
            "nulls": self._nulls,
            "seeds": self._seeds,
            "retest": self._retest,
            "faithful": self._faithful,
            "max_tokens": self._max_tokens,
        }
        return {"name": NAME, "args": args}

    @property
    def label(self) -> str:
        """``intervention``, with ``_tokens``, ``_effect``, ``_clamp`` or ``_ablate`` for variants."""
        parts = [NAME, *(["tokens"] if self._kind == "tokens" else []), *(["effect"] if self._explain != "own" else [])]
        return "_".join([*parts, *([self._edit] if self._edit != "add" else [])])

    @property
    def prompt_hash(self) -> str:
        """Those of the text before passages that are read and of the questions to a language model that are asked."""
        read = [reading.HASH] if self._kind == "reader" else []
        asked = [prompt_hash(PROMPTS["effect"])] if self._says else []
        judged = [prompt_hash(PROMPTS["detection"])] if self._faithful else []
        return "+".join([*read, *asked, *judged])

    @property
    def _says(self) -> bool:
        """Whether a language model says what the effect is."""
        return self._kind == "reader" and self._explain == "effect"

    @property
    def needs(self) -> frozenset[Need]:
        """All firings, the subject and the coder; a reader, donors and a language model as its arguments say."""
        needed: set[Need] = {"examples", "data", "subject", "coder", *needs_of(self._controls)}
        if self._kind == "reader":
            needed.add("reader")
        if self._says or self._faithful:
            needed.add("llm")
        return frozenset(needed)

    def judged_by(self, llm: LLMClient | None) -> str:
        """The reader, or the subject itself where tokens are scored."""
        return "reader" if self._kind == "reader" else "subject"

    @property
    def _names(self) -> tuple[str, ...]:
        """What the conditions are called."""
        return ("ablate",) if self._edit == "ablate" else tuple(f"kl_{target:g}" for target in self._targets)

    @property
    def _first(self) -> int:
        """Which condition is the headline."""
        return 0 if self._edit == "ablate" else self._targets.index(self._headline)

    def planned(self, explanation: Explanation, view: LatentView) -> Sequence[LLMRequest]:
        """Return requests like those that scoring would send, with the prompts' own last tokens for what is sampled."""
        asked: list[LLMRequest] = []
        if self._says:
            shown = self._draw(view, "train", self._n_explain, None)
            texts = [with_gains(view.tokens.decode(p.tokens), [(" token", 1.0)] * 5) for p in shown]
            asked.append(self._request(texts, view))
        if self._faithful and view.llm is not None:
            shown = self._draw(view, "test", self._n_of(view), None)
            items = [Item(tokens=np.array(p.tokens[-STAND_IN:], np.uint32)) for p in shown]
            judge = LLMJudge(view.llm, "detection", view.tokens, gate=asyncio.Semaphore(1), stage=self.label)
            asked += judge.requests(explanation, items) * (1 + len(self._names))
        return asked

    def score(self, items: Sequence[tuple[Explanation, LatentView]], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, as each is ready; the subject works on one latent at a time.

        Raises InputError where the view lacks what is needed, LLMError when a language model cannot be used at all.
        """
        gate = asyncio.Semaphore(concurrency)

        async def work(item: tuple[Explanation, LatentView]) -> Scoring:
            return await self._scoring(*item, gate)

        used = (part for _, view in items for part in (view.reader, view.llm))
        yield from run_closing(items, work, concurrency, used)

    async def _scoring(self, explanation: Explanation, view: LatentView, gate: asyncio.Semaphore) -> Scoring:
        if explanation.status != "ok":
            return Scoring(explanation=explanation, scores=(), judgements={})
        subject, coder = view.require_subject()
        if self._kind == "tokens" and self._explain == "own" and not token_set(explanation):
            return Scoring(
                explanation=explanation,
                scores=(),
                judgements={},
                reason="the explanation names no tokens that the latent fires on",
            )
        prompts = self._draw(view, "test", self._n_of(view), subject.bos)
        if len(prompts) < MIN_PROMPTS:
            nothing = self._measured(prompts, {}, {})
            return self._scored(explanation, view, nothing, (), {"prompts": len(prompts)})
        from exegete.scorers.intervention_effects import Effects

        # Synchronous on purpose: readers in this process may run the same model, and the event loop keeps them apart.
        effects = Effects(
            subject=subject,
            coder=coder,
            latent=view.latent,
            table=view.tokens,
            prompts=prompts,
            kind=self._edit,
            targets=self._targets,
            seed=view.examples.seed,
        )
        await asyncio.sleep(0)
        return await self._measure(explanation, view, effects, gate)

    async def _measure(
        self, explanation: Explanation, view: LatentView, effects: Effects, gate: asyncio.Semaphore
    ) -> Scoring:
        gains = self._gains(view, effects)
        detail = describe(effects, gains, self._names, view.tokens)
        stated = explanation
        if self._says:
            stated, why = await self._stated(explanation, view, gains, gate)
            detail["effect"] = {"text": stated.text, "status": stated.status, "reason": why}
        case = self._case(stated, view, effects)
        values: Values = {}
        extra: tuple[Score, ...] = ()
        if stated.status == "ok":
            sampled = Sampled.of(effects) if self._kind == "reader" or self._faithful else None
            if self._kind == "tokens":
                own = gains.tokens if self._explain == "effect" and gains is not None else token_set(stated)
                values = masses(case, own) if own else {}
            elif sampled is not None:
                values = await nats(case, sampled)
                if self._retested(view):
                    means = await again(case, values["none"], self._seeds)
                    detail["retest"] = {self._names[at]: row for at, row in means.items()}
            if sampled is not None:
                detail["continuations"] = continued(case, sampled, self._names)
            if sampled is not None and self._faithful:
                fits = {"none": await faithfulness(case, sampled, gate, self.label)}
                unmet = {key: why for key, why in case.unmet.items() if key[0] == "none"}
                judged = self._measured(effects.prompts, fits, unmet, metric="faithful")
                extra = judged.scores(view.latent, self.label, self._first)
        measured = self._measured(effects.prompts, values, self._unmet(case, gains), donors=case.donors)
        return self._scored(explanation, view, measured, extra, detail)

    def _scored(
        self,
        explanation: Explanation,
        view: LatentView,
        measured: Measured,
        extra: tuple[Score, ...],
        detail: Mapping[str, Any],
    ) -> Scoring:
        return Scoring(
            explanation=explanation,
            scores=measured.scores(view.latent, self.label, self._first) + extra,
            judgements=measured.judgements(self._first),
            detail=detail,
        )

    def _measured(
        self, prompts: Sequence[Prompt], values: Values, unmet: Unmet, *, metric: str | None = None, donors: int = 0
    ) -> Measured:
        own = "mass" if self._kind == "tokens" else "nats"
        bounded = self._kind == "tokens" or metric is not None
        return Measured(
            metric=metric or own,
            names=self._names,
            values=values,
            unmet=unmet,
            prompts=prompts,
            bounds=(-1.0, 1.0) if bounded else (-math.inf, math.inf),
            donors=donors,
        )

    def _case(self, stated: Explanation, view: LatentView, effects: Effects) -> Case:
        takes = with_text if self._kind == "reader" else (lambda e: bool(token_set(e)))
        others = panel(stated, view, self._controls, takes=takes) if stated.status == "ok" else []
        lent: dict[str, list[Explanation]] = {}
        for name, other in others:
            lent.setdefault(name, []).append(other)
        return Case(
            explanation=stated,
            view=view,
            effects=effects,
            first=self._first,
            everywhere=self._nulls == "all",
            lent=lent,
        )

    def _unmet(self, case: Case, gains: Gains | None) -> Unmet:
        """Return why there is nothing to be had of a control in a condition."""
        why = ""
        if case.explanation.status != "ok":
            why = f"the effect has no explanation: {case.explanation.status}"
        elif self._kind == "tokens" and self._explain == "effect" and (gains is None or not gains.tokens):
            why = "no token gains on the explaining prompts"
        return {("none", i): why for i in range(len(self._names))} if why else case.unmet

    def _retested(self, view: LatentView) -> bool:
        return stream(view.examples.seed, view.latent, NAME, "retest").random() < self._retest

    def _n_of(self, view: LatentView) -> int:
        """Return how many prompts a latent is scored on."""
        reads = self._kind == "reader" and view.reader is not None and not view.reader.natural
        return min(self._n_score, PLUMBING) if reads else self._n_score

    def _draw(self, view: LatentView, split: Split, n: int, bos: int | None) -> list[Prompt]:
        return draw_prompts(view, split, n, context=self._context, bos=bos)

    # -- what the edit makes likelier --------------------------------------------------------------------------------

    def _gains(self, view: LatentView, effects: Effects) -> Gains | None:
        """Return what gains on the explaining prompts at the headline strength, or the nearest below it that is met."""
        subject, _ = view.require_subject()
        met = [i for i in effects.own.met if i <= self._first]
        shown = self._draw(view, "train", self._n_explain, subject.bos)
        if not met or not shown:
            return None
        return effects.gains(shown, effects.own.matched[met[-1]].strength, self._n_tokens)

    async def _stated(
        self, explanation: Explanation, view: LatentView, gains: Gains | None, gate: asyncio.Semaphore
    ) -> tuple[Explanation, str]:
        """Return what a language model says of the effect, and why it says nothing where it does not."""
        if gains is None:
            return replace(explanation, text=None, status="failed", program=None), "no prompt or strength to explain on"
        texts = [
            with_gains(view.tokens.decode(prompt.tokens), [(view.tokens.texts[t], factor) for t, factor in factors])
            for prompt, factors in zip(gains.prompts, gains.factors, strict=True)
        ]
        async with gate:
            reply = await view.require_llm().reply(self._request(texts, view))
        if reply.finish in ("error", "refused"):
            status: Any = "failed" if reply.finish == "error" else "refused"
            return replace(explanation, text=None, status=status, program=None), reply.error or ""
        text = parse_explanation(reply.text or "")
        if text is None:
            return replace(explanation, text=None, status="unparsed", program=None), "the reply has no explanation"
        return replace(explanation, text=text, program=None), ""

    def _request(self, texts: Sequence[str], view: LatentView) -> LLMRequest:
        return LLMRequest(
            messages=effect_messages(texts),
            temperature=0.0 if view.llm is None else view.llm.temperature,
            max_tokens=self._max_tokens,
            stage=self.label,
        )


def _targets(given: str | float | Sequence[float], headline: float) -> tuple[float, ...]:
    """Return target KLs, of which the headline is one. Raises ConfigError on anything else."""
    parts = given.split("+") if isinstance(given, str) else [given] if isinstance(given, int | float) else given
    try:
        found = tuple(sorted({float(part) for part in parts}))
    except (TypeError, ValueError):
        raise ConfigError(f"targets are KLs in nats, joined by +, such as 0.1+1; got {given!r}") from None
    if not found or not all(0 < target < math.inf for target in found) or headline not in found:
        raise ConfigError(
            f"targets are positive numbers and the headline is one of them, got {list(found)} and {headline}"
        )
    return found
