"""Every type that crosses a boundary between parts: frozen, slotted, checked on construction, numpy arrays.

Shapes are given in brackets. None of these types refers to torch, so that selecting, explaining, scoring and
reporting start without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, final

import numpy.typing as npt

from exegete.errors import InputError
from exegete.tokens import TokenTable

Array = npt.NDArray[Any]
Split = Literal["train", "validation", "test"]
Side = Literal["input", "output"]
ExplanationStatus = Literal["ok", "unparsed", "refused", "failed"]
JudgementStatus = Literal["ok", "unparsed", "refused", "failed"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


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
    it); ``row`` and ``start`` say where the window lies; ``fires`` is true when any position fires; ``stratum`` names
    the sampling stratum (``decile_0`` is the strongest, ``top``, ``random``, ``silent``); ``inclusion_probability`` is
    the chance that the draw took this window, over the windows of its split's frame.
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

    def __post_init__(self) -> None:
        # Millions of these are made: messages are built only when they are needed.
        if self.split not in SPLITS:
            raise InputError(f"split is one of {SPLITS}, got {self.split!r}")
        _require(self.tokens.shape == self.activations.shape and self.tokens.ndim == 1, "a window is two flat arrays")
        _require(len(self.tokens) > 0, "a window has at least one token")
        if not 0.0 < self.inclusion_probability <= 1.0:
            raise InputError(f"an inclusion probability lies in (0, 1], got {self.inclusion_probability}")
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


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSet:
    """The examples of one latent. Raises InputError when splits share a document or windows repeat or overlap.

    ``maximum`` is the latent's largest activation over the train split (strengths 0–10 are relative to it);
    ``firing_rate`` the share of test-frame windows that fire; ``frame`` the number of test-frame windows. ``table``,
    where given, says what the tokens stand for, so that the set can be explained on its own.
    """

    latent: LatentId
    examples: tuple[Example, ...]
    maximum: float
    firing_rate: float
    frame: int
    seed: int
    table: TokenTable | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        owner: dict[int, Split] = {}
        spans: dict[int, list[tuple[int, int, Split]]] = {}
        for example in self.examples:
            known = owner.setdefault(example.document, example.split)
            if known != example.split:
                raise InputError(f"{self.latent}: document {example.document} is in both {known} and {example.split}")
            spans.setdefault(example.row, []).append((example.start, example.stop, example.split))
        for row, taken in spans.items():
            taken.sort()
            for (start, stop, split), (following, _, other) in pairwise(taken):
                if split == other == "train":  # centred train windows around close firings may overlap
                    if start == following:
                        raise InputError(f"{self.latent}: a train window repeats in row {row}")
                elif stop > following:
                    raise InputError(f"{self.latent}: windows overlap in row {row} at {following}")

    def part(self, split: Split, *, fires: bool | None = None) -> tuple[Example, ...]:
        """Return the examples of a split, all or only the firing or silent ones."""
        return tuple(e for e in self.examples if e.split == split and (fires is None or e.fires == fires))


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

    ``messages`` are ``{"role", "content"}`` pairs; ``sample_index`` tells repeated draws of one prompt apart;
    ``schema`` is a JSON schema the reply should follow where the server can enforce it; ``logprobs`` is the number of
    alternatives wanted per token, 0 for none.
    """

    messages: tuple[Mapping[str, str], ...]
    temperature: float = 0.0
    max_tokens: int = 500
    seed: int | None = None
    sample_index: int = 0
    schema: Mapping[str, Any] | None = None
    logprobs: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LLMReply:
    """What came back: ``text`` or None with ``error``; token counts; ``cost`` in dollars where known.

    ``finish`` is ``stop``, ``length``, ``refused`` or ``error``; ``logprobs`` holds per generated token a mapping of
    alternative to log probability, None where the server gave none.
    """

    text: str | None
    finish: Literal["stop", "length", "refused", "error"]
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    cached: bool = False
    logprobs: Sequence[Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        _require((self.text is None) == (self.finish == "error"), "a reply has a text exactly when it is no error")
