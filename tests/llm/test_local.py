"""Models of this process: held against generate and explicit forward passes of the same weights."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.config import LLMConfig
from exegete.errors import InputError, LLMError, MissingExtraError, NotFoundError
from exegete.llm.backend import Backend, TransientError
from exegete.llm.gathering import Gathering
from exegete.llm.local import TransformersBackend
from exegete.llm.open import client_from_spec
from exegete.llm.vllm_local import VLLMBackend
from exegete.testing import toy_llama, toy_subject_model
from exegete.types import LLMReply, LLMRequest

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
PROMPTS = ("The quick brown", "def add(first, second):\n    return", "3 + 4", "The dog sleeps, and the fox", "caf")
FAMILIES = ("llama", "gemma2", "mamba", "rwkv", "recurrent_gemma")
PADDED, ALONE = {"llama", "gemma2", "mamba"}, {"rwkv"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {family: toy_subject_model(family, root / family) for family in FAMILIES}
    for folder in made.values():
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def backends(folders: dict[str, Path]) -> dict[str, TransformersBackend]:
    return {family: TransformersBackend(str(folder), device="cpu") for family, folder in folders.items()}


def reference(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if model.config.model_type == "rwkv":
        model.config.rescale_every = 0
    return model, AutoTokenizer.from_pretrained(folder)


def ask(backend: Backend, *requests: LLMRequest, apart: bool = False) -> list[LLMReply]:
    async def together() -> list[LLMReply]:
        if apart:
            return [await backend.send(request) for request in requests]
        return list(await asyncio.gather(*(backend.send(request) for request in requests)))

    return asyncio.run(together())


def continued(prompt: str, **options: Any) -> LLMRequest:
    return LLMRequest(prompt=prompt, **{"max_tokens": 6, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_replies_are_those_of_generate_and_explicit_forward_passes(
    family: str, folders: dict[str, Path], backends: dict[str, TransformersBackend]
) -> None:
    model, tokenizer = reference(folders[family])
    replies = ask(backends[family], *(continued(p, logprobs=3) for p in PROMPTS))
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False
        )
        new = whole[0, ids.shape[1] :]
        assert reply.text == tokenizer.decode(new, skip_special_tokens=True)
        assert (reply.finish, reply.prompt_tokens, reply.completion_tokens) == ("length", ids.shape[1], 6)
        assert reply.logprobs is not None
        assert [t.token for t in reply.logprobs] == [shown(tokenizer, i) for i in new.tolist()]
        with torch.no_grad():
            expected = model(whole).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
        for token, row, found in zip(new.tolist(), expected, reply.logprobs, strict=True):
            assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
            values, best = row.topk(3)
            assert list(found.alternatives) == [shown(tokenizer, int(i)) for i in best]
            assert list(found.alternatives.values()) == pytest.approx(values.tolist(), abs=1e-4)


def shown(tokenizer: Any, token: int) -> str:
    """A token's text by the byte alphabet of byte-level tokenizers."""
    from exegete.subjects.pieces import byte_alphabet

    if token in tokenizer.all_special_ids:
        return str(tokenizer.convert_ids_to_tokens(token))
    alphabet = byte_alphabet()
    return bytes(alphabet[c] for c in tokenizer.convert_ids_to_tokens(token)).decode("utf-8", "backslashreplace")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_logprobs_are_those_of_a_forward_pass_over_each_prompt_alone(
    family: str, folders: dict[str, Path], backends: dict[str, TransformersBackend]
) -> None:
    model, tokenizer = reference(folders[family])
    replies = ask(backends[family], *(continued(p, max_tokens=1, prompt_logprobs=True, logprobs=2) for p in PROMPTS))
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rows = model(ids).logits.log_softmax(-1)[0]
        found = reply.prompt_logprobs
        assert found is not None
        assert "".join(t.token for t in found) == prompt
        assert (found[0].logprob, dict(found[0].alternatives)) == (None, {})
        assert [t.logprob for t in found[1:]] == pytest.approx(
            [float(rows[i, t]) for i, t in enumerate(ids[0, 1:].tolist())], abs=1e-4
        )
        for i, token in enumerate(found[1:]):
            assert list(token.alternatives.values()) == pytest.approx(rows[i].topk(2).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_waits_together_changes_no_reply(family: str, backends: dict[str, TransformersBackend]) -> None:
    requests = [
        continued(p, temperature=t, seed=3, sample_index=i, logprobs=1, max_tokens=4 + i)
        for i, p in enumerate(PROMPTS)
        for t in (0.0, 1.0)
    ]
    alone = ask(backends[family], *requests, apart=True)
    for batched in (ask(backends[family], *requests), ask(backends[family], *reversed(requests))[::-1]):
        for one, other in zip(alone, batched, strict=True):
            assert (one.text, one.completion_tokens) == (other.text, other.completion_tokens)
            assert one.logprobs is not None
            assert other.logprobs is not None
            assert [t.logprob for t in one.logprobs] == pytest.approx([t.logprob for t in other.logprobs], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_padded_only_where_padding_changes_nothing(
    family: str, backends: dict[str, TransformersBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backends[family]
    model, _ = asyncio.run(backend._ready())
    assert (model.batches, model.pads) == (family not in ALONE, family in PADDED)
    sizes: list[list[int]] = []
    plain = type(model).replies

    def noting(self: Any, asked: Sequence[Any], stopped: threading.Event) -> list[LLMReply]:
        sizes.append([len(a.ids) for a in asked])
        return plain(self, asked, stopped)

    monkeypatch.setattr(type(model), "replies", noting)
    ask(backend, *(continued(p) for p in (*PROMPTS, PROMPTS[0])))
    assert sum(map(len, sizes)) == 6
    if family in ALONE:
        assert len(sizes) == 6
    elif family in PADDED:
        assert len(sizes) == 1
    else:
        assert max(map(len, sizes)) > 1
        assert all(len(set(lengths)) == 1 for lengths in sizes)


def test_draws_follow_the_softmax_the_seed_and_the_sample_index(
    folders: dict[str, Path], backends: dict[str, TransformersBackend]
) -> None:
    model, tokenizer = reference(folders["llama"])
    backend = backends["llama"]
    heat, count = 0.7, 600
    draws = [
        continued("3 + 4", temperature=heat, seed=1, sample_index=i, max_tokens=1, logprobs=1) for i in range(count)
    ]
    replies = ask(backend, *draws)
    assert [r.text for r in ask(backend, *draws[:40])] == [r.text for r in replies[:40]]
    ids = tokenizer("3 + 4", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = (model(ids).logits[0, -1] / heat).softmax(-1)
    seen = [reply.logprobs[0].token for reply in replies if reply.logprobs]
    top = wanted.topk(5)
    for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        share = seen.count(shown(tokenizer, token)) / count
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / count)
    other = ask(
        backend, *(continued("3 + 4", temperature=heat, seed=2, sample_index=i, max_tokens=1) for i in range(40))
    )
    assert [r.text for r in other] != [r.text for r in replies[:40]]


def test_settings_that_came_with_the_model_do_not_lie_over_what_is_asked(tmp_path: Path) -> None:
    folder = toy_llama(tmp_path / "model", seed=4)
    model, tokenizer = reference(folder)
    ids = tokenizer("the the the", return_tensors="pt")["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
    tokens = new[0, ids.shape[1] :].tolist()
    assert len(set(tokens)) < 20  # else a penalty on repeating changes nothing
    settings = {"repetition_penalty": 9.0, "do_sample": True, "top_k": 2, "temperature": 5.0, "min_new_tokens": 30}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (reply,) = ask(TransformersBackend(str(folder), device="cpu"), continued("the the the", max_tokens=24))
    assert (reply.text, reply.completion_tokens) == (tokenizer.decode(tokens, skip_special_tokens=True), 24)


def test_a_reply_ends_at_the_models_own_end_token_and_at_stop_texts(tmp_path: Path) -> None:
    folder = toy_llama(tmp_path / "model", seed=4)
    model, tokenizer = reference(folder)
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    tokens = new[0, ids.shape[1] :].tolist()
    place = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokens[place], 1], "repetition_penalty": 9.0, "do_sample": True, "top_k": 1})
    )
    backend = TransformersBackend(str(folder), device="cpu")
    text = tokenizer.decode(tokens[:place])
    ended, cut = ask(
        backend,
        continued("The quick", max_tokens=8, logprobs=1),
        continued("The quick", max_tokens=8, stop=(text[1:3],)),
    )
    assert (ended.text, ended.finish, ended.completion_tokens) == (text, "stop", place + 1)
    assert ended.logprobs is not None
    assert len(ended.logprobs) == place  # the end token is no part of the reply
    assert (cut.text, cut.finish) == (text[:1], "stop")


def test_a_model_reads_messages_through_its_chat_template(
    folders: dict[str, Path], backends: dict[str, TransformersBackend], tmp_path: Path
) -> None:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "The dog?"})
    chat = LLMRequest(messages=messages, max_tokens=5)
    written = "[system] Be brief.\n[user] The dog?\n[assistant] "
    spoken, plain = ask(backends["llama"], chat, continued(written, max_tokens=5))
    assert (spoken.text, spoken.prompt_tokens) == ((plain.text or "").strip(), plain.prompt_tokens)
    assert backends["llama"].count(chat) == plain.prompt_tokens
    folder = toy_subject_model("llama", tmp_path / "strict")
    (folder / "chat_template.jinja").write_text(STRICT)
    folded = continued("[user] Be brief.\n\nThe dog?\n[assistant] ", max_tokens=5)
    backend = TransformersBackend(str(folder), device="cpu")
    one, other = ask(backend, chat, folded)
    assert (one.text, one.prompt_tokens) == ((other.text or "").strip(), other.prompt_tokens)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(LLMError, match="refuses the messages: never"):
        ask(TransformersBackend(str(folder), device="cpu"), chat)


def test_capabilities_and_errors_of_one_line(tmp_path: Path, backends: dict[str, TransformersBackend]) -> None:
    found = asyncio.run(backends["llama"].capabilities())
    assert (found.chat, found.completions, found.logprobs, found.prompt_logprobs, found.schema) == (
        True, True, True, True, False,
    )  # fmt: skip
    untuned = TransformersBackend(str(toy_llama(tmp_path / "base")), device="cpu")
    asyncio.run(untuned.check())
    assert not asyncio.run(untuned.capabilities()).chat
    with pytest.raises(LLMError, match="no chat template") as raised:
        ask(untuned, LLMRequest(messages=({"role": "user", "content": "hi"},)))
    assert "\n" not in str(raised.value)
    assert not isinstance(raised.value, TransientError)
    for reply in ask(untuned, continued(""), continued("a b " * 2000)):
        assert reply.finish == "error"
        assert "tokens" in str(reply.error)
    missing = TransformersBackend(str(tmp_path / "nothing" / "here"))
    with pytest.raises(NotFoundError):
        asyncio.run(missing.check())
    with pytest.raises(LLMError, match="no folder"):
        ask(missing, continued("a"))
    with pytest.raises(InputError, match="names no model"):
        TransformersBackend("")


def test_a_reply_is_cut_where_the_models_positions_end(tmp_path: Path) -> None:
    folder = toy_subject_model("llama", tmp_path / "short", max_position_embeddings=8)
    (reply,) = ask(TransformersBackend(str(folder), device="cpu"), continued("3 + 4", max_tokens=50))
    assert reply.prompt_tokens is not None
    assert (reply.finish, reply.completion_tokens) == ("length", 8 - reply.prompt_tokens)


def test_no_memory_halves_the_batch(backends: dict[str, TransformersBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = asyncio.run(backends["llama"]._ready())
    whole = type(model)._answer
    sizes: list[int] = []

    def scarce(self: Any, asked: Sequence[Any], stopped: threading.Event) -> list[LLMReply]:
        sizes.append(len(asked))
        if len(asked) > 2 or any(len(a.ids) > 8 for a in asked):
            raise torch.OutOfMemoryError("no memory")
        return whole(self, asked, stopped)

    expected = ask(backends["llama"], *(continued(p) for p in PROMPTS))
    monkeypatch.setattr(type(model), "_answer", scarce)
    found = ask(backends["llama"], *(continued(p) for p in PROMPTS))
    assert sizes[0] == 5
    for one, other in zip(expected, found, strict=True):
        if other.finish == "error":
            assert (one.prompt_tokens or 0) > 8
            assert "no memory" in str(other.error)
        else:
            assert one == other


def test_the_model_is_named_on_the_command_line_and_its_replies_are_kept(
    tmp_path: Path,
) -> None:
    folder = toy_subject_model("llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 400, 2))}))
    requests = [LLMRequest(messages=({"role": "user", "content": p},), max_tokens=4) for p in PROMPTS]

    def answered() -> list[LLMReply]:
        client: Any = client_from_spec(
            f"hf/{folder}", LLMConfig(budget_tokens=10**6), folder=tmp_path, cache=tmp_path / "replies.db"
        )

        async def together() -> list[LLMReply]:
            try:
                await client.check()
                return list(await asyncio.gather(*map(client.reply, requests)))
            finally:
                await client.close()

        replies = asyncio.run(together())
        spent = sum(s.requests for s in client.spending.totals() if s.outcome != "cached")
        client.end()
        assert spent == len(requests)
        return replies

    first, second = answered(), answered()
    assert [r.text for r in first] == [r.text for r in second]
    assert {r.finish for r in first} == {"stop"}
    assert all(r.cached for r in second)


def test_replies_of_one_folder_are_not_those_of_another_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(where: Path, model: str) -> str:
        monkeypatch.chdir(where)
        return TransformersBackend(model).identity

    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text(name * len(name) * 3)
    os.utime(tmp_path / "a" / "model" / "config.json", (1, 1))
    first = key(tmp_path / "a", "model")
    assert key(tmp_path / "b", "model") != first
    assert key(tmp_path, str(tmp_path / "a" / "model")) == first == key(tmp_path / "a", "./model")
    os.utime(tmp_path / "a" / "model" / "config.json", (2, 2))
    assert key(tmp_path / "a", "model") != first
    assert key(tmp_path, "org/model") == "hf/org/model"


def test_a_model_that_breaks_says_so_in_one_line(
    backends: dict[str, TransformersBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = asyncio.run(backends["llama"]._ready())

    def broken(*_: Any) -> list[LLMReply]:
        raise RuntimeError("device-side assert\ntriggered")

    monkeypatch.setattr(type(model), "_answer", broken)
    with pytest.raises(LLMError, match="cannot generate text: device-side assert triggered"):
        ask(backends["llama"], continued("a"))


def test_closing_ends_generation_early_and_the_backend_answers_again(backends: dict[str, TransformersBackend]) -> None:
    backend = backends["llama"]

    async def cut_short() -> None:
        waiting = asyncio.ensure_future(backend.send(continued("The", max_tokens=240)))
        await asyncio.sleep(0.05)
        await backend.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(cut_short())
    (reply,) = ask(backend, continued("The", max_tokens=2))
    assert reply.completion_tokens == 2


def test_gathering_hands_failures_to_those_who_wait_and_forgets_those_who_left() -> None:
    batches: list[list[int]] = []

    async def work(items: list[int]) -> list[int | Exception]:
        batches.append(items)
        if 7 in items:
            raise LLMError("seven")
        return [LLMError("odd") if i % 2 else i * 10 for i in items]

    async def story() -> list[Any]:
        gathering: Gathering[int, int] = Gathering(
            work, lambda waiting: range(min(3, len(waiting))), quiet=0.01, most=9
        )
        tasks = [asyncio.ensure_future(gathering.put(i)) for i in (2, 3, 100, 4, 7, 6)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(story())
    assert batches == [[2, 3, 4], [7, 6]]
    assert [type(f).__name__ for f in found] == ["int", "LLMError", "CancelledError", "int", "LLMError", "LLMError"]
    assert (found[0], found[3]) == (20, 40)


# vLLM: a module that answers as its documentation says, and notes what it was called with.


@dataclass
class FakeParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop: list[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: Any = None


@dataclass
class FakeStructured:
    json: Any = None


@dataclass
class FakeLogprob:
    logprob: float
    rank: int
    decoded_token: str


@dataclass
class FakeOutput:
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, FakeLogprob]] | None
    finish_reason: str = "stop"


@dataclass
class FakeRequestOutput:
    prompt_token_ids: list[int]
    outputs: list[FakeOutput]
    prompt_logprobs: list[dict[int, FakeLogprob] | None] | None
    num_cached_tokens: int | None = 1


@dataclass
class FakeLLM:
    tokenizer: Any
    made: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[list[Any], list[FakeParams]]] = field(default_factory=list)

    def __call__(self, **options: Any) -> FakeLLM:
        self.made = options
        return self

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool) -> list[FakeRequestOutput]:
        assert use_tqdm is False
        self.calls.append((prompts, sampling_params))
        if any(len(p["prompt_token_ids"]) > 60 for p in prompts):
            raise ValueError("The decoder prompt (length 61) is longer than the maximum model length of 60.")
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _one(self, ids: list[int], params: FakeParams) -> FakeRequestOutput:
        step = {5: FakeLogprob(-0.5, 1, " yes"), 6: FakeLogprob(-1.5, 2, " no")}
        prompt: list[Any] = [None, *({i: FakeLogprob(-float(i), 3, self.tokenizer.decode(i))} for i in ids[1:])]
        return FakeRequestOutput(
            prompt_token_ids=ids,
            outputs=[FakeOutput(" yes", [5], None if params.logprobs is None else [step])],
            prompt_logprobs=None if params.prompt_logprobs is None else prompt,
        )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> FakeLLM:
    fake = FakeLLM(reference(folders["llama"])[1])
    module, params = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.LLM, module.SamplingParams = fake, FakeParams  # type: ignore[attr-defined]
    params.StructuredOutputsParams = FakeStructured  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return fake


def test_vllm_gets_each_request_with_its_own_parameters_in_one_call(vllm: FakeLLM) -> None:
    backend = VLLMBackend("org/model")
    asyncio.run(backend.check())
    schema = {"type": "object"}
    requests = (
        LLMRequest(messages=({"role": "user", "content": "hi"},), temperature=0.3, seed=5, schema=schema, logprobs=2),
        continued("3 + 4", max_tokens=1, prompt_logprobs=True, stop=("\n",)),
        continued("3 + 4", temperature=1.0, sample_index=1),
    )
    chat, scored, drawn = ask(backend, *requests)
    assert vllm.made["model"] == "org/model"
    ((prompts, params),) = vllm.calls
    written = vllm.tokenizer("[user] hi\n[assistant] ")["input_ids"]
    assert prompts[0] == {"prompt_token_ids": written}
    assert (params[0].temperature, params[0].max_tokens, params[0].logprobs) == (0.3, 500, 2)
    assert params[0].structured_outputs == FakeStructured(json=schema)
    assert (params[1].temperature, params[1].stop, params[1].prompt_logprobs, params[1].logprobs) == (
        0.0,
        ["\n"],
        0,
        None,
    )
    assert params[1].seed is None
    assert params[0].seed is not None
    assert params[2].seed not in (None, params[0].seed)
    assert (chat.text, chat.finish, chat.prompt_tokens, chat.completion_tokens) == ("yes", "stop", len(written), 1)
    assert chat.cached_tokens == 1
    assert chat.logprobs is not None
    assert (chat.logprobs[0].token, chat.logprobs[0].logprob) == (" yes", -0.5)
    assert chat.logprobs[0].alternatives == {" yes": -0.5, " no": -1.5}
    ids = vllm.tokenizer("3 + 4")["input_ids"]
    assert scored.prompt_logprobs is not None
    assert [t.logprob for t in scored.prompt_logprobs] == [None, *(-float(i) for i in ids[1:])]
    assert "".join(t.token for t in scored.prompt_logprobs[1:]) == " + 4"
    assert not any(t.alternatives for t in scored.prompt_logprobs)
    assert drawn.text == " yes"
    assert backend.count(requests[1]) == len(ids)


def test_a_prompt_that_vllm_refuses_fails_alone(vllm: FakeLLM) -> None:
    good, long, other = ask(VLLMBackend("m"), continued("3 + 4"), continued("word " * 90), continued("4 + 4"))
    assert (good.text, other.text) == (" yes", " yes")
    assert long.finish == "error"
    assert "longer than the maximum" in str(long.error)


def test_an_engine_that_is_gone_stops_everything(vllm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("engine core died")

    backend = VLLMBackend("m")
    asyncio.run(backend.check())
    monkeypatch.setattr(FakeLLM, "generate", gone)
    with pytest.raises(LLMError, match="cannot generate text: engine core died"):
        ask(backend, continued("a"), continued("b"))
    monkeypatch.setattr(FakeLLM, "__call__", gone)
    with pytest.raises(LLMError, match="cannot start 'other': engine core died"):
        asyncio.run(VLLMBackend("other").check())


def test_vllm_without_a_chat_template_or_without_vllm(vllm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.tokenizer.chat_template = None
    backend = VLLMBackend("m")
    found = asyncio.run(backend.capabilities())
    assert (found.chat, found.schema, found.logprobs, found.prompt_logprobs) == (False, True, True, True)
    with pytest.raises(LLMError, match="no chat template"):
        ask(backend, LLMRequest(messages=({"role": "user", "content": "hi"},)))
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"exegete\[vllm\]"):
        VLLMBackend("m")
