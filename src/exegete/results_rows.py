"""Objects to database rows and back. Numbers are made plain first: sqlite3 would store a numpy integer as raw bytes.

NaN becomes NULL. Text is stored as it is; text that is no valid Unicode (a language model can send half a surrogate
pair) is stored as bytes, which come back as the same text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from exegete.errors import CorruptError
from exegete.files import canonical_json
from exegete.types import Explanation, LatentId, LatentStats, Score, Skipped

STATS = (
    "coder, idx, count, rate, maximum, mean, sum_squares, token_entropy, histogram, edges, top_tokens, first_share, "
    "last_share"
)
EXPLANATION = "coder, idx, status, text, explainer, program, prompt_hash, examples, detail"
SCORE = (
    "coder, idx, explanation, scorer, metric, control, value, low, high, method, n_total, n_scored, n_failed, floor, "
    "ceiling, n_documents, flags, n_needed"
)
SKIP = "coder, idx, stage, reason, have, need"

Row = Sequence[Any]


def plain(data: Any) -> Any:
    """Return data as JSON can hold it: numpy made plain, numbers that are not finite made None."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, np.ndarray | np.generic):
        return plain(data.tolist())
    if isinstance(data, list | tuple | set | frozenset):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def to_json(data: Any) -> str:
    """Return canonical JSON of data."""
    return canonical_json(plain(data))


def from_json(text: str) -> Any:
    """Return the data of stored JSON. Raises CorruptError when it does not parse."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise CorruptError(f"the results hold JSON that does not parse: {error}") from error


def to_text(text: str) -> str | bytes:
    """Return text as stored: bytes when it is no valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogatepass")
    return text


def from_text(stored: str | bytes) -> str:
    """Return stored text."""
    return stored.decode("utf-8", errors="surrogatepass") if isinstance(stored, bytes) else stored


def number(stored: float | None) -> float:
    """Return a stored number; NULL is NaN."""
    return math.nan if stored is None else float(stored)


def stats_row(stats: LatentStats, selected: bool) -> tuple[Any, ...]:
    """Return the row of a latent's counts, with whether it is among those to interpret."""
    return (
        stats.latent.coder,
        int(stats.latent.index),
        int(stats.count),
        float(stats.rate),
        float(stats.maximum),
        float(stats.mean),
        float(stats.sum_squares),
        float(stats.token_entropy),
        np.ascontiguousarray(stats.histogram, dtype="<i8").tobytes(),
        np.ascontiguousarray(stats.edges, dtype="<f8").tobytes(),
        to_json(stats.top_tokens),
        float(stats.first_share),
        float(stats.last_share),
        int(selected),
    )


def stats_from(row: Row) -> LatentStats:
    """Return a latent's counts from columns ``STATS``; ``histogram`` is int64, ``edges`` float64."""
    return LatentStats(
        latent=LatentId(coder=row[0], index=row[1]),
        count=row[2],
        rate=number(row[3]),
        maximum=number(row[4]),
        mean=number(row[5]),
        sum_squares=number(row[6]),
        token_entropy=number(row[7]),
        histogram=_array(row[8], "<i8"),
        edges=_array(row[9], "<f8"),
        top_tokens=tuple((int(token), int(count)) for token, count in from_json(row[10])),
        first_share=row[11],
        last_share=row[12],
    )


def explanation_row(explanation: Explanation) -> tuple[Any, ...]:
    """Return the row of an explanation, in the order of ``EXPLANATION``."""
    return (
        explanation.latent.coder,
        int(explanation.latent.index),
        explanation.status,
        None if explanation.text is None else to_text(explanation.text),
        to_json(explanation.explainer),
        None if explanation.program is None else to_json(explanation.program),
        explanation.prompt_hash,
        to_json(explanation.examples),
        to_json(explanation.detail),
    )


def explanation_from(row: Row) -> Explanation:
    """Return an explanation from columns ``EXPLANATION``."""
    return Explanation(
        latent=LatentId(coder=row[0], index=row[1]),
        status=row[2],
        text=None if row[3] is None else from_text(row[3]),
        explainer=from_json(row[4]),
        program=None if row[5] is None else from_json(row[5]),
        prompt_hash=row[6],
        examples=tuple((int(r), int(s)) for r, s in from_json(row[7])),
        detail=from_json(row[8]),
    )


def score_row(score: Score, explanation: int | None) -> tuple[Any, ...]:
    """Return the row of a score, in the order of ``SCORE``."""
    return (
        score.latent.coder,
        int(score.latent.index),
        explanation,
        score.scorer,
        score.metric,
        score.control,
        float(score.value),
        float(score.low),
        float(score.high),
        score.method,
        int(score.n_total),
        int(score.n_scored),
        int(score.n_failed),
        float(score.floor),
        float(score.ceiling),
        int(score.n_documents),
        " ".join(score.flags),
        score.n_needed,
    )


def score_from(row: Row) -> Score:
    """Return a score from columns ``SCORE``."""
    return Score(
        latent=LatentId(coder=row[0], index=row[1]),
        explanation=row[2],
        scorer=row[3],
        metric=row[4],
        control=row[5],
        value=number(row[6]),
        low=number(row[7]),
        high=number(row[8]),
        method=row[9],
        n_total=row[10],
        n_scored=row[11],
        n_failed=row[12],
        floor=number(row[13]),
        ceiling=number(row[14]),
        n_documents=row[15],
        flags=tuple(row[16].split()),
        n_needed=row[17],
    )


def skip_row(skipped: Skipped) -> tuple[Any, ...]:
    """Return the row of a skipped latent, in the order of ``SKIP``."""
    latent = skipped.latent
    return (
        latent.coder,
        int(latent.index),
        skipped.stage,
        to_text(skipped.reason),
        int(skipped.have),
        int(skipped.need),
    )


def skip_from(row: Row) -> Skipped:
    """Return a skipped latent from columns ``SKIP``."""
    return Skipped(
        latent=LatentId(coder=row[0], index=row[1]),
        stage=row[2],
        reason=from_text(row[3]),
        have=row[4],
        need=row[5],
    )


def _array(data: bytes, kind: str) -> npt.NDArray[Any]:
    try:
        return np.frombuffer(data, dtype=kind)
    except ValueError as error:
        raise CorruptError(f"the results hold a damaged histogram: {error}") from error
