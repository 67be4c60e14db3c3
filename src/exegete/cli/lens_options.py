"""The options of ``exegete lens``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exegete.cli.options import Parser, add_settings, integer, verbs_of

_SITES = "all, blocks, last, numbers and ranges: 3,5-8, or --sites=-1,3 with the embedding"
_MODEL = {"collect.device", "collect.dtype", "collect.device_map", "collect.remote_code"}


def add_parsers(sub: Any, parents: Sequence[argparse.ArgumentParser] = ()) -> None:
    """Add ``lens`` with its verbs to the command line's subparsers; ``parents`` hold options of every command."""
    text = "Read a model's predictions off its residual stream: logit, tuned and state-aware lenses."
    verb = verbs_of(sub, "lens", text, parents)
    _train(verb("train", "Train a tuned lens on text; goes on where it was stopped."))
    _evaluate(verb("evaluate", "Measure lenses on text: cross-entropy, KL and entropy at every site."))
    _show(verb("show", "Show how the predictions of a prompt form: tokens across, sites upwards."))
    _generate(verb("generate", "Write on from a prompt by what a lens predicts at a site."))
    _convert(verb("convert", "Convert a lens from or to a folder of the tuned-lens package."))
    _latents(verb("latents", "List the tokens that latents of a run promote and suppress."))


def _train(parser: Parser) -> None:
    _subject(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="LENS", help="folder of the lens")
    _sites(parser, "default: -1 to the last but one")
    parser.add_argument("--state", action="store_true", help="train a state-aware lens beside it (recurrent subjects)")
    parser.add_argument("--loss", choices=("kl", "ce"), default="kl", help="to the model, or on the next token")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd", help="(default: sgd, as published)")
    _number(parser, "--steps", integer, 250, "updates")
    _number(parser, "--batch-tokens", integer, 1 << 18, "predictions in one update")
    _number(parser, "--learning-rate", float, 1.0, "times the optimizer's own rate")
    _number(parser, "--momentum", float, 0.9, "of sgd; the first decay of adam")
    _number(parser, "--weight-decay", float, 1e-3, "towards the identity")
    _number(parser, "--clip", float, 1.0, "largest norm of a translator's gradient")
    parser.add_argument("--warmup", type=integer, metavar="N", help="steps (default: 0; adam: a fifth of all)")
    parser.add_argument("--no-bias", dest="bias", action="store_false", help="translators without a bias")
    _number(parser, "--rank", integer, 64, "rank of the maps of large states")
    parser.add_argument("--check-every", type=integer, metavar="N", help="steps between looks at validation text")
    _number(parser, "--validation-tokens", integer, 1 << 15, "most predictions of a look")
    parser.add_argument("--no-repeat", dest="repeat", action="store_false", help="refuse too little text")
    _number(parser, "--validation-share", float, 0.1, "share of the train documents that weights are chosen by")
    _number(parser, "--test-share", float, 0.2, "share of the documents left for evaluate")
    _number(parser, "--checkpoint-every", integer, 25, "steps between checkpoints")
    add_settings(parser, only={"seed", *_MODEL}, groups=("corpus.",))


def _evaluate(parser: Parser) -> None:
    _subject(parser)
    parser.add_argument("--lens", type=Path, nargs="+", default=[], action="extend", metavar="LENS", help="folders")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write tables and pictures here")
    _sites(parser, "default: those of all lenses")
    parser.add_argument(
        "--part",
        choices=("test", "validation", "train", "all"),
        help="documents to measure on (default: test on the text a lens was trained on, else all)",
    )
    parser.add_argument("--tokens", type=integer, metavar="N", help="predictions, up to a row more (default: all)")
    parser.add_argument("--transfer", action="store_true", help="every site's lens on every other site's stream")
    parser.add_argument(
        "--reference",
        nargs="?",
        const="all",
        choices=("all", "pythia", "mamba", "rwkv"),
        help="print the published measurements beside it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, only={"seed", *_MODEL}, groups=("corpus.",))


def _show(parser: Parser) -> None:
    _subject(parser)
    _lens(parser)
    _prompt(parser)
    _sites(parser, "default: all of the lens")
    parser.add_argument(
        "--colour",
        choices=("probability", "entropy", "kl", "ce"),
        default="probability",
        help="what cells are coloured by (default: probability)",
    )
    _number(parser, "--top", integer, 10, "likeliest tokens that a cell tells")
    parser.add_argument(
        "--out",
        type=Path,
        nargs="+",
        default=[],
        action="extend",
        metavar="FILE",
        help=".html, .svg, .png or .json (default: a table on the terminal)",
    )
    add_settings(parser, only={*_MODEL})


def _generate(parser: Parser) -> None:
    _subject(parser)
    _lens(parser)
    _prompt(parser)
    _sites(parser, "default: all of the lens")
    _number(parser, "--tokens", integer, 40, "most tokens")
    _number(parser, "--temperature", float, 0.0, "0 takes the likeliest token")
    add_settings(parser, only={"seed", *_MODEL})


def _convert(parser: Parser) -> None:
    _subject(parser)
    parser.add_argument("lens", type=Path, metavar="LENS", help="folder of the lens")
    parser.add_argument("--to", choices=("exegete", "tuned-lens"), required=True, help="form of the new folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "--first-site", type=int, metavar="N", help="site of entry 0 of a tuned-lens folder (default: -1)"
    )
    add_settings(parser, only={*_MODEL})


def _latents(parser: Parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("latents", nargs="+", metavar="CODER/INDEX", help="latents; CODER/all, or all")
    _lens(parser)
    parser.add_argument("--site", type=int, metavar="N", help="site to read at (default: the coder's own)")
    _number(parser, "--top", integer, 10, "tokens of each kind")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".csv or .json (default: print)")
    add_settings(parser, only={"collect.device"})


def _subject(parser: Parser) -> None:
    parser.add_argument("subject", metavar="MODEL", help="folder or hub id of the model")


def _lens(parser: Parser) -> None:
    parser.add_argument("--lens", type=Path, metavar="LENS", help="folder of a tuned lens (default: the logit lens)")


def _prompt(parser: Parser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", help="text to read")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with that text")
    parser.add_argument("--no-bos", action="store_true", help="do not put the tokenizer's BOS token first")


def _sites(parser: Parser, default: str) -> None:
    parser.add_argument("--sites", metavar="SITES", help=f"{_SITES} ({default})")


def _number(parser: Parser, flag: str, kind: Any, default: float, text: str) -> None:
    mark = "N" if kind is integer else "X"
    parser.add_argument(flag, type=kind, default=default, metavar=mark, help=f"{text} (default: {default})")
