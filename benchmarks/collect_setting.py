"""The models, coders and token rows that `benchmarks/collect.py` measures on, written once for all sides.

A setting is a folder of ``model`` (Hugging Face layout that transformers 4 and 5 read), ``corpus`` (exegete's),
``rows.npy`` (the same ids), ``coders/DEPTH/HOOKPOINT`` (a sparsify checkpoint, or Gemma Scope's ``params.npz``) and
``setting.json``. There are two depths: ``early``, where a pass need not go on to the last layer, and ``full``, where
it must, so that sides that cannot stop early are compared at equal layers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch

from exegete.config import CorpusConfig
from exegete.demo import assets
from exegete.store.corpus import TextDocument, build_corpus, text_documents
from exegete.store.token_rows import Corpus
from exegete.subjects import Subject, load_subject

Kind = Literal["topk", "jumprelu"]
DEPTHS = ("early", "full")
ROW_LENGTH = 256
BATCH_ROWS = 32
BATCH = ROW_LENGTH * BATCH_ROWS
L0 = 60


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One model with its coders: ``hookpoints`` at either depth, width and kind of the coders."""

    name: str
    title: str
    kind: Kind
    width: int
    early: tuple[str, ...]
    full: tuple[str, ...]
    tokens: int


def settings(quick: bool, scale: int = 1) -> tuple[Setting, ...]:
    """Return what is measured; ``tokens`` is the length of one repeat."""
    batch = BATCH * scale
    large = "random Llama, 6 layers, d 512"
    return (
        Setting(
            name="demo",
            title="demo model (4 layers, d 256), two TopK coders, 2,048 latents, k 32",
            kind="topk",
            width=2048,
            early=("layers.2", "layers.2.mlp"),
            full=("layers.3", "layers.3.mlp"),
            tokens=batch * (2 if quick else 16),
        ),
        Setting(
            name="topk",
            title=f"{large}, one TopK coder, 32,768 latents, k 32",
            kind="topk",
            width=32768,
            early=("layers.3",),
            full=("layers.5",),
            tokens=batch * (2 if quick else 3),
        ),
        Setting(
            name="jumprelu",
            title=f"{large}, one JumpReLU coder, 16,384 latents, L0 about {L0}",
            kind="jumprelu",
            width=16384,
            early=("layers.3",),
            full=("layers.5",),
            tokens=batch * (2 if quick else 3),
        ),
    )


def prepare(setting: Setting, folder: Path) -> None:
    """Write everything the sides of one setting read."""
    torch.manual_seed(0)
    if setting.name == "demo":
        shutil.copytree(assets() / "model", folder / "model")
    else:
        _random_llama(folder / "model")
    subject = load_subject(str(folder / "model"), device="cpu", dtype="float32")
    corpus = joined_corpus(folder / "corpus", subject, setting.tokens)
    np.save(folder / "rows.npy", corpus.tokens.astype(np.int64))
    for depth in DEPTHS:
        for place, hookpoint in enumerate(setting.full if depth == "full" else setting.early):
            target = folder / "coders" / depth / hookpoint
            target.mkdir(parents=True)
            if setting.name == "demo":
                _copy_coder(assets() / "coders" / setting.early[place], target)
            else:
                _random_coder(setting, target, _activations(subject, corpus, hookpoint))
    about = {
        "kind": setting.kind,
        "early": setting.early,
        "full": setting.full,
        "batch_rows": BATCH_ROWS,
    }
    (folder / "setting.json").write_text(json.dumps(about), encoding="utf-8")


def joined_corpus(folder: Path, subject: Subject, tokens: int) -> Corpus:
    """Make rows of the standard library joined into one text.

    No row is padded and none begins with BOS, so that every position counts for every side: the peer knows neither.
    """
    config = CorpusConfig(text=("stdlib",), row_length=ROW_LENGTH, max_tokens=tokens, bos="none")
    return build_corpus(folder, _joined(), subject.tokenizer, config, table=subject.token_table())


def _joined() -> Iterator[TextDocument]:
    yield TextDocument(key="stdlib", text="".join(document.text for document in text_documents(["stdlib"])))


def _random_llama(folder: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets() / "model" / name, folder / name)


def _activations(subject: Subject, corpus: Corpus, hookpoint: str) -> torch.Tensor:
    """Return activations at a batch of rows from all over the corpus."""
    rows = torch.from_numpy(corpus.tokens[:: len(corpus) // BATCH_ROWS].astype(np.int64))
    return subject.capture(rows, None, [(hookpoint, "output")])[hookpoint, "output"].flatten(0, 1)


def _copy_coder(source: Path, target: Path) -> None:
    for name in ("cfg.json", "sae.safetensors"):
        shutil.copy(source / name, target / name)


def _random_coder(setting: Setting, target: Path, activations: torch.Tensor) -> None:
    """Write a coder of unit-norm random directions around the mean activation."""
    from safetensors.torch import save_file

    encoder = torch.nn.functional.normalize(torch.randn(setting.width, activations.shape[1]), dim=1)
    mean = activations.mean(dim=0)
    if setting.kind == "topk":
        weights = {"encoder.weight": encoder, "encoder.bias": torch.zeros(setting.width)}
        save_file({**weights, "W_dec": encoder.clone(), "b_dec": mean}, target / "sae.safetensors")
        about: Mapping[str, Any] = {
            "activation": "topk",
            "expansion_factor": setting.width // activations.shape[1],
            "normalize_decoder": True,
            "num_latents": setting.width,
            "k": 32,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": activations.shape[1],
        }
        (target / "cfg.json").write_text(json.dumps(about), encoding="utf-8")
        return
    before = (activations - mean) @ encoder.T
    level = before.flatten().kthvalue(before.numel() - L0 * len(before)).values
    parts: dict[str, Any] = {
        "W_enc": encoder.T.contiguous().numpy(),
        "b_enc": (-encoder @ mean).numpy(),
        "W_dec": encoder.numpy(),
        "b_dec": mean.numpy(),
        "threshold": np.full(setting.width, float(level), np.float32),
    }
    np.savez(target / "params.npz", **parts)
