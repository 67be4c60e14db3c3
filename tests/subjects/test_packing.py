"""Rows that hold several documents: each is read as if it stood alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.errors import InputError, MismatchError
from exegete.subjects import Subject, load_subject
from exegete.subjects.packing import is_packed, runs
from exegete.testing import toy_model, toy_subject_model, toy_tokenizer

FAMILIES = ("llama", "gpt_neox", "gpt2", "gemma2", "mistral", "gemma3_text", "qwen3", "opt", "qwen3_moe")
_LOADED: dict[str, Subject] = {}


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return loaded(request.param, tmp_path_factory)


def loaded(family: str, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    if family not in _LOADED:
        folder = toy_subject_model(family, tmp_path_factory.mktemp("models") / family)
        _LOADED[family] = load_subject(str(folder), device="cpu")
    return _LOADED[family]


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 400, (rows, length), generator=torch.Generator().manual_seed(1))


def last(subject: Subject) -> Any:
    return subject.points("blocks.*.hook_resid_post")[-1]


def alone(subject: Subject, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """What each document gives in a row of its own, put back in its place; zero at padding."""
    point = last(subject)
    parts = []
    for row, owners in zip(ids, documents, strict=True):
        for owner in dict.fromkeys(owners.tolist()):
            part = row[owners == owner][None]
            value = subject.capture(part, None, [point])[point][0]
            parts.append(value if owner >= 0 else torch.zeros_like(value))
    return torch.cat(parts).reshape(*ids.shape, -1)


def check(subject: Subject, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    point = last(subject)
    value = subject.capture(ids, (documents >= 0).long(), [point], documents)[point]
    assert torch.isfinite(value).all()
    counted = documents >= 0
    torch.testing.assert_close(value[counted], alone(subject, ids, documents)[counted], rtol=1e-5, atol=1e-5)
    return value


DOCUMENTS = torch.tensor([[3] * 3 + [4] * 7 + [7, -1], [5] * 9 + [6] * 3, [8] * 12, [9] * 6 + [-1] * 6])


def test_packed_equals_alone(subject: Subject) -> None:
    ids, point = tokens(4, 12), last(subject)
    value = check(subject, ids, DOCUMENTS)
    whole = subject.capture(ids, None, [point])[point]
    assert not torch.allclose(value[0, 3:10], whole[0, 3:10], atol=1e-2)  # else this test would see nothing
    torch.testing.assert_close(value[2], whole[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(value, subject.capture(ids, None, [point], DOCUMENTS)[point])


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(f, i) for f in ("llama", "mistral", "gemma2", "gpt2") for i in ("sdpa", "eager") if (f, i) != ("gemma2", "sdpa")],
)
def test_the_hooks_alone_keep_documents_apart(
    family: str,
    implementation: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without transformers guessing from positions that a row is packed, in both forms of masks."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    subject = loaded(family, tmp_path_factory)
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation(implementation)
    try:
        check(subject, tokens(4, 12), DOCUMENTS)
    finally:
        subject.model.set_attn_implementation(before)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), padding=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_any_packing(lengths: list[int], padding: int) -> None:
    subject = _LOADED["gemma2"]
    owners = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    check(subject, tokens(1, len(owners)), torch.tensor([owners]))


def test_hooks_are_gone_afterwards(subject: Subject) -> None:
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())
    subject.capture(tokens(4, 12), None, [last(subject)], DOCUMENTS)
    with pytest.raises(InputError):
        subject.capture(tokens(4, 12), None, [(subject.hookpoints()[0], "input")], DOCUMENTS)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules()) == count


def test_bfloat16(tmp_path: Path) -> None:
    subject = load_subject(str(toy_subject_model("gemma2", tmp_path / "g")), device="cpu", dtype="bfloat16")
    point = last(subject)
    value = subject.capture(tokens(4, 12), None, [point], DOCUMENTS)[point]
    expected = alone(subject, tokens(4, 12), DOCUMENTS)
    error = (value - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert float(error[DOCUMENTS >= 0].max()) < 0.05


@pytest.mark.parametrize("family", ["mamba", "rwkv", "xlstm", "recurrent_gemma", "jamba", "lfm2"])
def test_recurrent_subjects_refuse_packed_rows(family: str, tmp_path: Path) -> None:
    subject = load_subject(str(toy_subject_model(family, tmp_path / family)), device="cpu")
    ids, point = tokens(4, 12), last(subject)
    with pytest.raises(MismatchError, match=r"carries a state.*corpus\.attend: row.*packing: false") as refused:
        subject.capture(ids, None, [point], DOCUMENTS)
    assert "\n" not in str(refused.value)
    one = DOCUMENTS[2:]  # one document per row is no packing
    value = subject.capture(ids[2:], None, [point], one)[point]
    torch.testing.assert_close(value[0], subject.capture(ids[2:3], None, [point])[point][0], rtol=1e-4, atol=1e-5)


def test_models_that_cannot_keep_documents_apart(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = loaded("llama", tmp_path_factory)
    fresh = Subject(llama.model, llama.tokenizer, name="leaky")
    with monkeypatch.context() as patch:  # as in a model whose layers pay no heed to the mask they are given
        patch.setattr("exegete.subjects.packing._Narrowed.__call__", lambda self, mask, hidden: None)
        with pytest.raises(MismatchError, match=r"cannot be kept apart in leaky; set corpus\.attend: row"):
            fresh.capture(tokens(4, 12), None, [last(fresh)], DOCUMENTS)
    other = Subject(llama.model, llama.tokenizer, name="other")
    assert not other.recurrent
    monkeypatch.setattr(llama.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(InputError, match="attention 'flash_attention_2' cannot be kept within documents"):
        other.capture(tokens(4, 12), None, [last(other)], DOCUMENTS)


def test_documents_of_another_shape(tmp_path_factory: pytest.TempPathFactory) -> None:
    subject = loaded("llama", tmp_path_factory)
    with pytest.raises(InputError, match=r"tokens \(4, 12\) and documents \(3, 12\) differ in shape"):
        subject.capture(tokens(4, 12), None, [last(subject)], DOCUMENTS[:3])


def test_runs() -> None:
    run, place = runs(torch.tensor([[3, 3, 4, -1, 4, 4], [-1, -1, 2, 2, 2, 2]]))
    assert run.tolist() == [[0, 0, 1, 2, 3, 3], [0, 0, 1, 1, 1, 1]]
    assert place.tolist() == [[0, 1, 0, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert is_packed(torch.tensor([[1, 2]]))
    assert is_packed(torch.tensor([[-1, 2]]))  # not at the row's first position, so positions differ
    assert not is_packed(torch.tensor([[1, 1], [2, -1]]))


def test_a_randomised_subject_packs_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    from exegete.subjects import randomised

    check(randomised(loaded("gpt2", tmp_path_factory), 3), tokens(4, 12), DOCUMENTS)


def test_a_model_of_one_layer() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=400
    )
    check(Subject(toy_model(config), toy_tokenizer(), name="one"), tokens(4, 12), DOCUMENTS)
