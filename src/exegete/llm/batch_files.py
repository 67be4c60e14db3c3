"""Batches of requests as they lie on disk: which are under way, under what name, and what came back.

A folder holds two files for each batch: ``NAME.json`` says where it was sent and which requests are in it, written
before the server is told to begin; ``NAME.jsonl`` holds one line for each request once it has ended. A program that is
stopped at any moment finds there what it has paid for. Requests go by their keys (``exegete.llm.replies``).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from exegete.errors import CorruptError
from exegete.files import atomic_file, read_json, write_json

FORMAT = 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SentBatch:
    """One batch: its name here, the model, the route, the server's ids of its file and of itself, and its keys.

    ``batch`` is None where it is not known whether the server began.
    """

    name: str
    model: str
    route: str
    file: str
    batch: str | None
    keys: tuple[str, ...]


@final
class BatchFolder:
    """The batches of one model in one folder, which is read when first asked of. One writer at a time."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder, self._model = folder, model
        self._pending: dict[str, SentBatch] = {}
        self._ended: dict[str, tuple[Path, int]] = {}
        self._read = False

    def pending(self, key: str) -> SentBatch | None:
        """Return the batch under way that holds a request. Raises CorruptError when a file of the folder is damaged."""
        self._open()
        return self._pending.get(key)

    def answer(self, key: str) -> Mapping[str, Any] | None:
        """Return the kept line of a request that was answered."""
        self._open()
        if key not in self._ended:
            return None
        path, place = self._ended[key]
        with path.open("rb") as stream:
            stream.seek(place)
            line: Mapping[str, Any] = json.loads(stream.readline())
        return line

    def begin(self, *, route: str, file: str, keys: Iterable[str]) -> SentBatch:
        """Write down a batch that the server is about to be told of."""
        self._open()
        batch = SentBatch(
            name=uuid.uuid4().hex, model=self._model, route=route, file=file, batch=None, keys=tuple(keys)
        )
        self._write(batch)
        return batch

    def begun(self, batch: SentBatch, identity: str) -> SentBatch:
        """Write down the server's id of a batch."""
        begun = replace(batch, batch=identity)
        self._write(begun)
        return begun

    def drop(self, batch: SentBatch) -> None:
        """Forget a batch that the server never began, or lost."""
        (self._folder / f"{batch.name}.json").unlink(missing_ok=True)
        for key in batch.keys:
            self._pending.pop(key, None)

    def end(self, batch: SentBatch, lines: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep what came back, one line for each key."""
        with atomic_file(self._folder / f"{batch.name}.jsonl") as stream:
            for key, line in lines.items():
                stream.write(json.dumps({**line, "custom_id": key}).encode() + b"\n")
        self._index(batch)

    def _write(self, batch: SentBatch) -> None:
        data = {"format": FORMAT, "model": batch.model, "route": batch.route, "file": batch.file, "batch": batch.batch}
        write_json(self._folder / f"{batch.name}.json", {**data, "keys": list(batch.keys)})
        self._pending.update(dict.fromkeys(batch.keys, batch))

    def _open(self) -> None:
        if self._read:
            return
        for path in sorted(self._folder.glob("*.json")):
            batch = _read(path)
            if batch.model != self._model:
                continue
            if path.with_suffix(".jsonl").exists():
                self._index(batch)
            else:
                self._pending.update(dict.fromkeys(batch.keys, batch))
        self._read = True

    def _index(self, batch: SentBatch) -> None:
        path = self._folder / f"{batch.name}.jsonl"
        known = set(batch.keys)
        with path.open("rb") as stream:
            place = 0
            for text in stream:
                try:
                    line = json.loads(text)
                    if line["custom_id"] in known and line["response"]["status_code"] == 200:
                        self._ended[line["custom_id"]] = (path, place)
                except (ValueError, RecursionError, KeyError, TypeError):
                    pass  # not an answer: a failure, which may be asked again
                place += len(text)
        for key in batch.keys:
            if self._pending.get(key, batch).name == batch.name:
                self._pending.pop(key, None)


def _read(path: Path) -> SentBatch:
    data = read_json(path)
    try:
        if data["format"] != FORMAT:
            raise CorruptError(
                f"{path} has format {data['format']}, this version reads {FORMAT}; use the newer exegete"
            )
        found = SentBatch(
            name=path.stem,
            model=str(data["model"]),
            route=str(data["route"]),
            file=str(data["file"]),
            batch=None if data["batch"] is None else str(data["batch"]),
            keys=tuple(map(str, data["keys"])),
        )
    except (KeyError, TypeError) as error:
        raise CorruptError(f"{path} does not describe a batch ({error!r}); remove it, and its requests are sent again"
                           ) from None  # fmt: skip
    return found
