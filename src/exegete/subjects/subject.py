"""A subject: any causal language model of the Hugging Face family, with named hookpoints that can be read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch

from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import hash_json, read_json
from exegete.subjects import hooks
from exegete.subjects.identity import folder_hash, state_hash
from exegete.subjects.names import Point, expand
from exegete.subjects.pieces import token_table
from exegete.tokens import TokenTable
from exegete.types import Side

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


@final
class Subject:
    """A model looked into. Made by ``load_subject``; in evaluation mode, without gradients."""

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, folder: Path | None = None, content: str | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._folder = folder
        self._content = content
        self._sizes: dict[Point, int] = {}

    @cached_property
    def hash(self) -> str:
        """Content hash of config and weights, 16 hex digits: of the files where there are any, else of the tensors."""
        content = self._content or (folder_hash(self._folder) if self._folder else None)
        return content or state_hash(self.model, self.model.config)

    @property
    def bos(self) -> int | None:
        """Id of the token that starts a text, None when the tokenizer has none."""
        found: int | None = self.tokenizer.bos_token_id
        return found

    @cached_property
    def _modules(self) -> dict[str, torch.nn.Module]:
        named = self.model.base_model.named_modules()
        return {name: module for name, module in named if name and not isinstance(module, _CONTAINERS)}

    @cached_property
    def _table(self) -> TokenTable:
        return token_table(self.tokenizer)

    def token_table(self) -> TokenTable:
        """Return the bytes of every token id."""
        return self._table

    def hookpoints(self) -> tuple[str, ...]:
        """Return the canonical names of all hookpoints, in the model's own order."""
        return tuple(self._modules)

    def points(self, pattern: str, side: Side = "output") -> tuple[Point, ...]:
        """Return the hookpoints with their sides that a name or glob in any spelling stands for.

        ``side`` is the side of spellings that do not fix one. Raises NotFoundError with near names.
        """
        return expand(pattern, self.hookpoints(), side=side, prefix=self.model.base_model_prefix)

    def resolve(self, pattern: str) -> tuple[str, ...]:
        """Return the canonical names that a name or glob in any spelling stands for, in natural layer order.

        A name says nothing of the side, which belongs to the coder. Raises NotFoundError with near names, InputError
        for ``blocks.0.hook_resid_pre``, which only ``points`` can express: it is the input of layer 0.
        """
        points = self.points(pattern)
        if pattern.endswith("hook_resid_pre") and any(side == "input" for _, side in points):
            raise InputError(f"{pattern!r} is the input of {points[0][0]!r}; name that module, with side 'input'")
        return tuple(dict.fromkeys(name for name, _ in points))

    def d(self, hookpoint: str, side: Side = "output") -> int:
        """Return the size of the activations at one side of a hookpoint, from a pass over one token."""
        point = self._single(hookpoint, side)
        if point not in self._sizes:
            module = self._modules[point[0]]
            if isinstance(module, torch.nn.Linear):
                self._sizes[point] = module.in_features if side == "input" else module.out_features
            else:
                probe = torch.zeros((1, 1), dtype=torch.long)
                self._sizes[point] = int(self.capture(probe, None, [point])[point].shape[-1])
        return self._sizes[point]

    def capture(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor | None, points: Sequence[Point]
    ) -> dict[Point, torch.Tensor]:
        """Return the activations [rows, positions, d] at several hookpoints from one forward pass.

        The pass ends at the deepest point; the LM head is never computed. ``tokens`` [rows, positions] ids;
        ``attention_mask`` [rows, positions] is 0 at padding, None stands for all ones. The keys are the points as
        given. Raises InputError for ids outside the vocabulary and for points without activations, NotFoundError for
        unknown ones.
        """
        if tokens.ndim != 2:
            raise InputError(f"tokens are [rows, positions], got shape {tuple(tokens.shape)}")
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise InputError(f"tokens {tuple(tokens.shape)} and mask {tuple(attention_mask.shape)} differ in shape")
        self._check_ids(tokens)
        wanted = {point: self._single(*point) for point in points}
        mask = None if attention_mask is None else attention_mask.to(self.device, torch.long)
        ids = tokens.to(self.device, torch.long)
        caught = hooks.capture(self.model.base_model, self._modules, ids, mask, tuple(dict.fromkeys(wanted.values())))
        return {point: caught[canonical] for point, canonical in wanted.items()}

    def with_model(self, model: Any, *, name: str, content: str) -> Subject:
        """Return a subject with another model of the same architecture and this one's tokenizer."""
        return Subject(model, self.tokenizer, name=name, content=content)

    def _single(self, hookpoint: str, side: Side) -> Point:
        if hookpoint in self._modules:
            return hookpoint, side
        found = self.points(hookpoint, side)
        if len(found) != 1:
            raise InputError(f"{hookpoint!r} stands for {len(found)} hookpoints; name one of them")
        return found[0]

    def _check_ids(self, tokens: torch.Tensor) -> None:
        size = int(self.model.get_input_embeddings().weight.shape[0])
        low, high = (int(bound) for bound in tokens.aminmax()) if tokens.numel() else (0, 0)
        if low < 0 or high >= size:
            raise MismatchError(
                f"token ids {low} to {high} do not fit the {size} embeddings of {self.name}; "
                f"was the text encoded with another tokenizer?"
            )


def load_subject(
    spec: str, *, device: str = "auto", dtype: str | torch.dtype = "auto", remote_code: bool = False
) -> Subject:
    """Load a causal language model and its tokenizer from a hub id or a local folder.

    Args:
        spec: ``ORG/NAME`` on the Hugging Face hub, or a folder. What looks like a path is never looked up on the hub.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (bfloat16 on cuda, else float32).
        remote_code: Run Python code that the model's repository brings.

    Raises:
        NotFoundError: When there is no such folder or model, or the hub cannot be reached.
        InputError: When it is no model folder, asks for remote code, or the device or dtype cannot be had.
        CorruptError: When weights are damaged or missing.
    """
    path = Path(spec).expanduser()
    folder = path if path.exists() else None
    if folder is not None:
        _check_folder(folder, spec, remote_code)
    elif looks_like_path(spec):
        raise NotFoundError(f"there is no folder {spec!r}; give a model folder, or a Hugging Face id such as ORG/NAME")
    where = _device(device)
    kind = _dtype(dtype, where)
    model, tokenizer = _from_pretrained(spec if folder is None else str(folder), kind, remote_code, folder is not None)
    commit = getattr(model.config, "_commit_hash", None) if folder is None else None
    content = hash_json({"hub": spec, "commit": commit}) if commit else None
    return Subject(model.to(where), tokenizer, name=spec, folder=folder, content=content)


def looks_like_path(spec: str) -> bool:
    """Tell whether a name that does not exist here can only be meant as a path, not as ORG/NAME on the hub."""
    first = Path(spec).parts[0] if spec else ""
    return not _HUB_ID.fullmatch(spec) or ("/" in spec and Path(first).is_dir())


def _check_folder(folder: Path, spec: str, remote_code: bool) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{spec!r} is not a model folder: it has no config.json; give the folder that holds it")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(settings, dict):
            raise CorruptError(f"{folder / name} does not hold settings")
        if "auto_map" in settings and not remote_code:
            raise InputError(
                f"{spec!r} asks to run its own Python code (auto_map in {name}); read that code, then allow it with "
                f"remote_code=True (--remote-code), or remove auto_map to use the built-in classes"
            )


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


def _from_pretrained(where: str, dtype: torch.dtype, remote_code: bool, local: bool) -> tuple[Any, Any]:
    import safetensors
    import transformers

    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        bars.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": remote_code, "local_files_only": local}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    except safetensors.SafetensorError as error:
        raise CorruptError(f"the weights of {where!r} are damaged: {_line(error)}") from error
    except (OSError, ConnectionError) as error:
        raise NotFoundError(
            f"the model {where!r} cannot be loaded: {_line(error)}"
            + ("" if local else "; give a local model folder, or check the id and the connection")
        ) from error
    except (ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"the model {where!r} cannot be loaded: {_line(error)}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CorruptError(f"{where!r} lacks {len(names)} weights of its architecture, such as {names[0]}")
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise InputError(f"{where!r} has no tokenizer; save one there with tokenizer.save_pretrained")
    return model, tokenizer


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"
