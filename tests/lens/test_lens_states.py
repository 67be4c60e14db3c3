"""State-aware lenses: the state after every token, training beside the plain lens, files, generation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from exegete.errors import InputError
from exegete.lens import (
    LensConfig,
    LensText,
    LogitLens,
    evaluate_lenses,
    generate_from_site,
    load_lens,
    new_lens,
    prediction_trajectory,
    train_lens,
)
from exegete.lens.report import evaluation_lines, training_lines
from exegete.lens.states import StateReader
from exegete.lens.text import Batch
from exegete.lens.translators import StateMap
from exegete.subjects import Subject
from exegete.subjects.running import Running
from exegete.subjects.sites import residuals


def batch_of(tokens: torch.Tensor, keep: torch.Tensor) -> Batch:
    n = int(keep.sum())
    return Batch(tokens=tokens, keep=keep, labels=torch.zeros(n, dtype=torch.long), documents=torch.zeros(n).numpy())


def states_of(subject: Subject, sites: tuple[int, ...], batch: Batch) -> dict[int, torch.Tensor]:
    """Return the states after all predicting positions of a batch, row by row."""
    reader = StateReader(subject, sites)
    found = list(reader.blocks(batch))
    order = torch.argsort(torch.cat([places for places, _ in found]))
    return {site: torch.cat([states[site] for _, states in found])[order] for site in reader.sites}


@pytest.mark.parametrize("entries", [1 << 28, 1])
@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_states_are_those_after_each_token_row_by_row(
    family: str, entries: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exegete.lens.states._BLOCK_ENTRIES", entries)
    subject: Subject = request.getfixturevalue(family)
    tokens = torch.tensor([[0, 5, 9, 40, 7], [0, 8, 8, 61, 2]])
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]]).bool()
    read = states_of(subject, (-1, 0, 2), batch_of(tokens, keep))
    assert sorted(read) == [0, 2]
    place = 0
    for r in range(2):
        for t in range(5):
            if keep[r, t]:
                own = Running.start(subject, tokens[r : r + 1, : t + 1]).state()
                parts = []
                for name in own.components(2):
                    value = own[2][name]
                    if family == "rwkv" and name == "num":
                        value = value / own[2]["den"]
                    if family == "rwkv" and name == "den":
                        value = value.log()
                    parts.append(value.flatten().float())
                torch.testing.assert_close(read[2][place], torch.cat(parts), rtol=1e-3, atol=1e-4)
                place += 1
    assert place == len(read[2])


@pytest.mark.parametrize("positions", [1, 3, 100])
def test_states_come_in_blocks_of_bounded_size(positions: int, mamba: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(StateReader(mamba, (0, 1)).sizes.values())
    monkeypatch.setattr("exegete.lens.states._BLOCK_ENTRIES", positions * size)
    monkeypatch.setattr("exegete.lens.states._CARRIED_ENTRIES", 2 * size + 1)
    reader = StateReader(mamba, (0, 1))
    assert reader.rows == 2
    keep = torch.tensor([[0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0, 1]]).bool()
    tokens = torch.tensor([[0, 5, 9, 40, 7, 1, 3], [0, 8, 8, 61, 2, 4, 4]])
    found = list(reader.blocks(batch_of(tokens, keep)))
    # Columns predict 0, 1, 2, 0, 0, 1, 2 times; a column is never taken apart.
    assert [len(places) for places, _ in found] == {1: [1, 2, 1, 2], 3: [3, 3], 100: [6]}[positions]
    assert sorted(int(place) for places, _ in found for place in places) == list(range(6))
    for places, states in found:
        assert places.tolist() == sorted(places.tolist())
        assert all(held.shape == (len(places), reader.sizes[site]) for site, held in states.items())


def test_blocks_change_no_number(mamba: Subject, mamba_text: LensText, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = new_lens(mamba, states=StateReader(mamba, (0, 1)).sizes)
    with torch.no_grad():
        for translator in lens.translators.values():
            if translator.state is not None:
                translator.state.full.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    prompt = (0, 5, 9, 40, 7, 1)

    def measured() -> list[torch.Tensor]:
        shown = prediction_trajectory(lens, prompt)
        found = evaluate_lenses({"state": lens}, mamba_text, part="validation")
        values = [found.nats["state"][metric][site].value for metric in ("ce", "kl", "entropy") for site in found.sites]
        return [
            torch.tensor(values),
            *(torch.from_numpy(v) for v in (shown.kl, shown.ce[:, :-1], shown.top, shown.rank)),
        ]

    whole = measured()
    monkeypatch.setattr("exegete.lens.states._BLOCK_ENTRIES", 1)
    monkeypatch.setattr("exegete.lens.states._CARRIED_ENTRIES", 1)
    for one, other in zip(whole, measured(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_writing_on_carries_the_state_as_reading_again_does(mamba: Subject) -> None:
    lens = new_lens(mamba, states=StateReader(mamba, (1,)).sizes)
    own = lens.translators[1].state
    assert own is not None
    with torch.no_grad():
        own.full.normal_(generator=torch.Generator().manual_seed(3))
    made = generate_from_site(lens, 1, (0, 5, 9), n=5)
    tokens = [0, 5, 9]
    for token in made:
        assert token == int(prediction_trajectory(lens, tokens).top[2, -1, 0])
        tokens.append(token)


def test_a_subject_without_a_state_is_refused(llama: Subject) -> None:
    with pytest.raises(InputError, match="carries no recurrent state"):
        StateReader(llama, (0, 1))


def test_the_embedding_has_no_state(mamba: Subject) -> None:
    with pytest.raises(InputError, match=r"sites \[-1\]"):
        StateReader(mamba, (-1,))


@pytest.mark.parametrize("rank", [None, 4])
def test_trained_beside_the_plain_lens(
    rank: int | None, mamba: Subject, mamba_text: LensText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        monkeypatch.setattr("exegete.lens.lens.FULL_ENTRIES", 0)
    config = LensConfig(
        steps=3, batch_tokens=50, optimizer="adam", learning_rate=3, check_every=3, validation_tokens=30, rank=rank or 1
    )
    found = train_lens(mamba, mamba_text, out=tmp_path, state=True, config=config)
    plain, aware = found["tuned"], found["state"]
    assert plain.sites.keys() == aware.sites.keys() == {-1, 0, 1}
    for site in (-1, 0, 1):
        assert aware.sites[site].untrained == plain.sites[site].untrained  # both begin as the logit lens
        assert aware.sites[site].best <= aware.sites[site].untrained
    assert aware.lens.state_sites == (0, 1)
    own = aware.lens.translators[0].state
    assert own is not None
    assert own.rank == rank
    alone = train_lens(mamba, mamba_text, out=tmp_path / "alone", config=config)["tuned"]
    assert torch.equal(alone.lens.translators[1].weight, plain.lens.translators[1].weight)
    again = load_lens(tmp_path / "state", mamba)
    assert again.kind == "state"
    tokens = torch.tensor([[0, 5, 9, 40]])
    h = residuals(mamba, tokens, (1,))[1]
    state = states_of(mamba, (1,), batch_of(tokens, torch.ones(1, 4, dtype=torch.bool)))[1][None]
    assert torch.equal(again.logits(1, h, state), aware.lens.logits(1, h, state))
    assert any("state" in line for line in training_lines(found, "kl"))


@pytest.mark.parametrize("rank", [None, 4])
def test_where_the_state_makes_it_worse_the_plain_translator_is_kept(
    rank: int | None, mamba: Subject, mamba_text: LensText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        monkeypatch.setattr("exegete.lens.lens.FULL_ENTRIES", 0)
    # States a thousand times too large: every step along them goes far beyond its aim.
    monkeypatch.setattr(StateMap, "standardise", lambda self, seen: self.scale.fill_(1e3))
    config = LensConfig(steps=2, batch_tokens=50, check_every=1, validation_tokens=30, rank=rank or 1, clip=1e9)
    found = train_lens(mamba, mamba_text, out=tmp_path, sites=(0, 1), state=True, config=config)
    plain, aware = found["tuned"], found["state"]
    assert any(one.kept_plain for one in aware.sites.values())
    states = {site: torch.randn(3, size) for site, size in StateReader(mamba, (0, 1)).sizes.items()}
    for site, one in aware.sites.items():
        assert one.best <= plain.sites[site].best
        if one.kept_plain:
            h = torch.randn(3, 32)
            assert torch.equal(aware.lens.logits(site, h, states[site]), plain.lens.logits(site, h))
    assert "kept the plain translator" in "\n".join(training_lines(found, "kl"))
    again = train_lens(mamba, mamba_text, out=tmp_path, sites=(0, 1), state=True, config=config)["state"]
    assert again.sites == aware.sites


def test_measured_shown_and_written_from(mamba: Subject, mamba_text: LensText) -> None:
    sizes = StateReader(mamba, (0, 1)).sizes
    lens = new_lens(mamba, states=sizes)
    lenses = {"logit": LogitLens(mamba), "tuned": new_lens(mamba), "state": lens}
    found = evaluate_lenses(lenses, mamba_text, part="validation", transfer=True)
    for site in found.sites:  # untrained, all three are one
        assert found.nats["state"]["kl"][site].value == found.nats["logit"]["kl"][site].value
    assert set(found.transfer) == {"tuned"}
    assert any(line.startswith("state-aware beside plain") for line in evaluation_lines(found))
    own = lens.translators[1].state
    assert own is not None
    with torch.no_grad():
        assert own.full is not None
        own.full.normal_(generator=torch.Generator().manual_seed(0))
    shown = prediction_trajectory(lens, (0, 5, 9))
    plain = prediction_trajectory(LogitLens(mamba), (0, 5, 9))
    assert (shown.kl[0] == plain.kl[0]).all()
    assert not math.isclose(float(shown.kl[2].sum()), float(plain.kl[2].sum()))
    made = generate_from_site(lens, 1, (0, 5, 9), n=2)
    assert made[0] == int(shown.top[2, -1, 0])
