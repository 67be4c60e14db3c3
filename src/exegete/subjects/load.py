"""Load a subject from the Hugging Face hub or a folder; every way this can fail says so in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from exegete.errors import CorruptError, InputError, MissingExtraError, NotFoundError
from exegete.files import hash_json, read_json
from exegete.subjects.subject import Subject

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate can spread a model over devices; ``auto`` fills them evenly, then the processor's memory."""
_REFUSED = (ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError, OSError, json.JSONDecodeError)
_CODER = "it looks like a coder: give it as the coder, and the model that it was trained on as the subject"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def load_subject(
    spec: str,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    remote_code: bool = False,
    device_map: str | None = None,
    compile: bool | str = False,
) -> Subject:
    """Load a causal language model and its tokenizer from a hub id or a local folder.

    Args:
        spec: ``ORG/NAME`` on the Hugging Face hub, or a folder. What looks like a path is never looked up on the hub.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (bfloat16 on cuda, else float32).
        remote_code: Run Python code that the model's repository brings.
        device_map: ``auto`` (or another of ``DEVICE_MAPS``) spreads a model that is larger than one device over all of
            them, layer by layer; activations come back on the device where they arise. None keeps it on ``device``.
        compile: Compile the layers, with this backend of torch.compile where a name is given. Pays for long runs of
            models without a recurrent state, and is refused for others. Layers with a hookpoint inside run as they are.

    Raises:
        NotFoundError: When there is no such folder or model, or the hub cannot be reached.
        InputError: When it is no model folder, asks for remote code, or the device, dtype or compiler cannot be had;
            MissingExtraError for a device map without accelerate.
        CorruptError: When weights are damaged or missing.
    """
    if device_map is not None:
        _check_device_map(device_map, device)
    path = Path(spec).expanduser()
    folder = path if path.exists() else None
    if folder is not None:
        _check_folder(folder, spec, remote_code)
    elif looks_like_path(spec):
        raise NotFoundError(f"there is no folder {spec!r}; give a model folder, or a Hugging Face id such as ORG/NAME")
    where = _device(device)
    model, tokenizer = _from_pretrained(
        spec if folder is None else str(folder), _dtype(dtype, where), remote_code, folder is not None, device_map
    )
    commit = getattr(model.config, "_commit_hash", None) if folder is None else None
    content = hash_json({"hub": spec, "commit": commit}) if commit else None
    model = model if device_map else model.to(where)
    backend = "inductor" if compile is True else compile or None
    return Subject(model, tokenizer, name=spec, folder=folder, content=content, backend=backend)


def load_tokenizer(spec: str) -> Any:
    """Load the tokenizer of a folder or hub id and nothing else. Raises InputError when it has none."""
    import transformers

    where = str(Path(spec).expanduser()) if looks_like_path(spec) else spec
    try:
        with _quiet():
            return transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ConnectionError, *_REFUSED) as error:
        raise InputError(f"{spec!r} has no tokenizer that can be loaded ({_line(error, 120)})") from error


def looks_like_path(spec: str) -> bool:
    """Tell whether a name that does not exist here can only be meant as a path, not as ORG/NAME on the hub."""
    first = Path(spec).parts[0] if spec else ""
    return not _HUB_ID.fullmatch(spec) or ("/" in spec and Path(first).is_dir())


def _check_folder(folder: Path, spec: str, remote_code: bool) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{spec!r} is not a model folder: it has no config.json; {_instead(folder)}")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(settings, dict):
            raise CorruptError(f"{folder / name} does not hold settings")
        if "auto_map" in settings and not remote_code:
            raise InputError(
                f"{spec!r} asks to run its own Python code (auto_map in {name}); read that code, then allow it with "
                f"remote_code=True (--remote-code), or remove auto_map to use the built-in classes"
            )
    if not _has_weights(folder):
        if _is_coder(folder):
            raise InputError(f"{spec!r} is no model but holds coders; {_CODER}")
        raise NotFoundError(
            f"the model folder {spec!r} has a config.json but no weights; put its .safetensors files there"
        )


def _instead(folder: Path) -> str:
    """Return what to do about a folder that is no model, by what it looks like."""
    if _is_coder(folder):
        return _CODER
    if _has_weights(folder):
        return "put the config.json of the model beside its weights"
    return "give the folder that holds it"


def _is_coder(folder: Path) -> bool:
    """Tell whether a folder is laid out as sparse coders are: SAELens, sparsify, dictionary_learning."""
    names = ("cfg.json", "sae.safetensors", "sae_weights.safetensors", "ae.pt")
    places = (f"{above}{name}" for above in ("", "*/", "*/*/") for name in names)
    return any(next(folder.glob(place), None) is not None for place in places)


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in ("*.safetensors*", "*.bin*"))


def _check_device_map(device_map: str, device: str) -> None:
    if device_map not in DEVICE_MAPS:
        raise InputError(f"unknown device map {device_map!r}; allowed: {', '.join(DEVICE_MAPS)}")
    if device != "auto":
        raise InputError(f"a device map chooses the devices itself; leave out device {device!r}, or the map")
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("spreading a model over devices (device_map)", "big")


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _mps() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; allowed: auto, cpu, cuda, cuda:N, mps") from None
    if (where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count()) or (
        where.type == "mps" and not _mps()
    ):
        raise InputError(f"this machine has no device {device!r}; use cpu or auto")
    return where


def _mps() -> bool:
    return torch.backends.mps.is_available()


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _from_pretrained(
    where: str, dtype: torch.dtype, remote_code: bool, local: bool, device_map: str | None
) -> tuple[Any, Any]:
    import transformers

    options: dict[str, Any] = {"trust_remote_code": remote_code, "local_files_only": local}
    with _quiet():
        with _one_line(where, local):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, output_loading_info=True, device_map=device_map, **options
            )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        except _REFUSED as error:
            raise InputError(
                f"{where!r} has no tokenizer that can be loaded; save one there with tokenizer.save_pretrained "
                f"({_line(error, 120)})"
            ) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CorruptError(f"{where!r} lacks {len(names)} weights of its architecture, such as {names[0]}")
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise InputError(f"{where!r} has no tokenizer; save one there with tokenizer.save_pretrained")
    if model.config.model_type.startswith("rwkv"):
        # Else the first pass halves weights in place, and hidden states change their scale every few blocks.
        model.config.rescale_every = 0
    return model, tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing tables and, where nobody watches, progress bars; errors say what is wrong."""
    import transformers

    log = transformers.utils.logging
    shown, level = log.is_progress_bar_enabled(), log.get_verbosity()
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()


@contextlib.contextmanager
def _one_line(where: str, local: bool) -> Iterator[None]:
    """Turn what loading a model can raise into one line of what is wrong and what to do."""
    import safetensors

    try:
        yield
    except safetensors.SafetensorError as error:
        raise CorruptError(f"the weights of {where!r} are damaged: {_line(error)}") from error
    except (OSError, ConnectionError) as error:
        text = _line(error)
        if not local and "does not appear to have a file named config.json" in text:
            raise NotFoundError(
                f"{where!r} is no model: it has no config.json; if it holds coders (SAEs), give it as the coder, and "
                f"the model that they were trained on as the subject"
            ) from error
        advice = "" if local else "; give a local model folder, or check the id and the connection"
        raise NotFoundError(f"the model {where!r} cannot be loaded: {text.rstrip('.')}{advice}") from error
    except _REFUSED as error:
        if "ignore_mismatched_sizes" in str(error):
            raise CorruptError(
                f"the weights of {where!r} have other shapes than its config.json says; do both belong to one model?"
            ) from error
        raise InputError(f"the model {where!r} cannot be loaded: {_line(error)}") from error


def _line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "…"
