"""Every error exegete raises on purpose.

::

    ExegeteError
    ├── InputError            what was asked for cannot be done: names what was given, what is allowed, what to do
    │   ├── ConfigError       a setting, or a configuration file
    │   ├── NotFoundError     a file, folder, latent, hookpoint or name that is not there
    │   ├── MismatchError     parts that do not fit: widths, hookpoints, tokenizers, upstream keys
    │   └── MissingExtraError an optional dependency that is not installed, with the install line
    ├── CorruptError          a stored file that fails its checksum or does not parse
    ├── BusyError             another process holds the run
    └── LLMError              a language-model call that failed for good
        └── BudgetError       the next call might cost more than is left

The command line prints any of them as one line and exits with code 2; a traceback means a bug in exegete.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExegeteError(Exception):
    """Root of the tree; never raised itself."""


class InputError(ExegeteError):
    """What was asked for cannot be done."""


class ConfigError(InputError):
    """A setting or a configuration file is wrong."""


class NotFoundError(InputError):
    """Something named does not exist."""


class MismatchError(InputError):
    """Two parts do not fit together."""


class MissingExtraError(InputError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an optional part of exegete; install it with: pip install 'exegete[{extra}]'"
        )


class CorruptError(ExegeteError):
    """A stored file is damaged."""


class BusyError(ExegeteError):
    """Another process is writing to the run."""


class LLMError(ExegeteError):
    """A call to a language model failed and will not be tried again."""


class BudgetError(LLMError):
    """The next call might cost more than the budget has left; what is stored stays."""


def unknown(kind: str, given: str, allowed: Iterable[str], *, limit: int = 8) -> NotFoundError:
    """Return the error for an unknown name: what was given, the nearest names, or else the known ones."""
    known = sorted(allowed)
    near = difflib.get_close_matches(given, known, n=5, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(near) + "?"
    elif known:
        more = f" … ({len(known)} in all)" if len(known) > limit else ""
        hint = "known: " + ", ".join(known[:limit]) + more
    else:
        hint = "none is known"
    return NotFoundError(f"unknown {kind} {given!r}; {hint}")
