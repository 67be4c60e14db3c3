"""A/B behaviour files: questions with two options, of which one shows a behaviour, and what is done to them.

The published format is a list of ``question``, ``answer_matching_behavior``, ``answer_not_matching_behavior`` (Rimsky
et al. 2023, arXiv 2312.06681; used on recurrent models by arXiv 2404.05971). The question ends with both options, each
after its label in brackets; the answers are those labels, in some files with a space before them. Open-ended sets hold
``question`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

from exegete.errors import InputError, NotFoundError, unknown
from exegete.files import read_json
from exegete.streams import stream

MATCH, OTHER = "answer_matching_behavior", "answer_not_matching_behavior"
Balance = Literal["none", "swap", "both"]
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABEL = re.compile(r"\(([A-Z])\)")
_LARGEST = 1 << 28
_GENERATE, _TEST, _OPEN = "generate_dataset.json", "test_dataset_ab.json", "test_dataset_open_ended.json"
_OPTION = re.compile(r"^([ \t]*\((\w+)\))", re.MULTILINE)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question with two labelled options: ``match`` is the label of the one that shows the behaviour."""

    question: str
    match: str
    other: str

    @property
    def labels(self) -> tuple[str, str]:
        """Both labels, sorted: first A or 1, then B or 2; 2 is before 10."""
        first, second = sorted((self.match, self.other), key=_natural)
        return first, second


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """The sets of one behaviour: rows to make vectors of, rows to test on, and open questions, where there are any."""

    name: str
    generate: tuple[Row, ...]
    test: tuple[Row, ...]
    open_ended: tuple[str, ...]


def load_rows(path: str | Path) -> tuple[Row, ...]:
    """Read an A/B file, a list of objects with the three keys.

    Raises NotFoundError when it is not there, CorruptError when it does not parse, InputError that names the row
    (counted from 1) which is not in the format: a key is missing, an answer is no label such as (A), both answers are
    the same, or the question lacks one of the two labels.
    """
    return tuple(_row(entry, f"{path}, row {i}") for i, entry in enumerate(_entries(path), start=1))


def load_questions(path: str | Path) -> tuple[str, ...]:
    """Read an open-ended file, a list of objects with ``question``. Raises as ``load_rows``."""
    found = []
    for i, entry in enumerate(_entries(path), start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("question"), str) or not entry["question"].strip():
            raise InputError(f"{path}, row {i}: a row of an open-ended file is an object with a question")
        found.append(entry["question"])
    return tuple(found)


def load_behaviour(folder: str | Path, name: str) -> Behaviour:
    """Read all sets of one behaviour from a folder laid out as the published one.

    That is ``generate/NAME/generate_dataset.json``, ``test/NAME/test_dataset_ab.json`` and
    ``test/NAME/test_dataset_open_ended.json``; a set that is not there is empty.

    Raises NotFoundError for a behaviour without files, else as ``load_rows``.
    """
    root = Path(folder).expanduser()
    known = behaviours(root)
    if name not in known:
        raise unknown("behaviour", name, known)
    files = (root / "generate" / name / _GENERATE, root / "test" / name / _TEST, root / "test" / name / _OPEN)
    return Behaviour(
        name=name,
        generate=load_rows(files[0]) if files[0].is_file() else (),
        test=load_rows(files[1]) if files[1].is_file() else (),
        open_ended=load_questions(files[2]) if files[2].is_file() else (),
    )


def behaviours(folder: str | Path) -> tuple[str, ...]:
    """Return the names of the behaviours in a folder laid out as ``load_behaviour`` says, sorted.

    Raises NotFoundError when there is no such folder or it is laid out otherwise.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise NotFoundError(f"there is no folder {str(folder)!r}")
    found = {p.parent.name for p in (*root.glob(f"generate/*/{_GENERATE}"), *root.glob(f"test/*/{_TEST}"))}
    if not found:
        raise NotFoundError(
            f"{folder} holds no behaviours; expected generate/NAME/{_GENERATE} and test/NAME/{_TEST} in it"
        )
    return tuple(sorted(found))


def swapped(row: Row) -> Row:
    """Return the row with the texts of its two options exchanged, so that the other letter shows the behaviour.

    Further options stay as they are. Raises InputError where the two options do not each begin a line.
    """
    found = {
        place[2]: place for place in _OPTION.finditer(row.question)
    }  # the last of each label: options end a question
    if not {row.match, row.other} <= found.keys():
        raise InputError(
            f"only options that each begin a line can be swapped; the question ends in {row.question[-60:]!r}"
        )
    starts = sorted(place.start() for place in found.values())
    texts = {}
    for label in (row.match, row.other):
        end = min((start for start in starts if start > found[label].start()), default=len(row.question))
        texts[label] = row.question[found[label].end() : end].rstrip("\n")
    first, second = sorted((row.match, row.other), key=lambda label: found[label].start())
    question = row.question
    for label, text in ((second, texts[first]), (first, texts[second])):  # from the end, so that places stay true
        at = found[label].end()
        question = question[:at] + text + question[at + len(texts[label]) :]
    return Row(question=question, match=row.other, other=row.match)


def balanced(rows: Sequence[Row], how: Balance = "swap", *, seed: int = 0) -> tuple[Row, ...]:
    """Return rows of which as many match with the first label as with the second, say with A as with B.

    Without that a leaning to a letter passes for the behaviour.

    Args:
        rows: Questions with two labelled options.
        how: ``swap`` swaps the options of some rows of the commoner letter, drawn by the seed (an odd number of rows
            stays out of balance by one); ``both`` gives every row in both orders; ``none`` changes nothing.
        seed: Which rows are swapped.

    Raises:
        InputError: For another way, and for a row that cannot be swapped, by its number.
    """
    if how == "none":
        return tuple(rows)
    if how == "both":
        return tuple(version for i, row in enumerate(rows, start=1) for version in (row, _swapped(row, i)))
    if how != "swap":
        raise InputError(f"letters are balanced by none, swap or both, got {how!r}")
    places = [[i for i, row in enumerate(rows) if row.labels[which] == row.match] for which in (0, 1)]
    common, rare = sorted((0, 1), key=lambda which: -len(places[which]))
    n = (len(places[common]) - len(places[rare])) // 2
    draw = stream(seed, "steering", "balance")
    chosen = set(draw.choice(places[common], size=n, replace=False).tolist()) if n else set()
    return tuple(_swapped(row, i + 1) if i in chosen else row for i, row in enumerate(rows))


def relabelled(rows: Sequence[Row], labels: Sequence[str] = tuple("123456789")) -> tuple[Row, ...]:
    """Return rows whose options (A), (B) … have other labels: does a vector of letters carry over to numbers?

    Raises InputError for labels that are not different words, and by its number for a row with a label that is no
    letter or has none to go to.
    """
    if len(set(labels)) != len(labels) or not all(re.fullmatch(r"\w+", label) for label in labels):
        raise InputError(f"labels are different words such as 1 2, got {' '.join(map(repr, labels))}")
    names = dict(zip(_ALPHABET, labels, strict=False))
    for i, row in enumerate(rows, start=1):
        for label in row.labels:
            if label not in names:
                raise InputError(f"row {i} has the label {label}; new labels are given for {' '.join(names) or 'none'}")

    def renamed(row: Row) -> Row:
        question = _LABEL.sub(lambda found: f"({names.get(found[1], found[1])})", row.question)
        return replace(row, question=question, match=names[row.match], other=names[row.other])

    return tuple(renamed(row) for row in rows)


def _natural(label: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return what sorts labels with their numbers by size; digits are not parsed, for a label may have any number."""
    pieces = [piece for piece in re.split(r"(\d+)", label) if piece]
    digits = [piece.lstrip("0") if piece.isdecimal() else None for piece in pieces]
    found = [(1, 0, p) if d is None else (0, len(d), d) for p, d in zip(pieces, digits, strict=True)]
    return found, label


def _swapped(row: Row, number: int) -> Row:
    try:
        return swapped(row)
    except InputError as error:
        raise InputError(f"row {number}: {error}") from None


def _entries(path: str | Path) -> list[Any]:
    found = read_json(Path(path).expanduser(), most_bytes=_LARGEST)
    if not isinstance(found, list) or not found:
        raise InputError(f"{path} is no list of questions; expected a JSON list of objects")
    return found


def _row(entry: Any, where: str) -> Row:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object with question, {MATCH} and {OTHER}")
    values = {}
    for key in ("question", MATCH, OTHER):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: {key} is missing or no text")
        values[key] = value
    labels = []
    for key in (MATCH, OTHER):
        found = re.fullmatch(r"\s*\((\w+)\)\s*", values[key])
        if found is None:
            raise InputError(f"{where}: {key} is {values[key][:40]!r}; expected a label in brackets, such as (A)")
        if f"({found[1]})" not in values["question"]:
            raise InputError(f"{where}: the question has no option ({found[1]}), which is its {key}")
        labels.append(found[1])
    if labels[0] == labels[1]:
        raise InputError(f"{where}: both answers are ({labels[0]}); they must differ")
    return Row(question=values["question"], match=labels[0], other=labels[1])
