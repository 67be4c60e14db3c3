from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest

from exegete.config import LLMConfig
from exegete.errors import ConfigError, InputError, LLMError
from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient, run_closing, run_limited
from exegete.llm.local_server import serve
from exegete.llm.open import client_from_spec
from exegete.llm.protocol import (
    Shown,
    effect_messages,
    explain_messages,
    generate_messages,
    intruder_messages,
    judge_messages,
    with_gains,
    with_strengths,
)
from exegete.llm.protocol_simulation import (
    parse_active,
    parse_all,
    simulate_messages,
    simulate_prompt,
    simulate_token_messages,
)
from exegete.llm.scripted import (
    ScriptedClient,
    SimulatedJudge,
    greedy_tokens,
    known_windows,
    quoted_text,
    rule_predicate,
    simulated_from_spec,
)
from exegete.rules import render
from exegete.rules.language import Clause, Rule, TokenAt
from exegete.scorers.verdicts import parse_verdicts, read_leanings
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


def excerpts(*texts: str) -> list[Shown]:
    return [Shown(text=text, spans=None) for text in texts]


def test_probabilities_follow_the_verdicts_and_are_calibrated() -> None:
    judge = SimulatedJudge(TABLE, true_positive_rate=0.8, false_positive_rate=0.2, seed=3)
    texts = [f"{'a' if i % 2 else 'b'}{i}" for i in range(6000)]
    felt = judge.feels('the text "a"', excerpts(*texts))
    yes = np.array([judge.evidence.probability(e) for e in felt])
    assert ((yes > 0.5) == (np.array(felt) > 0)).all()
    fits = np.array([t.startswith("a") for t in texts])
    for low in (0.1, 0.4, 0.7):  # of what it finds so probable, so much fits
        here = (yes >= low) & (yes < low + 0.2)
        assert fits[here].mean() == pytest.approx(yes[here].mean(), abs=4 * 0.5 / np.sqrt(here.sum()))
    sharper = SimulatedJudge(TABLE, true_positive_rate=0.8, false_positive_rate=0.2, seed=3, calibration=3.0)
    over = np.array([sharper.evidence.probability(e) for e in sharper.feels('the text "a"', excerpts(*texts))])
    assert ((over > 0.5) == (yes > 0.5)).all()
    assert (np.abs(over - 0.5) >= np.abs(yes - 0.5) - 1e-12).all()


def test_log_probabilities_spell_the_verdicts() -> None:
    judge = SimulatedJudge(TABLE, seed=1)
    request = LLMRequest(messages=judge_messages("detection", 'the text "a"', ["a1", "b1", "a2"]), logprobs=5)
    reply = asyncio.run(judge.reply(request))
    said = parse_verdicts(str(reply.text), 3)
    assert said is not None
    leanings = read_leanings(reply.logprobs, said)
    felt = judge.feels('the text "a"', excerpts("a1", "b1", "a2"))
    for leaning, evidence in zip(leanings, felt, strict=True):
        assert leaning is not None
        assert leaning.yes == pytest.approx(judge.evidence.probability(evidence))
        assert leaning.outside == pytest.approx(0.0, abs=1e-9)
    assert asyncio.run(judge.capabilities()).logprobs
    assert judge.simulated
    assert ScriptedClient([]).simulated


def test_position_bias_raises_what_comes_first() -> None:
    texts = [f"b{i}" for i in range(3000)]
    judge, plain = (SimulatedJudge(TABLE, position_bias=bias, seed=2) for bias in (1.0, 0.0))
    for place, shift in ((0, 1.0), (1, 0.0), (2, -1.0)):
        three = [excerpts(*texts[i : i + 3]) for i in range(0, 3000, 3)]
        moved = [judge.feels("x", shown)[place] - plain.feels("x", shown)[place] for shown in three]
        assert moved == pytest.approx([shift] * 1000)
    assert judge.feels("x", excerpts("b1")) == plain.feels("x", excerpts("b1"))


def test_cross_talk_adds_the_mean_of_the_others() -> None:
    judge, plain = (SimulatedJudge(TABLE, cross_talk=talk, seed=2) for talk in (0.5, 0.0))
    shown = excerpts("a", "b", "ab")
    a, b, c = plain.feels('the text "a"', shown)
    wanted = [a + (b + c) / 4, b + (a + c) / 4, c + (a + b) / 4]
    assert judge.feels('the text "a"', shown) == pytest.approx(wanted)
    assert judge.feels('the text "a"', shown[:1]) == [a]


def test_some_replies_hold_no_verdict() -> None:
    judge = SimulatedJudge(TABLE, parse_failure_rate=0.3, seed=4)
    replies = [ask(judge, judge_messages("detection", "x", [f"a{i}"])).text for i in range(1500)]
    assert np.mean([parse_verdicts(str(r), 1) is None for r in replies]) == pytest.approx(0.3, abs=0.048)


def test_levels_are_nine_times_the_probability_of_being_active() -> None:
    judge = SimulatedJudge(TABLE, prompt_logprobs=True, seed=5)
    tokens = ("a", "b", " ", "b", "a")
    whole = ask(judge, simulate_messages('the text "a"', tokens))
    levels = parse_active(str(whole.text), 5)
    prompt = LLMRequest(prompt=simulate_prompt('the text "a"', tokens), prompt_logprobs=True, max_tokens=1)
    expected = parse_all(asyncio.run(judge.reply(prompt)).prompt_logprobs, 5)
    assert levels is not None
    assert expected is not None
    for level, found in zip(levels, expected, strict=True):
        assert found is not None
        assert level == round(found.expected)
    sure = sharp(prompt_logprobs=True)
    assert parse_active(str(ask(sure, simulate_messages('the text "a"', tokens)).text), 5) == [9, 0, 0, 0, 9]
    assert [ask(sure, simulate_token_messages('the text "a"', tokens[:n])).text for n in (1, 2)] == ["9", "0"]


def test_the_intruder_is_what_shares_no_mark_or_does_not_fit_the_concept() -> None:
    marked = ["<<a>> b", "b <<a>>", "x <<b>> a", "<<a>>"]
    assert ask(sharp(), intruder_messages(marked)).text == '{"intruder": 3}'
    asked: list[Any] = []

    def concept(text: str, spans: Any) -> bool:
        asked.append((text, spans))
        return text != "b a"

    assert ask(sharp(concept=concept), intruder_messages(marked)).text == '{"intruder": 2}'
    assert asked[1] == ("b a", ((2, 3),))


def test_texts_are_taken_from_known_windows_or_from_what_an_explanation_names() -> None:
    windows = {"ab": np.array([1, 2], np.uint32), "b": np.array([2], np.uint32)}
    found = json.loads(str(ask(sharp(windows=windows), generate_messages('the text "a"', 3, 2)).text))
    assert found == {"fitting": ["ab"] * 3, "other": ["b"] * 2}
    named = json.loads(str(ask(sharp(), generate_messages("Fires on `ab`.", 1, 1)).text))
    assert named["fitting"] == ["ab"]
    assert json.loads(str(ask(sharp(), generate_messages('the text "ba"', 2, 0)).text))["fitting"] == ["ba"] * 2


def test_an_effect_is_explained_by_the_token_that_gained_most() -> None:
    texts = [with_gains("a b", [("x", 2.0), (" y", 1.9)]), with_gains("b", [(" y", 3.0)])]
    assert ask(sharp(), effect_messages(texts)).text == '[EXPLANATION]: the text " y"'


def test_a_judge_is_named_on_the_command_line() -> None:
    tables: list[int] = []

    def table() -> TokenTable:
        tables.append(1)
        return TABLE

    judge = simulated_from_spec("simulated:tpr=0.75, fpr=0.25,seed=7,parse_failures=0.1,cross_talk=0.2", table)
    assert (judge.evidence.true_positive_rate, judge.evidence.false_positive_rate) == (0.75, 0.25)
    assert judge.name == "simulated:tpr=0.75, fpr=0.25,seed=7,parse_failures=0.1,cross_talk=0.2"
    assert not tables
    plain = simulated_from_spec("simulated", table)
    rule = render(Rule((Clause((TokenAt(0, (2,)),), 0.9, 1.0),)), TABLE)
    sure = simulated_from_spec("simulated:tpr=1,fpr=0", table)
    assert verdicts(sure, "detection", rule, ["ab", "a b", "a"]) == [0, 1, 0]
    assert verdicts(plain, "detection", rule, ["b"]) in ([0], [1])
    assert len(tables) == 2
    for wrong in ("simulated:tpr", "simulated:tpr=2", "simulated:bias=1", "simulated:tpr=x", "simulated:tpr=1,tpr=1"):
        with pytest.raises(ConfigError):
            simulated_from_spec(wrong, table)


def test_rates_are_checked() -> None:
    with pytest.raises(InputError, match="calibration"):
        SimulatedJudge(calibration=0.0)
    with pytest.raises(InputError, match="finite"):
        SimulatedJudge(cross_talk=float("nan"))
    with pytest.raises(InputError, match="rate"):
        SimulatedJudge(parse_failure_rate=-0.1)
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


def test_what_was_used_is_closed_once_in_the_loop_of_the_work_however_it_ends() -> None:
    closed: list[tuple[int, Any]] = []
    loops: list[Any] = []

    class Closing(ScriptedClient):  # type: ignore[misc]
        def __init__(self, number: int) -> None:
            super().__init__(["yes"])
            self.number = number

        async def close(self) -> None:
            closed.append((self.number, asyncio.get_running_loop()))

    async def work(n: int) -> int:
        loops.append(asyncio.get_running_loop())
        if n == 7:
            raise LLMError("seven")
        return n * n

    first, second = Closing(1), Closing(2)
    assert sorted(run_closing([1, 2, 3], work, 2, [first, None, second, first])) == [1, 4, 9]
    assert closed == [(1, loops[0]), (2, loops[0])]
    with pytest.raises(LLMError):
        list(run_closing([7], work, 2, [second]))
    assert closed[2:] == [(2, loops[-1])]
    stream = run_closing([1, 2], work, 1, (client for client in (first, second)))
    assert next(stream) == 1
    stream.close()  # type: ignore[attr-defined]
    assert [number for number, _ in closed[3:]] == [1, 2]
