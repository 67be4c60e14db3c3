"""Checkpoints of saprmarks' dictionary_learning: ``trainer_i/ae.pt`` beside ``config.json``, and ``checkpoints/``.

Its seven classes are told apart by the names of their tensors, which settle the matter more often than ``config.json``
does (some of its trainers name the wrong class there). Each fires as its own ``encode`` does when called without
options. Scales of training are in the weights already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from exegete.coders.activations import Activation, Gated, JumpReLU, ReLU, TopK
from exegete.coders.coder import Point
from exegete.coders.formats.format import (
    CoderFormat,
    CoderInfo,
    Place,
    beside,
    integer,
    module_name,
    parent,
    require_shapes,
    text,
)
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.coders.weights import TensorInfo
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.types import Side

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
WEIGHTS = "ae.pt"
_TRAINER = re.compile(r"trainer_\d+")
_STEP = re.compile(r"(?:^|/)checkpoints/ae_(\d+)\.pt$")
_NAMED = re.compile(r"(resid_post|resid_out|resid_pre|mlp_out|attn_out)_layer_?(\d+)")
_HOOKS = {
    "resid_post": "hook_resid_post",
    "resid_out": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}
_TRANSCODER = " transcoder"
_UNNAMEABLE = re.compile(r"[^A-Za-z0-9_.@+=/-]")
_LINEAR = {"encoder.weight": "nd", "encoder.bias": "n", "decoder.weight": "dn"}
_PLAIN = {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d"}
_TRAINED = "fires above one threshold learnt in training; where that was never set (−1), every positive latent fires"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """One class of the library: its tensors by shape (n latents, d dimensions), and what it is here.

    ``marked`` is a tensor that is not read but tells the class, ``spare`` are others that may be there.
    """

    tensors: Mapping[str, str]
    architecture: str
    subtract: bool
    marked: str = ""
    spare: frozenset[str] = frozenset()
    needs_k: bool = False
    threshold: str | None = None
    notes: tuple[str, ...] = ()

    def holds(self, header: Mapping[str, TensorInfo]) -> bool:
        """Whether a file's tensors are this class's: all that are read, its mark, and no others than spare ones."""
        own = self.tensors.keys() | ({self.marked} if self.marked else set())
        return own <= header.keys() <= own | self.spare


_CLASSES = {
    "AutoEncoder": _Class(
        tensors={**_LINEAR, "bias": "d"},
        architecture="relu",
        subtract=True,
        notes=("decoder directions are scaled to length 1, and the values with them, as the library does on loading",),
    ),
    "AutoEncoderNew": _Class(tensors={**_LINEAR, "decoder.bias": "d"}, architecture="relu", subtract=False),
    "GatedAutoEncoder": _Class(
        tensors={
            "encoder.weight": "nd",
            "decoder.weight": "dn",
            "decoder_bias": "d",
            "r_mag": "n",
            "gate_bias": "n",
            "mag_bias": "n",
        },
        architecture="gated",
        subtract=True,
    ),
    "AutoEncoderTopK": _Class(
        tensors={**_LINEAR, "b_dec": "d"},
        architecture="topk",
        subtract=True,
        spare=frozenset({"k", "threshold"}),
        needs_k=True,
    ),
    "BatchTopKSAE": _Class(
        tensors={**_LINEAR, "b_dec": "d", "threshold": ""},
        architecture="jumprelu",
        subtract=True,
        marked="k",
        threshold="one for all latents",
        notes=(_TRAINED,),
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        tensors={**_PLAIN, "threshold": ""},
        architecture="jumprelu",
        subtract=True,
        marked="group_sizes",
        spare=frozenset({"k"}),
        threshold="one for all latents",
        notes=(_TRAINED,),
    ),
    "JumpReluAutoEncoder": _Class(
        tensors={**_PLAIN, "threshold": "n"}, architecture="jumprelu", subtract=False, threshold="per latent"
    ),
}


_CONFUSED = {"AutoEncoder", "AutoEncoderNew"}
"""The library's StandardTrainer writes the first name for either."""


@final
class DictionaryLearning(CoderFormat):
    """AutoEncoder, AutoEncoderNew, Gated, TopK, BatchTopK, Matryoshka and JumpReLU coders of dictionary_learning."""

    name = "dictionary_learning"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every ``ae.pt``; intermediate checkpoints where a trainer has nothing else or they are asked for."""
        files = repository.under(folder)
        found = {path: _place(repository, path) for path in files if path.rpartition("/")[2] == WEIGHTS}
        for path in files:
            step = _STEP.search(path)
            asked = folder.rpartition("/")[2] == "checkpoints"
            if step and (asked or beside(_trainer(path), WEIGHTS) not in repository):
                found[path] = _place(repository, path, step[1])
        stepped = {_trainer(path) for path in found}
        for path in files:
            here = parent(path)
            if path.rpartition("/")[2] == CONFIG and here not in stepped and _ours(repository, path):
                found[beside(here, WEIGHTS)] = _place(repository, beside(here, WEIGHTS))
        return tuple(found.values())

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what settings and header say. Raises InputError or CorruptError."""
        return self._looked(repository, place)[0]

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        info, kind, header = self._looked(repository, place)
        where = repository.where(place.files[1])
        extra = ("k",) if info.k is not None and "k" in header else ()
        tensors = repository.tensors(place.files[1], (*_CLASSES[kind].tensors, *extra))
        if extra and int(tensors["k"]) != info.k:
            raise CorruptError(f"{where} has k = {int(tensors['k'])}, its {CONFIG} says {info.k}")
        target: Point | None = None
        if info.architecture.endswith(_TRANSCODER):
            target = info.target if info.target and hookpoint == info.hookpoint else (hookpoint, "output")
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            side=info.side,
            target=target,
            subtract_decoder_bias=_CLASSES[kind].subtract,
            base_model=info.base_model,
            **_PARTS[kind](tensors, info.k),
        ).to(device, dtype)

    def _looked(self, repository: Repository, place: Place) -> tuple[CoderInfo, str, Mapping[str, TensorInfo]]:
        """Return what is known of a coder, its class, and its weight file's header."""
        path, weights = place.files
        settings, where = repository.where(path), repository.where(weights)
        if weights not in repository:
            raise NotFoundError(f"there is no {where}, only its {CONFIG}; copy the weights as well")
        config, io = _settings(repository, path, "trainer"), _io(repository, path)
        header = repository.header(weights)
        kind = _class_of(header, config, where, settings)
        chosen = _CLASSES[kind]
        width, d = _sizes(header, chosen, where)
        shapes = {n: tuple({"n": width, "d": d}[c] for c in spelled) for n, spelled in chosen.tensors.items()}
        require_shapes(where, header, shapes, f"a {kind} of {width} latents and {d} dimensions")
        for setting, size in (("dict_size", width), ("activation_dim", d)):
            if integer(config, setting, settings, size) != size:
                raise CorruptError(f"{where} has {setting} {size}, its {CONFIG} says {config[setting]}")
        k = integer(config, "k", settings) if chosen.needs_k else None
        if k is not None:
            TopK(k).check(where, width)
        notes = chosen.notes
        if config.get("dict_class", kind) != kind:
            notes = (*notes, f"its {CONFIG} calls it {config['dict_class']}; its tensors are those of {kind}")
        hookpoint, side, target = _reads(_submodule(repository, path), io)
        info = CoderInfo(
            format=self.name,
            architecture=f"{chosen.architecture}{_TRANSCODER if io == 'in_and_out' else ''}",
            path=where,
            hookpoint=hookpoint,
            side=side,
            target=target,
            d_in=d,
            d_out=d,
            width=width,
            k=k,
            threshold=chosen.threshold,
            base_model=text(config, "lm_name", settings),
            dtype=header[next(iter(chosen.tensors))].dtype,
            notes=notes,
        )
        return info, kind, header


def _auto_encoder(t: Mapping[str, torch.Tensor], k: int | None) -> dict[str, Any]:
    """Scale decoder directions to length 1 and encoder rows and biases by the lengths, as the library on loading."""
    import torch

    norms = t["decoder.weight"].float().norm(dim=0)
    norms = torch.where(norms > 0, norms, 1.0)
    return {
        "encoder": t["encoder.weight"] * norms[:, None],
        "encoder_bias": t["encoder.bias"] * norms,
        "decoder": (t["decoder.weight"] / norms).T.contiguous(),
        "decoder_bias": t["bias"],
        "activation": ReLU(),
    }


def _linear(t: Mapping[str, torch.Tensor], bias: str, activation: Activation) -> dict[str, Any]:
    return {
        "encoder": t["encoder.weight"],
        "encoder_bias": t["encoder.bias"],
        "decoder": t["decoder.weight"].T.contiguous(),
        "decoder_bias": t[bias],
        "activation": activation,
    }


def _plain(t: Mapping[str, torch.Tensor], threshold: torch.Tensor) -> dict[str, Any]:
    return {
        "encoder": t["W_enc"].T.contiguous(),
        "encoder_bias": t["b_enc"],
        "decoder": t["W_dec"],
        "decoder_bias": t["b_dec"],
        "activation": JumpReLU(threshold),
    }


def _gated(t: Mapping[str, torch.Tensor], k: int | None) -> dict[str, Any]:
    import torch

    return {
        "encoder": t["encoder.weight"],
        "encoder_bias": torch.zeros_like(t["gate_bias"]),
        "decoder": t["decoder.weight"].T.contiguous(),
        "decoder_bias": t["decoder_bias"],
        "activation": Gated(t["gate_bias"], t["r_mag"].exp(), t["mag_bias"]),
    }


def _shared(t: Mapping[str, torch.Tensor], like: str) -> torch.Tensor:
    """Return the one threshold for every latent; −1, which is none, lets every positive latent fire."""
    return t["threshold"].to(t[like].dtype).expand(len(t[like])).contiguous()


_PARTS: dict[str, Callable[[Mapping[str, torch.Tensor], int | None], dict[str, Any]]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": lambda t, k: _linear(t, "decoder.bias", ReLU()),
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": lambda t, k: _linear(t, "b_dec", TopK(k or 0)),
    "BatchTopKSAE": lambda t, k: _linear(t, "b_dec", JumpReLU(_shared(t, "encoder.bias"))),
    "MatryoshkaBatchTopKSAE": lambda t, k: _plain(t, _shared(t, "b_enc")),
    "JumpReluAutoEncoder": lambda t, k: _plain(t, t["threshold"]),
}


def _class_of(header: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str, settings: str) -> str:
    """Return the class whose tensors a file holds; where two have the same, the one that the settings name."""
    fits = [n for n, c in _CLASSES.items() if c.holds(header)]
    said = text(config, "dict_class", settings)
    if said is not None and said not in _CLASSES:
        raise InputError(f"{settings} has the dict_class {said!r}; known: {', '.join(_CLASSES)}")
    if said in fits:
        return said
    if not fits or (said is not None and {said, *fits} != _CONFUSED):
        wanted = "any coder of dictionary_learning" if said is None else f"the {said} that {settings} says it is"
        held = ", ".join(sorted(header)) or "no tensors"
        raise CorruptError(f"{where} does not hold the tensors of {wanted}; it holds {held}")
    if len(fits) > 1 or (_CLASSES[fits[0]].needs_k and "k" not in config):
        raise InputError(
            f"{where} could be a coder of the class {' or '.join(fits)}: its {CONFIG} must say which (dict_class) and "
            f"with which k; copy {settings} as well"
        )
    return fits[0]


def _sizes(header: Mapping[str, TensorInfo], chosen: _Class, where: str) -> tuple[int, int]:
    """Return width and d from the encoder's shape."""
    first, spelled = next(iter(chosen.tensors.items()))
    shape = header[first].shape
    if len(shape) != 2 or 0 in shape:
        raise CorruptError(f"{where}: {first} has shape {list(shape)}, which is no encoder's")
    return (shape[0], shape[1]) if spelled == "nd" else (shape[1], shape[0])


def _settings(repository: Repository, path: str, part: str) -> Mapping[str, Any]:
    if path not in repository:
        return {}
    held = repository.settings(path).get(part, {})
    if not isinstance(held, dict):
        raise CorruptError(f"{repository.where(path)} holds {part} as something else than settings")
    return held


def _io(repository: Repository, path: str) -> str:
    """Return which side of its module the coder was trained on: ``in``, ``out``, or ``in_and_out``, a transcoder."""
    said = _settings(repository, path, "buffer").get("io", "out")
    if said not in ("in", "out", "in_and_out"):
        raise InputError(f"{repository.where(path)} has io {said!r}; allowed: in, out, in_and_out")
    return str(said)


def _reads(named: str | None, io: str) -> tuple[str | None, Side, Point | None]:
    """Return hookpoint, side and target of what the settings name, as far as they are sure."""
    side: Side = "output" if io == "out" else "input"
    match = _NAMED.fullmatch(named) if named else None
    if match is None:
        return named, side, (named, "output") if named and io == "in_and_out" else None
    kind, layer = match[1], match[2]
    out = f"blocks.{layer}.{_HOOKS[kind]}"
    if io == "out":
        return out, "output", None
    # The input of a whole layer or of an MLP has a name; that of an attention block depends on the model.
    into = {"resid_post": "hook_resid_pre", "resid_out": "hook_resid_pre", "mlp_out": "mlp.hook_in"}.get(kind)
    if into is None:
        return None, "input", None
    point = f"blocks.{layer}.{into}"
    return point, "input", (out, "output") if io == "in_and_out" else None


def _trainer(path: str) -> str:
    """Return the folder that the settings of a weight file lie in."""
    here = parent(path)
    return parent(here) if _STEP.search(path) else here


def _ours(repository: Repository, path: str) -> bool:
    """Tell whether settings without weights beside them are this library's."""
    here = parent(path) or repository.name.replace("\\", "/")
    if not _TRAINER.fullmatch(here.rpartition("/")[2]):
        return False
    try:
        config = repository.json(path)
    except CorruptError:
        return False
    trainer = config.get("trainer") if isinstance(config, dict) else None
    return isinstance(trainer, dict) and ("dict_class" in trainer or "trainer_class" in trainer)


def _place(repository: Repository, path: str, step: str = "") -> Place:
    folder = _trainer(path)
    config = beside(folder, CONFIG)
    try:
        named, io = _submodule(repository, config), _io(repository, config)
    except (CorruptError, InputError):
        named, io = None, "out"  # inspecting says what is wrong with them
    parts = [part for part in folder.split("/") if part and part != named]
    label = _UNNAMEABLE.sub("_", "/".join([*parts, *([f"step_{step}"] if step else [])]))
    return Place(folder=parent(path), files=(config, path), hookpoint=_reads(named, io)[0], label=label)


def _submodule(repository: Repository, config: str) -> str | None:
    """Return the submodule that settings or else folders name, where it is one whose meaning is sure."""
    said = _settings(repository, config, "trainer").get("submodule_name")
    names = [said] if isinstance(said, str) else reversed(parent(config).split("/"))
    return next((n for n in names if _NAMED.fullmatch(n) or module_name(n) == n), None)
