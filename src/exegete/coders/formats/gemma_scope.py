"""Google DeepMind's Gemma Scope: ``layer_20/width_16k/average_l0_71/params.npz`` (Lieberum et al., arXiv 2408.05147).

What a coder reads is in its repository's name alone, ``gemma-scope-2b-pt-res`` and the like; a local copy keeps it in
the name of a folder above. Transcoders read the MLP's input before the gain of its norm (the paper folds the gain into
the MLP, appendix "Language model technical details") and predict its output after its second norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from exegete.coders.activations import JumpReLU
from exegete.coders.coder import Point
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, parent, require_shapes
from exegete.coders.formats.hooks import Reading, reading
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.errors import CorruptError, InputError

if TYPE_CHECKING:
    import torch

_FILE = "params.npz"
_NAME = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoder)s?(?![a-z])")
_FOLDER = re.compile(r"(?:layer_(\d+)|embedding)/((?:width_\w+)/(?:[\w.-]+))$")
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoder": "ln2.hook_normalized"}
_EMBEDDED = (
    "trained on embeddings before Gemma multiplies them by √d; √d is folded into the weights, as the model's embedding "
    "module returns them multiplied"
)
_UNNAMED = "no folder is named gemma-scope-…-res, -mlp, -att or -transcoders; read as an autoencoder of its hookpoint"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """What the path of a file says."""

    kind: str | None
    model: str | None
    layer: int | None
    embedding: bool
    label: str

    @property
    def transcoder(self) -> bool:
        return self.kind == "transcoder"

    def reading(self) -> Reading:
        if self.embedding and self.kind in ("res", None):
            return Reading(hookpoint="hook_embed", side="output", notes=(_EMBEDDED,))
        if self.kind is None:
            return Reading(hookpoint=None, side="output", notes=(_UNNAMED,))
        if self.layer is None:
            hookless = reading(_HOOKS[self.kind], 0, self.model)
            return Reading(hookpoint=None, side=hookless.side, input_norm=hookless.input_norm, notes=hookless.notes)
        return reading(_HOOKS[self.kind], self.layer, self.model)

    def target(self, hookpoint: str | None) -> Point | None:
        """Return what a transcoder predicts: of a hookpoint named by the user, what its layer's MLP adds."""
        if not self.transcoder:
            return None
        found = re.search(r"\d+", hookpoint or "") if self.layer is None else None
        layer = int(found[0]) if found else self.layer
        return None if layer is None else (f"blocks.{layer}.hook_mlp_out", "output")


@final
class GemmaScope(CoderFormat):
    """JumpReLU autoencoders and transcoders of Gemma 2."""

    name = "gemma-scope"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every ``params.npz``; nothing is downloaded."""
        found = []
        for path in repository.under(folder):
            if path.rpartition("/")[2] == _FILE:
                site = _site(repository, path)
                hookpoint = site.reading().hookpoint
                found.append(Place(folder=parent(path), files=(path,), hookpoint=hookpoint, label=site.label))
        return tuple(found)

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what path and header say. Raises InputError or CorruptError."""
        (path,) = place.files
        where = repository.where(path)
        header = repository.header(path)
        names = _names(header, where)
        site = _site(repository, path)
        first = header[names["W_enc"]].shape
        if len(first) != 2:
            raise CorruptError(f"{where}: {names['W_enc']} has shape {list(first)}, expected [d_in, width]")
        d_in, width = first
        d_out = header[names["W_dec"]].shape[-1] if site.transcoder else d_in
        shapes = {"W_enc": (d_in, width), "W_dec": (width, d_out), "b_enc": (width,), "b_dec": (d_out,)}
        expected = {names[n]: shape for n, shape in {**shapes, "threshold": (width,)}.items()}
        require_shapes(where, header, expected, f"its {names['W_enc']}")
        read = site.reading()
        return CoderInfo(
            format=self.name,
            architecture="jumprelu transcoder" if site.transcoder else "jumprelu",
            path=repository.where(place.folder),
            hookpoint=read.hookpoint,
            side=read.side,
            target=site.target(read.hookpoint),
            d_in=d_in,
            d_out=d_out,
            width=width,
            k=None,
            threshold="per latent",
            base_model=site.model,
            dtype=header[names["W_enc"]].dtype,
            notes=read.notes,
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        info = self.inspect(repository, place)
        (path,) = place.files
        where = repository.where(path)
        site = _site(repository, path)
        target = site.target(hookpoint)
        if site.transcoder and target is None:
            raise InputError(f"{where} is a transcoder of a layer that neither its folder nor {hookpoint!r} names")
        held = repository.tensors(path)
        names = _names(held, where)
        scaling = held.get("scaling_factor")
        if scaling is not None and not bool((scaling == 1).all()):
            raise InputError(f"{where} holds a scaling_factor other than 1, which cannot be read")
        read = site.reading()
        scale = math.sqrt(info.d_in) if read.hookpoint == "hook_embed" else 1.0
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            encoder=held[names["W_enc"]].T.contiguous() / scale,
            encoder_bias=held[names["b_enc"]],
            decoder=held[names["W_dec"]] * scale,
            decoder_bias=held[names["b_dec"]] * scale,
            activation=JumpReLU(held[names["threshold"]]),
            side=info.side,
            target=target,
            input_norm=read.input_norm,
            norm_epsilon=read.norm_epsilon,
            base_model=info.base_model,
        ).to(device, dtype)


def _site(repository: Repository, path: str) -> _Site:
    full = f"{repository.name}/{path}".replace("\\", "/").rpartition("/")[0]
    named = list(_NAME.finditer(full))
    size, tuned, kind = named[-1].groups() if named else ("", "", None)
    folder = _FOLDER.search(full)
    return _Site(
        kind=kind,
        model=f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}" if kind else None,
        layer=int(folder[1]) if folder and folder[1] else None,
        embedding=bool(folder and not folder[1]),
        label=folder[2] if folder else "",
    )


def _names(held: Iterable[str], where: str) -> dict[str, str]:
    """Return how a file spells each tensor; some write ``w_enc``. Raises CorruptError."""
    names = set(held)
    found = {n: n if n in names else n.lower() for n in _TENSORS}
    missing = [n for n, spelled in found.items() if spelled not in names]
    if missing:
        raise CorruptError(f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(names)) or 'nothing'}")
    return found
