"""What stands behind a model's name: of a folder its contents, so that scores rest on a model and not on a path."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final

from exegete.files import hash_file, hash_json

IN_PROCESS: Final = ("hf", "vllm")
"""The words before the name of a model that runs in this process."""
_SPELLS: Final = (
    "tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template", "sentencepiece", "spiece",
    "tekken",
)  # fmt: skip
"""How the names of files begin by which text becomes tokens."""
_SETTINGS: Final = ("config.json", "modules.json")


def model_identity(name: str) -> str | None:
    """Return what tells apart the models that ``hf/FOLDER`` or ``vllm/FOLDER`` may stand for; None for other names.

    It rests on the contents of weights, configuration and tokenizer: the same model in another folder has the same, and
    another model in the same folder has not. Files are read once for this process, until they change. Raises
    CorruptError when the configuration cannot be read.
    """
    service, _, model = name.partition("/")
    folder = Path(model).expanduser()
    if service not in IN_PROCESS or not model or not (folder / "config.json").is_file():
        return None
    content = _model(folder, _state(folder))
    return None if content is None else f"{service}/{content}"


def embedder_identity(name: str) -> str | None:
    """Return the same for the folder of a model that embeds text, by the contents of all its files; None for a name."""
    folder = Path(name).expanduser()
    if not any((folder / settings).is_file() for settings in _SETTINGS):
        return None
    return f"folder/{_all(folder, _state(folder))}"


def is_demo(name: str) -> bool:
    """Tell whether a model of this process is the demo's, which was trained on Python code alone, wherever it lies."""
    service, _, model = name.partition("/")
    return service in IN_PROCESS and bool(model) and is_demo_hash(_weights_in(Path(model).expanduser()))


def is_demo_hash(content: str | None) -> bool:
    """Tell whether a hash of weights and configuration is that of one of the demo's models."""
    from exegete.demo import assets

    folders = (assets() / "model", assets() / "recurrent/model")
    return content is not None and any(content == _weights_in(folder) for folder in folders)


def _weights_in(folder: Path) -> str | None:
    return _weights(folder, _state(folder)) if (folder / "config.json").is_file() else None


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder and below that are not hidden."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _state(folder: Path) -> str:
    """Return what changes when a file does, without reading any."""
    files = ((path.relative_to(folder).as_posix(), path.stat()) for path in _files(folder))
    return hash_json([[name, stat.st_size, stat.st_mtime_ns] for name, stat in files])


@lru_cache(maxsize=64)
def _weights(folder: Path, state: str) -> str | None:
    from exegete.subjects.identity import folder_hash

    return folder_hash(folder)


@lru_cache(maxsize=64)
def _model(folder: Path, state: str) -> str | None:
    weights = _weights(folder, state)
    spells = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.startswith(_SPELLS)]
    reads = {path.name: hash_file(path) for path in spells}
    return None if weights is None else hash_json({"model": weights, "tokenizer": reads})


@lru_cache(maxsize=64)
def _all(folder: Path, state: str) -> str:
    return hash_json({path.relative_to(folder).as_posix(): hash_file(path) for path in _files(folder)})
