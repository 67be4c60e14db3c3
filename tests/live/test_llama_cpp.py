"""llama-cpp-python's server, in an environment of its own: run where EXEGETE_LLAMA_PYTHON names its interpreter.

Make one with ``python -m venv llama && llama/bin/pip install 'llama-cpp-python[server]'``, which compiles for long, and
run ``EXEGETE_LLAMA_PYTHON=llama/bin/python pytest tests/live``. The model is a toy that the test writes as a GGUF file.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exegete.config import LLMConfig
from exegete.explainers.default import DefaultExplainer
from exegete.llm.client import LLMClient
from exegete.llm.open import client_from_spec
from exegete.prompts import names, prompt
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.fuzzing import FuzzingScorer
from exegete.testing import toy_llama
from exegete.tokens import TokenTable
from exegete.types import Example, ExampleSet, Explanation, LatentId, LLMReply, LLMRequest
from exegete.views import Donor, LatentView

INTERPRETER = os.environ.get("EXEGETE_LLAMA_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not INTERPRETER, reason="EXEGETE_LLAMA_PYTHON names no interpreter with llama-cpp-python"),
    pytest.mark.timeout(900),
]
MODEL = "toy"
WORDS = [b" the", b" cat", b" sat", b" on", b" a", b" mat", b" and", b" ran"]
WORD = 1
PROMPTS = ("The unit becomes active on certain text.", "You are given numbered excerpts", "a description\nof what")
SCHEMA = {
    "type": "object",
    "properties": {"hit": {"type": "boolean"}, "kind": {"type": "string", "enum": ["word", "name"]}},
    "required": ["hit", "kind"],
    "additionalProperties": False,
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, gguf: Callable[[Path, Path], None]) -> Path:
    made = toy_llama(tmp_path_factory.mktemp("llama") / "toy", layers=2, texts=map(prompt, names()), vocabulary=1500)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    gguf(made, made / "toy.gguf")
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    port = free_port()
    options = {
        "model": folder / "toy.gguf", "model_alias": MODEL, "host": "127.0.0.1", "port": port, "n_ctx": 4096,
        "logits_all": "true", "n_threads": 2, "chat_format": "chatml",
        "type_k": 0, "type_v": 0,  # keys and values in float32
    }  # fmt: skip
    command = [INTERPRETER, "-m", "llama_cpp.server", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]
    log = folder / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        while not answers(f"http://127.0.0.1:{port}/v1/models"):
            assert server.poll() is None, log.read_text(errors="replace")[-2000:]
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
def client(url: str, tmp_path: Path) -> Iterator[Any]:
    config = LLMConfig(timeout=300.0, concurrency=2)
    made: Any = client_from_spec(f"{url}#{MODEL}", config, folder=tmp_path, cache=tmp_path / "replies.db")
    yield made
    made.end()


def ask(client: LLMClient, *requests: LLMRequest) -> list[LLMReply]:
    async def together() -> list[LLMReply]:
        try:
            return list(await asyncio.gather(*map(client.reply, requests)))
        finally:
            await client.close()

    return asyncio.run(together())


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def expected(reference: tuple[Any, Any], text: str) -> tuple[list[int], torch.Tensor]:
    """Token ids of a text, and log probabilities [n, vocabulary] before each, the start token first of all."""
    model, tokenizer = reference
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        rows = model(torch.tensor([[0, *ids]])).logits.log_softmax(-1)[0]
    return ids, rows


def test_echoed_prompt_logprobs_are_those_of_hugging_face(client: Any, reference: tuple[Any, Any]) -> None:
    requests = [LLMRequest(prompt=p, max_tokens=1, logprobs=2, prompt_logprobs=True) for p in PROMPTS]
    for text, reply in zip(PROMPTS, ask(client, *requests), strict=True):
        ids, rows = expected(reference, text)
        found = reply.prompt_logprobs
        assert found is not None
        assert "".join(token.token for token in found) == text
        assert len(found) == len(ids)
        assert found[0].logprob is None  # this server does not say it; it is missing, and not 0
        wanted = [float(rows[i, token]) for i, token in enumerate(ids)]
        assert [token.logprob for token in found[1:]] == pytest.approx(wanted[1:], abs=1e-3)


def test_logprobs_of_generated_tokens_are_those_of_hugging_face(client: Any, reference: tuple[Any, Any]) -> None:
    (reply,) = ask(client, LLMRequest(prompt=PROMPTS[0], max_tokens=1, logprobs=3))
    assert reply.logprobs is not None
    _, rows = expected(reference, PROMPTS[0])
    best = rows[-1].topk(3)
    assert reply.logprobs[0].logprob == pytest.approx(float(best.values[0]), abs=1e-3)
    given = sorted(reply.logprobs[0].alternatives.values(), reverse=True)[:3]
    assert given == pytest.approx(best.values.tolist(), abs=1e-3)


def test_capabilities_are_seen(client: Any) -> None:
    async def asked() -> Any:
        try:
            await client.check()
            return await client.capabilities()
        finally:
            await client.close()

    found = asyncio.run(asked())
    assert (found.chat, found.completions, found.logprobs, found.prompt_logprobs, found.schema) == (
        True, True, True, True, True,
    )  # fmt: skip


def test_a_schema_goes_as_json_object_because_json_schema_breaks_the_server(url: str, client: Any) -> None:
    messages = [{"role": "user", "content": "x"}]
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    body = {"model": MODEL, "messages": messages, "max_tokens": 64, "response_format": schema}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=300)
    assert raised.value.code == 500
    raised.value.close()

    requests = [LLMRequest(messages=tuple(messages), max_tokens=200, schema=SCHEMA, seed=i) for i in range(3)]
    for reply in ask(client, *requests):
        answer = json.loads(reply.text or "")
        assert set(answer) == {"hit", "kind"}
        assert isinstance(answer["hit"], bool)
        assert answer["kind"] in ("word", "name")


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


def test_explaining_detecting_and_fuzzing_end_in_counted_states(client: Any) -> None:
    given = view(client)
    (explanation,) = DefaultExplainer(max_tokens=40).explain([given], concurrency=2)
    assert explanation.status in ("ok", "unparsed")
    told = Explanation(latent=given.latent, text="the word cat", status="ok", explainer={})
    for scorer in (DetectionScorer(probabilities=True), FuzzingScorer()):
        (scoring,) = scorer.score([(told, given)], concurrency=2)
        assert {score.control for score in scoring.scores} == {"none", "other_latent"}
        for score in scoring.scores:
            assert score.n_total == 12
            assert score.n_scored + score.n_failed == 12
            few = score.control == "other_latent"  # one donor has a score, and makes no interval
            assert math.isnan(score.value) == (few or score.n_scored == 0)
        judged = [judgement for part in scoring.judgements.values() for judgement in part]
        assert len(judged) == 24
        assert {j.status for j in judged} <= {"ok", "unparsed", "failed", "refused"}
        assert all(j.probability is None or 0 <= j.probability <= 1 for j in judged)
