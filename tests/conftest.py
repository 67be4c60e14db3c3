"""Fixtures shared by all tests: no network, a clean environment, and one small subject with its coders."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Machines differ in speed, so no example has a deadline; under CI every run draws the same examples.
settings.register_profile("exegete", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("exegete")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


_TESTS = itertools.count()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keys, kept replies and prices of the developer's own shell never reach a test."""
    own = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("EXEGETE_CACHE", str(own / f"cache-{next(_TESTS)}"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(own / "config"))
    for name in ("OPENAI_API_KEY", "OPENROUTER_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random tiny Llama (``model``), two TopK coders (``coders``) and text (``text.jsonl``)."""
    import json
    import random

    from exegete.testing import toy_llama, toy_topk_coder

    folder = tmp_path_factory.mktemp("toy")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "ran", "home", "(", ")", "1", "22", "\n", "def"]
    draw = random.Random(0)
    texts = [" ".join(draw.choice(words) for _ in range(160)) for _ in range(40)]
    toy_llama(folder / "model", seed=1, layers=2, d=32, texts=texts)
    toy_topk_coder(folder / "coders", d=32, width=64, k=4, hookpoints=("layers.0", "layers.0.mlp"), seed=2)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder
