"""``exegete steer``: vectors made, applied, swept, explained, converted. Reads options, calls the library, prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.cli.output import say
from exegete.errors import InputError

if TYPE_CHECKING:
    from exegete.steering.behaviour_files import Behaviour
    from exegete.steering.latents import Composition, Piece
    from exegete.steering.making import Made
    from exegete.steering.open_ended import OpenAnswer
    from exegete.steering.sweeping import Mode, Sweep
    from exegete.steering.vector import SteeringVector
    from exegete.subjects import Subject

_METHODS = ("mean", "lda", "pca-diff", "pca-center")
_MODES: tuple[Mode, ...] = ("residual", "state", "both")
_OPERATORS = ("add", "project-out", "reflect", "clamp")


def add_parsers(sub: Any, parents: Sequence[argparse.ArgumentParser] = ()) -> None:
    """Add the command and its verbs to the command line's subparsers; ``parents`` hold options of every command."""
    text = "Steer a model: make vectors, apply them, sweep over them with controls, and see what they are made of."
    made = sub.add_parser("steer", help=text, description=text)
    made.set_defaults(command="steer")
    verbs = made.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True, parser_class=type(made))

    def verb(name: str, text: str) -> Any:
        return verbs.add_parser(name, help=text, description=text, parents=list(parents))

    vector = verb("vector", "Make a steering vector and write it to a file.")
    vector.add_argument("model", nargs="?", metavar="MODEL", help="model folder or hub id; left out with --latent")
    vector.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="where to write it")
    vector.add_argument("--letters", type=Path, metavar="FILE.safetensors", help="write the letter's vector here, too")
    vector.add_argument("--pairs", metavar="FILE", help="pairs of texts: positive, negative as .jsonl, .json or .csv")
    vector.add_argument("--latent", metavar="RUN:CODER/INDEX", help="the direction of a latent of a run's coder")
    _add_rows(vector)
    _add_making(vector)
    _add_subject(vector)

    apply = verb("apply", "Continue prompts under a vector, at one or several multipliers.")
    apply.add_argument("model", metavar="MODEL", help="model folder or hub id")
    apply.add_argument("vector", metavar="VECTOR", help="a .safetensors or .gguf file, or RUN:CODER/INDEX")
    apply.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help="prompts as they are")
    apply.add_argument("--questions", metavar="FILE", help="an open-ended file; its questions go into the template")
    apply.add_argument("--template", default="plain", metavar="TEXT", help="for --questions (default: plain)")
    apply.add_argument("--multipliers", nargs="+", type=float, default=[0.0, 1.0], metavar="X", help="(default: 0 1)")
    apply.add_argument("--positions", default="onward", metavar="TEXT", help=f"{_POSITIONS} (default: onward)")
    apply.add_argument("--max-tokens", type=int, default=40, metavar="N", help="length (default: 40)")
    apply.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest (default: 0)")
    apply.add_argument("--draws", type=int, default=1, metavar="N", help="continuations of each (default: 1)")
    apply.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    apply.add_argument("--json", action="store_true", help="print JSON lines")
    apply.add_argument("--mode", choices=_MODES, default="both", help="part of the vector used (default: all it has)")
    apply.add_argument("--sites", metavar="TEXT", help="which of the vector's (default: all)")
    apply.add_argument("--components", nargs="+", metavar="NAME", help="which of the state (default: all)")
    _add_applying(apply)
    _add_subject(apply)

    sweep = verb("sweep", "Measure p(match) over sites, multipliers and modes, with controls, into tables and figures.")
    sweep.add_argument("model", metavar="MODEL", help="model folder or hub id")
    sweep.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    sweep.add_argument(
        "--vector", metavar="VECTOR", help="a file or RUN:CODER/INDEX; else made of the rows to generate"
    )
    sweep.add_argument("--letter-vector", metavar="FILE", help="control: what steer vector --letters wrote")
    sweep.add_argument("--test", metavar="FILE", help="an A/B file to test on")
    sweep.add_argument("--multipliers", nargs="+", type=float, metavar="X", help="(default: ±3 ±1.5 ±1 ±0.5 0)")
    sweep.add_argument(
        "--modes", nargs="+", choices=_MODES, metavar="MODE", help="residual, state, both (default: all)"
    )
    sweep.add_argument("--per-component", action="store_true", help="each component of the state alone as well")
    sweep.add_argument("--positions", default="last", metavar="TEXT", help=f"{_POSITIONS} (default: last)")
    sweep.add_argument("--controls", type=int, default=20, metavar="N", help="random vectors (default: 20)")
    sweep.add_argument("--control-sites", choices=("chosen", "all"), default="chosen", help="(default: chosen)")
    sweep.add_argument("--labels", nargs="+", metavar="LABEL", help="test with other labels, such as 1 2 3 4")
    sweep.add_argument("--samples", type=int, default=0, metavar="N", help="answer this many open questions, too")
    sweep.add_argument("--max-tokens", type=int, default=40, metavar="N", help="length of answers (default: 40)")
    sweep.add_argument("--reference", action="store_true", help="print the published numbers beside these")
    _add_rows(sweep)
    _add_making(sweep)
    _add_applying(sweep)
    _add_subject(sweep)

    explain = verb("explain", "Say which latents of a run's coder a vector is made of.")
    explain.add_argument("vector", metavar="VECTOR", help="a .safetensors or .gguf file")
    explain.add_argument("run", metavar="RUN", help="run folder")
    explain.add_argument("--coder", metavar="CODER", help="which coder of the run, where it has several")
    explain.add_argument("-k", type=int, default=16, metavar="N", help="pieces at most (default: 16)")
    explain.add_argument("--json", action="store_true", help="print JSON")

    convert = verb("convert", "Turn a vector into a GGUF control vector (repeng, llama.cpp), or one into a vector.")
    convert.add_argument("source", metavar="FROM", help="a .safetensors or .gguf file")
    convert.add_argument("target", type=Path, metavar="TO", help="a .gguf or .safetensors file")
    convert.add_argument("--sites", metavar="TEXT", help="which sites, as numbers and ranges: 1-8,12 (default: all)")
    convert.add_argument("--model", metavar="MODEL", help="the model of a .gguf file: it names none itself")
    _add_subject(convert)


_POSITIONS = "onward, last, last:K, prompt, from:I, every:K, generated or all"


def _add_rows(parser: Any) -> None:
    parser.add_argument("--rows", metavar="FILE", help="an A/B file to make the vector of")
    parser.add_argument("--data", metavar="FOLDER", help="a folder of behaviours: generate/NAME/…, test/NAME/…")
    parser.add_argument("--behaviours", nargs="+", metavar="NAME", help="which of the folder (default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows or pairs only")
    parser.add_argument(
        "--balance", choices=("none", "swap", "both"), default="none", help="of letters (default: none)"
    )
    parser.add_argument("--unbalanced", action="store_true", help="allow rows that nearly all match with one letter")
    parser.add_argument(
        "--template", default="plain", metavar="TEXT", help="plain, llama-2, hermes, chat or own with {}"
    )


def _add_making(parser: Any) -> None:
    parser.add_argument("--sites", metavar="TEXT", help="all, blocks, 3, 2-8, or --sites=-1,3 (default: blocks)")
    parser.add_argument("--state", nargs="*", metavar="COMPONENT", help="the recurrent state as well, or parts of it")
    parser.add_argument("--method", choices=_METHODS, default="mean", help="(default: mean)")
    parser.add_argument("--shrinkage", default="auto", metavar="X", help="of lda: auto or 0 to 1 (default: auto)")
    parser.add_argument("--read", default="last", metavar="TEXT", help="last, answer, -1, after TEXT (default: last)")
    parser.add_argument("--normalise", choices=("none", "unit", "rms"), default="none", help="(default: none)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (default: 0)")


def _add_applying(parser: Any) -> None:
    parser.add_argument("--operator", choices=_OPERATORS, default="add", help="(default: add)")
    parser.add_argument("--at", type=float, default=0.5, metavar="X", help="where clamp puts it (default: 0.5)")
    parser.add_argument(
        "--state-positions",
        default="last",
        metavar="TEXT",
        help="before which tokens the state is edited (default: last)",
    )


def _add_subject(parser: Any) -> None:
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument("--dtype", default="auto", metavar="TEXT", help="of the model (default: auto)")
    parser.add_argument("--remote-code", action="store_true", help="let the model run its own Python code")
    parser.add_argument("--other-model", action="store_true", help="allow a vector made on another model of this size")


def run(options: argparse.Namespace) -> int:
    """Carry out the chosen verb; return the exit code."""
    for name, least in (("limit", 1), ("samples", 0), ("controls", 0)):
        given = vars(options).get(name)
        if given is not None and given < least:
            raise InputError(f"--{name} is at least {least}, got {given}")
    return {
        "vector": _vector,
        "apply": _apply,
        "sweep": _sweep,
        "explain": _explain,
        "convert": _convert,
    }[options.verb](options)


def _vector(options: argparse.Namespace) -> int:
    from exegete.steering.latents import run_latent_vector
    from exegete.steering.stored import save_vector

    if sum(x is not None for x in (options.pairs, options.latent, options.rows, options.data)) != 1:
        raise InputError("a vector is made of one of --rows, --data with --behaviours, --pairs, --latent")
    if options.letters is not None and (options.pairs is not None or options.latent is not None):
        raise InputError("only rows with labelled options have a vector of the letter; leave out --letters")
    if options.latent is not None:
        if options.model is not None:
            raise InputError("a run knows its model; leave out MODEL with --latent")
        vector, _ = run_latent_vector(options.latent, normalise=options.normalise)
        letters = None
    else:
        if options.model is None:
            raise InputError("name the MODEL to make the vector on")
        subject = _subject(options, options.model)
        if options.pairs is not None:
            vector, letters = _of_pairs(subject, options), None
        else:
            (behaviour,) = _behaviours(options, test=False, most=1)
            made = _of_rows(subject, behaviour, options)
            vector, letters = made.vector, made.letters
    save_vector(vector, options.out)
    say(_described(vector))
    say(f"vector: {options.out}")
    if options.letters is not None and letters is not None:
        save_vector(letters, options.letters)
        say(f"letter: {options.letters}")
    return 0


def _apply(options: argparse.Namespace) -> int:
    from exegete.steering.behaviour_files import load_questions
    from exegete.steering.generating import generate
    from exegete.steering.questions import open_prompt
    from exegete.steering.templates import template_of
    from exegete.subjects.sites import parse_sites

    if not options.prompt and options.questions is None:
        raise InputError("give prompts with --prompt, or a file of open questions with --questions")
    subject = _subject(options, options.model)
    vector = _load(options.vector, subject, options)
    asked = () if options.questions is None else load_questions(options.questions)
    template = template_of(options.template)
    prompts = [*options.prompt, *(open_prompt(q, template, subject.tokenizer) for q in asked)]
    found = generate(
        subject,
        prompts,
        vector,
        options.multipliers,
        operator=options.operator,
        mode=options.mode,
        positions=options.positions,
        state_positions=options.state_positions,
        sites=None if options.sites is None else parse_sites(options.sites, subject),
        components=options.components,
        at=options.at,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        draws=options.draws,
        seed=options.seed,
    )
    texts = [*options.prompt, *asked]
    for sample in found:
        if options.json:
            say(json.dumps({"question": texts[sample.prompt], **dataclasses.asdict(sample)}))
        else:
            say(f"{sample.multiplier:+g}  {texts[sample.prompt][-60:]!r} → {sample.text!r}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from exegete.cli.bars import progress_for
    from exegete.steering.behaviour_files import relabelled
    from exegete.steering.reference import reference_lines
    from exegete.steering.sweeping import MULTIPLIERS, sweep
    from exegete.steering.tables import summary_lines, write_sweep
    from exegete.subjects.sites import parse_sites

    sets = _behaviours(options, test=True, most=None)
    subject = _subject(options, options.model)
    sites = None if options.sites is None else parse_sites(options.sites, subject)
    given = None if options.letter_vector is None else _letters(subject, options)
    found, vectors = None, []
    samples: list[OpenAnswer] = []
    for behaviour in sets:
        if options.vector is not None:
            vector, letters = _load(options.vector, subject, options), given
        else:
            made = _of_rows(subject, behaviour, options)
            vector, letters = made.vector, given or made.letters
        rows = behaviour.test if options.labels is None else relabelled(behaviour.test, options.labels)
        one = sweep(
            subject,
            vector,
            rows,
            behaviour=behaviour.name,
            template=options.template,
            sites=sites,
            multipliers=options.multipliers or MULTIPLIERS,
            modes=options.modes or _swept(vector, options.operator),
            per_component=options.per_component,
            operator=options.operator,
            positions=options.positions,
            state_positions=options.state_positions,
            at=options.at,
            letters=letters,
            controls=options.controls,
            control_sites=options.control_sites,
            seed=options.seed,
            progress=progress_for(options.quiet),
        )
        found = one if found is None else found + one
        vectors.append({"behaviour": behaviour.name, "hash": vector.hash, **vector.about.to_json()})
        samples += _samples(subject, vector, behaviour, options, one)
    assert found is not None  # there is at least one behaviour
    facts = {"model": subject.name, "model_hash": subject.hash, "vectors": vectors, "seed": options.seed}
    files = write_sweep(found, options.out, facts=facts, samples=samples)
    say("\n".join(summary_lines(found)))
    if options.reference:
        say("\n".join(["", *reference_lines(found)]))
    say(f"{len(files)} files: {options.out}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from exegete.steering.latents import compose, described, load_from_run

    loaded = load_from_run(options.run, options.coder)
    vector = _load(options.vector, loaded.subject, options)
    found = described(compose(vector, loaded.coder, loaded.subject, k=options.k), loaded)
    say(json.dumps(dataclasses.asdict(found), indent=2) if options.json else _composition(found))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from exegete.steering.control_vectors import export_control_vector, import_control_vector
    from exegete.steering.stored import load_vector, save_vector

    endings = Path(options.source).suffix, options.target.suffix
    if endings == (".safetensors", ".gguf"):
        vector = load_vector(options.source)
        if options.sites is not None:
            vector = vector.only(sites=_numbers(options.sites), mode="residual")
        export_control_vector(vector.only(mode="residual") if vector.residual else vector, options.target)
        if vector.state.parts:
            say("the state part is left out: a control vector has no place for it")
        if 0 in vector.sites:
            say("llama.cpp reads no direction.0; for it, leave site 0 out with --sites")
    elif endings == (".gguf", ".safetensors"):
        if options.model is None:
            raise InputError("a .gguf file does not say which model it is for; name it with --model")
        vector = import_control_vector(options.source, _subject(options, options.model))
        vector = vector if options.sites is None else vector.only(sites=_numbers(options.sites))
        save_vector(vector, options.target)
    else:
        raise InputError(f"vectors are turned from .safetensors to .gguf or back, got {endings[0]} to {endings[1]}")
    say(_described(vector))
    say(f"vector: {options.target}")
    return 0


def _subject(options: argparse.Namespace, model: str) -> Subject:
    from exegete.subjects import load_subject

    return load_subject(model, device=options.device, dtype=options.dtype, remote_code=options.remote_code)


def _load(spec: str, subject: Subject, options: argparse.Namespace) -> SteeringVector:
    """Return a vector from a file or a latent of a run, checked to be the subject's."""
    from exegete.steering.control_vectors import import_control_vector
    from exegete.steering.latents import run_latent_vector
    from exegete.steering.stored import fitted, load_vector

    other = bool(vars(options).get("other_model", False))
    if spec.endswith(".gguf"):
        return import_control_vector(spec, subject)
    if spec.endswith(".safetensors"):
        return load_vector(spec, subject, other_model=other)
    if ":" not in spec:
        raise InputError(f"a vector is a .safetensors or .gguf file, or a latent RUN:CODER/INDEX; got {spec!r}")
    return fitted(run_latent_vector(spec)[0], subject, other_model=other)


def _letters(subject: Subject, options: argparse.Namespace) -> SteeringVector:
    found = _load(options.letter_vector, subject, options)
    if found.about.method != "letters":
        raise InputError(
            f"{options.letter_vector} is a vector by {found.about.method}, not of the letter; --letter-vector takes "
            f"what exegete steer vector --letters writes"
        )
    return found


def _behaviours(options: argparse.Namespace, *, test: bool, most: int | None) -> list[Behaviour]:
    """Return the sets that the options name; ``test`` says whether rows to test on are wanted."""
    from exegete.steering.behaviour_files import Behaviour, behaviours, load_behaviour, load_rows

    if options.data is not None:
        names = tuple(dict.fromkeys(options.behaviours or behaviours(options.data)))
        if most is not None and len(names) != most:
            raise InputError(f"one vector is of one behaviour; name it with --behaviours: {', '.join(names)}")
        found = [load_behaviour(options.data, name) for name in names]
    else:
        if options.behaviours:
            raise InputError("--behaviours are of a folder; name it with --data")
        made = load_rows(options.rows) if options.rows is not None else ()
        tested = load_rows(options.test) if test and options.test is not None else ()
        name = Path(str(options.test if tested else options.rows)).stem
        found = [Behaviour(name=name, generate=made, test=tested, open_ended=())]
    for behaviour in found:
        if test and not behaviour.test:
            raise InputError(f"{behaviour.name}: there is nothing to test on; give --test FILE, or --data FOLDER")
        if not behaviour.generate and not (test and options.vector is not None):
            raise InputError(f"{behaviour.name}: there are no rows to make a vector of; give --rows FILE or a vector")
    return found


def _of_rows(subject: Subject, behaviour: Behaviour, options: argparse.Namespace) -> Made:
    from exegete.cli.bars import progress_for
    from exegete.steering.behaviour_files import balanced
    from exegete.steering.making import behaviour_vector

    rows = balanced(behaviour.generate[: options.limit], options.balance, seed=options.seed)
    return behaviour_vector(
        subject,
        rows,
        template=options.template,
        source=behaviour.name,
        unbalanced=options.unbalanced,
        progress=progress_for(options.quiet),
        **_making(subject, options),
    )


def _of_pairs(subject: Subject, options: argparse.Namespace) -> SteeringVector:
    from exegete.cli.bars import progress_for
    from exegete.steering.making import pair_vector
    from exegete.steering.pairs import load_pairs

    pairs = load_pairs(options.pairs)[: options.limit]
    source = Path(options.pairs).name
    return pair_vector(subject, pairs, source=source, progress=progress_for(options.quiet), **_making(subject, options))


def _making(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    from exegete.subjects.sites import parse_sites

    try:
        shrinkage = options.shrinkage if options.shrinkage == "auto" else float(options.shrinkage)
    except ValueError:
        raise InputError(f"--shrinkage is auto or a number from 0 to 1, got {options.shrinkage!r}") from None
    return {
        "sites": None if options.sites is None else parse_sites(options.sites, subject),
        "state": options.state is not None and (options.state or True),
        "method": options.method,
        "shrinkage": shrinkage,
        "read": options.read,
        "normalise": options.normalise,
    }


def _swept(vector: SteeringVector, operator: str) -> tuple[Mode, ...]:
    """Return the modes that a vector has parts for."""
    residual, state = bool(vector.residual), bool(vector.state.parts) and operator == "add"
    return tuple(m for m, have in zip(_MODES, (residual, state, residual and state), strict=True) if have)


def _samples(
    subject: Subject, vector: SteeringVector, behaviour: Behaviour, options: argparse.Namespace, found: Sweep
) -> tuple[OpenAnswer, ...]:
    """Return answers to the first open questions at the smallest multiplier, 0 and the largest, by every choice."""
    from exegete.steering.open_ended import open_answers

    given = options.multipliers or (-1.0, 1.0)
    return open_answers(
        subject,
        vector,
        behaviour.open_ended[: options.samples],
        found.choices,
        sorted({min(given), 0.0, max(given)}),
        template=options.template,
        operator=options.operator,
        state_positions=options.state_positions,
        at=options.at,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def _described(vector: SteeringVector) -> str:
    told = vector.about
    state = (
        f", state of {len(vector.state.layers)} blocks ({', '.join(vector.components)})" if vector.components else ""
    )
    sites = f"{len(vector.sites)} sites" if len(vector.sites) != 1 else f"site {vector.sites[0]}"
    pairs = f" of {told.n_pairs} pairs" if told.n_pairs else ""
    return f"{told.method}{pairs} on {told.model}: {sites} of {told.d} dimensions{state}, hash {vector.hash}"


def _composition(found: Composition) -> str:
    lines = [
        f"site {found.site}, length {found.norm:.3g}: {len(found.pieces)} latents of {found.coder} make "
        f"{found.explained:.1%} of it (as many of a random vector: {found.chance:.1%})"
    ]
    for name, pieces in (("pieces", found.pieces), ("nearest", found.nearest)):
        lines.append(f"{name}:")
        for piece in pieces:
            numbers = f"{piece.coefficient:+10.3f}  cos {piece.cosine:+.3f}  gain {piece.gain:6.1%}"
            lines.append(f"  {piece.index:>8}  {numbers}  {piece.explanation or _fires_on(piece)}")
    return "\n".join(lines)


def _fires_on(piece: Piece) -> str:
    tokens = ", ".join(map(repr, piece.tokens))
    return f"not explained; fires on {tokens}" if tokens else "not explained; never fires in the run"


def _numbers(text: str) -> tuple[int, ...]:
    """Return the sites in a text of numbers and ranges, without a model to know more words by."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"sites are numbers from 0 and ranges, such as 1-8,12; got {text!r}")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
