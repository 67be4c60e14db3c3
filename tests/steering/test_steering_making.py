"""Vectors of a subject: what is recorded, and what is made of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exegete.errors import CorruptError, ExegeteError, InputError, MismatchError, NotFoundError
from exegete.steering import (
    Made,
    Pair,
    Row,
    SteeringVector,
    behaviour_vector,
    load_vector,
    pair_vector,
    save_vector,
)
from exegete.steering import making as making_module
from exegete.steering.questions import label_contrasts, text_contrasts
from exegete.steering.templates import template_of
from exegete.subjects import Subject, load_subject
from exegete.subjects.recurrent_state import StateVector
from exegete.subjects.running import Running
from exegete.subjects.sites import residuals
from exegete.testing import TEXTS, toy_subject_model

PAIRS = [
    Pair(positive="yes it is big", negative="no it is not"),
    Pair(positive="Is it big? yes", negative="Is it big? no it is not"),
    Pair(positive="4 is big", negative="5 is not"),
]


@pytest.fixture(scope="module")
def made(mamba: Subject, rows: list[Row]) -> Made:
    return behaviour_vector(mamba, rows, sites=(-1, 0, 1, 2), state=True, source="rows")


def one_by_one(subject: Subject, tokens: tuple[int, ...], site: int) -> torch.Tensor:
    return residuals(subject, torch.tensor([tokens]), [site])[site][0]


def test_a_mean_difference_is_what_single_passes_give(mamba: Subject, rows: list[Row], made: Made) -> None:
    contrasts = label_contrasts(rows, template_of("plain"), mamba.tokenizer)
    for site in (-1, 0, 2):
        each = [one_by_one(mamba, c.positive, site)[-1] - one_by_one(mamba, c.negative, site)[-1] for c in contrasts]
        torch.testing.assert_close(made.vector.residual[site], torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)
    states = [[Running.start(mamba, torch.tensor([t])).state() for t in (c.positive, c.negative)] for c in contrasts]
    for name in ("conv", "ssm"):
        each = [p[1][name][0] - n[1][name][0] for p, n in states]
        torch.testing.assert_close(made.vector.state.parts[1][name], torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


def test_the_letter_vector_goes_from_b_to_a(rows: list[Row], made: Made, mamba: Subject) -> None:
    contrasts = label_contrasts(rows, template_of("plain"), mamba.tokenizer)
    each = [
        (1 if c.first else -1) * (one_by_one(mamba, c.positive, 1)[-1] - one_by_one(mamba, c.negative, 1)[-1])
        for c in contrasts
    ]
    assert made.letters is not None
    torch.testing.assert_close(made.letters.residual[1], torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)
    assert made.letters.about.method == "letters"
    assert made.letters.centres.keys() == made.vector.centres.keys()
    both = [one_by_one(mamba, tokens, 1)[-1] for c in contrasts for tokens in (c.positive, c.negative)]
    torch.testing.assert_close(made.letters.centres[1], torch.stack(both).mean(0), rtol=1e-4, atol=1e-6)


def test_other_tokens_are_read_where_they_are_asked_for(llama: Subject) -> None:
    contrasts = text_contrasts(PAIRS, llama.tokenizer)
    for rule in ("0", "-2", "answer"):
        vector = pair_vector(llama, PAIRS, sites=(1,), read=rule)
        each = []
        for c in contrasts:
            both = []
            for tokens in (c.positive, c.negative):
                h = one_by_one(llama, tokens, 1)
                both.append(h[c.shared :].mean(0) if rule == "answer" else h[int(rule)])
            each.append(both[0] - both[1])
        torch.testing.assert_close(vector.residual[1], torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)
    after = pair_vector(llama, PAIRS[:1], sites=(1,), read="after it is")
    own, other = (one_by_one(llama, t, 1)[2] for t in (contrasts[0].positive, contrasts[0].negative))
    torch.testing.assert_close(after.residual[1], own - other, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"pair 3, positive: a text has no 'it is' to read after"):
        pair_vector(llama, [*PAIRS[:1] * 2, PAIRS[2]], read="after it is")


def test_state_and_residual_come_from_one_pass_and_agree_with_the_residual_alone(
    mamba: Subject, rows: list[Row], made: Made
) -> None:
    alone = behaviour_vector(mamba, rows, sites=(-1, 0, 1, 2)).vector
    for site in alone.sites:
        torch.testing.assert_close(alone.residual[site], made.vector.residual[site], rtol=1e-4, atol=1e-6)
    assert alone.components == ()


def test_lengths_are_normalised_and_written_down(llama: Subject, rows: list[Row], made: Made) -> None:
    plain = behaviour_vector(llama, rows, sites=(0, 2)).vector
    unit = behaviour_vector(llama, rows, sites=(0, 2), normalise="unit").vector
    rms = behaviour_vector(llama, rows, sites=(0, 2), normalise="rms").vector
    contrasts = label_contrasts(rows, template_of("plain"), llama.tokenizer)
    read = [one_by_one(llama, t, 2)[-1] for c in contrasts for t in (c.positive, c.negative)]
    size = math.sqrt(float(torch.stack(read).square().sum(1).mean()))
    length = float(plain.residual[2].norm())
    assert float(unit.residual[2].norm()) == pytest.approx(1, abs=1e-5)
    assert float(rms.residual[2].norm()) == pytest.approx(size, rel=1e-4)
    torch.testing.assert_close(unit.residual[2] * length, plain.residual[2], rtol=1e-4, atol=1e-6)
    for vector in (plain, unit, rms):
        assert vector.about.norms["residual.2"] == pytest.approx(length, rel=1e-5)
        torch.testing.assert_close(vector.centres[2], torch.stack(read).mean(0), rtol=1e-4, atol=1e-5)
    assert made.vector.about.norms["state.1.ssm"] == pytest.approx(made.vector.state.norm(1, "ssm"), rel=1e-5)


@pytest.mark.parametrize("method", ["lda", "logistic", "pca-diff", "pca-center"])
def test_other_methods_work_on_states_too(mamba: Subject, rows: list[Row], method: Any) -> None:
    found = behaviour_vector(mamba, rows, sites=(1,), state=["ssm"], method=method).vector
    assert found.components == ("ssm",)
    assert found.state.layers == (0, 1, 2)
    assert found.state.parts[2]["ssm"].shape == (64, 8)
    if method.startswith("pca"):
        assert found.state.norm(2) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_made_is_refused(
    llama: Subject, mamba: Subject, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: type[ExegeteError], message: str, subject: Subject = mamba, **options: Any) -> None:
        with pytest.raises(kind, match=message) as caught:
            behaviour_vector(subject, options.pop("rows", rows), **options)
        assert "\n" not in str(caught.value)

    refused(InputError, "no pairs", rows=[])
    leaning = [r for r in rows if r.match == "A"]
    refused(InputError, r"8 of 8 rows match with \(A\), so their vector is mostly the letter's", rows=leaning)
    assert behaviour_vector(mamba, leaning, sites=(0,), unbalanced=True).vector.about.n_pairs == 8
    refused(InputError, "carries no recurrent state", subject=llama, state=True)
    refused(NotFoundError, "unknown state component 'sm'; did you mean ssm", state=["sm"])
    refused(NotFoundError, "unknown method", method="median")
    refused(InputError, "penalty of a logistic regression", method="logistic", penalty=0.0, sites=(0,))
    with pytest.raises(TypeError, match="unexpected keyword"):
        behaviour_vector(mamba, rows, statee=True)  # type: ignore[call-arg]
    refused(NotFoundError, "sites -1 .* to 2, got 7", sites=(7,))
    same = Row(question="(A) or (B)", match="A", other="B")
    refused(
        InputError, "the part residual.0 of the vector is zero", rows=[same], sites=(0,), normalise="unit", read="0"
    )
    monkeypatch.setattr(making_module, "MOST_BYTES", 1000)
    refused(InputError, "keeps every text's activations", method="lda")
    monkeypatch.setattr(making_module, "record", pytest.fail)  # what follows is found before any text is read
    refused(InputError, "auto or a number from 0 to 1, got 2", shrinkage=2)
    refused(InputError, "auto or a number from 0 to 1, got x", shrinkage="x")
    refused(InputError, "a number above 0, got nan", penalty=float("nan"))
    refused(InputError, "none, unit or rms", normalise="big")


def test_a_vector_is_written_and_read(made: Made, mamba: Subject, tmp_path: Path) -> None:
    file = save_vector(made.vector, tmp_path / "v.safetensors")
    found = load_vector(file, mamba)
    assert found.hash == made.vector.hash
    assert found.about == dataclasses.replace(made.vector.about, norms=found.about.norms)
    for (name, part), (other, kept) in zip(made.vector.parts(), found.parts(), strict=True):
        assert name == other
        assert torch.equal(part, kept)
    said = json.loads((tmp_path / "v.json").read_text())
    assert (said["method"], said["n_pairs"], said["d"], said["read"]) == ("mean", 12, 32, "last")
    assert said["model_hash"] == mamba.hash


@pytest.mark.parametrize("method", ["mean", "pca-diff"])
def test_a_state_in_float64_is_kept_so(rows: list[Row], tmp_path: Path, method: Any) -> None:
    subject = load_subject(str(toy_subject_model("rwkv", tmp_path / "toy", texts=TEXTS)), device="cpu")
    made = behaviour_vector(subject, rows, sites=(0,), state=["num", "att_shift"], method=method)
    contrasts = label_contrasts(rows, template_of("plain"), subject.tokenizer)
    states = [[Running.start(subject, torch.tensor([t])).state() for t in (c.positive, c.negative)] for c in contrasts]
    assert made.letters is not None
    for vector in (made.vector, made.letters):
        found = load_vector(save_vector(vector, tmp_path / "v.safetensors"), subject)
        kinds = {name: part.dtype for name, part in found.parts()}
        assert kinds["residual.0"] == kinds["state.1.att_shift"] == torch.float32
        assert kinds["state.1.num"] == torch.float64
        for (_, part), (_, kept) in zip(vector.parts(), found.parts(), strict=True):
            assert torch.equal(part, kept)
    if method == "mean":
        each = torch.stack([p[1]["num"][0] - n[1]["num"][0] for p, n in states]).mean(0)
        torch.testing.assert_close(made.vector.state.parts[1]["num"], each, rtol=1e-4, atol=1e-6)
        single = StateVector({1: {"num": made.vector.state.parts[1]["num"].float()}})  # as was written before
        older = dataclasses.replace(made.vector, state=single)
        assert load_vector(save_vector(older, tmp_path / "o.safetensors"), subject).hash == older.hash


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_vector_of_fewer_bits_is_kept_by_its_values(made: Made, tmp_path: Path, kind: torch.dtype) -> None:
    state = StateVector({1: {"ssm": made.vector.state.parts[1]["ssm"].to(kind)}})
    halves = {site: part.to(kind) for site, part in made.vector.residual.items()}
    given = SteeringVector(residual=halves, state=state, about=made.vector.about)
    assert {part.dtype for _, part in given.parts()} == {torch.float32}
    exact = SteeringVector(
        residual={site: part.float() for site, part in halves.items()},
        state=StateVector({1: {"ssm": state.parts[1]["ssm"].float()}}),
        about=made.vector.about,
    )
    file = save_vector(given, tmp_path / "v.safetensors")
    assert load_vector(file).hash == given.hash == exact.hash

    def rewritten() -> None:
        save_file({name: part.to(kind) for name, part in load_file(file).items()}, file)

    rewritten()  # by hand: the values are the same in fewer bits, so the vector is
    assert load_vector(file).hash == given.hash
    save_vector(made.vector, file)
    rewritten()  # here they are rounded: another vector than the .json tells of
    name = str(kind).removeprefix("torch.")
    with pytest.raises(CorruptError, match=f"hash differs .*those in {name} are rounded") as caught:
        load_vector(file)
    assert "\n" not in str(caught.value)


def test_a_vector_of_another_model_is_refused(made: Made, llama: Subject, mamba: Subject, tmp_path: Path) -> None:
    file = save_vector(made.vector.only(mode="residual"), tmp_path / "v.safetensors")
    with pytest.raises(MismatchError, match=r"made on .* not on .* other_model=True"):
        load_vector(file, llama)
    assert load_vector(file, llama, other_model=True).about.model_hash == ""
    about = dataclasses.replace(made.vector.about, d=48)
    wide = SteeringVector(residual={0: torch.ones(48)}, about=about)
    save_vector(wide, file)
    for options in ({}, {"other_model": True}):
        with pytest.raises(MismatchError, match=r"of 48 dimensions, .* has 32"):
            load_vector(file, mamba, **options)


def test_damaged_files_are_refused(made: Made, tmp_path: Path) -> None:
    file = save_vector(made.vector, tmp_path / "v.safetensors")
    beside = tmp_path / "v.json"
    said = json.loads(beside.read_text())
    for changed, kind, message in (
        ({**said, "hash": "0" * 16}, CorruptError, "do not belong together"),
        ({**said, "format": 9}, InputError, "format 9"),
        ({**said, "kind": "lens"}, CorruptError, "is not of a steering vector"),
        ({**said, "d": "big"}, CorruptError, "d is missing or no int"),
        ({**said, "d": 31}, CorruptError, "31 dimensions"),
        ({**said, "norms": {"a": "b"}}, CorruptError, "norms"),
        ({**said, "options": {"a": []}}, CorruptError, "options are numbers and words"),
    ):
        beside.write_text(json.dumps(changed))
        with pytest.raises(kind, match=message):
            load_vector(file)
    beside.write_text(json.dumps(said))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CorruptError, match="damaged"):
        load_vector(file)
    beside.unlink()
    with pytest.raises(NotFoundError):
        load_vector(file)
    with pytest.raises(NotFoundError):
        load_vector(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"ends in .safetensors"):
        load_vector(tmp_path / "v.pt")


def test_random_vectors_are_as_long_and_others(made: Made) -> None:
    one, two = (made.vector.random_like(np.random.default_rng(seed)) for seed in (0, 1))
    assert made.vector.random_like(np.random.default_rng(0)).hash == one.hash != two.hash
    for (name, part), (_, drawn) in zip(made.vector.parts(), one.parts(), strict=True):
        assert float(drawn.norm()) == pytest.approx(float(part.norm()), rel=1e-5), name
    scaled = two.as_long_as(SteeringVector(residual={1: torch.full((32,), 2.0)}, about=two.about))
    assert scaled.sites == (1,)
    assert float(scaled.residual[1].norm()) == pytest.approx(2 * 32**0.5, rel=1e-5)


def test_parts_are_chosen(made: Made) -> None:
    assert made.vector.only(sites=(1,)).sites == (1,)
    assert made.vector.only(sites=(1,)).state.layers == (1,)
    assert made.vector.only(mode="residual").components == ()
    assert made.vector.only(mode="state", components=("ssm",)).components == ("ssm",)
    assert made.vector.only(sites=(-1,)).state.parts == {}
    with pytest.raises(NotFoundError, match="nothing at site 9; it has the sites -1, 0, 1, 2"):
        made.vector.only(sites=(9,))
    residual, state = made.vector.only(mode="residual"), made.vector.only(mode="state")
    for held, sites, mode, message in (
        (
            made.vector,
            (-1,),
            "state",
            "no state part at site -1; it has a residual part at site -1, 0, 1, 2 and a state",
        ),
        (residual, None, "state", "no state part; it has a residual part at site -1, 0, 1, 2$"),
        (state, (1,), "residual", "no residual part at site 1; it has a state part at site 0, 1, 2$"),
    ):
        with pytest.raises(InputError, match=message):
            held.only(sites=sites, mode=mode)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no ssm to choose: the vector has no state part; it has a residual part"):
        residual.only(components=("ssm",))
    with pytest.raises(InputError, match="this has none"):
        SteeringVector(residual={}, about=made.vector.about)
    with pytest.raises(InputError, match="NaN"):
        SteeringVector(residual={0: torch.full((32,), math.nan)}, about=made.vector.about)
    with pytest.raises(InputError, match="NaN"):
        SteeringVector(residual={}, state=StateVector({0: {"ssm": torch.tensor(math.inf)}}), about=made.vector.about)
