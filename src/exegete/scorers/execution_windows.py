"""Exact window-level figures of a rule: over all windows of the test frame that detection draws from, none drawn.

A rule says yes to a window if and only if it does so as the judge of detection (``scorers.judge.RuleJudge``): it is run
on the window alone and matches at any token that counts. A window is true when any position of it fires. So each figure
is what the population metric of detection of the same name estimates, when the rule itself is the judge.

The frame is the one whose sizes ``FrameCounts.of`` tells: every window of the test split in the tiling of this window
length and seed, train documents and what tiling leaves over at both ends of a text left out. Detection sees it with
near-duplicates as one unit, which stands for all of them; here each is judged by itself, as the estimate does on
average over draws. In two places an estimate and these figures may differ by more than the draw. Windows whose recorded
values are all 0 or below, and those that no kind of silent windows claims (``unused``), are never drawn: they count as
silent here and in the size of the frame, but an estimate takes them to be as the other silent ones. And how many
windows a silent unit stands for on average is told to the estimate by the units it drew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.examples.data import StoreData
from exegete.examples.split import CODES
from exegete.examples.windows import Frame
from exegete.rules.execute import TokenContext, fitting, read_alone
from exegete.rules.language import Rule
from exegete.types import Array

Tiling = tuple[int, int, bool]
"""Window length, seed, and whether windows may begin with special tokens."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class WindowMetrics:
    """What a rule says of ``n_windows`` windows, of which ``n_firing`` fire.

    It says yes to ``n_called``, of which ``n_hits`` fire. ``pearson`` correlates that with the strongest activation in
    the window; NaN when either never varies.
    """

    n_windows: int
    n_firing: int
    n_called: int
    n_hits: int
    pearson: float

    @property
    def precision(self) -> float:
        """Share of the windows it says yes to that fire; NaN where it never does."""
        return _share(self.n_hits, self.n_called)

    @property
    def recall(self) -> float:
        """Share of the firing windows that it says yes to."""
        return _share(self.n_hits, self.n_firing)

    @property
    def specificity(self) -> float:
        """Share of the silent windows that it says no to; NaN where all fire."""
        quiet = self.n_windows - self.n_firing
        return _share(quiet - (self.n_called - self.n_hits), quiet)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 for a rule that never says yes."""
        return _share(2 * self.n_hits, self.n_called + self.n_firing)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of recall and specificity."""
        return (self.recall + self.specificity) / 2.0


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TestWindows:
    """All test windows of a frame, prepared for rules: shared by all latents of a coder.

    ``numbers`` [n] are their numbers in ``frame``, ascending; the rows of ``context`` are their tokens.
    """

    __test__ = False  # no test of pytest's

    data: StoreData
    frame: Frame
    numbers: Array
    context: TokenContext

    @classmethod
    def of(cls, data: StoreData, window: int, seed: int, keep_bos: bool) -> TestWindows:
        """Return the test windows of the tiling with this window length and seed."""
        frame = data.frame(window, seed, keep_bos=keep_bos)
        numbers = frame.numbers(CODES["test"])
        context = read_alone(data.window_tokens(frame, numbers), data.tokens)
        return cls(data=data, frame=frame, numbers=numbers, context=context)

    @property
    def tiling(self) -> Tiling:
        """How the frame was made."""
        return self.frame.window, self.frame.seed, self.frame.keep_bos

    def measure(self, rules: Sequence[Rule], indices: Sequence[int]) -> list[WindowMetrics | None]:
        """Measure one rule per latent; None for a latent that fires in no test window."""
        fired = self.data.block(indices, self.frame).test
        found: list[WindowMetrics | None] = []
        for i, rule in enumerate(rules):
            run = slice(int(fired.offsets[i]), int(fired.offsets[i + 1]))
            firing = fired.maximum[run] > 0
            places = np.searchsorted(self.numbers, fired.window[run][firing])
            found.append(_measured(fitting(rule, self.context), places, fired.maximum[run][firing].astype(np.float64)))
        return found


def _measured(said: Array, places: Array, maxima: Array) -> WindowMetrics | None:
    """Return the figures of what a rule said [windows] bool, where those at ``places`` fire with these maxima."""
    if not len(places):
        return None
    n, hit = len(said), said[places]
    called, total = int(np.count_nonzero(said)), float(maxima.sum())
    covariance = float(maxima[hit].sum()) / n - called / n * total / n
    spread = called / n * (1.0 - called / n) * (float(maxima @ maxima) / n - (total / n) ** 2)
    return WindowMetrics(
        n_windows=n,
        n_firing=len(places),
        n_called=called,
        n_hits=int(np.count_nonzero(hit)),
        pearson=float(np.clip(covariance / math.sqrt(spread), -1.0, 1.0)) if spread > 0 else math.nan,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
