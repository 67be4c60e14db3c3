"""Goodfire's and Qwen Scope's files: names, and files that are not what they should be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.coders.formats.format import CoderFormat
from exegete.coders.formats.goodfire import Goodfire
from exegete.coders.formats.qwen_scope import QwenScope
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, ExegeteError, InputError

D, WIDTH = 8, 20
GOODFIRE = "Llama-3.3-70B-Instruct-SAE-l50.pt"
QWEN = "SAE-Res-Qwen3.5-27B-W80K-L0_4/layer3.sae.pt"
STATES: dict[str, dict[str, Any]] = {
    GOODFIRE: {
        "encoder_linear.weight": torch.ones(WIDTH, D),
        "encoder_linear.bias": torch.zeros(WIDTH),
        "decoder_linear.weight": torch.ones(D, WIDTH),
        "decoder_linear.bias": torch.zeros(D),
    },
    QWEN: {
        "W_enc": torch.ones(WIDTH, D),
        "b_enc": torch.zeros(WIDTH),
        "W_dec": torch.ones(D, WIDTH),
        "b_dec": torch.zeros(D),
    },
}
READERS: dict[str, CoderFormat] = {GOODFIRE: Goodfire(), QWEN: QwenScope()}


def written(top: Path, file: str, **changed: Any) -> None:
    (top / file).parent.mkdir(parents=True, exist_ok=True)
    state = {**STATES[file], **changed}
    torch.save({n: v for n, v in state.items() if v is not None}, top / file)


def load(reader: CoderFormat, folder: Path) -> None:
    repository = LocalRepository(folder)
    (place,) = reader.find(repository, "")
    assert place.hookpoint is not None
    reader.load(repository, place, name="c", hookpoint=place.hookpoint, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("file", "hookpoint", "model"),
    [
        (GOODFIRE, "blocks.50.hook_resid_post", "meta-llama/Llama-3.3-70B-Instruct"),
        (QWEN, "blocks.3.hook_resid_post", "Qwen/Qwen3.5-27B"),
    ],
)
def test_names(tmp_path: Path, file: str, hookpoint: str, model: str) -> None:
    written(tmp_path, file)
    repository = LocalRepository(tmp_path)
    (place,) = READERS[file].find(repository, "")
    info = READERS[file].inspect(repository, place)
    assert (place.hookpoint, info.hookpoint, info.base_model, info.width) == (hookpoint, hookpoint, model, WIDTH)


@pytest.mark.parametrize(
    ("file", "changed", "error", "match"),
    [
        (GOODFIRE, {"encoder_linear.weight": None}, CorruptError, r"lacks encoder_linear\.weight"),
        (GOODFIRE, {"decoder_linear.weight": torch.ones(WIDTH, D)}, CorruptError, r"decoder_linear\.weight has shape"),
        (GOODFIRE, {"encoder_linear.weight": torch.ones(4)}, CorruptError, r"expected \[width, d_in\]"),
        (GOODFIRE, {"encoder_linear.bias": torch.full((WIDTH,), torch.nan)}, CorruptError, "holds NaN"),
        (QWEN, {"W_enc": torch.ones(D)}, CorruptError, r"lacks W_enc \[width, d_in\]"),
        (QWEN, {"W_dec": None}, CorruptError, "lacks W_dec"),
        (QWEN, {"W_enc": torch.ones(3, D), "b_enc": torch.ones(3), "W_dec": torch.ones(D, 3)}, InputError, "k = 4"),
        (QWEN, {"b_dec": torch.full((D,), torch.nan)}, CorruptError, "b_dec holds NaN"),
    ],
)
def test_bad_files(tmp_path: Path, file: str, changed: dict[str, Any], error: type[ExegeteError], match: str) -> None:
    written(tmp_path, file, **changed)
    with pytest.raises(error, match=match):
        load(READERS[file], tmp_path)


def test_k_is_in_the_name_only(tmp_path: Path) -> None:
    written(tmp_path, QWEN)
    (tmp_path / QWEN).rename(tmp_path / "layer3.sae.pt")
    with pytest.raises(InputError, match="how many latents fire"):
        load(QwenScope(), tmp_path)


class Runs:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", [GOODFIRE, QWEN])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, file: str) -> None:
    written(tmp_path, file, more=Runs(tmp_path / "ran"))
    with pytest.raises(InputError, match="could run code"):
        load(READERS[file], tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / file).write_bytes(b"not a pickle")
    with pytest.raises(CorruptError, match="damaged"):
        load(READERS[file], tmp_path)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("trainer_0/ae.pt", "autoencoders/3.pt", "layer_3.pt", "model-SAE.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert Goodfire().find(LocalRepository(tmp_path), "") == ()
    assert QwenScope().find(LocalRepository(tmp_path), "") == ()
