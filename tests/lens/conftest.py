"""Small subjects of three families, and a text of forty documents."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exegete.api import load_corpus
from exegete.lens import LensText, TunedLens, new_lens
from exegete.subjects import Subject, load_subject
from exegete.testing import toy_llama, toy_subject_model

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "ran", "home", "(", ")", "1", "22", "\n", "naïve"]


def _texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(8, 60))) for _ in range(40)]


@pytest.fixture(scope="session")
def lens_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lens-text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts()))
    return path


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_llama(tmp_path_factory.mktemp("lens") / "llama", seed=1, layers=3, d=16, texts=_texts(), tied=False)


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Subject:
    return load_subject(str(llama_folder), device="cpu")


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = toy_llama(tmp_path_factory.mktemp("lens") / "other", seed=2, layers=3, d=16, texts=_texts(), tied=False)
    return load_subject(str(folder), device="cpu")


def _recurrent(family: str, folder: Path) -> Subject:
    return load_subject(str(toy_subject_model(family, folder, seed=3, texts=_texts())), device="cpu")


@pytest.fixture(scope="session")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return _recurrent("mamba", tmp_path_factory.mktemp("lens") / "mamba")


@pytest.fixture(scope="session")
def rwkv(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return _recurrent("rwkv", tmp_path_factory.mktemp("lens") / "rwkv")


def _text(subject: Subject, path: Path, row_length: int) -> LensText:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # documents are split by their names, which are so the same wherever the tests run
        corpus = load_corpus(path.name, tokenizer=subject.tokenizer, row_length=row_length)
    return LensText(corpus, seed=0, test_share=0.3)


@pytest.fixture(scope="session")
def llama_text(llama: Subject, lens_text_file: Path) -> LensText:
    return _text(llama, lens_text_file, 32)


@pytest.fixture(scope="session")
def mamba_text(mamba: Subject, lens_text_file: Path) -> LensText:
    return _text(mamba, lens_text_file, 16)


@pytest.fixture(scope="session")
def trained() -> Callable[..., TunedLens]:
    """Return a function that makes a lens with weights as training might leave them."""

    def make(subject: Subject, *, sites: tuple[int, ...] | None = None) -> TunedLens:
        lens = new_lens(subject, sites)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for translator in lens.translators.values():
                for parameter in translator.parameters():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        return lens

    return make
