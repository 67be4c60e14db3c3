"""The parser: one option per field of the configuration, its help text taken from the field's docstring."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, final

from exegete import config as settings
from exegete.config import RunConfig

if TYPE_CHECKING:
    from exegete.subjects import Subject

_FLAGS = {
    "latents.count": "latents",
    "latents.null_count": "null-latents",
    "latents.indices": "latent-indices",
    "llm.timeout": "llm-timeout",
    "llm.retries": "llm-retries",
    "llm.tokenizer": "llm-tokenizer",
    "llm.batch": "llm-batch",
    "llm.cache_days": "reply-cache-days",
    "llm.cache_bytes": "reply-cache-bytes",
}
_ALSO = {"nulls": ("--null",)}  # other spellings
_HIDDEN = {"subject", "coder"}  # positionals of ``run`` and ``collect``

_EPILOG = """\
The embedded default needs no network, GPU or key:  exegete demo
Your own model and coders:                          exegete run MODEL CODER --text 'data/*.jsonl' --out runs/a
"""


@final
class Parser(argparse.ArgumentParser):
    """Argparse that refuses bad options with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line naming the command and what is wrong."""
        self.exit(2, f"exegete: {message}; see: {self.prog} --help\n")


def fields() -> Iterator[tuple[str, str, Any, str]]:
    """Yield ``(setting, flag, type, help)`` of every setting, groups flattened."""
    for group, kind in _groups():
        texts = _docstrings(kind.__name__)
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[item.name]):
                continue
            name = f"{group}{item.name}"
            yield name, _FLAGS.get(name, item.name.replace("_", "-")), hints[item.name], texts[item.name]


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line named, nested as in the configuration."""
    nested: dict[str, Any] = {}
    for name, _, _, _ in fields():
        key = name.replace(".", "__")
        if key in options:
            group, _, field = name.rpartition(".")
            target = nested.setdefault(group, {}) if group else nested
            value = getattr(options, key)
            target[field] = list(value) if isinstance(value, list | tuple) else value
    return nested


def build_parser() -> Parser:
    """Return the parser of every command."""
    common = Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="count", default=0, help="say more (-vv for everything)")
    common.add_argument("-q", "--quiet", action="count", default=0, help="say less; no progress bars")
    parser = Parser(
        prog="exegete",
        description="Explain the latents of language models automatically, and measure how good each explanation is.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"exegete {version('exegete')}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str) -> Parser:
        made = commands.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(command=name)
        return made

    demo = command("demo", "Run the whole pipeline on the embedded default: no network, GPU or key.")
    demo.add_argument("--recurrent", action="store_true", help="the small Mamba instead of the transformer")
    demo.add_argument("--out", type=Path, help="run folder (default: runs/demo, or runs/demo-recurrent)")
    add_settings(
        demo,
        only={
            "latents.count",
            "latents.null_count",
            "corpus.max_tokens",
            "seed",
            "llm.llm",
            "explainer",
            "scorers",
            "collect.threads",
        },
        groups=("scoring.",),
    )

    run = command("run", "Collect, select, explain, score and report; continues what was begun.")
    run.add_argument(
        "what",
        nargs="+",
        metavar="CONFIG.yaml | MODEL CODER",
        help="a configuration file, or a model and one or more coders: a folder or hub id with an optional :SUB, "
        "saelens:RELEASE:ID, or made for the model at --hookpoints: neurons[:k=N], pca:components=N, directions:FILE, "
        "random:ARCHITECTURE,width=N; NAME= before one names it",
    )
    run.add_argument("--out", type=Path, required=True, help="run folder")
    add_settings(run)

    collect = command("collect", "Collect the firings of coders over a corpus into a run folder.")
    collect.add_argument("what", nargs="+", metavar="CONFIG.yaml | MODEL CODER", help="as for run")
    collect.add_argument("--out", type=Path, required=True, help="run folder")
    add_settings(collect)

    explain = command("explain", "Explain the latents of a collected run.")
    explain.add_argument("run", type=Path, metavar="RUN", help="run folder")
    add_settings(explain, groups=("examples.", "latents.", "llm."), only={"explainer", "seed"})

    score = command("score", "Score the explanations of a run.")
    score.add_argument("run", type=Path, metavar="RUN", help="run folder")
    add_settings(score, groups=("scoring.", "llm."), only={"scorers", "donors", "explainer"})

    report = command("report", "Write a run's report and print its table.")
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")

    certify = command("certify", "List the latents whose score is certified, at a false-discovery rate.")
    certify.add_argument("run", type=Path, metavar="RUN", help="run folder")
    certify.add_argument("coders", nargs="*", metavar="CODER", help="only these coders")
    certify.add_argument("--scorer", default="detection", help="whose balanced accuracy (default: detection)")
    certify.add_argument("--level", type=float, default=0.7, metavar="X", help="to be above this (default: 0.7)")
    certify.add_argument("--rate", type=float, default=0.05, metavar="X", help="false-discovery rate (default: 0.05)")
    certify.add_argument(
        "--correction",
        choices=("e-bh", "by", "bh"),
        default="e-bh",
        help="e-bh and by hold whatever latents share, bh where they share nothing (default: e-bh)",
    )
    certify.add_argument("--worst", action="store_true", help="count what failed as wrong")
    certify.add_argument("--json", action="store_true", help="print JSON")

    validate = command("validate", "Run scorers over latents of known truth: bias, coverage, order, power, sanity.")
    validate.add_argument("--scorers", nargs="+", default=["all"], metavar="TEXT", help="which (default: all)")
    validate.add_argument("--latents", type=int, default=32, metavar="N", help="latents planted (default: 32)")
    validate.add_argument("--n", type=int, default=100, metavar="N", help="windows judged of each class (default: 100)")
    validate.add_argument("--rounds", type=int, default=4, metavar="N", help="draws of windows (default: 4)")
    validate.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (default: 0)")
    validate.add_argument("--page", type=Path, metavar="FILE", help="write the page of the documentation here, too")

    inspect = command(
        "inspect", "Say what a coder is, or the coders of a repository, without loading weights; or what a subject is."
    )
    inspect.add_argument(
        "what",
        metavar="CODER | MODEL",
        help="PATH[:SUB], a hub id ORG/NAME[:SUB], or saelens:RELEASE:ID; with --subject a model folder or hub id",
    )
    inspect.add_argument(
        "--subject",
        action="store_true",
        help="load a model and say where it can be read, what it carries from token to token, and how exactly it runs",
    )
    model = {"collect.device", "collect.dtype", "collect.device_map", "collect.remote_code"}
    add_settings(inspect, only={"hookpoints", *model})
    inspect.add_argument("--json", action="store_true", help="print JSON")

    store = command("store", "Work on the firings of a collected run.")
    verbs = store.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True, parser_class=Parser)
    compact = verbs.add_parser(
        "compact",
        help="rewrite stores so that each latent is one piece of one file",
        description="Rewrite complete stores so that each latent is one piece of one file; the firings do not change.",
        parents=[common],
    )
    compact.add_argument("run", type=Path, metavar="RUN", help="run folder")
    compact.add_argument("coders", nargs="*", metavar="CODER", help="only the stores of these coders")

    plan = command("plan", "Say what a run will ask of its language model and what that costs; nothing is run or sent.")
    plan.add_argument("what", nargs="+", metavar="RUN | CONFIG.yaml | MODEL CODER", help="a run folder, or as for run")
    add_settings(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")

    export = command("export", "Write a run in a form that other tools read.")
    export.add_argument("run", type=Path, metavar="RUN", help="run folder")
    export.add_argument(
        "--to",
        choices=("delphi", "openai"),
        required=True,
        help="delphi: the folders of EleutherAI's delphi; openai: simulations as OpenAI's neuron explainer keeps them",
    )
    export.add_argument("--out", type=Path, required=True, help="new folder to write")
    export.add_argument("--coders", nargs="+", action="extend", metavar="CODER", help="only these coders")

    records = command("records", "Say how good the explanations in simulation files of OpenAI's form are.")
    records.add_argument("files", type=Path, nargs="+", metavar="FILE", help="LAYER/NEURON.jsonl")
    records.add_argument("--json", action="store_true", help="print JSON")

    llm = command("llm", "Ask a language model's server what it can do: logprobs, prompt logprobs, JSON schemas.")
    llm.add_argument("model", metavar="LLM", help="URL#MODEL, openai/MODEL, openrouter/ORG/MODEL, hf/MODEL, vllm/MODEL")
    add_settings(llm, only={"llm.timeout", "llm.prices"})
    llm.add_argument("--json", action="store_true", help="print JSON")

    status = command("status", "Say what of a run is done, failed and skipped.")
    status.add_argument("run", type=Path, metavar="RUN", help="run folder")
    status.add_argument("--json", action="store_true", help="print JSON")

    from exegete.cli import elk, lens_options, steer_options

    for second in (steer_options, lens_options, elk):
        second.add_parsers(commands, [common])
    return parser


def verbs_of(
    commands: Any, name: str, text: str, parents: Sequence[argparse.ArgumentParser]
) -> Callable[[str, str], Parser]:
    """Add a command that has verbs; return what adds one: its name and what it does.

    ``parents`` hold options of every command.
    """
    group = commands.add_parser(name, help=text, description=text)
    group.set_defaults(command=name)
    verbs = group.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True, parser_class=Parser)

    def verb(name: str, about: str) -> Parser:
        made: Parser = verbs.add_parser(name, help=about, description=about, parents=list(parents))
        return made

    return verb


def add_model_options(parser: argparse.ArgumentParser, *, dtype: str = "auto") -> None:
    """Add how a model is loaded to a command that is about no run."""
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument("--dtype", default=dtype, metavar="TEXT", help=f"of the model (default: {dtype})")
    parser.add_argument("--remote-code", action="store_true", help="let the model run its own Python code")


def loaded_subject(options: argparse.Namespace, model: str) -> Subject:
    """Return a model loaded as ``add_model_options`` has it said."""
    from exegete.subjects import load_subject

    return load_subject(model, device=options.device, dtype=options.dtype, remote_code=options.remote_code)


def add_settings(
    parser: argparse.ArgumentParser, *, groups: tuple[str, ...] = ("",), only: set[str] | None = None
) -> None:
    """Add options for settings of the configuration to a command: those named, and those of some groups."""
    chosen = groups if only is None else tuple(g for g in groups if g)
    for name, flag, hint, text in fields():
        wanted = (only is not None and name in only) or any(name.startswith(g) for g in chosen)
        if wanted and name not in _HIDDEN:
            options = _argument(hint)
            shown = _default(name)
            note = "" if shown in (None, "", ()) else f" (default: {_show(shown)})"
            parser.add_argument(
                f"--{flag}",
                *_ALSO.get(name, ()),
                dest=name.replace(".", "__"),
                default=argparse.SUPPRESS,
                help=(text + note).replace("%", "%%"),
                **options,
            )


def _argument(hint: Any) -> dict[str, Any]:
    """Return argparse's keywords for a type of setting."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        found = _argument(next(a for a in typing.get_args(hint) if a is not type(None)))
        return {**found, "type": _or_none(found["type"])} if "type" in found else found
    if origin is Literal:
        return {"choices": typing.get_args(hint)}
    if origin is tuple:
        # Given twice, an option adds to the list: --text a --text b is --text a b.
        found = _argument(typing.get_args(hint)[0])
        if "choices" in found:
            found = {"choices": (*found["choices"], *settings.WHOLE), "metavar": "NAME"}
        return {**found, "nargs": "+", "action": "extend"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    names = {int: "N", float: "X", str: "TEXT"}
    return {"type": integer if hint is int else hint, "metavar": names[hint]}


def integer(text: str) -> int:
    """Read 500000, 500_000 or 500k / 2M."""
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    body = text[:-1] if scale > 1 else text
    try:
        return int(float(body) * scale) if scale > 1 else int(body)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number (say 500000 or 500k), got {text!r}") from None


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader of values that takes ``none`` for no value: what an earlier command set is taken back by it."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")  # argparse names it in its message
    return read


def _groups() -> list[tuple[str, type[Any]]]:
    hints = typing.get_type_hints(RunConfig)
    inner = [
        (f"{f.name}.", hints[f.name]) for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(hints[f.name])
    ]
    return [("", RunConfig), *inner]


def _default(name: str) -> Any:
    value: Any = RunConfig()
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@cache
def _sources() -> dict[str, dict[str, str]]:
    """Read the docstrings under the fields of every configuration class."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(settings)).body:
        if isinstance(node, ast.ClassDef):
            texts = found.setdefault(node.name, {})
            for before, after in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(before, ast.AnnAssign)
                    and isinstance(before.target, ast.Name)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                    and isinstance(after.value.value, str)
                ):
                    texts[before.target.id] = " ".join(after.value.value.split())
    return found


def _docstrings(name: str) -> dict[str, str]:
    return _sources()[name]
