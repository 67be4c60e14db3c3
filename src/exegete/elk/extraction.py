"""What a model holds after each statement, and after each answer to it, at every site: what probes are fitted on.

Feature sets, float32:

- ``last`` the residual stream at the statement's last token, by site [n, d];
- ``pair`` that at the last token of the false and of the true answer, by site [n, 2, d]. Each answer is read from a
  copy of what the statement left behind, so neither sees the other;
- ``state`` the recurrent state behind the statement, by block [n, s], components one after another;
- ``state-pair`` that behind each answer, by block [n, 2, s].

And the model's own answer, the log-odds of the first tokens of the true and the false answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

from exegete.elk.encoding import Encoded, by_length, require_room
from exegete.elk.facts import FEATURES, Feature
from exegete.elk.features import Extraction
from exegete.errors import InputError, unknown
from exegete.progress import Progress, Silent
from exegete.subjects.edits import Edit
from exegete.subjects.names import Point
from exegete.subjects.running import Running
from exegete.subjects.sites import n_blocks, site_point
from exegete.subjects.verdicts import verdict
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.subjects import Subject

TOKENS_AT_ONCE: Final = 8192
MOST_BYTES: Final = 16 << 30
_BATCH_BYTES: Final = 1 << 30
_BEHIND: Final = ("pair", "state-pair")
Name = tuple[Feature, int]
"""Feature set, and site or block."""


def extract(
    subject: Subject,
    data: Encoded,
    *,
    features: Sequence[Feature] | None = None,
    sites: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    most_bytes: int = MOST_BYTES,
    progress: Progress | None = None,
) -> Extraction:
    """Run a model over statements and their answers and return what it held, in memory.

    Rows are run in batches of one length, never padded. ``stored_extraction.extract_to`` does the same into a file.

    Args:
        subject: The model.
        data: Rows.
        features: Which sets; by default ``last`` and ``pair``, and ``state`` where the model carries one.
        sites: Where the residual stream is read, by default 0 … L − 1; the state is read at those that carry one.
        components: Of the state; all by default.
        tokens_at_once: Bounds a batch.
        most_bytes: Refuse where the result would be larger.
        progress: Told of rows.

    Raises:
        InputError: For no rows, rows longer than the model reads, a state that it does not carry, what is no number,
            or too large a result.
        NotFoundError: For unknown features, sites or components.
        MismatchError: For token ids that the model does not have.
    """
    reading = Reading(subject, data, features=features, sites=sites, components=components)
    size = reading.row_bytes * len(data)
    if size > most_bytes:
        raise InputError(
            f"the features of {len(data)} rows take {size / 2**30:.1f} GiB, {most_bytes / 2**30:.1f} are "
            f"allowed in memory; take fewer rows, sites or features, or write them to a folder (extract_to)"
        )
    found: dict[Name, Array] = {
        name: np.empty((len(data), *shape), np.float32) for name, shape in reading.shapes.items()
    }
    log_odds = np.zeros(len(data), np.float32)
    for rows, odds, parts in reading.batches(tokens_at_once, progress):
        log_odds[rows] = odds
        for name, part in parts.items():
            found[name][rows] = part
    return Extraction(
        subject=subject.hash,
        data=data.hash,
        facts=data.facts,
        log_odds=log_odds,
        features={kind: {at: x for (k, at), x in found.items() if k == kind} for kind in reading.kinds},
    )


@final
class Reading:
    """What is to be read of a model, checked before any work starts, and then read batch by batch.

    Attributes:
        kinds: The feature sets.
        shapes: The shape of one row of each feature set and site.

    Raises as ``extract``; one row is run to learn the shapes.
    """

    def __init__(
        self,
        subject: Subject,
        data: Encoded,
        *,
        features: Sequence[Feature] | None = None,
        sites: Sequence[int] | None = None,
        components: Sequence[str] | None = None,
    ) -> None:
        if not len(data):
            raise InputError("there are no rows to extract; take more rows, or a split that has some")
        found = verdict(subject)
        self.kinds = _kinds(features, carries=bool(found.layers))
        chosen = tuple(range(n_blocks(subject))) if sites is None else tuple(sites)
        points = {site: site_point(subject, site) for site in chosen}
        blocks = tuple(block for block in found.layers if block in chosen)
        if any(kind.startswith("state") for kind in self.kinds) and not blocks:
            raise InputError(f"{subject.name} carries no recurrent state at these sites; leave out the state features")
        if components is not None and not any(kind.startswith("state") for kind in self.kinds):
            raise InputError(
                "components are of the state; name state or state-pair among the features, or no components"
            )
        require_room(subject, data, answers=any(kind in _BEHIND for kind in self.kinds))
        self._subject, self._data = subject, data
        self._reader = _Reader(subject, data, self.kinds, points, blocks, components)
        self.shapes = {name: part.shape[1:] for name, part in self._read(np.zeros(1, np.int64))[1].items()}
        for component in components or ():
            if component not in self._reader.carried:
                raise unknown("state component", component, self._reader.carried)
        if components is not None and not components:
            raise InputError(f"name at least one state component of {', '.join(self._reader.carried)}")

    @property
    def row_bytes(self) -> int:
        """Bytes of all features of one row."""
        return sum(4 * int(np.prod(shape)) for shape in self.shapes.values())

    def batches(
        self, tokens_at_once: int = TOKENS_AT_ONCE, progress: Progress | None = None
    ) -> Iterator[tuple[Array, Array, dict[Name, Array]]]:
        """Yield rows [m] of one length with their log-odds [m] and features, every row once.

        A batch has at most so many tokens, and features of at most 1 GiB.
        """
        told = progress or Silent()
        told.start("extract", len(self._data), "rows")
        most = max(1, _BATCH_BYTES // max(1, self.row_bytes))
        for rows in by_length(self._data.prompts, tokens_at_once, most):
            yield rows, *self._read(rows)
            told.advance(len(rows))
        told.end()

    def _read(self, rows: Array) -> tuple[Array, dict[Name, Array]]:
        odds, parts = self._reader.read(rows)
        odd = [f"{kind} at {at}" for (kind, at), part in parts.items() if not np.isfinite(part).all()]
        if odd or not np.isfinite(odds).all():
            raise InputError(
                f"{self._subject.name} gives NaN or infinity ({(odd or ['its answer'])[0]}); load it with a wider dtype"
            )
        return odds, parts


@torch.no_grad()
def answer_log_odds(
    subject: Subject, data: Encoded, *, edits: Sequence[Edit] = (), tokens_at_once: int = TOKENS_AT_ONCE
) -> Array:
    """Return the model's log-odds of the true answer against the false one [n], edited at the last token or not.

    Raises InputError for rows longer than the model reads, MismatchError for token ids that it does not have.
    """
    require_room(subject, data)
    found = np.zeros(len(data), np.float32)
    answers = torch.from_numpy(data.answers)
    for rows in by_length(data.prompts, tokens_at_once):
        tokens = torch.tensor([data.prompts[i] for i in rows.tolist()])
        running = Running.start(subject, tokens, edits=edits, where=slice(-1, None))
        found[rows] = _odds(running.logits, answers[torch.from_numpy(rows)])
    return found


@final
class _Reader:
    """Reads batches of rows; ``carried`` are the components of the states that were seen."""

    def __init__(
        self,
        subject: Subject,
        data: Encoded,
        kinds: Sequence[Feature],
        points: Mapping[int, Point],
        blocks: Sequence[int],
        components: Sequence[str] | None,
    ) -> None:
        self._subject, self._data, self._kinds = subject, data, kinds
        self._points, self._blocks, self._components = points, blocks, components
        self._answers = torch.from_numpy(data.answers)
        self.carried: dict[str, None] = {}

    @torch.no_grad()
    def read(self, rows: Array) -> tuple[Array, dict[Name, Array]]:
        """Return log-odds and features of rows of one length."""
        tokens = torch.tensor([self._data.prompts[i] for i in rows.tolist()])
        running, residual = self._fed(None, tokens)
        odds = _odds(running.logits, self._answers[torch.from_numpy(rows)])
        found: dict[Name, Array] = {}
        if "last" in self._kinds:
            found |= {("last", site): value for site, value in residual.items()}
        if "state" in self._kinds:
            found |= {("state", block): value for block, value in self._state(running).items()}
        if any(kind in _BEHIND for kind in self._kinds):
            found |= self._pairs(rows, running)
        return odds, found

    def _pairs(self, rows: Array, running: Running) -> dict[Name, Array]:
        found: dict[Name, Array] = {}
        for which in (0, 1):
            answers = [self._data.choices[i][which] for i in rows.tolist()]
            for same in by_length(answers, 1 << 62):
                tokens = torch.tensor([answers[i] for i in same.tolist()])
                after, residual = self._fed(running.copy(torch.from_numpy(same)), tokens)
                parts: dict[Name, Array] = {}
                if "pair" in self._kinds:
                    parts |= {("pair", site): value for site, value in residual.items()}
                if "state-pair" in self._kinds:
                    parts |= {("state-pair", block): value for block, value in self._state(after).items()}
                for name, value in parts.items():
                    if name not in found:
                        found[name] = np.empty((len(rows), 2, value.shape[1]), np.float32)
                    found[name][same, which] = value
        return found

    def _fed(self, running: Running | None, tokens: torch.Tensor) -> tuple[Running, dict[int, Array]]:
        """Feed tokens, to a new pass or to one under way, and return the residual stream at the last of them."""
        readings = {site: _Reading(point) for site, point in self._points.items()}
        edits, last = list(readings.values()), slice(-1, None)
        if running is None:
            running = Running.start(self._subject, tokens, edits=edits, where=last)
        else:
            running.feed(tokens, edits=edits, where=last, last=True)
        return running, {site: reading.seen for site, reading in readings.items()}

    def _state(self, running: Running) -> dict[int, Array]:
        state = running.state()
        self.carried |= dict.fromkeys(name for block in self._blocks for name in state.components(block))
        return {
            block: state.flat(block, self._components).float().cpu().numpy()
            for block in self._blocks
            if self._components is None or set(self._components) & set(state.components(block))
        }


@final
class _Reading(Edit):
    """Changes nothing and keeps what it was shown."""

    def __init__(self, point: Point) -> None:
        self.target, self.source = point, None
        self.seen: Array = np.zeros((0, 0), np.float32)

    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        self.seen = y.detach().float().cpu().numpy()
        return torch.zeros_like(y)


def _odds(logits: torch.Tensor, answers: torch.Tensor) -> Array:
    """Return logit of the true answer minus logit of the false one [n]."""
    both = logits.float().gather(1, answers.to(logits.device))
    found: Array = (both[:, 1] - both[:, 0]).cpu().numpy()
    return found


def _kinds(features: Sequence[Feature] | None, *, carries: bool) -> tuple[Feature, ...]:
    if features is None:
        return ("last", "pair", "state") if carries else ("last", "pair")
    for kind in features:
        if kind not in FEATURES:
            raise unknown("feature set", kind, FEATURES)
    if not features:
        raise InputError(f"name at least one feature set of {', '.join(FEATURES)}")
    return tuple(kind for kind in FEATURES if kind in features)
