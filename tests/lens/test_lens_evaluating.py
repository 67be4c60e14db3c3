"""Metrics against direct computation, intervals against the library's own, and the published tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import InputError, MismatchError
from exegete.lens import (
    Evaluation,
    LensText,
    LogitLens,
    TunedLens,
    compared,
    evaluate_lenses,
    new_lens,
    published_tables,
)
from exegete.lens.intervals import clustered_mean
from exegete.lens.pictures import curves_svg, transfer_svg
from exegete.lens.published import at_fractions
from exegete.lens.report import evaluation_lines
from exegete.metrics.clustered import Mean
from exegete.subjects import Subject
from exegete.subjects.sites import residuals

Make = Callable[..., TunedLens]


@pytest.fixture(scope="module")
def found(trained: Make, llama: Subject, llama_text: LensText) -> Evaluation:
    lenses = {"logit": LogitLens(llama), "tuned": trained(llama)}
    return evaluate_lenses(lenses, llama_text, part="test", transfer=True)


def test_every_metric_is_what_its_formula_says(
    trained: Make, found: Evaluation, llama: Subject, llama_text: LensText
) -> None:
    batch = llama_text.batch(llama_text.rows("test"), "test")
    with torch.no_grad():
        p = llama.model(batch.tokens).logits[batch.keep].double().log_softmax(-1)
        lens = trained(llama)
        q = lens.logits(0, residuals(llama, batch.tokens, (0,))[0][batch.keep]).double().log_softmax(-1)
    each = torch.arange(len(batch))
    want = {
        "ce": -q[each, batch.labels],
        "kl": (p.exp() * (p - q)).sum(-1),
        "entropy": -(q.exp() * q).sum(-1),
    }
    for metric, values in want.items():
        one = found.nats["tuned"][metric][0]
        mean = Mean.of(values.numpy(), batch.documents)
        assert mean is not None
        assert one.value == pytest.approx(mean.value, rel=1e-5)
        assert one.high - one.value == pytest.approx(mean.half, rel=1e-4)
        assert (one.n, one.n_documents) == (len(batch), len(set(batch.documents.tolist())))
    assert found.baseline["ce"].value == pytest.approx(float(-p[each, batch.labels].mean()), rel=1e-5)


def test_bits_per_byte_are_nats_times_tokens_over_bytes_over_ln_2(found: Evaluation, llama_text: LensText) -> None:
    batch = llama_text.batch(llama_text.rows("test"), "test")
    n_bytes = sum(len(llama_text.corpus.table.pieces[t]) for t in batch.labels.tolist())
    assert (found.n_tokens, found.n_bytes) == (len(batch), n_bytes)
    row = next(r for r in found.rows() if (r["lens"], r["metric"], r["site"]) == ("logit", "kl", 1))
    assert row["bits_per_byte"] == pytest.approx(row["nats_per_token"] * len(batch) / n_bytes / math.log(2))


def test_differences_are_paired(found: Evaluation) -> None:
    for metric in ("ce", "kl", "entropy"):
        for site in found.sites:
            a, b = found.nats["logit"][metric][site], found.nats["tuned"][metric][site]
            assert found.differences["tuned"][metric][site].value == pytest.approx(b.value - a.value, abs=1e-9)


def test_the_transfer_matrix(trained: Make, found: Evaluation, llama: Subject, llama_text: LensText) -> None:
    ce, kl = found.transfer["tuned"]["ce"], found.transfer["tuned"]["kl"]
    for k, site in enumerate(found.sites):
        assert ce[k, k] == pytest.approx(found.nats["tuned"]["ce"][site].value, rel=1e-6)
        assert kl[k, k] == 0
    batch = llama_text.batch(llama_text.rows("test"), "test")
    lens = trained(llama)
    with torch.no_grad():
        h = residuals(llama, batch.tokens, (1,))[1][batch.keep]
        own = lens.logits(1, h).double().log_softmax(-1)
        other = lens.logits(-1, h).double().log_softmax(-1)  # the lens of the embedding on the stream of site 1
    assert ce[0, 2] == pytest.approx(float(-other[torch.arange(len(batch)), batch.labels].mean()), rel=1e-5)
    assert kl[0, 2] == pytest.approx(float((own.exp() * (own - other)).sum(-1).mean()), rel=1e-5)
    assert set(found.transfer) == {"tuned"}  # the logit lens is the same at every site


def test_an_untrained_lens_differs_by_nothing(llama: Subject, llama_text: LensText) -> None:
    lenses = {"logit": LogitLens(llama), "tuned": new_lens(llama)}
    found = evaluate_lenses(lenses, llama_text, part="all", sites=(0, 1))
    assert all(one.value == one.low == 0 for by in found.differences["tuned"].values() for one in by.values())


def test_fewer_tokens_and_parts(llama: Subject, llama_text: LensText) -> None:
    some = evaluate_lenses({"logit": LogitLens(llama)}, llama_text, part="train", tokens=120, seed=3)
    assert 100 <= some.n_tokens < len(llama_text.batch(llama_text.rows("train"), "train"))
    assert 2 not in some.sites


def test_lenses_of_two_subjects_or_none_are_refused(llama: Subject, other_llama: Subject, llama_text: LensText) -> None:
    with pytest.raises(MismatchError, match="of several subjects"):
        evaluate_lenses({"a": LogitLens(llama), "b": LogitLens(other_llama)}, llama_text)
    with pytest.raises(InputError, match="at least one lens"):
        evaluate_lenses({}, llama_text)
    with pytest.raises(InputError, match="no site in common"):
        evaluate_lenses({"a": new_lens(llama, (0,)), "b": new_lens(llama, (1,))}, llama_text)


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(-5, 5)), min_size=3, max_size=60))
def test_intervals_of_sums_are_those_of_values(pairs: list[tuple[int, float]]) -> None:
    documents, values = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    known, place = np.unique(documents, return_inverse=True)
    one = clustered_mean(np.bincount(place, weights=values), np.bincount(place).astype(float))
    mean = Mean.of(values, documents)
    assert mean is not None
    assert one.value == pytest.approx(mean.value, abs=1e-9)
    assert one.n_documents == len(known)
    if math.isinf(mean.half):
        assert math.isinf(one.high)
    else:
        assert one.high - one.value == pytest.approx(mean.half, rel=1e-6, abs=1e-7)


def test_plain_data_holds_no_nan(found: Evaluation) -> None:
    assert len(found.rows()) == 2 * 3 * 3 + 2
    json.loads(json.dumps(found.to_json(), allow_nan=False))


def test_tables_and_pictures(found: Evaluation) -> None:
    text = "\n".join(evaluation_lines(found))
    assert "KL to the model" in text
    assert "tuned: KL at most that of logit at" in text
    for metric in ("ce", "kl", "entropy"):
        assert curves_svg(found, metric).count("<circle") == 6
    assert transfer_svg(found, "tuned", "kl").count("<rect x") == 9 + 32


def test_the_published_tables() -> None:
    data = published_tables()
    assert len(data["models"]) == 15
    largest = next(m for m in data["models"] if (m["family"], m["size"]) == ("mamba", "2.8b"))
    assert (largest["tuned_ce"][0], largest["tuned_ce"][8], largest["model_ce"]) == (8.913, 0.703, 0.670)
    assert (largest["logit_ce"][0], largest["tuned_kl"][2], largest["entries"]) == (45.6, 1.854, 63)
    assert (largest["tuned_mean_kl"], largest["logit_mean_ce"]) == (2.55, 11.37)
    assert not any(m["size"] == "160m" and m["family"] == "mamba" for m in data["models"])


def test_a_run_stands_beside_the_published_tables(found: Evaluation) -> None:
    lines = compared(found, family="mamba")
    own = [line for line in lines if line.startswith("this run")]
    assert len(own) == 4
    by = found.bits_per_byte
    values = [one.value * by for one in found.nats["tuned"]["ce"].values()]
    assert own[0].split()[3:] == [f"{v:.3f}" for v in at_fractions(values, [i / 8 for i in range(9)])]
    assert any("worse than the logit lens" in line for line in lines)
    assert not any(line.startswith("pythia 160m") for line in lines)


def test_values_are_read_off_between_sites() -> None:
    assert at_fractions([4.0, 2.0, 1.0], [0, 0.25, 0.5, 0.75, 1]) == [4, 3, 2, 1.5, 1]
    assert at_fractions([7.0], [0, 0.5, 1]) == [7, 7, 7]
    assert math.isnan(at_fractions([], [0.5])[0])


def test_no_interval_reaches_below_what_a_value_can_be() -> None:
    sums, sizes = np.array([1.0, 90.0]), np.array([10.0, 10.0])
    free, kept = clustered_mean(sums, sizes), clustered_mean(sums, sizes, least=0.0)
    assert free.low < 0.0 == kept.low
    assert (kept.value, kept.high) == (free.value, free.high)
    alone = clustered_mean(np.array([3.0]), np.array([2.0]), least=0.0)
    assert (alone.low, alone.value, alone.high) == (0.0, 1.5, np.inf)
    assert clustered_mean(-1e-12 * sizes, sizes, least=0.0).low == pytest.approx(-1e-12)
