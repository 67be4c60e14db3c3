"""What an intervention on a latent does to its subject: strengths, next tokens, continuations.

The random direction beside it is drawn uniformly for each latent, and its strength is found for the same KL: what any
push of that size does to the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

import numpy as np
import torch

from exegete.coders.coder import SparseCoder
from exegete.scorers.intervention_prompts import Prompt
from exegete.streams import stream
from exegete.subjects import Subject
from exegete.subjects.continuing import Editing, Noise, Prompts
from exegete.subjects.edits import AddVector, EditLatent, LatentEditKind
from exegete.subjects.strength import Matched, match_divergence, mean_divergence
from exegete.tokens import TokenTable
from exegete.types import Array, LatentId

STEPS: Final = 8
"""New tokens of a continuation at most."""
SHOWN: Final = 5
"""Tokens shown of what gains after one prompt."""
Tokens = list[list[int]]
"""Continuations of all prompts."""
_SILENT: Final = 1e-9  # an ablation with less KL than this changes nothing that could be matched


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Gains:
    """What an edit makes likelier.

    ``tokens`` gain the most probability on average over ``prompts``, and ``by`` is how much; ``factors`` are the tokens
    that gain the most after each prompt, each with the factor by which it does.
    """

    prompts: tuple[Prompt, ...]
    tokens: tuple[int, ...]
    by: tuple[float, ...]
    factors: tuple[tuple[tuple[int, float], ...], ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Edited:
    """One way to edit, and the strength found for each condition, met or not."""

    editing: Editing
    matched: tuple[Matched, ...]

    @property
    def met(self) -> list[int]:
        """Conditions of which the strength was found."""
        return [i for i, found in enumerate(self.matched) if found.met]


@final
@dataclass
class Effects:
    """A latent of a subject edited after prompts; what costs a pass is computed when asked for, and prompts read once.

    ``targets`` are KLs, in nats; of an ablation there is one condition, at the KL it happens to have.
    """

    subject: Subject
    coder: SparseCoder
    latent: LatentId
    table: TokenTable
    prompts: Sequence[Prompt]
    kind: LatentEditKind
    targets: Sequence[float]
    seed: int
    own: Edited = field(init=False)
    random: Edited = field(init=False)

    def __post_init__(self) -> None:
        self._read = Prompts(self.subject, [prompt.tokens for prompt in self.prompts])
        self._clean = self._read.log_probabilities()[0]
        self._drawn: tuple[int, dict[int, torch.Tensor]] = (-1, {})
        coder, index = self.coder, self.latent.index
        row = coder.decoder_rows(torch.tensor([index]))[0].float().cpu()
        draw = stream(self.seed, self.latent, "intervention", "direction").standard_normal(len(row))
        vector = torch.from_numpy(draw).float()
        vector *= float(row.norm()) / float(vector.norm())
        # An activation as the prompts have it is the size of an edit to begin with.
        start = float(np.mean([prompt.activation for prompt in self.prompts]))
        self.own = self._latent(start)
        targets = [found.kl for found in self.own.matched] if self.kind == "ablate" else self.targets

        def along(strengths: torch.Tensor) -> AddVector:
            return AddVector(target=coder.target, vector=vector, strength=strengths)

        self.random = self._matched(along, targets, start)

    def _latent(self, start: float) -> Edited:
        coder, index, kind = self.coder, self.latent.index, self.kind

        def editing(strengths: torch.Tensor) -> EditLatent:
            return EditLatent(coder, index, kind=kind, strength=strengths)

        if kind != "ablate":
            return self._matched(editing, self.targets, start)
        kl = mean_divergence(self._read, editing, [0.0], self._clean)[0]
        return Edited(editing=editing, matched=(Matched(target=kl, strength=0.0, kl=kl, evaluations=1),))

    def _matched(self, editing: Editing, targets: Sequence[float], start: float) -> Edited:
        possible = [t for t in targets if _SILENT < t < math.inf]
        found = match_divergence(self._read, editing, possible, start=start, clean=self._clean) if possible else []
        by_target = {m.target: m for m in found}
        none = [Matched(target=t, strength=math.nan, kl=0.0, evaluations=0) for t in targets]
        return Edited(editing=editing, matched=tuple(by_target.get(m.target, m) for m in none))

    def masses(self, edited: Edited, sets: Sequence[Sequence[int]]) -> dict[int, Array]:
        """Return by condition the probability that sets of tokens gain after each prompt, float64 [prompts, sets]."""
        gained: dict[int, Array] = {}
        for at in edited.met:
            strengths = [edited.matched[at].strength]
            more = self._read.log_probabilities(edited.editing, strengths)[0].exp() - self._clean.exp()
            columns = [more[:, torch.tensor(tokens, device=more.device)].double().sum(dim=1) for tokens in sets]
            gained[at] = torch.stack(columns, dim=1).cpu().numpy()
        return gained

    def gains(self, prompts: Sequence[Prompt], strength: float, n: int) -> Gains:
        """Return what the latent's edit makes likelier after other prompts, ``n`` tokens of all that gain."""
        read = Prompts(self.subject, [prompt.tokens for prompt in prompts])
        clean = read.log_probabilities()[0]
        edited = read.log_probabilities(self.own.editing, [strength])[0]
        more = edited.exp() - clean.exp()
        by, tokens = more.mean(dim=0).topk(min(n, more.shape[1]))
        kept = by > 0
        rows = more.topk(min(SHOWN, more.shape[1]), dim=1).indices
        factor = (edited - clean).gather(1, rows).exp()
        return Gains(
            prompts=tuple(prompts),
            tokens=tuple(tokens[kept].tolist()),
            by=tuple(by[kept].tolist()),
            factors=tuple(
                tuple(zip(ids, factors, strict=True))
                for ids, factors in zip(rows.tolist(), factor.tolist(), strict=True)
            ),
        )

    def continuations(self, generation: int, edited: Edited | None = None, among: Sequence[int] = ()) -> list[Tokens]:
        """Return sampled continuations of every prompt: in each of these conditions, or once by the clean model.

        ``generation`` numbers the seeds. All that is sampled in one generation meets the same random numbers.
        """
        if edited is not None and not among:
            return []
        strengths = [0.0] if edited is None else [edited.matched[at].strength for at in among]
        editing = None if edited is None else edited.editing
        sampled = self._read.continuations(self._noise(generation), STEPS, editing, strengths)
        return [_cut(rows, self.table) for rows in sampled.tolist()]

    def _noise(self, generation: int) -> Noise:
        """Return the random numbers of a generation; those of the last one asked for are kept."""
        if self._drawn[0] != generation:
            self._drawn = generation, {}
        held = self._drawn[1]

        def noise(step: int) -> torch.Tensor:
            if step not in held:
                draw = stream(self.seed, self.latent, "intervention", "sample", generation, step)
                drawn = draw.standard_exponential(tuple(self._clean.shape), dtype=np.float32)
                held[step] = -torch.from_numpy(drawn).log()
            return held[step]

        return noise

    def passages(self, continuations: Tokens) -> list[str]:
        """Return the prompts with their continuations as text."""
        pairs = zip(self.prompts, continuations, strict=True)
        return [self.table.decode([*prompt.tokens, *shown]) for prompt, shown in pairs]


def _cut(rows: Sequence[Sequence[int]], table: TokenTable) -> Tokens:
    """Return continuations up to their first special token each."""
    ends = (next((i for i, t in enumerate(row) if t in table.special or t >= len(table)), len(row)) for row in rows)
    return [list(row[:end]) for row, end in zip(rows, ends, strict=True)]
