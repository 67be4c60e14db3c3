"""Qwen Scope: ``layer7.sae.pt`` in repositories named ``SAE-Res-Qwen3-1.7B-Base-W32K-L0_50``, which alone give k.

TopK autoencoders of the residual stream after the layer (arXiv 2605.11887). The layout is second-hand: model cards and
SAELens, no published file was at hand. Where fewer than k pre-activations are positive only those fire.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, final

from exegete.coders.activations import TopK
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, parent, require_shapes
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.errors import CorruptError, InputError

if TYPE_CHECKING:
    import torch

_FILE = re.compile(r"(?:^|/)layer(\d+)\.sae\.pt$")
_NAME = re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d+)")
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


@final
class QwenScope(CoderFormat):
    """TopK autoencoders of Qwen 3 and 3.5."""

    name = "qwen-scope"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every ``layerN.sae.pt``."""
        found = []
        for path in repository.under(folder):
            match = _FILE.search(path)
            if match:
                named = _named(repository, path)
                hookpoint = f"blocks.{match[1]}.hook_resid_post"
                label = named[0].rpartition("SAE-Res-")[2] if named and parent(path) else ""
                found.append(Place(folder=parent(path), files=(path,), hookpoint=hookpoint, label=label))
        return tuple(found)

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what names and header say. Raises InputError or CorruptError."""
        (path,) = place.files
        where = repository.where(path)
        named = _named(repository, path)
        if named is None:
            raise InputError(
                f"{where} does not hold how many latents fire; keep it in a folder named as its repository, "
                "SAE-Res-MODEL-W32K-L0_50"
            )
        header = repository.header(path)
        first = header["W_enc"].shape if "W_enc" in header else ()
        if len(first) != 2:
            raise CorruptError(f"{where} lacks W_enc [width, d_in]; it has {', '.join(sorted(header)) or 'no tensors'}")
        width, d_in = first
        shapes = {"W_enc": (width, d_in), "b_enc": (width,), "W_dec": (d_in, width), "b_dec": (d_in,)}
        require_shapes(where, header, shapes, "its W_enc")
        k = int(named[2])
        TopK(k).check(where, width)
        return CoderInfo(
            format=self.name,
            architecture="topk",
            path=where,
            hookpoint=place.hookpoint,
            side="output",
            target=None,
            d_in=d_in,
            d_out=d_in,
            width=width,
            k=k,
            threshold=None,
            base_model=f"Qwen/{named[1]}",
            dtype=header["W_enc"].dtype,
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        info = self.inspect(repository, place)
        held = repository.tensors(place.files[0], _TENSORS)
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            encoder=held["W_enc"],
            encoder_bias=held["b_enc"],
            decoder=held["W_dec"].T.contiguous(),
            decoder_bias=held["b_dec"],
            activation=TopK(info.k or 1),
            base_model=info.base_model,
        ).to(device, dtype)


def _named(repository: Repository, path: str) -> re.Match[str] | None:
    """Return the innermost folder that is named like one of the repositories."""
    parts = f"{repository.name}/{path}".replace("\\", "/").split("/")
    return next((match for part in reversed(parts[:-1]) if (match := _NAME.search(part))), None)
