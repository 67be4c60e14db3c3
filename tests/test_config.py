"""Configuration: what is given is checked, what is saved is read back, keys are no part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exegete.config import RunConfig, merge
from exegete.errors import ConfigError, NotFoundError


def test_a_configuration_round_trips_through_yaml(tmp_path: Path) -> None:
    config = RunConfig.from_dict(
        {"subject": "m", "coder": ["a", "b"], "examples": {"window": 16}, "latents": {"indices": [1, 2]}, "seed": 7}
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    again = RunConfig.from_yaml(tmp_path / "c.yaml")
    assert again == config
    assert again.hash == config.hash
    assert again.examples.window == 16
    assert again.latents.indices == (1, 2)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 3\nexamples:\n  window: 16\n  n_train: 8\n")
    config = RunConfig.from_yaml(tmp_path / "c.yaml", {"examples": {"window": 64}})
    assert (config.seed, config.examples.window, config.examples.n_train) == (3, 64, 8)


def test_merge_keeps_what_is_not_named() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}}) == {"a": {"b": 5, "c": 2}, "d": 3}
    assert merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"seeed": 1}, ["seeed", "seed"]),
        ({"examples": {"windows": 1}}, ["examples.windows", "examples.window"]),
        ({"examples": 3}, ["examples", "group"]),
        ({"seed": "x"}, ["seed", "int", "'x'"]),
        ({"seed": True}, ["seed", "int"]),
        ({"examples": {"strategy": "best"}}, ["strategy", "quantiles", "best"]),
        ({"examples": {"window": 0}}, ["examples.window", "at least 1"]),
        ({"examples": {"window": 256}}, ["window", "row_length"]),
        ({"corpus": {"row_length": 1}}, ["row_length"]),
        ({"examples": {"test_share": 1.0}}, ["test_share"]),
        ({"examples": {"negatives": ["same_token", "random"], "n_negatives": 1}}, ["n_negatives", "each kind"]),
        ({"nulls": ["random"]}, ["nulls", "random_coder"]),
        ({"coder": {"a": 1}}, ["coder", "list"]),
        ({"donors": 0}, ["donors"]),
    ],
)
def test_bad_settings_are_named_with_what_is_allowed(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(data)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_value_stands_for_a_list_and_none_for_the_default() -> None:
    assert RunConfig.from_dict({"coder": "a"}).coder == ("a",)
    assert RunConfig.from_dict({"corpus": {"max_tokens": None}}).corpus.max_tokens is None
    assert RunConfig.from_dict({"examples": {"test_share": 0.5}}).examples.test_share == 0.5


def test_bad_files_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no\.yaml"):
        RunConfig.from_yaml(tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: }")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML") as caught:
        RunConfig.from_yaml(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="name: value"):
        RunConfig.from_yaml(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert RunConfig.from_yaml(tmp_path / "empty.yaml") == RunConfig()


def test_yaml_cannot_build_objects(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("subject: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        RunConfig.from_yaml(tmp_path / "evil.yaml")


@pytest.mark.parametrize(
    ("given", "controls"),
    [
        ("none", ()),
        (["none"], ()),
        ([], ()),
        ("all", ("other_latent", "shuffled_words", "empty")),
        ("empty", ("empty",)),
        (["empty", "other_latent"], ("empty", "other_latent")),
    ],
)
def test_a_list_of_names_may_be_all_or_none(given: object, controls: tuple[str, ...]) -> None:
    made = RunConfig.from_dict({"scoring": {"controls": given}})
    assert made.scoring.controls == controls
    assert RunConfig.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(("given", "words"), [(["all", "empty"], "each alone"), ("other", "one of"), (3, "one of")])
def test_names_that_are_none_are_refused(given: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_dict({"scoring": {"controls": given}})
