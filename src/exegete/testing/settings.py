"""One draw from a world: which windows are judged, all those they were drawn from, and what each explanation claims."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np

from exegete.config import Negative
from exegete.llm.scripted import Predicate, TokenPredicate
from exegete.scorers.judge import Items
from exegete.testing.worlds import WHOLE, Claim, TestFrame, World
from exegete.types import Array, ExampleSet, Explanation, Windows
from exegete.views import LatentView, Near

NEGATIVES: tuple[Negative, ...] = ("same_token", "neighbour", "random")
"""The kinds of silent windows that scorers are validated on, in equal parts."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """One latent in one draw: the ``drawn`` windows, and the ``whole`` set of those they were drawn from."""

    round: Round
    latent: int
    drawn: ExampleSet
    whole: ExampleSet

    def claim(self, rung: str) -> Claim:
        """Return what a rung of the latent says."""
        return self.round.claim(self.latent, rung)

    def explanation(self, rung: str) -> Explanation:
        """Return a rung as an explanation."""
        return self.round.world.explanation(self.latent, rung, self.round.seed)

    def view(self, *, whole: bool = False) -> LatentView:
        """Return the latent as a scorer sees it, with the drawn windows or with all of them."""
        chosen = self.whole if whole else self.drawn
        world = self.round.world
        return LatentView(latent=chosen.latent, tokens=world.table, examples=chosen, data=world.data)

    def near(self, rung: str, k: int) -> tuple[Near, ...]:
        """Return the latents that most often fire with this one, each explained by the same rung of its own ladder."""
        found = self.round.neighbours[self.latent][:k]
        world, seed = self.round.world, self.round.seed
        return tuple(Near(explanation=world.explanation(i, rung, seed), similarity=s) for i, s in found)

    def fits(self, windows: Windows, items: Items, rungs: Sequence[str]) -> Array:
        """Return which rungs fit each of these windows, or each of their marks where they have any [rungs, n]."""
        at = self.round.frame.windows(windows.row, windows.start)
        claims = [self.claim(rung).fits[at] for rung in rungs]
        if items.marks is None:
            return np.array([fits.any(axis=1) for fits in claims])
        marks = items.marks & ~self.round.world.table.is_special[items.tokens]
        return np.array([(fits | ~marks).all(axis=1) & marks.any(axis=1) for fits in claims])


@final
class Round:
    """A world under one seed: its draw of n windows of each class, for every latent."""

    def __init__(self, world: World, seed: int, n: int) -> None:
        self.world, self.seed, self.n = world, seed, n
        self.frame: TestFrame = world.frame(seed)
        drawn = world.select(n, negatives=NEGATIVES, seed=seed)
        whole = world.select(WHOLE, negatives=NEGATIVES, seed=seed)
        self.settings = tuple(
            Setting(round=self, latent=i, drawn=d, whole=w) for i, (d, w) in enumerate(zip(drawn, whole, strict=True))
        )

    def drawing(self, wanted: Sequence[int]) -> Round:
        """Return the same round with so many windows of each class drawn of each of its latents, or all there are."""
        other, settings = copy.copy(self), list(self.settings)
        for size in set(wanted) - {self.n}:
            places = [place for place, n in enumerate(wanted) if n == size]
            latents = [settings[place].latent for place in places]
            drawn = self.world.select(size, negatives=NEGATIVES, seed=self.seed, indices=latents)
            for place, chosen in zip(places, drawn, strict=True):
                settings[place] = replace(settings[place], drawn=chosen)
        other.settings = tuple(settings)
        return other

    def only(self, every: int) -> Round:
        """Return the same round with one of so many latents, so that all kinds are still among them."""
        if every == 1:
            return self
        fewer = copy.copy(self)
        fewer.settings = self.settings[::every]
        return fewer

    def claim(self, latent: int, rung: str) -> Claim:
        """Return what a rung of a latent says."""
        return self.world.claim(latent, rung, self.seed)

    @cached_property
    def neighbours(self) -> list[list[tuple[int, float]]]:
        """Which latents are near each, nearest first, with their Jaccard index.

        Those that fire with it, by how often; then its sibling; then others that fire about as often, as in a coder of
        many latents every latent has some neighbour.
        """
        found = []
        counts = np.log(self.world.store.counts)
        for latent, (near, similarity) in enumerate(
            zip(self.world.near.neighbours.tolist(), self.world.near.similarity.tolist(), strict=True)
        ):
            known = {i: s for i, s in zip(near, similarity, strict=True) if i >= 0}
            others = np.argsort(np.abs(counts - counts[latent]), kind="stable").tolist()
            for other in (self.world.latents[latent].sibling, *others):
                if other != latent:
                    known.setdefault(other, 0.0)
            found.append(list(known.items()))
        return found

    def predicates(self, rungs: Sequence[str]) -> dict[str, Predicate]:
        """Return what a simulated judge takes these rungs of all latents to say, by their text."""
        claims = [self.claim(latent, rung) for latent in range(len(self.world.latents)) for rung in rungs]
        return {claim.text: predicate_of(claim, self.frame) for claim in claims}


def predicate_of(claim: Claim, frame: TestFrame) -> TokenPredicate:
    """Return what a simulated judge takes a claim to say of the windows of a frame."""

    def matched(text: str) -> tuple[Array, Array]:
        window = frame.places[text]
        return frame.tokens[window], claim.fits[window]

    return TokenPredicate(matched, frame.table)
