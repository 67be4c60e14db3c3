"""What a stage's output rests on: the keys of stages, and the refusal of a change under existing output.

The key of a stage hashes its own options and the keys below it, so that a new scorer leaves the store alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, final

from exegete.config import RunConfig
from exegete.errors import MismatchError
from exegete.explainers.explainer import explainers
from exegete.files import hash_json, read_json
from exegete.runs import Run
from exegete.scorers.scorer import make_scorer

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient
    from exegete.preparing import Prepared
    from exegete.results import Results

_COLLECTING = ("dtype", "coder_dtype", "compile", "batch_tokens", "sink_norm")


@final
class Keys:
    """The specs of the stages of one run under one configuration; a stage's key is the hash of its spec."""

    def __init__(self, run: Run, config: RunConfig) -> None:
        self._run, self._config = run, config

    def select(self, coder: str) -> str:
        """Identity of a coder's examples."""
        return hash_json(
            {
                "store": self._run.store(coder).manifest.key,
                "examples": self._config.to_dict()["examples"],
                "seed": self._config.seed,
            }
        )

    def explain(self, coder: str, llm: LLMClient | None, explainer: str | None = None) -> dict[str, Any]:
        """What a coder's explanations rest on; ``explainer`` is by default that of the configuration."""
        made = explainers.from_text(explainer or self._config.explainer)
        asked = llm if "llm" in made.needs else None
        return {
            "coder": coder,
            "select": self.select(coder),
            "explainer": dict(made.spec),
            "llm": asked.name if asked else "none",
            "temperature": asked.temperature if asked else None,
            "prompt": made.prompt_hash,
        }

    def explained(self, coder: str, llm: LLMClient | None, results: Results | None) -> str:
        """Return the key of the explanations to judge: those that this configuration makes, where there are any.

        Else the latest that differ from them in nothing but the language model: who judges need not be who explained.
        """
        spec = self.explain(coder, llm)
        own = hash_json(spec)
        there = [] if results is None else [key for key, _ in results.explainers(coder)]
        if results is None or own in there or spec["llm"] == "none":
            return own
        stages = results.stages()
        others = [key for key in there if key in stages and _without_llm(stages[key][1]) == _without_llm(spec)]
        return others[-1] if others else own

    def score(self, scorer: str, llm: LLMClient | None, explained: str) -> dict[str, Any]:
        """What the scores of explanations under the key ``explained`` rest on."""
        made = make_scorer(scorer, self._config)
        scoring = self._config.scoring
        judge = made.judged_by(llm)
        asked = llm is not None and judge == llm.name
        return {
            "explain": explained,
            "scorer": dict(made.spec),
            "prompt": "" if judge == "rule" else made.prompt_hash,
            "judge": f"{scoring.reader} (reader)" if judge == "reader" else judge,
            "temperature": llm.temperature if llm is not None and asked else None,
            "donors": self._config.donors,
            **({"near": scoring.near} if "near" in made.needs else {}),
            **({"reader": scoring.reader} if "reader" in made.needs else {}),
        }


def _without_llm(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name not in ("llm", "temperature")}


def settings_under(config: RunConfig) -> dict[str, Any]:
    """Return the settings that existing output rests on."""
    data = config.to_dict()
    under = {name: data[name] for name in ("subject", "coder", "hookpoints", "seed", "corpus", "collect", "examples")}
    under["collect"] = {name: value for name, value in under["collect"].items() if name in _COLLECTING}
    return under


def refuse_changes(run: Run, config: RunConfig, prepared: Prepared | None = None) -> None:
    """Refuse a change of settings, subject or coders under existing output: MismatchError with the difference."""
    path = run.folder / "manifest.json"
    if not path.is_file() or not run.coders():  # nothing rests on the settings yet
        return
    before = read_json(path)
    made_with, now_with = dict(before.get("settings", {})), settings_under(config)
    if not _explained(run):  # the firings do not rest on which windows are shown
        made_with["examples"] = now_with["examples"]
    changed = list(_differences(made_with, now_with))
    if prepared is not None and not changed:
        hashes = {name: coder.hash for name, coder in prepared.coders.items()}
        known = {name: old for name, old in before.get("coders", {}).items() if name in hashes}
        now = {"subject": prepared.subject.hash, **{f"coder {name}": hashes[name] for name in known}}
        then = {"subject": before.get("subject", {}).get("hash"), **{f"coder {n}": old for n, old in known.items()}}
        changed = list(_differences(then, now))
    if changed:
        raise MismatchError(
            f"{run.folder} was made with other settings ({'; '.join(changed)}); "
            "use another folder, or the settings it was made with"
        )


def _explained(run: Run) -> bool:
    """Return whether anything is explained yet."""
    if not (run.folder / "results.db").is_file():
        return False
    results = run.results(readonly=False)  # one that was left before its tables were made is finished
    try:
        return bool(results.explainers())
    finally:
        results.close()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterable[str]:
    for name in sorted({*before, *now}):
        a, b = before.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{where}{name}.")
        elif a != b:
            yield f"{where}{name}: {a!r} → {b!r}"
