"""The house keeps its shape: imports point down, quick parts stay free of torch, modules stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import exegete

SOURCE = Path(exegete.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# Rows of the house, top first: a module may import only from its own row or those above it.
ORDER = [
    {"errors", "streams", "progress"},
    {"tokens"},
    {"types"},
    {"files", "registry", "codec"},
    {"config", "metrics", "prompts"},
    {"subjects", "demo"},
    {"coders"},
    {"store"},
    {"views"},
    {"rules"},
    {"collecting"},
    {"examples"},
    {"llm"},
    {"explainers"},
    {"scorers"},
    {"results", "donors", "planning"},
    {"analysis", "hard_negatives"},
    {"runs"},
    {"keys", "export"},
    {"status", "preparing"},
    {"scoring"},
    {"pipeline", "planner"},
    {"steering", "lens", "elk"},
    {"api"},
    {"testing", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
NO_TORCH = (
    *("examples", "rules", "results", "analysis", "metrics", "store", "types", "views", "cli", "runs", "pipeline"),
    *("keys", "planning", "planner", "hard_negatives", "export"),
)


def part(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return first.partition("_")[0] if first.startswith("results_") else first


def imports(path: Path, *, top_only: bool) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def runtime_imports(path: Path) -> list[str]:
    """Imports other than those under TYPE_CHECKING."""
    source = ast.parse(path.read_text())
    for node in ast.walk(source):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
    found: list[str] = []
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_only_up_the_house(path: Path) -> None:
    here = part(path)
    if here == "__init__":
        return
    assert here in LEVEL, f"say in which row {here} stands"
    for name in runtime_imports(path):
        if name.startswith("exegete."):
            there = name.split(".")[1]
            there = there.partition("_")[0] if there.startswith("results_") else there
            assert LEVEL[there] <= LEVEL[here], f"{path.name} imports {name}, which stands below it"


@pytest.mark.parametrize("path", [p for p in MODULES if part(p) in NO_TORCH], ids=lambda p: str(p.relative_to(SOURCE)))
def test_quick_parts_import_nothing_heavy_at_module_level(path: Path) -> None:
    for name in imports(path, top_only=True):
        assert name.split(".")[0] not in {"torch", "transformers", "scipy", "sklearn", "openai"}, name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_module_is_over_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_importing_exegete_and_its_parser_imports_no_torch() -> None:
    code = (
        "import sys, exegete, exegete.cli.options as o; o.build_parser();"
        "heavy = {'torch', 'transformers', 'scipy', 'openai', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_those_listed() -> None:
    assert exegete.__all__ == sorted(exegete.__all__)
    for name in exegete.__all__:
        assert getattr(exegete, name) is not None
    assert set(exegete.__all__) <= set(dir(exegete))
    with pytest.raises(AttributeError):
        _ = exegete.nothing


def test_every_public_class_is_abstract_or_final() -> None:
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            bases = {ast.unparse(base) for base in node.bases}
            marks = {ast.unparse(mark).split("(")[0] for mark in node.decorator_list}
            errors = any(base.endswith(("Error", "Exception")) for base in bases)
            assert (
                "final" in marks or errors or bases & {"ABC", "Protocol", "NamedTuple"} or "Protocol" in str(bases)
            ), f"{path.name}: {node.name}"
