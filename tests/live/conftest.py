"""A GGUF file of a toy Llama: the format is a header, settings, the list of tensors, and their aligned numbers.

Source: docs/gguf.md of ggml (version 3). llama.cpp rotates neighbouring pairs of a head where Hugging Face rotates its
halves, so rows of the query and key projections are put in another order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ALIGNMENT = 32
NORMAL, CONTROL = 1, 3


@pytest.fixture(scope="session")
def gguf() -> Callable[[Path, Path], None]:
    return write_gguf


def write_gguf(folder: Path, path: Path) -> None:
    """Write the Llama of a Hugging Face folder, with its byte-level tokenizer, in float32."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    settings = {**model_settings(config), **token_settings(folder, config)}
    tensors = {
        gguf_name(name): ordered(name, array, config) for name, array in load_file(folder / "model.safetensors").items()
    }
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings))
    head += b"".join(text(key) + value(settings[key]) for key in settings)
    place, body = 0, b""
    for name, array in tensors.items():
        head += text(name) + struct.pack("<I", array.ndim) + struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        head += struct.pack("<IQ", 0, place)
        body += padded(array.astype("<f4").tobytes())
        place = len(body)
    path.write_bytes(padded(head) + body)


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "general.architecture": "llama",
        "general.name": "toy",
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": config["hidden_size"] // heads,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": config["vocab_size"],
    }


def token_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    stored = json.loads((folder / "tokenizer.json").read_text())
    special = {added["id"]: added["content"] for added in stored["added_tokens"]}
    pieces = {i: piece for piece, i in stored["model"]["vocab"].items()} | special
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]]
    count = config["vocab_size"]
    assert sorted(pieces) == list(range(count))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [pieces[i] for i in range(count)],
        "tokenizer.ggml.token_type": [CONTROL if i in special else NORMAL for i in range(count)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}  # fmt: skip
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    return f"blk.{layer}.{parts[rest.removesuffix('.weight')]}.weight"


def ordered(name: str, array: np.ndarray[Any, Any], config: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Interleave the two halves of every head of queries and keys."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return array
    rows, columns = array.shape
    halves = array.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(given: Any) -> bytes:
    """Return a setting with the number of its type before it."""
    if isinstance(given, bool):
        return struct.pack("<I?", 7, given)
    if isinstance(given, int):
        return struct.pack("<II", 4, given)
    if isinstance(given, float):
        return struct.pack("<If", 6, given)
    if isinstance(given, str):
        return struct.pack("<I", 8) + text(given)
    return struct.pack("<I", 9) + items(given)


def items(given: Sequence[Any]) -> bytes:
    if isinstance(given[0], str):
        return struct.pack("<IQ", 8, len(given)) + b"".join(map(text, given))
    return struct.pack("<IQ", 5, len(given)) + struct.pack(f"<{len(given)}i", *given)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)
