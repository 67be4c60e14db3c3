"""How strong an edit has to be for a given effect: strengths matched by KL divergence at the last prompt position.

Edits are compared at equal effect on the next token, not at equal size: KL(clean ‖ edited), in nats, averaged over
prompts (arXiv 2410.13928, section 3.3.5; the released code has this direction of the two).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch

from exegete.errors import InputError
from exegete.subjects.continuing import Editing, Prompts

TOLERANCE: Final = 0.1
"""Relative error of a KL that counts as met."""
AIM: Final = 0.01
"""Relative error of a KL that is not worth another pass. A score moves with the KL that it was measured at, by as much
after every prompt, so that the prompts' scatter does not tell of it: within the tolerance alone that can be more than
an interval over prompts is wide."""
REFINED: Final = 4
"""Passes that come nearer to a target than the tolerance, at most."""
ROUNDS: Final = 16
"""Passes of a search at most."""
_FIRST: Final = (0.25, 1.0, 4.0, 16.0)
_STEP: Final = 8.0
_FLAT: Final = 1e-3
_LEAST: Final = 1e-12
_ELEMENTS: Final = 1 << 25  # log probabilities held at a time


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The strength found for a target KL: ``kl`` is the one it has, in nats.

    Where the target was not met ``strength`` is NaN and ``kl`` the nearest that was seen. ``evaluations`` is the number
    of strengths tried for all targets of the search together.
    """

    target: float
    strength: float
    kl: float
    evaluations: int

    @property
    def met(self) -> bool:
        """Whether a strength was found."""
        return not math.isnan(self.strength)


def divergence(clean: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """Return KL(clean ‖ edited) in nats over the last dimension of log probabilities, never below 0.

    A token that the clean model rules out counts nothing.
    """
    terms = torch.where(clean > -math.inf, clean.exp() * (clean - edited), 0.0)
    return terms.sum(dim=-1).clamp_min(0.0)


def mean_divergence(prompts: Prompts, editing: Editing, strengths: Sequence[float], clean: torch.Tensor) -> list[float]:
    """Return the KL at each strength, averaged over prompts; ``clean`` [prompts, vocabulary] are log probabilities."""
    at_once = max(1, _ELEMENTS // clean.numel())
    found: list[float] = []
    for at in range(0, len(strengths), at_once):
        edited = prompts.log_probabilities(editing, strengths[at : at + at_once])
        found += divergence(clean, edited).double().mean(dim=-1).tolist()
    return found


def match_divergence(
    prompts: Prompts,
    editing: Editing,
    targets: Sequence[float],
    *,
    start: float,
    clean: torch.Tensor,
    tolerance: float = TOLERANCE,
    rounds: int = ROUNDS,
) -> list[Matched]:
    """Return for each target KL the least strength that was found to have it, within a relative ``tolerance``.

    The search begins around ``start``, steps out by factors of 8 until a target lies between two strengths, and then
    interpolates on logarithmic axes, where KL is nearly a line (it grows with the square of a small strength); every
    third step halves the interval instead, which ends where it is no line. A target that is met is followed for a few
    passes more, until its KL is within 1 %. One is not met where more strength no longer changes the KL, or no strength
    of ``rounds`` passes has it. ``clean`` [prompts, vocabulary] are the clean log probabilities.

    Raises InputError for targets or a start that are not positive and finite.
    """
    if not all(math.isfinite(t) and t > 0 for t in (*targets, start)):
        raise InputError(f"target KLs and the first strength are positive numbers, got {[*targets, start]}")
    seen: dict[float, float] = {}
    asked = [start * factor for factor in _FIRST]
    since = dict.fromkeys(targets, 0)
    for turn in range(rounds):
        kls = mean_divergence(prompts, editing, asked, clean)
        seen.update(zip(asked, (math.inf if math.isnan(kl) else kl for kl in kls), strict=True))
        for target in targets:
            since[target] += _met(seen, target, tolerance) is not None
        aim = min(AIM, tolerance)
        left = [target for target in targets if since[target] <= REFINED and _met(seen, target, aim) is None]
        wanted = {_next(seen, target, turn) for target in left}
        asked = sorted(strength for strength in wanted if strength is not None and strength not in seen)
        if not asked:
            break
    return [_matched(seen, target, tolerance) for target in targets]


def _met(seen: dict[float, float], target: float, tolerance: float) -> float | None:
    """Return the strength whose KL is nearest to the target, None where none is near enough."""
    strength = min(seen, key=lambda s: abs(seen[s] - target))
    return strength if abs(seen[strength] - target) <= tolerance * target else None


def _matched(seen: dict[float, float], target: float, tolerance: float) -> Matched:
    found = _met(seen, target, tolerance)
    kl = min(seen.values(), key=lambda kl: abs(kl - target)) if found is None else seen[found]
    return Matched(target=target, strength=math.nan if found is None else found, kl=kl, evaluations=len(seen))


def _next(seen: dict[float, float], target: float, turn: int) -> float | None:
    """Return the strength to try next for a target; None where more strength no longer changes the KL."""
    tried = sorted(seen)
    crossing = next((i for i in range(1, len(tried)) if seen[tried[i - 1]] < target <= seen[tried[i]]), None)
    if crossing is None:  # not between any two: all are too strong, or all too weak
        if seen[tried[0]] >= target:
            return tried[0] / _STEP
        last, before = seen[tried[-1]], seen[tried[-2]]
        settled = before > _FLAT and abs(last - before) <= _FLAT * before  # final norms bound what any strength does
        return None if settled else tried[-1] * _STEP
    low, high = tried[crossing - 1], tried[crossing]
    below, above = (math.log(max(seen[s], _LEAST)) for s in (low, high))
    share = 0.5
    if turn % 3 and math.isfinite(above) and above > below:
        share = min(max((math.log(target) - below) / (above - below), 0.05), 0.95)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
