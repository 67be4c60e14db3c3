"""Google DeepMind's Gemma Scope 2: ``resid_post/layer_9_width_16k_l0_medium/params.safetensors`` with ``config.json``.

Settings name what is read as Hugging Face modules; where a repository has none, the folder's name says as much. The
affine skip connection of transcoders is applied as x · A, as in the authors' tutorial; readers have disagreed about
that, so the coder is marked for ``orientation.oriented`` to check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from exegete.coders.activations import JumpReLU
from exegete.coders.coder import Point
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, beside, flag, parent, require_shapes, text
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.errors import CorruptError, InputError, NotFoundError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
WEIGHTS = "params.safetensors"
_SKIP = "affine_skip_connection"
_FOLDER = re.compile(r"(?:^|/)(?:([a-z_]+)/)?layer_(\d+)_(width_\w+?_l0_\w+)$")
_REPOSITORY = re.compile(r"gemma-scope-2-(\w+)-(pt|it)")
_HOOK = re.compile(r"^(?:.*\.)?(layers\.\d+(?:\.\w+)*)\.(input|output)$")
_MANY_LAYERS = re.compile(r"(?:^|/)(clt|crosscoder)\w*(?=/|$)")
_NORMED = "layers.{}.post_feedforward_layernorm"
_NOTE = f"{_SKIP} is applied as x · A; whether its file holds A or its transpose is checked on real activations"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """Where a coder reads and what it predicts (None: the same)."""

    point: Point
    target: Point | None


@final
class GemmaScope2(CoderFormat):
    """JumpReLU autoencoders and transcoders of Gemma 3, with or without a skip connection."""

    name = "gemma-scope-2"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every coder's folder, by name; cross-layer coders, which are refused, only where nothing else is."""
        files = repository.under(folder)
        found: dict[str, Place] = {}
        several: dict[str, Place] = {}
        for path in files:
            here, _, file = path.rpartition("/")
            if file.endswith(".safetensors") and _many_layers(repository, here) and _is_ours(repository, path):
                several.setdefault(here, Place(folder=here, files=(path,), hookpoint=None))
            elif file in (CONFIG, WEIGHTS) and (match := _FOLDER.search(_full(repository, here))):
                site = _named_site(match[1], int(match[2]))
                label = "/".join(part for part in (match[1], match[3]) if part)
                place = Place(
                    folder=here,
                    files=(beside(here, CONFIG), beside(here, WEIGHTS)),
                    hookpoint=site.point[0] if site else self._hookpoint(repository, beside(here, CONFIG)),
                    label=label,
                )
                found.setdefault(here, place)
        return tuple((found or several).values())

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what settings, folder name and header say. Raises InputError or CorruptError."""
        if len(place.files) == 1:
            raise InputError(
                f"{repository.where(place.folder)} holds a coder across layers; only those of one layer can be read, "
                "such as transcoder_all"
            )
        config_path, weights = place.files
        if weights not in repository:
            raise NotFoundError(f"there is no {repository.where(weights)}, only its {CONFIG}; copy the weights as well")
        config = self._config(repository, place)
        where = repository.where(weights)
        site = _site(config, repository, place)
        header = repository.header(weights)
        first = header["w_enc"].shape if "w_enc" in header else ()
        if len(first) != 2:
            raise CorruptError(f"{where} lacks w_enc [d_in, width]; it has {', '.join(sorted(header)) or 'nothing'}")
        d_in, width = first
        d_out = _last(header, "w_dec", d_in) if site.target else d_in
        skip = flag(config, "affine_connection", repository.where(config_path), _SKIP in header)
        if skip != (_SKIP in header):
            raise CorruptError(f"{where} and its {CONFIG} disagree about {_SKIP}")
        shapes: dict[str, tuple[int, ...]] = {
            "w_enc": (d_in, width),
            "w_dec": (width, d_out),
            "b_enc": (width,),
            "b_dec": (d_out,),
            "threshold": (width,),
            **({_SKIP: (d_in, d_out)} if skip else {}),
        }
        require_shapes(where, header, shapes, "its w_enc")
        return CoderInfo(
            format=self.name,
            architecture=f"jumprelu{' skip' if skip else ''}{' transcoder' if site.target else ''}",
            path=repository.where(place.folder),
            hookpoint=site.point[0],
            side=site.point[1],
            target=site.target,
            d_in=d_in,
            d_out=d_out,
            width=width,
            k=None,
            threshold="per latent",
            base_model=_base_model(config, repository, place),
            dtype=header["w_enc"].dtype,
            notes=(_NOTE,) if skip else (),
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        info = self.inspect(repository, place)
        skip = " skip" in info.architecture
        names = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold", *((_SKIP,) if skip else ()))
        held = repository.tensors(place.files[1], names)
        return LinearCoder(
            name=name,
            hookpoint=(info.hookpoint or hookpoint) if hookpoint == place.hookpoint else hookpoint,
            encoder=held["w_enc"].T.contiguous(),
            encoder_bias=held["b_enc"],
            decoder=held["w_dec"],
            decoder_bias=held["b_dec"],
            activation=JumpReLU(held["threshold"]),
            side=info.side,
            target=info.target,
            skip=held[_SKIP].T.contiguous() if skip else None,
            skip_undecided=skip and info.d_in == info.d_out,
            base_model=info.base_model,
        ).to(device, dtype)

    def _config(self, repository: Repository, place: Place) -> Mapping[str, Any]:
        path = place.files[0]
        config = repository.settings(path) if path in repository else {}
        architecture = text(config, "architecture", repository.where(path), "jump_relu")
        if architecture != "jump_relu":
            raise InputError(f"{repository.where(path)} has the architecture {architecture!r}; allowed: jump_relu")
        return config

    def _hookpoint(self, repository: Repository, path: str) -> str | None:
        """Return what settings name where the folder's name does not say it."""
        try:
            config = repository.settings(path)
        except (CorruptError, NotFoundError):
            return None
        match = _HOOK.match(str(config.get("hf_hook_point_in")))
        return match[1] if match else None


def _full(repository: Repository, folder: str) -> str:
    return f"{repository.name}/{folder}".replace("\\", "/").rstrip("/")


def _many_layers(repository: Repository, folder: str) -> bool:
    return bool(_MANY_LAYERS.search(folder or _full(repository, folder)))


def _is_ours(repository: Repository, path: str) -> bool:
    """Tell whether a coder across layers is Gemma Scope 2's: other formats have such folders too."""
    return bool(_REPOSITORY.search(_full(repository, path))) or path.rpartition("/")[2].startswith("params")


def _named_site(kind: str | None, layer: int) -> _Site | None:
    """Return what the name of the folder above says."""
    kind = (kind or "").removesuffix("_all")
    points: dict[str, _Site] = {
        "resid_post": _Site(point=(f"layers.{layer}", "output"), target=None),
        "attn_out": _Site(point=(f"layers.{layer}.self_attn.o_proj", "input"), target=None),
        "mlp_out": _Site(point=(_NORMED.format(layer), "output"), target=None),
        "transcoder": _Site(
            point=(f"layers.{layer}.pre_feedforward_layernorm", "output"), target=(_NORMED.format(layer), "output")
        ),
    }
    return points.get(kind)


def _site(config: Mapping[str, Any], repository: Repository, place: Place) -> _Site:
    """Return what settings say, else what the folder's name says; their layers must agree."""
    where = repository.where(place.files[0])
    match = _FOLDER.search(_full(repository, place.folder))
    named = _named_site(match[1], int(match[2])) if match else None
    read = text(config, "hf_hook_point_in", where)
    if read is None:
        if named is None:
            raise InputError(f"{where} does not say where the coder reads (hf_hook_point_in), nor does its folder")
        return named
    predicted = text(config, "hf_hook_point_out", where)
    point, target = _point(read, where), None if predicted is None else _point(predicted, where)
    if match and f"layers.{match[2]}" != ".".join(point[0].split(".")[:2]):
        raise InputError(f"{where} reads {read!r}, but its folder is of layer {match[2]}; which is it?")
    return _Site(point=point, target=None if target == point else target)


def _point(hook: str, where: str) -> Point:
    match = _HOOK.match(hook)
    if not match:
        raise InputError(f"{where} names the hook {hook!r}; understood are names such as model.layers.9.output")
    return match[1], "input" if match[2] == "input" else "output"


def _last(header: Mapping[str, Any], name: str, default: int) -> int:
    return int(header[name].shape[-1]) if name in header and header[name].shape else default


def _base_model(config: Mapping[str, Any], repository: Repository, place: Place) -> str | None:
    """Return the model's name on the hub: settings spell it ``gemma-v3-4b-pt``, and the smallest has no ``-pt``."""
    name = config.get("model_name")
    if not isinstance(name, str):
        match = _REPOSITORY.search(_full(repository, parent(place.folder)))
        if not match:
            return None
        name = f"gemma-3-{match[1]}-{match[2]}"
    name = name.rpartition("/")[2].replace("-v3", "-3")
    return f"google/{name.removesuffix('-pt') if '270m' in name else name}"
