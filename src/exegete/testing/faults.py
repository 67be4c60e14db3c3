"""What a judge's faults do to detection: answers that depend on their place in a request, on one another, or fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np

from exegete.llm.scripted import Evidence, SimulatedJudge
from exegete.scorers.detection import DetectionScorer
from exegete.testing.instruments import Judged, scored
from exegete.testing.settings import Round

FAULTS: Final[Mapping[str, Mapping[str, float]]] = {
    "none": {},
    "position bias 0.5": {"position_bias": 0.5},
    "cross-talk 0.5": {"cross_talk": 0.5},
    "20 % of replies unparsed": {"parse_failure_rate": 0.2},
}
PER_REQUEST: Final = (1, 5)
_RUNGS = ("exact", "broad", "half")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Detection by a judge with one fault, with so many examples in a request.

    ``bias`` is the mean difference from the true balanced accuracy; ``covered`` how often its interval holds that, and
    ``bounded`` how often ``floor`` to ``ceiling`` do; ``failed`` the share of windows without a verdict.
    """

    name: str
    per_request: int
    bias: float
    covered: float
    bounded: float
    failed: float
    n: int


def measure_faults(made: Round, evidence: Evidence) -> tuple[Fault, ...]:
    """Return what each fault does with 1 and with 5 examples in a request."""
    known = Judged(DetectionScorer(controls="none"), evidence)
    rng = np.random.default_rng(0)
    truth = {
        (setting.latent, rung): value
        for setting in made.settings
        for rung, value in zip(_RUNGS, known.known(setting, _RUNGS, 1, rng).expected.tolist(), strict=True)
    }
    return tuple(
        _fault(made, evidence, truth, name, options, k) for name, options in FAULTS.items() for k in PER_REQUEST
    )


def _fault(
    made: Round,
    evidence: Evidence,
    truth: Mapping[tuple[int, str], float],
    name: str,
    options: Mapping[str, Any],
    per_request: int,
) -> Fault:
    judge = SimulatedJudge(
        true_positive_rate=evidence.true_positive_rate,
        false_positive_rate=evidence.false_positive_rate,
        seed=made.seed,
        predicates=made.predicates(_RUNGS),
        **options,
    )
    items = [(s.explanation(rung), replace(s.view(), llm=judge)) for s in made.settings for rung in _RUNGS]
    found = scored(DetectionScorer(controls="none", per_request=per_request), items)
    pairs = [(scores["balanced_accuracy"], truth[key]) for key, scores in found.items()]
    return Fault(
        name=name,
        per_request=per_request,
        bias=float(np.mean([score.value - true for score, true in pairs])),
        covered=float(np.mean([score.low <= true <= score.high for score, true in pairs])),
        bounded=float(np.mean([score.floor <= true <= score.ceiling for score, true in pairs])),
        failed=sum(score.n_failed for score, _ in pairs) / max(1, sum(score.n_total for score, _ in pairs)),
        n=len(pairs),
    )
