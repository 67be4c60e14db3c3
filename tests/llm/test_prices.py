"""Prices: the built-in table, files laid over it, dated versions, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from exegete.errors import ConfigError, NotFoundError
from exegete.llm.prices import Price, load_prices


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


def own(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "settings" / "exegete"
    folder.mkdir(parents=True)
    (folder / "prices.yaml").write_text(text)


def test_a_known_model_by_any_of_its_names() -> None:
    prices = load_prices()
    expected = Price(input=0.15, cached=0.075, output=0.6)
    assert prices.price_of("openai/gpt-4o-mini") == expected
    assert prices.price_of("openai/gpt-4o-mini-2024-07-18") == expected
    assert prices.price_of("openai/gpt-4o-mini-latest") == expected
    assert prices.price_of("https://api.openai.com/v1#gpt-4o-mini") == expected
    assert prices.price_of("https://api.openai.com/v1/#gpt-4o-mini-2024-07-18") == expected


def test_a_longer_name_is_no_version_of_a_shorter_one() -> None:
    prices = load_prices()
    assert prices.price_of("openai/o1") is not None
    for spec in ("openai/o1-pro", "openai/gpt-4o-mini-audio-preview", "openai/gpt-5.4-pro", "openai/gpt-4o-minimal"):
        assert prices.price_of(spec) is None


def test_a_version_with_a_price_of_its_own() -> None:
    prices = load_prices()
    first, later = prices.price_of("openai/gpt-4o-2024-05-13"), prices.price_of("openai/gpt-4o-2024-11-20")
    assert first == Price(input=5, cached=5, output=15)
    assert later == prices.price_of("openai/gpt-4o") == Price(input=2.5, cached=1.25, output=10)


def test_the_model_of_another_server_has_no_price() -> None:
    prices = load_prices()
    for spec in (
        "http://127.0.0.1:8000/v1#gpt-4o-mini",
        "https://else.example/v1#openai/gpt-4o-mini",
        "openrouter/openai/gpt-4o-mini",
        "gpt-4o-mini",
        "none",
        "",
    ):
        assert prices.price_of(spec) is None


def test_models_in_this_process_cost_nothing() -> None:
    for spec in ("hf/some/model", "vllm/some/model"):
        assert load_prices().price_of(spec) == Price(input=0, cached=0, output=0)


def test_files_are_laid_over_the_built_in_table(tmp_path: Path) -> None:
    own(tmp_path, "openai/gpt-4o-mini: {input: 1, output: 2}\nmine: {input: 3, cached: 1, output: 4, batch: 0.25}\n")
    given = tmp_path / "given.yaml"
    given.write_text("mine: {input: 5, output: 6}\nhf/some/model: {input: 7, output: 8}\n")
    prices = load_prices()
    assert prices.price_of("openai/gpt-4o-mini-2024-07-18") == Price(input=1, cached=1, output=2)
    assert prices.price_of("openai/gpt-4o") == Price(input=2.5, cached=1.25, output=10)
    assert prices.price_of("http://127.0.0.1:8000/v1#mine") == Price(input=3, cached=1, output=4, batch=0.25)
    prices = load_prices(given)
    assert prices.price_of("http://127.0.0.1:8000/v1#mine-20260101") == Price(input=5, cached=5, output=6)
    assert prices.price_of("hf/some/model") == Price(input=7, cached=7, output=8)


def test_a_users_table_goes_before_a_longer_name_in_ours(tmp_path: Path) -> None:
    own(tmp_path, "gpt-4o: {input: 1, output: 1}\n")
    assert load_prices().price_of("openai/gpt-4o-2024-05-13") == Price(input=1, cached=1, output=1)


def test_dollars_by_hand() -> None:
    price = Price(input=2, cached=0.5, output=8)
    assert price.dollars(1_000_000, 0) == 2
    assert price.dollars(1000, 500, cached=400) == pytest.approx((600 * 2 + 400 * 0.5 + 500 * 8) / 1e6, rel=1e-15)
    assert price.in_batch() == Price(input=1, cached=1, output=4, batch=1)


@pytest.mark.parametrize(
    "text",
    [
        "- a list",
        "m: 3",
        "m: {input: 1}",
        "m: {input: 1, output: 2, outputs: 3}",
        "m: {input: -1, output: 2}",
        "m: {input: .nan, output: 2}",
        "m: {input: 1, output: true}",
        "m: {input: 1, output: '2'}",
        "m: {input: 1, output: 1e9}",
        "m: {input: 1, output: [",
        "m: !!python/object/apply:os.system ['true']",
        "[" * 1500,
        "m: {1: 2, input: 1, output: 2}",
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_prices(path)
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_prices(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    for name in ("binary.yaml", "large.yaml", "."):
        with pytest.raises(ConfigError):
            load_prices(tmp_path / name)
    (tmp_path / "empty.yaml").write_text("")
    assert load_prices(tmp_path / "empty.yaml").price_of("openai/gpt-4o-mini") is not None


def test_a_price_of_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError):
        Price(input=float("nan"), cached=0, output=0)
    with pytest.raises(ConfigError):
        Price(input=0, cached=0, output=-1)
