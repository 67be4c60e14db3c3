"""Judgements as compact bytes, one blob per (explanation, scorer, control).

Layout, version 1: the magic ``EXJ``, a version byte, then zlib over a payload of little-endian columns::

    uint32 n · uint16 number of strata · uint8 has probabilities · strata as (uint16 length, UTF-8)
    int64 row [n] · int32 start [n] · int32 document [n] · uint16 stratum [n] · uint8 verdict [n] · float64 P(yes) [n]

The verdict byte holds truth in bit 0, prediction in bits 1-2 (0 none, 1 no, 2 yes) and the status from bit 3 on.
A probability of NaN stands for none; the column is left out when there is none at all.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final, get_args

import numpy as np
import numpy.typing as npt

from exegete.errors import CorruptError
from exegete.types import Judgement, JudgementStatus

MAGIC = b"EXJ"
VERSION = 1
STATUSES: tuple[JudgementStatus, ...] = get_args(JudgementStatus)
_COLUMNS = (("row", "<i8"), ("start", "<i4"), ("document", "<i4"), ("stratum", "<u2"), ("verdict", "u1"))
_HEADER = struct.Struct("<IHB")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class JudgementColumns:
    """The judgements of one blob as arrays [n]; ``stratum`` indexes into ``strata``; ``prediction`` is −1 for none."""

    row: npt.NDArray[np.int64]
    start: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]
    stratum: npt.NDArray[np.uint16]
    strata: tuple[str, ...]
    truth: npt.NDArray[np.bool_]
    prediction: npt.NDArray[np.int8]
    status: npt.NDArray[np.uint8]
    probability: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.row)


def pack(judgements: Sequence[Judgement]) -> bytes:
    """Return judgements as bytes, in the order given."""
    strata = sorted({j.stratum for j in judgements})
    place = {name: number for number, name in enumerate(strata)}
    values: dict[str, list[int]] = {
        "row": [j.row for j in judgements],
        "start": [j.start for j in judgements],
        "document": [j.document for j in judgements],
        "stratum": [place[j.stratum] for j in judgements],
        "verdict": [_verdict(j) for j in judgements],
    }
    has_probability = any(j.probability is not None for j in judgements)
    parts = [_HEADER.pack(len(judgements), len(strata), has_probability)]
    for name in strata:
        data = name.encode("utf-8", errors="surrogatepass")
        parts.append(struct.pack("<H", len(data)) + data)
    parts.extend(np.asarray(values[name], dtype=kind).tobytes() for name, kind in _COLUMNS)
    if has_probability:
        known = [np.nan if j.probability is None else j.probability for j in judgements]
        parts.append(np.asarray(known, dtype="<f8").tobytes())
    return MAGIC + bytes([VERSION]) + zlib.compress(b"".join(parts), 6)


def unpack_columns(data: bytes) -> JudgementColumns:
    """Return packed judgements as arrays. Raises CorruptError when the bytes are not what ``pack`` wrote."""
    if data[:3] != MAGIC or len(data) < 4:
        raise CorruptError("a judgement blob does not start as it should")
    if data[3] != VERSION:
        raise CorruptError(f"a judgement blob has version {data[3]}; this exegete reads {VERSION}")
    try:
        return _unpack(zlib.decompress(data[4:]))
    except (zlib.error, struct.error, ValueError, IndexError) as error:
        raise CorruptError(f"a judgement blob is damaged: {error}") from error


def unpack(data: bytes) -> tuple[Judgement, ...]:
    """Return packed judgements, in the order they were packed. Raises CorruptError on damage."""
    columns = unpack_columns(data)
    table = zip(
        columns.row.tolist(),
        columns.start.tolist(),
        columns.document.tolist(),
        columns.stratum.tolist(),
        columns.truth.tolist(),
        columns.prediction.tolist(),
        columns.status.tolist(),
        columns.probability.tolist(),
        strict=True,
    )
    return tuple(
        Judgement(
            row=row,
            start=start,
            document=document,
            stratum=columns.strata[stratum],
            truth=truth,
            prediction=None if prediction < 0 else bool(prediction),
            probability=None if probability != probability else probability,
            status=STATUSES[status],
        )
        for row, start, document, stratum, truth, prediction, status, probability in table
    )


def _verdict(judgement: Judgement) -> int:
    prediction = 0 if judgement.prediction is None else 1 + int(judgement.prediction)
    return int(judgement.truth) | prediction << 1 | STATUSES.index(judgement.status) << 3


def _unpack(payload: bytes) -> JudgementColumns:
    n, n_strata, has_probability = _HEADER.unpack_from(payload)
    at = _HEADER.size
    strata: list[str] = []
    for _ in range(n_strata):
        (size,) = struct.unpack_from("<H", payload, at)
        strata.append(payload[at + 2 : at + 2 + size].decode("utf-8", errors="surrogatepass"))
        at += 2 + size
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name, kind in (*_COLUMNS, *((("probability", "<f8"),) if has_probability else ())):
        arrays[name] = np.frombuffer(payload, dtype=kind, count=n, offset=at)
        at += arrays[name].nbytes
    if at != len(payload):
        raise ValueError(f"{len(payload) - at} bytes too many")
    verdict = arrays["verdict"].astype(np.uint8)
    status = (verdict >> 3).astype(np.uint8)
    stratum = arrays["stratum"].astype(np.uint16)
    if n and (int(status.max()) >= len(STATUSES) or int(stratum.max()) >= n_strata):
        raise ValueError("a code is out of range")
    probability = arrays["probability"].astype(np.float64) if has_probability else np.full(n, np.nan)
    return JudgementColumns(
        row=arrays["row"].astype(np.int64),
        start=arrays["start"].astype(np.int32),
        document=arrays["document"].astype(np.int32),
        stratum=stratum,
        strata=tuple(strata),
        truth=(verdict & 1).astype(bool),
        prediction=((verdict >> 1) & 3).astype(np.int8) - np.int8(1),
        status=status,
        probability=probability,
    )
