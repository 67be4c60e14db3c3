"""``exegete steer``: vectors made, applied, swept, explained, converted. Reads options, calls the library, prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exegete.cli.options import loaded_subject
from exegete.cli.output import say
from exegete.cli.steer_options import MODES
from exegete.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exegete.steering.behaviour_files import Behaviour
    from exegete.steering.latents import Composition, Piece
    from exegete.steering.making import Made, VectorOptions
    from exegete.steering.open_ended import OpenAnswer
    from exegete.steering.operators import Operator
    from exegete.steering.pairs import Pair
    from exegete.steering.sweeping import Mode, Sweep
    from exegete.steering.vector import SteeringVector
    from exegete.subjects import Subject


def run(options: argparse.Namespace) -> int:
    """Carry out the chosen verb; return the exit code."""
    _check(options)
    return {
        "vector": _vector,
        "apply": _apply,
        "sweep": _sweep,
        "explain": _explain,
        "convert": _convert,
    }[options.verb](options)


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be told from the options alone, before a model is loaded."""
    from exegete.steering.estimate import check_options
    from exegete.steering.places import places
    from exegete.steering.png import require_png
    from exegete.steering.templates import template_of

    given = {name: value for name, value in vars(options).items() if value is not None}
    least = {"limit": 1, "samples": 0, "controls": 0, "k": 1, "max_tokens": 1, "draws": 1, "seed": 0}
    for name, smallest in least.items():
        if name in given and given[name] < smallest:
            flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is at least {smallest}, got {given[name]}")
    for name in ("multipliers", "at", "temperature", "penalty"):
        values = given.get(name, [])
        if not all(math.isfinite(x) for x in (values if isinstance(values, list) else [values])):
            raise InputError(f"--{name} takes finite numbers")
    for name in ("positions", "state_positions"):
        if name in given:
            places(given[name])
    if "template" in given:
        template_of(given["template"])
    if "penalty" in given:
        check_options(shrinkage=_shrinkage(given["shrinkage"]), penalty=given["penalty"])
    if given.get("png"):
        require_png()


def _vector(options: argparse.Namespace) -> int:
    from exegete.steering.pairs import load_pairs
    from exegete.steering.stored import save_vector, vector_file

    if sum(x is not None for x in (options.pairs, options.latent, options.rows, options.data)) != 1:
        raise InputError("a vector is made of one of --rows, --data with --behaviours, --pairs, --latent")
    if options.letters is not None and (options.pairs is not None or options.latent is not None):
        raise InputError("only rows with labelled options have a vector of the letter; leave out --letters")
    for file in filter(None, (options.out, options.letters)):
        vector_file(file).parent.mkdir(parents=True, exist_ok=True)
    letters = None
    if options.latent is not None:
        vector = _of_latent(options)
    elif options.model is None:
        raise InputError("name the MODEL to make the vector on")
    elif options.pairs is not None:
        pairs = load_pairs(options.pairs)[: options.limit]
        vector = _of_pairs(loaded_subject(options, options.model), pairs, options)
    else:
        (behaviour,) = _behaviours(options, test=False, most=1)
        made = _of_rows(loaded_subject(options, options.model), behaviour, options)
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
    asked = () if options.questions is None else load_questions(options.questions)
    subject = loaded_subject(options, options.model)
    vector = _load(options.vector, subject, options)
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
            multiplier = f"{sample.multiplier:+g}" if sample.multiplier else "0"
            say(f"{multiplier}  {texts[sample.prompt][-60:]!r} → {sample.text!r}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from exegete.cli.bars import progress_for
    from exegete.steering.behaviour_files import relabelled
    from exegete.steering.reference import reference_lines
    from exegete.steering.sweeping import MULTIPLIERS, sweep
    from exegete.steering.tables import summary_lines, write_sweep
    from exegete.subjects.sites import parse_sites

    if options.vector is not None and (options.state is not None or options.rows is not None):
        raise InputError(
            "--vector is swept as it is; leave out --rows and --state, and choose parts of it with --modes"
        )
    sets = _behaviours(options, test=True, most=None)
    if options.samples and not any(behaviour.open_ended for behaviour in sets):
        raise InputError("there are no open questions for --samples; they are in a folder of behaviours, --data FOLDER")
    subject = loaded_subject(options, options.model)
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
        options.out.mkdir(parents=True, exist_ok=True)
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
    files = write_sweep(found, options.out, facts=facts, samples=samples, png=options.png)
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
        if vector.state.parts and vector.residual:
            say("the state part is left out: a control vector has no place for it")
            vector = vector.only(mode="residual")
        export_control_vector(vector, options.target)
        if 0 in vector.sites:
            say("llama.cpp reads no direction.0; for it, leave site 0 out with --sites")
    elif endings == (".gguf", ".safetensors"):
        if options.model is None:
            raise InputError("a .gguf file does not say which model it is for; name it with --model")
        vector = import_control_vector(options.source, loaded_subject(options, options.model))
        vector = vector if options.sites is None else vector.only(sites=_numbers(options.sites))
        save_vector(vector, options.target)
    else:
        raise InputError(f"vectors are turned from .safetensors to .gguf or back, got {endings[0]} to {endings[1]}")
    say(_described(vector))
    say(f"vector: {options.target}")
    return 0


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
        files = {"--rows": options.rows, "--test": options.test if test else None}
        if also := [flag for flag, file in files.items() if file is not None]:
            raise InputError(f"--data brings rows and questions; leave out {' and '.join(also)}, or --data")
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
    from exegete.steering.behaviour_files import balanced
    from exegete.steering.making import behaviour_vector

    rows = balanced(behaviour.generate[: options.limit], options.balance, seed=options.seed)
    how = _making(subject, options, _source(behaviour.name, options))
    return behaviour_vector(subject, rows, template=options.template, unbalanced=options.unbalanced, **how)


def _of_pairs(subject: Subject, pairs: Sequence[Pair], options: argparse.Namespace) -> SteeringVector:
    from exegete.steering.making import pair_vector

    return pair_vector(subject, pairs, **_making(subject, options, _source(Path(options.pairs).name, options)))


def _of_latent(options: argparse.Namespace) -> SteeringVector:
    from exegete.steering.latents import run_latent_vector

    if options.model is not None:
        raise InputError("a run knows its model; leave out MODEL with --latent")
    if options.sites is not None or options.state is not None:
        raise InputError(
            "a latent's direction is at its coder's site alone; leave out --sites and --state with --latent"
        )
    return run_latent_vector(options.latent, normalise=options.normalise)[0]


def _source(name: str, options: argparse.Namespace) -> str:
    """Return what rows or pairs a vector is made of, so that the file says how to make it again."""
    parts = [name]
    if options.limit is not None:
        parts.append(f"the first {options.limit}")
    if options.balance != "none":
        parts.append(f"letters balanced by {options.balance}, seed {options.seed}")
    return ", ".join(parts)


def _making(subject: Subject, options: argparse.Namespace, source: str) -> VectorOptions:
    from exegete.cli.bars import progress_for
    from exegete.subjects.sites import parse_sites

    return {
        "sites": None if options.sites is None else parse_sites(options.sites, subject),
        "state": options.state is not None and (options.state or True),
        "method": options.method,
        "shrinkage": _shrinkage(options.shrinkage),
        "penalty": options.penalty,
        "read": options.read,
        "normalise": options.normalise,
        "source": source,
        "progress": progress_for(options.quiet),
    }


def _shrinkage(text: str) -> float | Literal["auto"]:
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise InputError(f"--shrinkage is auto or a number from 0 to 1, got {text!r}") from None


def _swept(vector: SteeringVector, operator: Operator) -> tuple[Mode, ...]:
    """Return the modes that a vector has parts for."""
    residual, state = bool(vector.residual), bool(vector.state.parts) and operator == "add"
    return tuple(m for m, have in zip(MODES, (residual, state, residual and state), strict=True) if have)


def _samples(
    subject: Subject, vector: SteeringVector, behaviour: Behaviour, options: argparse.Namespace, found: Sweep
) -> tuple[OpenAnswer, ...]:
    """Return answers to the first open questions, by every choice: at the ends of --multipliers (else ±1) and at 0."""
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
    pairs = f"{told.n_pairs} pair{'s' if told.n_pairs > 1 else ''}" if told.n_pairs else told.source
    made = f"{told.method} of {pairs}" if pairs else told.method
    return f"{made} on {told.model}: {sites} of {told.d} dimensions{state}, hash {vector.hash}"


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
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InputError(f"sites are numbers from 0 and ranges, such as 1-8,12; got {text!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))
