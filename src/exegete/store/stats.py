"""Exact statistics of latents, computed from their firings (arrays in, numbers out)."""

from __future__ import annotations

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from exegete.errors import CorruptError, NotFoundError
from exegete.files import atomic_file, hash_file
from exegete.store.checks import verify_once
from exegete.store.values import LOWEST_EXPONENT, MANTISSA_BITS, decode_values
from exegete.types import Array, LatentId, LatentStats

SUMMARY = "summary.npz"
TOP_TOKENS = 10
"""Tokens whose counts a summary keeps for each latent, the most frequent ones."""
_SPARSEST = 4  # cells per firing up to which a table of counts beats sorting
_BINS = 1 << (16 - MANTISSA_BITS)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Statistics of a run of latents, each array [latents] or [latents, …]; the latter in the least type that fits.

    ``counts`` int64 firings, ``maxima`` float32 (0 where silent), ``totals`` and ``sum_squares`` float64 of the values;
    ``histogram`` [latents, bins] firings by the power of two of their value, from 2^``lowest`` up;
    ``top_tokens`` and ``top_counts`` [latents, 10] the tokens a latent fires on most often (equally frequent
    ones in the order of their ids) and how often, −1 and 0 where there are fewer; ``distinct`` int64 different tokens;
    ``token_entropy`` float64 bits; ``first`` and ``last`` int64 firings at the first and at the last counted position
    of a document in its row.
    """

    counts: Array
    maxima: Array
    totals: Array
    sum_squares: Array
    histogram: Array
    lowest: int
    top_tokens: Array
    top_counts: Array
    distinct: Array
    token_entropy: Array
    first: Array
    last: Array


_PLAIN = tuple(f.name for f in dataclasses.fields(Summary) if f.name not in ("histogram", "lowest"))
_WIDE = ("histogram", "top_tokens", "top_counts")
_REAL = ("maxima", "totals", "sum_squares", "token_entropy")
_DAMAGE = (
    ValueError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,  # NotImplementedError, RecursionError: a compression or an encryption that is none of ours
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What is known of one latent from some of its firings; tallies of all its firings add up to its summary.

    ``largest`` is the largest code; ``bins`` int64 [64] counts exponent fields; ``tokens`` and ``often`` are the
    different tokens, ascending, and how often each occurs; the rest is as in ``Summary``.
    """

    largest: int
    total: float
    sum_squares: float
    bins: Array
    tokens: Array
    often: Array
    first: int
    last: int

    def plus(self, other: Tally) -> Tally:
        """Return the tally of these firings and of those after them."""
        tokens, place = np.unique(np.concatenate([self.tokens, other.tokens]), return_inverse=True)
        often: Array = np.zeros(len(tokens), np.int64)
        np.add.at(often, place, np.concatenate([self.often, other.often]))
        return Tally(
            largest=max(self.largest, other.largest),
            total=self.total + other.total,
            sum_squares=self.sum_squares + other.sum_squares,
            bins=self.bins + other.bins,
            tokens=tokens,
            often=often,
            first=self.first + other.first,
            last=self.last + other.last,
        )

    def summary(self) -> Summary:
        """Return the summary of the latent, once all its firings are in."""
        counts = np.array([self.bins.sum()], np.int64)
        used = np.flatnonzero(self.bins)
        lowest, beyond = int(used[0]), int(used[-1]) + 1
        return Summary(
            counts=counts,
            maxima=decode_values(np.array([self.largest], np.uint16)),
            totals=np.array([self.total]),
            sum_squares=np.array([self.sum_squares]),
            histogram=_narrow(self.bins[None, lowest:beyond]),
            lowest=lowest + LOWEST_EXPONENT,
            first=np.array([self.first], np.int64),
            last=np.array([self.last], np.int64),
            **_token_profile(np.zeros(len(self.tokens), np.int64), self.tokens, self.often, counts),
        )


def tally(codes: Array, tokens: Array, ends: Array) -> Tally:
    """Count some firings of one latent, at least one; the arrays are those of ``summarise``."""
    values = decode_values(codes).astype(np.float64)
    _, different, often = _token_counts(np.zeros(len(tokens), np.int64), tokens, 1)
    return Tally(
        largest=int(codes.max()),
        total=float(values.sum()),
        sum_squares=float((values * values).sum()),
        bins=np.bincount(codes >> MANTISSA_BITS, minlength=_BINS),
        tokens=different,
        often=often,
        first=int((ends & 1).sum(dtype=np.int64)),
        last=int((ends >> 1).sum(dtype=np.int64)),
    )


def summarise(offsets: Array, codes: Array, tokens: Array, ends: Array) -> Summary:
    """Summarise latents from their firings, latent by latent and in row order.

    ``offsets`` [latents + 1] where each latent begins; ``codes`` [n] stored values; ``tokens`` [n] the token at each
    firing; ``ends`` [n] 1 where the firing lies at the first counted position of a document in its row, 2 at the last,
    3 at both, else 0. Sums run in row order in double precision, so that they do not depend on how the firings are
    cut into shards.
    """
    counts = np.diff(offsets).astype(np.int64)
    n = len(counts)
    owner = np.repeat(np.arange(n), counts)
    values = decode_values(codes).astype(np.float64)
    lowest, n_bins = _span(codes)
    bins = owner * n_bins + (codes >> MANTISSA_BITS) - lowest
    return Summary(
        counts=counts,
        maxima=np.where(counts > 0, decode_values(_reduced(np.maximum, codes, offsets)), np.float32(0)),
        totals=_reduced(np.add, values, offsets),
        sum_squares=_reduced(np.add, values * values, offsets),
        histogram=_narrow(np.bincount(bins, minlength=n * n_bins).reshape(n, n_bins)),
        lowest=lowest + LOWEST_EXPONENT,
        first=_reduced(np.add, (ends & 1).astype(np.int64), offsets),
        last=_reduced(np.add, (ends >> 1).astype(np.int64), offsets),
        **_token_profile(*_token_counts(owner, tokens, n), counts),
    )


def _reduced(function: np.ufunc, values: Array, offsets: Array) -> Array:
    """Reduce the values of each latent, 0 where it has none; in an order that depends on its own values alone."""
    found: Array = np.zeros(len(offsets) - 1, values.dtype)
    firing = offsets[1:] > offsets[:-1]
    if firing.any():
        found[firing] = function.reduceat(values, offsets[:-1][firing])
    return found


def _span(codes: Array) -> tuple[int, int]:
    """Return the smallest exponent field among codes and how many there are up to the largest."""
    if not len(codes):
        return 0, 0
    lowest, highest = (int(code) >> MANTISSA_BITS for code in (codes.min(), codes.max()))
    return lowest, highest - lowest + 1


def _token_profile(latent: Array, token: Array, often: Array, counts: Array) -> dict[str, Array]:
    """Return the token fields of a summary from how often every (latent, token) occurs, in order."""
    n = len(counts)
    top_tokens, top_counts = np.full((n, TOP_TOKENS), -1, np.int64), np.zeros((n, TOP_TOKENS), np.int64)
    distinct = np.bincount(latent, minlength=n)
    share = often / counts[latent]
    entropy = np.abs(np.bincount(latent, weights=-share * np.log2(share), minlength=n))
    held = _leading(latent, often, n)
    latent, token, often = latent[held], token[held], often[held]
    order = _most_first(latent, token, often)
    latent, token, often = latent[order], token[order], often[order]
    leading = np.bincount(latent, minlength=n)
    rank = np.arange(len(latent)) - (np.cumsum(leading) - leading)[latent]
    kept = rank < TOP_TOKENS
    top_tokens[latent[kept], rank[kept]], top_counts[latent[kept], rank[kept]] = token[kept], often[kept]
    return {
        "top_tokens": _narrow(top_tokens),
        "top_counts": _narrow(top_counts),
        "distinct": distinct,
        "token_entropy": entropy,
    }


def _token_counts(owner: Array, tokens: Array, n: int) -> tuple[Array, Array, Array]:
    """Return every (latent, token) that occurs, in order, and how often: counted in a table where it is well filled."""
    width = int(tokens.max()) + 1 if len(tokens) else 1
    keys = owner * width + tokens
    if n * width <= _SPARSEST * len(keys):
        table = np.bincount(keys)
        found = np.flatnonzero(table)
        often = table[found]
    else:
        keys = np.sort(keys.astype(np.uint32) if n * width < 1 << 32 else keys)
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else keys
        found, often = keys[begins].astype(np.int64), np.diff(np.append(begins, len(keys)))
    latent, token = np.divmod(found, width)
    return latent, token, often


def _leading(latent: Array, often: Array, n: int) -> Array:
    """Return where a token may be among the most frequent of its latent: few places, so that little is sorted.

    A latent keeps the powers of two from the highest on which, together, the wanted number of tokens reach.
    """
    level = np.frexp(often.astype(np.float32))[1]
    levels = int(level.max(initial=0)) + 1
    reached = np.bincount(latent * levels + level, minlength=n * levels).reshape(n, levels)
    reached = reached[:, ::-1].cumsum(axis=1)[:, ::-1]
    least = np.maximum((reached >= TOP_TOKENS).sum(axis=1) - 1, 0)
    held: Array = np.flatnonzero(level >= least[latent])
    return held


def _most_first(latent: Array, token: Array, often: Array) -> Array:
    """Return the order by latent, then how often, most first, then token."""
    if not len(latent):
        return latent
    n, most, width = (int(part.max()) + 1 for part in (latent, often, token))
    if n * most * width >= 1 << 63:
        return np.lexsort((token, -often, latent))
    order: Array = np.argsort((latent * most + (most - 1 - often)) * width + token)
    return order


def joined(parts: Sequence[Summary]) -> Summary:
    """Return the summaries of consecutive latents as one."""
    fields = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PLAIN}
    used = [part for part in parts if part.histogram.shape[1]]
    lowest = min((part.lowest for part in used), default=0)
    beyond = max((part.lowest + part.histogram.shape[1] for part in used), default=0)
    kind = np.result_type(np.int8, *(part.histogram.dtype for part in parts))
    histogram = np.zeros((len(fields["counts"]), beyond - lowest), kind)
    row = 0
    for part in parts:
        n, bins = part.histogram.shape
        histogram[row : row + n, part.lowest - lowest : part.lowest - lowest + bins] = part.histogram if bins else 0
        row += n
    return Summary(**fields, histogram=histogram, lowest=lowest)


def latent_stats(summary: Summary, row: int, latent: LatentId, *, n_positions: int, n_top: int = 10) -> LatentStats:
    """Return the statistics of one latent, row ``row`` of a summary, over ``n_positions`` counted positions.

    The histogram runs from the bin of the smallest value to that of the largest, none for a silent latent.
    """
    count = int(summary.counts[row])
    used = np.flatnonzero(summary.histogram[row])
    lowest, beyond = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    top = zip(summary.top_tokens[row, :n_top].tolist(), summary.top_counts[row, :n_top].tolist(), strict=True)
    return LatentStats(
        latent=latent,
        count=count,
        rate=count / n_positions if n_positions else 0.0,
        maximum=float(summary.maxima[row]),
        mean=float(summary.totals[row]) / count if count else 0.0,
        sum_squares=float(summary.sum_squares[row]),
        histogram=summary.histogram[row, lowest:beyond].astype(np.int64),
        edges=2.0 ** (np.arange(beyond - lowest + 1) + lowest + summary.lowest),
        top_tokens=tuple((token, often) for token, often in top if often),
        token_entropy=float(summary.token_entropy[row]),
        first_share=int(summary.first[row]) / count if count else 0.0,
        last_share=int(summary.last[row]) / count if count else 0.0,
    )


def save_summary(folder: Path, summary: Summary) -> str:
    """Write the summary of a store, atomically, and return its checksum, which belongs into the manifest."""
    with atomic_file(folder / SUMMARY) as stream:
        fields = {name: _narrow(getattr(summary, name)) for name in (*_PLAIN, "histogram")}
        np.savez_compressed(stream, allow_pickle=False, **fields, lowest=np.int64(summary.lowest))
    return hash_file(folder / SUMMARY)


def load_summary(folder: Path, sha256: str, width: int) -> Summary:
    """Read the summary of a store of so many latents. Raises NotFoundError or CorruptError naming the file.

    ``sha256`` is what ``save_summary`` returned, empty where nobody kept it.
    """
    fields = _members(folder, sha256, width, (*_PLAIN, "histogram", "lowest"))
    lowest = fields.pop("lowest")
    right = all(array.shape[:1] == (width,) and array.ndim == 1 + (name in _WIDE) for name, array in fields.items())
    right &= all(array.dtype.kind == ("f" if name in _REAL else "i") for name, array in fields.items())
    right &= fields["top_tokens"].shape == fields["top_counts"].shape
    if not right or lowest.shape != () or lowest.dtype.kind != "i" or abs(int(lowest)) > _BINS:
        raise CorruptError(f"{folder / SUMMARY} is not that of this store; delete the store and collect again")
    return Summary(**fields, lowest=int(lowest))


def load_counts(folder: Path, sha256: str, width: int) -> Array:
    """Read nothing but the firings of every latent, int64 [width], as ``load_summary`` does."""
    return _members(folder, sha256, width, ("counts",))["counts"]


def _members(folder: Path, sha256: str, width: int, names: Sequence[str]) -> dict[str, Array]:
    """Read some arrays of a summary, those of one dimension in their wide types."""
    path = folder / SUMMARY
    try:
        if sha256:
            verify_once(path, sha256)
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            largest = max((item.file_size for item in data.zip.infolist()), default=0)
            if largest > 8 * _BINS * (width + 64):
                raise ValueError("it holds an array too large for this store")
            return {name: data[name] if name in _WIDE else _wide(data[name]) for name in names}
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}") from None
    except _DAMAGE as error:
        raise CorruptError(f"{path} is damaged: {error}; delete it and collect again") from error


def _narrow(array: Array) -> Array:
    """Return whole numbers in the smallest signed type that holds them; a summary is mostly small ones."""
    if array.dtype.kind != "i" or not array.size:
        return array
    low, high = int(array.min()), int(array.max())
    kinds = (np.int8, np.int16, np.int32, np.int64)
    return array.astype(next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))


def _wide(array: Array) -> Array:
    return array.astype(np.int64) if array.dtype.kind in "iu" else array
