"""Hugging Face datasets as documents: of the hub, streamed; saved with ``save_to_disk``; or a folder of data files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from exegete.errors import InputError, NotFoundError
from exegete.files import hash_file, hash_json
from exegete.store.documents import TextDocument, TextSource, document_of, missing_column
from exegete.store.source_files import one_line, require

PREFIX = "hf:"
_DEFAULT_SPLIT = "train"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_HASHED = 1 << 30
"""Bytes up to which a local folder is hashed; of a larger one, sizes and times of change must do."""


@final
class DatasetSource(TextSource):
    """A dataset given as ``hf:NAME[:CONFIG][@SPLIT]``: NAME of the hub or a local folder, SPLIT by default train.

    Raises NotFoundError when NAME is neither, MissingExtraError when ``datasets`` is not installed. The network is not
    touched before ``check`` or ``documents``; a dataset of the hub is then pinned to the revision it has at that time.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._name, self._config, self._split = _parts(spec.removeprefix(PREFIX))
        self._folder = Path(self._name) if os.path.isdir(self._name) else None
        if self._folder is None and not _REPOSITORY.fullmatch(self._name):
            raise NotFoundError(
                f"empty corpus: {spec!r} names neither a folder nor a dataset; write hf:ORG/NAME[:CONFIG][@SPLIT]"
            )
        require("datasets", "reading Hugging Face datasets")
        self._dataset: Any = None
        self._revision: str | None = None
        self._begun = False

    @property
    def identity(self) -> str:
        """Name, configuration and split."""
        name = self._name if self._folder is None else os.path.realpath(self._folder)
        return f"{PREFIX}{name}:{self._config or ''}@{self._split or _DEFAULT_SPLIT}"

    def check(self, column: str) -> None:
        """Open the dataset and look at its columns, or at those of its first row where it names none."""
        dataset = self._opened()
        names = dataset.column_names
        if names is None:
            names = [name for row in self._rows(dataset.take(1)) for name in row]
        if column not in names:
            raise missing_column(self.spec, column, names)

    def documents(self, column: str) -> Iterator[TextDocument]:
        """Yield the rows of the split."""
        self.check(column)
        self._begun = True
        for number, row in enumerate(self._rows(self._opened().select_columns([column]))):
            yield document_of(f"{self.spec}:{number}", row[column], column)

    def trace(self) -> dict[str, Any] | None:
        """Return the revision on the hub, or the state of the folder."""
        if not self._begun:
            return None
        state = {"revision": self._revision} if self._folder is None else _folder_state(self._folder)
        return {"dataset": self.identity, **state}

    def changed(self, trace: Mapping[str, Any]) -> bool:
        """Compare the files of a local folder; the hub is not asked."""
        if self._folder is None or hash_json(_stats(self._folder)) == trace["files"]:
            return False
        return trace["sha256"] is None or _folder_state(self._folder)["sha256"] != trace["sha256"]

    def _opened(self) -> Any:
        if self._dataset is None:
            try:
                self._dataset = self._load()
            except InputError:
                raise
            except Exception as error:  # data and connections fail in ways that no list of classes covers
                raise InputError(f"{self.spec} cannot be opened: {one_line(error)}") from error
        return self._dataset

    def _load(self) -> Any:
        import datasets  # type: ignore[import-untyped]
        import huggingface_hub

        split = self._split or _DEFAULT_SPLIT
        if self._folder is not None and (self._folder / _SAVED_SPLITS).is_file():
            found = datasets.load_from_disk(str(self._folder))
            if split not in found:
                raise InputError(f"{self.spec} has no split {split!r}; it has: {', '.join(sorted(found))}")
            return found[split].with_format(None)
        if self._folder is not None and (self._folder / _SAVED).is_file():
            if self._split is not None:
                raise InputError(f"{self.spec} was saved without splits; leave @{self._split} out")
            return datasets.load_from_disk(str(self._folder)).with_format(None)
        if self._folder is None:
            self._revision = huggingface_hub.dataset_info(self._name).sha
        return datasets.load_dataset(self._name, self._config, split=split, streaming=True, revision=self._revision)

    def _rows(self, dataset: Any) -> Iterator[Mapping[str, Any]]:
        rows = iter(dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # as for opening
                raise InputError(f"{self.spec} cannot be read: {one_line(error)}") from error
            yield row


def _parts(body: str) -> tuple[str, str | None, str | None]:
    """Split NAME[:CONFIG][@SPLIT]; a folder whose own name holds these signs is taken as it stands."""
    if os.path.isdir(body):
        return body, None, None
    name, _, split = body.partition("@")
    if os.path.isdir(name):
        return name, None, split or None
    name, _, config = name.partition(":")
    return name, config or None, split or None


def _stats(folder: Path) -> list[list[Any]]:
    """Return path, size and time of change of every file below a folder, sorted."""
    found = []
    for base, _, files in os.walk(folder):
        for file in files:
            state = (Path(base) / file).stat()
            found.append([(Path(base) / file).relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns])
    return sorted(found)


def _folder_state(folder: Path) -> dict[str, Any]:
    stats = _stats(folder)
    small = sum(size for _, size, _ in stats) <= _HASHED
    contents = hash_json([[name, hash_file(folder / name)] for name, _, _ in stats]) if small else None
    return {"files": hash_json(stats), "sha256": contents}
