from __future__ import annotations

import numpy as np
import pytest

from exegete.errors import InputError
from exegete.rules.execute import TokenContext, execute, matches
from exegete.store import Store
from exegete.streams import stream
from exegete.testing.latents import KINDS, RUNGS, NoSuchTokensError, Text, plan_latents
from exegete.testing.settings import NEGATIVES, Round
from exegete.testing.worlds import DAMAGED, WHOLE, World, make_world
from exegete.types import STRATA, Array


def whole_context(world: World) -> TokenContext:
    rows = world.store.corpus.rows(slice(0, len(world.store.corpus)))
    return TokenContext(rows.tokens, world.table, rows.mask, rows.documents)


def test_a_latent_fires_exactly_where_its_program_matches(world: World) -> None:
    context = whole_context(world)
    for latent in world.latents:
        at, means = matches(latent.program, context, value="activation")
        fired = world.store.firings(latent.index)
        assert (fired.rows * context.length + fired.positions == at).all()
        spread = np.log(fired.values / means)
        assert abs(spread.mean()) < 0.05
        assert 0.2 < spread.std() < 0.3


def test_the_store_is_a_whole_one_and_opens_again(world: World) -> None:
    again = Store.open(world.store.folder)
    assert again.manifest.complete
    assert again.content_hash() == world.store.manifest.content_hash
    assert again.width == len(world.latents)


def test_siblings_share_firings_and_rungs_deserve_their_names(world: World) -> None:
    text = Text(whole_context(world), stream(0))
    assert {latent.kind for latent in world.latents} == set(list(KINDS)[: len(world.latents) // 2])
    for latent in world.latents:
        sibling = world.latents[latent.sibling]
        assert sibling.sibling == latent.index
        assert sibling.kind == latent.kind
        assert tuple(latent.ladder) == RUNGS
        assert latent.ladder["sibling"] == sibling.program
        windows = {rung: text.windows(rule) for rung, rule in latent.ladder.items()}
        exact = len(windows["exact"])
        assert len(windows["broad"]) >= 1.3 * exact
        assert max(len(windows["narrow"]), len(windows["half"])) <= 0.85 * exact
        assert len(np.intersect1d(windows["exact"], windows["sibling"]))
        others = [other for other in world.latents if other.kind != latent.kind]
        assert latent.ladder["random"] in [other.program for other in others]


def test_claims_are_what_rules_match_in_windows_alone(world: World) -> None:
    frame = world.frame(0)
    for latent in (0, 3):
        for rung in RUNGS:
            claim = world.claim(latent, rung, 0)
            assert claim.program is not None
            for window in (0, 5, len(frame) - 1):
                tokens = frame.tokens[window][None]
                alone = execute([claim.program], tokens, world.table, ~world.table.is_special[tokens])[0, 0] > 0
                assert (claim.fits[window] == alone).all()
    assert world.explanation(0, "broad", 0).text == world.claim(0, "broad", 0).text


def test_damaged_claims_lack_half_or_hold_as_much_that_is_wrong(world: World) -> None:
    exact = world.claim(2, "exact", 0).anywhere
    missing, extra = (world.claim(2, how, 0).anywhere for how in DAMAGED)
    assert not (missing & ~exact).any()
    assert 0.3 < missing.sum() / exact.sum() < 0.7
    assert (extra & exact).sum() == exact.sum()
    assert (extra & ~exact).sum() == exact.sum()
    assert world.explanation(2, "missing", 0).program is None


def test_the_whole_set_holds_every_window_once_and_the_draw_is_of_it(world: World) -> None:
    made = Round(world, 0, 20)
    for setting in made.settings[:4]:
        whole, drawn = setting.whole.part("test"), setting.drawn.part("test")

        def keys(windows: object) -> Array:
            found: Array = windows.row * 10_000 + windows.start  # type: ignore[attr-defined]
            return found

        at = made.frame.windows(whole.row, whole.start)
        assert (made.frame.tokens[at] == whole.tokens).all()
        assert np.isin(keys(drawn), keys(whole)).all()
        assert len(np.unique(keys(whole))) == len(whole)
        assert (whole.probability == 1).all()
        order = {int(k): i for i, k in enumerate(keys(whole))}
        assert all(drawn.stratum[i] == whole.stratum[order[int(k)]] for i, k in enumerate(keys(drawn)))
        assert whole.fires.sum() <= setting.whole.firing_rate * setting.whole.frame


def test_hard_negatives_are_the_real_ones(world: World) -> None:
    chosen = world.select(WHOLE, negatives=NEGATIVES, seed=0)
    names = {STRATA[s] for examples in chosen for s in np.unique(examples.part("test", fires=False).stratum)}
    assert names == {"same_token", "neighbour", "silent"}
    near = chosen[0].part("test", fires=False)
    near = near.take(near.stratum == STRATA.index("neighbour"))
    starts = near.row * world.store.row_length + near.start
    places: set[int] = set()
    for index in world.near.neighbours[0]:
        if index >= 0:
            firings = world.store.firings(int(index))
            places |= set((firings.rows * world.store.row_length + firings.positions).tolist())
    assert len(near)
    assert all(any(start + i in places for i in range(world.window)) for start in starts.tolist())


def test_planning_depends_on_the_seed_alone(world: World) -> None:
    context = whole_context(world)
    assert plan_latents(context, 4, stream(1)) == plan_latents(context, 4, stream(1))
    assert plan_latents(context, 4, stream(1)) != plan_latents(context, 4, stream(2))


def test_text_without_such_tokens_is_refused(world: World) -> None:
    context = TokenContext(np.ones((4, 64), np.uint32), world.table)
    with pytest.raises(NoSuchTokensError, match="of the wanted rates"):
        plan_latents(context, 4, stream(1))
    with pytest.raises(InputError, match="give more"):
        make_world(16, tokens=300)
