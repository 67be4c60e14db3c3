from __future__ import annotations

import numpy as np
import pytest
import torch

from exegete.scorers.intervention_measuring import token_set
from exegete.subjects.edits import latent_values
from exegete.testing.acting import make_acting
from exegete.testing.worlds import World


def test_what_the_subject_says_next_is_what_is_computed_by_hand(world: World) -> None:
    acting = make_acting(world)
    rows = world.store.corpus.rows(slice(0, 2)).tokens[:, :20].astype(np.int64)
    with torch.no_grad():
        logits = acting.subject.model(torch.from_numpy(rows)).logits[:, -1].double()
    plain = torch.softmax(logits, dim=-1).numpy()
    assert acting.next_tokens(rows[:, -1], 0, 0.0) == pytest.approx(plain, abs=1e-6)


def test_a_latent_makes_the_tokens_of_its_program_likelier(world: World) -> None:
    acting = make_acting(world)
    last = np.arange(5, 400, 7)
    for latent in range(len(world.latents)):
        tokens = list(token_set(world.explanation(latent, "exact", 0)))
        clean, edited = (acting.next_tokens(last, latent, strength)[:, tokens].sum(axis=1) for strength in (0.0, 2.0))
        assert (edited > clean).all()
    assert torch.allclose(acting.coder.decoder.norm(dim=1), torch.ones(len(world.latents)))  # type: ignore[attr-defined]


def test_a_latent_fires_on_the_tokens_that_are_said_to_fire_it(world: World) -> None:
    acting = make_acting(world)
    every = torch.arange(len(world.table))[:, None]
    x = acting.subject.capture(every, torch.ones_like(every), [acting.coder.point])[acting.coder.point][:, 0]
    for latent in range(len(world.latents)):
        assert ((latent_values(acting.coder, latent, x) > 0).numpy() == acting.fires[latent]).all()
        tokens = list(token_set(world.explanation(latent, "exact", 0)))
        assert acting.fires[latent, tokens].all()
        assert acting.fires[latent].sum() < len(tokens) + 10
