"""Intervention on the acting subject, scored by the tokens that gain or by a simulated reader of what it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np

from exegete.llm.scripted import Evidence
from exegete.rules.language import Clause, Rule, TokenAt
from exegete.scorers.intervention import InterventionScorer, Kind
from exegete.scorers.intervention_effects import STEPS
from exegete.scorers.intervention_measuring import token_set
from exegete.scorers.intervention_prompts import draw_prompts
from exegete.testing.acting import Acting, OnSubject, Stage
from exegete.testing.instruments import GAP, Instrument, Known, Scores, scored
from exegete.testing.latents import RUNGS
from exegete.testing.readers import WORTH, CountingReader, spelled
from exegete.testing.settings import Round, Setting
from exegete.testing.worlds import DAMAGED
from exegete.testing.written import Written, written_after
from exegete.types import Array, Explanation
from exegete.views import LatentView

TARGET: Final = 1.0
SIMULATED: Final = 300
"""Times that prompts are drawn to find how likely each is to be drawn, at least."""
_CONTEXT: Final = 16  # the subject looks no further back than one token
_SEEDS: Final = 1 << 20  # of these draws: no round of a validation has them
_STRENGTHS: Final = np.linspace(0.0, 2.0, 401)
_AROUND: Final = (0.8, 1.0, 1.25)  # KLs at whose strengths it is computed what is written; others lie between
_ALL: Final = (*RUNGS, *DAMAGED)
AllScores = dict[tuple[int, str], Scores]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ends:
    """The tokens that prompts end in [m], and how many prompts of each draw end in each of them [draws, m]."""

    tokens: Array
    counts: Array

    @property
    def shares(self) -> Array:
        """The shares of prompts [1 + draws, m], those of all draws together first."""
        counts = np.vstack([self.counts.sum(axis=0), self.counts])
        found: Array = counts / counts.sum(axis=1, keepdims=True)
        return found


class Intervened(OnSubject, ABC):
    """Intervention at a KL of 1, on as many prompts as windows of a class are drawn."""

    def __init__(self, evidence: Evidence, stage: Stage, kind: Kind) -> None:
        super().__init__(evidence, stage)
        self._kind: Kind = kind

    @property
    def name(self) -> str:
        """The scorer's label."""
        return self._scorer(1).label

    @property
    def every(self) -> int:
        """One latent of three, since passes of a subject take long."""
        return 3

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the true gain, prompts counting as likely as they are drawn, and simulated estimates.

        NaN for a rung that names no tokens.
        """
        acting = self.acting(setting.round.world)
        ends: Ends = self.stage.kept(("ends", setting.latent, setting.round.n), lambda: ends_of(setting))
        kl = divergences(acting, setting.latent, ends.tokens) @ ends.shares.T
        strengths = np.array([np.interp(TARGET, column, _STRENGTHS) for column in kl.T])
        named = np.array([bool(named_tokens(setting, rung)) for rung in rungs])
        found = np.where(named, self._gains(setting, rungs, ends, strengths, rng), np.nan)
        return Known(expected=found[0], drawn=found[1 : 1 + draws])

    @abstractmethod
    def _gains(
        self, setting: Setting, rungs: Sequence[str], ends: Ends, strengths: Array, rng: np.random.Generator
    ) -> Array:
        """Return what is gained at the strength of every row of ``shares`` [1 + draws, rungs].

        The first row is what must come of it, the others scatter as estimates do.
        """

    def _scorer(self, n: int) -> InterventionScorer:
        return InterventionScorer(
            kind=self._kind, targets=[TARGET], headline=TARGET, n_score=n, context=_CONTEXT, controls="none", retest=0.0
        )

    def _items(self, made: Round, rungs: Sequence[str]) -> list[tuple[Explanation, LatentView]]:
        acting = self.acting(made.world)
        return [
            (naming(s, rung), replace(s.view(), subject=acting.subject, coder=acting.coder))
            for s in made.settings
            for rung in rungs
            if named_tokens(s, rung)
        ]

    def _scored(self, made: Round, rungs: Sequence[str], items: Sequence[tuple[Explanation, LatentView]]) -> AllScores:
        """Return the scores of these explanations; of rungs that are not among them, none."""
        nothing: AllScores = {(s.latent, rung): {} for s in made.settings for rung in rungs}
        return nothing | scored(self._scorer(made.n), items)


@final
class Gaining(Intervened):
    """Intervention without a language model: the probability that the tokens of an explanation gain."""

    def __init__(self, evidence: Evidence, stage: Stage) -> None:
        super().__init__(evidence, stage, "tokens")

    @property
    def headline(self) -> str:
        """The probability gained at the one target."""
        return f"mass_kl_{TARGET:g}"

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> AllScores:
        """Run the scorer on the acting subject."""
        return self._scored(made, rungs, self._items(made, rungs))

    def _gains(
        self, setting: Setting, rungs: Sequence[str], ends: Ends, strengths: Array, rng: np.random.Generator
    ) -> Array:
        acting, latent = self.acting(setting.round.world), setting.latent
        sets = [list(named_tokens(setting, rung)) for rung in rungs]
        clean = acting.next_tokens(ends.tokens, latent, 0.0)
        gained = np.empty((len(_STRENGTHS), len(ends.tokens), len(rungs)))
        for at, strength in enumerate(_STRENGTHS.tolist()):
            more = acting.next_tokens(ends.tokens, latent, strength) - clean
            gained[at] = np.array([more[:, tokens].sum(axis=1) for tokens in sets]).T
        place = np.interp(strengths, _STRENGTHS, np.arange(len(_STRENGTHS)))
        below = np.minimum(place.astype(np.int64), len(_STRENGTHS) - 2)
        part = (place - below)[:, None, None]
        found: Array = np.einsum("dmr,dm->dr", (1 - part) * gained[below] + part * gained[below + 1], ends.shares)
        return found


@final
class Reading(Intervened):
    """Intervention in nats, by a reader who finds an explanation the likelier the more tokens it seems to cover."""

    def __init__(self, evidence: Evidence, stage: Stage) -> None:
        super().__init__(evidence, stage, "reader")

    @property
    def headline(self) -> str:
        """Nats at the one target."""
        return f"nats_kl_{TARGET:g}"

    @property
    def gap(self) -> float:
        """What 0.08 of every token of a continuation is worth."""
        return GAP * STEPS * WORTH

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> AllScores:
        """Run the scorer with a simulated reader, to whom texts are spelled token by token."""
        items = self._items(made, rungs)
        reader = CountingReader({str(e.text): token_set(e) for e, _ in items}, self.evidence, seed=seed)
        table = self.stage.kept(("spelled",), lambda: spelled(made.world.table))
        return self._scored(made, rungs, [(e, replace(view, reader=reader, tokens=table)) for e, view in items])

    def _gains(
        self, setting: Setting, rungs: Sequence[str], ends: Ends, strengths: Array, rng: np.random.Generator
    ) -> Array:
        written: Written = self.stage.kept(("written", setting.latent), lambda: self._written(setting))
        columns = [_ALL.index(rung) for rung in rungs]
        places = np.searchsorted(written.tokens, ends.tokens)
        found = written.gains(strengths, places, ends.shares)[:, columns]
        found[1:] += written.scatter(places, ends.counts, rng)[:, columns]
        return WORTH * found

    def _written(self, setting: Setting) -> Written:
        """Return what the subject writes after each token that the latent may fire on, to every rung."""
        acting, latent = self.acting(setting.round.world), setting.latent
        clean = self.stage.kept(("clean",), lambda: acting.transitions(latent, 0.0))
        tokens = np.array(token_set(setting.explanation("exact")))
        kl = divergences(acting, latent, tokens).mean(axis=1)
        covered = np.zeros((len(_ALL), len(clean)), bool)
        for rung, row in zip(_ALL, covered, strict=True):
            row[list(named_tokens(setting, rung))] = True
        return written_after(
            tokens,
            clean,
            ((s, acting.transitions(latent, s)) for s in np.interp(_AROUND, kl, _STRENGTHS).tolist()),
            taken=np.where(covered, self.evidence.true_positive_rate, self.evidence.false_positive_rate),
            ends=setting.round.world.table.is_special,
            seed=latent,
        )


def intervened(evidence: Evidence, stage: Stage) -> list[Instrument]:
    """Return intervention of both kinds."""
    return [Gaining(evidence, stage), Reading(evidence, stage)]


def ends_of(setting: Setting) -> Ends:
    """Return how prompts end, drawn again and again as the scorer draws them."""
    view, lasts = setting.view(), []
    for number in range(SIMULATED):
        seeded = replace(view, examples=replace(view.examples, seed=_SEEDS + number))
        prompts = draw_prompts(seeded, "test", setting.round.n, context=_CONTEXT, bos=None)
        lasts.append([prompt.tokens[-1] for prompt in prompts])
    tokens, place = np.unique(np.array(lasts), return_inverse=True)
    counts = np.array([np.bincount(row, minlength=len(tokens)) for row in place.reshape(SIMULATED, -1)])
    return Ends(tokens=tokens, counts=counts)


def divergences(acting: Acting, latent: int, tokens: Array) -> Array:
    """Return KL(clean ‖ edited) of the next token after each of these, by strength [strengths, m]."""
    clean = acting.next_tokens(tokens, latent, 0.0)
    edited = (acting.next_tokens(tokens, latent, strength) for strength in _STRENGTHS.tolist())
    return np.array([(clean * np.log(clean / one)).sum(axis=1) for one in edited])


def named_tokens(setting: Setting, rung: str) -> tuple[int, ...]:
    """Return the tokens that a rung names, or those of the exact one damaged; none where one token would be halved.

    What is wrong is as frequent as what is right: each token's match is the nearest to it in frequency.
    """
    if rung not in DAMAGED:
        return token_set(setting.explanation(rung))
    tokens = token_set(setting.explanation("exact"))
    if rung == "missing":
        return tokens[::2] if len(tokens) > 1 else ()
    frame = setting.round.frame
    counts = np.bincount(frame.tokens.ravel(), minlength=len(frame.table)).astype(np.float64)
    counts[frame.table.is_special] = -np.inf
    added: list[int] = []
    for token in tokens:
        off = np.abs(counts - counts[token])
        off[[*tokens, *added]] = np.inf
        added.append(int(off.argmin()))
    return tuple(sorted((*tokens, *added)))


def naming(setting: Setting, rung: str) -> Explanation:
    """Return a rung as an explanation; a damaged one as a rule of its tokens."""
    found = setting.explanation(rung)
    if rung not in DAMAGED:
        return found
    rule = Rule((Clause((TokenAt(0, named_tokens(setting, rung)),), 1.0, 1.0),))
    return replace(found, program=rule.to_json())
