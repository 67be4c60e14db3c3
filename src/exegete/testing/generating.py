"""Generation on the acting subject, with texts that a simulated judge takes from the test windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import numpy as np

from exegete.llm.scripted import SimulatedJudge
from exegete.scorers.generation import GenerationScorer
from exegete.testing.acting import OnSubject
from exegete.testing.instruments import Known, Scores, scored
from exegete.testing.settings import Round, Setting
from exegete.types import Array


@final
class Generating(OnSubject):
    """Generation: the share of texts, written by a simulated judge to fit an explanation, that fire the latent.

    As many texts are written to fit, and as many not to, as windows of a class are drawn. The judge gives no text
    twice: where an explanation fits fewer windows than it is to write of, all of them are written, and fewer texts.
    """

    @property
    def name(self) -> str:
        """``generation``."""
        return _scorer(1).label

    @property
    def headline(self) -> str:
        """The share that fires."""
        return "share_firing"

    @property
    def blind(self) -> Mapping[str, str]:
        """Nothing is asked of what an explanation leaves out."""
        return {"missing": "texts written from what is left of an explanation make the latent fire as well"}

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the share of the texts that is to be expected to fire, and shares of as many as are written."""
        acting, made = self.acting(setting.round.world), setting.round
        texts, at = list(made.frame.places), list(made.frame.places.values())
        encoded = self.stage.kept(
            ("encoded", made.seed), lambda: acting.subject.tokenizer(texts, add_special_tokens=False)["input_ids"]
        )
        fires = acting.fires[setting.latent]
        fired = np.array([bool(fires[ids].any()) for ids in encoded])
        right, n = self.evidence.true_positive_rate, made.n
        expected, drawn = [], []
        for rung in rungs:
            fits = setting.claim(rung).anywhere[at]
            rates = np.array([fired[fits].mean() if fits.any() else np.nan, fired[~fits].mean()])
            meant = np.arange(n + 1)  # texts that are meant to fit and do; the others of the n are in error
            written = np.minimum(meant, fits.sum())
            shares = (written * rates[0] + (n - meant) * rates[1]) / (written + n - meant)
            expected.append(float(_binomial(n, right) @ shares))
            meant = rng.binomial(n, right, size=draws)
            written = np.minimum(meant, fits.sum())
            firing = rng.hypergeometric(int(fired[fits].sum()), int((~fired)[fits].sum()), written)
            firing = firing + rng.binomial(n - meant, rates[1])
            drawn.append(firing / (written + n - meant))
        return Known(expected=np.array(expected), drawn=np.array(drawn).T)

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer with a simulated judge on the acting subject."""
        acting = self.acting(made.world)
        judge = SimulatedJudge(
            true_positive_rate=self.evidence.true_positive_rate,
            false_positive_rate=self.evidence.false_positive_rate,
            seed=seed,
            predicates=made.predicates(rungs),
            windows={text: made.frame.tokens[place] for text, place in made.frame.places.items()},
        )
        items = [
            (s.explanation(rung), replace(s.view(), llm=judge, subject=acting.subject, coder=acting.coder))
            for s in made.settings
            for rung in rungs
        ]
        return scored(_scorer(made.n), items)


def _scorer(n: int) -> GenerationScorer:
    return GenerationScorer(fitting=n, other=n, controls="none")


def _binomial(n: int, rate: float) -> Array:
    """Return the chances of 0 to n."""
    from scipy.stats import binom

    found: Array = binom.pmf(np.arange(n + 1), n, rate)
    return found
