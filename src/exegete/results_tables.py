"""Whole tables of the results: as columns for pandas and polars, and as canonical rows for comparing two runs."""

from __future__ import annotations

import sqlite3
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from exegete.errors import unknown
from exegete.results_packing import STATUSES, unpack, unpack_columns
from exegete.results_rows import EXPLANATION, SCORE, SKIP, STATS, from_text, number, to_json
from exegete.types import Judgement

Kind = Literal["int", "float", "bool", "text"]
_SAID = tuple(f.name for f in fields(Judgement))

TABLES: dict[str, tuple[tuple[str, str, Kind], ...]] = {
    "latents": (
        ("coder", "coder", "text"),
        ("idx", "idx", "int"),
        ("count", "count", "int"),
        ("rate", "rate", "float"),
        ("maximum", "maximum", "float"),
        ("mean", "mean", "float"),
        ("sum_squares", "sum_squares", "float"),
        ("token_entropy", "token_entropy", "float"),
        ("top_tokens", "top_tokens", "text"),
        ("first_share", "first_share", "float"),
        ("last_share", "last_share", "float"),
        ("selected", "selected", "bool"),
    ),
    "explanations": (
        ("id", "id", "int"),
        ("key", "key", "text"),
        ("coder", "coder", "text"),
        ("idx", "idx", "int"),
        ("status", "status", "text"),
        ("text", "text", "text"),
        ("explainer", "explainer", "text"),
        ("program", "program", "text"),
        ("prompt_hash", "prompt_hash", "text"),
        ("examples", "examples", "text"),
        ("detail", "detail", "text"),
        ("created", "created", "float"),
    ),
    "scores": (
        ("key", "key", "text"),
        ("coder", "coder", "text"),
        ("idx", "idx", "int"),
        ("explanation", "explanation", "int"),
        ("scorer", "scorer", "text"),
        ("metric", "metric", "text"),
        ("control", "control", "text"),
        ("value", "value", "float"),
        ("low", "low", "float"),
        ("high", "high", "float"),
        ("method", "method", "text"),
        ("n_total", "n_total", "int"),
        ("n_scored", "n_scored", "int"),
        ("n_failed", "n_failed", "int"),
        ("floor", "floor", "float"),
        ("ceiling", "ceiling", "float"),
        ("n_documents", "n_documents", "int"),
        ("flags", "flags", "text"),
        ("n_needed", "n_needed", "int"),
    ),
    "skips": (
        ("key", "key", "text"),
        ("coder", "coder", "text"),
        ("idx", "idx", "int"),
        ("stage", "stage", "text"),
        ("reason", "reason", "text"),
        ("have", "have", "int"),
        ("need", "need", "int"),
    ),
    "done": (("key", "key", "text"), ("coder", "coder", "text"), ("idx", "idx", "int")),
    "stages": (("key", "key", "text"), ("stage", "stage", "text"), ("spec", "spec", "text")),
    "meta": (("key", "key", "text"), ("value", "value", "text")),
    "details": (
        ("explanation", "explanation", "int"),
        ("key", "key", "text"),
        ("scorer", "scorer", "text"),
        ("data", "data", "text"),
    ),
}


def columnar(database: sqlite3.Connection, name: str) -> dict[str, Any]:
    """Return a whole table as columns, or one row per judgement. Raises NotFoundError on an unknown name."""
    if name == "judgements":
        return _judgements(database)
    if name not in TABLES:
        raise unknown("table", name, [*TABLES, "judgements"])
    columns = TABLES[name]
    wanted = ", ".join(column for _, column, _ in columns)
    order = ", ".join(column for out, column, _ in columns if out in ("coder", "idx", "id", "key"))
    rows = database.execute(f"SELECT {wanted} FROM {name} ORDER BY {order}").fetchall()
    return {out: _column([row[i] for row in rows], kind) for i, (out, _, kind) in enumerate(columns)}


def canonical_rows(database: sqlite3.Connection) -> list[str]:
    """Return all rows but meta's as sorted JSON lines, with explanations named by stage and latent, not by id."""
    owner = {row[0]: list(row[1:]) for row in database.execute("SELECT id, key, coder, idx FROM explanations")}
    lines: list[str] = []
    for name, columns in (
        ("latents", f"{STATS}, selected"),
        ("explanations", f"key, {EXPLANATION}"),
        ("scores", f"key, {SCORE}"),
        ("skips", f"key, {SKIP}"),
        ("done", "key, coder, idx"),
        ("stages", "key, stage, spec"),
    ):
        place = columns.split(", ").index("explanation") if name == "scores" else None
        for row in database.execute(f"SELECT {columns} FROM {name}"):
            values = [value.hex() if isinstance(value, bytes) else value for value in row]
            if place is not None:
                values[place] = owner.get(values[place])
            lines.append(to_json([name, *values]))
    for explanation, key, scorer, data in database.execute("SELECT explanation, key, scorer, data FROM details"):
        lines.append(to_json(["details", owner[explanation], key, scorer, data]))
    sql = "SELECT explanation, key, scorer, control, packed FROM judgements"
    for explanation, key, scorer, control, packed in database.execute(sql):
        verdicts = [[getattr(j, name) for name in _SAID] for j in unpack(packed)]
        lines.append(to_json(["judgements", owner[explanation], key, scorer, control, verdicts]))
    return sorted(lines)


def _judgements(database: sqlite3.Connection) -> dict[str, Any]:
    texts: dict[str, list[Any]] = {name: [] for name in ("coder", "scorer", "control", "stratum", "status")}
    numbers: dict[str, list[npt.NDArray[Any]]] = {
        name: []
        for name in (
            "idx",
            "explanation",
            "row",
            "start",
            "document",
            "truth",
            "prediction",
            "probability",
            "value",
            "activation",
            "inclusion",
            "multiplicity",
        )
    }
    sql = (
        "SELECT e.coder, e.idx, e.id, j.scorer, j.control, j.packed FROM judgements j "
        "JOIN explanations e ON e.id = j.explanation ORDER BY e.coder, e.idx, e.id, j.scorer, j.control, j.key"
    )
    for coder, index, explanation, scorer, control, packed in database.execute(sql):
        columns = unpack_columns(packed)
        n = len(columns)
        for name, value in (("coder", coder), ("scorer", scorer), ("control", control)):
            texts[name].extend([value] * n)
        texts["stratum"].extend(columns.strata[s] for s in columns.stratum.tolist())
        texts["status"].extend(STATUSES[s] for s in columns.status.tolist())
        numbers["idx"].append(np.full(n, index, dtype=np.int64))
        numbers["explanation"].append(np.full(n, explanation, dtype=np.int64))
        numbers["row"].append(columns.row)
        numbers["start"].append(columns.start)
        numbers["document"].append(columns.document)
        numbers["truth"].append(columns.truth)
        numbers["prediction"].append(columns.prediction)
        numbers["probability"].append(columns.probability)
        numbers["value"].append(columns.value)
        numbers["activation"].append(columns.activation)
        numbers["inclusion"].append(columns.inclusion)
        numbers["multiplicity"].append(columns.multiplicity)
    joined = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in numbers.items()}
    return {
        "coder": texts["coder"],
        "idx": joined["idx"],
        "explanation": joined["explanation"],
        "scorer": texts["scorer"],
        "control": texts["control"],
        "row": joined["row"],
        "start": joined["start"],
        "document": joined["document"],
        "stratum": texts["stratum"],
        "truth": joined["truth"],
        "prediction": joined["prediction"],
        "probability": joined["probability"],
        "value": joined["value"],
        "status": texts["status"],
        "activation": joined["activation"],
        "inclusion_probability": joined["inclusion"],
        "multiplicity": joined["multiplicity"],
    }


def _column(values: list[Any], kind: Kind) -> Any:
    if kind == "text":
        return [None if v is None else from_text(v) for v in values]
    if kind == "float":
        return np.array([number(v) for v in values], dtype=np.float64)
    return np.array([-1 if v is None else v for v in values], dtype=np.int64 if kind == "int" else bool)
