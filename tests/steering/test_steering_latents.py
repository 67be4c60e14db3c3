"""Latents as vectors, and vectors as latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exegete.cli import main
from exegete.coders import load_coder
from exegete.coders.activations import TopK
from exegete.coders.linear import LinearCoder
from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.runs import Run, open_run
from exegete.steering import (
    Composition,
    SteeringVector,
    compose,
    explain_vector,
    latent_vector,
    run_latent_vector,
    save_vector,
)
from exegete.steering.vector import about
from exegete.subjects import Subject


def coder(hookpoint: str = "layers.1", d: int = 32, width: int = 80, seed: int = 0, **more: Any) -> LinearCoder:
    draw = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {
        "name": "c",
        "hookpoint": hookpoint,
        "encoder": torch.randn((width, d), generator=draw),
        "encoder_bias": torch.zeros(width),
        "decoder": torch.randn((width, d), generator=draw),
        "decoder_bias": torch.zeros(d),
        "activation": TopK(5),
    }
    return LinearCoder(**{**given, **more})


def vector(subject: Subject, **residual: torch.Tensor) -> SteeringVector:
    return SteeringVector(
        residual={int(name[1:]): part for name, part in residual.items()}, about=about(subject, "mean")
    )


def test_a_latents_direction_is_a_vector_where_its_coder_writes(llama: Subject) -> None:
    held = coder()
    found = latent_vector(held, 7, llama)
    assert found.sites == (1,)
    assert torch.equal(found.residual[1], held.decoder[7])
    assert (found.about.method, found.about.source) == ("latent", "c/7")
    unit = latent_vector(held, 7, llama, normalise="unit")
    torch.testing.assert_close(unit.residual[1] * held.decoder[7].norm(), held.decoder[7])
    embedding = latent_vector(coder("layers.0", side="input"), 0, llama)
    assert embedding.sites == (-1,)


def test_a_vector_made_of_latents_is_taken_apart_again(llama: Subject) -> None:
    held = coder()
    rows = held.decoder
    made = vector(llama, s1=4.0 * rows[3] - 2.5 * rows[40] + 1.0 * rows[11])
    found = compose(made, held, llama, k=8)
    assert [p.index for p in found.pieces[:3]] == [3, 40, 11]
    assert [p.coefficient for p in found.pieces[:3]] == pytest.approx([4.0, -2.5, 1.0], abs=1e-4)
    assert found.explained == pytest.approx(1.0, abs=1e-6)
    assert found.explained == pytest.approx(sum(p.gain for p in found.pieces))
    assert len(found.pieces) <= 8
    own = torch.nn.functional.cosine_similarity(rows, made.residual[1][None], dim=1)
    for piece in (*found.pieces, *found.nearest):
        assert piece.cosine == pytest.approx(float(own[piece.index]), abs=1e-5)
    nearest = own.abs().argsort(descending=True)[:8].tolist()
    assert [p.index for p in found.nearest] == nearest
    assert 0.3 < found.chance < 0.99


def test_pieces_are_fitted_by_least_squares(llama: Subject) -> None:
    held = coder()
    target = torch.randn(32, generator=torch.Generator().manual_seed(5))
    found = compose(vector(llama, s1=target), held, llama, k=4)
    rows = held.decoder[[p.index for p in found.pieces]].double().numpy()
    wanted, *_ = np.linalg.lstsq(rows.T, target.double().numpy(), rcond=None)
    assert [p.coefficient for p in found.pieces] == pytest.approx(wanted.tolist(), abs=1e-6)
    rest = target.double().numpy() - wanted @ rows
    assert found.explained == pytest.approx(1 - float(rest @ rest) / float(target.double().square().sum()), abs=1e-9)
    one = compose(vector(llama, s1=target), held, llama, k=1)
    assert one.pieces[0].index == one.nearest[0].index
    assert one.explained == pytest.approx(one.pieces[0].cosine ** 2, abs=1e-6)


def test_orthogonal_latents_leave_nothing_to_choose(llama: Subject) -> None:
    held = coder(decoder=torch.eye(32), encoder=torch.eye(32), encoder_bias=torch.zeros(32))
    target = torch.zeros(32)
    target[[4, 9]] = torch.tensor([-3.0, 1.0])
    found = compose(vector(llama, s1=target), held, llama)
    assert [(p.index, p.coefficient) for p in found.pieces] == [(4, -3.0), (9, 1.0)]
    assert [p.gain for p in found.pieces] == pytest.approx([0.9, 0.1])


def test_what_does_not_fit_is_refused(llama: Subject, mamba: Subject) -> None:
    held, made = coder(), vector(llama, s1=torch.ones(32))
    with pytest.raises(InputError, match="latents 0 to 79, got 80"):
        latent_vector(held, 80, llama)
    with pytest.raises(InputError, match="without activations"):
        latent_vector(held, 0, llama, normalise="rms")
    with pytest.raises(InputError, match="is no site of the residual stream"):
        latent_vector(coder("layers.1.mlp"), 0, llama)
    with pytest.raises(MismatchError, match="writes 16 dimensions, the residual stream of .* has 32"):  # noqa: RUF043
        latent_vector(coder(d=16), 0, llama)
    with pytest.raises(InputError, match="writes to site 0, the vector has the sites 1"):
        compose(made, coder("layers.0"), llama)
    with pytest.raises(MismatchError, match="made on"):
        compose(made, held, mamba)
    with pytest.raises(InputError, match="at least one piece"):
        compose(made, held, llama, k=0)
    with pytest.raises(InputError, match="is zero at site 1"):
        compose(vector(llama, s1=torch.zeros(32)), held, llama)


@pytest.fixture(scope="module")
def run(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("run") / "run"
    sizes = ["--n-train", "8", "--n-test", "8", "--n-negatives", "8", "--min-train", "2", "--min-test", "2"]
    text = ["--text", str(toy_folder / "text.jsonl"), "--row-length", "64", "--window", "8", "--latents", "3"]
    made = [str(toy_folder / "model"), f"res={toy_folder / 'coders'}:layers.0", "--hookpoints", "layers.0"]
    assert main(["run", *made, *text, *sizes, "--donors", "2", "--out", str(out), "-q"]) == 0
    return open_run(out)


def _explained(vector: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    from exegete.cli import steer, steer_options
    from exegete.cli.options import Parser

    parser = Parser(prog="exegete")
    steer_options.add_parsers(parser.add_subparsers(parser_class=Parser))
    assert steer.run(parser.parse_args(["steer", "explain", str(vector), str(folder), "-k", "3"])) == 0
    return capsys.readouterr().out


def test_a_vector_is_explained_by_a_run(
    run: Run, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name,) = [n for n in run.coders() if "@" not in n]
    table = run.table("explanations")
    latent = next(int(i) for i, text in zip(table["idx"], table["text"], strict=True) if text)
    made, subject = run_latent_vector(f"{run.folder}:{name}/{latent}")
    row = load_coder(f"{toy_folder / 'coders'}:layers.0").decoder_rows(torch.tensor([latent]))[0]
    assert torch.equal(made.residual[0], row)
    assert made.about.model_hash == subject.hash
    found = explain_vector(made, run)
    assert isinstance(found, Composition)
    assert found.explained == pytest.approx(1, abs=1e-5)
    (piece,) = [p for p in found.pieces if abs(p.coefficient) > 0.01]
    assert piece.index == latent
    assert piece.coefficient == pytest.approx(1.0, abs=1e-4)
    assert piece.explanation in set(table["text"])
    top = run.store(name).stats([latent])[0].top_tokens[:5]
    assert piece.tokens == tuple(subject.token_table().texts[token] for token, _ in top)
    said = _explained(save_vector(made, tmp_path / "v.safetensors"), run.folder, capsys)
    assert said.splitlines()[0].startswith("site 0, length ")
    assert f"{latent:>8}" in said
    assert str(piece.explanation) in said


def test_latents_of_runs_that_are_not_there_are_refused(run: Run, tmp_path: Path) -> None:
    (name,) = [n for n in run.coders() if "@" not in n]
    with pytest.raises(InputError, match="RUN:CODER/INDEX"):
        run_latent_vector("nothing")
    with pytest.raises(InputError, match="CODER/index"):
        run_latent_vector(f"{run.folder}:{name}")
    with pytest.raises(NotFoundError, match="unknown coder"):
        run_latent_vector(f"{run.folder}:other/3")
    with pytest.raises(InputError, match="has the latents 0 to 63, got 99"):
        run_latent_vector(f"{run.folder}:{name}/99")
    with pytest.raises(NotFoundError):
        run_latent_vector(f"{tmp_path / 'nothing'}:{name}/3")
