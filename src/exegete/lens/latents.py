"""Labels of latents read off a lens: the tokens that a latent's decoder direction promotes and suppresses.

A latent adds its decoder direction v to the residual stream. What is read is the readout of the translated direction,
v + W v, standing alone: the final norm takes away its length, and the bias of a translator or a norm, which every
latent shares, takes no part. No text is needed. The numbers are logits of a stream that is nothing but this direction;
compare them within a latent, not between models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from exegete.errors import InputError, MismatchError
from exegete.lens.reading import piece_size
from exegete.subjects.sites import n_blocks, site_point

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.lens.lens import Lens
    from exegete.subjects import Subject

_LENGTH = 1e4  # of a direction before the norm, so that the norm's epsilon does not count


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LatentTokens:
    """What a latent promotes and suppresses: token ids with their logits, the strongest first.

    Both are empty for a latent whose decoder direction is zero.
    """

    coder: str
    index: int
    site: int
    promoted: tuple[tuple[int, float], ...]
    suppressed: tuple[tuple[int, float], ...]


def latent_tokens(
    lens: Lens, coder: SparseCoder, indices: Sequence[int], *, site: int | None = None, k: int = 10
) -> Iterator[LatentTokens]:
    """Yield the tokens that latents promote and suppress, ``k`` of each.

    Args:
        lens: What reads the directions.
        coder: Whose decoder directions; it must reconstruct something of the residual stream's size.
        indices: Which latents.
        site: At which site they are read; by default that of the point the coder reconstructs.
        k: How many tokens, at least one.

    Raises:
        InputError: For latents the coder does not have, a coder that writes to no site, or no tokens.
        MismatchError: For a coder of another size.
    """
    d, vocabulary = int(lens.readout.unembedding.shape[1]), int(lens.readout.unembedding.shape[0])
    if coder.d_out != d:
        raise MismatchError(
            f"coder {coder.name!r} writes {coder.d_out} dimensions, the residual stream has {d}: its latents have no "
            f"direction there"
        )
    if k < 1:
        raise InputError(f"at least one token of each kind is listed, got {k}")
    wrong = [index for index in indices if not 0 <= index < coder.width]
    if wrong:
        raise InputError(f"coder {coder.name!r} has the latents 0 to {coder.width - 1}, got {wrong[0]}")
    at = site_of(lens.subject, coder) if site is None else site
    step = min(piece_size(lens.subject, lens.readout), 1 << 12)
    return _read(lens, coder, list(indices), at, min(k, vocabulary), step)


@torch.no_grad()
def direction_logits(lens: Lens, site: int, directions: torch.Tensor) -> torch.Tensor:
    """Return the logits [n, V] of directions [n, d] of a site's stream standing alone, less those of nothing."""
    moved = lens.translate_direction(site, directions.to(lens.subject.device).float())
    length = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    unit = moved / length.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = unit * (_LENGTH if lens.readout.unembedding.dtype == torch.float32 else 256.0)
    nothing = lens.readout.logits(torch.zeros_like(unit[:1]))
    found: torch.Tensor = (lens.readout.logits(scaled) - nothing) * (length > 0)
    return found


def site_of(subject: Subject, coder: SparseCoder) -> int:
    """Return the site whose stream a coder's reconstruction is, or is added to: its block's output.

    Raises InputError when the point that it reconstructs is in no block.
    """
    name, side = coder.target
    for site in range(-1, n_blocks(subject)):
        if site_point(subject, site) == (name, side):
            return site
    for block in range(n_blocks(subject)):
        own = site_point(subject, block)[0]
        if name == own:
            return block - 1
        if name.startswith(f"{own}."):
            return block
    raise InputError(f"coder {coder.name!r} writes to {name!r}, which is in no block; name the site to read it at")


def _read(lens: Lens, coder: SparseCoder, indices: list[int], site: int, k: int, step: int) -> Iterator[LatentTokens]:
    for start in range(0, len(indices), step):
        part = indices[start : start + step]
        rows = coder.decoder_rows(torch.tensor(part, device=coder.device)).float()
        logits = direction_logits(lens, site, rows)
        high, low = logits.topk(k, dim=-1), logits.topk(k, dim=-1, largest=False)
        alive = (rows.abs().amax(dim=-1) > 0).tolist()
        for place, index in enumerate(part):
            yield LatentTokens(
                coder=coder.name,
                index=index,
                site=site,
                promoted=_pairs(high.indices[place], high.values[place]) if alive[place] else (),
                suppressed=_pairs(low.indices[place], low.values[place]) if alive[place] else (),
            )


def _pairs(ids: torch.Tensor, values: torch.Tensor) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
