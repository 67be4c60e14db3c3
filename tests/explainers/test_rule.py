from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exegete.errors import InputError
from exegete.explainers.explainer import explainers
from exegete.explainers.rule import RuleExplainer
from exegete.rules import Rule, parse, render
from exegete.rules.execute import execute
from exegete.views import LatentView

Make = Callable[..., LatentView]


def test_a_rule_is_found_told_in_english_and_carried_as_a_program(make_view: Make, rowed: Any) -> None:
    (explanation,) = RuleExplainer().explain([make_view(data=rowed, index=30)])
    assert explanation.status == "ok"
    rule = Rule.from_json(json.loads(json.dumps(explanation.program)))
    assert explanation.text == render(rule, rowed.tokens)
    assert parse(explanation.text, rowed.tokens) == rule
    test = rowed.rows("test").tokens
    assert np.array_equal(execute([rule], test, rowed.tokens)[0] > 0, test == 30)
    train = explanation.detail["train"]
    assert (train["precision"], train["recall"], train["auprc"]) == (1.0, 1.0, 1.0)
    assert train["n_firings"] == int((rowed.rows("train").tokens == 30).sum())
    json.dumps(explanation.detail, allow_nan=False)


def test_a_latent_without_a_rule_is_a_state(make_view: Make, rowed: Any) -> None:
    found = list(RuleExplainer().explain([make_view(data=rowed, index=1000), make_view(data=rowed, index=5)]))
    assert [(e.latent.index, e.status) for e in found] == [(1000, "failed"), (5, "ok")]
    assert found[0].text is None
    assert found[0].program is None
    assert "firings" in found[0].detail["reason"]


def test_each_coders_latents_are_searched_in_its_own_rows(make_view: Make, rowed: Any) -> None:
    other = type(rowed)()
    views = [make_view(data=rowed, index=3), make_view(data=other, index=4), make_view(data=rowed, index=5)]
    explainer = RuleExplainer()
    found = {e.latent.index: e.text for e in explainer.explain(views)}
    for index in (3, 4, 5):
        (alone,) = RuleExplainer().explain([make_view(data=type(rowed)(), index=index)])
        assert found[index] == alone.text
    assert f'" w{3}"' in str(found[3]) or " w3" in str(found[3])
    assert [e.text for e in explainer.explain(views[:1])] == [found[3]]


def test_it_needs_all_firings_and_no_language_model(make_view: Make) -> None:
    assert RuleExplainer().needs == {"data"}
    assert explainers.from_spec(RuleExplainer().spec).spec == {"name": "rule", "args": {}}
    with pytest.raises(InputError, match="all firings"):
        list(RuleExplainer().explain([make_view()]))
    assert list(RuleExplainer().explain([])) == []
