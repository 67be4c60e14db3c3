"""Llama Scope (He et al., arXiv 2410.20526) and its coders of the R1 distillation, as OpenMOSS's library writes them.

``Llama3_1-8B-Base-L15R-8x/{hyperparams.json, checkpoints/final.safetensors}`` or ``L15R/{config.json,
sae_weights.safetensors}``. They were trained on activations scaled by √d over the mean norm of the data; the scales of
input and output are folded into the weights, so that latents keep the values they had in training.

One threshold for all latents (``jump_relu_threshold``) was set on the folded coder: it is compared with a latent's
contribution in the output's own scale, its value times the norm of its decoder row where
``sparsity_include_decoder_norm`` says so. Thresholds per latent (``log_jumprelu_threshold``) are in training's scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from exegete.coders.activations import Activation, JumpReLU, ReLU
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, beside, flag, integer, require_shapes, text
from exegete.coders.formats.hooks import Reading, lens_reading
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.coders.weights import TensorInfo
from exegete.errors import CorruptError, InputError, NotFoundError

if TYPE_CHECKING:
    import torch

_LAYOUTS = {"hyperparams.json": "checkpoints/final.safetensors", "config.json": "sae_weights.safetensors"}
_NORM = "dataset_average_activation_norm"
_LOG_THRESHOLD = "log_jumprelu_threshold"
_SHORT = re.compile(r"(?:^|/)L\d+(?:R|A|M|TC)$")
_FACTOR = re.compile(r"-L\d+(?:R|A|M|TC)-(\d+x)$")
_MODELS = (("R1-Distill", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"), ("Llama3_1-8B", "meta-llama/Llama-3.1-8B"))
_FOLDED = "the scales of input and output are folded into the weights"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What settings and header say of one coder. ``norms`` are the mean norms of input and output, None without."""

    info: CoderInfo
    read: Reading
    norms: tuple[float, float] | None
    log_threshold: str | None
    include_norm: bool
    relu: bool
    bias: bool
    subtract: bool
    threshold: float


@final
class LlamaScope(CoderFormat):
    """JumpReLU autoencoders and transcoders of Llama 3.1 8B."""

    name = "llama-scope"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every coder's folder; its small settings file says what it reads."""
        found: dict[str, Place] = {}
        for path in repository.under(folder):
            here, _, file = path.rpartition("/")
            if file == "final.safetensors" and here.rpartition("/")[2] == "checkpoints":
                here, file = here.rpartition("/")[0], "hyperparams.json"
                lost = beside(here, file) not in repository and bool(_FACTOR.search(_full(repository, here)))
            else:
                lost = False
            config = self._ours(repository, here, file)
            if lost or config:
                hook = _hookpoint(config or {}, _model(repository, here))
                files = (beside(here, file), beside(here, _LAYOUTS[file]))
                found.setdefault(here, Place(folder=here, files=files, hookpoint=hook, label=_label(repository, here)))
        return tuple(found.values())

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what settings and header say. Raises InputError or CorruptError."""
        return self._plan(repository, place).info

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        import torch

        plan = self._plan(repository, place)
        info = plan.info
        held = {n: t.float() for n, t in repository.tensors(place.files[1]).items()}
        scale_in, scale_out = _scales(plan.norms or self._stored_norms(held, repository, place), info.d_in)
        decoder = held["decoder.weight"].T
        bias = held["decoder.bias"] if plan.bias else torch.zeros(info.d_out)
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            encoder=held["encoder.weight"] * scale_in,
            encoder_bias=held["encoder.bias"],
            decoder=(decoder / scale_out).contiguous(),
            decoder_bias=bias / scale_out,
            activation=self._activation(plan, held, scale_in, scale_out),
            side=info.side,
            target=info.target,
            subtract_decoder_bias=plan.subtract,
            input_norm=plan.read.input_norm,
            norm_epsilon=plan.read.norm_epsilon,
            base_model=info.base_model,
        ).to(device, dtype)

    def _activation(
        self, plan: _Plan, held: Mapping[str, torch.Tensor], scale_in: float, scale_out: float
    ) -> Activation:
        """Return the rule on pre-activations in training's scale."""
        import torch

        if plan.relu:
            return ReLU()
        lengths = torch.ones(plan.info.width)
        if plan.include_norm:
            lengths = held["decoder.weight"].norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        if plan.log_threshold:
            return JumpReLU(held[plan.log_threshold].exp() / lengths)
        return JumpReLU(plan.threshold * (scale_out if plan.include_norm else scale_in) / lengths)

    def _stored_norms(
        self, held: Mapping[str, torch.Tensor], repository: Repository, place: Place
    ) -> tuple[float, float]:
        """Return the mean norms that newer files keep beside the weights, by hook."""
        hooks = _hooks(repository.settings(place.files[0]), repository.where(place.files[0]))
        values = [float(held[f"{_NORM}.{hook}"]) for hook in hooks]
        return _positive(values[0], values[1], repository.where(place.files[1]))

    def _plan(self, repository: Repository, place: Place) -> _Plan:
        config_path, weights = place.files
        where = repository.where(config_path)
        if config_path not in repository:
            raise NotFoundError(f"there is no {where}, only the weights; copy the settings as well")
        if weights not in repository:
            raise NotFoundError(f"there is no {repository.where(weights)}, only the settings; copy the weights as well")
        config = repository.settings(config_path)
        header = repository.header(weights)
        if flag(config, "use_glu_encoder", where):
            raise InputError(f"{where} sets use_glu_encoder, which cannot be read")
        hook_in, hook_out = _hooks(config, where)
        model = _model(repository, place.folder)
        read, write = lens_reading(hook_in, model), lens_reading(hook_out, model)
        transcoder = hook_in != hook_out
        d = integer(config, "d_model", where)
        width = integer(config, "d_sae", where, d * integer(config, "expansion_factor", where, 1))
        log_threshold = next(
            (n for n in (_LOG_THRESHOLD, f"activation_function.{_LOG_THRESHOLD}") if n in header), None
        )
        bias = flag(config, "use_decoder_bias", where, True)
        subtract = flag(config, "apply_decoder_bias_to_pre_encoder", where)
        if subtract and (transcoder or not bias):
            raise InputError(
                f"{where} subtracts the decoder bias of a transcoder, or one it has not; it cannot be read"
            )
        relu, threshold = _rule(config, where, log_threshold)
        shapes: dict[str, tuple[int, ...]] = {
            "encoder.weight": (width, d),
            "encoder.bias": (width,),
            "decoder.weight": (d, width),
            **({"decoder.bias": (d,)} if bias else {}),
            **({log_threshold: (width,)} if log_threshold else {}),
        }
        require_shapes(repository.where(weights), header, shapes, f"its {config_path.rpartition('/')[2]}")
        norms = _norms(config, where, header)
        info = CoderInfo(
            format=self.name,
            architecture=f"{'relu' if relu else 'jumprelu'}{' transcoder' if transcoder else ''}",
            path=repository.where(place.folder),
            hookpoint=read.hookpoint,
            side=read.side,
            target=(write.hookpoint, write.side) if transcoder and write.hookpoint else None,
            d_in=d,
            d_out=d,
            width=width,
            k=None,
            threshold=None if relu else "per latent" if log_threshold else f"{threshold:g}",
            base_model=model,
            dtype=header["encoder.weight"].dtype,
            notes=(*read.notes, *((_FOLDED,) if norms != (0.0, 0.0) else ())),
        )
        return _Plan(
            info=info,
            read=read,
            norms=norms,
            log_threshold=log_threshold,
            include_norm=flag(config, "sparsity_include_decoder_norm", where, True),
            relu=relu,
            bias=bias,
            subtract=subtract,
            threshold=threshold,
        )

    def _ours(self, repository: Repository, folder: str, file: str) -> Mapping[str, Any] | None:
        """Return the settings of this library's coders; a ``config.json`` is opened only where weights or name fit."""
        if file not in _LAYOUTS or beside(folder, file) not in repository:
            return None
        weights = beside(folder, _LAYOUTS[file])
        if file == "config.json" and weights not in repository and not _SHORT.search(_full(repository, folder)):
            return None
        try:
            config = repository.json(beside(folder, file))
        except CorruptError:
            return None
        return config if isinstance(config, dict) and {"hook_point_in", "d_model"} <= config.keys() else None


def _full(repository: Repository, folder: str) -> str:
    return f"{repository.name}/{folder}".replace("\\", "/").rstrip("/")


def _hooks(config: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return the hooks of input and output. Raises InputError."""
    read = text(config, "hook_point_in", where)
    if read is None:
        raise InputError(f"{where} must hold hook_point_in, such as blocks.8.hook_resid_post")
    return read, text(config, "hook_point_out", where) or read


def _hookpoint(config: Mapping[str, Any], model: str | None) -> str | None:
    hook = config.get("hook_point_in")
    try:
        return lens_reading(hook, model).hookpoint if isinstance(hook, str) else None
    except InputError:
        return None


def _rule(config: Mapping[str, Any], where: str, log_threshold: str | None) -> tuple[bool, float]:
    """Return whether every positive latent fires, and else the threshold of all (0 where each has its own)."""
    function = text(config, "act_fn", where, "jumprelu")
    threshold = config.get("jump_relu_threshold", 0.0)
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not math.isfinite(threshold):
        raise InputError(f"{where} must hold jump_relu_threshold as a number, it holds {threshold!r}")
    if function == "relu":
        return True, 0.0
    # A coder trained with top-k fires by its threshold once that is set: latents are then independent of each other.
    if function == "jumprelu" or (function == "topk" and threshold > 0):
        return False, 0.0 if log_threshold else float(threshold)
    raise InputError(f"{where} has the activation function {function!r}; allowed: jumprelu, relu")


def _norms(config: Mapping[str, Any], where: str, header: Mapping[str, TensorInfo]) -> tuple[float, float] | None:
    """Return the mean norms of input and output: (0, 0) where they are folded already, None where weights hold them."""
    kind = text(config, "norm_activation", where, "dataset-wise")
    if kind == "inference":
        return 0.0, 0.0
    if kind != "dataset-wise":
        raise InputError(f"{where} has the norm_activation {kind!r}; allowed: dataset-wise, inference")
    stored = config.get(_NORM)
    hooks = _hooks(config, where)
    if isinstance(stored, dict):
        values = [stored.get(key, stored.get(hook)) for key, hook in zip(("in", "out"), hooks, strict=True)]
        return _positive(values[0], values[1], where)
    if all(f"{_NORM}.{hook}" in header for hook in hooks):
        return None
    raise InputError(
        f"{where} does not hold {_NORM} (in and out), nor do the weights; the scale of its input is unknown"
    )


def _positive(one: Any, other: Any, where: str) -> tuple[float, float]:
    for value in (one, other):
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise InputError(f"{where} must hold {_NORM} as two positive numbers, it holds {value!r}")
    return float(one), float(other)


def _scales(norms: tuple[float, float], d: int) -> tuple[float, float]:
    """Return what input and output are multiplied by in training, √d over their mean norms."""
    return (1.0, 1.0) if norms == (0.0, 0.0) else (math.sqrt(d) / norms[0], math.sqrt(d) / norms[1])


def _model(repository: Repository, folder: str) -> str | None:
    full = _full(repository, folder)
    return next((model for part, model in _MODELS if part in full), None)


def _label(repository: Repository, folder: str) -> str:
    """Return what tells coders of one hookpoint apart: the width's factor, or the data they were trained on."""
    full = _full(repository, folder)
    factor = _FACTOR.search(full)
    if factor:
        return factor[1]
    return folder.split("/")[-2] if _SHORT.search(full) and "/" in folder else ""
