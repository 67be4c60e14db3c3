"""How a prediction forms: for a prompt, what a lens reads at every site after every token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import numpy as np
import torch

from exegete.errors import InputError
from exegete.lens.reading import entropy, piece_size, require_room
from exegete.lens.states import StateReader
from exegete.lens.text import Batch
from exegete.subjects.sites import residuals
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.lens.lens import Lens

Colour = Literal["probability", "entropy", "kl", "ce"]
COLOURS: tuple[Colour, ...] = get_args(Colour)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What a lens predicts at S sites after each of T tokens; the last site is the model's own output.

    Attributes:
        subject: The model.
        lens: What read it (``logit``, ``tuned``, ``state``).
        sites: [S], ascending.
        tokens: The prompt's ids [T].
        texts: Each token's own text [T].
        top: Ids of the likeliest tokens [S, T, k], the likeliest first.
        top_texts: Their texts, nested alike.
        top_p: Their probabilities [S, T, k].
        entropy: In nats [S, T].
        kl: KL(model ‖ lens) in nats [S, T].
        ce: −log p of the prompt's next token in nats [S, T]; NaN in the last column.
        rank: How many tokens are likelier than the prompt's next [S, T]; −1 in the last column.
    """

    subject: str
    lens: str
    sites: tuple[int, ...]
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    top: Array
    top_texts: tuple[tuple[tuple[str, ...], ...], ...]
    top_p: Array
    entropy: Array
    kl: Array
    ce: Array
    rank: Array

    def values(self, colour: Colour) -> Array:
        """Return what a picture is coloured by [S, T]: the probability of the likeliest token, or nats."""
        if colour not in COLOURS:
            raise InputError(f"a picture is coloured by {', '.join(COLOURS)}, got {colour!r}")
        found: Array = {
            "probability": self.top_p[:, :, 0],
            "entropy": self.entropy,
            "kl": self.kl,
            "ce": self.ce,
        }[colour]
        return found

    def svg(self, colour: Colour = "probability") -> str:
        """Return the picture as a standalone SVG."""
        from exegete.lens.pictures import trajectory_svg

        return trajectory_svg(self, colour)

    def html(self, colour: Colour = "probability") -> str:
        """Return a page of its own with the picture, whose colouring can be changed and whose cells say more."""
        from exegete.lens.pages import trajectory_html

        return trajectory_html(self, colour)

    def write(self, path: str | Path, colour: Colour = "probability") -> None:
        """Write the picture as .html, .svg, .png or .json, by the path's ending.

        Raises what ``check_pictures`` does.
        """
        from exegete.files import write_json, write_text

        place = Path(path)
        check_pictures([place], len(self.tokens))
        if place.suffix == ".html":
            write_text(place, self.html(colour))
        elif place.suffix == ".svg":
            write_text(place, self.svg(colour))
        elif place.suffix == ".json":
            write_json(place, self.to_json())
        else:
            from exegete.lens.pictures import trajectory_png

            trajectory_png(self, place, colour)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data; what is not defined is None."""

        def plain(values: Array) -> list[list[float | None]]:
            return [[v if math.isfinite(v) else None for v in row] for row in values.tolist()]

        return {
            "subject": self.subject,
            "lens": self.lens,
            "sites": list(self.sites),
            "tokens": list(self.tokens),
            "texts": list(self.texts),
            "top": self.top.tolist(),
            "top_texts": [[list(cell) for cell in row] for row in self.top_texts],
            "top_probability": self.top_p.tolist(),
            "entropy_nats": plain(self.entropy),
            "kl_nats": plain(self.kl),
            "ce_nats": plain(self.ce),
            "rank": self.rank.tolist(),
        }


def check_pictures(paths: Iterable[str | Path], n_tokens: int) -> None:
    """Raise what stands against pictures of so many tokens at all these paths, before anything is written.

    Raises InputError for another ending, a path given twice, a folder, or more tokens than a .png holds,
    MissingExtraError for .png without matplotlib.
    """
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.suffix not in (".html", ".svg", ".png", ".json"):
            raise InputError(f"a picture is a .html, .svg, .png or .json file, got {str(path)!r}")
        if path in seen:
            raise InputError(f"the picture {str(path)!r} is asked for twice")
        if path.is_dir():
            raise InputError(f"{str(path)!r} is a folder; a picture is a file")
        above = next(place for place in path.absolute().parents if place.exists())
        if not above.is_dir():
            raise InputError(f"{str(path)!r} cannot be written: {str(above)!r} is a file, not a folder")
        if path.suffix == ".png":
            from exegete.lens.pictures import require_png

            require_png(n_tokens)
        seen.add(path)


@torch.no_grad()
def prediction_trajectory(
    lens: Lens, tokens: Sequence[int], *, sites: Sequence[int] | None = None, k: int = 10
) -> Trajectory:
    """Return how the predictions of a prompt form.

    Args:
        lens: What reads the sites.
        tokens: The prompt's ids, at least one.
        sites: Which; by default all of the lens. The model's own output comes last in any case.
        k: How many of the likeliest tokens to keep, at least one.

    Raises:
        InputError: For a prompt that is empty or longer than the model reads, or no token to keep.
        NotFoundError: For sites that the lens does not have.
    """
    if not len(tokens):
        raise InputError("the prompt holds no token; give some text")
    if k < 1:
        raise InputError(f"at least one of the likeliest tokens is kept, got {k}")
    subject, last = lens.subject, lens.last
    require_room(subject, len(tokens))
    chosen = tuple(sorted({*(lens.sites if sites is None else sites), last}))
    ids = torch.tensor([list(tokens)])
    streams = residuals(subject, ids, chosen)
    model = lens.readout.logits(streams[last][0]).log_softmax(dim=-1)
    after = torch.tensor(list(tokens)[1:], device=model.device)
    size = min(k, model.shape[1])
    parts: dict[int, list[dict[str, Array]]] = {site: [] for site in chosen}
    for at, states in _blocks(lens, ids, chosen):
        for site, held in parts.items():
            held += _site(lens, site, streams[site][0, at], states.get(site), model[at], after[at], size)
    cells = [{name: np.concatenate([part[name] for part in held]) for name in held[0]} for held in parts.values()]
    texts = subject.token_table().texts
    top = np.stack([cell["top"] for cell in cells])
    return Trajectory(
        subject=subject.name,
        lens=lens.kind,
        sites=chosen,
        tokens=tuple(map(int, tokens)),
        texts=tuple(_text(texts, token) for token in tokens),
        top=top,
        top_texts=tuple(tuple(tuple(_text(texts, t) for t in cell) for cell in row) for row in top.tolist()),
        top_p=np.stack([cell["top_p"] for cell in cells]),
        entropy=np.stack([cell["entropy"] for cell in cells]),
        kl=np.stack([cell["kl"] for cell in cells]),
        ce=np.stack([cell["ce"] for cell in cells]),
        rank=np.stack([cell["rank"] for cell in cells]),
    )


def _blocks(lens: Lens, ids: torch.Tensor, sites: Sequence[int]) -> Iterator[tuple[slice, Mapping[int, torch.Tensor]]]:
    """Yield positions of the prompt in order, with the states that the lens reads there; all at once where none is."""
    need = tuple(site for site in sites if lens.reads_state(site))
    n = ids.shape[1]
    if not need:
        yield slice(0, n), {}
        return
    batch = Batch(tokens=ids, keep=torch.ones(1, n, dtype=torch.bool), labels=ids[0], documents=np.zeros(n, np.int64))
    for places, states in StateReader(lens.subject, need).blocks(batch):
        yield slice(int(places[0]), int(places[-1]) + 1), states


def _site(
    lens: Lens,
    site: int,
    h: torch.Tensor,
    state: torch.Tensor | None,
    model: torch.Tensor,
    after: torch.Tensor,
    k: int,
) -> list[dict[str, Array]]:
    """Return the cells of one site at some positions, a bounded piece at a time."""
    step = piece_size(lens.subject, lens.readout)
    parts: list[dict[str, Array]] = []
    for start in range(0, len(h), step):
        cut = slice(start, start + step)
        here = h[cut].to(model.device)
        # The last row is the model's own output, whatever the lens has learnt there.
        log_p = (
            model[cut]
            if site == lens.last
            else lens.logits(site, here, None if state is None else state[cut]).log_softmax(dim=-1)
        )
        high = log_p.topk(k, dim=-1)
        label = after[cut]
        own = log_p[: len(label)].gather(1, label[:, None])
        lacking = len(log_p) - len(label)
        parts.append(
            {
                "top": high.indices.cpu().numpy(),
                "top_p": high.values.exp().double().cpu().numpy(),
                "entropy": entropy(log_p).double().cpu().numpy(),
                "kl": (model[cut].exp() * (model[cut] - log_p)).sum(dim=-1).double().cpu().numpy(),
                "ce": np.pad(-own[:, 0].double().cpu().numpy(), (0, lacking), constant_values=np.nan),
                "rank": np.pad((log_p[: len(label)] > own).sum(dim=-1).cpu().numpy(), (0, lacking), constant_values=-1),
            }
        )
    return parts


def _text(texts: Sequence[str], token: int) -> str:
    """Return a token's text; rows of the unembedding beyond the tokenizer's vocabulary have none."""
    return texts[token] if token < len(texts) else f"[{token}]"
