"""The README says what is true: its Python example runs, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from exegete.cli.options import build_parser

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    code = block.group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names = (
        "from exegete.demo import assets\n"
        "model, coders, text = str(assets() / 'model'), str(assets() / 'coders'), 'stdlib'\n"
        f"out = {str(tmp_path / 'run')!r}\n"
    )
    short = code.replace("max_tokens=200_000", "max_tokens=60_000")
    assert short != code
    done = subprocess.run([sys.executable, "-c", names + short], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Fires ")


@pytest.mark.parametrize("line", re.findall(r"^(?:exegete [^\n\\]*(?:\\\n[^\n\\]*)*)", README, re.MULTILINE))
def test_the_commands_parse(line: str) -> None:
    words = line.split("#   ")[0].replace("\\\n", " ").split("   #")[0].replace("'", "").split()[1:]
    options = build_parser().parse_args(words)
    assert options.command


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}: " in makefile
