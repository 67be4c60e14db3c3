"""What a lens computes, against the formula by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.lens import LogitLens, TunedLens, new_lens
from exegete.lens.translators import Moments, StateMap, Translator
from exegete.subjects import Subject
from exegete.subjects.sites import residuals

Make = Callable[..., TunedLens]

TOKENS = torch.tensor([[0, 5, 9, 40, 7], [0, 8, 8, 61, 2]])


def test_a_tuned_lens_is_the_readout_of_h_plus_w_h_plus_b(trained: Make, llama: Subject) -> None:
    lens = trained(llama)
    h = residuals(llama, TOKENS, (1,))[1]
    weights = {name: value.double().numpy() for name, value in llama.model.state_dict().items()}
    own = lens.translators[1]
    assert own.bias is not None
    x = h.double().numpy()
    x = x + x @ own.weight.detach().double().numpy().T + own.bias.detach().double().numpy()
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + llama.model.config.rms_norm_eps)
    want = (x * weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    np.testing.assert_allclose(lens.logits(1, h).detach().numpy(), want, rtol=1e-4, atol=1e-4)


def test_before_training_a_tuned_lens_is_the_logit_lens_bit_by_bit(llama: Subject, mamba: Subject) -> None:
    for subject in (llama, mamba):
        logit, tuned = LogitLens(subject), new_lens(subject, (-1, 0, 1, 2))
        for site, h in residuals(subject, TOKENS, (-1, 0, 1, 2)).items():
            assert torch.equal(logit.logits(site, h), tuned.logits(site, h))
        assert all(one.is_identity for one in tuned.translators.values())


def test_at_the_last_site_every_lens_gives_the_models_own_logits(trained: Make, llama: Subject) -> None:
    with torch.no_grad():
        want = llama.model(TOKENS).logits
        h = residuals(llama, TOKENS, (2,))[2]
        for lens in (LogitLens(llama), trained(llama)):
            torch.testing.assert_close(lens.logits(2, h), want, rtol=1e-5, atol=1e-5)


def test_sites_that_a_lens_lacks_are_refused(llama: Subject) -> None:
    h = torch.zeros(1, 16)
    with pytest.raises(NotFoundError, match=r"no site 1; it has -1, 0 \(and 2"):
        new_lens(llama, (-1, 0)).logits(1, h)
    with pytest.raises(NotFoundError, match="no site 3"):
        LogitLens(llama).logits(3, h)


def test_a_direction_is_translated_without_the_bias(trained: Make, llama: Subject) -> None:
    lens = trained(llama)
    h, v = torch.randn(2, 3, 16)
    moved = lens.translate(0, h + v) - lens.translate(0, h)
    torch.testing.assert_close(lens.translate_direction(0, v), moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_state_map_is_a_linear_map_of_the_standardised_state(rank: int | None) -> None:
    own = StateMap(5, 3, rank=rank, seed=1)
    states = torch.tensor([[1.0, 2, 3, 4, 7], [3.0, 2, 1, 0, 7]])
    seen = Moments()
    seen.add(states)
    own.standardise(seen)
    assert not own(states).any()
    with torch.no_grad():
        (own.full if rank is None else own.up).fill_(0.5)
    matrix = own.full if rank is None else own.up @ own.down
    # By hand: mean 2, 2, 2, 2, 7; spread 1, 0, 1, 2, 0; what never changes counts for nothing.
    x = torch.tensor([[-1.0, 0, 1, 1, 0], [1.0, 0, -1, -1, 0]])
    torch.testing.assert_close(own(states), x @ matrix.T)
    with pytest.raises(MismatchError, match="states of 5 numbers, got 4"):
        own(states[:, :4])


def test_moments_of_blocks_are_those_of_all_rows() -> None:
    rows = torch.randn(17, 4, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1e-3, 1, 50, 0]) + 7
    seen = Moments()
    for start, stop in ((0, 1), (1, 9), (9, 17)):
        seen.add(rows[start:stop])
    assert seen.n == 17
    torch.testing.assert_close(seen.mean, rows.mean(dim=0))
    torch.testing.assert_close(seen.spread, rows.std(dim=0, correction=0))
    torch.testing.assert_close(seen.largest, rows.abs().amax(dim=0))


def test_a_state_aware_translator_asks_for_the_state() -> None:
    with pytest.raises(InputError, match="reads the recurrent state as well"):
        Translator(3, state=StateMap(5, 3, rank=None))(torch.zeros(2, 3))
