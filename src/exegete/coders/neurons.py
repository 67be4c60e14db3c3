"""Neurons as latents: the basis of a hookpoint, as it is or rotated (arXiv 2410.13928, section 4.2).

The paper's sparse neurons are those of an MLP (the input of its down projection), of which the k most active count on
each token, unchanged in value. They are the baseline that coders have to beat; a fixed random rotation of them is the
baseline that neurons have to beat.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch

from exegete.coders import kernels
from exegete.coders.coder import Point, SparseCoder
from exegete.coders.kernels import Part
from exegete.errors import InputError, MismatchError
from exegete.files import hash_json, safe_name
from exegete.streams import stream
from exegete.subjects.identity import tensor_hash
from exegete.subjects.names import layers
from exegete.types import Side, SparseCode

if TYPE_CHECKING:
    from exegete.subjects.subject import Subject

Signs = Literal["positive", "both"]
"""Which directions count: each as given, or each and its opposite."""


@final
class NeuronCoder(SparseCoder):
    """The axes of a hookpoint, or those of a rotation of it, without learnt weights.

    With ``both`` signs there are 2 d latents: latent i is axis i where it is positive, latent d + i where it is
    negative, with the value's size. Where k is given at most the k largest of an input fire; only positive ones count,
    so that fewer may.

    Args:
        name: What its store and latents are called.
        hookpoint: Where it reads, in any spelling.
        d: Size of the activations there.
        side: The side of the module that it reads; neurons of an MLP are the input of its down projection.
        k: Most latents that fire on one input, None for all above the threshold.
        rotation: [d, d] orthogonal; its rows are the axes. None for the hookpoint's own.
        signs: ``positive``, or ``both``.
        threshold: What a value must exceed to fire, not negative.
        base_model: The model it is made for.
        device: Where it works; that of the rotation where there is one.
        dtype: Data type of the values; that of the rotation where there is one.
        content: Content hash when it is known already.

    Raises:
        InputError: When a setting is out of its range, or the rotation is none.
    """

    def __init__(
        self,
        *,
        name: str,
        hookpoint: str,
        d: int,
        side: Side = "input",
        k: int | None = None,
        rotation: torch.Tensor | None = None,
        signs: Signs = "positive",
        threshold: float = 0.0,
        base_model: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        content: str | None = None,
    ) -> None:
        self.name = name
        self.hookpoint, self.side = hookpoint, side
        self.target = (hookpoint, side)
        self.d_in = self.d_out = d
        self.width = 2 * d if signs == "both" else d
        self.k = k
        self.rotation = rotation
        self.signs: Signs = signs
        self.threshold = threshold
        self.base_model = base_model
        self._device = torch.device(device) if rotation is None else rotation.device
        self._dtype = dtype if rotation is None else rotation.dtype
        self._content = content
        self._check()

    def _check(self) -> None:
        what = f"coder {self.name!r}"
        if self.signs not in get_args(Signs):
            raise InputError(f"{what} has the signs {self.signs!r}; allowed: {', '.join(get_args(Signs))}")
        if self.d_in < 1 or (self.k is not None and not 1 <= self.k <= self.width):
            raise InputError(f"{what} has k = {self.k}; it must lie between 1 and its width {self.width}")
        if not 0 <= self.threshold < float("inf"):
            raise InputError(f"{what} has the threshold {self.threshold}; it must be a number that is not negative")
        if self.rotation is None:
            return
        if self.rotation.shape != (self.d_in, self.d_in):
            have = list(self.rotation.shape)
            raise InputError(f"{what}: rotation has shape {have}, expected {[self.d_in, self.d_in]}")
        lengths = self.rotation.float().square().sum(dim=1)
        if not bool((lengths - 1).abs().max() < 0.05):  # all that half precision leaves of orthogonality
            raise InputError(f"{what}: rotation is not orthogonal; its rows must have length 1")

    @property
    def architecture(self) -> str:
        """``neurons``, with what is done to them."""
        rotated = " rotated" if self.rotation is not None else ""
        return f"{'topk ' if self.k is not None else ''}neurons{rotated}"

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the values."""
        return self._dtype

    @cached_property
    def hash(self) -> str:
        """Content hash of settings and rotation, 16 hex digits."""
        if self._content is not None:
            return self._content
        settings = {"d": self.d_in, "k": self.k, "signs": self.signs, "threshold": self.threshold}
        rotation = None if self.rotation is None else tensor_hash(self.rotation)
        return hash_json({"kind": "neurons", **settings, "rotation": rotation})

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> SparseCode:
        """Encode ``x`` [n, d]: with k indices and values [n, k], strongest first, 0 at unused slots; else ragged.

        Raises MismatchError for another d, InputError when an input or a value is not finite.
        """
        return self._encoded(x, self.d_in, self._encode)

    def _encode(self, x: torch.Tensor) -> Part:
        x = x if self.rotation is None else x @ self.rotation.T
        if self.signs == "positive":
            return self._fires(x)
        found = self._fires(x.abs())  # of an axis and its opposite only one can be positive
        if found.counts is None:
            negative = x.gather(1, found.indices) < 0
        else:
            row = torch.repeat_interleave(torch.arange(len(x), device=x.device), found.counts)
            negative = x[row, found.indices] < 0
        return found._replace(indices=found.indices + negative * self.d_in)

    def _fires(self, pre: torch.Tensor) -> Part:
        if self.k is None:
            return kernels.above(pre, self.threshold)
        found = kernels.largest(pre.contiguous(), min(self.k, self.d_in))
        return found._replace(values=found.values.where(kernels.exceeds(found.values, self.threshold), 0))

    @torch.no_grad()
    def decode(self, code: SparseCode, x: torch.Tensor | None = None) -> torch.Tensor:
        """Return the activations [n, d] that the firing latents make up. Raises MismatchError for another width."""
        if code.width != self.width:
            raise MismatchError(f"coder {self.name!r} has {self.width} latents, the code {code.width}")
        indices = torch.as_tensor(code.indices, device=self.device).long()
        values = torch.as_tensor(code.values, device=self.device).to(self.dtype)
        if code.offsets is None:
            n = len(indices)
            row = torch.arange(n, device=self.device).repeat_interleave(indices.shape[1])
        else:
            offsets = torch.as_tensor(code.offsets, device=self.device).long()
            n = len(offsets) - 1
            row = torch.repeat_interleave(torch.arange(n, device=self.device), offsets.diff())
        axis, sign = self._axis(indices.reshape(-1))
        y = torch.zeros((n, self.d_in), device=self.device, dtype=self.dtype)
        y.index_put_((row, axis), values.reshape(-1) * sign, accumulate=True)
        return y if self.rotation is None else y @ self.rotation

    def _axis(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return axis and sign of latents."""
        return indices % self.d_in, 1 - 2 * (indices >= self.d_in).to(self.dtype)

    def decoder_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the directions [len(indices), d] of the given latents."""
        axis, sign = self._axis(indices.to(self.device).long())
        if self.rotation is not None:
            return self.rotation[axis] * sign[:, None]
        rows = torch.zeros((len(axis), self.d_in), device=self.device, dtype=self.dtype)
        return rows.scatter_(1, axis[:, None], sign[:, None])

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> NeuronCoder:
        """Return this coder on a device, in a data type; its hash stays that of the original rotation."""
        kind = self.dtype if dtype is None else dtype
        # Values hash as float32, except those of float64, which need not fit.
        exact = kind == self.dtype or (kind == torch.float32 and self.dtype != torch.float64)
        rotation = None if self.rotation is None else self.rotation.to(device=device, dtype=kind)
        content = self._content if exact else self.hash
        return self._replace(device=device, dtype=kind, rotation=rotation, content=content)

    def placed(
        self, *, name: str | None = None, point: Point | None = None, target: Point | None = None
    ) -> NeuronCoder:
        """Return this coder under another name, or reading elsewhere; it reconstructs what it reads, never another."""
        own = self.point if point is None else point
        if target not in (None, own):
            raise InputError(f"coder {self.name!r} holds neurons; they reconstruct what they read, not {target!r}")
        return self._replace(name=name or self.name, hookpoint=own[0], side=own[1])

    def _replace(self, **changes: Any) -> NeuronCoder:
        fields: dict[str, Any] = {
            "name": self.name,
            "hookpoint": self.hookpoint,
            "d": self.d_in,
            "side": self.side,
            "k": self.k,
            "rotation": self.rotation,
            "signs": self.signs,
            "threshold": self.threshold,
            "base_model": self.base_model,
            "device": self.device,
            "dtype": self.dtype,
            "content": self._content,
        }
        return NeuronCoder(**{**fields, **changes})


def neuron_coder(
    subject: Subject,
    hookpoint: str,
    *,
    k: int | None = None,
    rotation: int | None = None,
    signs: Signs = "positive",
    threshold: float = 0.0,
    side: Side | None = None,
    name: str | None = None,
) -> NeuronCoder:
    """Return the neurons of an MLP, or the basis of another hookpoint, as a coder on the subject's device.

    Args:
        subject: Whose neurons.
        hookpoint: A module: of an MLP or its down projection the neurons are meant, of any other module the basis of
            its output. TransformerLens names say themselves what they read (``blocks.3.mlp.hook_post``: neurons).
        k: Most latents that fire on one token; the paper has 32 and 256.
        rotation: Seed of a random rotation, None for none.
        signs: ``positive``, or ``both``: the negative side of every neuron is a latent of its own.
        threshold: What a value must exceed to fire.
        side: The side of the module whose basis is meant, whatever the module; None for the above.
        name: What to call it, by default the hookpoint's canonical name and ``-neurons``.

    Raises:
        InputError: NotFoundError for unknown hookpoints; for a mixture of experts, and settings out of range.
    """
    points = subject.points(hookpoint, side or "output")
    if len(points) != 1:
        raise InputError(f"{hookpoint!r} stands for {len(points)} hookpoints; name one of them")
    asked = points[0]
    fixed = side is not None or points == subject.points(hookpoint, "input")
    point = asked if fixed else _of_an_mlp(subject, asked)
    d = subject.d(*point)
    return NeuronCoder(
        name=safe_name(name or f"{asked[0]}-neurons"),
        hookpoint=point[0],
        side=point[1],
        d=d,
        k=k,
        rotation=None if rotation is None else random_rotation(d, rotation, *point),
        signs=signs,
        threshold=threshold,
        base_model=subject.name,
    ).to(subject.device)


def random_rotation(d: int, seed: int, *names: object) -> torch.Tensor:
    """Return an orthogonal matrix [d, d], uniform over all, drawn from ``seed`` and ``names``.

    The Q of a Gaussian matrix is uniform once its columns' signs are those of R's diagonal (Mezzadri 2007).
    """
    draw = stream(seed, *names, d, "rotation").standard_normal((d, d))
    q, r = torch.linalg.qr(torch.from_numpy(draw))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    rotation: torch.Tensor = (q * signs).float().contiguous()  # LAPACK gives columns
    return rotation


def _of_an_mlp(subject: Subject, point: Point) -> Point:
    """Return where the neurons of an MLP are read; any other point as it is."""
    known = subject.hookpoints()
    if point[0] in layers(known):
        return point
    try:
        return subject.neurons(point[0])[0]
    except InputError:
        if f"{point[0]}.experts" in known:
            raise
        return point
