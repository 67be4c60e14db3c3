"""Side (b) of `benchmarks/examples.py`: exegete's examples and requests of the same latents.

Selecting begins with opening the store, and ends with the example sets; rendering ends with the requests, which are not
sent.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, final

from benchmarks.collect_worker import Side, arguments, serve
from benchmarks.examples_setting import (
    CODER,
    EXPLANATION,
    N_NEGATIVES,
    N_TEST,
    N_TRAIN,
    PER_REQUEST,
    RENDER,
    WINDOW,
    read_setting,
)

from exegete.config import ExampleConfig
from exegete.examples import StoreData, select_many, split_segments
from exegete.explainers.default import DefaultExplainer
from exegete.llm.scripted import ScriptedClient
from exegete.runs import open_run
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.fuzzing import FuzzingScorer
from exegete.types import ExampleSet, Explanation, LLMRequest
from exegete.views import LatentView


@final
class Exegete(Side):
    """exegete's examples and requests of the latents of one setting."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._setting = read_setting(folder)
        self._config = ExampleConfig(window=WINDOW, n_train=N_TRAIN, n_test=N_TEST, n_negatives=N_NEGATIVES)
        self._explainer = DefaultExplainer(n_examples=N_TRAIN)
        self._scorers = tuple(make(judge="llm", per_request=PER_REQUEST) for make in (DetectionScorer, FuzzingScorer))
        self._llm = ScriptedClient([])
        self._sets: dict[int, ExampleSet] = {}

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Select examples of the first ``count`` latents, or render the requests of those named."""
        if request["do"] == RENDER:
            return self._render(request["latents"])
        return self._select(self._setting.latents[: request["count"]])

    def _select(self, latents: tuple[int, ...]) -> dict[str, Any]:
        config = self._config
        begun, cores = time.perf_counter(), time.process_time()
        store = open_run(self._setting.run).store(CODER)
        split = split_segments(store.corpus, seed=0, test_share=config.test_share, duplicates=config.duplicates)
        data = StoreData(store, split)
        prepared = time.perf_counter()
        chosen = select_many(data, latents, config)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cores
        self._sets = {found.latent.index: found for found in chosen if isinstance(found, ExampleSet)}
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "preparing": prepared - begun,
            "sizes": {i: _sizes(found) for i, found in self._sets.items()},
            "firings": {i: int(store.counts[i]) for i in self._sets},
        }

    def _render(self, latents: list[int]) -> dict[str, Any]:
        requests = characters = 0
        seconds = cpu_seconds = 0.0
        for index in latents:
            begun, cores = time.perf_counter(), time.process_time()
            made = self._requests(self._sets[index])
            seconds, cpu_seconds = seconds + time.perf_counter() - begun, cpu_seconds + time.process_time() - cores
            requests += len(made)
            characters += sum(len(message["content"]) for one in made for message in one.messages)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "requests": requests, "characters": characters}

    def _requests(self, chosen: ExampleSet) -> list[LLMRequest]:
        """Return all requests of a latent."""
        if chosen.table is None:
            raise ValueError("the examples do not say what their tokens stand for")
        view = LatentView(latent=chosen.latent, tokens=chosen.table, examples=chosen, llm=self._llm)
        explanation = Explanation(latent=chosen.latent, text=EXPLANATION, status="ok", explainer=self._explainer.spec)
        requests = [self._explainer.request(view)]
        for scorer in self._scorers:
            requests += scorer.requests(explanation, view)
        return requests


def _sizes(chosen: ExampleSet) -> list[int]:
    parts = (("train", True), ("test", True), ("test", False))
    return [len(chosen.part(split, fires=fires)) for split, fires in parts]  # type: ignore[arg-type]


if __name__ == "__main__":
    serve(lambda: Exegete(*arguments(sys.argv)))
