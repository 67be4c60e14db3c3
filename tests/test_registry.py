"""Named factories re-create what their spec describes."""

from __future__ import annotations

import pytest

from exegete.errors import ConfigError, InputError, NotFoundError, unknown
from exegete.explainers.explainer import explainers
from exegete.registry import Registry
from exegete.scorers.scorer import scorers


def test_built_in_factories_are_imported_when_used() -> None:
    registry: Registry[object] = Registry("thing", {"fraction": "fractions:Fraction"})
    assert str(registry.make("fraction", {"numerator": 1, "denominator": 3})) == "1/3"
    assert str(registry.from_spec({"name": "fraction", "args": {"numerator": 2}})) == "2"
    assert registry.names() == ("fraction",)


def test_unknown_names_and_arguments_say_what_is_allowed() -> None:
    registry: Registry[object] = Registry("thing", {"fraction": "fractions:Fraction"})
    with pytest.raises(NotFoundError, match="did you mean fraction"):
        registry.make("fractoin")
    with pytest.raises(ConfigError, match="allowed arguments: numerator"):
        registry.make("fraction", {"top": 1})


def test_added_factories_and_doubles() -> None:
    registry: Registry[object] = Registry("thing", {"fraction": "fractions:Fraction"})
    registry.add("list", list)
    assert registry.make("list") == []
    with pytest.raises(InputError, match="already"):
        registry.add("fraction", list)


@pytest.mark.parametrize("registry", [explainers, scorers])
def test_specs_of_our_own_re_create_the_object(registry: Registry[object]) -> None:
    for name in registry.names():
        made = registry.make(name)
        spec = made.spec  # type: ignore[attr-defined]
        assert spec["name"] == name
        assert registry.from_spec(spec).spec == spec  # type: ignore[attr-defined]


def test_unknown_lists_the_known_when_nothing_is_near() -> None:
    assert "known: a, b" in str(unknown("letter", "zzz", ["b", "a"]))
    assert "none is known" in str(unknown("letter", "zzz", []))
    assert "(20 in all)" in str(unknown("number", "zzz", [str(i) for i in range(20)]))
