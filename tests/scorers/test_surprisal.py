"""Surprisal against its definition by plain forward passes, and its AUROC against scikit-learn."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from exegete.codec import to_json
from exegete.errors import ConfigError, InputError
from exegete.examples.render import plain_texts
from exegete.llm.reader import Reader
from exegete.llm.reading import subject_reader
from exegete.llm.reading_server import ServerReader
from exegete.llm.scripted import ScriptedClient
from exegete.prompts import prompt_hash
from exegete.scorers.scorer import Scoring, scorers
from exegete.scorers.surprisal import PROMPT, UNRELATED, SurprisalScorer, beginning
from exegete.subjects import load_subject
from exegete.testing import toy_llama
from exegete.types import Explanation, LLMReply, LLMRequest, TokenLogprob
from exegete.views import LatentView

ENTRY = re.compile(r"Feature: (.*)\nTexts with this feature:\n\Z")
Nats = Callable[[str, str], float | None]


class Knowing(Reader):
    """Reads by a function of the description (None without one) and the text."""

    def __init__(self, nats: Nats) -> None:
        self.nats, self.closed = nats, 0
        self.calls: list[list[tuple[str, str]]] = []

    @property
    def name(self) -> str:
        return "knowing"

    @property
    def natural(self) -> bool:
        return True

    async def logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        self.calls.append(list(pairs))
        return [self.nats(before, text) for before, text in pairs]

    async def close(self) -> None:
        self.closed += 1


def described(before: str) -> str:
    found = ENTRY.search(before)
    assert found is not None
    return found.group(1)


def by_words(before: str, text: str) -> float:
    """A described word makes its window 3 nats likelier; the length and the description cost the same everywhere."""
    word = re.search(r" w\d\d", described(before))
    return -0.5 * len(text) - 0.1 * len(before) + (3.0 if word and word.group() in text else 0.0)


def scored(view: LatentView, explanation: Explanation, **args: Any) -> Scoring:
    (found,) = SurprisalScorer(**args).score([(explanation, view)])
    return found


def values(scoring: Scoring, control: str = "none") -> list[float | None]:
    return [j.value for j in scoring.judgements[control]]


def test_the_text_before_a_window_ends_in_its_description() -> None:
    text = beginning("words\n about  time ")
    assert text.endswith("\n\nFeature: words about time\nTexts with this feature:\n")
    assert text.count("Feature: ") == 4
    bare = beginning("words about time", shown=False)
    assert bare.count("Feature: ") == 1
    assert text.startswith(bare.partition("\n\n")[0])
    assert "{" not in text
    assert UNRELATED == "Various unrelated sentences."
    assert SurprisalScorer().prompt_hash == prompt_hash(PROMPT)


def test_judgements_hold_what_the_description_saves_and_auroc_is_that_of_scikit_learn(world: Any) -> None:
    rng = np.random.default_rng(0)
    noise: dict[str, float] = {}

    def noisy(before: str, text: str) -> float:
        return by_words(before, text) + noise.setdefault(before + text, rng.normal(0, 1.5))

    view = dataclasses.replace(world.view(3, donors=(5, 9, 11, 20)), reader=Knowing(noisy))
    own = world.explanation(3)
    found = scored(view, own)
    windows = view.examples.part("test")
    texts = plain_texts(windows.tokens, view.tokens)
    info = [noisy(beginning(str(own.text)), t) - noisy(beginning(UNRELATED), t) for t in texts]
    assert values(found) == pytest.approx(info)
    scores = {(s.metric, s.control): s for s in found.scores}
    headline = found.scores[0]
    assert (headline.scorer, headline.metric, headline.control) == ("surprisal", "auroc", "none")
    assert headline.value == pytest.approx(roc_auc_score(windows.fires, info))
    assert headline.value > 0.75 > scores["auroc", "other_latent"].value
    assert (headline.n_total, headline.n_scored, headline.n_failed) == (60, 60, 0)
    donor = [noisy(beginning(world.explanation(5).text), t) - noisy(beginning(UNRELATED), t) for t in texts]
    null = scores["auroc", "other_latent"]
    assert (null.n_total, null.method) == (180, "t over 3 donors")  # three of the four donors
    assert values(found, "other_latent")[:60] == pytest.approx(donor)
    lift = scores["auroc_lift", "other_latent"]
    assert lift.value == pytest.approx(headline.value - null.value)
    activations = windows.activations.max(axis=1)
    assert scores["pearson", "none"].value == pytest.approx(np.corrcoef(info, activations)[0, 1])
    assert "population_auprc" in {metric for metric, _ in scores}
    judged = found.judgements["none"][0]
    assert judged.prediction is None
    assert judged.activation == pytest.approx(float(activations[0]))
    assert judged.inclusion_probability == 0.5
    assert found.detail == {"reader": "knowing", "entries": True}
    json.dumps(to_json(found.detail))


def test_the_unrelated_description_is_read_once_for_all_explanations_of_a_latent(world: Any) -> None:
    reader = Knowing(by_words)
    view = dataclasses.replace(world.view(3, donors=(5, 9)), reader=reader)
    one, other = world.explanation(3), world.explanation(3, text="words such as w03 , w04")
    found = list(SurprisalScorer(controls="all").score([(one, view), (other, view)]))
    assert [f.explanation for f in found] == [one, other]
    (pairs,) = reader.calls
    assert len(set(pairs)) == len(pairs)
    told = [described(before) for before, _ in pairs[::60]]
    assert told.count(UNRELATED) == 1
    assert len(told) == 2 + 2 + 2 + 1 + 1  # both, the donors, both shuffled, no words at all, the unrelated one
    assert {"none", "other_latent", "shuffled_words", "empty"} <= set(found[1].judgements)
    assert reader.closed == 1
    (alone,) = SurprisalScorer(controls="all").score([(other, view)])
    assert alone.scores == found[1].scores


def test_what_is_planned_is_what_a_server_is_asked(world: Any) -> None:
    asked: list[LLMRequest] = []

    def answer(request: LLMRequest) -> LLMReply:
        asked.append(request)
        tokens = tuple(TokenLogprob(token=c, logprob=-1.0) for c in str(request.prompt))
        return LLMReply(text="", finish="length", prompt_logprobs=tokens)

    view = dataclasses.replace(world.view(3, donors=(5, 9)), reader=ServerReader(ScriptedClient(answer)))
    scorer = SurprisalScorer(controls="all")
    planned = scorer.planned(world.explanation(3), view)
    (found,) = scorer.score([(world.explanation(3), view)])
    assert {request.prompt: request for request in planned} == {request.prompt: request for request in asked}
    assert len(planned) == len(asked) == 60 * 6
    assert set(values(found)) == {0.0}  # a token costs the same whatever stands before it


def test_what_was_not_read_has_failed_and_widens_the_bounds(world: Any) -> None:
    def failing(before: str, text: str) -> float | None:
        return (
            None
            if crc32(text.encode()) % 5 == 0 or (described(before) == UNRELATED and "w07" in text)
            else by_words(before, text)
        )

    def nothing(before: str, text: str) -> float | None:
        return None

    view = world.view(3, donors=(5, 9))
    texts = plain_texts(view.examples.part("test").tokens, view.tokens)
    lost = sum(crc32(text.encode()) % 5 == 0 or "w07" in text for text in texts)
    found = scored(dataclasses.replace(view, reader=Knowing(failing)), world.explanation(3))
    headline = found.scores[0]
    assert headline.n_failed == lost > 0
    assert headline.floor < headline.low <= headline.value <= headline.high <= headline.ceiling
    assert [j.status for j in found.judgements["none"]].count("failed") == lost
    gone = scored(dataclasses.replace(view, reader=Knowing(nothing)), world.explanation(3))
    assert math.isnan(gone.scores[0].value)
    assert gone.scores[0].n_failed == 60
    assert gone.detail["entries"] is False


def test_where_the_prompt_is_too_long_it_is_read_without_other_entries(world: Any) -> None:
    def short(before: str, text: str) -> float | None:
        return by_words(before, text) if len(before) < 500 else None

    reader = Knowing(short)
    view = dataclasses.replace(world.view(3, donors=(5, 9)), reader=reader)
    found = scored(view, world.explanation(3))
    assert found.detail["entries"] is False
    assert len(reader.calls) == 2
    assert all(before.count("Feature: ") == 1 for before, _ in reader.calls[1])
    assert found.scores[0].value > 0.9
    assert all(j.status == "ok" for part in found.judgements.values() for j in part)


def test_info_equals_plain_passes_of_a_real_model(world: Any, tmp_path: Path) -> None:
    subject = load_subject(str(toy_llama(tmp_path)), device="cpu")
    view = dataclasses.replace(world.view(3, donors=(5, 9), n_fire=4, n_silent=4), reader=subject_reader(subject))
    own = world.explanation(3)
    found = scored(view, own)

    def plainly(before: str, text: str) -> float:
        head = subject.tokenizer(before)["input_ids"]
        ids = subject.tokenizer(before + text)["input_ids"]
        first = next((i for i, pair in enumerate(zip(head, ids, strict=False)) if len(set(pair)) > 1), len(head))
        assert first >= len(head) - 1  # the line end before the text and those it begins with are one token
        with torch.inference_mode():
            logits = subject.model(input_ids=torch.tensor([[0, *ids]]), use_cache=False).logits[0]
        said = torch.log_softmax(logits.double(), dim=-1)
        return sum(said[i, ids[i]].item() for i in range(first, len(ids)))

    texts = plain_texts(view.examples.part("test").tokens, view.tokens)
    wanted = [plainly(beginning(str(own.text)), text) - plainly(beginning(UNRELATED), text) for text in texts]
    assert values(found) == pytest.approx(wanted, abs=2e-4)
    assert found.scores == scored(view, own).scores


def test_without_an_explanation_or_a_reader(world: Any) -> None:
    view = world.view(3)
    failed = dataclasses.replace(world.explanation(3), text=None, status="failed", program=None)
    assert scored(dataclasses.replace(view, reader=Knowing(by_words)), failed).scores == ()
    with pytest.raises(InputError, match="--reader"):
        scored(view, world.explanation(3))
    with pytest.raises(ConfigError, match="donors"):
        SurprisalScorer(donors=-1)
    with pytest.raises(ConfigError, match="controls"):
        SurprisalScorer(controls="other")


def test_the_spec_makes_the_same_scorer_and_a_reader_without_language_is_plumbing(world: Any) -> None:
    scorer = scorers.from_text("surprisal:donors=2,controls=other_latent+empty")
    assert scorer.spec == {"name": "surprisal", "args": {"controls": ["other_latent", "empty"], "donors": 2}}
    assert scorers.from_spec(scorer.spec).spec == scorer.spec
    assert scorer.needs == {"examples", "donors", "reader"}

    class Code(Knowing):
        @property
        def natural(self) -> bool:
            return False

    view = world.view(3)
    assert scorer.plumbing(dataclasses.replace(view, reader=Code(by_words)))
    assert not scorer.plumbing(dataclasses.replace(view, reader=Knowing(by_words)))
