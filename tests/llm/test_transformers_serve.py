"""A real server that nobody here wrote, ``transformers serve``, with a tiny chat model made for it.

It takes ``logprobs`` and ``response_format``, answers 200, and does neither: that must be noticed, not assumed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exegete.config import LLMConfig
from exegete.explainers.default import DefaultExplainer
from exegete.llm.client import LLMClient
from exegete.llm.open import client_from_spec
from exegete.prompts import names, prompt
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.fuzzing import FuzzingScorer
from exegete.testing import toy_llama
from exegete.tokens import TokenTable
from exegete.types import Example, ExampleSet, Explanation, LatentId, LLMRequest
from exegete.views import Donor, LatentView

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason="transformers serve needs: pip install 'transformers[serving]'",
)
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
WORDS = [b" the", b" cat", b" sat", b" on", b" a", b" mat", b" and", b" ran"]
WORD = 1


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows our prompts' words, and ends after every second token or so."""
    made = toy_llama(tmp_path_factory.mktemp("serve") / "chat", layers=2, texts=map(prompt, names()), vocabulary=1500)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(1, 1500, 2))}))
    return made


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, cache = free_port(), tmp_path_factory.mktemp("hub")
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = "from transformers.cli.transformers import main; main()"
    options = [
        "serve",
        str(folder),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    log = cache / "log"
    with log.open("wb") as out:
        server = subprocess.Popen([sys.executable, "-c", command, *options], env=environment, stdout=out, stderr=out)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture
def client(url: str, folder: Path, tmp_path: Path) -> Iterator[Any]:
    config = LLMConfig(timeout=120.0, concurrency=2)
    made: Any = client_from_spec(f"{url}#{folder}", config, folder=tmp_path, cache=tmp_path / "replies.db")
    yield made
    made.end()


def view(llm: LLMClient) -> LatentView:
    """A latent that fires on one word: ten train windows, six test windows of each kind."""
    draw = np.random.default_rng(0)
    made = []
    for place in range(22):
        tokens = draw.choice([t for t in range(len(WORDS)) if t != WORD], 8)
        values = np.zeros(8, dtype=np.float32)
        if place < 16:
            tokens[3], values[3] = WORD, 1.0 + place
        made.append(
            Example(
                split="train" if place < 10 else "test", fires=place < 16, stratum="random" if place < 16 else "silent",
                row=place, start=0, tokens=tokens.astype(np.uint32), activations=values, document=place,
                inclusion_probability=0.5,
            )
        )  # fmt: skip
    latent = LatentId(coder="c", index=WORD)
    examples = ExampleSet(latent=latent, examples=tuple(made), maximum=26.0, firing_rate=0.1, frame=100, seed=0)
    donor = Explanation(latent=LatentId(coder="c", index=2), text="the word mat", status="ok", explainer={})
    table = TokenTable(WORDS, [])
    return LatentView(
        latent=latent, tokens=table, examples=examples, donors=(Donor(explanation=donor, rank=0),), llm=llm
    )


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        assert response.status == 200
        found: dict[str, Any] = json.loads(response.read())
        return found


def test_what_the_server_silently_ignores_is_noticed(url: str, folder: Path, client: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    body = {"model": str(folder), "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    (choice,) = post(
        f"{url}/chat/completions", {**body, "logprobs": True, "top_logprobs": 2, "response_format": schema}
    )["choices"]
    assert choice.get("logprobs") is None
    assert not choice["message"]["content"].startswith("{")

    async def asked() -> Any:
        try:
            await client.check()
            return await client.capabilities()
        finally:
            await client.close()

    found = asyncio.run(asked())
    assert (found.chat, found.completions) == (True, True)
    assert (found.logprobs, found.prompt_logprobs, found.schema) == (False, False, False)


def test_chat_and_completion_come_with_their_counts(client: Any) -> None:
    async def both() -> Any:
        chat = LLMRequest(messages=({"role": "user", "content": "The unit"},), max_tokens=6, logprobs=2)
        plain = LLMRequest(prompt="The unit becomes", max_tokens=6, prompt_logprobs=True)
        try:
            return await asyncio.gather(client.reply(chat), client.reply(plain))
        finally:
            await client.close()

    for reply in asyncio.run(both()):
        assert reply.finish in ("stop", "length")
        assert isinstance(reply.text, str)
        assert reply.prompt_tokens > 0
        assert 0 < reply.completion_tokens <= 6
        assert (reply.logprobs, reply.prompt_logprobs) == (None, None)  # missing, never 0


def test_explaining_detecting_and_fuzzing_end_in_counted_states(client: Any) -> None:
    given = view(client)
    (explanation,) = DefaultExplainer(max_tokens=40).explain([given], concurrency=2)
    assert explanation.status in ("ok", "unparsed")
    told = Explanation(latent=given.latent, text="the word cat", status="ok", explainer={})
    whole = ("balanced_accuracy", "sensitivity", "specificity", "f1")
    for scorer in (DetectionScorer(probabilities=True), FuzzingScorer()):
        (scoring,) = scorer.score([(told, given)], concurrency=2)
        assert {score.control for score in scoring.scores} == {"none", "other_latent"}
        for score in scoring.scores:
            assert score.n_total == (12 if score.metric in whole else score.n_total)
            assert math.isnan(score.value) or score.n_scored > 0
        judged = [judgement for part in scoring.judgements.values() for judgement in part]
        assert len(judged) == 24
        assert {j.status for j in judged} <= {"ok", "unparsed", "failed", "refused"}
        assert all(j.probability is None for j in judged)  # no log probabilities, so no probabilities
    totals = client.spending.totals()
    assert sum(spent.requests for spent in totals) > 0
