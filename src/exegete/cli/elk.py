"""``exegete elk``: quirky sets, quirky models, what they hold, and what probes find in it. Reads options, prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.cli.options import add_model_options, loaded_subject, verbs_of
from exegete.cli.output import say
from exegete.errors import InputError, MismatchError

if TYPE_CHECKING:
    from exegete.elk import Anomaly, Encoded, Extraction, Intervention, Questions, Transfers
    from exegete.subjects import Subject

_WORDINGS = ("first", "random", "standardised", "all")
_FEATURES = ("last", "pair", "state", "state-pair")
_DETECTORS = ("mahalanobis", "mahalanobis-diagonal", "isolation-forest", "local-outliers", "one-class-svm")
_SITES = "all, blocks, last, numbers and ranges: 3,5-8, or with an = the embedding: =-1,3"
_ALONG = ("lr", "mean-diff")
_SPLITS = ("train", "validation", "test")


def add_parsers(sub: Any, parents: Sequence[argparse.ArgumentParser] = ()) -> None:
    """Add the command and its verbs to the command line's subparsers; ``parents`` hold options of every command."""
    text = "Elicit latent knowledge: quirky sets, quirky models, what they hold, and probes for what is true."
    verb = verbs_of(sub, "elk", text, parents)
    _data_options(verb("data", "Make a quirky set: an arithmetic one, or one of files of the published layout."))
    _finetune_options(
        verb("finetune", "Train a model to be right as Alice and wrong as Bob; goes on where it stopped.")
    )
    _extract_options(verb("extract", "Keep what a model holds behind each statement and each answer to it."))
    _probe_options(verb("probe", "Fit probes where the model is right, and test them where it is not."))


def _data_options(parser: Any) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help="addition, subtraction, multiplication, modularaddition, squaring, "
        "or with --files capitals, hemisphere, population, authors, sciq, sentiment, nli, or those",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--files", metavar="PATH", help="a file, or a folder of train, validation and test files")
    parser.add_argument("--wording", choices=_WORDINGS, default="first", help="templates (default: first)")
    parser.add_argument("--digits", type=int, metavar="N", help="of operands (default: the set's)")
    for split in _SPLITS:
        parser.add_argument(
            f"--{split}",
            type=int,
            metavar="N",
            help=f"base examples to {split} on (default: as published; fewer for squaring)",
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (default: 0)")


def _finetune_options(parser: Any) -> None:
    from exegete.elk.schedule import FinetuneConfig

    default = FinetuneConfig()
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("data", metavar="DATA", help="folder of a quirky set")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write; model is in it")
    parser.add_argument(
        "--pool", default=default.pool, metavar="POOL", help="rows to learn: all, A or B (default: all)"
    )
    parser.add_argument("--epochs", type=float, default=default.epochs, metavar="X", help="(default: 1)")
    parser.add_argument("--steps", type=int, metavar="N", help="in the place of epochs")
    parser.add_argument("--batch", type=int, default=default.batch, metavar="N", help="rows of a step (default: 32)")
    parser.add_argument("--rows-at-once", type=int, default=default.rows_at_once, metavar="N", help="(default: 32)")
    parser.add_argument(
        "--learning-rate", type=float, default=default.learning_rate, metavar="X", help="(default: 2e-5)"
    )
    parser.add_argument(
        "--warmup", type=float, default=default.warmup, metavar="X", help="share of steps (default: .15)"
    )
    parser.add_argument("--weight-decay", type=float, default=default.weight_decay, metavar="X", help="(default: 0.1)")
    parser.add_argument(
        "--lora-rank", type=int, default=default.lora_rank, metavar="N", help="0 trains all (default: 8)"
    )
    parser.add_argument("--lora-alpha", type=float, default=default.lora_alpha, metavar="X", help="(default: 8)")
    parser.add_argument(
        "--lora-targets", nargs="+", metavar="NAME", help="modules with adapters (default: the family's)"
    )
    parser.add_argument("--no-balance", action="store_true", help="keep all rows of the commoner label")
    parser.add_argument(
        "--validation-rows", type=int, default=default.validation_rows, metavar="N", help="(default: 1000)"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=default.checkpoint_every, metavar="N", help="(default: 200)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (default: 0)")
    _most_tokens(parser)
    add_model_options(parser, dtype="float32")


def _extract_options(parser: Any) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id: the model of finetune's folder")
    parser.add_argument("data", metavar="DATA", help="folder of a quirky set")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--features",
        nargs="+",
        choices=_FEATURES,
        metavar="NAME",
        help="last, pair, state, state-pair (default: last, pair, and state of a recurrent model)",
    )
    parser.add_argument("--sites", default="blocks", metavar="TEXT", help=f"{_SITES} (default: blocks)")
    parser.add_argument("--components", nargs="+", metavar="NAME", help="of the state (default: all)")
    parser.add_argument("--validation", type=int, default=4000, metavar="N", help="rows to fit on (default: 4000)")
    parser.add_argument("--test", type=int, default=1000, metavar="N", help="rows to test on (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which rows (default: 0)")
    _most_tokens(parser)
    add_model_options(parser, dtype="auto")


def _probe_options(parser: Any) -> None:
    parser.add_argument("extraction", metavar="EXTRACTION", help="folder of extract")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of tables and figures")
    parser.add_argument(
        "--probes",
        nargs="+",
        metavar="NAME",
        help="lr, lr-on-pair, mean-diff, mean-diff-on-pair, lda, "
        "lda-on-pair, lda-shrunk, ccs, ccs-mean, ccs-mean-scale, crc, vinc, random (default: most)",
    )
    parser.add_argument(
        "--transfers",
        nargs="+",
        metavar="A->B",
        help="of the pools A, B, all, each with E or H behind it for easy or hard (default: the published ones)",
    )
    parser.add_argument(
        "--detectors",
        nargs="*",
        choices=_DETECTORS,
        metavar="NAME",
        help="of anomalies: mahalanobis, mahalanobis-diagonal, isolation-forest, local-outliers, one-class-svm "
        "(default: mahalanobis)",
    )
    parser.add_argument("--reference", action="store_true", help="print the published numbers beside these")
    parser.add_argument("--intervene", metavar="SITES", help=f"reflect along lr and mean-diff there: {_SITES}")
    parser.add_argument("--model", metavar="MODEL", help="for --intervene: the model that was extracted from")
    parser.add_argument("--data", metavar="DATA", help="for --intervene: the quirky set")
    parser.add_argument("--pool", default="B", metavar="POOL", help="for --intervene: which test rows (default: B)")
    parser.add_argument(
        "--random", type=int, default=20, metavar="N", help="random directions to compare (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (default: 0)")
    add_model_options(parser, dtype="auto")


def _most_tokens(parser: Any) -> None:
    parser.add_argument(
        "--most-tokens",
        type=int,
        metavar="N",
        help="leave out rows of more tokens, answer and all (default: keep all, refuse what the model cannot read)",
    )


def run(options: argparse.Namespace) -> int:
    """Carry out the chosen verb; return the exit code."""
    verbs = {"data": _data, "finetune": _finetune, "extract": _extract, "probe": _probe}
    return verbs[options.verb](options)


def _data(options: argparse.Namespace) -> int:
    from exegete.elk import quirky_set, read_published, save_questions
    from exegete.elk.arithmetic import OPERATIONS

    sizes: dict[Any, int] = {split: vars(options)[split] for split in _SPLITS if vars(options)[split] is not None}
    if options.files is not None:
        if options.digits is not None:
            raise InputError("--digits are of sets made here; leave them out with --files")
        made = read_published(options.name, options.files, wording=options.wording, seed=options.seed, limits=sizes)
    else:
        if options.name not in OPERATIONS and options.name in _filed():
            raise InputError(f"the set {options.name} is made of files of the published layout; give them with --files")
        made = quirky_set(
            options.name,
            **sizes,
            wording=options.wording,
            digits=options.digits,
            seed=options.seed,
        )
    save_questions(made, options.out, facts={"seed": options.seed, "files": options.files, "digits": options.digits})
    for split, rows in made.splits.items():
        if rows:
            both, one = _crosstab(made, split)
            say(f"{split}: {len(rows):,} rows; of the claims {both} (Alice, Bob): {one}")
    shown = next(rows[0] for rows in made.splits.values() if rows)
    say(f"{shown.statement!r} → {shown.choices[int(shown.label)]!r}")
    say(f"set: {options.out}")
    return 0


def _filed() -> tuple[str, ...]:
    from exegete.elk import quirky_sets

    return quirky_sets()


def _crosstab(made: Questions, split: Any) -> tuple[str, str]:
    claims = {row.base: (row.alice, row.bob) for row in made.splits[split]}
    counts = [(f"{a:d}{b:d}", sum(v == (a, b) for v in claims.values())) for a in (True, False) for b in (True, False)]
    return f"{len(claims):,}", ", ".join(f"{name} {n / len(claims):.3f}" for name, n in counts)


def _finetune(options: argparse.Namespace) -> int:
    from exegete.cli.bars import progress_for
    from exegete.elk import FinetuneConfig, encode, finetune, load_questions
    from exegete.elk.adapters import lora_targets

    config = FinetuneConfig(
        pool=options.pool,
        balance=not options.no_balance,
        epochs=options.epochs,
        steps=options.steps,
        batch=options.batch,
        rows_at_once=options.rows_at_once,
        learning_rate=options.learning_rate,
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_targets=None if options.lora_targets is None else tuple(options.lora_targets),
        validation_rows=options.validation_rows,
        checkpoint_every=options.checkpoint_every,
        seed=options.seed,
    )
    questions = load_questions(options.data)
    subject = loaded_subject(options, options.model)
    if config.lora_rank:  # before all rows are encoded, which takes longer
        lora_targets(subject.model, config.lora_targets)
    found = finetune(
        subject,
        encode(questions, "train", subject, most_tokens=options.most_tokens),
        encode(questions, "validation", subject, most_tokens=options.most_tokens),
        out=options.out,
        config=config,
        in_place=True,
        progress=progress_for(options.quiet),
    )
    first, best = found.history[0][1], min(loss for _, loss in found.history)
    say(f"loss on the validation rows: {first:.4f} → {best:.4f} nats, best after {found.best_step} steps")
    say(f"model: {options.out / 'model'}")
    return 0


def _extract(options: argparse.Namespace) -> int:
    from exegete.cli.bars import progress_for
    from exegete.elk import encode, extract_to, load_questions
    from exegete.elk.encoding import require_room
    from exegete.elk.stored_extraction import has_split
    from exegete.subjects.sites import parse_sites

    questions = load_questions(options.data)
    subject = loaded_subject(options, options.model)
    sites = parse_sites(options.sites, subject)
    key = {
        "subject": subject.hash,
        "model": subject.name,
        "data": questions.hash,
        "features": options.features,
        "sites": list(sites),
        "components": options.components,
        "dtype": str(subject.dtype),
    }
    work: list[tuple[str, Encoded]] = []
    for split, rows in (("validation", options.validation), ("test", options.test)):
        data = encode(questions, _split(split), subject, most_tokens=options.most_tokens).first(rows, options.seed)
        if not len(data):
            raise InputError(f"there are no {split} rows to extract; the set has none, or --{split} {rows} is too few")
        if has_split(options.out, split, key=key, data=data.hash):
            say(f"{split}: already there")
        else:
            require_room(subject, data, answers=True)
            work.append((split, data))
    for split, data in work:
        found = extract_to(
            subject,
            data,
            options.out,
            split,
            key=key,
            features=options.features,
            sites=sites,
            components=options.components,
            progress=progress_for(options.quiet),
        )
        parts = [f"{kind} at {len(at)} sites" for kind, at in found.features.items()]
        say(f"{split}: {len(found):,} rows; {', '.join(parts)}")
        say(_own(found))
    say(f"extraction: {options.out}")
    return 0


def _split(name: str) -> Any:
    return name


def _own(found: Extraction) -> str:
    """Say how well the model has learned to be quirky: its AUROC against each character's own labels."""
    from exegete.elk.intervals import clustered_auroc
    from exegete.elk.tables import bracket

    facts, told = found.facts, []
    for pool, name in (("A", "Alice"), ("B", "Bob")):
        rows = facts.pool(pool)
        own = clustered_auroc(facts.label[rows], found.log_odds[rows], facts.places[rows])
        told.append(f"{name} {bracket(own)}")
    return f"  AUROC of the model's answers against what each character says (chance is 0.500): {', '.join(told)}"


def _probe(options: argparse.Namespace) -> int:
    from exegete.cli.bars import progress_for
    from exegete.elk import load_extraction, recovered, reference_lines, run_transfers, write_probes
    from exegete.elk.named_probes import DEFAULT
    from exegete.elk.stored_extraction import extraction_facts
    from exegete.elk.tables import intervention_lines, summary_lines
    from exegete.elk.transfers import TRANSFERS

    if options.intervene is not None and (options.model is None or options.data is None):
        raise InputError("--intervene runs the model on the set; name them with --model and --data")
    if options.intervene is None and (options.model is not None or options.data is not None):
        raise InputError("--model and --data are for --intervene; name the sites with it, or leave both out")
    fitted, tested = (load_extraction(options.extraction, split) for split in ("validation", "test"))
    planned = _planned(options, fitted, tested) if options.intervene is not None else None
    found = run_transfers(
        fitted,
        tested,
        probes=options.probes or DEFAULT,
        transfers=options.transfers or TRANSFERS,
        seed=options.seed,
        progress=progress_for(options.quiet),
    )
    shares = recovered(found, tested, seed=options.seed)
    odd, left = _unusual(options, found, tested)
    moved = _intervened(options, found, fitted, *planned) if planned is not None else []
    if planned is not None and not moved:
        left.append("left out: interventions: neither lr nor mean-diff could be fitted on Alice's rows")
    facts = {"extraction": extraction_facts(options.extraction), "seed": options.seed}
    files = write_probes(found, options.out, shares=shares, anomalies=odd, interventions=moved, facts=facts)
    say("\n".join([*summary_lines(found, shares=shares, anomalies=odd), *left]))
    if moved:
        say("\n".join(intervention_lines(moved)))
    if options.reference:
        say("\n".join(["", *reference_lines(shares, odd)]))
    say(f"{len(files)} files: {options.out}")
    return 0


def _unusual(
    options: argparse.Namespace, found: Transfers, tested: Extraction
) -> tuple[tuple[Anomaly, ...], list[str]]:
    """Return the anomalies, and why there are none where nobody asked for them and they cannot be had."""
    from exegete.elk import anomalies

    asked = options.detectors is not None
    detectors: Any = options.detectors if asked else ["mahalanobis"]
    if not detectors or not any(source == "AE" for _, _, source, _ in found.probes):
        return (), []
    try:
        return anomalies(found, tested, detectors=detectors, seed=options.seed), []
    except InputError as error:
        if asked:
            raise
        return (), [f"left out: anomalies: {error}"]


def _planned(
    options: argparse.Namespace, fitted: Extraction, tested: Extraction
) -> tuple[Subject, Encoded, tuple[int, ...]]:
    """Return the model, the test rows and the sites of interventions, all checked before any probe is fitted."""
    from exegete.elk import encode, load_questions
    from exegete.elk.named_probes import DEFAULT
    from exegete.elk.transfers import TRANSFERS, parse_transfer
    from exegete.subjects.sites import parse_sites

    sources = {parse_transfer(text)[0] for text in options.transfers or TRANSFERS}
    if not (set(_ALONG) & set(options.probes or DEFAULT) and {"A", "AE"} & sources):
        raise InputError(
            "--intervene reflects along lr and mean-diff of A or AE; name one of them in --probes and in --transfers"
        )
    if options.random < 0:
        raise InputError(f"--random is 0 or more, got {options.random}")
    subject = loaded_subject(options, options.model)
    if subject.hash != fitted.subject:
        raise MismatchError(f"{options.model} is not the model that {options.extraction} was extracted from")
    sites = parse_sites(options.intervene, subject)
    missing = [site for site in sites if any(site not in part.features.get("last", {}) for part in (fitted, tested))]
    if missing:
        raise InputError(f"--intervene: last was not extracted at site {missing[0]}; extract it there too")
    data: Encoded = encode(load_questions(options.data), "test", subject)
    places = {name: i for i, name in enumerate(data.facts.id.tolist())}
    absent = [name for name in tested.facts.id.tolist() if name not in places]
    if absent:
        raise MismatchError(f"{options.data} has no row {absent[0]}; it is not the set that was extracted from")
    data = data.take(_indices([places[name] for name in tested.facts.id.tolist()]))
    if data.hash != tested.data:
        raise MismatchError(f"{options.data} has other words for the same claims; it is not the set extracted from")
    if not data.facts.pool(options.pool).any():
        raise InputError(f"--pool {options.pool} has no test rows to intervene on")
    return subject, data, sites


def _intervened(
    options: argparse.Namespace,
    found: Transfers,
    fitted: Extraction,
    subject: Subject,
    data: Encoded,
    sites: Sequence[int],
) -> list[Intervention]:
    """Reflect the test rows along the directions of the probes that were fitted on Alice's rows."""
    from exegete.elk import intervene

    moved = []
    for site in sites:
        for probe in _ALONG:
            source = next((s for s in ("A", "AE") if ("last", probe, s, site) in found.probes), None)
            if source is not None:
                centre = fitted.features["last"][site][fitted.facts.pool(source)].mean(axis=0)
                moved.append(
                    intervene(
                        subject,
                        data,
                        found.probes["last", probe, source, site].direction,
                        centre,
                        site,
                        probe=probe,
                        source=source,
                        pool=options.pool,
                        random=options.random,
                        seed=options.seed,
                    )
                )
    return moved


def _indices(places: list[int]) -> Any:
    import numpy as np

    return np.array(places, np.int64)
