"""Windows of text: one example, columns of them, and the examples of a latent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import final, overload

import numpy as np

from exegete.errors import InputError
from exegete.tokens import TokenTable
from exegete.types.common import SPLITS, STRATA, Array, Split, require
from exegete.types.firings import LatentId


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One window shown or judged.

    ``tokens`` [window] uint32, ``activations`` [window] float32 (zeros where the latent is silent or the mask forbids
    it); ``row`` and ``start`` say where the window lies; ``fires`` is true when any position fires; ``stratum`` is one
    of STRATA (``decile_0`` is the strongest); ``inclusion_probability`` is the chance that the draw took it; it stands
    for ``multiplicity`` windows, its near-duplicates and itself.
    """

    split: Split
    fires: bool
    stratum: str
    row: int
    start: int
    tokens: Array
    activations: Array
    document: int
    inclusion_probability: float
    multiplicity: int = 1

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"split is one of {SPLITS}, got {self.split!r}")
        require(self.tokens.shape == self.activations.shape and self.tokens.ndim == 1, "a window is two flat arrays")
        require(len(self.tokens) > 0, "a window has at least one token")
        if not 0.0 < self.inclusion_probability <= 1.0:
            raise InputError(f"an inclusion probability lies in (0, 1], got {self.inclusion_probability}")
        require(self.multiplicity > 0, "a window stands for itself at least, got a multiplicity below 1")
        require(bool(self.activations.max() > 0) == self.fires, "fires must say whether any activation is positive")

    @property
    def peak(self) -> int:
        """Position of the strongest activation in the window; −1 in a silent one."""
        return int(self.activations.argmax()) if self.fires else -1

    @property
    def maximum(self) -> float:
        """Strongest activation in the window."""
        return float(self.activations.max())

    @property
    def stop(self) -> int:
        """One past the window's last position in its row."""
        return self.start + len(self.tokens)

    @property
    def weight(self) -> float:
        """How many windows of its split's frame it stands for, the draw included."""
        return self.multiplicity / self.inclusion_probability


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Windows(Sequence[Example]):
    """Examples of one window length, as columns.

    ``split`` [n] int8 and ``stratum`` [n] int8 are places in SPLITS and STRATA; ``fires`` [n] bool; ``row``,
    ``start``, ``document`` and ``multiplicity`` [n] int64; ``probability`` [n] float64 (the inclusion probability);
    ``tokens`` [n, window] uint32; ``activations`` [n, window] float32. An index gives an Example, a slice Windows.
    """

    split: Array
    fires: Array
    stratum: Array
    row: Array
    start: Array
    document: Array
    probability: Array
    multiplicity: Array
    tokens: Array
    activations: Array

    def __post_init__(self) -> None:
        n = len(self.tokens)
        require(self.tokens.ndim == 2 and self.tokens.shape[1] > 0, "a window has at least one token")
        require(self.tokens.shape == self.activations.shape, "tokens and activations of windows differ in shape")
        columns = (self.split, self.fires, self.stratum, self.row, self.start, self.document, self.probability)
        require(all(c.shape == (n,) for c in (*columns, self.multiplicity)), "columns of windows differ in length")
        if not n:
            return
        for column, known in ((self.split, SPLITS), (self.stratum, STRATA)):
            require(column.min() >= 0 and column.max() < len(known), "splits are places in SPLITS, strata in STRATA")
        low, high = self.probability.min(), self.probability.max()
        require(low > 0.0 and high <= 1.0, "an inclusion probability lies in (0, 1]")
        require(self.multiplicity.min() > 0, "a window stands for itself at least, got a multiplicity below 1")
        fires = self.activations.max(axis=1) > 0
        require(bool((fires == self.fires).all()), "fires must say whether any activation is positive")

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Windows:
        """Return examples as columns. Raises InputError for several window lengths, or a stratum not in STRATA."""
        given = tuple(examples)
        lengths = {len(e.tokens) for e in given} or {1}
        require(len(lengths) == 1, f"the windows of a set have one length, got {sorted(lengths)}")
        other = sorted({e.stratum for e in given} - set(STRATA))
        require(not other, f"a stratum is one of {', '.join(STRATA)}, got {other[:1]}")
        whole = [(SPLITS.index(e.split), STRATA.index(e.stratum), e.row, e.start, e.document) for e in given]
        split, stratum, row, start, document = np.array(whole, np.int64).reshape(-1, 5).T
        return cls(
            split=split.astype(np.int8), stratum=stratum.astype(np.int8), row=row, start=start, document=document,
            fires=np.array([e.fires for e in given], bool),
            multiplicity=np.array([e.multiplicity for e in given], np.int64),
            probability=np.array([e.inclusion_probability for e in given]),
            tokens=np.array([e.tokens for e in given], np.uint32).reshape(len(given), *lengths),
            activations=np.array([e.activations for e in given], np.float32).reshape(len(given), *lengths),
        )  # fmt: skip

    def take(self, which: Array | slice) -> Windows:
        """Return the windows of a mask, of indices or of a slice."""
        return Windows(**{column.name: getattr(self, column.name)[which] for column in fields(self)})

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Windows: ...
    def __getitem__(self, index: int | slice) -> Example | Windows:
        if isinstance(index, slice):
            return self.take(index)
        return Example(
            split=SPLITS[self.split[index]], fires=bool(self.fires[index]), stratum=STRATA[self.stratum[index]],
            row=int(self.row[index]), start=int(self.start[index]), document=int(self.document[index]),
            tokens=self.tokens[index], activations=self.activations[index], multiplicity=int(self.multiplicity[index]),
            inclusion_probability=float(self.probability[index]),
        )  # fmt: skip

    @property
    def strongest(self) -> Array:
        """The strongest activation in each, float64 [n]."""
        strongest: Array = self.activations.max(axis=1, initial=0.0).astype(np.float64)
        return strongest

    @property
    def weight(self) -> Array:
        """How many windows of its split's frame each stands for, the draw included, float64 [n]."""
        return np.divide(self.multiplicity, self.probability)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSet:
    """The examples of one latent. Raises InputError when splits share a document or windows repeat or overlap.

    ``examples`` given one by one become Windows. ``maximum`` is the latent's largest activation over the train split
    (strengths 0–10 are relative to it); ``firing_rate`` the share of test-frame windows that fire; ``frame`` the number
    of test-frame windows; ``strata`` the sizes of the silent strata in it (of near-duplicates one counts), and last
    ``("unused", n)`` where n are of none. ``keep_bos`` says whether its windows may begin with special tokens.
    ``table``, where given, says what tokens stand for, to explain from the set.
    """

    latent: LatentId
    examples: Windows | tuple[Example, ...]
    maximum: float
    firing_rate: float
    frame: int
    seed: int
    strata: tuple[tuple[str, int], ...] = ()
    keep_bos: bool = False
    table: TokenTable | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        windows = self.windows
        object.__setattr__(self, "examples", windows)
        order = np.argsort(windows.document, kind="stable")
        document, split = windows.document[order], windows.split[order]
        shared = np.flatnonzero((document[1:] == document[:-1]) & (split[1:] != split[:-1]))
        if len(shared):
            both = " and ".join(SPLITS[i] for i in sorted(split[shared[0] : shared[0] + 2]))
            raise InputError(f"{self.latent}: document {document[shared[0]]} is in both {both}")
        order = np.lexsort((windows.start, windows.row))
        row, start, learnt = windows.row[order], windows.start[order], windows.split[order] == SPLITS.index("train")
        apart, shown = np.diff(start), learnt[1:] & learnt[:-1]
        # Centred train windows around close firings may overlap.
        wrong = np.flatnonzero((np.diff(row) == 0) & (apart < np.where(shown, 1, windows.tokens.shape[1])))
        if len(wrong):
            told = "a train window repeats in row {}" if shown[wrong[0]] else "windows overlap in row {} at {}"
            raise InputError(f"{self.latent}: {told.format(row[wrong[0]], start[wrong[0] + 1])}")

    @property
    def windows(self) -> Windows:
        """The examples as columns."""
        return self.examples if isinstance(self.examples, Windows) else Windows.of(self.examples)

    def part(self, split: Split, *, fires: bool | None = None) -> Windows:
        """Return the examples of a split, all or only the firing or silent ones."""
        windows = self.windows
        chosen = windows.split == SPLITS.index(split)
        return windows.take(chosen if fires is None else chosen & (windows.fires == fires))
