"""What each command does."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exegete.cli.bars import progress_for
from exegete.cli.options import given
from exegete.cli.output import say
from exegete.config import RunConfig, merge
from exegete.errors import ConfigError, InputError


def run(options: argparse.Namespace) -> int:
    """Carry out the chosen command."""
    from exegete.cli import elk, lens, steer

    return {
        "demo": _demo,
        "run": _run,
        "collect": _collect,
        "explain": _explain,
        "score": _score,
        "report": _report,
        "certify": _certify,
        "validate": _validate,
        "inspect": _inspect,
        "store": _compact,
        "plan": _plan,
        "export": _export,
        "records": _records,
        "llm": _llm,
        "status": _status,
        "steer": steer.run,
        "lens": lens.run,
        "elk": elk.run,
    }[options.command](options)


def _demo(options: argparse.Namespace) -> int:
    from exegete.demo import demo_config, describe_corpus
    from exegete.pipeline import run_pipeline

    begun = time.monotonic()
    config = demo_config(given(options), recurrent=options.recurrent)
    out = options.out or Path("runs/demo-recurrent" if options.recurrent else "runs/demo")
    say(describe_corpus())
    made = run_pipeline(config, out, progress=progress_for(options.quiet))
    _print_report(made)
    say(f"{time.monotonic() - begun:.0f} s in all")
    return 0


def _run(options: argparse.Namespace) -> int:
    from exegete.pipeline import run_pipeline

    made = run_pipeline(_config(options), options.out, progress=progress_for(options.quiet))
    _print_report(made)
    return 0


def _collect(options: argparse.Namespace) -> int:
    from exegete.pipeline import Pipeline
    from exegete.preparing import prepare
    from exegete.runs import Run

    config = _config(options)
    prepared = prepare(config)
    with Pipeline(config, options.out, progress_for(options.quiet)) as pipeline:
        pipeline.collect(prepared)
    made = Run(options.out)
    for name in made.coders():
        store = made.store(name)
        firing = int((store.counts > 0).sum())
        quality = store.manifest.quality
        note = "".join(f", {what.upper()} {quality[what]:.3g}" for what in ("fvu", "l0") if what in quality)
        say(f"{name}: {int(store.counts.sum()):,} firings of {firing:,} of {store.width:,} latents{note}")
    say(f"next: exegete explain {options.out}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    with _opened(options, scoring=False) as (pipeline, client):
        pipeline.explain(client)
    counts = _counted(pipeline.run, "explanations")
    say("explanations: " + (", ".join(f"{n} {status}" for status, n in counts.items()) or "none"))
    say(f"next: exegete score {options.run}")
    return 0


def _score(options: argparse.Namespace) -> int:
    with _opened(options, explaining=False) as (pipeline, client):
        pipeline.score(client)
    scored = _counted(pipeline.run, "scored")
    _print_stopped(pipeline.run, pipeline.config)
    told = ", ".join(f"{n} by {scorer}" for scorer, n in scored.items())
    say(f"latents scored: {told}" if scored else "no scores: nothing is explained yet")
    say(f"next: exegete {'report' if scored else 'explain'} {options.run}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from exegete.files import RunLock
    from exegete.pipeline import report
    from exegete.runs import open_run

    made = open_run(options.run)
    with RunLock(made.folder):
        report(made, progress=progress_for(options.quiet))
    _print_report(made)
    return 0


def _certify(options: argparse.Namespace) -> int:
    from exegete.analysis.certify import certify
    from exegete.analysis.text import certified_text
    from exegete.errors import unknown
    from exegete.runs import open_run

    made = open_run(options.run)
    for name in options.coders:
        if name not in made.coders():
            raise unknown("coder", name, made.coders())
    results = made.results()
    try:
        found = [
            certify(
                results,
                name,
                scorer=options.scorer,
                level=options.level,
                rate=options.rate,
                correction=options.correction,
                worst=options.worst,
            )
            for name in options.coders or [name for name in made.coders() if "@" not in name]
        ]
    finally:
        results.close()
    say(json.dumps([dataclasses.asdict(one) for one in found], indent=2) if options.json else certified_text(found))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from exegete.files import write_text
    from exegete.testing import validate, validation_lines, validation_page

    found = validate(
        options.scorers,
        latents=options.latents,
        n=options.n,
        rounds=options.rounds,
        seed=options.seed,
        progress=progress_for(options.quiet),
    )
    say("\n".join(validation_lines(found)))
    if options.page is not None:
        write_text(options.page, validation_page(found))
        say(f"page: {options.page}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    named = given(options)
    if options.subject:
        return _inspect_subject(options, named)
    if "collect" in named:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in named["collect"])
        raise ConfigError(f"{names} say how a model is loaded; give --subject to look at one")
    from exegete.cli.coder_text import coders_text
    from exegete.coders import inspect_coders

    try:
        infos = inspect_coders(options.what, named.get("hookpoints", ()))
    except InputError as error:
        folder = Path(options.what).expanduser()
        if any((folder / f"{name}_config.json").is_file() for name in ("generation", "tokenizer")):  # of models alone
            raise InputError(f"{error}; to look at a model, give --subject") from error
        raise
    say(json.dumps([dataclasses.asdict(info) for info in infos], indent=2) if options.json else coders_text(infos))
    return 0


def _inspect_subject(options: argparse.Namespace, named: Mapping[str, Any]) -> int:
    if "hookpoints" in named:
        raise ConfigError("--hookpoints chooses coders; with --subject all hookpoints of the model are listed")
    from exegete.cli.subject_text import subject_text
    from exegete.subjects import inspect_subject, load_subject

    info = inspect_subject(load_subject(options.what, **named.get("collect", {})))
    say(json.dumps(info.as_dict(), indent=2) if options.json else subject_text(info))
    return 0


def _compact(options: argparse.Namespace) -> int:
    from exegete.errors import unknown
    from exegete.files import RunLock
    from exegete.runs import open_run
    from exegete.store.compaction import compact

    made = open_run(options.run)
    for name in options.coders:
        if name not in made.coders():
            raise unknown("coder", name, made.coders())
    progress = progress_for(options.quiet)
    for name in options.coders or made.coders():
        before = made.store(name).manifest
        progress.start(f"compact {name}", before.width, "latents")
        done = 0

        def advance(latents: int, _: int) -> None:
            nonlocal done
            progress.advance(latents - done)
            done = latents

        with RunLock(made.folder):
            after = compact(made.store_folder / name, progress=advance)
        progress.end()
        state = f"{len(before.shards)} → {len(after.shards)} files" if after != before else "nothing to do"
        say(f"{name}: {state if after.complete else 'not complete; left as it is'}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from exegete.planner import plan
    from exegete.planning import plan_dict, plan_lines
    from exegete.runs import open_run

    folder = Path(options.what[0])
    if len(options.what) == 1 and folder.is_dir():
        made = open_run(folder)
        config = RunConfig.from_dict(merge(made.config.to_dict(), given(options)))
        found = plan(config, made)
    else:
        found = plan(_config(options))
    say(json.dumps(plan_dict(found), indent=2) if options.json else "\n".join(plan_lines(found)))
    return 0


def _export(options: argparse.Namespace) -> int:
    from exegete.export import export_run
    from exegete.runs import open_run

    export_run(open_run(options.run), to=options.to, out=options.out, coders=options.coders)
    say(f"{options.to}: {options.out}")
    return 0


def _records(options: argparse.Namespace) -> int:
    from exegete.analysis.visible import visible_line
    from exegete.api import load_simulations
    from exegete.results_rows import plain

    found = [
        {"layer": read.layer, "neuron": read.neuron, "explanation": one.explanation, "windows": len(one.sequences)}
        | dataclasses.asdict(one.scores)
        for read in map(load_simulations, options.files)
        for one in read.explanations
    ]
    if options.json:
        say(json.dumps(plain(found), indent=2))
        return 0
    for one in found:
        scores = " ".join(f"{one[name]:7.3f}" for name in ("ev_correlation", "rsquared", "absolute_dev_explained"))
        say(visible_line(f"{one['layer']}/{one['neuron']} {scores} {one['windows']:4} {one['explanation']}"))
    say("by explanation: correlation, R², absolute deviation explained, windows" if found else "no explanations")
    return 0


def _llm(options: argparse.Namespace) -> int:
    import asyncio

    from exegete.llm.open import client_from_spec
    from exegete.llm.prices import load_prices

    config = RunConfig.from_dict(merge({"llm": {"llm": options.model}}, given(options))).llm
    client = client_from_spec(options.model, config)
    if client is None:
        raise ConfigError("none is no language model; write URL#MODEL, openai/MODEL, openrouter/ORG/MODEL, hf/MODEL")

    async def ask() -> dict[str, Any]:
        try:
            await client.check()
            return dataclasses.asdict(await client.capabilities())
        finally:
            await client.close()
            client.end()

    found = asyncio.run(ask())
    price = load_prices(config.prices).price_of(options.model)
    if options.json:
        say(json.dumps({"model": client.name, **found, "price": None if price is None else dataclasses.asdict(price)}))
        return 0
    for name, value in found.items():
        say(f"{name.replace('_', ' ')}: {value if not isinstance(value, bool) else 'yes' if value else 'no'}")
    say("price: not known" if price is None else f"price: ${price.input:g} in, ${price.output:g} out a million tokens")
    return 0


def _status(options: argparse.Namespace) -> int:
    from exegete.runs import open_run
    from exegete.status import status_of, status_text

    found = status_of(open_run(options.run))
    say(json.dumps(found, indent=2) if options.json else status_text(found))
    return 0


@contextlib.contextmanager
def _opened(options: argparse.Namespace, *, explaining: bool = True, scoring: bool = True) -> Iterator[tuple[Any, Any]]:
    """Yield the pipeline of an existing run with the options laid over its configuration, and its LLM."""
    from exegete.pipeline import Pipeline, check_llm, language_model, users_of_llm
    from exegete.runs import open_run

    made = open_run(options.run)
    config = RunConfig.from_dict(merge(made.config.to_dict(), given(options)))
    with language_model(config, made.folder) as client:
        check_llm(client, users_of_llm(config, explaining=explaining, scoring=scoring))
        with Pipeline(config, options.run, progress_for(options.quiet)) as pipeline:
            yield pipeline, client


def _config(options: argparse.Namespace) -> RunConfig:
    """Return the configuration of ``CONFIG.yaml`` or ``MODEL CODER …`` with the options laid over it."""
    first = options.what[0]
    if first.endswith((".yaml", ".yml")):
        if len(options.what) > 1:
            raise ConfigError(f"after {first} come only options, got {options.what[1]!r}")
        return RunConfig.from_yaml(Path(first), given(options))
    if len(options.what) < 2:
        raise ConfigError(f"give a configuration file (.yaml), or a model and a coder; got only {first!r}")
    named = {"subject": first, "coder": list(options.what[1:])}
    return RunConfig.from_dict(merge(named, given(options)))


def _print_report(made: Any) -> None:
    from exegete.analysis.summary import summarise, table_text

    results = made.results()
    try:
        say(table_text(summarise(results)))
    finally:
        results.close()
    say(f"report: {made.report_path}")


def _print_stopped(made: Any, config: RunConfig) -> None:
    """Print what came of the scorers of a configuration that judged only as much as needed."""
    from exegete.analysis.stopping import stopped
    from exegete.analysis.text import stopped_text
    from exegete.scorers.scorer import make_scorer

    labels = {make_scorer(name, config).label for name in config.scorers}
    results = made.results()
    try:
        found = [one for one in stopped(results) if one.scorer in labels]
    finally:
        results.close()
    if found:
        say(stopped_text(found))


def _counted(made: Any, part: str) -> dict[str, int]:
    """Return how many latents of all coders together are ``explanations`` by status, or are ``scored`` by scorer."""
    found: dict[str, int] = {}
    results = made.results()
    try:
        for counts in results.counts().values():
            for name, n in getattr(counts, part).items():
                found[name] = found.get(name, 0) + n
    finally:
        results.close()
    return dict(sorted(found.items()))
