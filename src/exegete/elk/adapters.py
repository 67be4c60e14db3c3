"""Low-rank adapters (LoRA) by peft: which modules of a family they are put on, and which never work."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch

from exegete.errors import InputError, MissingExtraError
from exegete.subjects.names import layers

if TYPE_CHECKING:
    from exegete.subjects import Subject

_LLAMA: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_MAMBA: Final = ("in_proj", "x_proj", "out_proj")
TARGETS: Final[dict[str, tuple[str, ...]]] = {
    "gpt_neox": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "recurrent_gemma"), _LLAMA
    ),
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": ("in_proj", "out_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
}
"""Names of the modules that get adapters, by model type."""
_BYPASSED: Final = "dt_proj"


def lora_targets(model: Any, named: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the modules that get adapters: those named, or the family's.

    Raises InputError for a family without known ones, names that no linear module has, and ``dt_proj``, whose weight
    Mamba reads itself, so that an adapter on it would never be run.
    """
    family = str(model.config.model_type)
    if named is None and family not in TARGETS:
        raise InputError(
            f"no modules for LoRA are known of {family!r}; name them (--lora-targets), or train all (rank 0)"
        )
    wanted = tuple(TARGETS[family] if named is None else named)
    if _BYPASSED in wanted:
        raise InputError(
            f"LoRA on {_BYPASSED} would do nothing: Mamba uses its weight directly, past any adapter; leave it out"
        )
    linear = {
        name.rpartition(".")[2]
        for name, m in model.base_model.named_modules()
        if isinstance(m, torch.nn.Linear) and "." in name
    }
    missing = [name for name in wanted if name not in linear]
    if missing or not wanted:
        have = ", ".join(sorted(linear - {_BYPASSED}))
        raise InputError(f"{family} has no linear module named {(missing or ['(none)'])[0]}; it has: {have}")
    return wanted


@final
class Adapters:
    """Fresh adapters in the blocks of a model, the only weights of it that learn.

    They are put into the list of blocks rather than the model, since peft refuses ``out_proj`` of Mamba: in training
    mode with kernels its weight is used past any adapter. Models are trained in evaluation mode here, where it is not.

    Raises MissingExtraError without peft.
    """

    def __init__(
        self, subject: Subject, model: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int
    ) -> None:
        try:
            peft: Any = importlib.import_module("peft")
        except ImportError:
            raise MissingExtraError("LoRA", "elk") from None
        first = layers(subject.hookpoints())[0]
        self._stack = f"{model.base_model_prefix}.{first.rpartition('.')[0]}"
        self._settings = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
        )
        self._settings.base_model_name_or_path = subject.name
        self._model = model
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner = peft.LoraModel(model.get_submodule(self._stack), self._settings, "default")

    def save(self, folder: str) -> None:
        """Write the adapters in peft's own format."""
        from safetensors.torch import save_file

        held = {
            f"base_model.model.{self._stack}.{name.replace('.default', '')}": p.detach().cpu().contiguous()
            for name, p in self._model.get_submodule(self._stack).named_parameters()
            if "lora_" in name
        }
        Path(folder).mkdir(parents=True)
        save_file(held, str(Path(folder) / "adapter_model.safetensors"), metadata={"format": "pt"})
        self._settings.save_pretrained(folder)

    def merge(self) -> None:
        """Add the adapters to the weights, and take them out of the model."""
        self._tuner.merge_and_unload()
