"""Small models and coders for tests: complete folders in the layouts that real ones have, written in a second."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
