"""Reading in this process against one plain forward pass per text, on attention, recurrent and mixed families."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.errors import LLMError
from exegete.llm.prefixes import NOTHING, Prefixes, widened
from exegete.llm.reading_local import LocalReader, shared
from exegete.llm.spelling import Spelled
from exegete.subjects import Subject, load_subject
from exegete.testing import toy_llama, toy_subject_model

WAYS = {
    "llama": "at once",
    "gemma3_text": "at once",  # sliding windows shorter than the beginning
    "gpt2": "at once",
    "rwkv": "at once",
    "mamba2": "at once",
    "mamba": "at once",
    "jamba": "at once",
    "recurrent_gemma": "whole texts",  # keeps its state in its modules
}
STEM = "The quick brown fox jumps over the lazy dog. " * 3 + "A description of text:\n"
ENDS = (" the dog sleeps", "def add(first)", " 日 €20", "x", "\n\n  value = 12345")
GROUPS = [(f"{STEM}{z}\nTexts with this feature:\n", x) for z in ("dogs and foxes", "café") for x in ENDS]
LONE = [(f"{STEM}{text}", "and the fox runs away") for text in ("b", "brown hills ", "déjà", "3 + ")]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def made(family: str) -> Subject:
        return load_subject(str(toy_subject_model(family, tmp_path_factory.mktemp(family))), device="cpu")

    return made


def reader_of(subject: Subject, **options: Any) -> LocalReader:
    return LocalReader(
        subject.model, subject.tokenizer, name="toy", natural=True, table=subject.token_table(), **options
    )


def read(reader: LocalReader, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    return asyncio.run(reader.logprobs(pairs))


def plainly(subject: Subject, beginning: str, continuation: str) -> float:
    """BOS and the whole text in one pass; the characters of every token found by decoding the ids before it."""
    ids = subject.tokenizer(beginning + continuation)["input_ids"]
    table = subject.token_table()
    ends = list(itertools.accumulate(len(table.pieces[i]) for i in ids))
    assert ends[-1] == len((beginning + continuation).encode())
    with torch.inference_mode():
        logits = subject.model(input_ids=torch.tensor([[0, *ids]]), use_cache=False).logits[0].double()
    said = torch.log_softmax(logits, dim=-1)
    border = len(beginning.encode())
    return sum(said[i, token].item() for i, (token, end) in enumerate(zip(ids, ends, strict=True)) if end > border)


@pytest.mark.parametrize("family", WAYS)
def test_reading_equals_an_uncached_pass_over_each_whole_text(family: str, subjects: Any) -> None:
    subject = subjects(family)
    pairs = [*GROUPS, *LONE] * 2  # long groups, so that a beginning is worth a pass of its own
    reader = reader_of(subject, rows=3)
    found = read(reader, pairs)
    assert Prefixes(subject.model, subject.device).way == WAYS[family]
    for pair, nats in zip(pairs, found, strict=True):
        assert nats == pytest.approx(plainly(subject, *pair), abs=1e-4), pair


def test_beginnings_with_many_continuations_are_read_once(subjects: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, rows = subjects("llama"), []
    forward = subject.model.forward

    def counting(**options: Any) -> Any:
        rows.append(tuple(options["input_ids"].shape))
        return forward(**options)

    texts = [f" {a} {b}" for a in ("the", "dog", "fox", "hills") for b in range(10)]
    begun = [f"{STEM}{z}" + "\nTexts with this feature:\n" for z in ("dogs" * 20, "value" * 20)]
    pairs = [(before, text) for before in begun for text in texts]
    reader = reader_of(subject)
    read(reader, pairs[:2])  # the trial is over
    monkeypatch.setattr(subject.model, "forward", counting)
    found = read(reader, pairs)
    whole = sum(len(subject.tokenizer(before + text)["input_ids"]) for before, text in pairs)
    assert sum(math.prod(shape) for shape in rows) < whole / 8
    assert found[0] == pytest.approx(plainly(subject, *pairs[0]), abs=1e-4)
    assert found[-1] == pytest.approx(plainly(subject, *pairs[-1]), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "rwkv", "mamba", "jamba"])
def test_what_is_held_never_changes(family: str, subjects: Any) -> None:
    prefixes = Prefixes(subjects(family).model, torch.device("cpu"))
    held = prefixes.read(range(5, 20))
    before = tensors(widened(held.state, 1))
    tails = torch.arange(24).reshape(4, 6) + 30
    first = prefixes.logits(held, tails)
    longer = prefixes.read(range(5, 26), held)
    assert torch.equal(prefixes.logits(held, tails), first)
    assert longer.ids == tuple(range(5, 26))
    after = tensors(held.state)
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def tensors(value: Any) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value.clone()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for part in value for t in tensors(part)]
    return tensors(vars(value)) if type(value).__module__.startswith("transformers.") else []


def test_the_same_to_the_last_bit_whatever_was_read_before(subjects: Any) -> None:
    fresh, used = reader_of(subjects("llama")), reader_of(subjects("llama"))
    for some in (LONE, GROUPS[:5], [(STEM[:-20], " the"), (STEM, "fox")]):
        read(used, some)
    pairs = GROUPS * 3
    assert read(used, pairs) == read(fresh, pairs) == read(used, pairs)


def test_logits_after_nothing_and_from_a_later_position(subjects: Any) -> None:
    subject = subjects("llama")
    prefixes = Prefixes(subject.model, subject.device)
    rows = torch.arange(40).reshape(2, 20) + 3
    whole = prefixes.logits(NOTHING, rows)
    assert whole.shape == (2, 20, prefixes.size)
    for first in (1, 15):
        torch.testing.assert_close(prefixes.logits(NOTHING, rows, first=first), whole[:, first:])
    held = prefixes.read(rows[0, :8].tolist())
    torch.testing.assert_close(prefixes.logits(held, rows[:1, 8:], first=9), whole[:1, 17:], atol=1e-4, rtol=0)
    assert prefixes.read((), NOTHING) is NOTHING


def test_a_first_token_counts_after_bos_and_is_missing_without_one(subjects: Any, tmp_path: Path) -> None:
    subject = subjects("llama")
    found = read(reader_of(subject), [("", "The quick"), ("", ""), ("The", "")])
    assert found == [pytest.approx(plainly(subject, "", "The quick"), abs=1e-4), 0.0, 0.0]
    other = load_subject(str(toy_llama(tmp_path / "m")), device="cpu")
    other.tokenizer.bos_token = None
    missing, known = read(reader_of(other), [("", "The quick"), ("The", " quick")])
    assert missing is None
    assert known is not None


def test_a_text_longer_than_the_model_reads_is_missing_and_others_are_not(subjects: Any) -> None:
    subject = subjects("llama")
    found = read(reader_of(subject), [("The fox" * 300, " runs"), ("The fox", " runs")])
    assert found == [None, pytest.approx(plainly(subject, "The fox", " runs"), abs=1e-4)]


def test_half_floats_are_read_too(tmp_path: Path) -> None:
    subject = load_subject(str(toy_llama(tmp_path)), device="cpu", dtype="bfloat16")
    for pair, nats in zip(GROUPS, read(reader_of(subject), GROUPS), strict=True):
        assert nats == pytest.approx(plainly(subject, *pair), rel=0.02)


def test_a_model_that_breaks_is_an_llm_error_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_subject(str(toy_llama(tmp_path)), device="cpu")

    def broken(**_: Any) -> Any:
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(subject.model, "forward", broken)
    with pytest.raises(LLMError, match="toy cannot read text: no kernel"):
        read(reader_of(subject), GROUPS)


def test_out_of_memory_reads_in_halves_and_what_does_not_fit_alone_is_missing(
    subjects: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subjects("llama")
    reader, forward = reader_of(subject), subject.model.forward
    wanted = read(reader, GROUPS)

    def small(**options: Any) -> Any:
        rows, positions = options["input_ids"].shape
        if rows > 1 or positions > 60:
            raise torch.OutOfMemoryError("full")
        return forward(**options)

    monkeypatch.setattr(subject.model, "forward", small)
    assert read(reader, GROUPS) == [pytest.approx(nats, abs=1e-4) for nats in wanted]
    missing, known = read(reader, [("def add", " xyz" * 70), ("The fox", " runs")])
    assert missing is None
    assert known == pytest.approx(plainly(subject, "The fox", " runs"), abs=1e-4)


def test_logits_that_are_no_numbers_are_missing(tmp_path: Path) -> None:
    subject = load_subject(str(toy_llama(tmp_path)), device="cpu")
    with torch.no_grad():
        subject.model.get_output_embeddings().weight.fill_(math.nan)
    assert read(reader_of(subject), [("The", " fox"), ("The", "")]) == [None, 0.0]


def test_what_texts_share_stops_before_the_token_that_tells_of_the_first_counted() -> None:
    a, b, c = Spelled((1, 2, 3, 4, 5), 4), Spelled((1, 2, 3, 4, 6), 4), Spelled((1, 2, 9), 2)
    assert shared([a, b]) == (1, 2, 3)
    assert shared([a, b, c]) == (1,)
    assert shared([a]) == shared([]) == ()
    assert shared([Spelled((7, 8), 1), Spelled((7, 9), 1)]) == ()
    assert shared([Spelled((7, 8, 1), 2), Spelled((6, 8, 1), 2)]) == ()
