"""The shipped split: held-out files are test text on every Python, whatever else the table does not know is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from exegete.demo.stdlib import side_of, source_files, source_paths, split_table, stdlib_root


def test_the_table_names_sides_by_path() -> None:
    held, excluded = split_table()
    assert len(held) > 90
    assert side_of("argparse.py") == "held_out"
    assert side_of("test/test_argparse.py") == "held_out"
    assert side_of("encodings/utf_8.py") == "excluded"
    assert side_of("pydoc_data/topics.py") == "excluded"
    assert side_of("ast.py") == "train"
    assert side_of("a_module_of_python_4.py") == "train"
    assert not any(key.startswith("encodings/") for key in held)
    assert "encodings/*" in excluded


def test_sources_are_sorted_readable_and_no_site_packages(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "x.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    (tmp_path / "a.py").write_text("# héllo\n", encoding="utf-8")
    (tmp_path / "bad.py").write_bytes(b"# -*- coding: no-such-codec -*-\n")
    (tmp_path / "empty.py").write_text("\n")
    assert [key for key, _ in source_paths(tmp_path)] == ["a.py", "b.py", "bad.py", "empty.py"]
    assert [f.key for f in source_files(tmp_path)] == ["a.py", "b.py"]


def test_this_interpreter_has_text_on_both_sides() -> None:
    if not (stdlib_root() / "argparse.py").is_file():
        pytest.fail("the interpreter's standard library has no source files; the demo cannot run here")
    sides = {file.side for file in source_files()}
    assert {"train", "held_out"} <= sides
