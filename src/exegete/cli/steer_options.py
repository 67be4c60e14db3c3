"""The options of ``exegete steer``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from exegete.cli.options import Parser, add_model_options, integer, verbs_of

MODES: Final[tuple[Literal["residual", "state", "both"], ...]] = ("residual", "state", "both")
_METHODS = ("mean", "lda", "logistic", "pca-diff", "pca-center")
_OPERATORS = ("add", "project-out", "reflect", "clamp")
_POSITIONS = "onward, last, last:K, prompt, from:I, every:K, generated or all"


def add_parsers(sub: Any, parents: Sequence[argparse.ArgumentParser] = ()) -> None:
    """Add ``steer`` with its verbs to the command line's subparsers; ``parents`` hold options of every command."""
    text = "Steer a model: make vectors, apply them, sweep over them with controls, and see what they are made of."
    verb = verbs_of(sub, "steer", text, parents)
    _vector(verb("vector", "Make a steering vector and write it to a file."))
    _apply(verb("apply", "Continue prompts under a vector, at one or several multipliers."))
    _sweep(verb("sweep", "Measure p(match) over sites, multipliers and modes, with controls, into tables and figures."))
    _explain(verb("explain", "Say which latents of a run's coder a vector is made of."))
    _convert(verb("convert", "Turn a vector into a GGUF control vector (repeng, llama.cpp), or one into a vector."))


def _vector(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model folder or hub id; left out with --latent")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="where to write it")
    parser.add_argument("--letters", type=Path, metavar="FILE.safetensors", help="write the letter's vector here, too")
    parser.add_argument("--pairs", metavar="FILE", help="pairs of texts: positive, negative as .jsonl, .json or .csv")
    parser.add_argument("--latent", metavar="RUN:CODER/INDEX", help="the direction of a latent of a run's coder")
    _rows(parser)
    _making(parser)
    _subject(parser, other=False)


def _apply(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("vector", metavar="VECTOR", help="a .safetensors or .gguf file, or RUN:CODER/INDEX")
    parser.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help="prompts as they are")
    parser.add_argument("--questions", metavar="FILE", help="an open-ended file; its questions go into the template")
    parser.add_argument("--template", default="plain", metavar="TEXT", help="for --questions (default: plain)")
    parser.add_argument("--multipliers", nargs="+", type=float, default=[0.0, 1.0], metavar="X", help="(default: 0 1)")
    _positions(parser, "onward")
    parser.add_argument("--max-tokens", type=integer, default=40, metavar="N", help="length (default: 40)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest (default: 0)"
    )
    parser.add_argument("--draws", type=integer, default=1, metavar="N", help="continuations of each (default: 1)")
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--mode", choices=MODES, default="both", help="part of the vector used (default: all it has)")
    parser.add_argument("--sites", metavar="TEXT", help="which of the vector's (default: all)")
    parser.add_argument("--components", nargs="+", metavar="NAME", help="which of the state (default: all)")
    _applying(parser)
    _subject(parser)


def _sweep(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--vector", metavar="VECTOR", help="a file or RUN:CODER/INDEX; else made of the rows to generate"
    )
    parser.add_argument("--letter-vector", metavar="FILE", help="control: what steer vector --letters wrote")
    parser.add_argument("--test", metavar="FILE", help="an A/B file to test on")
    parser.add_argument("--multipliers", nargs="+", type=float, metavar="X", help="(default: ±3 ±1.5 ±1 ±0.5 0)")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, metavar="MODE", help="residual, state, both (default: all)"
    )
    parser.add_argument("--per-component", action="store_true", help="each component of the state alone as well")
    _positions(parser, "last")
    parser.add_argument("--controls", type=integer, default=20, metavar="N", help="random vectors (default: 20)")
    parser.add_argument("--control-sites", choices=("chosen", "all"), default="chosen", help="(default: chosen)")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="test with other labels, such as 1 2 3 4")
    parser.add_argument(
        "--samples", type=integer, default=0, metavar="N", help="answer N open questions of --data, too"
    )
    parser.add_argument("--max-tokens", type=integer, default=40, metavar="N", help="length of answers (default: 40)")
    parser.add_argument("--png", action="store_true", help="write the figures as PNG, too")
    parser.add_argument("--reference", action="store_true", help="print the published numbers beside these")
    _rows(parser)
    _making(parser)
    _applying(parser)
    _subject(parser)


def _explain(parser: Parser) -> None:
    parser.add_argument("vector", metavar="VECTOR", help="a .safetensors or .gguf file, or RUN:CODER/INDEX")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--coder", metavar="CODER", help="which coder of the run, where it has several")
    parser.add_argument("-k", type=integer, default=16, metavar="N", help="pieces at most (default: 16)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _other_model(parser)


def _convert(parser: Parser) -> None:
    parser.add_argument("source", metavar="FROM", help="a .safetensors or .gguf file")
    parser.add_argument("target", type=Path, metavar="TO", help="a .gguf or .safetensors file")
    parser.add_argument("--sites", metavar="TEXT", help="which sites, as numbers and ranges: 1-8,12 (default: all)")
    parser.add_argument("--model", metavar="MODEL", help="the model of a .gguf file: it names none itself")
    _subject(parser, other=False)


def _rows(parser: Parser) -> None:
    parser.add_argument("--rows", metavar="FILE", help="an A/B file to make the vector of")
    parser.add_argument("--data", metavar="FOLDER", help="a folder of behaviours: generate/NAME/…, test/NAME/…")
    parser.add_argument("--behaviours", nargs="+", metavar="NAME", help="which of the folder (default: all)")
    parser.add_argument("--limit", type=integer, metavar="N", help="the first N rows or pairs only")
    parser.add_argument(
        "--balance", choices=("none", "swap", "both"), default="none", help="of letters (default: none)"
    )
    parser.add_argument("--unbalanced", action="store_true", help="allow rows that nearly all match with one letter")
    parser.add_argument(
        "--template", default="plain", metavar="TEXT", help="plain, llama-2, hermes, chat or own with {}"
    )


def _making(parser: Parser) -> None:
    parser.add_argument("--sites", metavar="TEXT", help="all, blocks, 3, 2-8, or --sites=-1,3 (default: blocks)")
    parser.add_argument("--state", nargs="*", metavar="COMPONENT", help="the recurrent state as well, or parts of it")
    parser.add_argument("--method", choices=_METHODS, default="mean", help="(default: mean)")
    parser.add_argument("--shrinkage", default="auto", metavar="X", help="of lda: auto or 0 to 1 (default: auto)")
    parser.add_argument("--penalty", type=float, default=1.0, metavar="X", help="of logistic, above 0 (default: 1)")
    parser.add_argument("--read", default="last", metavar="TEXT", help="last, answer, -1, after TEXT (default: last)")
    parser.add_argument("--normalise", choices=("none", "unit", "rms"), default="none", help="(default: none)")
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="seed of every random choice (default: 0)")


def _positions(parser: Parser, default: str) -> None:
    parser.add_argument("--positions", default=default, metavar="TEXT", help=f"{_POSITIONS} (default: {default})")


def _applying(parser: Parser) -> None:
    parser.add_argument("--operator", choices=_OPERATORS, default="add", help="(default: add)")
    parser.add_argument("--at", type=float, default=0.5, metavar="X", help="where clamp puts it (default: 0.5)")
    parser.add_argument(
        "--state-positions",
        default="last",
        metavar="TEXT",
        help="before which tokens the state is edited (default: last)",
    )


def _subject(parser: Parser, *, other: bool = True) -> None:
    add_model_options(parser)
    if other:
        _other_model(parser)


def _other_model(parser: Parser) -> None:
    parser.add_argument("--other-model", action="store_true", help="allow a vector made on another model of this size")
