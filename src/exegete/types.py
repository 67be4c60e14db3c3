"""Every type that crosses a boundary between parts: frozen, slotted, checked on construction, numpy arrays.

Shapes are given in brackets. None of these types refers to torch, so that selecting, explaining, scoring and
reporting start without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, final, overload

import numpy as np
import numpy.typing as npt

from exegete.errors import InputError
from exegete.tokens import TokenTable

Array = npt.NDArray[Any]
Split = Literal["train", "validation", "test"]
Side = Literal["input", "output"]
ExplanationStatus = Literal["ok", "unparsed", "refused", "failed"]
JudgementStatus = Literal["ok", "unparsed", "refused", "failed"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_DRAWN = ("top", "random", "importance", "diverse", "near_miss", "same_token", "neighbour", "similar", "silent")
STRATA: tuple[str, ...] = (*(f"decile_{i}" for i in range(10)), *(f"bin_{i}" for i in range(10)), *_DRAWN)
"""What windows are drawn from: of firing ones deciles of rank, bins of value, or as their strategy is called; of silent
ones their kind, random ones being ``silent``."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@final
@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class LatentId:
    """One latent: the name of its coder and its index. Text form ``CODER/index``."""

    coder: str
    index: int

    def __post_init__(self) -> None:
        _require(self.index >= 0, f"a latent index is not negative, got {self.index}")
        _require(bool(self.coder), "a latent needs the name of its coder")

    def __str__(self) -> str:
        return f"{self.coder}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> LatentId:
        """Read the text form. Raises InputError on anything else."""
        coder, slash, index = text.rpartition("/")
        _require(bool(slash and coder and index.isdecimal()), f"a latent is written CODER/index, got {text!r}")
        return cls(coder=coder, index=int(index))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Token rows.

    ``tokens`` [rows, length] uint32; ``documents`` [rows, length] int32, the document of every position, −1 for
    padding; ``mask`` [rows, length] bool, the positions at which firings count (not BOS, special tokens or padding).
    """

    tokens: Array
    documents: Array
    mask: Array

    def __post_init__(self) -> None:
        _require(self.tokens.ndim == 2, f"row tokens are [rows, length], got shape {self.tokens.shape}")
        _require(
            self.tokens.shape == self.documents.shape == self.mask.shape,
            f"tokens, documents and mask differ in shape: {self.tokens.shape} {self.documents.shape} {self.mask.shape}",
        )

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        """Positions in a row."""
        return int(self.tokens.shape[1])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCode:
    """Latent activations of n inputs, never dense.

    ``indices`` and ``values`` [n, k]; a value of 0 marks an unused slot. Or ragged: flat arrays, with ``offsets``
    [n + 1]. ``width`` is the number of latents of the coder. The arrays are torch tensors on the coder's device
    straight from ``encode``, numpy after ``numpy()``.
    """

    indices: Any
    values: Any
    width: int
    offsets: Any | None = None

    def __post_init__(self) -> None:
        _require(
            tuple(self.indices.shape) == tuple(self.values.shape),
            f"indices {tuple(self.indices.shape)} and values {tuple(self.values.shape)} differ in shape",
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Firings:
    """All firings of one latent in row order: ``rows`` [n] int64, ``positions`` [n] int32, ``values`` [n] float32."""

    latent: LatentId
    rows: Array
    positions: Array
    values: Array

    def __post_init__(self) -> None:
        _require(
            self.rows.shape == self.positions.shape == self.values.shape and self.rows.ndim == 1,
            "firings are three flat arrays of one length",
        )

    def __len__(self) -> int:
        return int(self.rows.shape[0])


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
        _require(self.tokens.shape == self.activations.shape and self.tokens.ndim == 1, "a window is two flat arrays")
        _require(len(self.tokens) > 0, "a window has at least one token")
        if not 0.0 < self.inclusion_probability <= 1.0:
            raise InputError(f"an inclusion probability lies in (0, 1], got {self.inclusion_probability}")
        _require(self.multiplicity > 0, "a window stands for itself at least, got a multiplicity below 1")
        _require(bool(self.activations.max() > 0) == self.fires, "fires must say whether any activation is positive")

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
        _require(self.tokens.ndim == 2 and self.tokens.shape[1] > 0, "a window has at least one token")
        _require(self.tokens.shape == self.activations.shape, "tokens and activations of windows differ in shape")
        columns = (self.split, self.fires, self.stratum, self.row, self.start, self.document, self.probability)
        _require(all(c.shape == (n,) for c in (*columns, self.multiplicity)), "columns of windows differ in length")
        if not n:
            return
        for column, known in ((self.split, SPLITS), (self.stratum, STRATA)):
            _require(column.min() >= 0 and column.max() < len(known), "splits are places in SPLITS, strata in STRATA")
        low, high = self.probability.min(), self.probability.max()
        _require(low > 0.0 and high <= 1.0, "an inclusion probability lies in (0, 1]")
        _require(self.multiplicity.min() > 0, "a window stands for itself at least, got a multiplicity below 1")
        fires = self.activations.max(axis=1) > 0
        _require(bool((fires == self.fires).all()), "fires must say whether any activation is positive")

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Windows:
        """Return examples as columns. Raises InputError for several window lengths, or a stratum not in STRATA."""
        given = tuple(examples)
        lengths = {len(e.tokens) for e in given} or {1}
        _require(len(lengths) == 1, f"the windows of a set have one length, got {sorted(lengths)}")
        other = sorted({e.stratum for e in given} - set(STRATA))
        _require(not other, f"a stratum is one of {', '.join(STRATA)}, got {other[:1]}")
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
    ``("unused", n)`` where n are of none. ``table``, where given, says what tokens stand for, to explain from the set.
    """

    latent: LatentId
    examples: Windows | tuple[Example, ...]
    maximum: float
    firing_rate: float
    frame: int
    seed: int
    strata: tuple[tuple[str, int], ...] = ()
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


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What an explainer said of a latent.

    ``text`` is None unless ``status`` is ``ok``; ``explainer`` is the spec ``{"name", "args"}`` that re-creates it;
    ``program`` is a rule's executable form as JSON data, absent for free text; ``examples`` names the train windows
    shown as (row, start); ``detail`` holds whatever else the explainer measured.
    """

    latent: LatentId
    text: str | None
    status: ExplanationStatus
    explainer: Mapping[str, Any]
    prompt_hash: str = ""
    examples: tuple[tuple[int, int], ...] = ()
    program: Any | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            (self.text is not None) == (self.status == "ok"),
            f"{self.latent}: an explanation has a text exactly when its status is ok, got {self.status}",
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One verdict on one example.

    ``truth`` is what the model did; ``prediction`` what the judge said, None unless ``status`` is ``ok``;
    ``probability`` is the judge's P(yes) where it gave one; ``stratum`` and ``document`` are the example's;
    ``row`` and ``start`` name the window.
    """

    row: int
    start: int
    document: int
    stratum: str
    truth: bool
    prediction: bool | None
    probability: float | None = None
    status: JudgementStatus = "ok"

    def __post_init__(self) -> None:
        _require(
            (self.prediction is not None) == (self.status == "ok"),
            f"a judgement has a prediction exactly when its status is ok, got {self.status}",
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric over judgements or over held-out tokens, with its 95 % interval and counts.

    ``value``, ``low`` and ``high`` are NaN when nothing could be scored. ``control`` is ``none`` or the name of the
    null (``other_latent``: the same judge given other latents' explanations). ``value`` of a control is the mean over
    its donors. ``explanation`` is the database id, None before it is stored.
    """

    latent: LatentId
    scorer: str
    metric: str
    value: float
    low: float
    high: float
    method: str
    n_total: int
    n_scored: int
    n_failed: int
    control: str = "none"
    explanation: int | None = None

    def __post_init__(self) -> None:
        _require(self.n_scored + self.n_failed == self.n_total, "n_scored and n_failed must add up to n_total")
        if not math.isnan(self.value):
            _require(self.low <= self.value <= self.high, f"interval {self.low}…{self.high} leaves out {self.value}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A latent that dropped out of a stage: why, what it had and what it would have needed."""

    latent: LatentId
    stage: str
    reason: str
    have: int
    need: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LatentStats:
    """Exact counts of one latent over the whole store.

    ``rate`` is firings over counted positions; ``histogram`` [bins] counts firings in log2 bins of the value, with
    ``edges`` [bins + 1]; ``top_tokens`` are (token, firings) pairs, most first; ``token_entropy`` is the entropy in
    bits of the distribution of firings over tokens; ``first_share`` and ``last_share`` are the shares of firings at the
    first and at the last counted position of a document in its row.
    """

    latent: LatentId
    count: int
    rate: float
    maximum: float
    mean: float
    sum_squares: float
    histogram: Array
    edges: Array
    top_tokens: tuple[tuple[int, int], ...]
    token_entropy: float
    first_share: float = 0.0
    last_share: float = 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LLMRequest:
    """One call to a language model; nothing is shared between requests.

    Either ``messages``, ``{"role", "content"}`` pairs of a chat, or ``prompt``, the text to complete. ``sample_index``
    tells repeated draws of one prompt apart; ``schema`` is a JSON schema the reply should follow where the server can
    enforce it; ``logprobs`` is the number of alternatives wanted per generated token, 0 for none; ``prompt_logprobs``
    asks for the log probability of every token of ``prompt``. ``stage`` says what it is for, on the ledger only.
    """

    messages: tuple[Mapping[str, str], ...] = ()
    prompt: str | None = None
    temperature: float = 0.0
    max_tokens: int = 500
    seed: int | None = None
    sample_index: int = 0
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    logprobs: int = 0
    prompt_logprobs: bool = False
    stage: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.messages) != (self.prompt is not None), "a request holds either messages or a prompt")
        _require(self.prompt is not None or not self.prompt_logprobs, "prompt_logprobs are those of a prompt")
        _require(self.max_tokens > 0, f"max_tokens is at least 1, got {self.max_tokens}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token of a reply or a prompt: its text, log probability, and the likeliest alternatives with theirs.

    ``logprob`` is None where the server gave none, as for the first token of a prompt; it is never 0 instead.
    """

    token: str
    logprob: float | None
    alternatives: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LLMReply:
    """What came back: ``text`` or None with ``error``; token counts; ``cost`` in dollars where known.

    ``finish`` is ``stop``, ``length``, ``refused`` or ``error``. ``prompt_tokens`` and ``completion_tokens`` are None
    where the server did not count; ``cached_tokens`` of the prompt's tokens came from the server's own prefix cache.
    ``logprobs`` are those of the generated tokens, ``prompt_logprobs`` those of the prompt's; None where the server
    gave none. ``cached`` says that the reply was kept from before and cost nothing.
    """

    text: str | None
    finish: Literal["stop", "length", "refused", "error"]
    error: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    completion_tokens: int | None = None
    cost: float | None = None
    cached: bool = False
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    def __post_init__(self) -> None:
        _require((self.text is None) == (self.finish == "error"), "a reply has a text exactly when it is no error")
