"""What a stage's output rests on: the keys of stages, and the refusal of a change under existing output.

The key of a stage hashes its own options and the keys below it, so that a new scorer leaves the store alone.

Models are named in a spec as the user named them. Where a name may stand for several (a folder), the key rests on what
lies there instead: another model in the same folder is another stage, the same model in another folder is the same one.
A model of a server is known by its address and name alone, one of a hub by its name.

What a score is held against belongs to it too. An explanation's nearest latents are those among the explained ones, so
with more of these they may be others, and bits are of another contest. The key of such a scorer therefore hashes which
latents are explained; what was scored among fewer stays stored under its own key, and is taken over without asking
again for every latent whose nearest are still the same (``ScoreStage``). The null's donors are no part of a key: any
latents that fire about as often are as good a null, and each score's detail says which they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, final

from exegete.config import RunConfig
from exegete.errors import MismatchError
from exegete.explainers.explainer import explainers
from exegete.files import hash_json, read_json
from exegete.llm.identity import embedder_identity, model_identity
from exegete.llm.reading import reader_name
from exegete.runs import Run
from exegete.scorers.scorer import make_scorer

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient
    from exegete.preparing import Prepared
    from exegete.results import Results

CONTRASTED: Final = "contrasted"
"""Under which name a spec says which latents were explained."""
_IDENTITIES: Final = "identities"
_READER: Final = " (reader)"
_COLLECTING = ("dtype", "coder_dtype", "compile", "batch_tokens", "sink_norm")


@final
class Keys:
    """The specs of the stages of one run under one configuration; ``key_of`` gives a stage's key."""

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
            **_identities([asked.name] if asked else []),
        }

    def explained(self, coder: str, llm: LLMClient | None, results: Results | None) -> str:
        """Return the key of the explanations to judge: those that this configuration makes, where there are any.

        Else the latest that differ from them in nothing but the language model: who judges need not be who explained.
        """
        spec = self.explain(coder, llm)
        own = key_of(spec)
        there = [] if results is None else [key for key, _ in results.explainers(coder)]
        if results is None or own in there or spec["llm"] == "none":
            return own
        stages = results.stages()
        others = [key for key in there if key in stages and _without_llm(stages[key][1]) == _without_llm(spec)]
        return others[-1] if others else own

    def score(
        self,
        scorer: str,
        llm: LLMClient | None,
        explained: str,
        *,
        among: Collection[int] = (),
        reader: str | None = None,
    ) -> dict[str, Any]:
        """What the scores of explanations under the key ``explained`` rest on.

        ``among`` are the latents that have one, for scorers that hold an explanation against others'. ``reader`` says
        who reads where that is settled; else the language model may be asked whether it can.
        """
        made = make_scorer(scorer, self._config)
        scoring = self._config.scoring
        judge = made.judged_by(llm)
        # Who judges may be a reader or the subject, and a language model be asked for something else beside.
        beside = llm is not None and judge != llm.name and "llm" in made.needs
        asked = llm is not None and (judge == llm.name or beside)
        reads = ""
        if "reader" in made.needs:
            reads = reader_name(scoring.reader, llm) if reader is None else reader
        embedder = str(made.spec.get("args", {}).get("embedder", ""))
        return {
            "explain": explained,
            "scorer": dict(made.spec),
            "prompt": "" if judge == "rule" else made.prompt_hash,
            "judge": f"{reads}{_READER}" if judge == "reader" else judge,
            "temperature": llm.temperature if llm is not None and asked else None,
            "donors": self._config.donors,
            **({"near": scoring.near, CONTRASTED: hash_json(sorted(among))} if "near" in made.needs else {}),
            **({"reader": reads} if reads else {}),
            **({"llm": llm.name} if llm is not None and beside else {}),
            **_identities([judge, reads, llm.name if llm is not None and beside else ""], embedder),
        }


def key_of(spec: Mapping[str, Any]) -> str:
    """Return the key of a stage: the hash of its spec, in which names of models are replaced by their identities."""
    known: Mapping[str, str] = spec.get(_IDENTITIES, {})
    named = {**known, **{name + _READER: identity + _READER for name, identity in known.items()}}

    def identified(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: identified(part) for name, part in value.items()}
        return named.get(value, value) if isinstance(value, str) else value

    return hash_json(identified({name: value for name, value in spec.items() if name != _IDENTITIES}))


def held_against_others(spec: Mapping[str, Any], stages: Mapping[str, tuple[str, Any]]) -> list[str]:
    """Return the keys of the stages that differ from a spec only in which latents were explained, in no order.

    None for a scorer that holds explanations against no others.
    """
    if CONTRASTED not in spec:
        return []
    own = key_of(_without(spec, CONTRASTED))
    alike = (key for key, (_, other) in stages.items() if isinstance(other, Mapping) and "scorer" in other)
    return [k for k in alike if k != key_of(spec) and key_of(_without(stages[k][1], CONTRASTED)) == own]


def _identities(models: Iterable[str], embedder: str = "") -> dict[str, dict[str, str]]:
    """Return what stands behind the names of models, where the name does not say it.

    Only an embedder may be named by a bare folder: ``rule`` and ``subject`` stand for no folders of these names.
    """
    found = {name: model_identity(name) for name in models if name and name != embedder}
    if embedder:
        found[embedder] = embedder_identity(embedder)
    known = {name: identity for name, identity in found.items() if identity is not None}
    return {_IDENTITIES: known} if known else {}


def _without_llm(spec: Mapping[str, Any]) -> dict[str, Any]:
    return _without(spec, "llm", "temperature", _IDENTITIES)


def _without(spec: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name not in names}


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
