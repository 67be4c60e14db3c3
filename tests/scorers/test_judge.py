from __future__ import annotations

import asyncio
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
from exegete.scorers.judge import Item, LLMJudge, RuleJudge, Verdict, parse_verdicts
from exegete.types import Explanation, LatentId, LLMReply, LLMRequest

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
    ],
)
def test_lists_of_verdicts_are_read(text: str, expected: list[bool]) -> None:
    assert parse_verdicts(text, 3) == expected


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[1, 0]", "[1, 0, 1, 1]", "1, 0, 1", "[1, 0, 2]", "[1, 0, maybe]", "[-1, 0, 1]", "[1 0 1]", "[1,,1]",
     "[1, 0, 1X]", "[[1, 0], 1]", "[0.9, 0.1, 0.5]", "None of them fit.", "[1, 0, 1"],
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


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.sampled_from(["{}", "x [9] {} y", "```\n{}\n```"]))
def test_every_list_survives_the_round_trip(verdicts: list[bool], around: str) -> None:
    assert parse_verdicts(around.format([int(v) for v in verdicts]), len(verdicts)) == verdicts


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


def test_fuzzing_shows_marks(world: Any) -> None:
    client = ScriptedClient(["[1]"])
    judge = LLMJudge(client, "fuzzing", world.table, gate=asyncio.Semaphore(1))
    item = Item(tokens=np.array([1, 2, 3], dtype=np.uint32), marks=np.array([False, True, False]))
    ask(judge, explanation(), [item])
    assert " w01<< w02>> w03" in client.requests[0].messages[-1]["content"]
    assert "every marked piece" in client.requests[0].messages[0]["content"]


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
