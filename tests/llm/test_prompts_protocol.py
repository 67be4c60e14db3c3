from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete import prompts
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.llm import protocol_simulation as simulation
from exegete.llm.protocol import (
    PROMPTS,
    effect_messages,
    explain_messages,
    generate_messages,
    intruder_messages,
    intruder_schema,
    judge_messages,
    read_question,
    unmark,
    with_gains,
    with_strengths,
    write_excerpts,
)
from exegete.llm.protocol_simulation import LEVELS, parse_active, parse_all, parse_level, simulate_prompt
from exegete.scorers.verdicts import parse_verdicts
from exegete.types import TokenLogprob

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
HASHES = {"explain-1": "6002d6b5ce9181a2", "detection-1": "2390d34f7e60ac0d", "fuzzing-1": "00c36dc993e8f2c4"}
plain = texts.filter(lambda t: "example" not in t)


@pytest.mark.parametrize("name", PROMPTS.values())
def test_prompts_are_there_and_name_themselves_by_content(name: str) -> None:
    assert name in prompts.names()
    assert re.fullmatch(r"[0-9a-f]{16}", prompts.prompt_hash(name))
    assert prompts.prompt(name).startswith("--- system\n")
    assert len({prompts.prompt_hash(n) for n in prompts.names()}) == len(prompts.names())


def test_an_unknown_prompt_is_refused_with_near_names() -> None:
    with pytest.raises(NotFoundError, match="explain-1"):
        prompts.prompt("explain-9")


@pytest.mark.parametrize("name", PROMPTS.values())
def test_few_shot_answers_come_from_the_assistant(name: str) -> None:
    # papers: released code sent the few-shot answers to the explainer with role "system"
    roles = [role for role, _ in prompts.turns(name)]
    assert roles == ["system", *["user", "assistant"] * 3, "user"]


@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_few_shot_answers_answer_their_own_excerpts_whatever_their_number(kind: str) -> None:
    shots = prompts.turns(PROMPTS[kind])[1:-1]
    sizes = []
    for (_, asked), (_, answer) in zip(shots[::2], shots[1::2], strict=True):
        n = asked.count("</example ")
        sizes.append(n)
        assert parse_verdicts(answer, n) is not None
    assert len(set(sizes)) > 1  # the length is not always that of a full batch


def test_few_shot_explanations_end_with_the_marker() -> None:
    for role, text in prompts.turns("explain-1")[1:]:
        if role == "assistant":
            assert re.search(r"\n\n\[EXPLANATION\]: \S.*\.$", text)
            assert text.count("[EXPLANATION]") == 1


def test_each_prompt_asks_for_what_its_score_measures() -> None:
    # papers: the detection prompt was copied from fuzzing and spoke of mislabeled tokens
    assert "<<" not in prompts.prompt(PROMPTS["detection"])
    assert "marked" not in prompts.prompt(PROMPTS["detection"])
    assert "every marked piece" in prompts.prompt(PROMPTS["fuzzing"])


def test_prompts_are_plain_text_and_not_byte_glyphs() -> None:
    assert all(not re.search("[ĊĠâĢ]", prompts.prompt(name)) for name in prompts.names())


def test_a_malformed_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (
        "hello",
        "--- user\nx\n",
        "--- system\na\n--- user\nb\n--- user\nc\n",
        "x\n--- system\na\n--- user\nb\n",
    ):
        monkeypatch.setattr(prompts, "prompt", lambda name, text=text: text)
        with pytest.raises(CorruptError):
            prompts.turns.__wrapped__("broken")


def test_holes_are_filled_in_one_pass() -> None:
    asked = judge_messages("detection", "{examples} {explanation} \\1", ["{explanation}"])
    assert "<description>\n{examples} {explanation} \\1\n</description>" in asked[-1]["content"]
    assert "<example 1>\n{explanation}\n</example 1>" in asked[-1]["content"]


def test_all_but_the_last_message_are_the_same_objects_every_time() -> None:
    # what servers keep of a prompt from before is its constant beginning
    first, second = (judge_messages("fuzzing", e, [e]) for e in ("a", "b"))
    assert all(a is b for a, b in zip(first[:-1], second[:-1], strict=True))
    assert first[-1] != second[-1]
    content = first[-1]["content"]
    assert content.index("<description>") < content.index("<example 1>")


def test_a_hole_that_is_not_given_is_an_error() -> None:
    with pytest.raises(KeyError, match="explanation"):
        prompts.messages(PROMPTS["detection"], {"examples": "x"})


def test_earlier_wordings_stay() -> None:
    # a stored explanation or score names its prompt by a hash of the text
    hashes = {name: prompts.prompt_hash(name) for name in ("explain-1", "detection-1", "fuzzing-1")}
    assert hashes == HASHES


@given(texts.filter(lambda t: "</description>" not in t), st.lists(plain, min_size=1, max_size=6))
def test_what_is_asked_can_be_read_back(explanation: str, excerpts: list[str]) -> None:
    question = read_question(judge_messages("detection", explanation, excerpts))
    assert (question.kind, question.explanation) == ("detection", explanation)
    assert [e.text for e in question.excerpts] == excerpts
    assert all(e.spans is None for e in question.excerpts)


def test_text_that_looks_like_the_next_excerpt_is_not_taken_for_it() -> None:
    excerpts = ["Example 2: no\n\nExample 3:", "a\n<example 3>\nb", "</example 3>", "\n", ""]
    question = read_question(judge_messages("detection", "x", excerpts))
    assert [e.text for e in question.excerpts] == excerpts


def test_a_repair_request_is_read_as_the_question_it_repeats() -> None:
    asked = judge_messages("fuzzing", "x", ["a<< b>>"])
    again = (*asked, {"role": "assistant", "content": "hm"}, {"role": "user", "content": "again"})
    assert read_question(again) == read_question(asked)
    assert read_question(asked).excerpts[0].spans == ((1, 3),)
    assert read_question(asked).excerpts[0].text == "a b"


def test_marks_and_strengths_are_read_back() -> None:
    shown = with_strengths("a<< b>> \\<\\< c<<\n>>", [(" b", 10), ("\n", 1)])
    assert shown.endswith('\nActivations: (" b" : 10), ("\\n" : 1)')
    (excerpt,) = read_question(explain_messages([shown])).excerpts
    assert excerpt.text == "a b << c\n"
    assert [excerpt.text[start:stop] for start, stop in excerpt.spans or ()] == [" b", "\n"]
    assert unmark("none") == ("none", ())


def test_other_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="only the prompts"):
        read_question([{"role": "user", "content": "hello"}])
    system = dict(judge_messages("detection", "x", ["y"])[0])
    with pytest.raises(InputError, match="only the prompts"):
        read_question([system])
    broken = [*judge_messages("detection", "x", ["y"])[:-1], {"role": "user", "content": write_excerpts(["y"])}]
    with pytest.raises(InputError, match="no description"):
        read_question(broken)


def test_a_simulation_question_is_read_back_in_all_three_forms() -> None:
    tokens = (" a", "\n", '"', "\t?", "</tokens>", "é", "\n</description>\n\n<tokens>\n")
    for explanation in ("x", "a\n</description>\n\n<tokens>\nb", "{tokens}"):
        asked: list[tuple[str, Any]] = [
            ("simulate", simulation.simulate_messages(explanation, tokens)),
            ("simulate_token", simulation.simulate_token_messages(explanation, tokens)),
            ("simulate_all", simulate_prompt(explanation, tokens)),
        ]
        for kind, question in asked:
            read = read_question(question)
            assert (read.kind, read.explanation, read.tokens) == (kind, explanation, tokens)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.lists(texts, min_size=1, max_size=5))
def test_any_simulation_question_is_read_back(explanation: str, tokens: list[str]) -> None:
    for question in (
        simulation.simulate_messages(explanation, tokens),
        simulation.simulate_token_messages(explanation, tokens),
        simulate_prompt(explanation, tokens),
    ):
        read = read_question(question)
        assert (read.explanation, list(read.tokens)) == (explanation, tokens)


def test_simulation_prompts_begin_alike_for_every_explanation() -> None:
    a, b = simulate_prompt("a", [" x"]), simulate_prompt("b", [" y"])
    assert a.startswith(simulation.opening())
    assert b.startswith(simulation.opening())
    assert a.endswith('<tokens>\n" x"\t?\n')
    assert simulation.opening().count("<tokens>") == simulation.opening().count("</tokens>") == 3


def test_the_shots_of_simulation_answer_their_own_tokens() -> None:
    for name, form in (("simulate-1", "simulate"), ("simulate-token-1", "simulate_token")):
        shots = prompts.turns(name)[1:-1]
        for (_, asked), (_, answer) in zip(shots[::2], shots[1::2], strict=True):
            read = simulation.read_asked(form, asked)
            assert read is not None
            if form == "simulate":
                assert parse_active(answer, len(read[1])) is not None
            else:
                level = parse_level(answer)
                assert level is not None
                assert level.expected in LEVELS


def test_active_tokens_are_read_and_the_others_are_silent() -> None:
    answer = '{"active": [{"token": 3, "level": 9}, {"token": 1, "level": 2}]}'
    assert parse_active(answer, 4) == [2, 0, 9, 0]
    assert parse_active('{"active": []}', 2) == [0, 0]
    assert parse_active('I think of {"active": [] } first. ' + answer, 3) == [2, 0, 9]
    fenced = "```json\n" + answer + "\n```"
    assert parse_active(fenced, 3) == [2, 0, 9]


@pytest.mark.parametrize(
    "answer",
    [
        "no",
        '{"active": 3}',
        '{"active": [3]}',
        '{"active": [{"token": 5, "level": 1}]}',
        '{"active": [{"token": 0, "level": 1}]}',
        '{"active": [{"token": 1, "level": 10}]}',
        '{"active": [{"token": 1, "level": -1}]}',
        '{"active": [{"token": true, "level": 1}]}',
        '{"active": [{"token": 1, "level": 1.5}]}',
        '{"active": [{"token": 1, "level": 1}, {"token": 1, "level": 2}]}',
        '{"active": [{"token": 1, "level": 1}',
        '{"active": ' + "[" * 5000,
    ],
)
def test_an_answer_that_cannot_be_read_gives_no_levels(answer: str) -> None:
    assert parse_active(answer, 4) is None


def test_a_single_level_is_the_digit_or_the_mean_over_the_alternatives_to_it() -> None:
    for text in ("7", " 7\n", "7.", '"7"', "Level: 7"):
        level = parse_level(text)
        assert level is not None
        assert (level.expected, level.values) == (7.0, (7,))
    for text in ("", "seven", "10", "7 or 8", "-"):
        assert parse_level(text) is None
    weighed = parse_level("7", [token("7", 0.5, {"7": 0.5, " 1": 0.25, "x": 0.2})])
    assert weighed is not None
    assert weighed.expected == pytest.approx((7 * 0.5 + 1 * 0.25) / 0.75)
    assert weighed.outside == pytest.approx(0.25)
    alone = parse_level("7", [TokenLogprob(token="7", logprob=-0.1)])
    assert alone is not None
    assert alone.expected == 7.0


def token(text: str, p: float, alternatives: dict[str, float]) -> TokenLogprob:
    return TokenLogprob(token=text, logprob=math.log(p), alternatives={t: math.log(q) for t, q in alternatives.items()})


def test_levels_are_read_at_the_question_marks_of_a_prompt() -> None:
    before = [TokenLogprob(token=t, logprob=None) for t in ("<s>", "é of another length ", "\t", "?", "\n")]
    first = token("?", 0.2, {"?": 0.2, "0": 0.6, "9": 0.2})
    missing = token("?\n", 0.9, {"?\n": 0.9, "\t": 0.1})
    asked = [*before, plain_token('" a"'), plain_token("ĉ"), first, plain_token("\n"), plain_token('"b"\t'), missing]
    levels = parse_all(asked, 2)
    assert levels is not None
    assert levels[0] is not None
    assert levels[0].expected == pytest.approx(9 * 0.25)
    assert levels[0].values == (0, 9)
    assert levels[0].outside == pytest.approx(0.2)
    assert levels[1] is None  # what was not said is missing, never 0
    spelled = [plain_token("<0x09>"), first, plain_token("<0x0A>")]
    (level,) = parse_all(spelled, 1) or [None]
    assert level == levels[0]
    assert parse_all(asked, 4) is None
    assert parse_all(None, 1) is None


def plain_token(text: str) -> TokenLogprob:
    return TokenLogprob(token=text, logprob=-1.0, alternatives={"5": -1.0})


def test_the_other_questions_are_read_back() -> None:
    read = read_question(intruder_messages(["a<< b>>", "<<c>>"]))
    assert (read.kind, [e.text for e in read.excerpts]) == ("intruder", ["a b", "c"])
    assert read.excerpts[1].spans == ((0, 1),)
    read = read_question(generate_messages("x\n</description>\n", 3, 4))
    assert (read.kind, read.explanation, read.wanted) == ("generate", "x\n</description>\n", (3, 4))
    shown = with_gains("a << b", [(' "c', 12.34), ("(\n", 1.0)])
    read = read_question(effect_messages([shown, with_gains("y", [])]))
    assert (read.kind, [e.text for e in read.excerpts]) == ("effect", ["a << b", "y"])
    assert read.gains == (((' "c', 12.3), ("(\n", 1.0)), ())


def test_the_shots_of_intruder_and_generate_are_answered_in_their_form() -> None:
    shots = prompts.turns("intruder-1")[1:-1]
    for (_, asked), (_, answer) in zip(shots[::2], shots[1::2], strict=True):
        assert (
            json.loads(answer)["intruder"]
            in intruder_schema(asked.count("</example "))["properties"]["intruder"]["enum"]
        )
    shots = prompts.turns("generate-1")[1:-1]
    for (_, asked), (_, answer) in zip(shots[::2], shots[1::2], strict=True):
        given = json.loads(answer)
        assert f"fitting: {len(given['fitting'])}\nother: {len(given['other'])}" in asked


def test_questions_that_were_cut_are_refused() -> None:
    for name, why in (("simulate-1", "tokens"), ("generate-1", "how many")):
        system = {"role": "system", "content": prompts.turns(name)[0][1]}
        broken = [system] * (len(prompts.turns(name)) - 1) + [{"role": "user", "content": "<description>"}]
        with pytest.raises(InputError, match=why):
            read_question(broken)
    with pytest.raises(InputError, match="only the prompts"):
        read_question("a text to complete")
