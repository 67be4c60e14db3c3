"""Lenses on disk: both forms, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.lens import TunedLens, export_lens, load_lens, new_lens, save_lens
from exegete.subjects import Subject
from exegete.subjects.readout import read_out
from exegete.subjects.sites import residuals

Make = Callable[..., TunedLens]

TOKENS = torch.tensor([[0, 5, 9, 40, 7], [0, 8, 8, 61, 2]])


def package(folder: Path, subject: Subject, params: dict[str, torch.Tensor], **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "base_model_name_or_path": "them/model",
        "d_model": 16,
        "num_hidden_layers": 3,
        "bias": True,
        "unembed_hash": read_out(subject).hash,
        "lens_type": "linear_tuned_lens",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(params, folder / "params.pt")
    return folder


def params(entries: int = 3, d: int = 16) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    for i in range(entries):
        made[f"{i}.weight"] = torch.randn(d, d, generator=draw)
        made[f"{i}.bias"] = torch.randn(d, generator=draw)
    return made


@pytest.mark.parametrize("sites", [None, (0,), (-1, 1, 2)])
def test_a_lens_read_back_gives_the_same_logits(
    trained: Make, sites: tuple[int, ...] | None, llama: Subject, tmp_path: Path
) -> None:
    lens = trained(llama, sites=sites)
    save_lens(lens, tmp_path)
    again = load_lens(tmp_path, llama)
    assert again.sites == lens.sites
    for site, h in residuals(llama, TOKENS, lens.sites).items():
        assert torch.equal(lens.logits(site, h), again.logits(site, h))


def test_entry_i_of_the_package_is_site_i_minus_one(llama: Subject, tmp_path: Path) -> None:
    given = params()
    lens = load_lens(package(tmp_path, llama, given), llama)
    assert lens.sites == (-1, 0, 1)
    for entry in range(3):
        assert torch.equal(lens.translators[entry - 1].weight, given[f"{entry}.weight"])
    forked = load_lens(tmp_path, llama, first_site=0)
    assert forked.sites == (0, 1, 2)
    assert torch.equal(forked.translators[0].weight, given["0.weight"])


def test_the_packages_form_there_and_back(trained: Make, llama: Subject, tmp_path: Path) -> None:
    lens = trained(llama)
    assert export_lens(lens, tmp_path) == ()
    again = load_lens(tmp_path, llama)
    for site, h in residuals(llama, TOKENS, lens.sites).items():
        assert torch.equal(lens.logits(site, h), again.logits(site, h))
    held = torch.load(tmp_path / "params.pt", weights_only=True)
    assert sorted(held) == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]


def test_a_lens_without_biases_gets_zeros_there(llama: Subject, tmp_path: Path) -> None:
    lens = new_lens(llama, bias=False)
    export_lens(lens, tmp_path)
    again = load_lens(tmp_path, llama)
    bias = again.translators[0].bias
    assert bias is not None
    assert not bias.any()


def test_sites_that_are_missing_become_identities_there(trained: Make, llama: Subject, tmp_path: Path) -> None:
    assert export_lens(trained(llama, sites=(0,)), tmp_path) == (-1, 1)
    again = load_lens(tmp_path, llama)
    assert [again.translators[s].is_identity for s in again.sites] == [True, False, True]


def test_what_the_package_cannot_hold_is_refused(trained: Make, llama: Subject, mamba: Subject, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no translator of site 2"):
        export_lens(trained(llama, sites=(0, 2)), tmp_path)
    with pytest.raises(InputError, match="no state-aware lenses"):
        export_lens(new_lens(mamba, states={0: 5}), tmp_path)


def test_params_in_half_floats_and_as_safetensors_are_read(llama: Subject, tmp_path: Path) -> None:
    given = params()
    package(tmp_path / "half", llama, {name: value.half() for name, value in given.items()})
    assert load_lens(tmp_path / "half", llama).translators[0].weight.dtype == torch.float32
    place = package(tmp_path / "safe", llama, {})
    (place / "params.pt").unlink()
    save_file(given, str(place / "params.safetensors"))
    assert torch.equal(load_lens(place, llama).translators[1].weight, given["2.weight"])


def test_a_lens_of_another_model_is_refused(
    trained: Make, llama: Subject, other_llama: Subject, mamba: Subject, tmp_path: Path
) -> None:
    save_lens(trained(llama), tmp_path / "own")
    export_lens(trained(llama), tmp_path / "package")
    for place in (tmp_path / "own", tmp_path / "package"):
        with pytest.raises(MismatchError, match="whose unembedding is another"):
            load_lens(place, other_llama)
        with pytest.raises(MismatchError, match=r"3 blocks of 16 dimensions; .* has 3 of 32"):
            load_lens(place, mamba)


def test_a_lens_without_a_hash_is_read_with_a_warning(
    llama: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_lens(package(tmp_path, llama, params(), unembed_hash=None), llama)
    assert "does not say which unembedding" in caplog.text


def test_bad_folders_are_refused_in_one_line(llama: Subject, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no lens in"):
        load_lens(tmp_path, llama)
    with pytest.raises(InputError, match="type 'other'"):
        load_lens(package(tmp_path / "type", llama, params(), lens_type="other"), llama)
    with pytest.raises(MismatchError, match="has 2 entries"):
        load_lens(package(tmp_path / "few", llama, params(2)), llama)
    with pytest.raises(MismatchError, match="another first site"):
        load_lens(package(tmp_path / "many", llama, params(5)), llama)
    with pytest.raises(CorruptError, match="lacks translators"):
        load_lens(package(tmp_path / "gap", llama, {"1.weight": torch.zeros(16, 16)}), llama)
    with pytest.raises(CorruptError, match="holds 'weight'"):
        load_lens(package(tmp_path / "name", llama, {"weight": torch.zeros(16, 16)}), llama)
    with pytest.raises(CorruptError, match="are needed"):
        load_lens(package(tmp_path / "shape", llama, params(3, 8)), llama)
    bad = params()
    bad["1.bias"][0] = float("nan")
    with pytest.raises(CorruptError, match="NaN"):
        load_lens(package(tmp_path / "nan", llama, bad), llama)


def test_a_pickle_that_runs_code_is_not_run(llama: Subject, tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)  # type: ignore[return-value]

    package(tmp_path / "bad", llama, {"0.weight": Bad()})  # type: ignore[dict-item]
    with pytest.raises((InputError, CorruptError)):
        load_lens(tmp_path / "bad", llama)
    assert not (tmp_path / "ran").exists()


def test_damage_is_found(trained: Make, llama: Subject, tmp_path: Path) -> None:
    save_lens(trained(llama), tmp_path)
    data = bytearray((tmp_path / "lens.safetensors").read_bytes())
    data[-3] ^= 0xFF
    (tmp_path / "lens.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match="checksum is wrong"):
        load_lens(tmp_path, llama)


def test_a_model_in_bfloat16_takes_the_lens_of_its_float32_self(
    trained: Make, llama: Subject, llama_folder: Path, tmp_path: Path
) -> None:
    from exegete.subjects import load_subject

    save_lens(trained(llama), tmp_path)
    for dtype in ("bfloat16", "float16"):
        load_lens(tmp_path, load_subject(str(llama_folder), device="cpu", dtype=dtype))


def test_an_unembedding_that_moved_by_more_than_one_per_cent_is_another(
    trained: Make, llama_folder: Path, tmp_path: Path
) -> None:
    from exegete.subjects import load_subject

    subject = load_subject(str(llama_folder), device="cpu")
    save_lens(trained(subject), tmp_path)
    weight = subject.model.get_output_embeddings().weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    with torch.no_grad():
        weight += 0.003 * noise  # about what a load in bfloat16 rounds away
        load_lens(tmp_path, subject)
        weight += 0.05 * noise
    with pytest.raises(MismatchError, match="whose unembedding is another"):
        load_lens(tmp_path, subject)


def test_weights_that_are_not_there_are_missed(trained: Make, llama: Subject, tmp_path: Path) -> None:
    save_lens(trained(llama), tmp_path)
    (tmp_path / "lens.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"lacks its lens\.safetensors"):
        load_lens(tmp_path, llama)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sites": [0, 99]}, "names sites that"),
        ({"sites": "all"}, "names sites that"),
        ({"sites": []}, "names no site"),
        ({"sites": [0, 0]}, "names no site, or one twice"),
        ({"d": None}, "is for .* None"),
        ({"d": "9" * 5000, "subject": "a\nb\x1b[31m"}, "^[^\n\x1b]{1,700}$"),
        ({"fingerprint": ["x"] * 32}, "another than that of"),
        ({"fingerprint": [10**400] * 32}, "another than that of"),
        ({"fingerprint": [float("1e308")] * 32, "subject": "a\nb"}, "^[^\n]+$"),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(
    trained: Make, changes: dict[str, object], said: str, llama: Subject, tmp_path: Path
) -> None:
    from exegete.store.checks import read_manifest, write_manifest

    save_lens(trained(llama), tmp_path)
    data = read_manifest(tmp_path / "lens.json", number=1)
    write_manifest(tmp_path / "lens.json", {**data, **changes})
    with pytest.raises((CorruptError, MismatchError), match=said):
        load_lens(tmp_path, llama)
    del data["fingerprint"]
    write_manifest(tmp_path / "lens.json", data)
    with pytest.raises(CorruptError, match="lacks fields"):
        load_lens(tmp_path, llama)


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_a_checkpoint_cut_short_is_one_line(size: int, tmp_path: Path) -> None:
    from exegete.lens.checkpoints import Checkpoint, read_checkpoint, write_checkpoint

    held = {"tuned/0": torch.zeros(3000)}
    found = Checkpoint(step=1, epoch=0, place=0, translators=held, optimizers={}, best={}, first={}, last={})
    write_checkpoint(tmp_path, {}, found)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptError, match="remove it to train from the start"):
        read_checkpoint(tmp_path, {})
