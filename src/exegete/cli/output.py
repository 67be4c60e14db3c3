"""Where the command line's results go."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Write a line to stdout at once, also where it is a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
