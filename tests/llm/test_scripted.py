from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest

from exegete.config import LLMConfig
from exegete.errors import InputError, LLMError
from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient, run_limited
from exegete.llm.local_server import serve
from exegete.llm.open import client_from_spec
from exegete.llm.protocol import explain_messages, judge_messages, with_strengths
from exegete.llm.scripted import (
    ScriptedClient,
    SimulatedJudge,
    greedy_tokens,
    known_windows,
    quoted_text,
    rule_predicate,
)
from exegete.rules import render
from exegete.rules.language import Clause, Rule, TokenAt
from exegete.tokens import TokenTable
from exegete.types import Example, ExampleSet, LatentId, LLMReply, LLMRequest, TokenLogprob

TABLE = TokenTable([b"<bos>", b"a", b"b", b"ab", b" ", b"\xc3", b"\xa9", b"\xc3\xa9", b"<<"], [0])


def ask(client: LLMClient, messages: Any) -> LLMReply:
    return asyncio.run(client.reply(LLMRequest(messages=messages)))


def verdicts(client: LLMClient, kind: Any, explanation: str, texts: list[str]) -> list[int]:
    found: list[int] = json.loads(str(ask(client, judge_messages(kind, explanation, texts)).text))
    return found


def sharp(**options: Any) -> SimulatedJudge:
    return SimulatedJudge(TABLE, **{"true_positive_rate": 1.0, "false_positive_rate": 0.0, **options})


# -- scripted ---------------------------------------------------------------------------------------------------------


def test_a_script_answers_in_order_and_keeps_what_was_asked() -> None:
    client = ScriptedClient(["one", LLMReply(text=None, finish="error", error="x"), LLMError("stop")])
    first = LLMRequest(messages=({"role": "user", "content": "1"},))
    assert asyncio.run(client.reply(first)) == LLMReply(text="one", finish="stop")
    assert asyncio.run(client.capabilities()) == Capabilities()
    able = Capabilities(logprobs=True)
    assert asyncio.run(ScriptedClient([], capabilities=able).capabilities()) == able
    assert asyncio.run(client.reply(first)).finish == "error"
    with pytest.raises(LLMError, match="stop"):
        asyncio.run(client.reply(first))
    with pytest.raises(LLMError, match="3 replies, and this is request 4"):
        asyncio.run(client.reply(first))
    assert client.requests == [first] * 4
    assert (client.name, client.temperature) == ("scripted", 0.0)


def test_a_script_may_be_a_function_of_the_request() -> None:
    client = ScriptedClient(lambda request: request.messages[0]["content"].upper(), name="loud")
    assert ask(client, ({"role": "user", "content": "hey"},)).text == "HEY"
    asyncio.run(client.check())
    asyncio.run(client.close())
    assert client.name == "loud"


# -- the simulated judge ----------------------------------------------------------------------------------------------


def test_a_judge_without_errors_says_what_the_given_predicate_says() -> None:
    asked: list[Any] = []

    def fits(text: str, spans: Any) -> bool:
        asked.append((text, spans))
        return "b" in text if spans is None else all(text[i:j] == "b" for i, j in spans)

    judge = sharp(predicates={"has a b": fits})
    assert verdicts(judge, "detection", "has a b", ["a", "ab", "b b", ""]) == [0, 1, 1, 0]
    assert verdicts(judge, "fuzzing", "has a b", ["a<<b>>", "<<a>>b", "<<b>> <<a>>"]) == [1, 0, 0]
    assert asked[0] == ("a", None)
    assert asked[-1] == ("b a", ((0, 1), (2, 3)))


def test_texts_that_quote_what_they_mean_need_no_predicate() -> None:
    judge = sharp()
    assert verdicts(judge, "detection", 'Occurrences of the text "ab".', ["ab", "a b", "xaby"]) == [1, 0, 1]
    assert verdicts(judge, "fuzzing", 'the text "ab"', ["<<ab>> a", "ab <<a>>", "ab"]) == [1, 0, 0]
    assert quoted_text("no such form") is None
    fits = quoted_text('The text "a\\n\\"b\\""')
    assert fits is not None
    assert fits('xa\n"b"', None)
    assert not fits("a", None)


def test_rule_texts_are_parsed_and_run_on_the_window_alone() -> None:
    rule = Rule((Clause((TokenAt(1, (1,)), TokenAt(0, (2,))), 0.9, 1.0),))  # "b" right after "a"
    text = render(rule, TABLE)
    windows = {"ab": np.array([1, 2], dtype=np.uint32), "b ab": np.array([2, 4, 3], dtype=np.uint32)}
    judge = sharp(windows=windows)
    # The known windows differ in their tokens although both read "ab"; greedy splitting would see the token "ab".
    assert verdicts(judge, "detection", text, ["ab", "b ab", "a", "ab a"]) == [1, 0, 0, 0]
    assert verdicts(judge, "fuzzing", text, ["a<<b>>", "<<a>>b", "<<ab>>", "ab"]) == [1, 0, 0, 0]
    assert verdicts(sharp(windows=windows, predicates={text: lambda t, s: True}), "detection", text, ["a"]) == [1]


def test_marks_cover_the_tokens_that_share_a_character_with_them() -> None:
    rule = Rule((Clause((TokenAt(0, (6,)),), 0.9, 1.0),))  # the second byte of é, with which the character is shown
    fits = rule_predicate(rule, TABLE, {"aé": np.array([1, 5, 6], dtype=np.uint32)})
    assert fits("aé", ((1, 2),))
    assert not fits("aé", ((0, 1),))
    assert not fits("aé", ((0, 2),))
    assert not fits("aé", ())
    assert not fits("", None)


def test_tokens_shown_only_together_fit_when_any_of_them_does() -> None:
    windows = {"éb": np.array([0, 5, 6, 2], dtype=np.uint32), "a\ufffd": np.array([1, 5, 0], dtype=np.uint32)}
    for token in (5, 6):
        fits = rule_predicate(Rule((Clause((TokenAt(0, (token,)),), 0.9, 1.0),)), TABLE, windows)
        assert fits("éb", ((0, 1),))
        assert not fits("éb", ((1, 2),))
        assert not fits("éb", ((0, 1), (1, 2)))
        assert fits("éb", None)
    special = rule_predicate(Rule((Clause((TokenAt(0, (0,)),), 0.9, 1.0),)), TABLE, windows)
    assert not special("éb", None)
    assert not special("éb", ((0, 1),))
    assert rule_predicate(Rule((Clause((TokenAt(0, (5,)),), 0.9, 1.0),)), TABLE, windows)("a\ufffd", ((1, 2),))


def test_unknown_text_is_split_greedily() -> None:
    assert greedy_tokens("aab bé<<", TABLE).tolist() == [1, 3, 4, 2, 7, 8]
    assert greedy_tokens("", TABLE).tolist() == []
    with pytest.raises(InputError, match="no token stands for"):
        greedy_tokens("abc", TABLE)


def test_windows_are_known_by_their_plain_text() -> None:
    example = Example(
        split="test", fires=False, stratum="silent", row=0, start=0, tokens=np.array([0, 1, 8], dtype=np.uint32),
        activations=np.zeros(3, dtype=np.float32), document=0, inclusion_probability=1.0,
    )  # fmt: skip
    chosen = ExampleSet(
        latent=LatentId(coder="c", index=0), examples=(example,), maximum=1.0, firing_rate=0.1, frame=10, seed=0
    )
    known = known_windows([chosen], TABLE)
    assert list(known) == ["a<<"]
    assert known["a<<"].tolist() == [0, 1, 8]


@pytest.mark.parametrize(("kind", "around"), [("detection", "{}"), ("fuzzing", "<<{}>>")])
def test_error_rates_are_those_set(kind: str, around: str) -> None:
    judge = SimulatedJudge(TABLE, true_positive_rate=0.8, false_positive_rate=0.3, seed=1)
    hits = verdicts(judge, kind, 'the text "a"', [around.format(f"a{i}") for i in range(1500)])
    misses = verdicts(judge, kind, 'the text "a"', [around.format(f"b{i}") for i in range(1500)])
    coins = verdicts(judge, kind, "nothing known", [around.format(f"b{i}") for i in range(1500)])
    # four standard errors of a proportion of 1500
    assert np.mean(hits) == pytest.approx(0.8, abs=0.042)
    assert np.mean(misses) == pytest.approx(0.3, abs=0.048)
    assert np.mean(coins) == pytest.approx(0.5, abs=0.052)


def test_an_answer_depends_on_seed_explanation_and_excerpt_alone() -> None:
    texts = [f"a{i}" for i in range(60)]

    def judge(seed: int = 0) -> SimulatedJudge:
        return SimulatedJudge(TABLE, true_positive_rate=0.5, false_positive_rate=0.5, seed=seed)

    together = verdicts(judge(), "detection", "x", texts)
    alone = judge()
    assert [verdicts(alone, "detection", "x", [t])[0] for t in reversed(texts)][::-1] == together
    assert verdicts(judge(1), "detection", "x", texts) != together
    assert verdicts(judge(), "detection", "y", texts) != together


def test_rates_are_checked() -> None:
    with pytest.raises(InputError, match="rate"):
        SimulatedJudge(true_positive_rate=1.1)
    with pytest.raises(InputError, match="rate"):
        SimulatedJudge(false_positive_rate=-0.1)


def test_asked_to_explain_it_names_the_commonest_marked_text() -> None:
    shown = [with_strengths(t, []) for t in ("x<< a>> y", "<< b>>", "<< a>>", '<<é"\n>>')]
    reply = ask(sharp(), explain_messages(shown))
    assert reply.text == '[EXPLANATION]: the text " a"'
    assert (reply.prompt_tokens or 0) > 100
    assert ask(sharp(explain="what I say"), explain_messages(shown)).text == "[EXPLANATION]: what I say"
    counted = sharp(explain=lambda request: f"{len(request.messages)} messages")
    assert ask(counted, explain_messages(shown)).text == "[EXPLANATION]: 8 messages"


def test_other_prompts_are_refused() -> None:
    with pytest.raises(InputError):
        ask(sharp(), ({"role": "user", "content": "hello"},))


# -- behind HTTP ------------------------------------------------------------------------------------------------------


def through_http(client: LLMClient, *requests: LLMRequest) -> list[LLMReply]:
    with serve(client) as server:
        real = client_from_spec(server.spec, LLMConfig(timeout=5.0))
        assert real is not None

        async def work() -> list[LLMReply]:
            await real.check()
            try:
                return [await real.reply(r) for r in requests]
            finally:
                await real.close()

        try:
            return asyncio.run(work())
        finally:
            real.end()


def test_a_served_client_answers_as_it_would_in_process() -> None:
    script = ScriptedClient([LLMReply(text="cut", finish="length", prompt_tokens=3, completion_tokens=4),
                             LLMReply(text="no", finish="refused"), "yes"], name="org/toy")  # fmt: skip
    request = LLMRequest(messages=({"role": "user", "content": "hé 🙂"},), temperature=0.3, max_tokens=7, seed=1)
    found = through_http(script, request, request, request)
    assert [(r.text, r.finish) for r in found] == [("cut", "length"), ("no", "refused"), ("yes", "stop")]
    assert (found[0].prompt_tokens, found[0].completion_tokens) == (3, 4)
    assert script.requests == [request] * 3


def test_a_served_client_completes_prompts_and_gives_logprobs() -> None:
    def token(text: str, logprob: float | None) -> TokenLogprob:
        return TokenLogprob(token=text, logprob=logprob, alternatives={} if logprob is None else {text: logprob})

    said = LLMReply(text="!", finish="length", logprobs=(token("!", -1.0),), prompt_tokens=2, completion_tokens=1,
                    prompt_logprobs=(token("a ", None), token("b", -0.5)))  # fmt: skip
    judged = LLMReply(text="1", finish="stop", logprobs=(token("1", -0.25),))
    script = ScriptedClient([said, judged])
    prompt = LLMRequest(prompt="a b", max_tokens=1, logprobs=1, prompt_logprobs=True, stop=("\n",))
    schema = {"type": "array"}
    chat = LLMRequest(messages=({"role": "user", "content": "?"},), logprobs=2, schema=schema)
    assert through_http(script, prompt, chat) == [said, judged]
    assert script.requests == [prompt, chat]


def test_the_server_refuses_what_it_does_not_know() -> None:
    def status(url: str, data: bytes | None) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    with serve(ScriptedClient([], name="toy")) as server:
        assert server.spec == f"{server.url}#toy"
        chat = f"{server.url}/chat/completions"
        assert status(f"{server.url}/models", None) == 200
        assert status(f"{server.url}/nothing", None) == 404
        assert status(f"{server.url}/embeddings", b"{}") == 404
        assert status(chat, b"not json") == 400
        assert status(chat, b"[]") == 400
        assert status(chat, b'{"messages": []}') == 404
        assert status(chat, b'{"messages": [], "model": "toy"}') == 400
        assert status(chat, b'{"messages": [{"content": "x"}], "model": "toy"}') == 500  # the script is empty


# -- running many -----------------------------------------------------------------------------------------------------


def test_results_are_never_formatted() -> None:
    # asyncio.Runner sets signal handlers around a task, and the signal module formats the finished task
    class Silent:
        def __repr__(self) -> str:
            raise AssertionError("formatted")

    async def work(n: int) -> Silent:
        return Silent()

    assert [n for n, _ in run_limited([1, 2], work, 1)] == [1, 2]


def test_run_limited_finishes_in_its_own_loop_however_it_ends() -> None:
    loops: list[Any] = []

    async def work(n: int) -> int:
        loops.append(asyncio.get_running_loop())
        if n == 7:
            raise LLMError("seven")
        return n * n

    async def finish() -> None:
        loops.append(("finished", asyncio.get_running_loop()))

    assert sorted(run_limited([1, 2, 3], work, 2, finish)) == [(1, 1), (2, 4), (3, 9)]
    assert loops[-1] == ("finished", loops[0])
    with pytest.raises(LLMError):
        list(run_limited([7], work, 2, finish))
    assert loops[-1] == ("finished", loops[-2])
    stream = run_limited([1, 2], work, 1, finish)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert loops[-1][0] == "finished"
