"""Exact statistics of latents, computed from their firings (arrays in, numbers out)."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from exegete.errors import CorruptError, NotFoundError
from exegete.files import atomic_file
from exegete.store.values import LOWEST_EXPONENT, MANTISSA_BITS, decode_values
from exegete.types import Array, LatentId, LatentStats

SUMMARY = "summary.npz"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Four numbers of every latent, each [width].

    ``counts`` int64 firings, ``maxima`` float32 (0 where silent), ``totals`` and ``sum_squares`` float64 of the values.
    """

    counts: Array
    maxima: Array
    totals: Array
    sum_squares: Array


def summarise(offsets: Array, codes: Array) -> Summary:
    """Summarise latents from their values: ``codes`` [n] latent by latent, ``offsets`` [latents + 1] where each begins.

    Sums run in row order in double precision, so that they do not depend on how the firings are cut into blocks.
    """
    counts = np.diff(offsets).astype(np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    values = decode_values(codes).astype(np.float64)
    maxima = np.zeros(len(counts), np.float32)
    firing = counts > 0
    if firing.any():
        maxima[firing] = decode_values(np.maximum.reduceat(codes, offsets[:-1][firing]))
    return Summary(
        counts=counts,
        maxima=maxima,
        totals=np.bincount(owner, weights=values, minlength=len(counts)),
        sum_squares=np.bincount(owner, weights=values * values, minlength=len(counts)),
    )


def latent_stats(latent: LatentId, codes: Array, tokens: Array, *, n_positions: int, n_top: int = 10) -> LatentStats:
    """Return the statistics of one latent from its firings.

    ``codes`` [n] are the stored values, ``tokens`` [n] the token at each firing, ``n_positions`` the counted positions
    of the store. The histogram has one bin per power of two from the smallest to the largest value, none for a silent
    latent; equally frequent tokens come in the order of their ids.
    """
    values = decode_values(codes).astype(np.float64)
    exponents = (codes >> MANTISSA_BITS).astype(np.int64)
    lowest = int(exponents.min()) if len(codes) else 0
    histogram = np.bincount(exponents - lowest) if len(codes) else np.zeros(0, np.int64)
    distinct, frequency = np.unique(tokens, return_counts=True)
    order = np.argsort(-frequency, kind="stable")[:n_top]
    share = frequency / max(len(codes), 1)
    return LatentStats(
        latent=latent,
        count=len(codes),
        rate=len(codes) / n_positions if n_positions else 0.0,
        maximum=float(values.max()) if len(codes) else 0.0,
        mean=float(values.mean()) if len(codes) else 0.0,
        sum_squares=float((values * values).sum()),
        histogram=histogram,
        edges=2.0 ** (np.arange(len(histogram) + 1) + lowest + LOWEST_EXPONENT),
        top_tokens=tuple((int(distinct[i]), int(frequency[i])) for i in order),
        token_entropy=abs(float(-(share * np.log2(share)).sum())),
    )


def save_summary(folder: Path, summary: Summary) -> None:
    """Write the summary of a store, atomically."""
    with atomic_file(folder / SUMMARY) as stream:
        np.savez(
            stream,
            counts=summary.counts,
            maxima=summary.maxima,
            totals=summary.totals,
            sum_squares=summary.sum_squares,
        )


def load_summary(folder: Path) -> Summary:
    """Read a store's summary. Raises NotFoundError or CorruptError naming the file."""
    path = folder / SUMMARY
    try:
        with np.load(path, allow_pickle=False) as data:
            return Summary(**{name: data[name] for name in ("counts", "maxima", "totals", "sum_squares")})
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}") from None
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{path} is damaged: {error}; delete it and collect again") from error
