"""Small models and coders for tests: complete folders in the layouts that real ones have, written in a second."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.errors import unknown
from exegete.files import write_json
from exegete.streams import stream

if TYPE_CHECKING:
    import torch

BOS = "<|begin|>"
TEXTS = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs away into the brown hills.",
    "def add(first, second):\n    return first + second\n\n\nclass Number:\n    value = 12345\n",
    "Naïve café owners say “déjà vu” — 東京 is far away; 3 + 4 = 7, and the price is €20.",
)
"""What the toy tokenizer is trained on by default."""


def toy_tokenizer(texts: Iterable[str] = TEXTS, *, vocabulary: int = 400) -> Any:
    """Return a byte-level BPE tokenizer trained on the texts, with a BOS token of id 0 that it does not add itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS)


def toy_model(config: Any, *, seed: int = 0) -> Any:
    """Return an untrained causal LM of a transformers config; the global random state of torch is left as it was."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def toy_llama(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 3,
    d: int = 32,
    texts: Iterable[str] = TEXTS,
    vocabulary: int = 400,
    tied: bool = True,
) -> Path:
    """Write a complete Hugging Face folder (config, weights, tokenizer) of an untrained Llama; return the folder.

    ``d`` is a multiple of 4; there are two heads, one key-value head. Weights have scale 0.2, so that tokens differ.
    """
    from transformers import LlamaConfig

    tokenizer = toy_tokenizer(texts, vocabulary=vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d,
        intermediate_size=2 * d,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=None,
    )
    toy_model(config, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_NO_HEADS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.4, "state_size": 8}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
_GEMMA: dict[str, Any] = {**_COMMON, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}
_MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 4},
    "qwen3": {**_COMMON, "head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_neox": {**_COMMON, "num_key_value_heads": None},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 256, "initializer_range": 0.2},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
        "init_std": 0.2,
    },
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_COMMON, **_EXPERTS, "head_dim": 16, "num_experts": 4},
    "mamba": _NO_HEADS,
    "falcon_mamba": _NO_HEADS,
    "mamba2": {**_NO_HEADS, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 4},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32, "rescale_every": 2},
    "xlstm": {  # 64, because a cache of this family rounds its sizes up
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_blocks": 3,
        "num_heads": 2,
        "chunk_size": 16,
        "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 8,
    },
    "recurrent_gemma": {
        **{name: value for name, value in _COMMON.items() if name not in ("initializer_range", "intermediate_size")},
        "intermediate_size": 96,
        "lru_width": 32,
        "attention_window_size": 8,
        "w_init_variance_scale": 0.5,
    },
    "jamba": {
        **_COMMON,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 2,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        **_COMMON,
        "num_key_value_heads": 2,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 4,
        "adapter_rank": 4,
    },
    "falcon_h1": {**_COMMON, **_MAMBA2, "mamba_d_ssm": 64},
    "bamba": {**_COMMON, **_MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_COMMON,
        **_MAMBA2,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
    },
    "nemotron_h": {
        **_COMMON,
        "head_dim": 16,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 4,
    },
    "qwen3_next": {
        **_COMMON,
        **_MIXED,
        **_EXPERTS,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "olmo_hybrid": {
        **_COMMON,
        **_MIXED,
        "num_key_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
    "kimi_linear": {
        **_COMMON,
        **_MIXED,
        **_EXPERTS,
        "num_key_value_heads": 2,
        "mlp_layer_types": ["dense", "sparse", "dense"],
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_local_experts": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
    },
    "lfm2": {**_COMMON, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]},
}
"""Settings of a tiny model of three layers by model type of transformers, attention first, then recurrent and mixed."""


def toy_subject_model(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    texts: Iterable[str] = TEXTS,
    vocabulary: int = 400,
    **settings: Any,
) -> Path:
    """Write a complete Hugging Face folder of an untrained model of one of ``FAMILIES``; return the folder.

    ``settings`` go over those of the family's configuration. Raises NotFoundError for an unknown family.
    """
    from transformers import AutoConfig

    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    tokenizer = toy_tokenizer(texts, vocabulary=vocabulary)
    given = {
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": None,
        **FAMILIES[family],
        **settings,
    }
    config = AutoConfig.for_model(family, **given)
    toy_model(config, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def toy_topk_coder(
    folder: Path,
    *,
    d: int = 32,
    width: int = 64,
    k: int = 4,
    hookpoints: Sequence[str] = ("layers.1",),
    seed: int = 0,
    transcode: bool = False,
    skip: bool = False,
    activation: str = "topk",
    root: bool = False,
) -> Path:
    """Write random TopK coders in sparsify's layout, one folder per hookpoint; return the folder.

    With ``root`` the one coder lies in the folder itself. The draw depends on the seed and the hookpoint.
    """
    from safetensors.torch import save_file

    for hookpoint in hookpoints:
        place = folder if root else folder / hookpoint
        place.mkdir(parents=True, exist_ok=True)
        save_file(toy_weights(d, width, stream_of=(seed, hookpoint), skip=skip), str(place / "sae.safetensors"))
        config = {
            "activation": activation,
            "expansion_factor": 32,
            "normalize_decoder": True,
            "num_latents": width,
            "k": k,
            "multi_topk": False,
            "skip_connection": skip,
            "transcode": transcode,
            "d_in": d,
        }
        (place / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"sae": {"k": k}, "hookpoints": list(hookpoints)}
    if not root:
        write_json(folder / "config.json", settings)
    return folder


def toy_weights(
    d: int, width: int, *, stream_of: tuple[int, str] = (0, ""), skip: bool = False
) -> dict[str, torch.Tensor]:
    """Return random weights under sparsify's tensor names."""
    import numpy as np
    import torch

    draw = stream(stream_of[0], stream_of[1], "toy_topk_coder")

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy((scale * draw.standard_normal(shape)).astype(np.float32))

    encoder = normal(width, d, scale=d**-0.5)
    return {
        "encoder.weight": encoder,
        "encoder.bias": normal(width, scale=0.1),
        "W_dec": encoder + normal(width, d, scale=0.1),
        "b_dec": normal(d, scale=0.1),
        **({"W_skip": normal(d, d, scale=d**-0.5)} if skip else {}),
    }
