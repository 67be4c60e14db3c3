from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete import prompts
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.llm.protocol import (
    PROMPTS,
    explain_messages,
    judge_messages,
    read_question,
    unmark,
    with_strengths,
    write_excerpts,
)
from exegete.scorers.verdicts import parse_verdicts

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
