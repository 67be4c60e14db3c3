from __future__ import annotations

import html
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.analysis.latent_page import signs
from exegete.analysis.rendering import flattened
from exegete.analysis.visible import visible, visible_line, visible_token

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_nothing_hidden_is_left(text: str) -> None:
    shown = visible(text)
    assert all(unicodedata.category(c) not in HIDDEN or c in "\n\t" for c in shown)
    assert [c for c in visible_line(text) if unicodedata.category(c) in HIDDEN] == []
    shown.encode("utf-8")


@given(st.text(max_size=20))
def test_escapes_can_be_read_back(text: str) -> None:
    if "⟨U+" not in text:
        assert re.sub(r"⟨U\+([0-9A-F]+)⟩", lambda m: chr(int(m[1], 16)), visible(text)) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\n\twith lines", "plain text\n\twith lines"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("\ufeff", "⟨U+FEFF⟩"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("naïve 中文 😀", "naïve 中文 😀"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("", "∅"),
        (" the", "·the"),
        ("    ", "····"),
        ("a ", "a·"),
        ("\n\n", "↵↵"),
        ("\t", "→"),
        ("\r\n", "␍↵"),
        ("two words", "two words"),
        ("\u0301", "◌\u0301"),
        ("\u200b", "⟨U+200B⟩"),
    ],
)
def test_tokens_are_seen_whole(token: str, shown: str) -> None:
    assert visible_token(token) == shown


@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_signs_escape_everything_and_lose_nothing(text: str) -> None:
    marked = str(signs(text))
    assert re.sub(r"</?i>", "", marked).count("<") == 0
    plain = html.unescape(re.sub(r"</?i>", "", marked))
    expected = text.replace("\n", "↵").replace("\t", "→").replace("\r", "␍")
    expected = re.sub(" {2,}", lambda m: "·" * len(m[0]), expected)
    assert plain == visible(expected)


def test_signs_are_faint_and_single_spaces_stay() -> None:
    assert str(signs("if a:\n    <b>")) == "if a:<i>↵</i><i>····</i>&lt;b&gt;"


def test_flattened_names_are_dotted() -> None:
    data = {"a": {"b": 1234, "c": [1, 2]}, "d": None, "e": True, "f": 0.5}
    assert flattened(data) == [("a.b", "1,234"), ("a.c", "1, 2"), ("d", "–"), ("e", "True"), ("f", "0.5")]


def test_nested_findings_become_named_lines_and_no_source_of_python() -> None:
    data = {"near": [{"latent": "a/1", "n": 1200, "low": None}, {"latent": "a/2"}], "kl": [0.123456, None], "on": True}
    assert flattened(data) == [
        ("near 1.latent", "a/1"),
        ("near 1.n", "1,200"),
        ("near 1.low", "–"),
        ("near 2.latent", "a/2"),
        ("kl", "0.1235, –"),
        ("on", "True"),
    ]
