"""What a reader of one on-disk format of sparse coders is, and what it says of a coder before loading its weights."""

from __future__ import annotations

import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from exegete.coders.coder import Point, SparseCoder
from exegete.coders.repository import Repository
from exegete.coders.weights import TensorInfo
from exegete.errors import CorruptError, InputError
from exegete.types import Side

if TYPE_CHECKING:
    import torch

SEED = re.compile(r"seed\d+")
_MODULE = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+(?:\.|$)")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one coder lies in a repository.

    ``folder`` is its folder (``""`` is the root), ``files`` the files it is made of (settings and weights), in the
    format's own order; ``hookpoint`` what folder or settings name, in any spelling, None where they name none;
    ``label`` tells the coders of one hookpoint apart (a seed, a width, an L0), ``""`` where there is one.
    """

    folder: str
    files: tuple[str, ...]
    hookpoint: str | None
    label: str = ""

    def __str__(self) -> str:
        place = self.folder or self.hookpoint or "."
        return place if place.endswith(self.label) else f"{place} {self.label}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoderInfo:
    """What is known of a coder without its weights.

    ``hookpoint`` and ``side`` are where it reads, ``target`` what it reconstructs, None for the same (an autoencoder);
    hookpoints are None where the files do not say. ``k`` is the most latents that fire, None where there is no such
    number; ``threshold`` says what else decides, such as ``per latent`` or ``0.5``. ``base_model`` is the model the
    files name. ``notes`` is what a user should know, such as a scale folded into the weights.
    """

    format: str
    architecture: str
    path: str
    hookpoint: str | None
    side: Side
    target: Point | None
    d_in: int
    d_out: int
    width: int
    k: int | None
    threshold: str | None
    base_model: str | None
    dtype: str
    notes: tuple[str, ...] = field(default=())


class CoderFormat(ABC):
    """One reader. ``name`` is what users see; readers hold no state."""

    name: str

    @abstractmethod
    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return the coders of this format in a folder and below, in natural order; none when there is no such one.

        Decided from file names, and where these do not suffice from small settings files; no weights are read and no
        file of another format makes it fail.
        """

    @abstractmethod
    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what settings and header say, all shapes checked. Raises InputError or CorruptError."""

    @abstractmethod
    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> SparseCoder:
        """Load one coder, reading at ``hookpoint``; weights that are not finite are refused.

        Raises InputError or CorruptError.
        """


def require_shapes(
    where: str, header: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], said_by: str
) -> None:
    """Raise CorruptError unless a weight file has these tensors in these shapes, floating-point.

    ``where`` names the file, ``said_by`` what the shapes come from, such as ``its cfg.json``.
    """
    missing = sorted(expected.keys() - header.keys())
    if missing:
        raise CorruptError(f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(header))}")
    for name, shape in expected.items():
        if header[name].shape != tuple(shape):
            raise CorruptError(f"{where}: {name} has shape {list(header[name].shape)}, {said_by} says {list(shape)}")
        if not header[name].floating:
            raise CorruptError(f"{where}: {name} is of type {header[name].dtype}, not floating point")


def integer(config: Mapping[str, Any], name: str, where: str, default: int | None = None, *, least: int = 1) -> int:
    """Return a whole number from settings. Raises InputError when it is missing, below ``least``, or something else."""
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        held = reprlib.repr(value)
        raise InputError(f"{where} must hold {name} as a whole number of at least {least}, it holds {held}")
    return value


def flag(config: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    """Return a yes or no from settings. Raises InputError when it is something else."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{where} must hold {name} as true or false, it holds {reprlib.repr(value)}")
    return value


def text(config: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str | None:
    """Return a text from settings, or the default. Raises InputError when it is something else."""
    value = config.get(name, default)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where} must hold {name} as text, it holds {reprlib.repr(value)}")
    return value


def module_name(folder: str) -> str | None:
    """Return the last part of a path when it looks like a module's name: a layer, what is inside it, or embeddings."""
    last = folder.rpartition("/")[2]
    return last if _MODULE.search(last) or last.startswith("embed") else None


def parent(path: str) -> str:
    """Return the folder of a path, ``""`` for the root."""
    return path.rpartition("/")[0]


def beside(folder: str, file: str) -> str:
    """Return the path of a file in a folder."""
    return f"{folder}/{file}" if folder else file
