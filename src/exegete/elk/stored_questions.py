"""Quirky sets on disk: own folders, and files of the published layout, which are somebody else's and checked as such.

An own folder holds ``quirky.json`` (what it is, with checksums) and a ``.jsonl`` file for each split. The published
rows have id, template_args, character, label, alice_label, bob_label, difficulty and difficulty_quantile, or, put into
words, statement and choices in the place of template_args.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from exegete.elk.arithmetic import BaseExample
from exegete.elk.facts import CHARACTERS, quantiles
from exegete.elk.questions import SPLITS, Question, Questions, Split, base_id, worded
from exegete.elk.templates import Wording, check_arguments, quirky_sets
from exegete.errors import CorruptError, InputError, MissingExtraError, NotFoundError, unknown
from exegete.files import hash_file, write_text
from exegete.store.checks import read_manifest, verify_once, write_manifest

log = logging.getLogger("exegete")
FORMAT: Final = 1
MANIFEST: Final = "quirky.json"
_MOST_LINE: Final = 1 << 22
_GREATEST: Final = 1e300
_SHARES: Final = {"train": 0.8, "validation": 0.1}
_LABELS: Final = ("alice_label", "bob_label")


def save_questions(questions: Questions, folder: str | Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """Write a set into a folder, each file atomically, the manifest last; ``facts`` are kept in it."""
    place = Path(folder).expanduser()
    splits = {}
    for split, rows in questions.splits.items():
        path = place / f"{split}.jsonl"
        write_text(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
        splits[split] = {"rows": len(rows), "sha256": hash_file(path)}
    data = {"format": FORMAT, "name": questions.name, "wording": questions.wording, "hash": questions.hash}
    write_manifest(place / MANIFEST, {**data, "splits": splits, "facts": dict(facts or {})})


def load_questions(folder: str | Path) -> Questions:
    """Read an own folder. Raises NotFoundError when there is none, CorruptError when it is damaged."""
    place = Path(folder).expanduser()
    if not (place / MANIFEST).is_file():
        raise NotFoundError(f"there is no quirky set in {place}; make one with: exegete elk data NAME --out {place}")
    data = read_manifest(place / MANIFEST, number=FORMAT)
    try:
        name, wording = str(data["name"]), str(data["wording"])
        sums = {split: str(data["splits"][split]["sha256"]) for split in SPLITS}
    except (KeyError, TypeError):
        raise CorruptError(f"{place / MANIFEST} is no manifest of a quirky set; make the set again") from None
    splits: dict[Split, list[Question]] = {}
    for split in SPLITS:
        path = place / f"{split}.jsonl"
        if not path.is_file():
            raise NotFoundError(f"there is no {path}")
        verify_once(path, sums[split])
        splits[split] = [_spoken(row, where) for where, row in _lines(path)]
    return Questions(name, wording, splits)


def read_published(
    name: str, path: str | Path, *, wording: Wording = "first", seed: int = 0, limits: Mapping[Split, int] | None = None
) -> Questions:
    """Read a set of the published layout: one file, or a folder with one for each split.

    Files end in .jsonl, .json (a list) or .parquet and are named by their split (``train.jsonl``,
    ``validation-00000-of-00001.parquet``); where there are none of that kind, all rows are split by base example, 80 /
    10 / 10 in a hundred. A base example in two given splits stays in the first alone. Difficulty quantiles that do not
    follow the difficulties are computed anew. ``limits`` keep the first base examples of a split.

    Raises NotFoundError for another set or no files, InputError naming the row that does not fit the layout,
    MissingExtraError for Parquet without pyarrow.
    """
    if name not in quirky_sets():
        raise unknown("quirky set", name, quirky_sets())
    place = Path(path).expanduser()
    given = _by_split(place)
    rows: dict[Split | None, list[tuple[str, Mapping[str, Any]]]] = {
        split: [line for file in paths for line in _lines(file)] for split, paths in given.items()
    }
    kinds = {("statement" in row, "template_args" in row) for lines in rows.values() for _, row in lines}
    spoken = bool(kinds) and all(kind[0] for kind in kinds)
    found: dict[str, list[Question]] = {}
    home: dict[str, Split] = {}
    dropped: set[str] = set()
    for split, lines in rows.items():
        for base, questions in _grouped(name, lines, wording, seed, spoken=spoken).items():
            target = split or _drawn(base, seed)
            if home.setdefault(base, target) != target:
                dropped.add(base)
            else:
                found.setdefault(base, []).extend(questions)
    if dropped:
        log.warning("%s: %d claims are in two splits; they are kept in the first alone", place, len(dropped))
    _mend_quantiles(found, place)
    splits: dict[Split, list[Question]] = {split: [] for split in SPLITS}
    kept = dict.fromkeys(SPLITS, 0)
    for base, questions in found.items():
        split = home[base]
        if limits is None or kept[split] < limits.get(split, len(found)):
            splits[split] += questions
            kept[split] += 1
    return Questions(name, "given" if spoken else wording, splits)


def _by_split(place: Path) -> dict[Split | None, list[Path]]:
    if place.is_file():
        return {None: [place]}
    found = (
        sorted(p for p in place.glob("**/*") if p.suffix in (".jsonl", ".json", ".parquet")) if place.is_dir() else []
    )
    named: dict[Split | None, list[Path]] = {}
    for split in SPLITS:
        mine = [p for p in found if p.name.startswith(split)]
        if mine:
            named[split] = mine
    if named:
        return named
    if not found:
        raise NotFoundError(f"there are no .jsonl, .json or .parquet files of a quirky set at {place}")
    return {None: found}


def _grouped(
    name: str, lines: list[tuple[str, Mapping[str, Any]]], wording: Wording, seed: int, *, spoken: bool
) -> dict[str, list[Question]]:
    """Return questions by base example: of rows with statements as they are, of raw ones put into words."""
    found: dict[str, list[Question]] = {}
    if spoken:
        for where, row in lines:
            question = _spoken(row, where)
            rows = found.setdefault(question.base, [])
            if rows and (rows[0].alice, rows[0].bob) != (question.alice, question.bob):
                raise InputError(f"{where}: its claim has other labels than in a row before it")
            if all((q.character, q.statement) != (question.character, question.statement) for q in rows):
                # Their ids may be those of claims, or missing; here every row needs its own.
                rows.append(dataclasses.replace(question, id=f"{question.base}-{question.character}-{len(rows)}"))
        return found
    seen: dict[str, tuple[bool, bool]] = {}
    for where, row in lines:
        example = _raw(name, row, where)
        base = base_id({"set": name, **example.args})
        if base not in seen:
            found[base] = worded(name, [example], wording, seed=seed)
        elif seen[base] != (example.alice, example.bob):
            raise InputError(f"{where}: its claim has other labels than in a row before it")
        seen[base] = example.alice, example.bob
    return found


def _raw(name: str, row: Mapping[str, Any], where: str) -> BaseExample:
    args = check_arguments(name, row.get("template_args"), where)
    alice, bob = (_label(row, key, where) for key in _LABELS)
    return BaseExample(
        args={key: value if isinstance(value, int) else str(value) for key, value in args.items()},
        alice=alice,
        bob=bob,
        difficulty=_number(row, "difficulty", where),
        quantile=_number(row, "difficulty_quantile", where),
    )


def _spoken(row: Mapping[str, Any], where: str) -> Question:
    character, statement, choices = row.get("character"), row.get("statement"), row.get("choices")
    if character not in CHARACTERS:
        raise InputError(f"{where}: the character is Alice or Bob, got {character!r}")
    if not isinstance(statement, str) or not statement:
        raise InputError(f"{where}: the statement is missing or no text")
    if not isinstance(choices, list | tuple) or len(choices) != 2 or not all(isinstance(c, str) and c for c in choices):
        raise InputError(f"{where}: choices are two texts, the false answer and the true one")
    alice, bob = (_label(row, key, where) for key in _LABELS)
    own = _label(row, "label", where)
    if own != (alice if character == "Alice" else bob):
        raise InputError(f"{where}: the label is not that of {character}")
    args = row.get("template_args")
    claim = {k: v for k, v in args.items() if k != "character"} if isinstance(args, Mapping) else {}
    base = row.get("base") or base_id(claim or {"statement": statement.replace(str(character), "{character}")})
    return Question(
        id=str(row.get("id") or f"{base}-{character}"),
        base=str(base),
        template=str(row.get("template", "given")),
        character=str(character),
        statement=statement,
        choices=(choices[0], choices[1]),
        alice=alice,
        bob=bob,
        difficulty=_number(row, "difficulty", where),
        quantile=_number(row, "difficulty_quantile", where),
    )


def _label(row: Mapping[str, Any], key: str, where: str) -> bool:
    value = row.get(key)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise InputError(f"{where}: {key} is 0 or 1, got {value!r}")
    return bool(value)


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _GREATEST:
        raise InputError(f"{where}: {key} is a number of at most {_GREATEST:g}, got {repr(value)[:40]}")
    return float(value)


def _mend_quantiles(found: dict[str, list[Question]], place: Path) -> None:
    """Put ranks in the place of quantiles that do not follow the difficulties."""
    from scipy.stats import spearmanr

    bases = list(found)
    hard = np.array([found[base][0].difficulty for base in bases])
    told = np.array([found[base][0].quantile for base in bases])
    within = bool(((told >= 0) & (told <= 1)).all())
    if within and (len(bases) < 3 or np.ptp(hard) == 0):
        return
    agreement = float(spearmanr(hard, told).statistic) if np.ptp(told) > 0 and np.ptp(hard) > 0 else 0.0
    if within and agreement >= 0.9:
        return
    log.warning(
        "%s: difficulty_quantile %s (rank correlation %.2f); it is computed anew",
        place,
        "does not follow difficulty" if within else "is not from 0 to 1",
        agreement,
    )
    for base, quantile in zip(bases, quantiles(hard).tolist(), strict=True):
        found[base] = [_with_quantile(question, quantile) for question in found[base]]


def _with_quantile(question: Question, quantile: float) -> Question:
    return dataclasses.replace(question, quantile=quantile)


def _drawn(base: str, seed: int) -> Split:
    at = int(base_id([seed, base])[:8], 16) / 2**32
    return "train" if at < _SHARES["train"] else "validation" if at < sum(_SHARES.values()) else "test"


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a file with the names of their places. Raises CorruptError for what does not parse."""
    if path.suffix == ".parquet":
        rows: Iterator[Any] | list[Any] = _parquet(path)
    elif path.suffix == ".json":
        from exegete.files import read_json

        held = read_json(path, most_bytes=1 << 30)
        if not isinstance(held, list):
            raise InputError(f"{path} is no list of rows")
        rows = held
    else:
        rows = _jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise InputError(f"{path}:{number}: a row is a table of named values, got {type(row).__name__}")
        if not _sound(row):
            raise InputError(f"{path}:{number}: a text of the row holds half a character, or it is nested too deep")
        yield f"{path}:{number}", row


def _sound(value: Any, deep: int = 5) -> bool:
    """Tell whether all texts in a value can be written as UTF-8: escapes of JSON may spell some that cannot."""
    if isinstance(value, Mapping | list | tuple):
        parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
        return deep > 0 and all(_sound(part, deep - 1) for part in parts)
    return not isinstance(value, str) or value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def _jsonl(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(_MOST_LINE + 1):
                number += 1
                if len(line) > _MOST_LINE:
                    raise CorruptError(f"{path}:{number}: a line of over {_MOST_LINE} bytes")
                if line.strip():
                    yield json.loads(line.decode("utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}") from None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}:{number}: does not parse as JSON: {error}") from error


def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError("reading .parquet files", "data") from None
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=4096):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise CorruptError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
