from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from exegete.errors import ConfigError, InputError
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient
from exegete.scorers.embedders import Embedder
from exegete.scorers.intruder import IntruderScorer, parse_intruder
from exegete.scorers.intruder_trials import Kind, deal, marked
from exegete.scorers.scorer import Scoring
from exegete.types import STRATA, Array, ExampleSet, Explanation, LatentId, LLMReply, LLMRequest, Score, Windows
from exegete.views import LatentView

WORD = 3


class Letters(Embedder):
    """Vectors that know one thing: whether the word of latent 3 is there."""

    @property
    def name(self) -> str:
        return "letters"

    @property
    def natural(self) -> bool:
        return False

    def check(self) -> None:
        pass

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Array:
        has = np.array([" w03" in text for text in texts])
        return np.stack([has, ~has], axis=1).astype(np.float32)


def by_decile(world: Any, per_decile: int = 10, deciles: int = 10, silent: int = 30) -> LatentView:
    """A latent whose firing windows are drawn by decile, two windows to a document."""
    examples = world.examples(WORD, n_fire=per_decile * deciles, n_silent=silent)
    windows = examples.windows
    tested = np.flatnonzero((windows.split == 2) & windows.fires)
    stratum, document = windows.stratum.copy(), windows.document.copy()
    stratum[tested] = [STRATA.index(f"decile_{i % deciles}") for i in range(len(tested))]
    document[tested] = 1000 + np.arange(len(tested)) // deciles // 2
    made = replace(examples, examples=replace(windows, stratum=stratum, document=document))
    return LatentView(latent=made.latent, tokens=world.table, examples=made)


def shown_of(view: LatentView) -> Windows:
    return view.examples.part("test")


@pytest.mark.parametrize(("kind", "trials"), [("default", 20), ("internal", 20), ("decile", 20)])
def test_every_trial_has_one_intruder_and_no_window_is_used_again(world: Any, kind: Kind, trials: int) -> None:
    view = by_decile(world)
    windows = shown_of(view)
    dealt = deal(view, windows, kind, 5)
    assert len(dealt) == trials
    used = [i for trial in dealt for i in trial.places]
    assert len(used) == len(set(used)) == 5 * trials
    apart = []
    for trial in dealt:
        others = [i for i in trial.places if i != trial.intruder]
        assert len(others) == 4
        assert {int(windows.stratum[i]) for i in others} == {trial.stratum}
        assert windows.fires[others].all()
        assert windows.fires[trial.intruder] == (kind != "default")
        assert trial.places[trial.answer] == trial.intruder
        apart.append((int(windows.stratum[trial.intruder]) - trial.stratum) % 10)
    if kind == "decile":
        assert set(apart) == {5}
    if kind == "internal":
        assert 0 not in apart
    assert sorted(t.stratum for t in dealt) == sorted([*range(10)] * 2)
    assert len({t.answer for t in dealt}) == 5  # it may stand anywhere
    assert dealt == deal(view, windows, kind, 5)
    assert dealt != deal(replace(view, examples=replace(view.examples, seed=1)), windows, kind, 5)


def test_windows_of_one_document_are_kept_apart(world: Any) -> None:
    view = by_decile(world)  # each decile has five documents of two windows
    windows = shown_of(view)
    for trial in deal(view, windows, "default", 5):
        documents = [int(windows.document[i]) for i in trial.places if i != trial.intruder]
        assert len(set(documents)) == 4


@given(
    n=st.integers(3, 6),
    per_decile=st.integers(0, 7),
    deciles=st.integers(1, 4),
    silent=st.integers(0, 8),
    kind=st.sampled_from(["default", "internal", "decile"]),
)
def test_trials_use_what_there_is(world: Any, n: int, per_decile: int, deciles: int, silent: int, kind: Kind) -> None:
    view = by_decile(world, per_decile, deciles, silent)
    dealt = deal(view, shown_of(view), kind, n)
    used = [i for trial in dealt for i in trial.places]
    assert len(used) == len(set(used))
    if kind == "default":
        assert len(dealt) == min(silent, per_decile // (n - 1) * deciles)
    else:
        assert len(dealt) == (per_decile // n * deciles if deciles > 1 else 0)


def test_silent_intruders_are_marked_like_firing_windows(world: Any) -> None:
    view = by_decile(world)
    windows = shown_of(view)
    marks = marked(view, windows, 0.3)
    assert marks.any(axis=1).all()
    assert (windows.activations[marks & windows.fires[:, None]] > 0).all()


# -- judges -----------------------------------------------------------------------------------------------------------


def one(scorer: IntruderScorer, view: LatentView, explanation: Explanation | None = None) -> Scoring:
    given = explanation or Explanation(latent=view.latent, text=None, status="failed", explainer={"name": "none"})
    (scoring,) = scorer.score([(given, view)])
    return scoring


def wilson(k: int, n: int) -> tuple[float, float]:
    low, high = stats.binomtest(k, n).proportion_ci(method="wilson")
    return float(low), float(high)


def scores_of(scoring: Scoring) -> dict[tuple[str, str], Score]:
    return {(s.metric, s.control): s for s in scoring.scores}


def finds(request: LLMRequest) -> str:
    """Name the excerpt without the word."""
    texts = [e.text for e in read_question(request.messages).excerpts]
    return f'{{"intruder": {next((i for i, t in enumerate(texts, 1) if " w03" not in t), 1)}}}'


def test_a_language_model_that_sees_the_word_names_every_intruder(world: Any) -> None:
    client = ScriptedClient(finds)
    view = replace(by_decile(world), llm=client)
    scoring = one(IntruderScorer(), view)  # needs no explanation
    scores = scores_of(scoring)
    own, chance, lift = (
        scores[key] for key in (("accuracy", "none"), ("accuracy", "chance"), ("accuracy_lift", "chance"))
    )
    assert scoring.scores[0] is own
    assert (own.value, own.n_total, own.n_scored) == (1.0, 20, 20)
    low, _ = wilson(20, 20)
    assert own.low == pytest.approx(low)
    assert (chance.value, chance.low, chance.high) == (0.2, 0.2, 0.2)
    assert (lift.value, lift.low) == pytest.approx((0.8, low - 0.2))
    assert own.n_documents > 20
    assert own.flags == ()
    judged = scoring.judgements["none"]
    assert all(j.prediction and j.truth for j in judged)
    assert {j.stratum for j in judged} == {f"decile_{i}" for i in range(10)}
    windows = shown_of(view)
    silent = set(zip(windows.row[~windows.fires].tolist(), windows.start[~windows.fires].tolist(), strict=True))
    assert {(j.row, j.start) for j in judged} <= silent
    assert len(client.requests) == 20
    assert all("<<" in e for r in client.requests for e in r.messages[-1]["content"].split("</example")[:-1])
    assert {r.stage for r in client.requests} == {"intruder"}


def test_who_cannot_tell_is_right_by_chance(world: Any) -> None:
    view = replace(by_decile(world), llm=ScriptedClient(lambda request: '{"intruder": 2}'))
    windows = shown_of(view)
    expected = sum(t.answer == 1 for t in deal(view, windows, "internal", 5))
    own = scores_of(one(IntruderScorer(kind="internal"), view))["accuracy", "none"]
    assert own.value == pytest.approx(expected / 20)
    assert own.scorer == "intruder_internal"


def test_an_embedder_names_what_is_least_like_the_others(world: Any) -> None:
    view = by_decile(world)
    scorer = IntruderScorer(embedder=Letters())
    assert not scorer.asks(view)
    assert scorer.plumbing(view)  # letters are no language
    own = scores_of(one(scorer, view))["accuracy", "none"]
    assert own.value == 1.0
    blind = scores_of(one(IntruderScorer(kind="decile", embedder=Letters()), view))["accuracy", "none"]
    windows = shown_of(view)
    # all windows hold the word, so that the first of each trial is named
    assert blind.value == sum(t.answer == 0 for t in deal(view, windows, "decile", 5)) / 20


def test_failures_are_asked_for_again_counted_and_bounded(world: Any) -> None:
    answers: list[str | LLMReply] = [
        "what?",
        '{"intruder": 1}',
        "7",
        "no",
        LLMReply(text=None, finish="error", error="x"),
    ]
    given = iter([*answers, LLMReply(text="", finish="refused")])
    view = replace(by_decile(world, 4, 4), llm=ScriptedClient(lambda request: next(given)))
    (scoring,) = IntruderScorer().score([(world.explanation(WORD), view)], concurrency=1)
    assert [j.status for j in scoring.judgements["none"]] == ["ok", "unparsed", "failed", "refused"]
    own = scores_of(scoring)["accuracy", "none"]
    assert (own.n_total, own.n_scored, own.n_failed) == (4, 1, 3)
    right = int(own.value)
    assert own.floor == pytest.approx(wilson(right, 4)[0])
    assert own.ceiling == pytest.approx(wilson(right + 3, 4)[1])


def test_too_few_windows_give_no_score(world: Any) -> None:
    view = replace(by_decile(world, 5, 1), llm=ScriptedClient(finds))
    for kind in ("internal", "decile"):
        scores = scores_of(one(IntruderScorer(kind=kind), view))
        assert math.isnan(scores["accuracy", "none"].value)
        assert scores["accuracy", "none"].n_total == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"intruder": 3}', 3),
        ('Thinking: {"intruder": 1}? No.\n```{"intruder" : "4"}```', 4),
        (" 5.\n", 5),
        ('{"intruder": 6}', None),
        ('{"intruder": 0}', None),
        ("the third", None),
        ("2 or 3", None),
        ("", None),
    ],
)
def test_answers_are_read(text: str, named: int | None) -> None:
    assert parse_intruder(text, 5) == named


def test_arguments_are_checked_and_stand_in_the_spec(world: Any) -> None:
    wrongs: list[dict[str, Any]] = [{"kind": "x"}, {"judge": "x"}, {"n": 2}, {"threshold": 1.0}, {"max_tokens": 0}]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            IntruderScorer(**wrong)
    scorer = IntruderScorer(kind="decile", n=4, judge="llm", threshold=0.0)
    assert IntruderScorer(**scorer.spec["args"]).spec == scorer.spec
    assert scorer.label == "intruder_decile"
    assert scorer.needs == {"examples", "llm"}
    assert IntruderScorer().needs == {"examples"}
    with pytest.raises(InputError, match="--llm"):
        one(scorer, by_decile(world))


def test_an_empty_latent_has_no_trials(world: Any) -> None:
    examples: ExampleSet = world.examples(WORD, n_fire=0, n_silent=0)
    view = LatentView(latent=LatentId(coder="c", index=WORD), tokens=world.table, examples=examples)
    assert deal(view, shown_of(view), "default", 5) == []


def test_without_trials_neither_accuracy_nor_chance_nor_lift_is_a_number(world: Any) -> None:
    examples: ExampleSet = world.examples(WORD, n_fire=2, n_silent=2)
    view = LatentView(latent=LatentId(coder="c", index=WORD), tokens=world.table, examples=examples)
    scoring = one(IntruderScorer(embedder=Letters()), view)
    assert [(s.metric, s.control, s.n_total) for s in scoring.scores] == [
        ("accuracy", "none", 0),
        ("accuracy", "chance", 0),
        ("accuracy_lift", "chance", 0),
    ]
    assert all(math.isnan(s.value) and math.isnan(s.low) and math.isnan(s.high) for s in scoring.scores)
