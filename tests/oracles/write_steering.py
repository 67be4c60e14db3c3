"""Write a tiny model, and what steering-vectors and repeng make of it, as fixtures for the tests.

Run by ``make oracles`` in an environment of its own: steering-vectors needs transformers below 5, repeng numpy below 2.
The model's weights are in the fixture, so that every version of torch sees the same ones.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

repeng = importlib.import_module("repeng")
steering_vectors = importlib.import_module("steering_vectors")
HERE = Path(__file__).resolve().parents[1] / "fixtures" / "steering"
WORDS = (
    "<s> <unk> <pad> the a cat dog likes hates rain sun and very much is not good bad today ( A B ) Choices : ? Answer"
)
LAYERS, D, STEPS = 4, 16, 8


def write_model() -> None:
    """Write an untrained Llama with large enough weights, and a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(WORDS.split())}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=2,
    )
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")


def pairs() -> list[tuple[str, str]]:
    """Return pairs of texts of one length each, and of several lengths."""
    subjects = ["the cat", "a dog", "the dog", "a cat", "the cat and the dog", "a very good dog"]
    objects = ["rain", "sun", "the rain", "the sun today"]
    return [(f"{s} likes {o}", f"{s} hates {o}") for s in subjects for o in objects]


def generated(model: Any, ids: torch.Tensor, **options: Any) -> list[int]:
    """Return greedily generated ids."""
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=2,
        **options,
    )
    return [int(token) for token in made[0, ids.shape[1] :]]


def loaded() -> tuple[Any, Any]:
    """Return a fresh model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "model").eval()
    return model, AutoTokenizer.from_pretrained(HERE / "model")


def steering_vectors_part(prompts: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the vectors of steering-vectors with logits under them, and greedy continuations."""
    model, tokenizer = loaded()
    vector = steering_vectors.train_steering_vector(model, tokenizer, pairs(), read_token_index=-1, batch_size=4)
    held = {f"sv.vector.{layer}": part.clone() for layer, part in vector.layer_activations.items()}
    early = steering_vectors.train_steering_vector(model, tokenizer, pairs(), read_token_index=2, batch_size=3)
    held |= {f"sv.at2.{layer}": part.clone() for layer, part in early.layer_activations.items()}
    texts: dict[str, Any] = {}
    for i, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for multiplier in (-2.0, 1.5):
            for name, where in (("onward", slice(-1, None)), ("all", slice(0, None))):
                with (
                    torch.no_grad(),
                    vector.apply(model, multiplier=multiplier, min_token_index=None, token_indices=where),
                ):
                    held[f"sv.logits.{i}.{multiplier}.{name}"] = model(ids).logits[0].clone()
                    texts[f"{i}.{multiplier}.{name}"] = generated(model, ids)
    return held, texts


def repeng_part(prompts: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return repeng's directions with logits under them, and greedy continuations; write its GGUF file."""
    model, tokenizer = loaded()
    entries = [repeng.DatasetEntry(positive=p, negative=n) for p, n in pairs()]
    held: dict[str, torch.Tensor] = {}
    texts: dict[str, Any] = {}
    layers = list(range(1, LAYERS - 1))  # what it reads for the last block is behind the final norm
    for method in ("pca_diff", "pca_center"):
        wrapped = repeng.ControlModel(model, layers)
        vector = repeng.ControlVector.train(
            wrapped, tokenizer, entries, method=method, hidden_layers=layers, batch_size=8
        )
        held |= {f"repeng.{method}.{layer}": torch.from_numpy(np.array(v)) for layer, v in vector.directions.items()}
        wrapped.set_control(vector, 1.5)
        for i, prompt in enumerate(prompts):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                held[f"repeng.logits.{method}.{i}"] = wrapped(input_ids=ids).logits[0].clone()
                texts[f"{method}.{i}"] = generated(wrapped, ids)
        wrapped.reset()
        model = wrapped.unwrap()
        if method == "pca_diff":
            vector.export_gguf(str(HERE / "repeng.gguf"))
    return held, texts


def main() -> None:
    """Write the fixture and a file of the hashes of everything in it."""
    warnings.simplefilter("ignore")
    write_model()
    prompts = ["the cat likes", "a very bad dog hates the", "rain is not good"]
    ours, texts = steering_vectors_part(prompts)
    theirs, more = repeng_part(prompts)
    save_file(
        {name: part.contiguous().float() for name, part in {**ours, **theirs}.items()}, HERE / "expected.safetensors"
    )
    said = {"pairs": pairs(), "prompts": prompts, "steering_vectors": texts, "repeng": more, "steps": STEPS}
    (HERE / "expected.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    for weights in HERE.rglob("*.safetensors"):
        weights.chmod(0o644)
    files = sorted(p for p in HERE.rglob("*") if p.is_file() and p.name != "hashes.json")
    hashes = {str(p.relative_to(HERE)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (HERE / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(files)} files: {HERE}\n")


if __name__ == "__main__":
    main()
