"""The coders of a run: loaded from files, or made (``neurons``, ``pca:…`` …), and fitted to their subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from exegete.coders.builtin import BuiltinSpec, build_builtin, named_builtin
from exegete.coders.coder import SparseCoder
from exegete.coders.fit import fit_coder
from exegete.coders.load import load_coders, require_new
from exegete.files import safe_name
from exegete.types import Rows

if TYPE_CHECKING:
    from exegete.subjects.subject import Subject

Sample = Callable[[int], Rows]
"""Returns rows of the run's text that hold at least so many counted positions, or all there are."""


def make_coders(
    specs: Sequence[str],
    hookpoints: Sequence[str],
    subject: Subject,
    sample: Sample,
    *,
    seed: int = 0,
    other_model: bool = False,
    by_document: bool = False,
    sink_norm: float = 10.0,
    dtype: str = "float32",
) -> dict[str, SparseCoder]:
    """Return the coders of several specs by name, reading at the subject's own hookpoints.

    Args:
        specs: ``[NAME=]PATH[:SUB]``, a hub id, ``saelens:RELEASE:ID``, or ``[NAME=]KIND[:OPTIONS]`` as ``builtin``
            has them.
        hookpoints: Which coders of a repository, and where those that are made are read; any spelling, globs allowed.
        subject: The model whose activations they read.
        sample: For coders that are fitted to activations (PCA).
        seed: Of random coders.
        other_model: Allow coders whose files name another base model.
        by_document: Whether a packed document sees itself alone.
        sink_norm: Multiple of the median norm beyond which a position is not used for fitting; 0 for none.
        dtype: Data type to compute in: float32, bfloat16 or float16.

    Raises:
        InputError: When a spec is not understood, nothing is where it says, or two coders would have one name;
            MismatchError when a coder does not fit the subject; CorruptError when files are damaged.
    """
    files: list[str] = []
    builtins: list[tuple[str | None, BuiltinSpec]] = []
    for text in specs:
        name, builtin = named_builtin(text)
        if builtin is None:
            files.append(text)
        else:
            builtins.append((name, builtin))
    made = load_coders(files, hookpoints) if files else {}
    for given, builtin in builtins:
        built = build_builtin(
            builtin,
            subject,
            hookpoints,
            partial(sample, builtin.tokens),
            seed,
            by_document=by_document,
            sink_norm=sink_norm,
        )
        for own, coder in built.items():
            name = own if given is None else given if len(built) == 1 else safe_name(f"{given}-{coder.hookpoint}")
            require_new(made, name, builtin.kind)
            made[name] = coder.placed(name=name)
    kind = getattr(torch, dtype)
    fitted = {name: fit_coder(coder, subject, other_model=other_model) for name, coder in made.items()}
    return {name: coder.to(coder.device, kind) for name, coder in fitted.items()}
