"""The shipped recurrent model: it and its coder load and fit, and every stage runs on it, interventions among them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import exegete as ex
from exegete.analysis.summary import summarise
from exegete.cli import main
from exegete.cli.options import build_parser
from exegete.coders.quality import fvu_and_l0
from exegete.demo import assets, demo_config, title
from exegete.llm.identity import is_demo
from exegete.runs import Run
from exegete.subjects.verdicts import verdict

FOLDER = assets() / "recurrent"
JUDGED = ("detection", "fuzzing", "intervention_tokens_effect")


def test_it_is_small_and_its_card_says_what_was_measured() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8e6
    found = json.loads((FOLDER / "metrics.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert f"**{found['language_model']['bits_per_byte_512']:.3f}**" in card
    assert f"**{found['coders']['layers.2']['fvu']:.3f}**" in card


def test_it_reads_with_the_default_models_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / "model" / name).read_bytes() == (assets() / "model" / name).read_bytes()


def test_it_is_recurrent_and_its_coder_fits_it() -> None:
    subject = ex.load_subject(str(FOLDER / "model"), device="cpu", dtype="float32")
    assert subject.recurrent
    assert verdict(subject).exact
    coder = ex.load_coder(str(FOLDER / "coders"), hookpoint="layers.2")
    assert (coder.d_in, coder.hookpoint) == (subject.d("layers.2"), "layers.2")
    text = Path(json.__file__).read_text()  # not held out, but unlike noise
    tokens = torch.tensor([subject.tokenizer(text)["input_ids"][:256]])
    x = subject.capture(tokens, None, [coder.point])[coder.point][0, 1:]
    assert fvu_and_l0(coder, x)[0] < 0.4


def test_it_is_named_as_the_demos() -> None:
    assert is_demo(f"hf/{FOLDER / 'model'}")
    assert title(str(FOLDER / "model")) != title(str(assets() / "model")) is not None
    assert title("org/name") is None
    assert demo_config(recurrent=True).coder == (str(FOLDER / "coders"),)
    assert demo_config().coder == (str(assets() / "coders"),)
    assert build_parser().parse_args(["demo", "--recurrent"]).recurrent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("recurrent")
    config = demo_config(
        {
            "nulls": ["random_coder"],
            "corpus": {"max_tokens": 40_000},
            "latents": {"count": 6, "null_count": 2, "min_rate": 0.01},
            "examples": {"n_test": 30, "n_negatives": 30},
        },
        recurrent=True,
    )
    (folder / "run.yaml").write_text(config.to_yaml())
    pushed = "intervention:kind=tokens,explain=effect,targets=1,n_explain=4,n_score=6"
    options = ["--out", str(folder / "run"), "--scorers", "detection", "fuzzing", "execution", pushed, "--quiet"]
    assert main(["run", str(folder / "run.yaml"), *options]) == 0
    return ex.open_run(folder / "run")


def test_every_scorer_scores_its_latents_beside_a_null(run: Run) -> None:
    with run.results() as results:
        summary = summarise(results)
    coder = next(c for c in summary.coders if c.name == "layers.2")
    found = {s.scorer: s for s in coder.explainers[0].scorers}
    assert set(found) == set(JUDGED)
    for name in JUDGED:
        assert found[name].n >= 3, f"{name} scored too few"
        assert found[name].null, f"{name} stands beside no null"
    table = run.table("scores")
    rows = zip(*(table[c] for c in ("coder", "control", "scorer", "metric", "value")), strict=True)
    own = [row[2:] for row in rows if row[:2] == ("layers.2", "none")]
    assert sum(row[:2] == ("execution", "auprc") for row in own) >= 3
    pushed = [value for *what, value in own if what == [JUDGED[-1], "mass_kl_1"] and math.isfinite(value)]
    assert np.median(pushed) > 0, "edits of the residual stream do nothing"


def test_the_report_is_written_under_its_own_title(run: Run) -> None:
    assert "The recurrent demo" in run.report_path.read_text()
