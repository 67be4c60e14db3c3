from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from exegete.errors import ConfigError, InputError, LLMError
from exegete.explainers.default import DefaultExplainer, parse_explanation
from exegete.explainers.explainer import explainers
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient
from exegete.prompts import prompt_hash
from exegete.types import Explanation, LLMReply, LLMRequest
from exegete.views import LatentView

Make = Callable[..., LatentView]


def one(view: LatentView, **args: Any) -> Explanation:
    (explanation,) = DefaultExplainer(**args).explain([view])
    return explanation


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("[EXPLANATION]: cats", "cats"),
        ("thinking\n\n[EXPLANATION]: cats\n", "cats"),
        ("[explanation]: cats", "cats"),
        ("[Explanation] cats", "cats"),
        ("**[EXPLANATION]:** cats", "cats"),
        ("**[EXPLANATION]**: cats", "cats"),
        ("## [EXPLANATION]:\n\ncats", "cats"),
        ("so [EXPLANATION]: cats", "cats"),
        ("[**EXPLANATION**]: cats", "cats"),
        ("I end with [EXPLANATION]: as told.\n[EXPLANATION]: cats [and] dogs", "cats [and] dogs"),
        ("[EXPLANATION]: two\nlines", "two\nlines"),
        ("[EXPLANATION]: **bold** cats", "**bold** cats"),
        ("[EXPLANATION]: : cats", ": cats"),
    ],
)
def test_the_answer_stands_after_the_last_marker(reply: str, text: str) -> None:
    assert parse_explanation(reply) == text


@pytest.mark.parametrize(
    "reply", ["", "cats", "EXPLANATION: cats", "[EXPLANATION]:", "[EXPLANATION]:  \n", "x [EXPLANATION"]
)
def test_without_marker_or_text_there_is_no_answer(reply: str) -> None:
    assert parse_explanation(reply) is None


def test_the_prompt_shows_train_windows_with_marks_and_strengths_of_the_latents_maximum(make_view: Make) -> None:
    client = ScriptedClient(["[EXPLANATION]: the word cat"])
    one(make_view(3, client))
    (request,) = client.requests
    assert request.messages[-1]["content"] == (
        '<example 1>\n w1<< cat>> w2 cat\nActivations: (" cat" : 10)\n</example 1>\n'
        '<example 2>\n w1<< cat>> w2<< cat>>\nActivations: (" cat" : 8), (" cat" : 3)\n</example 2>\n'
        '<example 3>\n w1<< cat>> w2<< cat>>\nActivations: (" cat" : 5), (" cat" : 3)\n</example 3>'
    )
    # released code: few-shot answers with role "system"
    assert [m["role"] for m in request.messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert (request.temperature, request.max_tokens) == (0.0, 500)


def test_the_request_is_built_without_sending_it(make_view: Make) -> None:
    client = ScriptedClient(["[EXPLANATION]: x"])
    view = make_view(3, client)
    request = DefaultExplainer(max_tokens=77).request(view)
    assert client.requests == []
    list(DefaultExplainer(max_tokens=77).explain([view]))
    assert client.requests == [request]
    assert (request.stage, request.schema, request.logprobs, request.max_tokens) == ("explain", None, 0, 77)
    assert DefaultExplainer(max_tokens=77).request(make_view(3)) == request  # no language model is needed for it
    with pytest.raises(InputError, match="no firing train window"):
        DefaultExplainer().request(make_view(0, client))


def test_40_train_windows_at_most_and_never_a_test_window(make_view: Make) -> None:
    client = ScriptedClient(["[EXPLANATION]: x", "[EXPLANATION]: x", "[EXPLANATION]: x"])
    explanation = one(make_view(50, client))
    assert len(read_question(client.requests[0].messages).excerpts) == 40
    assert explanation.examples == tuple((i, 4) for i in range(40))
    assert len(one(make_view(12, client)).examples) == 12
    assert len(one(make_view(12, client), n_examples=5).examples) == 5


def test_a_good_reply_is_an_explanation_that_names_its_prompt_and_examples(make_view: Make) -> None:
    reply = LLMReply(text="hm\n[EXPLANATION]: cats", finish="stop", prompt_tokens=11, completion_tokens=2)
    explanation = one(make_view(2, ScriptedClient([reply], name="m")))
    assert (explanation.text, explanation.status, explanation.program) == ("cats", "ok", None)
    assert explanation.prompt_hash == prompt_hash("explain-1")
    assert explanation.examples == ((0, 4), (1, 4))
    assert explainers.from_spec(explanation.explainer).spec == DefaultExplainer().spec
    said = {"model": "m", "finish": "stop", "prompt_tokens": 11, "completion_tokens": 2}
    assert explanation.detail == {**said, "simulated": True}


def test_a_reply_without_the_marker_is_a_state_and_no_sentinel_text(make_view: Make) -> None:
    # released code: the literal text "Explanation could not be parsed." was scored
    client = ScriptedClient(["It is about dogs.", "It is about cats. " * 300])
    explanation = one(make_view(2, client))
    assert (explanation.text, explanation.status) == (None, "unparsed")
    assert "[EXPLANATION]" in explanation.detail["reason"]
    assert explanation.detail["reply"] == ("It is about cats. " * 300)[:2000]


@pytest.mark.parametrize(
    "first", [LLMReply(text="It is about cats.", finish="stop"), LLMReply(text="", finish="length")]
)
def test_a_reply_that_cannot_be_read_is_asked_for_once_more(make_view: Make, first: LLMReply) -> None:
    client = ScriptedClient([first, "[EXPLANATION]: cats"])
    explanation = one(make_view(2, client))
    assert (explanation.text, explanation.status) == ("cats", "ok")
    asked, again = client.requests
    assert again.messages[: len(asked.messages)] == asked.messages
    said, repair = again.messages[len(asked.messages) :]
    assert (said["role"], said["content"]) == ("assistant", first.text or "(no answer)")
    assert repair["role"] == "user"
    assert "[EXPLANATION]:" in repair["content"]


@pytest.mark.parametrize(
    ("reply", "status", "reason"),
    [
        (LLMReply(text="[EXPLANATION]: no", finish="refused"), "refused", None),
        (LLMReply(text=None, finish="error", error="HTTP 500"), "failed", "HTTP 500"),
        (LLMReply(text="", finish="length"), "unparsed", "the reply has no [EXPLANATION]: line"),
    ],
)
def test_refusals_and_failures_are_states(make_view: Make, reply: LLMReply, status: str, reason: str | None) -> None:
    explanation = one(make_view(2, ScriptedClient([reply] * 2)))
    assert (explanation.text, explanation.status) == (None, status)
    assert explanation.detail.get("reason") == reason
    assert explanation.examples == ((0, 4), (1, 4))


def test_without_windows_nothing_is_asked(make_view: Make) -> None:
    client = ScriptedClient([])
    explanation = one(make_view(0, client))
    assert (explanation.status, explanation.examples) == ("failed", ())
    assert client.requests == []


def test_every_view_gets_its_own_explanation(make_view: Make) -> None:
    def say(request: LLMRequest) -> str:
        return f"[EXPLANATION]: {len(read_question(request.messages).excerpts)} windows"

    client = ScriptedClient(say)
    views = [make_view(n, client, index=n) for n in range(1, 20)]
    found = {e.latent.index: e.text for e in DefaultExplainer().explain(views, concurrency=3)}
    assert found == {n: f"{n} windows" for n in range(1, 20)}
    assert list(DefaultExplainer().explain([])) == []


def test_without_a_language_model_it_says_what_to_give(make_view: Make) -> None:
    assert DefaultExplainer().needs == {"examples", "llm"}
    with pytest.raises(InputError, match="--llm"):
        one(make_view(2))


def test_what_no_call_can_mend_is_raised(make_view: Make) -> None:
    with pytest.raises(LLMError, match="no such model"):
        one(make_view(2, ScriptedClient([LLMError("no such model")])))


@pytest.mark.parametrize(
    "args", [{"n_examples": 0}, {"max_tokens": 0}, {"threshold": 1.0}, {"threshold": -1.0}, {"x": 1}]
)
def test_wrong_arguments_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        explainers.make("default", args)


def test_the_threshold_moves_the_marks(make_view: Make) -> None:
    client = ScriptedClient(["[EXPLANATION]: x"] * 2)
    one(make_view(1, client), threshold=0.2)
    one(make_view(1, client), threshold=0.3)
    shown = [read_question(r.messages).excerpts[0].spans for r in client.requests]
    assert [len(s or ()) for s in shown] == [2, 1]
