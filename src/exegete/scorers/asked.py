"""What a judge is asked of one latent, and its verdicts as judgements and as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.metrics import Observed
from exegete.metrics.observed import FAILED
from exegete.scorers.judge import Item, Items, Verdict
from exegete.types import STRATA, Array, Example, Judgement, Windows


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An item, the example behind it, and the right answer, which the judge does not see."""

    example: Example
    item: Item
    truth: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """All that a judge is asked of one latent, in order: the windows, what it is shown of each, the right answers.

    ``truth`` bool [n]; ``activation`` float64 [n], the latent's strongest where the question points: in the window, or
    at the marked tokens. Raises InputError when the parts differ in length.
    """

    examples: Windows
    items: Items
    truth: Array
    activation: Array

    def __post_init__(self) -> None:
        n = len(self.examples)
        if not len(self.items) == len(self.truth) == len(self.activation) == n:
            raise InputError("every window has one item, one right answer and one activation")

    @classmethod
    def whole(cls, examples: Windows, items: Items) -> Asked:
        """Return questions about whole windows: whether the latent fires in them."""
        return cls(examples=examples, items=items, truth=examples.fires, activation=examples.strongest)

    def take(self, which: Array | slice) -> Asked:
        """Return the questions at these places, in this order."""
        return Asked(
            examples=self.examples.take(which),
            items=self.items.take(which),
            truth=self.truth[which],
            activation=self.activation[which],
        )

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def tested(self) -> Windows:
        """The windows as judging in rounds draws them: firing where the right answer is yes."""
        if bool((self.truth == self.examples.fires).all()):
            return self.examples
        shown = np.where(self.truth[:, None], self.examples.activations, 0).astype(np.float32)
        return replace(self.examples, fires=self.truth, activations=shown)

    def questions(self) -> list[Question]:
        """Return the questions one by one."""
        return [
            Question(example=example, item=item, truth=truth)
            for example, item, truth in zip(self.examples, self.items, self.truth.tolist(), strict=True)
        ]

    def observed(self, verdicts: Sequence[Verdict]) -> Observed:
        """Return verdicts as columns; ``score`` is P(yes) where the judge gave it."""
        said = [FAILED if v.prediction is None else int(v.prediction) for v in verdicts]
        scores = [np.nan if v.probability is None else v.probability for v in verdicts]
        return Observed.of_windows(
            self.examples,
            prediction=np.array(said, np.int8),
            score=np.array(scores, np.float64),
            truth=self.truth,
            activation=self.activation,
        )

    def judgements(self, verdicts: Sequence[Verdict]) -> tuple[Judgement, ...]:
        """Return one judgement per verdict."""
        return judgements_of(self.examples, verdicts, truth=self.truth, activation=self.activation)


def judgements_of(
    windows: Windows,
    verdicts: Sequence[Verdict],
    *,
    truth: Array | None = None,
    activation: Array | None = None,
    place: Array | None = None,
    column: Array | None = None,
) -> tuple[Judgement, ...]:
    """Return one judgement per verdict on windows, in their order; or on tokens [t] that lie in them.

    ``place`` [t] says in which window each token lies and ``column`` [t] where in it. ``truth`` and ``activation`` are
    those of the windows where they are not given.
    """
    at = slice(None) if place is None else place
    start = windows.start[at]
    columns = (
        windows.row[at],
        start if column is None else start + column,
        windows.document[at],
        windows.stratum[at],
        windows.fires[at] if truth is None else truth,
        windows.strongest[at] if activation is None else activation,
        windows.probability[at],
        windows.multiplicity[at],
    )
    return tuple(
        Judgement(
            row=row,
            start=begin,
            document=document,
            stratum=STRATA[stratum],
            truth=true,
            prediction=verdict.prediction,
            probability=verdict.probability,
            value=verdict.value,
            status=verdict.status,
            activation=strength,
            inclusion_probability=inclusion,
            multiplicity=multiplicity,
        )
        for row, begin, document, stratum, true, strength, inclusion, multiplicity, verdict in zip(
            *(c.tolist() for c in columns), verdicts, strict=True
        )
    )
