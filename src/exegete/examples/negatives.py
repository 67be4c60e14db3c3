"""Silent windows to judge beside the firing ones. Arrays in, arrays out."""

from __future__ import annotations

import numpy as np

from exegete.types import Array


def draw_silent(touched: Array, frame: int, n: int, rng: np.random.Generator) -> tuple[Array, float]:
    """Draw n frame windows in which the latent has no firing at all, without replacement, or all when there are fewer.

    ``touched`` holds the windows with any firing, ascending, each once; ``frame`` is the number of windows. Returns
    the windows, ascending, and the inclusion probability of each: n over the number of silent windows.
    """
    silent = frame - len(touched)
    n = min(n, silent)
    if n < 1:
        return np.empty(0, dtype=np.int64), 0.0
    nth = np.sort(rng.choice(silent, n, replace=False))
    # The k-th silent window is k plus the number of touched windows before it.
    before = np.searchsorted(touched - np.arange(len(touched)), nth, side="right")
    return nth + before, n / silent
