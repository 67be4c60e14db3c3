"""Extractions on disk: a safetensors file and the facts of its rows for each split, and one manifest with hashes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from exegete.coders.weights import tensors
from exegete.elk.facts import FEATURES, Facts
from exegete.elk.features import Extraction
from exegete.errors import CorruptError, MismatchError, NotFoundError
from exegete.files import atomic_file, hash_file, read_json, write_json
from exegete.store.checks import read_manifest, require_same, verify_once, write_manifest

FORMAT: Final = 1
MANIFEST: Final = "extraction.json"
_ENTRY: Final = {"data", "rows", "sha256", "facts"}
_SITE: Final = re.compile(r"-1|0|[1-9][0-9]{0,5}")


def save_extraction(found: Extraction, folder: str | Path, split: str, *, key: Mapping[str, Any]) -> None:
    """Write one split into a folder, the manifest last.

    ``key`` says what it was made with; MismatchError is raised where the folder holds splits made with something else.
    """
    place = Path(folder).expanduser()
    old = _manifest(place) if (place / MANIFEST).is_file() else {"key": dict(key), "splits": {}}
    require_same(f"the extraction in {place}", old["key"], dict(key))
    held = {
        f"{kind}/{at}": torch.from_numpy(np.ascontiguousarray(x))
        for kind, sites in found.features.items()
        for at, x in sites.items()
    }
    held["log_odds"] = torch.from_numpy(found.log_odds)
    from safetensors.torch import save

    with atomic_file(place / f"{split}.safetensors") as stream:
        stream.write(save(held))
    write_json(place / f"{split}.json", found.facts.to_json())
    entry = {
        "data": found.data,
        "rows": len(found),
        "sha256": hash_file(place / f"{split}.safetensors"),
        "facts": hash_file(place / f"{split}.json"),
    }
    splits = {**old["splits"], split: entry}
    write_manifest(place / MANIFEST, {"format": FORMAT, "key": dict(key), "splits": splits})


def has_split(folder: str | Path, split: str, *, key: Mapping[str, Any], data: str) -> bool:
    """Tell whether a folder holds a split of these rows. Raises MismatchError where it holds something else."""
    place = Path(folder).expanduser()
    if not (place / MANIFEST).is_file():
        return False
    manifest = _manifest(place)
    require_same(f"the extraction in {place}", manifest["key"], dict(key))
    entry = manifest["splits"].get(split)
    if entry is not None and entry["data"] != data:
        raise MismatchError(f"{place} holds other rows for the split {split}; use another folder")
    return entry is not None


def load_extraction(folder: str | Path, split: str, *, features: Sequence[str] | None = None) -> Extraction:
    """Read one split, all of its feature sets or some.

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
    held = tensors(path)
    found: dict[Any, dict[int, Any]] = {}
    for name, value in held.items():
        kind, _, at = name.partition("/")
        if name != "log_odds" and (kind not in FEATURES or not _SITE.fullmatch(at)):
            raise CorruptError(f"{path}: {name} is no feature set and site")
        wanted = "[n]" if name == "log_odds" else "[n, 2, d]" if "pair" in kind else "[n, d]"
        whole = value.ndim == wanted.count(",") + 1 and (value.ndim < 3 or value.shape[1] == 2)
        if value.dtype != torch.float32 or not whole or len(value) != len(facts):
            raise CorruptError(
                f"{path}: {name} is {value.dtype} {list(value.shape)}, not torch.float32 {wanted} of {len(facts)} rows"
            )
        if name != "log_odds" and (features is None or kind in features):
            found.setdefault(kind, {})[int(at)] = value.numpy()
    if "log_odds" not in held:
        raise CorruptError(f"{path} lacks the model's log-odds")
    return Extraction(
        subject=str(manifest["key"].get("subject")),
        data=str(entry["data"]),
        facts=facts,
        log_odds=held["log_odds"].numpy(),
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
