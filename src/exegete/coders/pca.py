"""Principal components as latents: the baseline that needs no training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from exegete.coders.activations import Activation, ReLU, TopK
from exegete.coders.coder import Point
from exegete.coders.kernels import in_float64
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import Signs
from exegete.coders.reading import activations
from exegete.errors import InputError
from exegete.files import safe_name
from exegete.types import Rows, Side

if TYPE_CHECKING:
    from collections.abc import Iterable

    from exegete.subjects.subject import Subject


def pca_coder(
    subject: Subject,
    hookpoint: str,
    tokens: Rows,
    *,
    components: int,
    signs: Signs = "both",
    k: int | None = None,
    side: Side = "output",
    most: int | None = None,
    by_document: bool = False,
    sink_norm: float = 10.0,
    name: str | None = None,
) -> LinearCoder:
    """Return the principal components of a hookpoint's activations as a coder on the subject's device.

    The mean is subtracted; encoder and decoder rows are the components, of length 1, largest variance first, the
    largest entry of each positive. With both signs latent ``components`` + i is the opposite of component i, and all
    components of an input together give its best linear reconstruction.

    Args:
        subject: Whose activations.
        hookpoint: Where, in any spelling.
        tokens: The rows whose counted positions are used.
        components: How many, at most d and less than the positions.
        signs: ``both``, or ``positive``: only the positive side of each.
        k: Most latents that fire on one input, None for all positive ones.
        side: The side of spellings that do not fix one.
        most: Use no more positions than these, None for all.
        by_document: Let each token see its own document only.
        sink_norm: Leave out positions longer than this many times the median norm (attention sinks, any one of which
            could turn the first component towards itself), as ``activations`` says; 0 for none.
        name: What to call it, by default the hookpoint's canonical name and ``-pca``.

    Raises:
        InputError: NotFoundError for unknown hookpoints; for more components than there can be.
    """
    points = subject.points(hookpoint, side)
    if len(points) != 1:
        raise InputError(f"{hookpoint!r} stands for {len(points)} hookpoints; name one of them")
    point: Point = points[0]
    if signs not in ("positive", "both"):
        raise InputError(f"PCA has the signs {signs!r}; allowed: positive, both")
    mean, rows = principal_components(
        activations(subject, point, tokens, most=most, by_document=by_document, sink_norm=sink_norm), components
    )
    if signs == "both":
        rows = torch.cat([rows, -rows])
    activation: Activation = ReLU() if k is None else TopK(k)
    return LinearCoder(
        name=safe_name(name or f"{point[0]}-pca"),
        hookpoint=point[0],
        side=point[1],
        encoder=rows.float(),
        encoder_bias=torch.zeros(len(rows)),
        decoder=rows.float().clone(),
        decoder_bias=mean.float(),
        activation=activation,
        subtract_decoder_bias=True,
        base_model=subject.name,
    ).to(subject.device)


def principal_components(batches: Iterable[torch.Tensor], components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean [d] and the components [components, d] of all rows of the batches [n, d], float64 on the CPU.

    Exact: mean and scatter matrix are added up batch by batch in float64 (Chan, Golub and LeVeque 1979), so that memory
    does not grow with the number of rows; on the device of the batches where it has float64. Raises InputError for more
    components than d or the rows allow.
    """
    count = 0
    mean = scatter = torch.zeros(0)
    for batch in batches:
        if len(batch) == 0:
            continue
        x = in_float64(batch)
        own = x.mean(dim=0)
        centred = x - own
        if count == 0:
            mean, scatter = torch.zeros_like(own), own.new_zeros((len(own), len(own)))
        shift, total = own - mean, count + len(x)
        scatter += centred.T @ centred + torch.outer(shift, shift) * (count * len(x) / total)
        mean = mean + shift * (len(x) / total)
        count = total
    most = min(len(mean), count - 1)
    if not 1 <= components <= most:
        raise InputError(
            f"{count} activations of {len(mean)} dimensions have at most {max(most, 0)} principal components, "
            f"{components} were asked for"
        )
    rows = torch.linalg.eigh(scatter.cpu()).eigenvectors.T.flip(0)[:components]
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return mean.cpu(), rows * torch.where(largest < 0, -1.0, 1.0)
