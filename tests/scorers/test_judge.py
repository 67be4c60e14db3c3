from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import InputError, LLMError
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient
from exegete.rules.language import Clause, PositionIn, Rule, TokenAt
from exegete.scorers.judge import ALTERNATIVES, Item, Items, JudgeOptions, LLMJudge, RuleJudge, Verdict
from exegete.scorers.verdicts import Leaning, parse_verdicts, read_leanings
from exegete.types import Explanation, LatentId, LLMReply, LLMRequest, TokenLogprob

# -- reading replies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("[1,0,1]", [True, False, True]),
        ("Sure! ```json\n[0, 0, 0]\n```", [False, False, False]),
        ("[true, False, TRUE]", [True, False, True]),
        ('["1", "0", "yes"]', [True, False, True]),
        ("['0', '0', 'no']", [False, False, False]),
        ("[1, 0, 1,]", [True, False, True]),
        ("[\n  1,\n  0,\n  1\n]", [True, False, True]),
        ("see [1] and [2]: [0, 1, 1]", [False, True, True]),
        ("first [1, 1, 1], no: [0, 0, 1]", [False, False, True]),
        ("[0, 1, 1] because excerpt [1] fits", [False, True, True]),
        ('{"answer": [1, 1, 0]}', [True, True, False]),
        ('{"verdicts": [1, 0, 1]}', [True, False, True]),
        ('{"verdicts":["no","no","yes"],"n":3}', [False, False, True]),
        ('{"reason": "none fit {really}", "verdicts": [0, 0, 1]}', [False, False, True]),
        ('[1, 1, 1]? {"verdicts": [0, 0, 1]}', [False, False, True]),
        ('{"1": 1, "2": 0, "3": "1"}', [True, False, True]),
        ('{"verdicts": {"Example 1": true, "Example 2": false, "Example 3": false}}', [True, False, False]),
    ],
)
def test_lists_of_verdicts_are_read(text: str, expected: list[bool]) -> None:
    assert parse_verdicts(text, 3) == expected


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[1, 0]", "[1, 0, 1, 1]", "1, 0, 1", "[1, 0, 2]", "[1, 0, maybe]", "[-1, 0, 1]", "[1 0 1]", "[1,,1]",
     "[1, 0, 1X]", "[[1, 0], 1]", "[0.9, 0.1, 0.5]", "None of them fit.", "[1, 0, 1", '{"1": 1, "3": 0, "2": 1}',
     '{"a": 1, "b": 0, "c": 1}', '{"1": 1, "2": 0}', '{"verdicts": [1, 0]}', "{1, 0, 1}"],
)  # fmt: skip
def test_anything_else_is_unparsed_and_never_a_guess(text: str) -> None:
    assert parse_verdicts(text, 3) is None


def test_the_text_zero_is_a_no_although_python_takes_it_for_true() -> None:
    # papers: released code did bool("0") -> True
    assert parse_verdicts('["0"]', 1) == [False]
    assert parse_verdicts('["0", "1"]', 2) == [False, True]


def test_an_answer_of_another_length_is_no_answer() -> None:
    # released code: len(array) == batch_size else −1 for all, counted as wrong answers
    assert parse_verdicts("[1, 0, 1, 0, 1]", 4) is None
    assert parse_verdicts("[1, 0, 1, 0]", 4) == [True, False, True, False]


@pytest.mark.parametrize("text", ["[" * 50_000, "{" * 50_000, '{"' + "1" * 5000 + '": 1}', "[" + "1," * 50_000 + "2]"])
def test_a_reply_of_any_shape_and_length_is_read_at_once(text: str) -> None:
    assert parse_verdicts(text, 1) is None


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.sampled_from(["{}", "x [9] {} y", "```\n{}\n```"]))
def test_every_list_survives_the_round_trip(verdicts: list[bool], around: str) -> None:
    assert parse_verdicts(around.format([int(v) for v in verdicts]), len(verdicts)) == verdicts


# -- how probable the answers were ------------------------------------------------------------------------------------


def token(text: str, **alternatives: float) -> TokenLogprob:
    """A token chosen among alternatives of these probabilities."""
    logs = {name.replace("_", " ").replace("Q", '"'): float(np.log(p)) for name, p in alternatives.items()}
    return TokenLogprob(token=text, logprob=logs.get(text, -0.1), alternatives=logs)


def spelt(*texts: str) -> list[TokenLogprob]:
    return [TokenLogprob(token=t, logprob=-0.5, alternatives={t: -0.5, "?": -3.0}) for t in texts]


def one_or_none(yes: float, no: float, **other: float) -> TokenLogprob:
    return token("1" if yes > no else "0", **{"1": yes, "0": no}, **other)


def test_p_yes_is_the_mass_of_yes_over_yes_and_no() -> None:
    tokens = [*spelt('{"', "verdicts", '":', " ["), one_or_none(0.6, 0.2, x=0.1), *spelt(", "), one_or_none(0.1, 0.9),
              *spelt("]", "}")]  # fmt: skip
    first, second = read_leanings(tokens, [True, False])
    assert first is not None
    assert second is not None
    assert [first.yes, second.yes] == pytest.approx([0.75, 0.1])
    assert [first.outside, second.outside] == pytest.approx([0.2, 0.0])


def test_case_spaces_and_words_do_not_matter() -> None:
    said = token(" Yes", **{" Yes": 0.3, "yes": 0.1, "true": 0.05, "1": 0.05, "YES": 0.1, " no": 0.2, "False": 0.1,
                            "maybe": 0.05, "10": 0.05})  # fmt: skip
    (found,) = read_leanings([*spelt("["), said, *spelt("]")], [True])
    assert found is not None
    assert [found.yes, found.outside] == pytest.approx([0.6 / 0.9, 0.1])


@pytest.mark.parametrize(
    ("texts", "at"),
    [
        (["[1", ",0", ",1", "]"], [0, 1, 2]),
        (["[", "1", ", ", "0", ", ", "1", "]"], [1, 3, 5]),
        (["Ġ[", "1", ",", "Ġ0", ",", "▁1", "]", "Ċ"], [1, 3, 5]),
        (["[", "", "1", "", ",", " 0", ",", "", " 1", "]", ""], [2, 5, 8]),
        (["[", "tr", "ue", ", ", "fal", "se", ", ", "true", "]"], [1, 4, 7]),
        (['["', "1", '", "', "0", '", "', "1", '"]'], [1, 3, 5]),
        (["I", " think", " [1, 1, 1]", "...", " no: ", "[", "1", ",0", ",1", "]", "<|end|>"], [6, 7, 8]),
        (['{"verdicts": [', "1,", " 0,", " 1", "]}"], [1, 2, 3]),
    ],
)
def test_the_token_of_each_verdict_is_found_however_the_reply_is_cut(texts: list[str], at: list[int]) -> None:
    tokens = list(spelt(*texts))
    for i, share in zip(at, (0.9, 0.2, 0.7), strict=True):
        text = texts[i]
        yes, no = [next((text.replace(old, new) for old, new in swap if old in text), text) for swap in (
            (("0", "1"), ("fal", "tr")), (("1", "0"), ("true", "false"), ("tr", "fal")),
        )]  # fmt: skip
        tokens[i] = TokenLogprob(token=text, logprob=None, alternatives={yes: np.log(share), no: np.log(1 - share)})
    found = read_leanings(tokens, [True, False, True])
    assert [f and round(f.yes, 6) for f in found] == [0.9, 0.2, 0.7]


def test_two_verdicts_in_one_token_are_weighed_given_what_stands_before() -> None:
    both = token("1,0", **{"1,0": 0.5, "1,1": 0.1, "0,0": 0.3, "0,1": 0.1})
    first, second = read_leanings([*spelt("["), both, *spelt("]")], [True, False])
    assert first is not None
    assert second is not None
    assert first.yes == pytest.approx(0.6)
    assert second.yes == pytest.approx(0.1 / 0.6)


def test_a_log_probability_that_is_missing_is_none_and_never_zero() -> None:
    assert read_leanings(None, [True, False]) == [None, None]
    assert read_leanings([], [True]) == [None]
    bare = [TokenLogprob(token=t, logprob=-0.1) for t in ("[", "1", "]")]
    assert read_leanings(bare, [True]) == [None]  # only what was chosen, not what it was chosen over
    assert read_leanings(spelt("[", "1", "]"), [True]) == [Leaning(yes=1.0, outside=1 - math.exp(-0.5))]
    elsewhere = [*spelt("["), token("1", x=0.5, y=0.5), *spelt("]")]
    assert read_leanings(elsewhere, [True])[0] is not None  # the chosen token is one of them
    unlikely = TokenLogprob(token="1", logprob=None, alternatives={"x": -0.1, "1": float("-inf"), "0": float("nan")})
    assert read_leanings([*spelt("["), unlikely, *spelt("]")], [True]) == [None]
    neither = TokenLogprob(token="1", logprob=None, alternatives={"x": -0.1, "y": -3.0})
    assert read_leanings([*spelt("["), neither, *spelt("]")], [True]) == [None]


def test_tokens_that_do_not_spell_the_verdicts_say_nothing() -> None:
    assert read_leanings(spelt("[", "0", "]"), [True]) == [None]
    assert read_leanings(spelt("well"), [True]) == [None]
    assert read_leanings(spelt("[", "1", ",", "1", "]"), [True]) == [None]


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6), st.lists(st.integers(1, 4), min_size=1))
def test_every_p_yes_is_found_in_any_cut_of_the_text(shares: list[float], cuts: list[int]) -> None:
    text = json.dumps({"verdicts": [int(p > 0.5) for p in shares]})
    places = [m.start() for m in re.finditer("[01]", text)]
    tokens: list[TokenLogprob] = []
    at = 0
    while at < len(text):
        size = cuts[len(tokens) % len(cuts)]
        piece = text[at : at + size]
        inside = [i for i, place in enumerate(places) if at <= place < at + size]
        logs = {piece: 0.0, "?": -9.0}
        if inside:  # at most one of ``, 1, 0``'s verdicts fits into four characters but for "1, 0"
            flipped = list(piece)
            for i in inside[:1]:
                flipped[places[i] - at] = "10"[int(piece[places[i] - at])]
            share = shares[inside[0]]
            logs = {p: float(np.log(share if p[places[inside[0]] - at] == "1" else 1 - share))
                    for p in (piece, "".join(flipped))}  # fmt: skip
        tokens.append(TokenLogprob(token=piece, logprob=None, alternatives=logs))
        at += size
    found = read_leanings(tokens, [p > 0.5 for p in shares])
    firsts = {
        next((i for i, place in enumerate(places) if start <= place < start + len(t.token)), None)
        for start, t in zip(np.cumsum([0, *(len(t.token) for t in tokens[:-1])]).tolist(), tokens, strict=True)
    }
    for i, (share, leaning) in enumerate(zip(shares, found, strict=True)):
        if i in firsts:
            assert leaning is not None
            assert leaning.yes == pytest.approx(share)


# -- a language model as the judge ------------------------------------------------------------------------------------


def explanation(text: str = "an explanation", program: Any = None) -> Explanation:
    return Explanation(
        latent=LatentId(coder="c", index=0), text=text, status="ok", explainer={"name": "x"}, program=program
    )


def items(n: int, first: int = 1) -> list[Item]:
    return [Item(tokens=np.array([0, first + i, first + i + 1], dtype=np.uint32)) for i in range(n)]


def judge_with(client: ScriptedClient, world: Any, per_request: int = 5, limit: int = 4) -> LLMJudge:
    return LLMJudge(client, "detection", world.table, per_request=per_request, gate=asyncio.Semaphore(limit))


def ask(judge: Any, about: Explanation, what: Sequence[Item]) -> list[Verdict]:
    found: list[Verdict] = asyncio.run(judge.verdicts(about, what))
    return found


def test_a_short_last_batch_is_asked_and_read_at_its_own_length(world: Any) -> None:
    client = ScriptedClient(["[1, 0, 1, 0, 1]", "[0, 1]"])
    found = ask(judge_with(client, world, limit=1), explanation(), items(7))
    assert [v.prediction for v in found] == [True, False, True, False, True, False, True]
    assert {v.status for v in found} == {"ok"}
    shown = [read_question(r.messages).excerpts for r in client.requests]
    assert [len(s) for s in shown] == [5, 2]
    assert [e.text for s in shown for e in s] == [f" w{i:02d} w{i + 1:02d}" for i in range(1, 8)]


def test_requests_share_nothing_and_carry_the_explanation(world: Any) -> None:
    client = ScriptedClient(lambda r: "[" + ", ".join("1" * len(read_question(r.messages).excerpts)) + "]")
    ask(judge_with(client, world, per_request=3), explanation("words {examples} with </description>"), items(9))
    assert len(client.requests) == 3
    for request in client.requests:
        assert len(request.messages) == len(client.requests[0].messages)
        assert read_question(request.messages).explanation == "words {examples} with </description>"
        assert request.temperature == 0.0


def test_prose_gets_one_repair_and_is_then_unparsed_for_the_whole_batch(world: Any) -> None:
    client = ScriptedClient(["They all fit.", "Still talking [1]."])
    found = ask(judge_with(client, world), explanation(), items(3))
    assert found == [Verdict(prediction=None, status="unparsed")] * 3
    first, second = client.requests
    assert second.messages[: len(first.messages)] == first.messages
    assert [m["role"] for m in second.messages[len(first.messages) :]] == ["assistant", "user"]
    assert second.messages[-2]["content"] == "They all fit."
    assert "exactly 3 numbers" in second.messages[-1]["content"]


def test_a_repaired_answer_counts(world: Any) -> None:
    client = ScriptedClient(["[1, 0]", "[1, 0, 1]"])
    found = ask(judge_with(client, world), explanation(), items(3))
    assert [v.prediction for v in found] == [True, False, True]
    assert len(client.requests) == 2


def test_a_good_answer_is_not_asked_again(world: Any) -> None:
    client = ScriptedClient(["[0, 0, 0]"])
    found = ask(judge_with(client, world), explanation(), items(3))
    assert [v.prediction for v in found] == [False] * 3
    assert len(client.requests) == 1


def test_an_empty_reply_is_repaired_with_a_message_that_is_not_empty(world: Any) -> None:
    client = ScriptedClient([LLMReply(text="", finish="length"), "[1]"])
    assert ask(judge_with(client, world), explanation(), items(1))[0].prediction is True
    assert all(m["content"] for m in client.requests[1].messages)


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (LLMReply(text=None, finish="error", error="HTTP 500"), "failed"),
        (LLMReply(text="I cannot help with that [1, 1].", finish="refused"), "refused"),
    ],
)
def test_errors_and_refusals_are_states_and_not_retried(world: Any, reply: LLMReply, status: str) -> None:
    client = ScriptedClient([reply])
    found = ask(judge_with(client, world), explanation(), items(2))
    assert [(v.prediction, v.status) for v in found] == [(None, status)] * 2
    assert len(client.requests) == 1


def test_a_repair_that_fails_is_a_failure(world: Any) -> None:
    client = ScriptedClient(["hm", LLMReply(text=None, finish="error", error="gone")])
    assert {v.status for v in ask(judge_with(client, world), explanation(), items(2))} == {"failed"}


def test_one_lost_batch_leaves_the_others(world: Any) -> None:
    client = ScriptedClient(["[1, 1]", LLMReply(text=None, finish="error", error="x"), "[0, 0]"])
    found = ask(judge_with(client, world, per_request=2, limit=1), explanation(), items(6))
    assert [v.prediction for v in found] == [True, True, None, None, False, False]


def test_what_no_call_can_mend_is_raised(world: Any) -> None:
    with pytest.raises(LLMError, match="key"):
        ask(judge_with(ScriptedClient([LLMError("the key is refused")]), world), explanation(), items(2))


def test_at_most_so_many_requests_are_under_way(world: Any) -> None:
    under_way, most = 0, 0

    class Counting(ScriptedClient):  # type: ignore[misc]
        async def reply(self, request: LLMRequest) -> LLMReply:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0)
            under_way -= 1
            return await super().reply(request)

    ask(judge_with(Counting(lambda r: "[1]"), world, per_request=1, limit=3), explanation(), items(12))
    assert most == 3


def test_requests_are_those_that_are_sent_first(world: Any) -> None:
    client = ScriptedClient(["[1, 1, 1]", "[1, 1, 1]", "[1]"])
    judge = judge_with(client, world, per_request=3, limit=1)
    built = judge.requests(explanation(), items(7))
    assert client.requests == []
    ask(judge, explanation(), items(7))
    assert client.requests == built
    assert {(r.stage, r.logprobs, r.temperature) for r in built} == {("detection", 0, 0.0)}
    assert all(a is b is c for a, b, c in zip(*(r.messages[:-1] for r in built), strict=True))  # shared, and first


def test_requests_carry_a_schema_of_their_own_length_that_a_good_answer_fits(world: Any) -> None:
    built = judge_with(ScriptedClient([]), world, per_request=3).requests(explanation(), items(4))
    for request, n in zip(built, (3, 1), strict=True):
        assert request.schema is not None
        verdicts = request.schema["properties"]["verdicts"]
        assert (verdicts["minItems"], verdicts["maxItems"], verdicts["items"]["enum"]) == (n, n, [0, 1])
        assert request.schema["required"] == ["verdicts"]
        assert json.loads(json.dumps(request.schema)) == request.schema
        shots = [m["content"] for m in request.messages if m["role"] == "assistant"]
        assert all(list(json.loads(shot)) == ["verdicts"] for shot in shots)


def test_a_repair_asks_in_the_same_way(world: Any) -> None:
    client = ScriptedClient(["no", "[1]"])
    judge = LLMJudge(client, "fuzzing", world.table, gate=asyncio.Semaphore(1), probabilities=True)
    item = Item(tokens=np.array([1, 2], dtype=np.uint32), marks=np.array([False, True]))
    ask(judge, explanation(), [item])
    first, second = client.requests
    assert (first.schema, first.logprobs, first.stage) == (second.schema, second.logprobs, second.stage)
    assert (first.logprobs, first.stage) == (ALTERNATIVES, "fuzzing")


def test_items_of_several_lengths_and_columns_are_asked_about_alike(world: Any) -> None:
    mixed = [Item(tokens=np.arange(1, 2 + i % 3, dtype=np.uint32)) for i in range(7)]
    judge = judge_with(ScriptedClient([]), world, per_request=7)
    (request,) = judge.requests(explanation(), mixed)
    shown = [e.text for e in read_question(request.messages).excerpts]
    assert shown == [world.table.decode(range(1, 2 + i % 3)) for i in range(7)]
    columns = Items(tokens=np.arange(1, 13, dtype=np.uint32).reshape(4, 3), marks=np.eye(4, 3) > 0)
    fuzzing = LLMJudge(ScriptedClient([]), "fuzzing", world.table, gate=asyncio.Semaphore(1))
    assert fuzzing.requests(explanation(), columns) == fuzzing.requests(explanation(), list(columns))
    assert fuzzing.requests(explanation(), columns[1:3]) == fuzzing.requests(explanation(), list(columns)[1:3])
    assert len(columns) == 4
    with pytest.raises(InputError, match="same shape"):
        Items(tokens=columns.tokens, marks=np.zeros((4, 2), bool))


def test_verdicts_carry_their_probabilities_where_the_server_gives_them(world: Any) -> None:
    tokens = (*spelt("["), one_or_none(0.6, 0.2, x=0.2), *spelt(", "), one_or_none(0.1, 0.9), *spelt("]"))
    given_logs = LLMReply(text="[1, 0]", finish="stop", logprobs=tokens)
    client = ScriptedClient([given_logs, LLMReply(text="[0, 1]", finish="stop"), LLMReply(text="", finish="refused")])
    judge = LLMJudge(client, "detection", world.table, per_request=2, gate=asyncio.Semaphore(1), probabilities=True)
    found = ask(judge, explanation(), items(6))
    assert [v.prediction for v in found] == [True, False, False, True, None, None]
    assert [v.probability for v in found] == [pytest.approx(0.75), pytest.approx(0.1), None, None, None, None]
    assert [v.outside for v in found] == [pytest.approx(0.2), pytest.approx(0.0), None, None, None, None]
    silent = judge_with(ScriptedClient([given_logs]), world, per_request=2)
    assert [v.probability for v in ask(silent, explanation(), items(2))] == [None, None]  # not asked for


def test_fuzzing_shows_marks(world: Any) -> None:
    client = ScriptedClient(["[1]"])
    judge = LLMJudge(client, "fuzzing", world.table, gate=asyncio.Semaphore(1))
    item = Item(tokens=np.array([1, 2, 3], dtype=np.uint32), marks=np.array([False, True, False]))
    ask(judge, explanation(), [item])
    assert " w01<< w02>> w03" in client.requests[0].messages[-1]["content"]
    assert "every marked piece" in client.requests[0].messages[0]["content"]


def test_options_choose_who_judges_and_refuse_what_does_not_fit(world: Any) -> None:
    bare, text_only = world.view(3), world.explanation(3, program=False)
    asked, gate = dataclasses.replace(bare, llm=ScriptedClient(["[1]"])), asyncio.Semaphore(1)
    assert isinstance(JudgeOptions().choose("detection", rule(3), bare, gate), RuleJudge)
    assert isinstance(JudgeOptions().choose("detection", text_only, asked, gate), LLMJudge)
    assert isinstance(JudgeOptions(judge="rule").choose("detection", rule(3), asked, gate), RuleJudge)
    for options, view in (
        (JudgeOptions(), bare),
        (JudgeOptions(judge="rule"), asked),
        (JudgeOptions(judge="llm"), bare),
    ):
        with pytest.raises(InputError, match="--llm"):
            options.choose("detection", text_only, view, gate)
    sure = JudgeOptions(probabilities=True)
    assert (sure.judge, sure.needs) == ("llm", {"llm", "logprobs"})
    assert JudgeOptions(**sure.args) == sure
    assert JudgeOptions().needs == set()


def test_requests_name_what_they_are_for(world: Any) -> None:
    client = ScriptedClient(["[1]"])
    view = dataclasses.replace(world.view(3), llm=client)
    judge = JudgeOptions().choose("detection", explanation(), view, asyncio.Semaphore(1), "discrimination")
    ask(judge, explanation(), items(1))
    assert [r.stage for r in client.requests] == ["discrimination"]


def test_a_request_holds_at_least_one_example(world: Any) -> None:
    with pytest.raises(InputError, match="at least one"):
        judge_with(ScriptedClient([]), world, per_request=0)


# -- the executed rule as the judge -----------------------------------------------------------------------------------


def rule(*tokens: int) -> Explanation:
    return explanation(program=Rule((Clause((TokenAt(0, tokens),), 0.5, 1.0),)).to_json())


def windows(*rows: Sequence[int], marks: Sequence[Sequence[int]] | None = None) -> list[Item]:
    return [
        Item(
            tokens=np.array(row, dtype=np.uint32),
            marks=None if marks is None else np.isin(np.arange(len(row)), marks[i]),
        )
        for i, row in enumerate(rows)
    ]


def test_detection_asks_for_a_match_anywhere(world: Any) -> None:
    found = ask(RuleJudge("detection", world.table), rule(5, 6), windows([1, 2, 5], [1, 2, 3], [6, 6, 6], [0, 1, 2]))
    assert [v.prediction for v in found] == [True, False, True, False]
    assert {v.status for v in found} == {"ok"}


def test_fuzzing_asks_for_a_match_at_every_mark(world: Any) -> None:
    given_marks = [[1], [1, 2], [1, 2], [0], []]
    rows = [[1, 5, 1], [1, 5, 1], [1, 5, 5], [1, 5, 5], [5, 5, 5]]
    found = ask(RuleJudge("fuzzing", world.table), rule(5), windows(*rows, marks=given_marks))
    assert [v.prediction for v in found] == [True, False, True, False, False]


def test_nothing_fires_at_special_tokens_and_marks_there_are_not_seen(world: Any) -> None:
    everywhere = explanation(program=Rule((Clause((PositionIn(0, 2),), 0.5, 1.0),)).to_json())
    detected = ask(RuleJudge("detection", world.table), everywhere, windows([0, 0, 1], [0, 1, 1]))
    assert [v.prediction for v in detected] == [False, True]
    fuzzed = ask(RuleJudge("fuzzing", world.table), rule(5), windows([0, 5, 1], [0, 5, 1], marks=[[0, 1], [0]]))
    assert [v.prediction for v in fuzzed] == [True, False]


def test_the_rule_sees_the_window_alone(world: Any) -> None:
    after = explanation(program=Rule((Clause((TokenAt(1, (7,)), TokenAt(0, (5,))), 0.5, 1.0),)).to_json())
    found = ask(RuleJudge("detection", world.table), after, windows([7, 5], [5, 7]))
    assert [v.prediction for v in found] == [True, False]  # nothing stands before the second window's first token


def test_a_panel_equals_its_members_one_by_one_and_a_slow_loop(world: Any) -> None:
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 30, size).tolist() for size in (6, 9, 6, 9, 6)]
    marks = [rng.choice(len(r), 2, replace=False).tolist() for r in rows]
    given_items = windows(*rows, marks=marks)
    sets = [set(rng.choice(np.arange(1, 30), 12, replace=False).tolist()) for _ in range(4)]
    rules = [rule(*sorted(chosen)) for chosen in sets]
    for kind in ("detection", "fuzzing"):
        judge = RuleJudge(kind, world.table)
        together = asyncio.run(judge.panel(rules, given_items))
        assert together == [ask(judge, r, given_items) for r in rules]
        for chosen, verdicts in zip(sets, together, strict=True):
            for row, at, verdict in zip(rows, marks, verdicts, strict=True):
                hits = [t in chosen and t != 0 for t in row]
                seen = [i for i in at if row[i] != 0]
                expected = any(hits) if kind == "detection" else bool(seen) and all(hits[i] for i in seen)
                assert verdict.prediction is expected


def test_an_empty_panel_and_items_without_marks(world: Any) -> None:
    judge = RuleJudge("fuzzing", world.table)
    assert asyncio.run(judge.panel([], [])) == []
    assert asyncio.run(judge.panel([rule(1)], [])) == [[]]
    with pytest.raises(InputError, match="no marks"):
        ask(judge, rule(1), windows([1, 2]))


def test_judges_know_what_they_can_use(world: Any) -> None:
    text_only, failed = (
        explanation(),
        Explanation(latent=LatentId(coder="c", index=0), text=None, status="failed", explainer={}),
    )
    llm, executed = judge_with(ScriptedClient([]), world), RuleJudge("detection", world.table)
    assert [llm.takes(e) for e in (text_only, rule(1), failed)] == [True, True, False]
    assert [executed.takes(e) for e in (text_only, rule(1), failed)] == [False, True, False]
