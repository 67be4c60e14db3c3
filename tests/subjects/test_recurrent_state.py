"""States, vectors of them and edits: by hand on small tensors, and the real domain of RWKV against its recurrence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RwkvConfig

from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.subjects import Subject, load_subject
from exegete.subjects.memories_modules import XLSTMMemory
from exegete.subjects.memories_rwkv import DENOMINATOR_FLOOR, RwkvMemory
from exegete.subjects.recurrent_state import AddState, ClampState, ReplaceState, State, StateEdit, StateVector
from exegete.subjects.running import Running
from exegete.subjects.verdicts import verdict
from exegete.testing import toy_subject_model
from exegete.testing.models import toy_model

TOKENS = torch.randint(1, 400, (3, 9), generator=torch.Generator().manual_seed(7))

_RWKV = toy_model(RwkvConfig(vocab_size=8, hidden_size=2, attention_hidden_size=2, num_hidden_layers=2))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def state() -> State:
    return State({0: {"conv": draw(3, 4, 2), "ssm": draw(3, 2, 5)}, 2: {"conv": draw(3, 4, 2, seed=1)}})


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_subject_model("mamba", tmp_path_factory.mktemp("m") / "mamba")), device="cpu")


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_subject_model("rwkv", tmp_path_factory.mktemp("r") / "rwkv")), device="cpu")


def test_reading_a_state(state: State) -> None:
    assert (state.layers, len(state)) == ((0, 2), 3)
    assert (state.components(0), state.components(2)) == (("conv", "ssm"), ("conv",))
    assert state.flat(0).shape == (3, 18)
    assert torch.equal(state.flat(0)[:, 8:], state[0]["ssm"].reshape(3, 10))
    assert torch.equal(state.flat(0, ["ssm"]), state[0]["ssm"].reshape(3, 10))
    assert torch.equal(state.mean().parts[2]["conv"], state[2]["conv"].mean(0))
    some = state.rows([2, 0])
    assert torch.equal(some[0]["ssm"], state[0]["ssm"][[2, 0]])
    joined = State.join([some, state.rows(torch.tensor([1]))])
    assert torch.equal(joined[2]["conv"], state[2]["conv"][[2, 0, 1]])
    assert (State({}).layers, len(State({}))) == ((), 0)
    for wrong in (lambda: state[1], lambda: state.components(1), lambda: state.flat(1), lambda: state.flat(2, ["ssm"])):
        with pytest.raises(NotFoundError):
            wrong()
    with pytest.raises(NotFoundError, match="unknown state component 'kv'; known: conv, ssm"):
        state.flat(0, ["kv"])
    with pytest.raises(MismatchError):
        State.join([state, State({0: {"conv": draw(3, 4, 2)}})])


def test_arithmetic_of_vectors(state: State) -> None:
    a, b = state.rows([0]).mean(), state.rows([1, 2]).mean()
    difference = a - b
    assert torch.equal(difference.parts[0]["ssm"], state[0]["ssm"][0] - state[0]["ssm"][1:].mean(0))
    assert torch.equal((2 * difference + a).parts[2]["conv"], 2 * difference.parts[2]["conv"] + a.parts[2]["conv"])
    assert torch.equal((-a * 0.5).parts[0]["conv"], -0.5 * a.parts[0]["conv"])
    parts = [v.flatten() for p in a.parts.values() for v in p.values()]
    assert a.norm() == pytest.approx(float(torch.cat(parts).norm()), rel=1e-6)
    assert a.norm(0, "ssm") == pytest.approx(float(state[0]["ssm"][0].norm()), rel=1e-6)
    assert a.norm(component="conv") == pytest.approx((a.norm(0, "conv") ** 2 + a.norm(2) ** 2) ** 0.5, rel=1e-6)
    assert a.only(layers=[2]).layers == (2,)
    assert a.only(components=["ssm"]).layers == (0,)
    assert a.only(layers=[0], components=["conv"]).components(0) == ("conv",)
    for wrong in ({"layers": [1]}, {"components": ["kv"]}):
        with pytest.raises(NotFoundError):
            a.only(**wrong)
    with pytest.raises(MismatchError, match="of one model"):
        a - a.only(layers=[0])


def test_random_vectors_have_the_norm_of_every_part(state: State) -> None:
    vector = state.mean()
    first, second = (vector.random_like(np.random.default_rng(seed)) for seed in (0, 1))
    for layer, name in ((0, "conv"), (0, "ssm"), (2, "conv")):
        assert first.norm(layer, name) == pytest.approx(vector.norm(layer, name), rel=1e-5)
        assert not torch.equal(first.parts[layer][name], second.parts[layer][name])
    again = vector.random_like(np.random.default_rng(0))
    assert torch.equal(again.parts[2]["conv"], first.parts[2]["conv"])


def edited(subject: Subject, running: Running, *edits: StateEdit) -> State:
    copied = running.copy()
    copied.edit(*edits)
    return copied.state()


def test_edits_by_hand(mamba: Subject) -> None:
    running = Running.start(mamba, TOKENS[:, :6])
    state = running.state()
    vector = state.rows([0]).mean()
    added = edited(mamba, running, AddState(vector, torch.tensor([1.0, 0.0, -2.0]), layers=[1], components=["ssm"]))
    by = torch.tensor([1.0, 0.0, -2.0])[:, None, None]
    torch.testing.assert_close(added[1]["ssm"], state[1]["ssm"] + by * vector.parts[1]["ssm"])
    replaced = edited(mamba, running, ReplaceState(vector, components=["conv"]))
    assert torch.equal(replaced[2]["conv"], state[2]["conv"][:1].expand(3, -1, -1))
    clamped = edited(mamba, running, ClampState(-0.1, 0.2, layers=[0]))
    assert torch.equal(clamped[0]["ssm"], state[0]["ssm"].clamp(-0.1, 0.2))
    shorter = edited(mamba, running, ClampState(max_norm=0.5, components=["ssm"]))
    norms = state[1]["ssm"].flatten(1).norm(dim=1)
    torch.testing.assert_close(shorter[1]["ssm"].flatten(1).norm(dim=1), norms.clamp_max(0.5))
    for found, changed in ((added, {(1, "ssm")}), (replaced, {(i, "conv") for i in range(3)})):
        for layer in state.layers:
            for name in state.components(layer):
                assert torch.equal(found[layer][name], state[layer][name]) == ((layer, name) not in changed)
    both = edited(mamba, running, AddState(vector), AddState(vector, -1.0), ClampState(high=0.0))
    torch.testing.assert_close(both[0]["ssm"], state[0]["ssm"].clamp(max=0.0), rtol=0, atol=1e-6)


def test_edits_that_do_not_fit_are_refused(mamba: Subject) -> None:
    running = Running.start(mamba, TOKENS[:, :6])
    vector = running.state().mean()
    before = running.state()
    for wrong, error, match in (
        (AddState(vector, layers=[7]), NotFoundError, "no state of block 7; blocks with one: 0, 1, 2"),
        (AddState(vector, components=["kv"]), NotFoundError, "unknown state component 'kv'; known: conv, ssm"),
        (AddState(StateVector({0: {"kv": draw(3)}})), NotFoundError, "block 0 carries no state kv; it has: conv, ssm"),
        (AddState(StateVector({9: {"ssm": draw(3)}})), NotFoundError, "block 9 carries no state ssm; it has: none"),
        (AddState(StateVector({0: {"ssm": draw(3)}})), MismatchError, "was it taken from another one"),
        (AddState(vector, torch.ones(2)), MismatchError, "3 rows, and multipliers of shape"),
        (ReplaceState(running.state().rows([0])), MismatchError, "was it taken from another one"),
        (ReplaceState(StateVector({0: {"ssm": draw(8)}})), MismatchError, "was it taken from another one"),
    ):
        with pytest.raises(error, match=match):
            running.edit(AddState(vector, 3.0), wrong)
    for layer in before.layers:  # an edit that is refused leaves everything as it was
        assert all(torch.equal(v, before[layer][n]) for n, v in running.state()[layer].items())
    with pytest.raises(InputError, match="needs low, high or max_norm"):
        ClampState()
    with pytest.raises(InputError, match="low is at most its high"):
        ClampState(1.0, 0.0)


def recurrence(subject: Subject, ids: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return num and den [rows, d] of one block by the recurrence in the real domain, from keys and values."""
    caught: dict[str, torch.Tensor] = {}
    attention = subject.model.rwkv.blocks[block].attention
    handles = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: caught.update({name: out.double()}))
        for name in ("key", "value")
    ]
    with torch.no_grad():
        subject.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    decay = (-attention.time_decay.detach().double().exp()).exp()
    num = den = torch.zeros_like(caught["key"][:, 0])
    for at in range(ids.shape[1]):
        weight = caught["key"][:, at].exp()
        num, den = decay * num + weight * caught["value"][:, at], decay * den + weight
    return num, den


def test_num_and_den_are_the_sums_of_the_recurrence(rwkv: Subject) -> None:
    running = Running.start(rwkv, TOKENS[:, :5])
    running.feed(TOKENS[:, 5:8])
    for block in range(3):
        num, den = recurrence(rwkv, TOKENS[:, :8], block)
        torch.testing.assert_close(running.state()[block]["num"], num, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(running.state()[block]["den"], den, rtol=1e-4, atol=1e-6)


def test_what_is_added_in_the_real_domain_is_there(rwkv: Subject) -> None:
    running = Running.start(rwkv, TOKENS[:, :6])
    state = running.state()
    vector = (state.rows([0]).mean() - state.rows([1]).mean()) * 0.02
    assert running.edit(AddState(vector)) == 0
    for block in range(3):
        for name, value in running.state()[block].items():
            torch.testing.assert_close(value, state[block][name] + vector.parts[block][name], rtol=1e-5, atol=1e-6)
            assert (value - state[block][name]).abs().max() > 1e-4


def mean_of(subject: Subject, block: int, state: dict[str, torch.Tensor], key: Any, value: Any) -> torch.Tensor:
    first = subject.model.rwkv.blocks[block].attention.time_first.detach().double()
    weight = (key.double() + first).exp()
    found: torch.Tensor = (state["num"] + weight * value.double()) / (state["den"] + weight)
    return found


def test_the_next_step_computes_with_what_was_written(rwkv: Subject) -> None:
    """The weighted mean of the next token by hand, from the edited sums: what the output projection reads."""
    running = Running.start(rwkv, TOKENS[:, :6])
    state = running.state()
    edits = {"num": draw(32).double(), "den": state[1]["den"][0] * 2.0}
    running.edit(AddState(StateVector({1: edits})))
    written = {name: state[1][name] + value for name, value in edits.items()}
    caught: dict[str, torch.Tensor] = {}
    attention = rwkv.model.rwkv.blocks[1].attention
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda m, args, out, name=name: caught.update({name: args[0] if name == "output" else out})
        )
        for name in ("key", "value", "receptance", "output")
    ]
    running.feed(TOKENS[:, 6:7])
    for handle in handles:
        handle.remove()
    mean = mean_of(rwkv, 1, written, caught["key"][:, 0], caught["value"][:, 0])
    wanted = torch.sigmoid(caught["receptance"][:, 0].double()) * mean
    torch.testing.assert_close(caught["output"][:, 0].double(), wanted, rtol=1e-4, atol=1e-5)


def test_denominators_stay_positive(rwkv: Subject) -> None:
    running = Running.start(rwkv, TOKENS[:, :6])
    state = running.state()
    den = state[0]["den"]
    by = torch.where(torch.arange(32) < 5, -3.0, 0.5).double()
    assert running.edit(AddState(StateVector({0: {"den": den[0] * by}}))) > 0
    found = running.state()[0]
    wanted = torch.maximum(den + den[0] * by, torch.where(by < 0, 0.01 * den, 0.0))
    torch.testing.assert_close(found["den"], wanted, rtol=1e-5, atol=0)
    assert torch.equal(found["den"][0, :5] < 0.011 * den[0, :5], torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(found["num"], state[0]["num"], rtol=1e-5, atol=1e-9)
    assert running.feed(TOKENS[:, 6:8]).isfinite().all()
    nothing = Running.begin(rwkv, 3)
    assert float(nothing.state()[0]["den"].abs().max()) == 0.0
    nothing.edit(AddState(StateVector({0: {"num": torch.ones(32).double()}})))  # a numerator over nothing
    assert torch.equal(nothing.state()[0]["den"], torch.zeros(3, 32).double())
    torch.testing.assert_close(nothing.state()[0]["num"], torch.ones(3, 32).double())
    assert nothing.feed(TOKENS[:, :2]).isfinite().all()


def test_exponents_beyond_the_real_domain_are_said(rwkv: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    key = rwkv.model.rwkv.blocks[1].attention.key
    handle = key.register_forward_hook(lambda module, args, output: output + 800.0)
    try:
        running = Running.start(rwkv, TOKENS[:, :4])
        with pytest.raises(InputError, match="the state of block 1 has exponents up to 8"):
            running.state()
    finally:
        handle.remove()


@given(st.lists(st.tuples(*(st.floats(-4, 4) for _ in range(5))), min_size=1, max_size=6), st.floats(-80, 80))
def test_the_real_domain_and_back(values: list[tuple[float, ...]], greatest: float) -> None:
    """Any numerator and positive denominator of any size comes back as it was written."""
    subject = Subject(_RWKV, None, name="rwkv")
    rows = torch.tensor(values)
    raw = [torch.zeros(len(rows), 2, 2) for _ in range(5)]
    raw[2][:, 0, 0], raw[3][:], raw[4][:] = rows[:, 0], rows[:, 1, None, None].exp(), greatest
    memory = RwkvMemory(subject, 0, state=raw)
    before = memory.read([0])[0]
    torch.testing.assert_close(before["num"][:, 0], rows[:, 0].double() * torch.tensor(greatest).double().exp())
    num = before["num"] + before["den"] * rows[:, 2:3]
    den = before["den"] * (10 * rows[:, 3:4]).double().exp()
    held = int((den < DENOMINATOR_FLOOR * before["den"]).sum())
    assert memory.write(0, {"num": num, "den": den}) == held
    after = memory.read([0])[0]
    assert ((after["num"] - num).abs() <= 1e-5 * num.abs() + 1e-30 * den).all()  # not of subnormal numbers
    torch.testing.assert_close(after["den"], den.maximum(DENOMINATOR_FLOOR * before["den"]), rtol=1e-5, atol=0)


def test_the_exponent_of_xlstm_is_only_how_it_is_written(tmp_path: Path) -> None:
    """The same matrix and normaliser relative to another exponent are the same state, and go on the same."""
    subject = load_subject(str(toy_subject_model("xlstm", tmp_path / "xlstm")), device="cpu")
    memory = XLSTMMemory(subject)
    memory.feed(TOKENS[:, :6])
    other = memory.copied()
    for parts in other._cache.rnn_state.values():
        for part, by in zip(parts, (2.0, 2.0, 0.0), strict=True):
            part.mul_(torch.tensor(-by).exp()).add_(0.0 if by else 2.0)
    for block, part in memory.read().items():
        for name, value in part.items():
            torch.testing.assert_close(other.read()[block][name], value, rtol=1e-5, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(other.feed(TOKENS[:, 6:]), memory.feed(TOKENS[:, 6:]), rtol=0, atol=1e-4)
    running = Running.start(subject, TOKENS[:, :6])
    state = running.state()
    running.edit(AddState(state.rows([0]).mean(), -0.5))
    for block in state.layers:
        for name in ("kv", "den"):
            wanted = state[block][name] - 0.5 * state[block][name][0]
            torch.testing.assert_close(running.state()[block][name], wanted, rtol=1e-4, atol=1e-9)


def test_a_model_of_nothing_but_attention_has_an_empty_state(tmp_path: Path) -> None:
    subject = load_subject(str(toy_subject_model("llama", tmp_path / "llama")), device="cpu")
    assert verdict(subject).layers == ()
    assert Running.start(subject, TOKENS).state().layers == ()
