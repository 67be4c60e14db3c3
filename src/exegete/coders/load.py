"""Find and load sparse coders: ``PATH``, ``PATH:SUB``, ``ORG/NAME`` on the hub, each with an optional ``NAME=``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, final

from exegete.coders.coder import SparseCoder
from exegete.coders.formats import sparsify
from exegete.coders.formats.sparsify import CoderFolder, CoderInfo
from exegete.coders.topk import TopKCoder
from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.files import safe_name

if TYPE_CHECKING:
    import torch

    from exegete.subjects.subject import Subject

log = logging.getLogger(__name__)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoderSpec:
    """A spec taken apart: the name given with ``NAME=``, the folder or hub id, and the folder inside it."""

    name: str | None
    where: str
    sub: str

    @classmethod
    def parse(cls, text: str) -> CoderSpec:
        """Read ``[NAME=]PATH[:SUB]``. A path that exists as written is taken whole."""
        name: str | None = None
        rest = text
        before, equals, after = text.partition("=")
        if equals and "/" not in before and not Path(text).expanduser().exists():
            name, rest = safe_name(before), after
        sub = ""
        if ":" in rest and not Path(rest).expanduser().exists():
            rest, _, sub = rest.rpartition(":")
        parts = PurePosixPath(sub).parts
        if not rest or ".." in parts or sub.startswith("/"):
            raise InputError(f"a coder is written [NAME=]PATH[:SUB], with SUB a folder inside PATH; got {text!r}")
        return cls(name=name, where=rest, sub=sub)


def load_coder(
    spec: str,
    hookpoint: str | None = None,
    *,
    name: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> SparseCoder:
    """Load one sparse coder.

    Args:
        spec: ``[NAME=]PATH[:SUB]`` or ``[NAME=]ORG/NAME[:SUB]``.
        hookpoint: Which coder of a repository that holds several; also where a coder reads whose folder does not
            say. May be left out where there is only one.
        name: What to call it, by default ``NAME``, else its hookpoint.
        device: Where to put the weights.
        dtype: Data type to compute in, by default float32 whatever the file holds.

    Raises:
        InputError: NotFoundError when it is not there; also when several coders match, or the hookpoint is not known.
        CorruptError: When its files are damaged.
    """
    parsed = CoderSpec.parse(spec)
    ((_, places),) = _found([parsed], () if hookpoint is None else (hookpoint,))
    if len(places) != 1:
        names = ", ".join(_label(place) for place in places)
        raise InputError(f"{spec!r} holds {len(places)} coders ({names}); name one as hookpoint, or with PATH:SUB")
    chosen = places[0].hookpoint or hookpoint
    if chosen is None:
        raise InputError(f"{spec!r} does not say where it reads; give its hookpoint, such as layers.3")
    return _load(places[0], name or parsed.name or safe_name(chosen), chosen, device, dtype)


def load_coders(
    spec: str | Sequence[str],
    hookpoints: Sequence[str] = (),
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, SparseCoder]:
    """Load every coder that one or several specs hold at the hookpoints asked for, by name.

    A coder is named after its hookpoint, or ``NAME`` where its spec says ``NAME=``. Where one spec holds several
    coders they are called ``NAME-HOOKPOINT``; several seeds of one hookpoint are told apart as ``HOOKPOINT-seed0``.

    Raises:
        InputError: When two coders would have one name: call one of them ``NAME=SPEC``. Else as ``load_coder``.
    """
    loaded: dict[str, SparseCoder] = {}
    for parsed, place, name, hookpoint in _planned([spec] if isinstance(spec, str) else list(spec), hookpoints):
        if name in loaded:
            raise InputError(
                f"two coders are called {name!r} (the second is {parsed.where!r}); name one of them with NAME=SPEC"
            )
        loaded[name] = _load(place, name, hookpoint, device, dtype)
    return loaded


def inspect_coders(spec: str | Sequence[str], hookpoints: Sequence[str] = ()) -> dict[str, CoderInfo]:
    """Return what is known of the coders ``load_coders`` would load, without loading weights."""
    planned = _planned([spec] if isinstance(spec, str) else list(spec), hookpoints)
    return {name: sparsify.inspect(place) for _, place, name, _ in planned}


def check_fit(coder: SparseCoder, subject: Subject) -> None:
    """Raise MismatchError unless the subject has the coder's hookpoint, with activations of the coder's sizes."""
    try:
        points = subject.points(coder.hookpoint, coder.side)
    except NotFoundError as error:
        raise MismatchError(f"coder {coder.name!r} does not fit {subject.name}: {error}") from error
    if len(points) != 1:
        raise MismatchError(
            f"coder {coder.name!r} reads {coder.hookpoint!r}, which stands for {len(points)} hookpoints"
        )
    name, side = points[0]
    have = subject.d(name, side)
    if have != coder.d_in:
        raise MismatchError(
            f"coder {coder.name!r} reads {coder.d_in} dimensions, the {side} of {name} in {subject.name} has {have}; "
            f"is it a coder of another model?"
        )
    if coder.side == "input" and subject.d(name, "output") != coder.d_out:
        raise MismatchError(
            f"coder {coder.name!r} predicts {coder.d_out} dimensions, the output of {name} in {subject.name} has "
            f"{subject.d(name, 'output')}"
        )
    base = coder.base_model if isinstance(coder, TopKCoder) else None
    if base is not None and Path(base).name.lower() != Path(subject.name).name.lower():
        log.warning("coder %r was trained on %s and is used on %s", coder.name, base, subject.name)


def _planned(specs: Iterable[str], hookpoints: Sequence[str]) -> list[tuple[CoderSpec, CoderFolder, str, str]]:
    """Return spec, folder, name and hookpoint of every coder to load."""
    planned: list[tuple[CoderSpec, CoderFolder, str, str]] = []
    for spec, places in _found([CoderSpec.parse(text) for text in specs], hookpoints):
        seeds: dict[str | None, int] = {}
        for place in places:
            seeds[place.hookpoint] = seeds.get(place.hookpoint, 0) + 1
        for place in places:
            hookpoint = place.hookpoint or (hookpoints[0] if len(hookpoints) == 1 else None)
            if hookpoint is None:
                raise InputError(
                    f"{str(place.path)!r} does not say where it reads; give its hookpoint, such as layers.3"
                )
            own = f"{hookpoint}-{place.seed}" if seeds[place.hookpoint] > 1 else hookpoint
            name = own if spec.name is None else spec.name if len(places) == 1 else f"{spec.name}-{own}"
            planned.append((spec, place, safe_name(name), hookpoint))
    return planned


def _found(specs: Sequence[CoderSpec], hookpoints: Sequence[str]) -> list[tuple[CoderSpec, tuple[CoderFolder, ...]]]:
    """Return the coder folders of each spec at the hookpoints asked for, fetched from the hub where that is meant."""
    tops = [_top(spec) for spec in specs]
    chosen = sparsify.select([sparsify.find(_root(s, top)) for s, top in zip(specs, tops, strict=True)], hookpoints)
    for spec, top, places in zip(specs, tops, chosen, strict=True):
        if places and not Path(spec.where).expanduser().exists():
            weights = [(place.path / sparsify.WEIGHTS).relative_to(top).as_posix() for place in places]
            _snapshot(spec.where, weights, revision=top.name)
    return list(zip(specs, chosen, strict=True))


def _top(spec: CoderSpec) -> Path:
    """Return the local folder of a spec; of a hub repository, one with the settings of its coders."""
    path = Path(spec.where).expanduser()
    if path.exists():
        return path
    if not _HUB.fullmatch(spec.where) or Path(path.parts[0]).is_dir():
        raise NotFoundError(f"there is no coder folder {spec.where!r}; give a folder, or a hub id such as ORG/NAME")
    return _snapshot(spec.where, [f"*{sparsify.CONFIG}", "*config.json"])


def _root(spec: CoderSpec, top: Path) -> Path:
    if not (top / spec.sub).is_dir():
        inside = f" in {spec.where!r}" if spec.sub else ""
        raise NotFoundError(f"there is no folder {spec.sub or spec.where!r}{inside}")
    return top / spec.sub


def _snapshot(repository: str, patterns: list[str], revision: str | None = None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, revision=revision))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise NotFoundError(
            f"the coder {repository!r} cannot be fetched from the Hugging Face hub ({detail}); give a local folder, or "
            f"check the id and the connection"
        ) from error


def _load(place: CoderFolder, name: str, hookpoint: str, device: str, dtype: torch.dtype | None) -> SparseCoder:
    import torch

    return sparsify.load(place, name=safe_name(name), hookpoint=hookpoint, device=device, dtype=dtype or torch.float32)


def _label(place: CoderFolder) -> str:
    return os.sep.join(part for part in (place.hookpoint, place.seed) if part)
