"""Collecting from every family of models: what is stored against plain hooks on one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import exegete as ex
from exegete.coders.coder import SparseCoder
from exegete.coders.linear import LinearCoder
from exegete.store.token_rows import Corpus
from exegete.subjects import Subject
from exegete.testing import toy_subject_model, toy_topk_coder

# The hookpoints of two coders by family, a layer's output and something inside a layer; on the second a transcoder.
POINTS = {
    "mamba": ("layers.0", "layers.1.mixer"),
    "mamba2": ("layers.0", "layers.1.mixer"),
    "rwkv": ("blocks.0", "blocks.1.feed_forward"),
    "recurrent_gemma": ("layers.0", "layers.1.mlp_block"),
    "jamba": ("layers.0", "layers.1.feed_forward"),
    "qwen3_next": ("layers.0", "layers.1.mlp"),
    "gemma2": ("layers.0", "layers.1.mlp"),
    "gpt2": ("h.0", "h.1.mlp"),
    "gpt_neox": ("layers.0", "layers.1.mlp"),
    "llama": ("layers.0", "layers.1.mlp"),
}
K, LENGTH = 4, 40
WORDS = ["def", "f", "(", "x", ")", ":", "return", "dog", "fox", "the", "lazy", "12345", "\n"]
CLOSE = 1e-4
"""By how much pre-activations may differ between batches of rows and one row; ties closer than that may swap."""


def corpus_of(subject: Subject, folder: Path) -> Corpus:
    """Return a corpus of documents of many lengths: padded rows, several rows to a document, and a short last row."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i, size in enumerate((3, 40, 17, 90, 25, 60, 8)):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(WORDS, size)))
    return ex.load_corpus(str(folder), tokenizer=subject.tokenizer, row_length=LENGTH)


def caught(subject: Subject, tokens: torch.Tensor, coder: LinearCoder) -> torch.Tensor:
    """Return what the coder reads [positions, d_in] in a whole forward pass over one row."""
    found: list[torch.Tensor] = []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        value = given if coder.side == "input" else output[0] if isinstance(output, tuple) else output
        found.append(value.detach().clone())

    module = subject.model.base_model.get_submodule(coder.hookpoint)
    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        subject.model(tokens, use_cache=False)
    handle.remove()
    (value,) = found
    return value.reshape(-1, coder.d_in)


def by_hand(subject: Subject, corpus: Corpus, coder: SparseCoder) -> list[tuple[int, int, torch.Tensor]]:
    """Return (row, position, pre-activations [width]) of every counted position, one unpadded row at a time."""
    assert isinstance(coder, LinearCoder)
    rows = corpus.rows(slice(None))
    found = []
    for row in range(len(rows)):
        there = rows.documents[row] >= 0
        x = caught(subject, torch.from_numpy(rows.tokens[row][there].astype(np.int64))[None], coder)
        x = x - coder.decoder_bias if coder.subtract_decoder_bias else x
        pre = (x @ coder.encoder.T + coder.encoder_bias).relu()
        places = enumerate(there.nonzero()[0].tolist())
        found += [(row, position, pre[i]) for i, position in places if rows.mask[row, position]]
    return found


@pytest.mark.parametrize("family", POINTS)
def test_stored_firings_are_those_of_one_row_at_a_time(family: str, tmp_path: Path) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    subject = ex.load_subject(str(toy_subject_model(family, tmp_path / "model")), device="cpu")
    plain, inner = POINTS[family]
    toy_topk_coder(tmp_path / "plain", d=32, k=K, hookpoints=(plain,))
    toy_topk_coder(tmp_path / "inner", d=32, k=K, hookpoints=(inner,), transcode=True, seed=1)
    coders: dict[str, SparseCoder] = {
        "plain": ex.load_coder(str(tmp_path / "plain")),
        "inner": ex.load_coder(str(tmp_path / "inner")),
    }
    corpus = corpus_of(subject, tmp_path / "text")
    assert len(corpus) % 4  # the last batch is not full
    run = ex.collect(subject, coders, corpus, out=tmp_path / "run", batch_tokens=4 * LENGTH, sink_norm=0.0, threads=1)
    for name, coder in coders.items():
        expected = by_hand(subject, corpus, coder)
        store = run.store(name)
        dense = np.zeros((len(corpus), LENGTH, store.width), np.float32)
        for index, firings in enumerate(store.block(0, store.width)):
            assert (firings.values > 0).all()
            dense[firings.rows, firings.positions, index] = firings.values
        assert store.manifest.n_positions == len(expected) == int(corpus.rows(slice(None)).mask.sum())
        assert int((dense > 0).sum()) == store.manifest.n_firings <= K * len(expected)
        for row, position, pre in expected:
            kept = torch.from_numpy(dense[row, position])
            least = pre.topk(K).values[-1]
            slack = CLOSE * float(pre.max().clamp(min=1))
            assert bool((kept[pre > least + slack] > 0).all()), (family, name, row, position)
            assert bool((kept[pre < least - slack] == 0).all()), (family, name, row, position)
            fired = kept > 0
            torch.testing.assert_close(kept[fired], pre[fired], rtol=2**-10, atol=slack)
            dense[row, position] = 0
        assert not dense.any()  # nothing fires where nothing counts
