"""Boundary types as JSON and back, exactly: what crosses between parts can be saved, sent and read again.

Arrays become their dtype, shape and base64 bytes; a NaN becomes null in a field of floats. Nothing but the types named
in ``exegete.types`` and their plain parts is ever built, whatever the data says.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from exegete.errors import CorruptError, InputError
from exegete.tokens import TokenTable

T = TypeVar("T")
_ARRAY = "__array__"
_DTYPES = {"bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32"}


def to_json(value: Any) -> Any:
    """Return plain data (mappings, lists, numbers, text, None) that ``from_json`` turns back into an equal object.

    Raises InputError for anything that is no boundary type or part of one.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        encoded = base64.b64encode(data.astype(data.dtype.newbyteorder("<")).tobytes()).decode()
        return {_ARRAY: data.dtype.name, "shape": list(data.shape), "data": encoded}
    if isinstance(value, TokenTable):
        return {"pieces": value.to_json()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [to_json(item) for item in value]
    raise InputError(f"{type(value).__name__} is no boundary type; see exegete.types")


def from_json(kind: type[T], data: Any) -> T:
    """Build an object of a boundary type from what ``to_json`` gave.

    Raises CorruptError naming the field when the data does not fit, InputError when the object refuses its contents.
    """
    return typing.cast(T, _read(kind, data, kind.__name__))


def _read(hint: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if data is None else _read(options[0], data, where)
    if origin is Literal:
        return _expect(data in typing.get_args(hint), data, where)
    if isinstance(data, Mapping) and _ARRAY in data:
        return _array(data, where)
    if hint is TokenTable:
        return TokenTable.from_json(str(_member(data, "pieces", where)))
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type[Any], hint), data, where)
    if origin is tuple:
        return _tuple(typing.get_args(hint), data, where)
    if hint is float:
        number = math.nan if data is None else _expect(isinstance(data, int | float), data, where)
        return float(number)
    if hint in (int, str, bool):
        return _expect(type(data) is hint, data, where)
    return data


def _object(kind: type[Any], data: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    _expect(isinstance(data, Mapping) and set(data) == names, data, where)
    return kind(**{name: _read(hints[name], data[name], f"{where}.{name}") for name in names})


def _tuple(inner: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    items = _expect(isinstance(data, list), data, where)
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_read(inner[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    _expect(len(items) == len(inner), data, where)
    return tuple(_read(kind, item, where) for kind, item in zip(inner, items, strict=True))


def _array(data: Mapping[str, Any], where: str) -> np.ndarray[Any, Any]:
    name = data[_ARRAY]
    _expect(name in _DTYPES | {"float64"}, name, where)
    try:
        raw = base64.b64decode(str(data["data"]), validate=True)
        flat = np.frombuffer(raw, dtype=np.dtype(name).newbyteorder("<")).astype(name)
        return flat.reshape([int(n) for n in data["shape"]])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{where} is no array: {error}") from error


def _member(data: Any, name: str, where: str) -> Any:
    _expect(isinstance(data, Mapping) and name in data, data, where)
    return data[name]


def _expect(holds: bool, data: Any, where: str) -> Any:
    if not holds:
        shown = repr(data)
        raise CorruptError(f"{where} does not fit: got {shown if len(shown) < 80 else shown[:77] + '…'}")
    return data
