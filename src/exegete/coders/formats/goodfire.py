"""Single PyTorch files named after their model and layer: Goodfire's, and those of its R1 distillation by qresearch.

``Llama-3.1-8B-Instruct-SAE-l19.pth`` holds ``encoder_linear`` and ``decoder_linear``, the other kind ``encoder`` and
``decoder``, each with weight and bias of a torch ``Linear``. A ReLU autoencoder of the residual stream after the layer;
that the file's layer is meant so is second-hand (Goodfire's model card, SAELens).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, final

from exegete.coders.activations import ReLU
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, parent, require_shapes
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.errors import CorruptError

if TYPE_CHECKING:
    import torch

_FILE = re.compile(r"(?:^|/)([\w.-]+)-SAE-l(\d+)\.pth?$")
_OWNERS = (("Llama-", "meta-llama"), ("DeepSeek-", "deepseek-ai"), ("Qwen", "Qwen"), ("gemma-", "google"))
_SPELLINGS = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))


@final
class Goodfire(CoderFormat):
    """ReLU autoencoders in one ``.pt`` or ``.pth`` file."""

    name = "goodfire"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every file named ``MODEL-SAE-lLAYER.pt``."""
        found = []
        for path in repository.under(folder):
            match = _FILE.search(path)
            if match:
                hookpoint = f"blocks.{match[2]}.hook_resid_post"
                found.append(Place(folder=parent(path), files=(path,), hookpoint=hookpoint))
        return tuple(found)

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what name and header say. Raises InputError or CorruptError."""
        (path,) = place.files
        header = repository.header(path)
        where = repository.where(path)
        encoder, decoder = _spelling(set(header), where)
        first = header[f"{encoder}.weight"].shape
        if len(first) != 2:
            raise CorruptError(f"{where}: {encoder}.weight has shape {list(first)}, expected [width, d_in]")
        width, d_in = first
        shapes = {
            f"{encoder}.weight": (width, d_in),
            f"{encoder}.bias": (width,),
            f"{decoder}.weight": (d_in, width),
            f"{decoder}.bias": (d_in,),
        }
        require_shapes(where, header, shapes, f"its {encoder}.weight")
        return CoderInfo(
            format=self.name,
            architecture="relu",
            path=where,
            hookpoint=place.hookpoint,
            side="output",
            target=None,
            d_in=d_in,
            d_out=d_in,
            width=width,
            k=None,
            threshold=None,
            base_model=_model(path),
            dtype=header[f"{encoder}.weight"].dtype,
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        info = self.inspect(repository, place)
        held = repository.tensors(place.files[0])
        encoder, decoder = _spelling(set(held), info.path)
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            encoder=held[f"{encoder}.weight"],
            encoder_bias=held[f"{encoder}.bias"],
            decoder=held[f"{decoder}.weight"].T.contiguous(),
            decoder_bias=held[f"{decoder}.bias"],
            activation=ReLU(),
            base_model=info.base_model,
        ).to(device, dtype)


def _spelling(names: set[str], where: str) -> tuple[str, str]:
    """Return how a file calls its two maps. Raises CorruptError."""
    for encoder, decoder in _SPELLINGS:
        if f"{encoder}.weight" in names:
            return encoder, decoder
    raise CorruptError(f"{where} lacks encoder_linear.weight; it has {', '.join(sorted(names)) or 'no tensors'}")


def _model(path: str) -> str | None:
    match = _FILE.search(path)
    name = match[1] if match else ""
    return next((f"{owner}/{name}" for start, owner in _OWNERS if name.startswith(start)), name or None)
