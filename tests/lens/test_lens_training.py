"""Training: a step by hand, exact continuation after a stop, and what is kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.errors import ConfigError, CorruptError, InputError, MismatchError
from exegete.lens import LensConfig, LensText, load_lens, train_lens
from exegete.lens.text import Order
from exegete.progress import Progress
from exegete.subjects import Subject
from exegete.subjects.readout import read_out
from exegete.subjects.sites import residuals

SMALL = LensConfig(steps=6, batch_tokens=200, check_every=2, validation_tokens=200)


class StoppedError(Exception):
    """The power went."""


class StopAfter(Progress):
    """Stops a training after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def start(self, stage: str, total: int, unit: str) -> None:
        pass

    def advance(self, amount: int) -> None:
        self.left -= amount
        if self.left <= 0:
            raise StoppedError

    def end(self) -> None:
        pass


def config(**changes: object) -> LensConfig:
    import dataclasses

    return dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]


def weights(lens: object) -> dict[str, torch.Tensor]:
    return {f"{s}.{n}": v for s, t in lens.translators.items() for n, v in t.state_dict().items()}  # type: ignore[attr-defined]


def test_a_step_is_sgd_on_the_mean_kl_of_the_batch(llama: Subject, llama_text: LensText, tmp_path: Path) -> None:
    one = config(steps=1, clip=1e9, learning_rate=0.5, check_every=1)
    lens = train_lens(llama, llama_text, out=tmp_path, config=one)["tuned"]
    batch = Order(llama_text, "train", seed=0, tokens=200).next()
    readout = read_out(llama)
    h = residuals(llama, batch.tokens, (0, 2))
    p = readout.logits(h[2][batch.keep]).log_softmax(-1).detach()
    weight, bias = torch.zeros(16, 16, requires_grad=True), torch.zeros(16, requires_grad=True)
    x = h[0][batch.keep]
    q = readout.logits(x + x @ weight.T + bias).log_softmax(-1)
    torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").backward()  # type: ignore[no-untyped-call]
    # Nesterov's first step: (1 − β) · lr · (g + β g); at zero there is no weight decay.
    assert weight.grad is not None
    assert bias.grad is not None
    want = {"weight": -0.05 * 1.9 * weight.grad, "bias": -0.05 * 1.9 * bias.grad}
    assert lens.sites[0].best_step == 1
    for name, value in want.items():
        torch.testing.assert_close(lens.lens.translators[0].state_dict()[name], value, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_for_each_translator(llama: Subject, llama_text: LensText, tmp_path: Path) -> None:
    one = config(steps=1, clip=1e-3, check_every=1)
    lens = train_lens(llama, llama_text, out=tmp_path, config=one)["tuned"].lens
    for translator in lens.translators.values():
        norm = sum(float(p.square().sum()) for p in translator.parameters()) ** 0.5
        assert norm == pytest.approx(0.1 * 1.9 * 1e-3, rel=1e-3)


def test_what_a_site_learns_does_not_depend_on_the_others(llama: Subject, llama_text: LensText, tmp_path: Path) -> None:
    whole = train_lens(llama, llama_text, out=tmp_path / "a", config=SMALL)["tuned"].lens
    alone = train_lens(llama, llama_text, out=tmp_path / "b", sites=(0,), config=SMALL)["tuned"].lens
    assert torch.equal(whole.translators[0].weight, alone.translators[0].weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_stopped_training_goes_on_to_the_same_bits(
    optimizer: str, llama: Subject, llama_text: LensText, tmp_path: Path
) -> None:
    own = config(optimizer=optimizer)
    whole = train_lens(llama, llama_text, out=tmp_path / "whole", config=own)["tuned"]
    for stop in (3, 2):
        with pytest.raises(StoppedError):
            train_lens(
                llama, llama_text, out=tmp_path / "part", config=own, progress=StopAfter(stop), checkpoint_every=2
            )
    assert (tmp_path / "part" / "checkpoint.pt").is_file()
    again = train_lens(llama, llama_text, out=tmp_path / "part", config=own, checkpoint_every=2)["tuned"]
    assert again.sites == whole.sites
    for name, value in weights(whole.lens).items():
        assert torch.equal(value, weights(again.lens)[name]), name
    assert not (tmp_path / "part" / "checkpoint.pt").exists()


def test_a_complete_training_is_read_and_other_settings_are_refused(
    llama: Subject, llama_text: LensText, tmp_path: Path
) -> None:
    first = train_lens(llama, llama_text, out=tmp_path, config=SMALL)["tuned"]
    again = train_lens(llama, llama_text, out=tmp_path, config=SMALL, progress=StopAfter(1))["tuned"]
    assert again.sites == first.sites
    with pytest.raises(MismatchError, match=r"learning_rate: 1\.0 there, 2\.0 now"):
        train_lens(llama, llama_text, out=tmp_path, config=config(learning_rate=2.0))


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(
    llama: Subject, llama_text: LensText, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        train_lens(llama, llama_text, out=tmp_path, config=SMALL, progress=StopAfter(3), checkpoint_every=1)
    with pytest.raises(MismatchError, match="seed: 0 there, 1 now"):
        train_lens(llama, llama_text, out=tmp_path, config=config(seed=1))
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CorruptError, match="remove it to train from the start"):
        train_lens(llama, llama_text, out=tmp_path, config=SMALL)


def test_a_checkpoint_of_a_wrong_structure_is_one_line(llama: Subject, llama_text: LensText, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train_lens(llama, llama_text, out=tmp_path, config=SMALL, progress=StopAfter(3), checkpoint_every=1)
    path = tmp_path / "checkpoint.pt"
    held = torch.load(path, weights_only=True)
    name = next(iter(held["best"]))
    best = held["best"][name]
    cut = {key: value[:-1] for key, value in best["weights"].items()}
    wrong: list[tuple[str, Any]] = [
        *(("key", key) for key in ("no JSON", "3", None)),
        *(("step", step) for step in (-1, 0, SMALL.steps, "x", None)),
        *(("place", place) for place in (-1, 10**6)),
        ("epoch", -1),
        *((part, 3) for part in ("translators", "optimizers", "best", "first", "last")),
        *((part, {}) for part in ("translators", "optimizers", "best", "first", "last")),
        ("translators", {**held["translators"], name: {}}),
        ("optimizers", {**held["optimizers"], name: {"state": {}, "param_groups": []}}),
        ("best", {**held["best"], name: []}),
        ("best", {**held["best"], name: {**best, "weights": cut}}),
        ("last", {**held["last"], name: "x"}),
    ]
    changes = [torch.zeros(2), ["step"], *({**held, part: value} for part, value in wrong)]
    for changed in changes:
        torch.save(changed, path)
        with pytest.raises(CorruptError, match=r"^[^\n]*remove it to train from the start$"):
            train_lens(llama, llama_text, out=tmp_path, config=SMALL)
    torch.save(held, path)
    assert train_lens(llama, llama_text, out=tmp_path, config=SMALL)["tuned"].sites


def test_a_lens_that_does_not_say_how_its_training_went_is_one_line(
    llama: Subject, llama_text: LensText, tmp_path: Path
) -> None:
    from exegete.store.checks import write_manifest

    train_lens(llama, llama_text, out=tmp_path, config=SMALL)
    path = tmp_path / "lens.json"
    data = json.loads(path.read_text())
    for record in (None, {}, {"epochs": 1, "tuned": {"x": {}}}, {"epochs": 1, "tuned": []}):
        write_manifest(path, {**{key: value for key, value in data.items() if key != "checksum"}, "record": record})
        with pytest.raises(CorruptError, match="how its training went"):
            train_lens(llama, llama_text, out=tmp_path, config=SMALL)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_nowhere_worse_than_the_logit_lens_on_validation(
    loss: str, llama: Subject, llama_text: LensText, tmp_path: Path
) -> None:
    found = train_lens(llama, llama_text, out=tmp_path, config=config(loss=loss, steps=12))["tuned"]
    for one in found.sites.values():
        assert one.best < one.untrained
        assert not one.kept_identity


def test_where_training_makes_it_worse_the_logit_lens_is_kept(
    llama: Subject, llama_text: LensText, tmp_path: Path
) -> None:
    found = train_lens(llama, llama_text, out=tmp_path, config=config(learning_rate=3e4))["tuned"]
    assert any(one.kept_identity for one in found.sites.values())
    for site, one in found.sites.items():
        assert one.best <= one.untrained
        assert found.lens.translators[site].is_identity == one.kept_identity
    loaded = load_lens(tmp_path, llama)
    assert all(loaded.translators[s].is_identity == one.kept_identity for s, one in found.sites.items())


def test_a_training_that_leaves_the_numbers_keeps_the_logit_lens(
    llama: Subject, llama_text: LensText, tmp_path: Path
) -> None:
    found = train_lens(llama, llama_text, out=tmp_path, config=config(learning_rate=1e35))["tuned"]
    assert all(one.kept_identity for one in found.sites.values())
    again = train_lens(llama, llama_text.corpus, out=tmp_path / "b", config=config(learning_rate=1e35))["tuned"]
    assert again.lens.translators[0].is_identity
    read = train_lens(llama, llama_text, out=tmp_path, config=config(learning_rate=1e35))["tuned"]
    assert {s: one.best for s, one in read.sites.items()} == {s: one.best for s, one in found.sites.items()}


def test_too_little_text_is_told_or_refused(
    llama: Subject, llama_text: LensText, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match="give more text, fewer steps or smaller batches"):
        train_lens(llama, llama_text, out=tmp_path, config=config(batch_tokens=2000, repeat=False))
    with caplog.at_level(logging.WARNING):
        found = train_lens(llama, llama_text, out=tmp_path, config=config(batch_tokens=2000))["tuned"]
    assert "it is read" in caplog.text
    assert found.epochs > 1


def test_the_schedules() -> None:
    sgd = LensConfig(steps=10)
    assert [sgd.rate(k) for k in (0, 5, 9)] == [1.0, 0.5, 0.1]
    adam = LensConfig(optimizer="adam", steps=10)
    assert adam.warmup_steps == 2
    assert [round(adam.rate(k), 3) for k in (0, 1, 2, 6, 9)] == [0.333, 0.667, 1.0, 0.5, 0.125]
    assert LensConfig(optimizer="adam", steps=10_000).warmup_steps == 1000
    assert LensConfig(steps=25).looks == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "mse"}, "loss is one of kl, ce"),
        ({"steps": 0}, "steps is at least 1"),
        ({"learning_rate": -1.0}, "learning_rate is above 0"),
        ({"momentum": 1.0}, "momentum lies between"),
        ({"warmup": 6}, "less than the 6 steps"),
        ({"weight_decay": -1.0}, "weight_decay is at least 0"),
        ({"check_every": 0}, "check_every is at least 1"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes)
