"""The command line: one command per stage. Nothing here computes; it reads options, calls the library, prints."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from exegete.errors import ExegeteError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a clear refusal, 130 stopped by Ctrl-C."""
    from exegete.cli.options import build_parser

    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    _configure(options)
    try:
        from exegete.cli import commands

        return commands.run(options)
    except ExegeteError as error:
        print(f"exegete: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        message = "stopped; what is done is kept, and the same command goes on from there"
        print(f"\nexegete: {message}", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be made, a file that may not be written, a full disk
        if error.filename is None:
            raise
        print(f"exegete: {error.filename}: {error.strerror}; choose another place", file=sys.stderr)  # noqa: T201
        return 2


def _configure(options: argparse.Namespace) -> None:
    level = logging.WARNING - 10 * options.verbose + 10 * options.quiet
    logging.basicConfig(level=max(level, logging.DEBUG), stream=sys.stderr, format="exegete: %(message)s")
    # The model libraries' own progress bars and notices would bury ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
