"""Does a coder belong to this subject? Its hookpoints are translated, its sizes and its base model compared."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, TypeVar

from exegete.coders.coder import Point, SparseCoder
from exegete.errors import MismatchError, NotFoundError

if TYPE_CHECKING:
    from exegete.subjects.subject import Subject

C = TypeVar("C", bound=SparseCoder)
log = logging.getLogger(__name__)
_NOISE = re.compile(r"[^a-z0-9.]+")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)-(?=\d)")
_SPELLINGS = (("gpt2-small", "gpt2"), ("meta-llama-", "llama-"), ("instruct", "it"))


def fit_coder(coder: C, subject: Subject, *, other_model: bool = False) -> C:
    """Return the coder reading and reconstructing at the subject's own names for its hookpoints.

    Raises MismatchError when the subject has no such hookpoint, its activations have another size, or — unless
    ``other_model`` allows it — the coder's files name another base model than the subject (a local folder has no
    reliable name: there a warning is logged).
    """
    point = _point(coder, subject, coder.point, "reads")
    target = _point(coder, subject, coder.target, "predicts") if coder.target != coder.point else point
    for verb, (name, side), size in (("reads", point, coder.d_in), ("predicts", target, coder.d_out)):
        have = subject.d(name, side)
        if have != size:
            raise MismatchError(
                f"coder {coder.name!r} {verb} {size} dimensions, the {side} of {name} in {subject.name} has {have}; "
                "is it a coder of another model?"
            )
    if not other_model:
        _check_base(coder, subject)
    return coder.placed(point=point, target=target)


def same_model(one: str, other: str) -> bool:
    """Tell whether two names mean one model: owner, case, punctuation and TransformerLens's ``gpt2-small`` aside."""
    return _plain(one) == _plain(other)


def _point(coder: SparseCoder, subject: Subject, point: Point, verb: str) -> Point:
    try:
        found = subject.points(*point)
    except NotFoundError as error:
        raise MismatchError(f"coder {coder.name!r} does not fit {subject.name}: {error}") from error
    if len(found) != 1:
        raise MismatchError(f"coder {coder.name!r} {verb} {point[0]!r}, which stands for {len(found)} hookpoints")
    return found[0]


def _check_base(coder: SparseCoder, subject: Subject) -> None:
    base = coder.base_model
    if base is None or same_model(base, subject.name):
        return
    if _local(base) or _local(subject.name):
        log.warning("coder %r was trained on %s and is used on %s", coder.name, base, subject.name)
        return
    raise MismatchError(
        f"coder {coder.name!r} was trained on {base}, the subject is {subject.name}; give that model, or allow "
        "another one (a fine-tune of it, say) with collect.other_model (--other-model)"
    )


def _local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or os.path.exists(name)


def _plain(name: str) -> str:
    last = _NOISE.sub("-", name.rstrip("/").rpartition("/")[2].lower())
    for spelling, plain in _SPELLINGS:
        last = last.replace(spelling, plain)
    # gpt-2 is gpt2, but 2-2b is not 22b.
    return _BETWEEN_DIGITS.sub("_", last).replace("-", "")
