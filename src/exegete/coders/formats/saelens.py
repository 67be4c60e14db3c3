"""SAELens's coders: ``cfg.json`` beside ``sae_weights.safetensors``, as its versions 2 to 6 write them.

A repository holds one at its root, or one in each of many folders. A folder called like a TransformerLens hook
(``blocks.8.hook_resid_pre``) is taken at its word when coders are listed, so that listing a hub repository of hundreds
does not fetch hundreds of settings; other folders' settings are read. The settings themselves have the last word when
a coder is inspected or loaded.

Weights are changed so that the coder computes the same from unchanged activations: the input scale, the decoder norms,
learnt factors, whitening, and the centring of the stream that TransformerLens does to models with LayerNorm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from exegete.coders.formats import saelens_folding, saelens_settings
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, beside, parent, require_shapes
from exegete.coders.formats.saelens_settings import CONFIG, Settings, positive
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.coders.weights import TensorInfo
from exegete.errors import CorruptError, InputError, NotFoundError

if TYPE_CHECKING:
    import torch

WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
"""Holds the input scale beside the weights of a training checkpoint."""
WHITENING = "activation_whitening.safetensors"
"""Holds mean, matrix and inverse matrix of a training checkpoint whose inputs are whitened."""
# Hooks that every model has as a module; what others stand for depends on the model, which the settings name.
_HOOK = re.compile(
    r"blocks\.\d+\.(?:hook_(?:resid_pre|resid_post|mlp_out|attn_out)|attn\.hook_z|mlp\.hook_(?:in|post))"
)
_UNNAMEABLE = re.compile(r"[^A-Za-z0-9_.@+=/-]")
_TUNING = ("finetuning_scaling_factor", "scaling_factor")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """Settings and weight header of one coder, found to fit: ``shapes`` are the tensors to load."""

    settings: Settings
    header: Mapping[str, TensorInfo]
    shapes: Mapping[str, tuple[int, ...]]


@final
class SAELens(CoderFormat):
    """Standard, gated, JumpReLU, TopK and BatchTopK autoencoders, and transcoders with or without a skip connection."""

    name = "saelens"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every folder that holds SAELens's weights, or SAELens's settings with weights missing."""
        files = repository.under(folder)
        weighed = {parent(path) for path in files if path.endswith(".safetensors")}
        places = []
        for path in files:
            here, _, file = path.rpartition("/")
            if file == WEIGHTS:
                # Llama Scope's R1 coders keep weights of this name beside a config.json of their own.
                ours = beside(here, CONFIG) in repository or beside(here, "config.json") not in repository
            else:
                ours = file == CONFIG and here not in weighed and "d_sae" in _config(repository, path)
            if ours:
                places.append(_place(repository, here))
        return _labelled(places)

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what settings and header say. Raises InputError or CorruptError."""
        checked = _check(repository, place)
        settings, kind = checked.settings, checked.settings.architecture
        hookpoint = settings.hookpoint or place.hookpoint
        activation = "jumprelu" if kind.activation == "batchtopk" else kind.activation
        return CoderInfo(
            format=self.name,
            architecture=f"{activation}{' skip' if kind.skip else ''}{' transcoder' if kind.transcoder else ''}",
            path=repository.where(place.folder),
            hookpoint=hookpoint,
            side=settings.side,
            target=settings.target,
            d_in=settings.d_in,
            d_out=settings.d_out,
            width=settings.width,
            k=settings.k,
            threshold={"jumprelu": "per latent", "batchtopk": "one for all latents"}.get(kind.activation),
            base_model=settings.base_model,
            dtype=checked.header["W_enc"].dtype,
            notes=(*_differing(place, settings), *settings.notes, *saelens_folding.notes(settings)),
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        checked = _check(repository, place)
        settings = checked.settings
        tensors = repository.tensors(place.files[1], tuple(checked.shapes))
        whitening = None
        if settings.norm == "covariance_whitening":
            whitening = repository.tensors(beside(place.folder, WHITENING), tuple(_whitening_shapes(settings)))
        parts = saelens_folding.fold(settings, tensors, whitening, repository.where(place.files[1]))
        if hookpoint == place.hookpoint and settings.hookpoint is not None:
            hookpoint = settings.hookpoint
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            encoder=parts.encoder,
            encoder_bias=parts.encoder_bias,
            decoder=parts.decoder,
            decoder_bias=parts.decoder_bias,
            activation=parts.activation,
            side=settings.side,
            target=settings.target,
            subtract_decoder_bias=settings.subtract,
            input_norm=settings.input_norm,
            norm_epsilon=settings.norm_epsilon,
            skip=parts.skip,
            base_model=settings.base_model,
        ).to(device, dtype)


def _config(repository: Repository, path: str) -> Mapping[str, Any]:
    """Return settings, empty ones where the file is damaged or something else: listing coders never fails."""
    try:
        found = repository.json(path)
    except (CorruptError, InputError):
        return {}
    return found if isinstance(found, dict) else {}


def _place(repository: Repository, folder: str) -> Place:
    last = folder.rpartition("/")[2]
    files = (beside(folder, CONFIG), beside(folder, WEIGHTS))
    hookpoint = last if _HOOK.fullmatch(last) else saelens_settings.place_hookpoint(_config(repository, files[0]))
    return Place(folder=folder, files=files, hookpoint=hookpoint)


def _labelled(places: Sequence[Place]) -> tuple[Place, ...]:
    """Tell the coders of one hookpoint apart by their folders, without a last part that is the hookpoint itself."""
    shared: dict[str | None, list[Place]] = {}
    for place in places:
        shared.setdefault(place.hookpoint, []).append(place)
    labels: dict[str, str] = {}
    for hookpoint, group in shared.items():
        if len(group) > 1:
            whole = [place.folder for place in group]
            short = [parent(folder) if folder.rpartition("/")[2] == hookpoint else folder for folder in whole]
            chosen = short if len(set(short)) == len(short) else whole
            labels.update(zip(whole, (_UNNAMEABLE.sub("_", label) for label in chosen), strict=True))
    return tuple(replace(place, label=labels.get(place.folder, "")) for place in places)


def _check(repository: Repository, place: Place) -> _Checked:
    """Return the settings and header of one coder once they fit. Raises InputError or CorruptError."""
    config_path, weights = place.files
    where = repository.where(config_path)
    if config_path not in repository:
        raise NotFoundError(f"there is no {where}, only {WEIGHTS}; copy the settings as well")
    settings = saelens_settings.parse(repository.settings(config_path), where)
    if weights not in repository:
        raise NotFoundError(f"there is no {repository.where(weights)}, only its {CONFIG}; copy the weights as well")
    header = repository.header(weights)
    # Before version 6 files may hold factors that nobody trained, or ask for factors that they do not hold.
    settings = replace(settings, tuned=settings.tuned and any(name in header for name in _TUNING))
    shapes = _shapes(settings, header)
    require_shapes(repository.where(weights), header, shapes, f"its {CONFIG}")
    if settings.k is not None and settings.k > settings.width:
        raise InputError(f"{where} has k = {settings.k}; it must lie between 1 and its width {settings.width}")
    if settings.centred and settings.norm == "constant_norm_rescale":
        raise InputError(f"{where} has centred writing weights and constant_norm_rescale, which are not read together")
    if settings.norm == "covariance_whitening":
        _check_whitening(repository, place, settings)
    if settings.norm == "expected_average_only_in" and settings.scale is None:
        settings = replace(settings, scale=_checkpoint_scale(repository, place))
    return _Checked(settings=settings, header=header, shapes=shapes)


def _shapes(settings: Settings, header: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that coders of these settings have."""
    width, kind = settings.width, settings.architecture
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (settings.d_in, width),
        "W_dec": (width, settings.d_out),
        "b_dec": (settings.d_out,),
    }
    rows = ["b_enc"]
    if kind.activation == "gated":
        rows = ["b_gate", "b_mag", "r_mag"]
    elif kind.activation == "jumprelu":
        rows.append("log_threshold" if "log_threshold" in header and "threshold" not in header else "threshold")
    elif kind.activation == "batchtopk":
        shapes["topk_threshold"] = ()
    if kind.skip:
        shapes["W_skip"] = (settings.d_out, settings.d_in)
    rows += [name for name in _TUNING if name in header][:1]
    return {**shapes, **dict.fromkeys(rows, (width,))}


def _checkpoint_scale(repository: Repository, place: Place) -> float:
    path = beside(place.folder, SCALER)
    if path not in repository:
        raise InputError(
            f"{repository.where(place.files[0])} has normalize_activations expected_average_only_in and no "
            f"norm_scaling_factor; add that number (√d_in / mean norm of the activations), or set "
            f"normalize_activations to none if the weights hold it already"
        )
    return positive(repository.settings(path).get("scaling_factor"), "scaling_factor", repository.where(path))


def _whitening_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    d = settings.d_in
    return {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}


def _check_whitening(repository: Repository, place: Place, settings: Settings) -> None:
    path = beside(place.folder, WHITENING)
    if path not in repository:
        raise NotFoundError(
            f"there is no {repository.where(path)}, which holds the whitening that {place.files[0]} asks for"
        )
    require_shapes(repository.where(path), repository.header(path), _whitening_shapes(settings), f"its {CONFIG}")


def _differing(place: Place, settings: Settings) -> tuple[str, ...]:
    named = settings.hookpoint
    if named is None or place.hookpoint in (None, named):
        return ()
    return (f"its folder is called {place.hookpoint} and its {CONFIG} says {named}, which is believed",)
