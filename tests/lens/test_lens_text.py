"""Which positions predict, how documents are split, and in which order rows are read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from exegete.api import load_corpus
from exegete.errors import InputError
from exegete.lens import LensText
from exegete.lens.text import Order, fixed_batches
from exegete.subjects import Subject


def test_a_position_predicts_when_the_next_token_is_text_of_the_same_document(llama: Subject, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"the cat {i} sat"}) + "\n" for i in range(30)))
    corpus = load_corpus(str(path), tokenizer=llama.tokenizer, row_length=24, packing=True, bos="document")
    text = LensText(corpus, duplicates=0)
    batch = text.batch(np.arange(corpus.n_rows), "all")
    rows = corpus.rows(slice(None))
    labels, documents, n = [], [], 0
    for r in range(corpus.n_rows):
        for t in range(23):
            counts = rows.tokens[r, t + 1] != 0 and rows.documents[r, t + 1] >= 0
            if counts and rows.documents[r, t] == rows.documents[r, t + 1]:
                assert batch.keep[r, t]
                labels.append(int(rows.tokens[r, t + 1]))
                documents.append(int(rows.documents[r, t]))
                n += 1
    assert int(batch.keep.sum()) == n == len(batch)
    assert batch.labels.tolist() == labels
    assert batch.documents.tolist() == documents


def test_parts_share_no_document_and_cover_all(llama_text: LensText) -> None:
    seen: dict[str, set[int]] = {}
    for part in ("train", "validation", "test"):
        batch = llama_text.batch(llama_text.rows(part), part)
        seen[part] = set(batch.documents.tolist())
        assert seen[part]
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]
    assert len(set.union(*seen.values())) == 40
    whole = llama_text.batch(llama_text.rows("all"), "all")
    assert len(whole) == sum(len(llama_text.batch(llama_text.rows(p), p)) for p in ("train", "validation", "test"))


def test_few_documents_are_split_by_rows(llama: Subject, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on a mat and then ran home ( 22 ) " * 60)
    text = LensText(load_corpus(str(tmp_path / "a.txt"), tokenizer=llama.tokenizer, row_length=16))
    rows = {part: set(text.rows(part).tolist()) for part in ("train", "validation", "test")}
    assert all(rows.values())
    assert not rows["train"] & rows["validation"]
    assert not rows["validation"] & rows["test"]
    assert max(abs(a - b) for a in rows["train"] for b in rows["validation"]) > 1
    assert min(abs(a - b) for a in rows["train"] for b in rows["validation"]) > 1


def test_the_order_reads_every_row_once_an_epoch_and_is_a_function_of_the_seed(llama_text: LensText) -> None:
    def read(seed: int) -> list[torch.Tensor]:
        order = Order(llama_text, "train", seed=seed, tokens=100)
        found = []
        while order.epoch == 0:
            found.append(order.next().labels)
        return found

    first, again, other = read(0), read(0), read(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [len(a) for a in first] != [len(b) for b in other] or not torch.equal(first[0], other[0])
    assert all(len(batch) >= 90 for batch in first[:-1])
    whole = Counter(llama_text.batch(llama_text.rows("train"), "train").labels.tolist())
    # The batch that ends the epoch also holds the first rows of the next one, up to the row that fills it.
    held = Counter(torch.cat(first).tolist())
    assert not whole - held
    assert (held - whole).total() < 100 + 32


def test_an_order_goes_on_from_two_numbers(llama_text: LensText) -> None:
    one, other = (Order(llama_text, "train", seed=4, tokens=64) for _ in range(2))
    for _ in range(9):
        one.next()
    other.epoch, other.place = one.epoch, one.place
    for _ in range(9):
        assert torch.equal(one.next().tokens, other.next().tokens)


def test_a_batch_larger_than_the_text_is_the_text(llama_text: LensText) -> None:
    order = Order(llama_text, "train", seed=0, tokens=10**6)
    whole = len(llama_text.batch(llama_text.rows("train"), "train"))
    assert [len(order.next()) for _ in range(3)] == [whole] * 3


def test_fixed_batches_read_all_or_a_drawn_piece(llama_text: LensText) -> None:
    whole = sum(len(b) for b in fixed_batches(llama_text, "test", seed=0, most=None, tokens=64))
    assert whole == len(llama_text.batch(llama_text.rows("test"), "test"))
    some = sum(len(b) for b in fixed_batches(llama_text, "test", seed=0, most=100, tokens=64))
    assert 90 <= some < whole


def test_pieces_of_a_batch_are_the_batch(llama_text: LensText) -> None:
    batch = llama_text.batch(llama_text.rows("train"), "train")
    parts = list(batch.pieces(64))
    assert len(parts) > 3
    assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
    assert np.concatenate([p.documents for p in parts]).tolist() == batch.documents.tolist()
    assert all(int(p.keep.sum()) == len(p) for p in parts)


def test_documents_packed_apart_are_refused(llama: Subject, lens_text_file: Path) -> None:
    text, names = str(lens_text_file), llama.tokenizer
    corpus = load_corpus(text, tokenizer=names, row_length=24, packing=True, attend="document")
    with pytest.raises(InputError, match="lenses read each row as a whole"):
        LensText(corpus)


def test_bad_shares_are_refused(llama_text: LensText) -> None:
    with pytest.raises(InputError, match="validation_share lies between 0 and 1"):
        LensText(llama_text.corpus, validation_share=1.0)
    with pytest.raises(InputError, match="one of train, validation, test, all"):
        llama_text.predictions("half")  # type: ignore[arg-type]


def test_all_of_a_text_too_short_to_split_can_be_measured(llama: Subject, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat")
    text = LensText(load_corpus(str(tmp_path / "a.txt"), tokenizer=llama.tokenizer, row_length=16))
    assert len(text.batch(text.rows("all"), "all")) > 2
    with pytest.raises(InputError, match="give more text"):
        text.rows("test")
