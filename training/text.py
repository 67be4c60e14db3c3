"""Token rows for training the demo's models: train-side standard-library text, packed with a BOS before each file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from exegete.demo.stdlib import SourceFile, source_files


def documents(side: str, *, tests: bool) -> list[SourceFile]:
    """Return the files of a side; test folders count as train text only."""
    found = []
    for file in source_files():
        in_tests = any(part in {"test", "tests", "idle_test"} for part in file.key.split("/")[:-1])
        if file.side == side and (tests or not in_tests):
            found.append(file)
    return found


def training_files() -> list[SourceFile]:
    """Return everything the models may see: the train side with its tests, and the excluded families but for tables."""
    tables = ("encodings/", "html/entities", "stringprep", "re/_casefix", "_sysconfigdata")
    excluded = [f for f in documents("excluded", tests=True) if not f.key.startswith(tables)]
    return documents("train", tests=True) + excluded


def encode(files: list[SourceFile], tokenizer_path: Path) -> list[np.ndarray]:
    """Tokenize each file, BOS first, as uint16 ids."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    encoded = tokenizer([f.text for f in files])["input_ids"]
    return [np.asarray(ids, dtype=np.uint16) for ids in encoded]
