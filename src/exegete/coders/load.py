"""Find and load sparse coders: a folder, a hub id, a SAELens release, each with an optional ``NAME=`` before it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NoReturn, final

from exegete.coders.builtin import BUILTINS
from exegete.coders.coder import SparseCoder
from exegete.coders.formats import formats, saelens_table
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, parent
from exegete.coders.repository import Repository, open_repository
from exegete.coders.weights import SUFFIXES
from exegete.errors import InputError, NotFoundError
from exegete.files import safe_name

if TYPE_CHECKING:
    import torch

_MOST_ALIKE = 16
_LENS = re.compile(r"^blocks\.(\d+)\.(.+)$")
_MODULES = {"hook_resid_post": "", "hook_mlp_out": ".mlp", "hook_attn_out": ".self_attn"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoderSpec:
    """A spec taken apart: the name given with ``NAME=``, the folder or hub id, and the folder or file inside it."""

    name: str | None
    where: str
    sub: str

    @classmethod
    def parse(cls, text: str) -> CoderSpec:
        """Read ``[NAME=]PATH[:SUB]``. A path that exists as written is taken whole; a file stands for its coder."""
        name: str | None = None
        rest = text
        before, equals, after = text.partition("=")
        if equals and not any(c in before for c in "/:") and not _exists(text):
            name, rest = safe_name(before), after
        if rest.startswith(saelens_table.PREFIX):
            release, sae_id = saelens_table.split(rest)
            return cls(name=name, where=saelens_table.PREFIX + release, sub=sae_id)
        kind = rest.partition(":")[0]
        if kind in BUILTINS and not _exists(kind):
            raise InputError(
                f"{text!r} is made for a subject, not read from files; give it to exegete collect with hookpoints"
            )
        sub = ""
        if ":" in rest and not _exists(rest):
            rest, _, sub = rest.rpartition(":")
        inner = PurePosixPath(sub)
        if not rest or ".." in inner.parts or inner.is_absolute():
            raise InputError(f"a coder is written [NAME=]PATH[:SUB], with SUB inside PATH; got {text!r}")
        if not sub and os.path.isfile(os.path.expanduser(rest)):
            rest, inner = os.path.split(rest)[0] or ".", PurePosixPath(os.path.basename(rest))
        return cls(name=name, where=rest, sub="" if inner == PurePosixPath() else inner.as_posix())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A coder that was found: where it lies and which reader takes it."""

    repository: Repository
    format: CoderFormat
    place: Place

    def inspect(self) -> CoderInfo:
        """Return what its files say without their weights."""
        return self.format.inspect(self.repository, self.place)


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
        spec: ``[NAME=]PATH[:SUB]``, ``[NAME=]ORG/NAME[:SUB]``, or ``[NAME=]saelens:RELEASE:ID``.
        hookpoint: Which coder of a repository that holds several; also where a coder reads whose files do not
            say. May be left out where there is only one.
        name: What to call it, by default ``NAME``, else its hookpoint.
        device: Where to put the weights.
        dtype: Data type to compute in, by default float32 whatever the file holds.

    Raises:
        InputError: NotFoundError when it is not there; also when several coders match, or the hookpoint is not known.
        CorruptError: When its files are damaged.
    """
    parsed = CoderSpec.parse(spec)
    ((_, found),) = _found([parsed], () if hookpoint is None else (hookpoint,))
    if len(found) != 1:
        names = [str(one.place) for one in found]
        shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        raise InputError(f"{spec!r} holds {len(found)} coders ({shown}); name one as hookpoint, or with PATH:SUB")
    chosen = found[0].place.hookpoint or hookpoint
    if chosen is None:
        raise InputError(f"{spec!r} does not say where it reads; give its hookpoint, such as layers.3")
    return _load(found[0], name or parsed.name or safe_name(chosen), chosen, device, dtype)


def load_coders(
    spec: str | Sequence[str],
    hookpoints: Sequence[str] = (),
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, SparseCoder]:
    """Load every coder that one or several specs hold at the hookpoints asked for, by name.

    A coder is named after its hookpoint, or ``NAME`` where its spec says ``NAME=``. Where one spec holds several
    coders they are called ``NAME-HOOKPOINT``; several coders of one hookpoint are told apart by what tells their
    folders apart: ``HOOKPOINT-seed0``. Only the files of the coders asked for are read.

    Raises:
        InputError: When two coders would have one name: call one of them ``NAME=SPEC``. Else as ``load_coder``.
    """
    loaded: dict[str, SparseCoder] = {}
    for parsed, found, name, hookpoint in planned([spec] if isinstance(spec, str) else list(spec), hookpoints):
        require_new(loaded, name, parsed.where)
        loaded[name] = _load(found, name, hookpoint, device, dtype)
    return loaded


def require_new(coders: Container[str], name: str, where: str) -> None:
    """Raise InputError when one of the coders has the name already; ``where`` says which is the second."""
    if name in coders:
        raise InputError(f"two coders are called {name!r} (the second is {where!r}); name one of them with NAME=SPEC")


def inspect_coders(spec: str | Sequence[str], hookpoints: Sequence[str] = ()) -> list[CoderInfo]:
    """Return what is known of the coders that specs hold, without loading weights.

    Raises InputError, NotFoundError or CorruptError as loading would, but not for a coder that does not say where it
    reads.
    """
    specs = [CoderSpec.parse(text) for text in ([spec] if isinstance(spec, str) else spec)]
    return [one.inspect() for _, found in _found(specs, hookpoints) for one in found]


def planned(specs: Iterable[str], hookpoints: Sequence[str]) -> list[tuple[CoderSpec, Found, str, str]]:
    """Return spec, place, name and hookpoint of every coder to load; no weights are read. Raises as ``load_coders``."""
    plan: list[tuple[CoderSpec, Found, str, str]] = []
    for spec, found in _found([CoderSpec.parse(text) for text in specs], hookpoints):
        alike: dict[str | None, int] = {}
        for one in found:
            alike[one.place.hookpoint] = alike.get(one.place.hookpoint, 0) + 1
        for one in found:
            hookpoint = one.place.hookpoint or (hookpoints[0] if len(hookpoints) == 1 else None)
            if hookpoint is None:
                raise InputError(
                    f"{one.repository.where(one.place.folder)!r} does not say where it reads; give its hookpoint, such "
                    "as layers.3"
                )
            if alike[one.place.hookpoint] > _MOST_ALIKE:
                raise InputError(
                    f"{spec.where!r} holds {alike[one.place.hookpoint]} coders at {hookpoint}; name the folder of one, "
                    f"such as {spec.where}:{one.place.folder}"
                )
            label = one.place.label.replace("/", "-")
            own = f"{hookpoint}-{label}" if label and alike[one.place.hookpoint] > 1 else hookpoint
            name = own if spec.name is None else spec.name if len(found) == 1 else f"{spec.name}-{own}"
            plan.append((spec, one, safe_name(name), hookpoint))
    return plan


def find_coders(repository: Repository, folder: str = "") -> list[Found]:
    """Return the coders in a folder of a repository, whatever their format, in natural order; of a file its coder.

    Raises NotFoundError when there is no such folder, InputError when it holds no coder that can be read.
    """
    if folder in repository:
        near = find_coders(repository, parent(folder))
        return [one for one in near if folder in one.place.files] or _refuse(repository, folder, [folder])
    files = repository.under(folder)
    if not files:
        inside = f" in {repository.name!r}" if folder else ""
        raise NotFoundError(f"there is no folder {folder or repository.name!r}{inside}, or it is empty")
    found: list[Found] = []
    taken: set[str] = set()
    for reader in formats():
        for place in reader.find(repository, folder):
            if taken.isdisjoint(place.files):
                taken.update(place.files)
                found.append(Found(repository=repository, format=reader, place=place))
    if not found:
        return _refuse(repository, folder, files)
    order = {file: i for i, file in enumerate(repository.files)}
    return sorted(found, key=lambda one: min(order.get(file, len(order)) for file in one.place.files))


def _refuse(repository: Repository, folder: str, files: Sequence[str]) -> NoReturn:
    known = ", ".join(reader.name for reader in formats())
    where = repository.where(folder)
    weights = [file for file in files if file.endswith(SUFFIXES)]
    seen = f"; its weight files ({weights[0]}) belong to none of them" if weights else " and no weights"
    raise InputError(f"{where!r} holds no sparse coder of a known format ({known}){seen}")


def _found(specs: Sequence[CoderSpec], hookpoints: Sequence[str]) -> list[tuple[CoderSpec, list[Found]]]:
    groups = [find_coders(*_opened(spec)) for spec in specs]
    return list(zip(specs, _chosen(groups, hookpoints), strict=True))


def _opened(spec: CoderSpec) -> tuple[Repository, str]:
    """Return the repository of a spec and the folder inside it."""
    if spec.where.startswith(saelens_table.PREFIX):
        found = saelens_table.resolve(spec.where.removeprefix(saelens_table.PREFIX), spec.sub)
        return found.repository(open_repository(found.repo_id)), found.folder
    try:
        return open_repository(spec.where), spec.sub
    except NotFoundError as error:
        if not saelens_table.is_release(spec.where):
            raise
        meant = f"{saelens_table.PREFIX}{spec.where}:{spec.sub or 'ID'}"
        raise NotFoundError(f"{spec.where!r} is a release of SAELens, no folder or hub id; write {meant}") from error


def _chosen(groups: list[list[Found]], hookpoints: Sequence[str]) -> list[list[Found]]:
    """Return from each group the coders at the hookpoints asked for, all when none is asked for.

    Hookpoints are in any spelling, globs allowed. A lone coder whose files name no hookpoint is always kept: it is for
    the caller to say where it sits. Raises NotFoundError naming the near ones for a hookpoint that no group has.
    """
    from exegete.subjects.names import expand

    if not hookpoints:
        return groups
    known = [[alias for one in group for alias in _aliases(one.place.hookpoint)] for group in groups]
    wanted: list[set[str]] = [set() for _ in groups]
    for pattern in hookpoints:
        matched = not all(known)
        for names, chosen in zip(known, wanted, strict=True):
            with contextlib.suppress(NotFoundError):
                chosen.update(name for name, _ in expand(pattern, names))
                matched = True
        if not matched:
            expand(pattern, list(dict.fromkeys(name for names in known for name in names)))  # raises, with near names
    return [
        [one for one in group if one.place.hookpoint is None or not chosen.isdisjoint(_aliases(one.place.hookpoint))]
        for group, chosen in zip(groups, wanted, strict=True)
    ]


def _aliases(hookpoint: str | None) -> list[str]:
    """Return a coder's hookpoint as its files spell it, and a TransformerLens hook's usual module names."""
    if hookpoint is None:
        return []
    found = _LENS.match(hookpoint)
    if not found:
        return [hookpoint]
    layer, hook = int(found[1]), found[2]
    if hook == "hook_resid_pre" and layer > 0:
        layer, hook = layer - 1, "hook_resid_post"
    if hook not in _MODULES:
        return [hookpoint]
    # The file's own spelling last: names are translated to the spelling of the first.
    return [*(f"{stack}.{layer}{_MODULES[hook]}" for stack in ("layers", "h")), hookpoint]


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _load(
    found: Found, name: str, hookpoint: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> SparseCoder:
    """Load a coder that was found, under a name and reading at a hookpoint. Raises InputError or CorruptError."""
    import torch

    return found.format.load(
        found.repository,
        found.place,
        name=safe_name(name),
        hookpoint=hookpoint,
        device=device,
        dtype=dtype or torch.float32,
    )
