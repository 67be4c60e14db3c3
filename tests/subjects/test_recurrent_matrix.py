"""Matrix states of RWKV-5 and later: a model laid out as their remote code is, its state read, copied and edited.

The model below computes what version 5 does: per head S ← diag(w) S + kᵀv, read as r (diag(u) kᵀv + S). Its state is a
list of three tensors with the blocks last, and its single steps take the shift of the token before as [rows, d].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from exegete.errors import InputError
from exegete.subjects import Subject
from exegete.subjects.readout import read_out
from exegete.subjects.recurrent_state import AddState, ClampState, ReplaceState, StateVector
from exegete.subjects.running import Running
from exegete.subjects.sites import residuals
from exegete.subjects.verdicts import verdict

D, HEADS, SIZE, BLOCKS, VOCABULARY = 24, 3, 8, 2, 50
IDS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
State = list[torch.Tensor]


class MatrixConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "rwkv5"


def shifted(hidden: torch.Tensor, held: torch.Tensor | None, block: int) -> torch.Tensor:
    if hidden.shape[1] == 1 and held is not None:
        return held[:, :, block]  # as the remote code has it: [rows, d], not [rows, 1, d]
    found = nn.functional.pad(hidden, (0, 0, 1, -1))
    if held is not None:
        found[:, 0] = held[:, :, block]
    return found


class Attention(nn.Module):
    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.mix = nn.Parameter(torch.rand(3, D))
        self.decay, self.first = nn.Parameter(torch.randn(HEADS, SIZE)), nn.Parameter(torch.randn(HEADS, SIZE))
        self.receptance, self.key, self.value, self.output = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(HEADS, D)

    def forward(self, hidden: torch.Tensor, state: State | None) -> torch.Tensor:
        before = shifted(hidden, None if state is None else state[0], self.block)
        r, k, v = (
            layer(hidden * mix + before * (1 - mix)).unflatten(-1, (HEADS, SIZE))
            for layer, mix in zip((self.receptance, self.key, self.value), self.mix, strict=True)
        )
        memory = hidden.new_zeros(len(hidden), HEADS, SIZE, SIZE) if state is None else state[1][..., self.block]
        decay = (-self.decay.exp()).exp()[..., None]
        found = []
        for at in range(hidden.shape[1]):
            new = k[:, at, :, :, None] * v[:, at, :, None, :]
            found.append(torch.einsum("bhk,bhkv->bhv", r[:, at], self.first[..., None] * new + memory).flatten(1))
            memory = decay * memory + new
        if state is not None:
            state[0][:, :, self.block] = hidden[:, -1]
            state[1][:, :, :, :, self.block] = memory
        heard: torch.Tensor = self.output(self.ln_x(torch.stack(found, dim=1).flatten(0, 1)).reshape(hidden.shape))
        return heard


class FeedForward(nn.Module):
    def __init__(self, block: int) -> None:
        super().__init__()
        self.block, self.mix = block, nn.Parameter(torch.rand(D))
        self.key, self.value = nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D, bias=False)

    def forward(self, hidden: torch.Tensor, state: State | None) -> torch.Tensor:
        before = shifted(hidden, None if state is None else state[2], self.block)
        found: torch.Tensor = self.value(self.key(hidden * self.mix + before * (1 - self.mix)).relu().square())
        if state is not None:
            state[2][:, :, self.block] = hidden[:, -1]
        return found


class Block(nn.Module):
    def __init__(self, block: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention, self.feed_forward = Attention(block), FeedForward(block)

    def forward(self, hidden: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State | None]:
        hidden = hidden + self.attention(self.ln1(hidden), state)
        return hidden + self.feed_forward(self.ln2(hidden), state), state


class Matrix(PreTrainedModel):  # type: ignore[misc]
    config_class = MatrixConfig
    base_model_prefix = "rwkv"

    def __init__(self, config: MatrixConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(Block(i) for i in range(BLOCKS))
        self.ln_out = nn.LayerNorm(D)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, state: State | None = None, use_cache: bool | None = None) -> Any:
        if use_cache and state is None:
            rows = len(input_ids)
            sizes = (rows, D, BLOCKS), (rows, HEADS, SIZE, SIZE, BLOCKS), (rows, D, BLOCKS)
            state = [torch.zeros(size) for size in sizes]
        hidden = self.embeddings(input_ids)
        for block in self.blocks:
            hidden, state = block(hidden, state)
        return ModelOutput(last_hidden_state=self.ln_out(hidden), state=state)


class MatrixForCausalLM(PreTrainedModel):  # type: ignore[misc]
    config_class = MatrixConfig
    base_model_prefix = "rwkv"

    def __init__(self, config: MatrixConfig) -> None:
        super().__init__(config)
        self.rwkv, self.head = Matrix(config), nn.Linear(D, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.rwkv.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: torch.Tensor,
        state: State | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        found = self.rwkv(input_ids, state=state, use_cache=use_cache)
        return ModelOutput(logits=self.head(found.last_hidden_state), state=found.state)


@pytest.fixture(scope="module")
def subject() -> Subject:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MatrixForCausalLM(MatrixConfig())
    return Subject(model, None, name="matrix")


def whole(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = subject.model(ids).logits
    return logits


def memories(subject: Subject, ids: torch.Tensor, block: int) -> torch.Tensor:
    """Return Σ w^(T−1−t) k_tᵀ v_t [rows, heads, dk, dv] from the keys and values of a whole pass."""
    caught: dict[str, torch.Tensor] = {}
    attention = subject.model.rwkv.blocks[block].attention
    handles = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: caught.update({name: out}))
        for name in ("key", "value")
    ]
    whole(subject, ids)
    for handle in handles:
        handle.remove()
    k, v = (caught[name].reshape(*ids.shape, HEADS, SIZE) for name in ("key", "value"))
    age = torch.arange(ids.shape[1] - 1, -1, -1.0)
    weights = (-attention.decay.exp() * age[:, None, None]).exp()  # [positions, heads, dk]
    return torch.einsum("thk,bthk,bthv->bhkv", weights, k, v)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_the_verdict(subject: Subject) -> None:
    found = verdict(subject)
    assert (found.family, found.components, found.layers) == ("rwkv5", ("att_shift", "kv", "ffn_shift"), (0, 1))
    assert (found.chunks, found.steps, found.batched, found.route) == (True, True, False, "chunks")
    assert found.exact
    assert found.readout_error < 1e-5
    assert subject.recurrent


def test_the_state_is_the_sum_over_tokens(subject: Subject) -> None:
    running = Running.start(subject, IDS[:, :3])
    running.feed(IDS[:, 3:4])
    close(running.feed(IDS[:, 4:6]), whole(subject, IDS)[:, 4:6])
    state = running.state()
    for block in range(BLOCKS):
        assert {name: tuple(value.shape) for name, value in state[block].items()} == {
            "att_shift": (3, D),
            "kv": (3, HEADS, SIZE, SIZE),
            "ffn_shift": (3, D),
        }
        close(state[block]["kv"], memories(subject, IDS[:, :6], block))
    read = subject.model.rwkv.blocks[0].ln1(residuals(subject, IDS[:, :6], [-1])[-1])[:, -1]
    close(state[0]["att_shift"], read)
    first = Running.start(subject, IDS[:, :1])  # from nothing, one token of several rows
    close(first.feed(IDS[:, 1:2]), whole(subject, IDS)[:, 1:2])


def test_trap_single_steps_mix_up_rows(subject: Subject) -> None:
    with torch.no_grad():
        first = subject.model(IDS[:, :5], use_cache=True)
        second = subject.model(IDS[:, 5:6], use_cache=True, state=first.state).logits
    assert (second[:, -1] - whole(subject, IDS)[:, 5]).abs().max() > 0.05


def test_edits(subject: Subject) -> None:
    running = Running.start(subject, IDS[:, :6])
    state, unedited = running.state(), running.copy().feed(IDS[:, 6:8])
    vector = state.rows([0]).mean() - state.rows([1]).mean()
    for nothing in (AddState(vector, 0.0), ReplaceState(state), AddState(vector, torch.zeros(3))):
        other = running.copy()
        other.edit(nothing)
        assert torch.equal(other.feed(IDS[:, 6:8]), unedited)
    other = running.copy()
    other.edit(AddState(vector, torch.tensor([0.0, 1.0, 0.0])))
    found = other.feed(IDS[:, 6:8])
    assert torch.equal(found[[0, 2]], unedited[[0, 2]])
    moved = running.copy([0])
    close(found[1:2], moved.feed(IDS[1:2, 6:8]))  # row 1 goes on from the state of row 0
    assert (found[1] - unedited[1]).abs().max() > 0.05
    assert torch.equal(running.copy().feed(IDS[:, 6:8]), unedited)
    other = running.copy()
    other.edit(ClampState(max_norm=0.1, components=["kv"]))
    assert float(other.state()[1]["kv"].flatten(1).norm(dim=1).max()) <= 0.1 + 1e-6
    assert torch.equal(other.state()[1]["att_shift"], state[1]["att_shift"])


def test_the_memory_is_read_linearly(subject: Subject) -> None:
    running = Running.start(subject, IDS[:, :6])
    vector = StateVector({1: {"kv": running.state()[1]["kv"].std(dim=0)}})

    def heard(multiplier: float) -> torch.Tensor:
        caught: list[torch.Tensor] = []
        copied = running.copy()
        copied.edit(AddState(vector, multiplier))
        norm = subject.model.rwkv.blocks[1].attention.ln_x
        handle = norm.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        copied.feed(IDS[:, 6:7])
        handle.remove()
        return caught[0].double()

    once, thrice = heard(1.0) - heard(0.0), heard(3.0) - heard(0.0)
    assert once.norm() > 0.1
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-3, atol=1e-4)


def test_a_state_of_another_layout_is_refused(subject: Subject) -> None:
    running, forward = Running.start(subject, IDS), subject.model.forward

    def other(input_ids: Any, state: Any = None, use_cache: bool = True) -> Any:
        found = forward(input_ids, state=state, use_cache=use_cache)
        return ModelOutput(logits=found.logits, state=(*found.state, found.state[0]))

    subject.model.forward = other
    try:
        with pytest.raises(InputError, match="a list of 3 tensors in this family"):
            running.feed(IDS[:, :2])
    finally:
        subject.model.forward = forward


def test_lenses_read_it_too(subject: Subject, tmp_path: Path) -> None:
    last = residuals(subject, IDS, [BLOCKS - 1])[BLOCKS - 1]
    close(read_out(subject).logits(last), whole(subject, IDS))
