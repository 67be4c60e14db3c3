"""Judgements as compact bytes, one blob per (explanation, scorer, control).

Layout, version 2: the magic ``EXJ``, a version byte, then zlib over a payload of little-endian columns::

    uint32 n · uint16 number of strata · uint8 has probabilities · uint8 has values · strata as (uint16 length, UTF-8)
    int64 row [n] · int32 start [n] · int32 document [n] · uint16 stratum [n] · uint8 verdict [n]
    float32 activation [n] · float64 inclusion probability [n] · int32 multiplicity [n]
    float64 P(yes) [n] · float64 value [n]

The verdict byte holds truth in bit 0, prediction in bits 1-2 (0 none, 1 no, 2 yes) and the status from bit 3 on.
A probability or value of NaN stands for none; their columns are left out when there is none at all. Version 1, which
had neither values nor the three columns before them, is read too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final, get_args

import numpy as np
import numpy.typing as npt

from exegete.errors import CorruptError
from exegete.types import Judgement, JudgementStatus

MAGIC = b"EXJ"
VERSION = 2
STATUSES: tuple[JudgementStatus, ...] = get_args(JudgementStatus)
_OLD_COLUMNS = (("row", "<i8"), ("start", "<i4"), ("document", "<i4"), ("stratum", "<u2"), ("verdict", "u1"))
_COLUMNS = (*_OLD_COLUMNS, ("activation", "<f4"), ("inclusion", "<f8"), ("multiplicity", "<i4"))
_OLD_HEADER, _HEADER = struct.Struct("<IHB"), struct.Struct("<IHBB")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class JudgementColumns:
    """The judgements of one blob as arrays [n].

    ``stratum`` indexes into ``strata``; ``prediction`` is −1 for none, ``probability`` and ``value`` NaN.
    """

    row: npt.NDArray[np.int64]
    start: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]
    stratum: npt.NDArray[np.uint16]
    strata: tuple[str, ...]
    truth: npt.NDArray[np.bool_]
    prediction: npt.NDArray[np.int8]
    status: npt.NDArray[np.uint8]
    probability: npt.NDArray[np.float64]
    value: npt.NDArray[np.float64]
    activation: npt.NDArray[np.float32]
    inclusion: npt.NDArray[np.float64]
    multiplicity: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)


def pack(judgements: Sequence[Judgement]) -> bytes:
    """Return judgements as bytes, in the order given."""
    strata = sorted({j.stratum for j in judgements})
    place = {name: number for number, name in enumerate(strata)}
    values: dict[str, list[Any]] = {
        "row": [j.row for j in judgements],
        "start": [j.start for j in judgements],
        "document": [j.document for j in judgements],
        "stratum": [place[j.stratum] for j in judgements],
        "verdict": [_verdict(j) for j in judgements],
        "activation": [j.activation for j in judgements],
        "inclusion": [j.inclusion_probability for j in judgements],
        "multiplicity": [j.multiplicity for j in judgements],
    }
    numbers = ([j.probability for j in judgements], [j.value for j in judgements])
    present = [any(number is not None for number in column) for column in numbers]
    parts = [_HEADER.pack(len(judgements), len(strata), *present)]
    for name in strata:
        data = name.encode("utf-8", errors="surrogatepass")
        parts.append(struct.pack("<H", len(data)) + data)
    parts.extend(np.asarray(values[name], dtype=kind).tobytes() for name, kind in _COLUMNS)
    for column, there in zip(numbers, present, strict=True):
        if there:
            parts.append(np.array([np.nan if x is None else x for x in column], dtype="<f8").tobytes())
    return MAGIC + bytes([VERSION]) + zlib.compress(b"".join(parts), 6)


def unpack_columns(data: bytes) -> JudgementColumns:
    """Return packed judgements as arrays. Raises CorruptError when the bytes are not what ``pack`` wrote."""
    if data[:3] != MAGIC or len(data) < 4:
        raise CorruptError("a judgement blob does not start as it should")
    if data[3] not in (1, VERSION):
        raise CorruptError(f"a judgement blob has version {data[3]}; this exegete reads up to {VERSION}")
    try:
        return _unpack(zlib.decompress(data[4:]), old=data[3] == 1)
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
        columns.value.tolist(),
        columns.activation.tolist(),
        columns.inclusion.tolist(),
        columns.multiplicity.tolist(),
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
            value=None if value != value else value,
            status=STATUSES[status],
            activation=activation,
            inclusion_probability=inclusion,
            multiplicity=multiplicity,
        )
        for (
            row,
            start,
            document,
            stratum,
            truth,
            prediction,
            status,
            probability,
            value,
            activation,
            inclusion,
            multiplicity,
        ) in table
    )


def _verdict(judgement: Judgement) -> int:
    prediction = 0 if judgement.prediction is None else 1 + int(judgement.prediction)
    return int(judgement.truth) | prediction << 1 | STATUSES.index(judgement.status) << 3


def _unpack(payload: bytes, *, old: bool) -> JudgementColumns:
    header = _OLD_HEADER if old else _HEADER
    n, n_strata, *present = header.unpack_from(payload)
    at = header.size
    strata: list[str] = []
    for _ in range(n_strata):
        (size,) = struct.unpack_from("<H", payload, at)
        strata.append(payload[at + 2 : at + 2 + size].decode("utf-8", errors="surrogatepass"))
        at += 2 + size
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    extra = [(name, "<f8") for name, there in zip(("probability", "value"), present, strict=False) if there]
    for name, kind in (*(_OLD_COLUMNS if old else _COLUMNS), *extra):
        arrays[name] = np.frombuffer(payload, dtype=kind, count=n, offset=at)
        at += arrays[name].nbytes
    if at != len(payload):
        raise ValueError(f"{len(payload) - at} bytes too many")
    verdict = arrays["verdict"].astype(np.uint8)
    status = (verdict >> 3).astype(np.uint8)
    stratum = arrays["stratum"].astype(np.uint16)
    if n and (int(status.max()) >= len(STATUSES) or int(stratum.max()) >= n_strata):
        raise ValueError("a code is out of range")
    none = {"probability": np.nan, "value": np.nan, "activation": 0.0, "inclusion": 1.0, "multiplicity": 1}
    filled = {name: arrays.get(name, np.full(n, fill)) for name, fill in none.items()}
    return JudgementColumns(
        row=arrays["row"].astype(np.int64),
        start=arrays["start"].astype(np.int32),
        document=arrays["document"].astype(np.int32),
        stratum=stratum,
        strata=tuple(strata),
        truth=(verdict & 1).astype(bool),
        prediction=((verdict >> 1) & 3).astype(np.int8) - np.int8(1),
        status=status,
        probability=filled["probability"].astype(np.float64),
        value=filled["value"].astype(np.float64),
        activation=filled["activation"].astype(np.float32),
        inclusion=filled["inclusion"].astype(np.float64),
        multiplicity=filled["multiplicity"].astype(np.int64),
    )
