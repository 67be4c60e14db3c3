"""A world of latents with known truth: real text, a real store, real selection, and what each explanation claims."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, final

import numpy as np

from exegete.config import CorpusConfig, ExampleConfig, Negative
from exegete.errors import InputError
from exegete.examples import StoreData, select_many, split_segments
from exegete.examples.proxies import Neighbour, SameToken
from exegete.examples.proxy import Proxy
from exegete.examples.split import CODES
from exegete.rules import render
from exegete.rules.execute import TokenContext, matches
from exegete.rules.language import Rule
from exegete.store.neighbours import Neighbours, cofiring_neighbours
from exegete.store.store import Store
from exegete.streams import stream
from exegete.testing.latents import NoSuchTokensError, Planted, plan_latents
from exegete.testing.planting import plant
from exegete.tokens import TokenTable
from exegete.types import Array, ExampleSet, Explanation, LatentId

NAME: Final = "planted"
DAMAGED: Final = ("missing", "extra")
"""What sanity checks do to an exact explanation: half of what it fits is taken away; as much that is wrong is added."""
SHOWN: Final = 10
"""Firing train windows of each latent."""
WHOLE: Final = 1 << 40
"""More windows than any frame has: asked for so many, selection gives all of them with their strata."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Claim:
    """What an explanation says of every window of the test frame, read alone.

    ``fits`` [windows, window] bool are the tokens it fits; ``program`` is its rule, None where it is not one.
    """

    text: str
    fits: Array
    program: Rule | None = None

    @property
    def anywhere(self) -> Array:
        """Which windows it fits [windows]."""
        found: Array = np.asarray(self.fits.any(axis=1))
        return found


@final
class World:
    """Planted latents over one corpus, their firings in a store, and their ladders of explanations.

    The folder is temporary and goes with the object, unless one was given.
    """

    def __init__(self, store: Store, latents: Sequence[Planted], *, seed: int, window: int) -> None:
        self.store, self.latents, self.seed, self.window = store, tuple(latents), seed, window
        self.data = StoreData(store, split_segments(store.corpus, seed=seed, test_share=_TEST_SHARE))
        self._claims: dict[tuple[int, Rule], Claim] = {}
        self._frames: dict[int, TestFrame] = {}

    @property
    def table(self) -> TokenTable:
        """What tokens stand for."""
        return self.data.tokens

    @cached_property
    def near(self) -> Neighbours:
        """The four latents that most often fire where each latent does."""
        return cofiring_neighbours(self.store, range(len(self.latents)), k=4, seed=self.seed)

    @cached_property
    def proxies(self) -> Mapping[Negative, Proxy]:
        """What finds silent windows with a token of the latent, and those in which its neighbours fire."""
        return {"same_token": SameToken(), "neighbour": Neighbour(self.near)}

    def select(
        self, n: int, *, negatives: tuple[Negative, ...], seed: int, indices: Sequence[int] | None = None
    ) -> list[ExampleSet]:
        """Return up to n firing and n silent test windows of each latent, by the draw that the seed makes.

        Raises InputError for a latent that has too few.
        """
        config = ExampleConfig(
            window=self.window, n_train=SHOWN, n_test=n, n_negatives=n, negatives=negatives, min_train=1, min_test=1
        )
        wanted = range(len(self.latents)) if indices is None else indices
        found = []
        for chosen in select_many(self.data, list(wanted), config, seed, proxies=self.proxies):
            if not isinstance(chosen, ExampleSet):
                raise InputError(f"planted latent {chosen.latent} has no examples: {chosen.reason}")
            found.append(chosen)
        return found

    def fitting(self, rules: Sequence[Rule], tokens: Array) -> Array:
        """Return in which windows, tokens [n, window], each rule matches anywhere, read alone [rules, n]."""
        context = TokenContext(tokens, self.table, ~self.table.is_special[tokens])
        found = np.zeros((len(rules), len(tokens)), bool)
        for i, rule in enumerate(rules):
            found[i, matches(rule, context)[0] // tokens.shape[1]] = True
        return found

    def frame(self, seed: int) -> TestFrame:
        """Return the windows of the test split as this seed tiles them; the last one is kept."""
        if seed not in self._frames:
            self._frames, self._claims = {seed: TestFrame(self, seed)}, {}
        return self._frames[seed]

    def claim(self, latent: int, rung: str, seed: int) -> Claim:
        """Return what a rung of a latent's ladder says of every test window, or the exact one damaged."""
        frame = self.frame(seed)
        if rung in DAMAGED:
            return _damaged(self.claim(latent, "exact", seed), rung, stream(seed, "damaged", latent))
        rule = self.latents[latent].ladder[rung]
        key = (seed, rule)
        if key not in self._claims:
            self._claims[key] = Claim(text=render(rule, self.table), fits=frame.matched(rule), program=rule)
        return self._claims[key]

    def explanation(self, latent: int, rung: str, seed: int) -> Explanation:
        """Return a rung as an explanation of a latent, with its program where it has one."""
        claim = self.claim(latent, rung, seed)
        return Explanation(
            latent=LatentId(coder=self.store.name, index=latent),
            text=claim.text,
            status="ok",
            explainer={"name": "ladder", "args": {"rung": rung}},
            program=None if claim.program is None else claim.program.to_json(),
        )


@final
class TestFrame:
    """The test windows of a world for one seed: their tokens, texts, and what rules match in each of them alone."""

    __test__ = False  # no test of pytest's

    def __init__(self, world: World, seed: int) -> None:
        made = world.data.frame(world.window, seed)
        self.numbers = made.numbers(CODES["test"])
        self.tokens = world.data.window_tokens(made, self.numbers)
        self.n_documents = len(np.unique(made.document[self.numbers]))
        self.table = world.table
        self.texts = world.table.decode_rows(self.tokens)
        self.places = {text: i for i, text in reversed(list(enumerate(self.texts)))}
        self._same = np.array([self.places[text] for text in self.texts])
        self._starts = made.places(self.numbers)
        self._length = made.length
        self._context = TokenContext(self.tokens, world.table, ~world.table.is_special[self.tokens])

    def __len__(self) -> int:
        return len(self.numbers)

    def matched(self, rule: Rule) -> Array:
        """Return which tokens a rule matches [windows, window]; windows that read alike are taken for one."""
        found = np.zeros(self._context.size, bool)
        found[matches(rule, self._context)[0]] = True
        claimed: Array = found.reshape(self.tokens.shape)[self._same]
        return claimed

    def windows(self, row: Array, start: Array) -> Array:
        """Return which test windows begin at these places of rows."""
        return np.searchsorted(self._starts, row * self._length + start)


def _damaged(claim: Claim, how: str, rng: np.random.Generator) -> Claim:
    """Return a claim of which half of the windows are missing, or to which as many wrong ones are added."""
    anywhere = claim.anywhere
    fits = claim.fits.copy()
    if how == "missing":
        fits[anywhere & (rng.random(len(fits)) < 0.5)] = False
        return Claim(text=f"{claim.text} Half of that is missing.", fits=fits)
    others = np.flatnonzero(~anywhere)
    fits[rng.choice(others, min(int(anywhere.sum()), len(others)), replace=False)] = True
    return Claim(text=f"{claim.text} As much is wrong.", fits=fits)


_TEST_SHARE = 0.5


def make_world(
    latents: int = 48,
    *,
    tokens: int = 900_000,
    seed: int = 0,
    window: int = 32,
    folder: str | Path | None = None,
) -> World:
    """Plant latents in the standard library's text, split by the demo's tokenizer.

    ``tokens`` of text are taken, about half of them for testing. Raises InputError when they do not hold what such
    latents are made of.
    """
    from transformers import AutoTokenizer

    from exegete.demo import assets
    from exegete.store.corpus import build_corpus
    from exegete.store.sources import text_documents
    from exegete.subjects.pieces import token_table

    place = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="exegete-world-"))
    tokenizer = AutoTokenizer.from_pretrained(assets() / "model")
    config = CorpusConfig(text=("stdlib",), max_tokens=tokens)
    # The source says which files the demo's models saw; here no model sees any.
    documents = (dataclasses.replace(document, split=None) for document in text_documents(["stdlib"]))
    corpus = build_corpus(place / "corpus", documents, tokenizer, config, table=token_table(tokenizer))
    rows = corpus.rows(slice(0, len(corpus)))
    context = TokenContext(rows.tokens, corpus.table, rows.mask, rows.documents)
    try:
        planned = plan_latents(context, latents, stream(seed, "planted latents"))
    except NoSuchTokensError as error:
        raise InputError(f"{tokens} tokens of text are too few to plant latents in ({error}); give more") from error
    store = plant(place / "store", corpus, context, [p.program for p in planned], name=NAME, seed=seed)
    world = World(store, planned, seed=seed, window=window)
    if folder is None:
        weakref.finalize(world, shutil.rmtree, place, ignore_errors=True)
    return world
