"""Fuzzing: are exactly the right tokens marked? (arXiv 2410.13928, section 3.3.2).

``default``: firing windows carry their true marks; silent windows carry the whole mark pattern of a firing one that
begins at much the same place in its row, so that neither the number of marks nor their places tell the two apart. (The
released code marked random places, the same ones in every window of a latent.)

``active``: of the firing windows half carry their true marks, and half as many marks at tokens where the latent is
silent. Only the marks tell right from wrong, so this asks where in the text the latent fires. (The released code calls
it ``fuzz_type="active"``.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final

import numpy as np

from exegete.errors import ConfigError
from exegete.examples.render import active_tokens, transplant_marks
from exegete.llm.protocol import Kind
from exegete.scorers.asked import Asked
from exegete.scorers.judge import MAX_TOKENS, Items, JudgeChoice
from exegete.scorers.judged import DEFAULT_CONTROLS, JudgedScorer
from exegete.scorers.sequential import MARGIN
from exegete.streams import stream
from exegete.types import Array
from exegete.views import LatentView

Marks = Literal["default", "active"]
THRESHOLD = 0.3
"""Share of a window's maximum above which the paper marks a token (arXiv 2410.13928)."""


@final
class FuzzingScorer(JudgedScorer):
    """Shows test windows with marks; positives are marked where the latent fires.

    ``kind`` is ``default`` (wrong marks on silent windows) or ``active`` (wrong marks on firing windows; its scores
    stand under ``fuzzing_active``, over half as many windows of each class, and extend to no frame of windows).
    ``threshold`` is the one threshold of this scorer: true marks and transplanted ones stand where an activation
    exceeds that share of its window's maximum. Whoever judges is asked about the same marks, so that what a language
    model says and what a rule does are paired; a rule takes marks that it matches, whatever else it matches.
    """

    def __init__(
        self,
        *,
        kind: Marks = "default",
        threshold: float = THRESHOLD,
        judge: JudgeChoice = "auto",
        per_request: int = 5,
        probabilities: bool = False,
        max_tokens: int = MAX_TOKENS,
        controls: str | Sequence[str] = DEFAULT_CONTROLS,
        certify: float | None = None,
        margin: float = MARGIN,
        stop_when: float | None = None,
    ) -> None:
        super().__init__(
            judge=judge,
            per_request=per_request,
            probabilities=probabilities,
            max_tokens=max_tokens,
            controls=controls,
            certify=certify,
            margin=margin,
            stop_when=stop_when,
        )
        if kind not in ("default", "active"):
            raise ConfigError(f"kind is default or active, got {kind!r}")
        if not 0.0 <= threshold < 1.0:
            raise ConfigError(f"threshold is a share of a window's maximum, at least 0 and below 1, got {threshold}")
        self._marks: Marks = kind
        self._threshold = threshold

    @property
    def kind(self) -> Kind:
        """``fuzzing``."""
        return "fuzzing"

    @property
    def label(self) -> str:
        """``fuzzing``, or ``fuzzing_active``."""
        return "fuzzing_active" if self._marks == "active" else "fuzzing"

    @property
    def in_frame(self) -> bool:
        """Of wrong marks there is no frame to extend to."""
        return self._marks == "default"

    def _args(self) -> dict[str, Any]:
        return {"kind": self._marks, "threshold": self._threshold, **super()._args()}

    def units(self, view: LatentView) -> Asked:
        """Return marked windows, those with true marks and those with wrong ones."""
        made = _active if self._marks == "active" else _transplanted
        return made(view, self._threshold)


def _transplanted(view: LatentView, threshold: float) -> Asked:
    """Return firing windows with their marks, silent ones with marks taken from firing ones."""
    examples = view.examples.part("test")
    shown, fires = active_tokens(examples.activations, threshold), examples.fires
    if not fires.all():
        rng = stream(view.examples.seed, view.latent, "fuzzing", "marks")
        hidden = view.tokens.is_special[examples.tokens[~fires]]
        starts = examples.start
        shown[~fires] = transplant_marks(shown[fires], starts[fires], starts[~fires], rng, hidden)
    return Asked.whole(examples, Items(tokens=examples.tokens, marks=shown))


def _active(view: LatentView, threshold: float) -> Asked:
    """Return firing windows, half of them with their marks and half with wrong ones.

    Which half a window is of is a coin within its stratum. Windows with too few silent tokens for wrong marks are in
    neither half: with many marks they would all be right.
    """
    examples = view.examples.part("test", fires=True)
    rng = stream(view.examples.seed, view.latent, "fuzzing_active", "marks")
    right = active_tokens(examples.activations, threshold)
    free = (examples.activations == 0) & ~view.tokens.is_special[examples.tokens]
    fits = free.sum(axis=1) >= right.sum(axis=1)
    examples, right, free = examples.take(fits), right[fits], free[fits]
    truth = np.ones(len(examples), bool)
    turned = np.lexsort((rng.random(len(examples)), examples.stratum))
    truth[turned[int(rng.integers(2)) :: 2]] = False
    shown = np.where(truth[:, None], right, misplaced_marks(right, free, rng))
    strongest = np.where(shown, examples.activations, 0.0).max(axis=1, initial=0.0).astype(np.float64)
    return Asked(examples=examples, items=Items(tokens=examples.tokens, marks=shown), truth=truth, activation=strongest)


def misplaced_marks(patterns: Array, free: Array, rng: np.random.Generator) -> Array:
    """Return wrong marks for windows, bool [n, window]: as many as ``patterns`` [n, window] has, all where ``free``.

    Each window is dealt the pattern of another with as many marks, drawn at random, so that over all windows wrong
    marks stand at the same offsets as true ones; a mark that would not be free there goes to the nearest token that is
    (of two as near the one before). A window needs at least as many free tokens [n, window] as it has marks.
    """
    counts = patterns.sum(axis=1)
    shown = np.zeros_like(patterns, dtype=bool)
    for count in np.unique(counts).tolist():
        alike = rng.permutation(np.flatnonzero(counts == count))
        for window, donor in zip(alike.tolist(), np.roll(alike, 1).tolist(), strict=True):
            shown[window] = patterns[donor] & free[window]
            for offset in np.flatnonzero(patterns[donor] & ~free[window]).tolist():
                left = np.flatnonzero(free[window] & ~shown[window])
                shown[window, left[np.abs(left - offset).argmin()]] = True
    return shown
