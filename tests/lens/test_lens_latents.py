"""Tokens that latents promote and suppress."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import exegete as ex
from exegete.coders.coder import SparseCoder
from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.lens import LogitLens, TunedLens, latent_tokens
from exegete.lens.labels import label_run
from exegete.lens.latents import direction_logits, site_of
from exegete.runs import Run
from exegete.subjects import Subject

Make = Callable[..., TunedLens]


@pytest.fixture(scope="module")
def coder(toy_folder: Path) -> SparseCoder:
    return ex.load_coder(str(toy_folder / "coders:layers.0"))


@pytest.fixture(scope="module")
def subject(toy_folder: Path) -> Subject:
    return ex.load_subject(str(toy_folder / "model"), device="cpu")


@pytest.fixture(scope="module")
def run(toy_folder: Path, subject: Subject, coder: SparseCoder, tmp_path_factory: pytest.TempPathFactory) -> Run:
    corpus = ex.load_corpus(str(toy_folder / "text.jsonl"), tokenizer=subject.tokenizer, row_length=64, max_tokens=1000)
    return ex.collect(subject, {"res": coder}, corpus, out=tmp_path_factory.mktemp("lens-run"))


def test_a_direction_is_read_through_norm_gain_and_unembedding(trained: Make, llama: Subject) -> None:
    v = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    weights = {name: value.double() for name, value in llama.model.state_dict().items()}
    unit = v.double() / v.double().square().mean(-1, keepdim=True).sqrt()
    want = (unit * weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    torch.testing.assert_close(direction_logits(LogitLens(llama), 0, v).double(), want, rtol=1e-4, atol=1e-4)
    lens = trained(llama)
    moved = v + v @ lens.translators[0].weight.detach().T
    torch.testing.assert_close(
        direction_logits(lens, 0, v), direction_logits(LogitLens(llama), 0, moved), rtol=1e-4, atol=1e-4
    )
    assert not direction_logits(LogitLens(llama), 0, torch.zeros(1, 16)).any()


def test_promoted_are_the_highest_and_suppressed_the_lowest(subject: Subject, coder: SparseCoder) -> None:
    lens = LogitLens(subject)
    (found,) = latent_tokens(lens, coder, [5], k=3)
    logits = direction_logits(lens, 0, coder.decoder_rows(torch.tensor([5])).float())[0]
    order = np.argsort(-logits.numpy(), kind="stable").tolist()
    assert [token for token, _ in found.promoted] == order[:3]
    assert [token for token, _ in found.suppressed] == order[::-1][:3]
    assert found.site == 0


def test_the_site_of_a_coder(subject: Subject, coder: SparseCoder) -> None:
    assert site_of(subject, coder) == 0
    assert site_of(subject, coder.placed(point=("layers.1.mlp", "output"), target=("layers.1.mlp", "output"))) == 1
    assert site_of(subject, coder.placed(point=("layers.1", "input"), target=("layers.1", "input"))) == 0
    assert site_of(subject, coder.placed(point=("layers.0", "input"), target=("layers.0", "input"))) == -1
    with pytest.raises(InputError, match="in no block"):
        site_of(subject, coder.placed(point=("embed_tokens", "output"), target=("embed_tokens", "output")))


def test_what_cannot_be_read_is_refused(llama: Subject, subject: Subject, coder: SparseCoder) -> None:
    with pytest.raises(MismatchError, match="writes 32 dimensions, the residual stream has 16"):
        latent_tokens(LogitLens(llama), coder, [0])
    with pytest.raises(InputError, match="latents 0 to 63, got 64"):
        latent_tokens(LogitLens(subject), coder, [64])


def test_controls_go_by_their_own_names_and_are_not_among_all(
    run: Run, subject: Subject, coder: SparseCoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from exegete.preparing import Loader

    # The coder on a randomised model has the name that it has on the model itself.
    monkeypatch.setattr(Run, "coders", lambda self: ("res", "res@random-subject"))
    monkeypatch.setattr(Run, "store", lambda self, name: coder)
    monkeypatch.setattr(Loader, "coder", lambda self, name: coder)
    monkeypatch.setattr(Loader, "subject", lambda self, name: subject)
    label_run(run, ["all", "res@random-subject/3"], k=1, out=tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [(r["coder"], r["latent"]) for r in rows if r["coder"] != "res"] == [("res@random-subject", "3")] * 2
    assert len([r for r in rows if r["coder"] == "res"]) == 2 * coder.width


def test_the_latents_of_a_run_as_a_table(run: Run, toy_folder: Path, tmp_path: Path) -> None:
    # A run collected by hand names its coders, not where they lie.
    text = (run.folder / "config.yaml").read_text()
    assert "res" in text
    config = run.config.to_dict()
    config["coder"], config["hookpoints"] = [f"res={toy_folder / 'coders'}:layers.0"], []
    from exegete.config import RunConfig

    run.__dict__["config"] = RunConfig.from_dict(config)
    lines = label_run(run, ["res/3", "res/3", "res/9"], k=2)
    assert len(lines) == 2
    assert lines[0].startswith("res/3 (site 0): promotes ")
    label_run(run, ["all"], k=2, out=tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert len(rows) == 64 * 4
    assert {row["effect"] for row in rows} == {"promotes", "suppresses"}
    label_run(run, ["res/all"], k=2, out=tmp_path / "t.json")
    assert len(json.loads((tmp_path / "t.json").read_text())) == 64
    from exegete.types import Explanation, LatentId

    spec = {"name": "rule", "args": {}}
    with run.results(readonly=False) as results:
        results.add_explanation(
            Explanation(latent=LatentId(coder="res", index=9), text="Fires on a\nline.", status="ok", explainer=spec),
            "k",
        )
    lines = label_run(run, ["res/3", "res/9"], k=2)
    assert len(lines) == 3
    assert lines[2] == "    rule: Fires on a↵line."
    label_run(run, ["res/9"], k=2, out=tmp_path / "t.json")
    (one,) = json.loads((tmp_path / "t.json").read_text())
    assert one["explanations"] == [{"explainer": "rule", "text": "Fires on a\nline."}]
    with pytest.raises(InputError, match="at least one token of each kind"):
        label_run(run, ["res/9"], k=0)
    with pytest.raises(NotFoundError, match="unknown coder 'other'"):
        label_run(run, ["other/1"])
    with pytest.raises(InputError, match="res/0 to res/63 or res/all"):
        label_run(run, ["res/64"])
    with pytest.raises(InputError, match=r"a \.csv or \.json file"):
        label_run(run, ["all"], out=tmp_path / "t.txt")
