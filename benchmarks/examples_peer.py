"""Side (c) of `benchmarks/examples.py`: EleutherAI's delphi, in an environment of its own.

Selecting is its ``LatentDataset``, constructed and iterated over with its default settings. Rendering is what its
explainer and its detection and fuzzing scorers do before they send anything.
"""

from __future__ import annotations

import importlib
import logging
import sys
import time
from pathlib import Path
from typing import Any, final

import torch
from benchmarks.collect_worker import Side, arguments, serve
from benchmarks.examples_setting import (
    CODER,
    DECODE,
    EXPLANATION,
    N_NEGATIVES,
    N_TEST,
    N_TRAIN,
    PER_REQUEST,
    RENDER,
    WINDOW,
    read_setting,
)
from benchmarks.peer import delphi


@final
class Peer(Side):
    """delphi's examples and prompts of the latents of one setting."""

    def __init__(self, folder: Path, threads: int) -> None:
        logging.getLogger("delphi").setLevel(logging.ERROR)
        torch.set_num_threads(threads)
        self._setting = read_setting(folder)
        config = delphi("config")
        self._dataset: Any = delphi("latents.loader").LatentDataset
        self._sampler = config.SamplerConfig(n_examples_train=N_TRAIN, n_examples_test=N_TEST)
        self._constructor = config.ConstructorConfig(example_ctx_len=WINDOW, n_non_activating=N_NEGATIVES)
        explainers = delphi("explainers")
        scorers = delphi("scorers")
        self._explainer: Any = explainers.DefaultExplainer(None)
        self._scorers: tuple[Any, ...] = tuple(
            make(None, n_examples_shown=PER_REQUEST) for make in (scorers.DetectionScorer, scorers.FuzzingScorer)
        )
        transformers = importlib.import_module("transformers")
        # Not AutoTokenizer: what transformers 5 wrote beside the tokenizer names a class that 4 does not have.
        file = str(self._setting.model / "tokenizer.json")
        self._tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
        self._records: dict[int, Any] = {}

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Select examples of the first ``count`` latents, or render the prompts of those named.

        Selecting has decoded the tokens; how long that takes is found by decoding them once more.
        """
        if request["do"] == RENDER:
            return self._render(request["latents"])
        if request["do"] == DECODE:
            return self._decode(request["latents"])
        return self._select(self._setting.latents[: request["count"]])

    def _select(self, latents: tuple[int, ...]) -> dict[str, Any]:
        self._records = {}
        begun, cores = time.perf_counter(), time.process_time()
        dataset = self._dataset(
            self._setting.exported / "latents",
            self._sampler,
            self._constructor,
            tokenizer=self._tokenizer,
            modules=[CODER],
            latents={CODER: torch.tensor(latents)},
        )
        prepared = time.perf_counter()
        for record in dataset:
            record.examples = []  # all windows that fire; they have been drawn from
            self._records[record.latent.latent_index] = record
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cores
        tokens = dataset.tokens.numel()
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "preparing": prepared - begun,
            "sizes": {i: [len(r.train), len(r.test), len(r.not_active)] for i, r in self._records.items()},
            "firings": {i: round(r.per_token_frequency * tokens) for i, r in self._records.items()},
        }

    def _render(self, latents: list[int]) -> dict[str, Any]:
        requests = characters = 0
        seconds = cpu_seconds = 0.0
        for index in latents:
            begun, cores = time.perf_counter(), time.process_time()
            made = self._prompts(self._records[index])
            seconds, cpu_seconds = seconds + time.perf_counter() - begun, cpu_seconds + time.process_time() - cores
            requests += len(made)
            characters += sum(len(message["content"]) for one in made for message in one)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "requests": requests, "characters": characters}

    def _decode(self, latents: list[int]) -> dict[str, Any]:
        begun, cores = time.perf_counter(), time.process_time()
        for index in latents:
            record = self._records[index]
            for example in (*record.train, *record.test, *record.not_active):
                self._tokenizer.batch_decode(example.tokens)
        return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cores}

    def _prompts(self, record: Any) -> list[Any]:
        """Return all prompts of a latent, made as ``__call__`` of explainer and scorers makes them."""
        record.explanation = EXPLANATION
        prompts = [self._explainer._build_prompt(record.train)]
        for scorer in self._scorers:
            samples = scorer._prepare(record)
            scorer.rng.shuffle(samples)
            prompts += [scorer._build_prompt(record.explanation, batch) for batch in scorer._batch(samples)]
        return prompts


if __name__ == "__main__":
    serve(lambda: Peer(*arguments(sys.argv)))
