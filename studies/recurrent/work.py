"""What is run: one unit for each study, family and seed, its result kept as JSON so that a stopped run goes on."""

from __future__ import annotations

import ast
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, final

from studies.recurrent.models import FAMILIES, Training

from exegete.files import hash_json, read_json, write_json
from exegete.testing import FAMILIES as EVERY

Result = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Sequence[Result]]]
"""By study and family, the results of its seeds in order."""
_CODE: Final = {
    "registers": ("models.py", "registers.py"),
    "comparison": ("models.py", "quirky.py"),
    "conformance": ("conformance.py",),
    "lens": ("models.py", "lenses.py"),
    "addition": ("models.py", "quirky.py"),
}
STUDIES: Final = tuple(_CODE)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is run: seeds, and by family how models are trained, sums first where there are any, and lenses."""

    seeds: int
    pairs: int
    comparison: Mapping[str, Training]
    addition: Mapping[str, tuple[Training, Training]]
    registers: Mapping[str, Training]
    controls: int
    lens: Mapping[str, Training]
    lens_steps: Mapping[str, int]
    lens_tokens: int
    lens_measured: int
    families: tuple[str, ...]


FULL: Final = Size(
    seeds=3,
    pairs=9000,
    comparison={
        "mamba": Training(steps=80),
        "llama": Training(steps=240),
        "rwkv": Training(steps=600, rate=2e-3, decay=0.1),
    },
    addition={
        "mamba": (Training(steps=100), Training(steps=500)),
        "llama": (Training(steps=100), Training(steps=600)),
        "rwkv": (Training(steps=100), Training(steps=600)),
    },
    registers={
        "mamba": Training(steps=400),
        "llama": Training(steps=250),
        "rwkv": Training(steps=400, rate=2e-3),
    },
    controls=20,
    lens={"mamba": Training(steps=200), "llama": Training(steps=300), "rwkv": Training(steps=200)},
    lens_steps={"mamba": 60, "llama": 400, "rwkv": 60},
    lens_tokens=2_000_000,
    lens_measured=6000,
    families=tuple(EVERY),
)
TINY: Final = Size(
    seeds=1,
    pairs=400,
    comparison={"mamba": Training(steps=2)},
    addition={},
    registers={"llama": Training(steps=2), "rwkv": Training(steps=2)},
    controls=2,
    lens={"llama": Training(steps=1)},
    lens_steps={"llama": 2},
    lens_tokens=40_000,
    lens_measured=300,
    families=("mamba", "llama"),
)
"""A size that shows that everything runs; its figures mean nothing."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One study of one family and seed with its settings."""

    study: str
    family: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.study}-{self.family}-{self.seed}"

    @property
    def key(self) -> str:
        """Hash of what the result rests on: settings, the study's own code, and versions."""
        here = Path(__file__).parent
        code = {name: ast.dump(ast.parse((here / name).read_text(encoding="utf-8"))) for name in _CODE[self.study]}
        versions = {name: importlib.metadata.version(name) for name in ("exegete", "torch", "transformers", "numpy")}
        return hash_json({**asdict(self), "code": code, "versions": versions})


def units(size: Size, studies: tuple[str, ...] = STUDIES) -> list[Unit]:
    """Return what is to be run: seed by seed, and within a study what takes longest first."""
    found = []
    for seed in range(size.seeds):
        for family, training in size.registers.items():
            settings: dict[str, Any] = {"training": training, "controls": size.controls}
            found.append(Unit(study="registers", family=family, seed=seed, settings=settings))
        for family, training in size.lens.items():
            settings = {
                "training": training,
                "lens_steps": size.lens_steps[family],
                "tokens": size.lens_tokens,
                "measured": size.lens_measured,
            }
            found.append(Unit(study="lens", family=family, seed=seed, settings=settings))
        for family, (plain, asked) in size.addition.items():
            found.append(Unit(study="addition", family=family, seed=seed, settings={"plain": plain, "asked": asked}))
        for family, training in size.comparison.items():
            settings = {"pairs": size.pairs, "training": training}
            found.append(Unit(study="comparison", family=family, seed=seed, settings=settings))
    settings = {"families": list(size.families)}
    found.append(Unit(study="conformance", family="all", seed=0, settings=settings))
    order = ("mamba", "rwkv", "llama", "all")
    kept = [unit for unit in found if unit.study in studies]
    return sorted(kept, key=lambda unit: (unit.seed, studies.index(unit.study), order.index(unit.family)))


def run_unit(unit: Unit) -> dict[str, Any]:
    """Run one unit in this process, on one thread."""
    import transformers
    from studies.recurrent.conformance import conformance_study
    from studies.recurrent.lenses import lens_study
    from studies.recurrent.models import prepared
    from studies.recurrent.quirky import addition_study, comparison_study
    from studies.recurrent.registers import register_study

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    prepared()
    begun = time.process_time()
    match unit.study:
        case "comparison":
            found = comparison_study(unit.family, unit.seed, **unit.settings)
        case "addition":
            found = addition_study(unit.family, unit.seed, **unit.settings)
        case "registers":
            found = register_study(unit.family, unit.seed, **unit.settings)
        case "lens":
            found = lens_study(unit.family, unit.seed, **unit.settings)
        case _:
            found = conformance_study(**unit.settings)
    return {**found, "seconds": round(time.process_time() - begun, 1)}


def stored(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """Return the result of a unit where it was run before with the same settings and code, else None."""
    path = folder / f"{unit.name}.json"
    if not path.is_file():
        return None
    data = read_json(path)
    return dict(data["result"]) if data.get("key") == unit.key else None


def run_all(folder: Path, wanted: list[Unit], *, processes: int, tell: Any) -> None:
    """Run the units that are not stored yet, in so many processes, and keep each result as soon as it is there."""
    left = [unit for unit in wanted if stored(folder, unit) is None]
    tell(f"{len(wanted) - len(left)} of {len(wanted)} results are there; {len(left)} to run")
    if not left:
        return
    with ProcessPoolExecutor(min(processes, len(left)), mp_context=get_context("spawn")) as pool:
        keys = {unit.name: unit.key for unit in left}
        jobs = {pool.submit(run_unit, unit): unit for unit in left}
        for number, job in enumerate(as_completed(jobs), start=1):
            unit, result = jobs[job], job.result()
            write_json(folder / f"{unit.name}.json", {"key": keys[unit.name], "result": result})
            tell(f"[{number}/{len(left)}] {unit.name}: {result['seconds']:.0f} s of one core")


def collected(folder: Path, wanted: list[Unit]) -> Results:
    """Return the results that are there, by study and family, seeds in order."""
    found: dict[str, dict[str, list[Result]]] = {}
    order = (*FAMILIES, "all")
    for unit in sorted(wanted, key=lambda unit: (order.index(unit.family), unit.seed)):
        result = stored(folder, unit)
        if result is not None:
            found.setdefault(unit.study, {}).setdefault(unit.family, []).append(result)
    return found
