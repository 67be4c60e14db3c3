"""Sites: one numbering of the residual stream for every family of models.

Site −1 is what block 0 reads, the embedding; site j is the output of block j, 0 ≤ j < L, before any final norm. That is
what a lens decodes, what a steering vector is added to, and where a probe reads. The hidden states that models return
themselves are never used, for families index them in three ways (some list no embedding, the last is behind the norm).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from exegete.errors import InputError, NotFoundError
from exegete.subjects.names import Point, layers
from exegete.subjects.subject import Subject

_PART = re.compile(r"(-?\d+)(?:\s*-\s*(-?\d+))?")


def n_blocks(subject: Subject) -> int:
    """Return the number of blocks L. Raises InputError for a model without a list of blocks."""
    return len(_blocks(subject))


def site_point(subject: Subject, site: int) -> Point:
    """Return the hookpoint and side of a site. Raises NotFoundError for one that the model does not have."""
    blocks = _blocks(subject)
    if not -1 <= site < len(blocks):
        raise NotFoundError(f"{subject.name} has the sites -1 (the embedding) to {len(blocks) - 1}, got {site}")
    return (blocks[0], "input") if site < 0 else (blocks[site], "output")


def parse_sites(text: str, subject: Subject) -> tuple[int, ...]:
    """Return the sites that a text names, each once and in ascending order.

    ``all`` (−1 to L − 1), ``blocks`` (0 to L − 1), ``last`` (L − 1), numbers and ranges with both ends: ``3``,
    ``-1,3,5``, ``2-8``. Raises NotFoundError for sites that the model does not have, InputError for anything else.
    """
    count = n_blocks(subject)
    named = {"all": range(-1, count), "blocks": range(count), "last": range(count - 1, count)}
    found: set[int] = set()
    for part in (piece.strip() for piece in text.split(",")):
        match = _PART.fullmatch(part)
        if part in named:
            found.update(named[part])
        elif match is not None:
            first, end = int(match[1]), int(match[2] or match[1])
            for bound in (first, end):
                site_point(subject, bound)
            found.update(range(first, end + 1))
        else:
            raise InputError(f"sites are all, blocks, last, numbers such as -1,3,5 or ranges such as 2-8, got {text!r}")
    if not found:
        raise InputError(f"the sites {text!r} are none; a range goes from the lower to the higher")
    return tuple(sorted(found))


def residuals(subject: Subject, tokens: torch.Tensor, sites: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return the residual stream [rows, positions, d] float32 at each site, from one forward pass.

    ``tokens`` are [rows, positions] ids of rows of one length. Raises NotFoundError for unknown sites.
    """
    points = {site: site_point(subject, site) for site in sites}
    caught = subject.capture(tokens, None, tuple(dict.fromkeys(points.values())))
    return {site: caught[point].float() for site, point in points.items()}


def _blocks(subject: Subject) -> tuple[str, ...]:
    found = layers(subject.hookpoints())
    if not found:
        raise InputError(f"{subject.name} has no list of blocks; sites stand for blocks, so it has none")
    return found
