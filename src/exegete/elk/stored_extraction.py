"""Extractions on disk: a safetensors file and the facts of its rows for each split, and one manifest with hashes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exegete.elk.encoding import Encoded
from exegete.elk.extraction import TOKENS_AT_ONCE, Reading
from exegete.elk.facts import FEATURES, Facts, Feature
from exegete.elk.features import Extraction
from exegete.elk.row_files import RowFile, read_row_file
from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import RunLock, atomic_file, hash_file, read_json, write_json
from exegete.progress import Progress
from exegete.store.checks import read_manifest, require_same, verify_once, write_manifest

if TYPE_CHECKING:
    from exegete.subjects import Subject

FORMAT: Final = 1
MANIFEST: Final = "extraction.json"
_ODDS: Final = "log_odds"
_ENTRY: Final = {"data", "rows", "sha256", "facts"}
_SITE: Final = re.compile(r"-1|0|[1-9][0-9]{0,5}")


def extract_to(
    subject: Subject,
    data: Encoded,
    folder: str | Path,
    split: str,
    *,
    key: Mapping[str, Any],
    features: Sequence[Feature] | None = None,
    sites: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: Progress | None = None,
) -> Extraction:
    """Do as ``extract``, but write the features into a folder as they come, so that one batch is in memory.

    The file is that of ``save_extraction``, byte for byte; what is returned is read from it.

    Raises as ``extract`` and ``save_extraction``, and InputError where the disk has too little room.
    """
    reading = Reading(subject, data, features=features, sites=sites, components=components)
    place = Path(folder).expanduser()
    _require_disk(place, (reading.row_bytes + 4) * len(data))

    def fill(file: RowFile) -> None:
        for rows, odds, parts in reading.batches(tokens_at_once, progress):
            file.put(_ODDS, rows, odds)
            for (kind, at), part in parts.items():
                file.put(f"{kind}/{at}", rows, part)

    shapes = {f"{kind}/{at}": (len(data), *shape) for (kind, at), shape in reading.shapes.items()}
    _write(place, split, shapes, fill, key=_whole_key(key, subject.hash), facts=data.facts, data=data.hash)
    return load_extraction(place, split)


def save_extraction(found: Extraction, folder: str | Path, split: str, *, key: Mapping[str, Any]) -> None:
    """Write one split into a folder, some rows at a time, the manifest last.

    ``key`` says what it was made with, the hash of the model (``subject``) being added; MismatchError is raised where
    it names another model or the folder holds splits made with something else, BusyError while another process writes
    there.
    """
    held = {f"{kind}/{at}": x for kind, sites in found.features.items() for at, x in sites.items()}
    rows = np.arange(len(found))

    def fill(file: RowFile) -> None:
        for name, x in {**held, _ODDS: found.log_odds}.items():
            file.put(name, rows, x)

    shapes = {name: x.shape for name, x in held.items()}
    place = Path(folder).expanduser()
    _write(place, split, shapes, fill, key=_whole_key(key, found.subject), facts=found.facts, data=found.data)


def _write(
    place: Path,
    split: str,
    shapes: Mapping[str, tuple[int, ...]],
    fill: Callable[[RowFile], None],
    *,
    key: Mapping[str, Any],
    facts: Facts,
    data: str,
) -> None:
    with RunLock(place):
        old = _manifest(place) if (place / MANIFEST).is_file() else {"key": dict(key), "splits": {}}
        require_same(f"the extraction in {place}", old["key"], dict(key))
        with atomic_file(place / f"{split}.safetensors") as stream:
            fill(RowFile(stream, {**shapes, _ODDS: (len(facts),)}))
        write_json(place / f"{split}.json", facts.to_json())
        entry = {
            "data": data,
            "rows": len(facts),
            "sha256": hash_file(place / f"{split}.safetensors"),
            "facts": hash_file(place / f"{split}.json"),
        }
        splits = {**old["splits"], split: entry}
        write_manifest(place / MANIFEST, {"format": FORMAT, "key": dict(key), "splits": splits})


def _whole_key(key: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """Return the key with the model's hash, by which splits of one model are known to be of one model."""
    if key.get("subject", subject) != subject:
        raise MismatchError(f"the key says that the model is {key['subject']}, the extraction is of {subject}")
    return {**key, "subject": subject}


def _require_disk(place: Path, size: int) -> None:
    known = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(known).free
    if size > free:
        raise InputError(
            f"the features take {size / 2**30:.1f} GiB, and {known} has {free / 2**30:.1f} free; take fewer rows, "
            f"sites or features, or state components"
        )


def has_split(folder: str | Path, split: str, *, key: Mapping[str, Any], data: str) -> bool:
    """Tell whether a folder holds a split of these rows. Raises MismatchError where it holds something else."""
    place = Path(folder).expanduser()
    if not (place / MANIFEST).is_file():
        return False
    manifest = _manifest(place)
    require_same(f"the extraction in {place}", manifest["key"], {"subject": manifest["key"].get("subject"), **key})
    entry = manifest["splits"].get(split)
    if entry is not None and entry["data"] != data:
        raise MismatchError(f"{place} holds other rows for the split {split}; use another folder")
    return entry is not None


def load_extraction(folder: str | Path, split: str, *, features: Sequence[str] | None = None) -> Extraction:
    """Read one split, all of its feature sets or some; the features are memory maps of the file.

    Raises NotFoundError where there is none, CorruptError where it is damaged.
    """
    place = Path(folder).expanduser()
    if not (place / MANIFEST).is_file():
        raise NotFoundError(
            f"there is no extraction in {place}; make one with: exegete elk extract MODEL DATA --out {place}"
        )
    manifest = _manifest(place)
    entry = manifest["splits"].get(split)
    if entry is None:
        have = ", ".join(sorted(manifest["splits"])) or "none"
        raise NotFoundError(f"{place} has no split {split}; it has: {have}")
    path = place / f"{split}.safetensors"
    for file, sha256 in ((path, entry["sha256"]), (place / f"{split}.json", entry["facts"])):
        if not file.is_file():
            raise NotFoundError(f"there is no {file}")
        verify_once(file, str(sha256))
    facts = Facts.from_json(read_json(place / f"{split}.json", most_bytes=1 << 30))
    held = read_row_file(path)
    found: dict[Any, dict[int, Any]] = {}
    for name, value in held.items():
        kind, _, at = name.partition("/")
        if name != _ODDS and (kind not in FEATURES or not _SITE.fullmatch(at)):
            raise CorruptError(f"{path}: {name} is no feature set and site")
        wanted = "[n]" if name == _ODDS else "[n, 2, d]" if "pair" in kind else "[n, d]"
        whole = value.ndim == wanted.count(",") + 1 and (value.ndim < 3 or value.shape[1] == 2)
        if not whole or len(value) != len(facts):
            raise CorruptError(f"{path}: {name} is {list(value.shape)}, not {wanted} of {len(facts)} rows")
        if name != _ODDS and (features is None or kind in features):
            found.setdefault(kind, {})[int(at)] = value
    if _ODDS not in held:
        raise CorruptError(f"{path} lacks the model's log-odds")
    return Extraction(
        subject=str(manifest["key"].get("subject")),
        data=str(entry["data"]),
        facts=facts,
        log_odds=held[_ODDS],
        features={kind: dict(sorted(found[kind].items())) for kind in FEATURES if kind in found},
    )


def extraction_facts(folder: str | Path) -> dict[str, Any]:
    """Return what the manifest of a folder says. Raises NotFoundError where there is none."""
    return _manifest(Path(folder).expanduser())


def _manifest(place: Path) -> dict[str, Any]:
    data = read_manifest(place / MANIFEST, number=FORMAT)
    key, splits = data.get("key"), data.get("splits")
    entries = list(splits.values()) if isinstance(splits, dict) else [None]
    if not isinstance(key, dict) or any(not isinstance(one, dict) or not set(one) >= _ENTRY for one in entries):
        raise CorruptError(f"{place / MANIFEST} is no manifest of an extraction; make it again")
    return data
