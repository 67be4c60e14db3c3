"""The null model: the same architecture with its weights drawn again, norms kept (Heap et al., arXiv 2501.17727)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from exegete.errors import InputError
from exegete.files import hash_json
from exegete.streams import stream

if TYPE_CHECKING:
    from exegete.subjects.subject import Subject


def randomised(subject: Subject, seed: int) -> Subject:
    """Return a copy of a subject whose weights say nothing; the original is untouched.

    Every parameter of two or more dimensions is drawn again from a Gaussian and scaled to the Frobenius norm it had;
    vectors (norm scales, biases) are permuted, which keeps their norms exactly. Tied weights stay tied. The draw of a
    tensor depends on the seed and its name alone, so it is the same on every device.

    Raises InputError for a subject with weights that a device map left on disk.
    """
    if any(parameter.is_meta for parameter in subject.model.parameters()):
        raise InputError(
            f"some weights of {subject.name} are left on disk; load it without a device map to redraw them"
        )
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # names a tied tensor once
            draw = stream(seed, name, "randomise")
            if parameter.ndim >= 2:
                new = torch.from_numpy(draw.standard_normal(tuple(parameter.shape), dtype="float32")).double()
                new *= parameter.detach().cpu().double().norm() / new.norm().clamp_min(1e-300)
                parameter.copy_(new)
            elif parameter.ndim == 1:
                order = torch.from_numpy(draw.permutation(len(parameter))).to(parameter.device)
                parameter.copy_(parameter[order])
    return subject.with_model(
        model,
        name=f"{subject.name}@randomised-{seed}",
        content=hash_json({"randomised": subject.hash, "seed": seed}),
    )
