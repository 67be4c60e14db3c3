"""A synthetic run with the look of a real one: code tokens, graded latents, noisy judges, nulls near chance."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exegete.results import Results
from exegete.scorers.scorer import Scoring
from exegete.streams import stream
from exegete.tokens import TokenTable
from exegete.types import Example, ExampleSet, Explanation, Judgement, LatentId, LatentStats, Score, Skipped

WINDOW = 32
ROLES = {"": (0.86, 0.72), "@random-coder": (0.78, 0.62), "@random-subject": (0.63, 0.30)}
HOSTILE = '<script>alert("x")</script> \u202eevil\u2066 <img src=x onerror=alert(1)> {{ 7*7 }} \x1b[31m'


@dataclass(frozen=True)
class SyntheticRun:
    folder: Path
    table: TokenTable
    examples: dict[LatentId, ExampleSet]

    def results(self, *, readonly: bool = True) -> Results:
        return Results.open(self.folder / "results.db", readonly=readonly)

    def examples_of(self, latent: LatentId) -> ExampleSet | None:
        return self.examples.get(latent)


def code_tokens() -> tuple[TokenTable, np.ndarray[Any, Any]]:
    source = inspect.getsource(textwrap) + inspect.getsource(re)
    pieces = re.findall(r" ?[A-Za-z_]+| ?\d+|\n+| {2,}| ?[^\sA-Za-z_\d]| ", source)
    names = ["<bos>", *sorted(set(pieces))]
    place = {piece: number for number, piece in enumerate(names)}
    table = TokenTable([name.encode() for name in names], special=[0])
    return table, np.array([place[p] for p in pieces], dtype=np.uint32)


def build_run(
    folder: Path, *, n_latents: int = 12, bases: tuple[str, ...] = ("layers.3",), nulls: bool = True
) -> SyntheticRun:
    table, tokens = code_tokens()
    n = min(len(tokens) // WINDOW, 120)
    windows = tokens[: n * WINDOW].reshape(n, WINDOW)
    examples: dict[LatentId, ExampleSet] = {}
    with Results.open(folder / "results.db") as results, results.transaction():
        _meta(results)
        for base in bases:
            for suffix, (level, auprc) in ROLES.items() if nulls else [("", ROLES[""])]:
                _coder(results, base + suffix, level, auprc, windows, table, n_latents, examples)
    return SyntheticRun(folder, table, examples)


def _meta(results: Results) -> None:
    config = {"subject": "demo/tiny-python-lm", "coder": ["demo/sae"], "explainer": "rule", "llm": {"llm": "none"}}
    results.put_meta("config", {**config, "latents": {"count": 300, "min_rate": 1e-4}, "seed": 0})
    results.put_meta(
        "manifest",
        {
            "format": 1,
            "subject": {"name": "demo/tiny-python-lm", "hash": "0123456789abcdef"},
            "coders": {"layers.3": "fedcba9876543210"},
            "versions": {"python": "3.11.7", "numpy": "2.4.0", "exegete": "0.1.0"},
        },
    )
    results.put_meta(
        "corpus", {"source": "Python standard library", "tokens": 4_812_331, "documents": 612, "rows": 18_853}
    )


def _coder(
    results: Results,
    coder: str,
    level: float,
    auprc: float,
    windows: np.ndarray[Any, Any],
    table: TokenTable,
    n_latents: int,
    examples: dict[LatentId, ExampleSet],
) -> None:
    statistics = []
    for index in range(n_latents + 3):
        latent = LatentId(coder=coder, index=7 * index + 3)
        rng = stream(1, latent)
        liked = rng.choice(np.arange(1, len(table)), size=int(rng.integers(1, 9)), replace=False)
        strength = np.zeros(len(table))
        strength[liked] = rng.uniform(0.5, 6.0, len(liked))
        common = int(rng.choice(np.bincount(windows.ravel()).argsort()[-40:]))
        strength[common] = 3.0
        acts = strength[windows] * (rng.random(windows.shape) < 0.9) * rng.lognormal(0, 0.3, windows.shape)
        acts = acts.astype(np.float32)
        statistics.append(_stats(latent, windows, acts))
        if index >= n_latents:
            results.add_skip(
                Skipped(
                    latent=latent, stage="select", reason="too few firing test windows", have=index - n_latents, need=10
                ),
                "explain-" + coder,
            )
            continue
        chosen = _examples(latent, windows, acts)
        examples[latent] = chosen
        text = (
            f"Fires on {' or '.join(repr(table.texts[t]) for t in sorted(liked)[:4])}, "
            f"and on {table.texts[common]!r} at the start of a line inside brackets."
        )
        explanation = Explanation(
            latent=latent,
            text=text,
            status="ok",
            explainer={"name": "rule", "args": {}},
            program={"clauses": [{"tokens": [int(t) for t in liked]}]},
            examples=tuple((e.row, e.start) for e in chosen.part("train")),
        )
        id_ = results.add_explanation(explanation, "explain-" + coder)
        good = float(np.clip(rng.normal(level, 0.09), 0.45, 1.0))
        for scorer, shift in (("detection", 0.0), ("fuzzing", -0.04)):
            results.add_stage(f"{scorer}-{coder}", scorer, {"judge": "rule", "explain": "explain-" + coder})
            results.add_scoring(_judged(explanation, chosen, scorer, good + shift, rng), f"{scorer}-{coder}", id_)
        results.add_scoring(
            _executed(explanation, float(np.clip(rng.normal(auprc, 0.15), 0.02, 0.99)), rng), f"execution-{coder}", id_
        )
    results.add_latents(statistics)
    results.mark_selected(coder, [s.latent.index for s in statistics])
    idle = [
        _stats(LatentId(coder=coder, index=10_000 + i), windows, np.zeros(windows.shape, np.float32)) for i in range(5)
    ]
    results.add_latents(idle)


def _stats(latent: LatentId, windows: np.ndarray[Any, Any], acts: np.ndarray[Any, Any]) -> LatentStats:
    values = acts[acts > 0]
    fired = windows[acts > 0]
    counts = np.bincount(fired, minlength=1)
    top = np.argsort(-counts, kind="stable")[:10]
    share = counts[counts > 0] / max(1, len(fired))
    edges = 2.0 ** np.arange(-10, 11)
    return LatentStats(
        latent=latent,
        count=len(values),
        rate=len(values) / acts.size,
        maximum=float(values.max()) if len(values) else 0.0,
        mean=float(values.mean()) if len(values) else 0.0,
        sum_squares=float((values**2).sum()),
        histogram=np.histogram(values, edges)[0],
        edges=edges,
        top_tokens=tuple((int(t), int(counts[t])) for t in top if counts[t]),
        token_entropy=float(-(share * np.log2(share)).sum()) if len(values) else float("nan"),
    )


def _examples(latent: LatentId, windows: np.ndarray[Any, Any], acts: np.ndarray[Any, Any]) -> ExampleSet:
    made: list[Example] = []
    peak = acts.max(axis=1)
    firing = np.flatnonzero(peak > 0)
    order = firing[np.argsort(-peak[firing], kind="stable")]
    decile = {int(w): min(9, 10 * i // max(1, len(order))) for i, w in enumerate(order)}
    for w in range(len(windows)):
        split = "train" if w % 5 < 2 else "test"
        fires = bool(peak[w] > 0)
        if split == "train" and not fires:
            continue
        made.append(
            Example(
                split=split,  # type: ignore[arg-type]
                fires=fires,
                stratum=f"decile_{decile[w]}" if fires else "silent",
                row=w,
                start=0,
                tokens=windows[w],
                activations=acts[w],
                document=w,
                inclusion_probability=0.5,
            )
        )
    test = [e for e in made if e.split == "test"]
    return ExampleSet(
        latent=latent,
        examples=tuple(made),
        maximum=float(acts.max()),
        firing_rate=float(np.mean([e.fires for e in test])),
        frame=len(test),
        seed=0,
    )


def _verdicts(chosen: ExampleSet, good: float, rng: np.random.Generator) -> tuple[Judgement, ...]:
    out = []
    test = chosen.part("test")
    for e, failed, draw in zip(
        test, (rng.random(len(test)) < 0.02).tolist(), rng.random(len(test)).tolist(), strict=True
    ):
        weak = int(e.stratum[-1]) / 40 if e.fires else -0.05
        right = draw < min(0.98, max(0.02, good - weak))
        out.append(
            Judgement(
                row=e.row,
                start=e.start,
                document=e.document,
                stratum=e.stratum,
                truth=e.fires,
                prediction=None if failed else e.fires == right,
                status="unparsed" if failed else "ok",
            )
        )
    return tuple(out)


def _judged(e: Explanation, chosen: ExampleSet, scorer: str, good: float, rng: np.random.Generator) -> Scoring:
    judged = {"none": _verdicts(chosen, good, rng), "other_latent": _verdicts(chosen, 0.5, rng)}
    scores = []
    for control, verdicts in judged.items():
        ok = [j for j in verdicts if j.prediction is not None]
        sensitivity = float(np.mean([j.prediction for j in ok if j.truth]))
        specificity = float(np.mean([not j.prediction for j in ok if not j.truth]))
        value = (sensitivity + specificity) / 2
        if control == "other_latent" and rng.random() < 0.3:
            value = 0.5
        for metric, v in (
            ("balanced_accuracy", value),
            ("sensitivity", sensitivity),
            ("specificity", specificity),
            ("f1", sensitivity * 0.9),
        ):
            scores.append(_score(e.latent, scorer, metric, v, control, len(verdicts), len(verdicts) - len(ok)))
    return Scoring(explanation=e, scores=tuple(scores), judgements=judged)


def _executed(e: Explanation, auprc: float, rng: np.random.Generator) -> Scoring:
    scores = []
    values = {
        "auprc": auprc,
        "precision": auprc * 0.95,
        "recall": auprc * 0.9,
        "f1": auprc * 0.92,
        "pearson": auprc * 0.85,
    }
    values["base_rate"] = float(10 ** rng.uniform(-3.5, -1.5))
    values |= {
        f"mass_decile_{d}": float(np.clip(auprc + 0.15 - d * 0.05 + rng.normal(0, 0.03), 0, 1)) for d in range(10)
    }
    for metric, value in values.items():
        scores.append(_score(e.latent, "execution", metric, value, "none", 40_000, 0))
    for metric, factor in (
        ("auprc_token", 0.6),
        ("auprc_token_set", 0.85),
        ("auprc_unigram", 0.9),
        ("auprc_bigram", 0.95),
    ):
        value = float(np.clip(auprc * factor + rng.normal(0, 0.05), 0.001, 1))
        scores.append(_score(e.latent, "baseline", metric, value, "none", 40_000, 0))
    return Scoring(explanation=e, scores=tuple(scores), judgements={})


def _score(latent: LatentId, scorer: str, metric: str, value: float, control: str, n: int, failed: int) -> Score:
    return Score(
        latent=latent,
        scorer=scorer,
        metric=metric,
        value=value,
        low=max(0.0, value - 0.06),
        high=min(1.0, value + 0.05),
        method="bootstrap",
        n_total=n,
        n_scored=n - failed,
        n_failed=failed,
        control=control,
    )


@pytest.fixture(scope="session")
def synthetic_run(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    return build_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., SyntheticRun]:
    def make(**options: Any) -> SyntheticRun:
        return build_run(tmp_path / "run", **options)

    return make
