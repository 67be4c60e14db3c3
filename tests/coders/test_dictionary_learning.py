"""dictionary_learning wrote these checkpoints and computed the expectations (``make oracles``)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exegete.coders.formats.dictionary_learning import DictionaryLearning
from exegete.coders.formats.format import CoderInfo, Place
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, ExegeteError, InputError, NotFoundError
from exegete.types import SparseCode

FIXTURES = Path(__file__).parents[1] / "fixtures" / "dictionary_learning"
READER = DictionaryLearning()
MODEL = "EleutherAI/pythia-70m-deduped"
# architecture, hookpoint, side, target, k, threshold
FACTS: dict[str, tuple[str, str | None, str, tuple[str, str] | None, int | None, str | None]] = {
    "AutoEncoder": ("relu", "blocks.3.hook_mlp_out", "output", None, None, None),
    "AutoEncoderNew": ("relu", "blocks.3.hook_resid_post", "output", None, None, None),
    "GatedAutoEncoder": ("gated", "gpt_neox.layers.3.attention", "output", None, None, None),
    "AutoEncoderTopK": ("topk", "blocks.3.hook_resid_post", "output", None, 5, None),
    "BatchTopKSAE": ("jumprelu", "blocks.3.hook_resid_post", "output", None, None, "one for all latents"),
    "BatchTopKSAE_unset": ("jumprelu", "blocks.3.hook_resid_post", "output", None, None, "one for all latents"),
    "MatryoshkaBatchTopKSAE": ("jumprelu", None, "output", None, None, "one for all latents"),
    "JumpReluAutoEncoder": ("jumprelu", None, "input", None, None, "per latent"),
    "transcoder": (
        "relu transcoder",
        "gpt_neox.layers.3.mlp",
        "input",
        ("gpt_neox.layers.3.mlp", "output"),
        None,
        None,
    ),
}


def opened(folder: Path) -> tuple[LocalRepository, Place]:
    repository = LocalRepository(folder)
    (place,) = READER.find(repository, "")
    return repository, place


def loaded(folder: Path, hookpoint: str | None = None) -> tuple[LinearCoder, CoderInfo, Place]:
    repository, place = opened(folder)
    info = READER.inspect(repository, place)
    where = hookpoint or place.hookpoint or "layers.3"
    coder = READER.load(repository, place, name="c", hookpoint=where, device="cpu", dtype=torch.float32)
    return coder, info, place


def dense(code: SparseCode, n: int) -> torch.Tensor:
    full = torch.zeros(n, code.width)
    if code.offsets is None:
        return full.scatter_(1, code.indices, code.values)
    row = torch.repeat_interleave(torch.arange(n), code.offsets.diff())
    full[row, code.indices] = code.values
    return full


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "BatchTopKSAE", tmp_path / "run"))


def change(folder: Path, **settings: Any) -> None:
    path = folder / "trainer_0" / "config.json"
    data = json.loads(path.read_text())
    data["trainer"].update(settings)
    path.write_text(json.dumps(data))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "trainer_0" / "ae.pt"
    held = torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    torch.save(held, path)


def test_the_fixtures_are_those_the_library_wrote() -> None:
    lines = [line.split("  ") for line in (FIXTURES / "SHA256SUMS").read_text().splitlines()]
    listed = {name: digest for digest, name in lines}
    files = {p.relative_to(FIXTURES).as_posix(): p for p in FIXTURES.rglob("*") if p.is_file()}
    assert files.keys() - {"SHA256SUMS"} == listed.keys()
    for name, digest in listed.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name
    assert sum(p.stat().st_size for p in files.values()) < 300_000


@pytest.mark.parametrize("kind", FACTS)
def test_same_code_and_reconstruction(kind: str) -> None:
    coder, _, _ = loaded(FIXTURES / kind)
    with np.load(FIXTURES / f"{kind}.npz") as held:
        x, theirs, made = (torch.from_numpy(held[name]) for name in ("x", "code", "reconstruction"))
    code = coder.encode(x)
    ours = dense(code, len(x))
    assert torch.equal(ours > 0, theirs > 0)
    assert 0.02 < (theirs > 0).float().mean() < 0.9
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coder.decode(code, x), made, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FACTS)
def test_facts_before_and_after_loading(kind: str) -> None:
    coder, info, place = loaded(FIXTURES / kind)
    architecture, hookpoint, side, target, k, threshold = FACTS[kind]
    assert (info.architecture, info.hookpoint, info.side, info.target) == (architecture, hookpoint, side, target)
    assert (info.k, info.threshold, info.base_model, info.dtype) == (k, threshold, MODEL, "F32")
    assert (info.format, info.d_in, info.d_out, info.width) == ("dictionary_learning", 16, 16, 48)
    assert (place.hookpoint, place.label) == (hookpoint, "trainer_0")
    assert (coder.architecture, coder.side, coder.k, coder.base_model) == (architecture, side, k, MODEL)
    assert (coder.d_in, coder.d_out, coder.width) == (16, 16, 48)
    assert coder.hookpoint == (hookpoint or "layers.3")
    assert coder.target == (target or coder.point)
    assert any("AutoEncoderNew" in note for note in info.notes) == (kind in ("AutoEncoderNew", "transcoder"))


def test_autoencoders_have_decoder_directions_of_length_one() -> None:
    coder, info, _ = loaded(FIXTURES / "AutoEncoder")
    torch.testing.assert_close(coder.decoder.norm(dim=1), torch.ones(48))
    assert "length 1" in info.notes[0]
    raw = torch.load(FIXTURES / "AutoEncoder" / "trainer_0" / "ae.pt", weights_only=True)
    assert not torch.allclose(raw["decoder.weight"].norm(dim=0), torch.ones(48), atol=0.1)


def test_a_silent_decoder_direction_stays_finite(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "AutoEncoder", tmp_path / "run"))
    weight = torch.load(folder / "trainer_0" / "ae.pt", weights_only=True)["decoder.weight"]
    weight[:, 3] = 0
    change_tensors(folder, decoder__weight=weight)
    coder, _, _ = loaded(folder)
    assert torch.isfinite(coder.decoder).all()
    assert torch.equal(coder.decoder[3], torch.zeros(16))


@pytest.mark.parametrize(
    ("name", "io", "expected"),
    [
        ("resid_post_layer_12", "out", ("blocks.12.hook_resid_post", "output", None)),
        ("resid_out_layer4", "out", ("blocks.4.hook_resid_post", "output", None)),
        ("resid_post_layer_12", "in", ("blocks.12.hook_resid_pre", "input", None)),
        ("attn_out_layer1", "out", ("blocks.1.hook_attn_out", "output", None)),
        ("attn_out_layer1", "in", (None, "input", None)),
        ("mlp_out_layer1", "in_and_out", ("blocks.1.mlp.hook_in", "input", ("blocks.1.hook_mlp_out", "output"))),
        ("model.layers.9.mlp.down_proj", "in", ("model.layers.9.mlp.down_proj", "input", None)),
        ("transformer.h.2", "out", ("transformer.h.2", "output", None)),
        ("somewhere", "out", (None, "output", None)),
        (None, "out", (None, "output", None)),
    ],
)
def test_where_it_reads(copy: Path, name: str | None, io: str, expected: tuple[Any, ...]) -> None:
    change(copy, submodule_name=name)
    path = copy / "trainer_0" / "config.json"
    data = json.loads(path.read_text())
    data["buffer"]["io"] = io
    path.write_text(json.dumps(data))
    repository, place = opened(copy)
    info = READER.inspect(repository, place)
    assert (info.hookpoint, info.side, info.target) == expected
    assert place.hookpoint == expected[0]
    coder = READER.load(repository, place, name="c", hookpoint="layers.0.mlp", device="cpu", dtype=torch.float64)
    transcodes = io == "in_and_out"
    assert coder.target == (("layers.0.mlp", "output") if transcodes else ("layers.0.mlp", info.side))
    assert coder.dtype == torch.float64


def test_several_trainers_under_their_folders(tmp_path: Path) -> None:
    for i, kind in enumerate(("AutoEncoderTopK", "BatchTopKSAE")):
        shutil.copytree(FIXTURES / kind / "trainer_0", tmp_path / "TopK a" / "resid_post_layer_3" / f"trainer_{i}")
    shutil.copytree(FIXTURES / "AutoEncoder" / "trainer_0", tmp_path / "mlp_out_layer3" / "10_32768")
    repository = LocalRepository(tmp_path)
    found = READER.find(repository, "")
    assert [(p.hookpoint, p.label) for p in found] == [
        ("blocks.3.hook_resid_post", "TopK_a/trainer_0"),
        ("blocks.3.hook_resid_post", "TopK_a/trainer_1"),
        ("blocks.3.hook_mlp_out", "10_32768"),
    ]
    assert [p.folder for p in READER.find(repository, "mlp_out_layer3")] == ["mlp_out_layer3/10_32768"]


def test_the_folder_says_where_it_reads_when_settings_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "resid_post_layer_7" / "trainer_0"
    shutil.copytree(FIXTURES / "MatryoshkaBatchTopKSAE" / "trainer_0", folder)
    _, info, place = loaded(tmp_path)
    assert info.hookpoint == place.hookpoint == "blocks.7.hook_resid_post"


def test_checkpoints_are_found_when_asked_for_or_alone(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "AutoEncoderTopK", tmp_path / "run"))
    repository = LocalRepository(folder)
    (final,) = READER.find(repository, "")
    (step,) = READER.find(repository, "trainer_0/checkpoints")
    assert (final.label, step.label) == ("trainer_0", "trainer_0/step_100")
    assert step.files == ("trainer_0/config.json", "trainer_0/checkpoints/ae_100.pt")
    one = READER.load(repository, final, name="a", hookpoint="layers.3", device="cpu", dtype=torch.float32)
    other = READER.load(repository, step, name="b", hookpoint="layers.3", device="cpu", dtype=torch.float32)
    assert one.hash == other.hash
    (folder / "trainer_0" / "ae.pt").unlink()
    (alone,) = READER.find(LocalRepository(folder), "")
    assert alone == step


@pytest.mark.parametrize("kind", [k for k in FACTS if k not in ("AutoEncoderTopK", "BatchTopKSAE_unset", "transcoder")])
def test_classes_without_settings(kind: str, tmp_path: Path) -> None:
    shutil.copyfile(FIXTURES / kind / "trainer_0" / "ae.pt", tmp_path / "ae.pt")
    repository, place = opened(tmp_path)
    assert (place.hookpoint, place.label) == (None, "")
    if kind == "BatchTopKSAE":
        with pytest.raises(InputError, match=r"AutoEncoderTopK or BatchTopKSAE.*copy .*config\.json as well"):
            READER.inspect(repository, place)
        return
    coder, info, _ = loaded(tmp_path)
    whole, _, _ = loaded(FIXTURES / kind, "layers.3")
    assert info.base_model is None
    if kind != "JumpReluAutoEncoder":  # without settings it reads the output
        assert coder.hash == whole.hash
    assert info.architecture == FACTS[kind][0]


def test_topk_without_k(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "AutoEncoderTopK", tmp_path / "run"))
    change_tensors(folder, k=None, threshold=None)  # as early versions wrote it
    coder, _, _ = loaded(folder)
    assert coder.k == 5
    (folder / "trainer_0" / "config.json").unlink()
    with pytest.raises(InputError, match=r"class AutoEncoderTopK.*with which k"):
        READER.inspect(*opened(folder))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"dict_class": "CrossCoder"}, InputError, ["CrossCoder", "known: AutoEncoder,"]),
        ({"dict_class": ["AutoEncoder"]}, InputError, ["dict_class", "as text"]),
        ({"dict_class": "GatedAutoEncoder"}, CorruptError, ["GatedAutoEncoder", "it holds b_dec"]),
        ({"dict_class": "AutoEncoderTopK", "k": 0}, InputError, ["k as a whole number"]),
        ({"dict_class": "AutoEncoderTopK", "k": 49}, InputError, ["k = 49", "width 48"]),
        ({"dict_class": "AutoEncoderTopK", "k": 6}, CorruptError, ["k = 5", "says 6"]),
        ({"dict_size": 64}, CorruptError, ["dict_size 48", "says 64"]),
        ({"activation_dim": "16"}, InputError, ["activation_dim as a whole number"]),
        ({"lm_name": 3}, InputError, ["lm_name as text"]),
    ],
)
def test_settings_that_do_not_fit(copy: Path, settings: dict[str, Any], error: type, words: list[str]) -> None:
    change(copy, **settings)
    with pytest.raises(error) as raised:
        loaded(copy)
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"b_dec": torch.zeros(15)}, ["b_dec has shape [15]", "says [16]"]),
        ({"encoder__weight": torch.zeros(48)}, ["encoder.weight has shape [48]"]),
        ({"encoder__weight": torch.zeros(48, 16, dtype=torch.int32)}, ["not floating point"]),
        ({"encoder__bias": torch.full((48,), torch.nan)}, ["encoder.bias holds NaN"]),
        ({"encoder__bias": None}, ["does not hold the tensors of the BatchTopKSAE"]),
        ({"more": torch.zeros(1)}, ["does not hold the tensors of the BatchTopKSAE", "more"]),
        ({"threshold": torch.zeros(48)}, ["threshold has shape [48]"]),
    ],
)
def test_tensors_that_do_not_fit(copy: Path, tensors: dict[str, torch.Tensor | None], words: list[str]) -> None:
    change_tensors(copy, **tensors)
    with pytest.raises(CorruptError) as raised:
        loaded(copy)
    assert all(word in str(raised.value) for word in words), raised.value


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "trainer_0" / "ae.pt").unlink()
    repository, place = opened(copy)
    assert place.hookpoint == "blocks.3.hook_resid_post"
    with pytest.raises(NotFoundError, match=r"no .*trainer_0/ae\.pt.*copy the weights"):
        READER.inspect(repository, place)


@pytest.mark.parametrize("content", ["{", "[]", '{"trainer": 3}', '{"trainer": {}, "buffer": {"io": 7}}', "[" * 10**5])
def test_broken_settings(copy: Path, content: str) -> None:
    (copy / "trainer_0" / "config.json").write_text(content)
    repository, place = opened(copy)
    assert place.hookpoint is None
    with pytest.raises(ExegeteError):
        READER.inspect(repository, place)


def test_oversized_settings(copy: Path) -> None:
    (copy / "trainer_0" / "config.json").write_text(" " * (2 << 20))
    with pytest.raises(CorruptError, match="too large"):
        READER.inspect(*opened(copy))


class Opener:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_with_code_are_refused_and_not_run(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"encoder.weight": Opener(mark)}, copy / "trainer_0" / "ae.pt")
    with pytest.raises(InputError, match="could run code"):
        READER.inspect(*opened(copy))
    (copy / "trainer_0" / "ae.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CorruptError, match="damaged"):
        READER.inspect(*opened(copy))
    assert not mark.exists()


def test_folders_of_other_formats(tmp_path: Path) -> None:
    for file in (
        "cfg.json",
        "config.json",
        "trainer_1/config.json",
        "trainer_2/config.json",
        "sae.safetensors",
        "x.pt",
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('{"trainer": {"lr": 1}}')
    (tmp_path / "trainer_2" / "config.json").write_text("{")
    assert READER.find(LocalRepository(tmp_path), "") == ()
