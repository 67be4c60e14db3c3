"""EleutherAI's sparsify checkpoints: ``cfg.json`` beside ``sae.safetensors``.

A folder is one coder, or holds a folder per hookpoint, each of which is a coder or holds ``seed0``, ``seed1`` …
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

from exegete.coders.activations import Activation, GroupMax, TopK
from exegete.coders.formats.format import (
    SEED,
    CoderFormat,
    CoderInfo,
    Place,
    beside,
    flag,
    integer,
    module_name,
    parent,
    require_shapes,
)
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import LocalRepository, Repository
from exegete.coders.weights import SUFFIXES
from exegete.errors import CorruptError, InputError, NotFoundError

if TYPE_CHECKING:
    import torch

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
RUN_CONFIG = "config.json"
_ACTIVATIONS = {"topk": TopK, "groupmax": GroupMax}


@final
class Sparsify(CoderFormat):
    """TopK and groupmax autoencoders and transcoders, with or without a skip connection."""

    name = "sparsify"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every folder that holds sparsify's settings and weights, or either when surely its own."""
        found = []
        files = repository.under(folder)
        held = Counter(parent(path) for path in files if path.endswith((*SUFFIXES, ".json", ".yaml", ".yml")))
        for path in files:
            here, _, file = path.rpartition("/")
            paired = file == CONFIG and beside(here, WEIGHTS) in repository
            alone = file in (CONFIG, WEIGHTS) and held[here] == 1
            if paired or (alone and self._ours(repository, path)):
                found.append(_place(here, repository))
        return tuple(found)

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what settings and header say. Raises InputError or CorruptError."""
        config_path, weights = place.files
        where = repository.where(config_path)
        if config_path not in repository:
            raise NotFoundError(f"there is no {where}, only its {WEIGHTS}; copy the settings as well")
        config = repository.settings(config_path)
        if weights not in repository:
            raise NotFoundError(f"there is no {repository.where(weights)}, only its {CONFIG}; copy the weights as well")
        width, d_in = integer(config, "num_latents", where, 0, least=0), integer(config, "d_in", where)
        width = width or d_in * integer(config, "expansion_factor", where, 32)
        transcode, skip = flag(config, "transcode", where), flag(config, "skip_connection", where)
        activation = _activation(config, where, width)
        header = repository.header(weights)
        shapes: dict[str, tuple[int, ...]] = {
            "encoder.weight": (width, d_in),
            "encoder.bias": (width,),
            "W_dec": (width, d_in),
            "b_dec": (d_in,),
            **({"W_skip": (d_in, d_in)} if skip else {}),
        }
        require_shapes(repository.where(weights), header, shapes, f"its {CONFIG}")
        hookpoint = place.hookpoint
        return CoderInfo(
            format=self.name,
            architecture=f"{activation.name}{' skip' if skip else ''}{' transcoder' if transcode else ''}",
            path=repository.where(place.folder),
            hookpoint=hookpoint,
            side="input" if transcode else "output",
            target=(hookpoint, "output") if transcode and hookpoint else None,
            d_in=d_in,
            d_out=d_in,
            width=width,
            k=activation.k,
            threshold=None,
            base_model=trained_on(repository, place.folder),
            dtype=header["encoder.weight"].dtype,
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        info = self.inspect(repository, place)
        config = repository.settings(place.files[0])
        transcode, skip = info.side == "input", " skip" in info.architecture
        names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *(("W_skip",) if skip else ()))
        tensors = repository.tensors(place.files[1], names)
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            encoder=tensors["encoder.weight"],
            encoder_bias=tensors["encoder.bias"],
            decoder=tensors["W_dec"],
            decoder_bias=tensors["b_dec"],
            activation=_activation(config, repository.where(place.files[0]), info.width),
            side=info.side,
            target=(hookpoint, "output") if transcode else None,
            subtract_decoder_bias=not transcode,
            skip=tensors.get("W_skip"),
            base_model=info.base_model,
        ).to(device, dtype)

    def _ours(self, repository: Repository, path: str) -> bool:
        """Tell whether settings without weights, or weights without settings, are sparsify's."""
        try:
            if path.endswith(WEIGHTS):
                return {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} <= repository.header(path).keys()
            config = repository.json(path)
        except (CorruptError, NotFoundError):
            return False
        if not isinstance(config, dict) or "d_in" not in config or "d_sae" in config:
            return False
        return "expansion_factor" in config or "num_latents" in config


def trained_on(repository: Repository, folder: str) -> str | None:
    """Return the model that the run's ``config.json`` says its coders were trained on, None when it says nothing."""
    try:
        settings = _run_settings(repository, folder)
    except (CorruptError, NotFoundError):
        return None
    model = settings.get("model") if isinstance(settings, dict) and "sae" in settings else None
    return model if isinstance(model, str) else None


def _run_settings(repository: Repository, folder: str) -> Any:
    """Return the ``config.json`` of a coder's folder or of one of the two above it, even above a local repository."""
    for above in range(3):
        path = beside(folder, RUN_CONFIG)
        if path in repository:
            return repository.json(path)
        if not folder:
            return repository.json_above(RUN_CONFIG, 2 - above) if isinstance(repository, LocalRepository) else None
        folder = parent(folder)
    return None


def _place(folder: str, repository: Repository) -> Place:
    whole = repository.where(folder).rstrip("/")
    seeded = SEED.fullmatch(whole.rpartition("/")[2])
    label = whole.rpartition("/")[2] if seeded else ""
    named = parent(folder) if seeded else folder
    files = (beside(folder, CONFIG), beside(folder, WEIGHTS))
    hookpoint = module_name(parent(whole) if seeded else whole)
    if hookpoint is None and named:
        hookpoint = named.rpartition("/")[2]  # a coder in a folder of its own is named after it, whatever it is called
    return Place(folder=folder, files=files, hookpoint=hookpoint, label=label)


def _activation(config: Mapping[str, Any], where: str, width: int) -> Activation:
    name = config.get("activation", "topk")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise InputError(f"{where} has the activation {reprlib.repr(name)}; allowed: {', '.join(_ACTIVATIONS)}")
    activation: Activation = _ACTIVATIONS[name](integer(config, "k", where, 32))
    activation.check(where, width)
    return activation
