"""OpenAI's ``sparse_autoencoder`` of GPT-2 small: ``resid_post_mlp_v5_32k/autoencoders/6.pt`` (Gao et al., 2406.04093).

A PyTorch state dict with the name of its activation; ``TopK`` implies that inputs are layer-normed, as in that code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

from exegete.coders import weights
from exegete.coders.activations import Activation, ReLU, TopK
from exegete.coders.coder import Point
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, integer, parent, require_shapes
from exegete.coders.formats.hooks import reading
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.errors import CorruptError, InputError

if TYPE_CHECKING:
    import torch

_FILE = re.compile(r"(?:(?:^|/)([a-z_]+?)(?:_(v\d\w*))?/)?autoencoders/(\d+)\.pt$")
_TIED = "decoder.linear.weight"
_HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
}
_MODEL = "gpt2"


@final
class OpenAISae(CoderFormat):
    """ReLU and TopK autoencoders of GPT-2 small."""

    name = "openai-sae"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every ``autoencoders/N.pt``; the folder above says what it reads."""
        found = []
        for path in repository.under(folder):
            match = _FILE.search(_full(repository, path))
            if match:
                point = _point(match)
                place = Place(
                    folder=parent(path), files=(path,), hookpoint=point[0] if point else None, label=match[2] or ""
                )
                found.append(place)
        return tuple(found)

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what path, header and settings in the file say. Raises InputError or CorruptError."""
        (path,) = place.files
        where = repository.where(path)
        header = repository.header(path)
        with repository.stream(path) as stream:
            activation = _activation(weights.settings(stream, where), where)
        first = header["encoder.weight"].shape if "encoder.weight" in header else ()
        if len(first) != 2:
            names = ", ".join(sorted(header)) or "no tensors"
            raise CorruptError(f"{where} lacks encoder.weight [width, d_in]; it has {names}")
        width, d_in = first
        tied = _TIED in header and "decoder.weight" not in header
        shapes: dict[str, tuple[int, ...]] = {
            "encoder.weight": (width, d_in),
            "latent_bias": (width,),
            "pre_bias": (d_in,),
            **({_TIED: (width, d_in)} if tied else {"decoder.weight": (d_in, width)}),
        }
        require_shapes(where, header, shapes, "its encoder.weight")
        activation.check(where, width)
        match = _FILE.search(_full(repository, path))
        point = _point(match) if match else None
        return CoderInfo(
            format=self.name,
            architecture=activation.name,
            path=where,
            hookpoint=place.hookpoint,
            side=point[1] if point else "output",
            target=None,
            d_in=d_in,
            d_out=d_in,
            width=width,
            k=activation.k,
            threshold=None,
            base_model=_MODEL,
            dtype=header["encoder.weight"].dtype,
            notes=("inputs are layer-normed, reconstructions brought back",) if activation.k else (),
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        info = self.inspect(repository, place)
        held = repository.tensors(place.files[0])
        decoder = held["decoder.weight"].T.contiguous() if "decoder.weight" in held else held[_TIED]
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            encoder=held["encoder.weight"],
            encoder_bias=held["latent_bias"],
            decoder=decoder,
            decoder_bias=held["pre_bias"],
            activation=ReLU() if info.k is None else TopK(info.k),
            side=info.side,
            subtract_decoder_bias=True,
            input_norm="none" if info.k is None else "layer_norm",
            base_model=info.base_model,
        ).to(device, dtype)


def _full(repository: Repository, path: str) -> str:
    return f"{repository.name}/{path}".replace("\\", "/")


def _point(match: re.Match[str]) -> Point | None:
    """Return what the folder's name says, None where it names no location."""
    hook = _HOOKS.get(match[1] or "")
    if hook is None:
        return None
    read = reading(hook, int(match[3]), _MODEL)
    return None if read.hookpoint is None else (read.hookpoint, read.side)


def _activation(settings: Mapping[str, Any], where: str) -> Activation:
    name = settings.get("activation", "ReLU")
    if name == "ReLU":
        return ReLU()
    if name != "TopK":
        raise InputError(f"{where} has the activation {name!r}; allowed: ReLU, TopK")
    after = settings.get("activation_state_dict.postact_fn", "ReLU")
    if after != "ReLU":
        raise InputError(f"{where} applies {after!r} after TopK; allowed: ReLU")
    return TopK(integer({"k": settings.get("activation_state_dict.k")}, "k", where))
