"""``exegete lens``: train, measure, show and use lenses on the residual stream of any subject."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.cli.bars import progress_for
from exegete.cli.lens_options import add_parsers as add_parsers
from exegete.cli.options import given
from exegete.cli.output import say
from exegete.config import CorpusConfig, ExampleConfig, RunConfig
from exegete.errors import ConfigError, InputError, MismatchError

if TYPE_CHECKING:
    from exegete.lens import Lens, LensText
    from exegete.lens.text import Part
    from exegete.subjects import Subject


def run(options: argparse.Namespace) -> int:
    """Carry out the chosen verb."""
    return {
        "train": _train,
        "evaluate": _evaluate,
        "show": _show,
        "generate": _generate,
        "convert": _convert,
        "latents": _latents,
    }[options.verb](options)


def _train(options: argparse.Namespace) -> int:
    from exegete.lens import LensConfig, train_lens
    from exegete.lens.lens import default_sites
    from exegete.lens.report import training_lines
    from exegete.lens.states import StateReader
    from exegete.lens.text import require_settings
    from exegete.subjects.sites import parse_sites

    config = LensConfig(
        loss=options.loss,
        optimizer=options.optimizer,
        steps=options.steps,
        batch_tokens=options.batch_tokens,
        learning_rate=options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        clip=options.clip,
        warmup=options.warmup,
        bias=options.bias,
        rank=options.rank,
        check_every=options.check_every,
        validation_tokens=options.validation_tokens,
        repeat=options.repeat,
        seed=_settings(options).seed,
    )
    settings = _settings(options)
    _require_text(settings)
    require_settings(settings.corpus, validation_share=options.validation_share, test_share=options.test_share)
    if options.checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every is at least 1, got {options.checkpoint_every}")
    subject = _subject(options, settings)
    sites = None if options.sites is None else parse_sites(options.sites, subject)
    if options.state:
        StateReader(subject, default_sites(subject) if sites is None else sites)  # refused before text is read
    text = _text(
        settings, subject, options.out / "corpus", validation=options.validation_share, test=options.test_share
    )
    trained = train_lens(
        subject,
        text,
        out=options.out,
        sites=sites,
        state=options.state,
        config=config,
        progress=progress_for(options.quiet),
        checkpoint_every=options.checkpoint_every,
    )
    say("\n".join(training_lines(trained, config.loss)))
    say(f"lens: {options.out}" + (f", with the state: {options.out / 'state'}" if options.state else ""))
    folders = [str(options.out), *([str(options.out / "state")] if options.state else [])]
    words = [options.subject, "--lens", *folders, "--text", *settings.corpus.text]
    say(f"next: exegete lens evaluate {shlex.join(words)}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from exegete.lens import compared, evaluate_lenses
    from exegete.lens.report import evaluation_lines, write_evaluation
    from exegete.subjects.sites import parse_sites

    settings = _settings(options)
    _require_text(settings)
    split, corpus_hash = _split(options, list(settings.corpus.text))
    settings = _settings(options, split.get("corpus"))
    subject = _subject(options, settings)
    lenses = _lenses(subject, options.lens)
    part: Part = options.part or ("test" if split else "all")
    with tempfile.TemporaryDirectory(prefix="exegete-lens-") as folder:
        text = _text(
            settings,
            subject,
            Path(folder) / "corpus",
            validation=split.get("validation_share", 0.1),
            test=split.get("test_share", 0.2),
            seed=split.get("seed"),
            duplicates=split.get("duplicates", 0.8),
        )
        if split and part in ("test", "validation") and text.corpus.hash != corpus_hash:
            raise MismatchError(
                f"the text is not the one that the lens was trained on, in the same rows, so its {part} part may hold "
                "text that the lens has seen; name text and rows as for training, or measure with --part all"
            )
        found = evaluate_lenses(
            lenses,
            text,
            part=part,
            sites=None if options.sites is None else parse_sites(options.sites, subject),
            tokens=options.tokens,
            transfer=options.transfer,
            seed=settings.seed,
            progress=progress_for(options.quiet),
        )
    if options.out is not None:
        write_evaluation(found, options.out)
    say(json.dumps(found.to_json(), indent=2) if options.json else "\n".join(evaluation_lines(found)))
    if options.reference is not None and not options.json:
        say("")
        say("\n".join(compared(found, family=None if options.reference == "all" else options.reference)))
    if options.out is not None and not options.json:
        say(f"tables and pictures: {options.out}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from exegete.lens import prediction_trajectory
    from exegete.lens.report import trajectory_lines
    from exegete.lens.trajectory import check_pictures
    from exegete.subjects.sites import parse_sites

    settings = _settings(options)
    text = _prompt_text(options)
    check_pictures(options.out, 0)
    subject = _subject(options, settings)
    lens = _one_lens(subject, options.lens)
    sites = None if options.sites is None else parse_sites(options.sites, subject)
    tokens = _prompt(options, subject, text)
    check_pictures(options.out, len(tokens))
    found = prediction_trajectory(lens, tokens, sites=sites, k=options.top)
    for path in options.out:
        found.write(path, options.colour)
        say(f"picture: {path}")
    if not options.out:
        say("\n".join(trajectory_lines(found)))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from exegete.analysis.visible import visible
    from exegete.lens import generate_from_site
    from exegete.subjects.sites import parse_sites

    settings = _settings(options)
    text = _prompt_text(options)
    subject = _subject(options, settings)
    lens = _one_lens(subject, options.lens)
    sites = lens.sites if options.sites is None else parse_sites(options.sites, subject)
    tokens = _prompt(options, subject, text)
    for site in sites:
        made = generate_from_site(
            lens,
            site,
            tokens,
            n=options.tokens,
            temperature=options.temperature,
            seed=settings.seed,
            stop=subject.tokenizer.eos_token_id,
        )
        say(f"--- site {site}\n{visible(subject.token_table().decode(made))}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from exegete.lens import export_lens, load_lens, save_lens

    settings = _settings(options)
    subject = _subject(options, settings)
    lens = load_lens(options.lens, subject, first_site=options.first_site)
    if options.to == "exegete" and (options.lens / "lens.json").is_file():
        raise InputError(f"{options.lens} has that form already; copy the folder")
    if any((options.out / name).exists() for name in ("lens.json", "config.json", "params.pt")):
        raise InputError(f"{options.out} holds a lens already; give a new folder")
    if options.to == "tuned-lens":
        missing = export_lens(lens, options.out)
        note = f"; identities at the sites it lacks: {', '.join(map(str, missing))}" if missing else ""
    else:
        save_lens(lens, options.out)
        note = ""
    say(f"{options.to}: {options.out}, {len(lens.sites)} translators for the sites {_range(lens.sites)}{note}")
    return 0


def _latents(options: argparse.Namespace) -> int:
    from exegete.lens.labels import label_run

    found = label_run(
        options.run,
        options.latents,
        lens=options.lens,
        site=options.site,
        k=options.top,
        out=options.out,
        device=_settings(options).collect.device,
        progress=progress_for(options.quiet),
    )
    say("\n".join(found))
    return 0


def _settings(options: argparse.Namespace, corpus: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the settings given, over those of a ``corpus``.

    The window of examples, which nothing here has, fits rows of any length.
    """
    named = given(options)
    if corpus:
        named["corpus"] = {**corpus, **named.get("corpus", {})}
    length = named.get("corpus", {}).get("row_length", CorpusConfig().row_length)
    window = max(1, min(ExampleConfig().window, length - 1))
    return RunConfig.from_dict({**named, "examples": {"window": window}})


def _require_text(settings: RunConfig) -> None:
    if not settings.corpus.text:
        raise ConfigError('no text given; name files, folders or datasets with --text, or "stdlib"')


def _subject(options: argparse.Namespace, settings: RunConfig) -> Subject:
    from exegete.subjects import load_subject

    collect = settings.collect
    return load_subject(
        options.subject,
        device=collect.device,
        dtype=collect.dtype,
        remote_code=collect.remote_code,
        device_map=collect.device_map,
    )


def _text(
    settings: RunConfig,
    subject: Subject,
    folder: Path,
    *,
    validation: float,
    test: float,
    seed: int | None = None,
    duplicates: float = 0.8,
) -> LensText:
    from exegete.lens import LensText
    from exegete.store.corpus import build_corpus
    from exegete.store.sources import text_documents

    corpus = build_corpus(
        folder,
        text_documents(settings.corpus.text, column=settings.corpus.column),
        subject.tokenizer,
        settings.corpus,
        table=subject.token_table(),
    )
    chosen = settings.seed if seed is None else seed
    return LensText(corpus, seed=chosen, validation_share=validation, test_share=test, duplicates=duplicates)


def _lenses(subject: Subject, folders: list[Path]) -> dict[str, Lens]:
    """Return the logit lens and those in folders by their kind, several of one kind by their folders as well."""
    from exegete.lens import LogitLens, load_lens

    places = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if places[number] in places[:number]:
            raise InputError(f"the lens {str(folder)!r} is given twice")
    found: dict[str, Lens] = {"logit": LogitLens(subject)}
    for folder in folders:
        lens = load_lens(folder, subject)
        found[lens.kind if lens.kind not in found else f"{lens.kind} {folder}"] = lens
    return found


def _one_lens(subject: Subject, folder: Path | None) -> Lens:
    from exegete.lens import LogitLens, load_lens

    return LogitLens(subject) if folder is None else load_lens(folder, subject)


def _split(options: argparse.Namespace, text: list[str]) -> tuple[dict[str, Any], str]:
    """Return how the text was split that lenses of this project's own were trained on, and the hash of its rows.

    Nothing where none was trained on this text. Raises MismatchError when they were trained on several splits of it,
    since what one may be measured on another has seen.
    """
    from exegete.lens.files import lens_facts

    shares = dict.fromkeys(("validation_share", "test_share", "duplicates"), (int, float))
    kinds: dict[str, type | tuple[type, ...]] = {**shares, "seed": int, "corpus": dict}
    found: dict[str, Any] = {}
    known = ""
    for folder in options.lens:
        training = lens_facts(folder).get("training") if (folder / "lens.json").is_file() else None
        if not isinstance(training, dict) or not isinstance(training.get("text"), dict):
            continue
        own = {name: value for name, value in training["text"].items() if name in (*kinds, "text")}
        if own.get("text") != text or not all(isinstance(own.get(name), kind) for name, kind in kinds.items()):
            continue
        key = training.get("key")
        rows = str(key.get("corpus")) if isinstance(key, dict) else ""
        if found and (own, rows) != (found, known):
            raise MismatchError("the lenses were trained on different parts of this text; measure each by itself")
        found, known = own, rows
    return found, known


def _prompt_text(options: argparse.Namespace) -> str:
    """Return the prompt. Raises InputError when there is none, two, or nothing but emptiness."""
    if (options.prompt is None) == (options.prompt_file is None):
        raise InputError("give the prompt with --prompt TEXT or --prompt-file FILE")
    text: str | None = options.prompt
    if text is None:
        try:
            text = options.prompt_file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"{options.prompt_file} cannot be read: {error.strerror}") from error
    if not text:
        raise InputError("the prompt is empty; give some text")
    return text


def _prompt(options: argparse.Namespace, subject: Subject, text: str) -> list[int]:
    """Return the prompt's ids, BOS first where the tokenizer has one."""
    from exegete.store.encoding import TextEncoder

    ids = TextEncoder(subject.tokenizer).encode([text])[0]
    return ids if options.no_bos or subject.bos is None else [subject.bos, *ids]


def _range(sites: tuple[int, ...]) -> str:
    whole = sites == tuple(range(sites[0], sites[-1] + 1)) and len(sites) > 2
    return f"{sites[0]} to {sites[-1]}" if whole else ", ".join(map(str, sites))
