from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exegete.coders.activations import Activation, Gated, GroupMax, JumpReLU, ReLU, TopK
from exegete.coders.coder import SparseCoder
from exegete.coders.formats.format import CoderInfo
from exegete.coders.formats.native import Native, save_coder
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import NeuronCoder, random_rotation
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, ExegeteError, InputError, NotFoundError
from exegete.files import fault_hook

D, WIDTH = 6, 12
READER = Native()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def activation(name: str) -> Activation:
    return {
        "topk": TopK(3),
        "groupmax": GroupMax(4),
        "relu": ReLU(),
        "jumprelu": JumpReLU(normal(WIDTH).abs()),
        "gated": Gated(normal(WIDTH, seed=1), normal(WIDTH, seed=2).exp(), normal(WIDTH, seed=3)),
    }[name]


def linear(name: str = "topk", **changes: Any) -> LinearCoder:
    given: dict[str, Any] = {
        "name": "mine",
        "hookpoint": "layers.1",
        "encoder": normal(WIDTH, D),
        "encoder_bias": normal(WIDTH),
        "decoder": normal(WIDTH, D, seed=1),
        "decoder_bias": normal(D),
        "activation": activation(name),
        "base_model": "org/model",
    }
    return LinearCoder(**{**given, **changes})


CODERS: dict[str, SparseCoder] = {
    **{name: linear(name, subtract_decoder_bias=True) for name in ("topk", "groupmax", "relu", "jumprelu", "gated")},
    "transcoder": linear("relu", side="input", target=("layers.1", "output"), input_norm="layer_norm"),
    "narrowing": linear(
        "topk",
        side="input",
        target=("layers.2", "output"),
        decoder=normal(WIDTH, 4),
        decoder_bias=normal(4),
        skip=normal(4, D),
    ),
    "undecided": linear("relu", target=("layers.2", "output"), skip=normal(D, D), skip_undecided=True),
    "rms": linear("relu", input_norm="rms_norm", norm_epsilon=1e-4, base_model=None),
    "tied": linear("topk", decoder=normal(WIDTH, D), encoder=normal(WIDTH, D)),
    "half": linear("jumprelu").to("cpu", torch.bfloat16),
    "double": linear("jumprelu").to("cpu", torch.float64),
    "neurons": NeuronCoder(name="n", hookpoint="layers.0.mlp.down_proj", d=D),
    "top neurons": NeuronCoder(name="n", hookpoint="h.0", d=D, k=2, signs="both", threshold=0.25, side="output"),
    "rotated": NeuronCoder(name="n", hookpoint="h.0", d=D, rotation=random_rotation(D, 0), base_model="gpt2"),
    "half rotated": NeuronCoder(name="n", hookpoint="h.0", d=D, rotation=random_rotation(D, 0)).to(
        "cpu", torch.float16
    ),
}


def read(folder: Path, hookpoint: str | None = None, dtype: torch.dtype | None = None) -> tuple[SparseCoder, CoderInfo]:
    repository = LocalRepository(folder)
    (place,) = READER.find(repository, "")
    info = READER.inspect(repository, place)
    assert place.hookpoint == info.hookpoint
    chosen = hookpoint or place.hookpoint or ""
    return READER.load(
        repository, place, name="loaded", hookpoint=chosen, device="cpu", dtype=dtype or torch.float32
    ), info


@pytest.mark.parametrize("kind", CODERS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    coder = CODERS[kind]
    assert save_coder(coder, tmp_path / "c") == tmp_path / "c"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["coder.json", "coder.safetensors"]
    again, info = read(tmp_path / "c", dtype=coder.dtype)
    assert (again.hash, again.name, type(again)) == (coder.hash, "loaded", type(coder))
    for fact in ("architecture", "hookpoint", "side", "target", "d_in", "d_out", "width", "k", "base_model", "dtype"):
        assert getattr(again, fact) == getattr(coder, fact), fact
    for fact in ("architecture", "hookpoint", "side", "d_in", "d_out", "width", "k", "base_model"):
        assert getattr(info, fact) == getattr(coder, fact), fact
    assert info.target == (None if coder.target == coder.point else coder.target)
    x = normal(20, D)
    code, other = coder.encode(x), again.encode(x)
    assert (code.values > 0).any()
    assert torch.equal(code.indices, other.indices)
    assert torch.equal(code.values, other.values)
    assert torch.equal(coder.decode(code, x), again.decode(other, x))
    rows = torch.arange(coder.width)
    assert torch.equal(coder.decoder_rows(rows), again.decoder_rows(rows))


def test_every_setting_of_a_coder_is_kept(tmp_path: Path) -> None:
    """A new argument of a coder must be added to the container."""
    settings = json.loads((save_coder(CODERS["narrowing"], tmp_path / "a") / "coder.json").read_text())
    tensors = {"encoder", "encoder_bias", "decoder", "decoder_bias"}
    assert set(inspect.signature(LinearCoder).parameters) - tensors - {"content"} <= settings.keys()
    settings = json.loads((save_coder(CODERS["rotated"], tmp_path / "b") / "coder.json").read_text())
    renamed = {"d": "d_in", "rotation": "rotated"}
    wanted = {renamed.get(name, name) for name in inspect.signature(NeuronCoder).parameters}
    assert wanted - {"content", "device"} <= settings.keys()


def test_a_narrower_copy_keeps_the_hash_of_the_original(tmp_path: Path) -> None:
    whole = linear("jumprelu")
    half = whole.to("cpu", torch.float16)
    save_coder(half, tmp_path)
    again, info = read(tmp_path)
    assert again.hash == whole.hash == half.hash
    assert (again.dtype, info.dtype) == (torch.float32, "F16")
    settings = json.loads((tmp_path / "coder.json").read_text())
    assert settings["hash"] != settings["weights"]


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    encoder = normal(WIDTH, D)
    coder = linear("gated", encoder=encoder, decoder=encoder, encoder_bias=normal(WIDTH * 2)[::2])
    save_coder(coder, tmp_path)
    assert read(tmp_path)[0].hash == coder.hash


def test_another_hookpoint(tmp_path: Path) -> None:
    save_coder(CODERS["topk"], tmp_path / "a")
    coder, _ = read(tmp_path / "a", "h.4")
    assert coder.point == coder.target == ("h.4", "output")
    save_coder(CODERS["transcoder"], tmp_path / "b")
    coder, _ = read(tmp_path / "b", "h.4")
    assert (coder.point, coder.target) == (("h.4", "input"), ("layers.1", "output"))


def test_several_in_one_folder(tmp_path: Path) -> None:
    save_coder(linear(), tmp_path / "layers.1" / "run 2")
    save_coder(linear(hookpoint="layers.0"), tmp_path / "other")
    found = READER.find(LocalRepository(tmp_path), "")
    assert [(p.hookpoint, p.label, p.folder) for p in found] == [
        ("layers.1", "run_2", "layers.1/run 2"),
        ("layers.0", "other", "other"),
    ]
    assert len(READER.find(LocalRepository(tmp_path), "other")) == 1


def test_a_stop_while_saving_leaves_the_old_coder_or_says_so(tmp_path: Path) -> None:
    old, new = linear(), linear("relu", encoder=normal(WIDTH, D, seed=9))
    points: list[str] = []
    with fault_hook(points.append):
        save_coder(old, tmp_path)
    assert len(points) == 6

    class StopError(Exception):
        pass

    for i in range(6):
        save_coder(old, tmp_path)
        left = i

        def stop(point: str) -> None:
            nonlocal left
            if left == 0:
                raise StopError(point)
            left -= 1

        with fault_hook(stop), pytest.raises(StopError):
            save_coder(new, tmp_path)
        if i in (2, 3, 4):  # the weights are new, the settings old
            with pytest.raises(CorruptError, match="other weights than"):
                read(tmp_path)
        else:
            assert read(tmp_path)[0].hash == (old.hash if i < 2 else new.hash)


def change(folder: Path, **settings: Any) -> None:
    path = folder / "coder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": 2}, ["newer exegete (format 2", "reads up to 1", "pip install --upgrade exegete"]),
        ({"format": "1"}, ["format as a whole number"]),
        ({"kind": "cubic"}, ["'cubic'", "allowed: linear, neurons"]),
        ({"activation": "swish"}, ["'swish'", "allowed: topk"]),
        ({"activation": ["topk"]}, ["activation as text"]),
        ({"k": "3"}, ["k as a whole number"]),
        ({"k": 13}, ["k = 13", "width 12"]),
        ({"width": 13}, ["encoder has shape [12, 6]", "says [13, 6]"]),
        ({"d_in": 0}, ["d_in as a whole number"]),
        ({"side": "inside"}, ["side (input or output)", "'inside'"]),
        ({"target": "layers.2"}, ["target"]),
        ({"target": ["layers.2", ["output"]]}, ["target"]),
        ({"hookpoint": None}, ["hookpoint"]),
        ({"input_norm": "batch"}, ["input norm 'batch'"]),
        ({"norm_epsilon": float("nan")}, ["norm_epsilon as a number"]),
        ({"skip": 1}, ["skip as true or false"]),
        ({"skip": True}, ["lacks skip"]),
        ({"base_model": 7}, ["base_model as text"]),
        ({"weights": "0" * 16}, ["other weights than"]),
        ({"subtract_decoder_bias": True}, ["other weights than"]),
        ({"activation": "jumprelu"}, ["lacks threshold"]),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], words: list[str]) -> None:
    save_coder(linear(), tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(ExegeteError) as raised:
        read(tmp_path, "layers.1")
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"signs": "negative"}, ["signs 'negative'"]),
        ({"signs": "both"}, ["6 neurons are 6 latents"]),
        ({"threshold": -1}, ["threshold -1"]),
        ({"threshold": None}, ["threshold as a number"]),
        ({"k": 7}, ["k = 7"]),
        ({"rotated": True}, ["lacks rotation"]),
    ],
)
def test_neuron_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], words: list[str]) -> None:
    save_coder(CODERS["neurons"], tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(ExegeteError) as raised:
        read(tmp_path)
    assert all(word in str(raised.value) for word in words), raised.value


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    save_coder(linear(), tmp_path)
    held = load_file(tmp_path / "coder.safetensors")
    held["encoder"][0, 0] += 1
    save_file(held, tmp_path / "coder.safetensors")
    with pytest.raises(CorruptError, match="other weights than"):
        read(tmp_path)
    held["encoder"][0, 0] = torch.inf
    save_file(held, tmp_path / "coder.safetensors")
    with pytest.raises(CorruptError, match="encoder holds NaN or infinity"):
        read(tmp_path)
    (tmp_path / "coder.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CorruptError, match="damaged"):
        read(tmp_path)


@pytest.mark.parametrize("gone", ["coder.json", "coder.safetensors"])
def test_half_a_coder(tmp_path: Path, gone: str) -> None:
    save_coder(linear(), tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(NotFoundError, match=rf"no .*{gone}.*copy both"):
        read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 10**5, " " * (2 << 20)])
def test_broken_settings(tmp_path: Path, content: str) -> None:
    save_coder(linear(), tmp_path)
    (tmp_path / "coder.json").write_text(content)
    with pytest.raises(CorruptError):
        read(tmp_path, "layers.1")


def test_folders_of_others(tmp_path: Path) -> None:
    (tmp_path / "coder.json").write_text('{"format": "wav"}')
    (tmp_path / "cfg.json").write_text("{}")
    assert READER.find(LocalRepository(tmp_path), "") == ()


def test_other_kinds_of_coder_are_refused(tmp_path: Path) -> None:
    class Other:
        name = "x"

    with pytest.raises(InputError, match="is a Other"):
        save_coder(Other(), tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
