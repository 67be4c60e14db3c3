"""Every family with tiny random weights: what its own code does right, and that passes under way are whole passes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from studies.recurrent.conformance import LINEAR, unevenness

from exegete.errors import InputError, MismatchError
from exegete.llm.prefixes import Prefixes
from exegete.subjects import Subject, load_subject
from exegete.subjects.edits import AddVector, edited
from exegete.subjects.readout import read_out
from exegete.subjects.recurrent_state import AddState, ReplaceState, StateVector
from exegete.subjects.running import Running
from exegete.subjects.sites import site_point
from exegete.subjects.verdicts import verdict
from exegete.testing import FAMILIES, toy_subject_model, toy_tokenizer


@dataclass(frozen=True)
class Expected:
    """What is known of a family: components, blocks with a state, and what its own code gets right."""

    components: str = ""
    layers: tuple[int, ...] = (0, 1, 2)
    chunks: bool = True
    steps: bool = True
    batched: bool = True


ATTENTION = Expected(layers=())
MIXED = (0, 2)
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "opt"), ATTENTION),
    **dict.fromkeys(("mixtral", "qwen3_moe"), ATTENTION),
    "mamba": Expected("conv ssm", chunks=False),
    "falcon_mamba": Expected("conv ssm", chunks=False),
    "mamba2": Expected("conv ssm"),
    "rwkv": Expected("att_shift num den ffn_shift", batched=False),
    "xlstm": Expected("kv den"),
    "recurrent_gemma": Expected("conv lru", layers=(0, 1), chunks=False),
    "jamba": Expected("conv ssm", layers=MIXED, chunks=False),
    "zamba2": Expected("conv ssm", steps=False, batched=False),  # steps leave out a clamp of the step size
    "falcon_h1": Expected("conv ssm"),
    "bamba": Expected("conv ssm", layers=MIXED, chunks=False, steps=False, batched=False),  # it counts from 0 each call
    "granitemoehybrid": Expected("conv ssm", layers=MIXED),
    "nemotron_h": Expected("conv ssm", layers=(0,), steps=False, batched=False),  # as zamba2
    "qwen3_next": Expected("conv kv", layers=MIXED),
    "olmo_hybrid": Expected("conv kv", layers=MIXED),
    "kimi_linear": Expected("conv kv", layers=MIXED),
    "lfm2": Expected("conv", layers=MIXED),
}
SHAPES = {  # without rows, of the first block that has it
    ("mamba", "conv"): (64, 4),
    ("mamba", "ssm"): (64, 8),
    ("mamba2", "conv"): (80, 4),
    ("mamba2", "ssm"): (4, 16, 8),
    ("rwkv", "num"): (32,),
    ("rwkv", "att_shift"): (32,),
    ("recurrent_gemma", "conv"): (32, 3),
    ("recurrent_gemma", "lru"): (32,),
    ("qwen3_next", "kv"): (4, 8, 8),
    ("xlstm", "kv"): (2, 32, 32),
    ("xlstm", "den"): (2, 32),
}
_LOADED: dict[str, Subject] = {}


STATEFUL = pytest.mark.parametrize("family", [name for name, wanted in EXPECTED.items() if wanted.components])


@pytest.fixture(params=list(EXPECTED))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def loaded(family: str, folder: Path) -> Subject:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    if family not in _LOADED:
        _LOADED[family] = load_subject(str(toy_subject_model(family, folder / family)), device="cpu")
    return _LOADED[family]


@pytest.fixture
def subject(family: str, tmp_path: Path) -> Subject:
    return loaded(family, tmp_path)


def tokens(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(1, 400, (rows, length), generator=torch.Generator().manual_seed(7))


def whole(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = subject.model(input_ids=ids, use_cache=False).logits
    return logits


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


def test_every_family_is_expected_of() -> None:
    assert set(EXPECTED) == set(FAMILIES)


def test_the_verdict(subject: Subject, family: str) -> None:
    found, wanted = verdict(subject), EXPECTED[family]
    assert (found.family, found.readout_error) == (family, 0.0)
    assert found.components == tuple(wanted.components.split())
    assert found.layers == wanted.layers
    assert (found.chunks, found.steps, found.batched) == (wanted.chunks, wanted.steps, wanted.batched)
    assert found.route == ("steps" if family == "recurrent_gemma" else "chunks")
    assert (found.mended_chunk_error <= found.bound) == (family != "recurrent_gemma")
    assert found.exact
    assert found.mended_error <= found.bound
    assert verdict(subject) is found


def test_passes_under_way_are_whole_passes(subject: Subject, family: str) -> None:
    ids = tokens()
    wanted = whole(subject, ids)
    running = Running.start(subject, ids[:, :4])
    close(running.logits, wanted[:, 3])
    close(running.feed(ids[:, 4:5]), wanted[:, 4:5])
    close(running.feed(ids[:, 5:8]), wanted[:, 5:8])
    copied = running.copy([2, 0, 2])
    others = ids[[2, 0, 2]]
    close(copied.feed(others[:, 8:9]), wanted[[2, 0, 2], 8:9])
    close(copied.feed(others[:, 9:], last=True), wanted[[2, 0, 2], 9:])
    assert torch.equal(copied.tokens, others)
    assert len(running) == 3
    assert running.tokens.shape == (3, 8)
    close(running.feed(ids[:, 8:]), wanted[:, 8:])  # what was copied from is as it was
    alone = Running.start(subject, ids[1:2, :1])
    close(alone.feed(ids[1:2, 1:5]), wanted[1:2, 1:5])
    first = Running.start(subject, ids[:, :1])
    close(first.logits, wanted[:, 0])
    close(first.feed(ids[:, 1:2]), wanted[:, 1:2])


def test_edits_of_the_residual_stream_under_way_are_those_of_a_whole_pass(subject: Subject, family: str) -> None:
    ids, point = tokens(), site_point(subject, 0)
    vector = torch.randn(subject.d(*point), generator=torch.Generator().manual_seed(0))
    edit = AddVector(target=point, vector=vector, strength=torch.tensor([1.0, -1.0, 2.0]))
    where = torch.zeros((3, 4), dtype=torch.bool)
    where[0, 0] = where[1, 2] = where[2, 1:] = True
    found = []
    for slow in (False, True):
        running = Running.begin(subject, 3, whole=slow)
        running.feed(ids[:, :4], last=True)
        middle = running.feed(ids[:, 4:8], edits=[edit], where=where)
        copied = running.copy([2, 0])
        found.append((middle, copied.feed(ids[[2, 0], 8:]), running.feed(ids[:, 8:])))
    for fast, slow_logits in zip(*found, strict=True):
        close(fast, slow_logits)
    clean = whole(subject, ids)
    close(found[0][0][1, :2], clean[1, 4:6])  # before its edit a row is as it was
    assert (found[0][2] - clean[:, 8:]).abs().max() > 0.05


@STATEFUL
def test_a_copied_state_is_independent(subject: Subject, family: str) -> None:
    ids = tokens()
    running = Running.start(subject, ids[:, :6])
    before = running.state()
    unedited = running.copy().feed(ids[:, 6:8])
    other = running.copy()
    other.edit(AddState(before.rows([0]).mean() - before.rows([1]).mean(), 2.0))
    changed = other.feed(ids[:, 6:8])
    assert (changed - unedited).abs().max() > 0.01
    for layer in before.layers:
        for name, value in running.state()[layer].items():
            assert torch.equal(value, before[layer][name])
    assert torch.equal(running.copy().feed(ids[:, 6:8]), unedited)
    before[before.layers[0]][before.components(before.layers[0])[0]].fill_(9.0)  # a state that was read is a copy
    assert torch.equal(running.feed(ids[:, 6:8]), unedited)


@STATEFUL
def test_edits_of_nothing_change_no_bit(subject: Subject, family: str) -> None:
    ids = tokens()
    running = Running.start(subject, ids[:, :6])
    state = running.state()
    vector = state.rows([0]).mean() - state.rows([1]).mean()
    unedited = running.copy().feed(ids[:, 6:9])
    for edit in (AddState(vector, 0.0), AddState(vector, torch.zeros(3)), ReplaceState(state), AddState(vector * 0.0)):
        other = running.copy()
        assert other.edit(edit) == 0
        assert torch.equal(other.feed(ids[:, 6:9]), unedited)


@STATEFUL
def test_multipliers_in_any_order_and_together(subject: Subject, family: str) -> None:
    ids = tokens()
    running = Running.start(subject, ids[:, :6])
    vector = running.state().rows([0]).mean() - running.state().rows([2]).mean()
    multipliers = (-1.0, 0.5, 0.0, 2.0)

    def at(multiplier: float) -> torch.Tensor:
        copied = running.copy([1])
        copied.edit(AddState(vector, multiplier))
        return copied.feed(ids[1:2, 6:8])

    once = {m: at(m) for m in multipliers}
    for multiplier in reversed(multipliers):
        assert torch.equal(at(multiplier), once[multiplier])
    together = running.copy([1, 1, 1, 1])
    together.edit(AddState(vector, torch.tensor(multipliers)))
    close(together.feed(ids[[1, 1, 1, 1], 6:8]), torch.cat(list(once.values())))


@STATEFUL
def test_the_state_is_that_of_the_row_and_the_row_goes_on_from_it(subject: Subject, family: str) -> None:
    """Rows alone have the same state, and in models without attention a row goes on from the state of another."""
    wanted = EXPECTED[family]
    ids = tokens()
    running = Running.start(subject, ids[:, :6])
    state = running.state()
    assert state.layers == wanted.layers
    assert len(state) == 3
    wide = {"num", "den"} | ({"kv"} if family == "xlstm" else set())
    alone = Running.start(subject, ids[2:, :5])
    alone.feed(ids[2:, 5:6])
    for layer in state.layers:
        for name, value in state[layer].items():
            assert value.dtype == (torch.float64 if name in wide else torch.float32)
            torch.testing.assert_close(value[2:], alone.state()[layer][name], rtol=1e-3, atol=2e-4)
            assert SHAPES.get((family, name), value.shape[1:]) == tuple(value.shape[1:])
    if family not in ("mamba", "falcon_mamba", "mamba2", "rwkv", "xlstm"):
        return
    moved = running.copy()
    moved.edit(ReplaceState(state.rows([2, 0, 1])))
    close(moved.feed(ids[:, 6:8]), running.copy([2, 0, 1]).feed(ids[:, 6:8]))


@pytest.mark.parametrize("family", LINEAR)
def test_the_first_step_is_linear_in_the_state_where_theory_says_so(family: str, tmp_path: Path) -> None:
    subject, (component, *point) = loaded(family, tmp_path), LINEAR[family]
    assert unevenness(subject, component, *point) < 1e-3
    for other in {"mamba": ["conv"], "falcon_mamba": ["conv"], "mamba2": ["conv"], "rwkv": ["den"]}.get(family, ()):
        assert unevenness(subject, other, *point) > 1e-2


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_trap_several_tokens_after_a_prefill_forget_the_state(family: str, tmp_path: Path) -> None:
    """The stock models are wrong here. When this fails, transformers has mended them."""
    subject, ids = loaded(family, tmp_path), tokens()
    with torch.no_grad():
        first = subject.model(input_ids=ids[:, :5], use_cache=True)
        name = "past_key_values" if family == "jamba" else "cache_params"
        second = subject.model(input_ids=ids[:, 5:], use_cache=True, **{name: first[name]}).logits
    wanted = whole(subject, ids)[:, 5:]
    assert (second - wanted).abs().max() > 0.5
    running = Running.start(subject, ids[:, :5])
    close(running.feed(ids[:, 5:]), wanted)


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_that_are_scanned_one_after_another_go_on_from_their_own_states(heads: int) -> None:
    """Zamba, whose layers hold the states of all heads in one tensor; attention lies between its layers."""
    settings: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    settings |= {"n_mamba_heads": heads, "attn_layer_period": 3, "attn_layer_offset": 2, "num_attention_heads": 4}
    settings |= {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = transformers.ZambaForCausalLM(transformers.ZambaConfig(**settings))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    subject, ids = Subject(model, toy_tokenizer(), name="zamba"), tokens()
    found = verdict(subject)
    assert (found.chunks, found.route, found.components, found.layers) == (
        False,
        "chunks",
        ("conv", "ssm"),
        (*range(6),),
    )
    wanted = whole(subject, ids)
    running = Running.start(subject, ids[:, :4])
    copied = running.copy([2, 0])
    close(running.feed(ids[:, 4:7]), wanted[:, 4:7])
    close(running.feed(ids[:, 7:]), wanted[:, 7:])
    close(copied.feed(ids[[2, 0], 4:]), wanted[[2, 0], 4:])
    prefixes = Prefixes(model, subject.device)
    assert prefixes.way == "at once"
    close(prefixes.logits(prefixes.read(ids[1, :5].tolist()), ids[1:2, 5:]), wanted[1:2, 5:])


def test_trap_single_steps_of_rwkv_mix_up_rows(tmp_path: Path) -> None:
    """The stock model is wrong here. When this fails, transformers has mended it."""
    subject, ids = loaded("rwkv", tmp_path), tokens()
    with torch.no_grad():
        first = subject.model(input_ids=ids[:, :5], use_cache=True)
        second = subject.model(input_ids=ids[:, 5:6], use_cache=True, state=first.state).logits
    wanted = whole(subject, ids)[:, 5]
    assert second.shape[:2] == (3, 3)
    assert (second[:, -1] - wanted).abs().max() > 0.1
    close(Running.start(subject, ids[:, :5]).feed(ids[:, 5:6])[:, 0], wanted)


def test_trap_recurrent_gemma_is_in_one_place_at_a_time(tmp_path: Path) -> None:
    subject, ids = loaded("recurrent_gemma", tmp_path), tokens(2, 9)
    held = [m for m in subject.model.modules() if type(m).__name__ == "RecurrentGemmaRecurrentBlock"]
    assert len(held) == 2
    rows = [Running.start(subject, ids[i : i + 1, :4]) for i in range(2)]
    for at in range(4, 9):  # turn by turn, with other passes between
        for i, row in enumerate(rows):
            row.feed(ids[i : i + 1, at : at + 1])
        assert all(module.conv1d_state is None and module.rg_lru.recurrent_states is None for module in held)
        whole(subject, ids[:, :3])
    close(torch.cat([row.logits for row in rows]), whole(subject, ids)[:, 8])


def test_the_verdict_is_not_of_the_edit_that_it_is_asked_under(tmp_path: Path) -> None:
    subject = load_subject(str(toy_subject_model("llama", tmp_path / "new")), device="cpu")
    edit = AddVector(target=site_point(subject, 0), vector=torch.full((32,), 9.0))
    ids, running = tokens(), None
    with edited(subject, [edit], slice(1, 2)):
        running = Running.start(subject, ids[:, :4])
        readout = read_out(subject)
    assert verdict(subject).route == "chunks"
    assert readout.error < 1e-5
    assert (running.logits - whole(subject, ids)[:, 3]).abs().max() > 0.1


def test_half_floats(tmp_path: Path) -> None:
    for family in ("mamba", "mamba2", "rwkv", "llama"):
        folder = toy_subject_model(family, tmp_path / family)
        half = load_subject(str(folder), device="cpu", dtype="bfloat16")
        found = verdict(half)
        assert found.exact
        assert found.chunks == (family != "mamba")
        assert found.route == "chunks"
        running = Running.start(half, tokens()[:, :6])
        assert running.logits.dtype == torch.float32
        state = running.state()
        if state.layers:
            unedited = running.copy().feed(tokens()[:, 6:8])
            running.edit(AddState(state.mean(), 0.0))
            assert torch.equal(running.feed(tokens()[:, 6:8]), unedited)
            assert all(
                v.dtype in (torch.float32, torch.float64) for part in state.parts.values() for v in part.values()
            )


def test_a_family_that_nothing_cached_is_exact_in_runs_whole_passes(tmp_path: Path) -> None:
    subject = load_subject(str(toy_subject_model("llama", tmp_path / "odd")), device="cpu")
    forward, ids = subject.model.forward, tokens()

    def forgetful(input_ids: Any, use_cache: bool = False, past_key_values: Any = None) -> Any:
        return forward(input_ids=input_ids, use_cache=use_cache)  # what went before is dropped

    subject.model.forward = forgetful
    found = verdict(subject)
    assert (found.route, found.steps, found.components) == ("whole", False, ())
    running = Running.start(subject, ids[:, :5])
    close(running.feed(ids[:, 5:8]), whole(subject, ids)[:, 5:8])
    assert running.state().layers == ()


def test_bad_input(tmp_path: Path) -> None:
    subject, ids = loaded("llama", tmp_path), tokens()
    with pytest.raises(InputError, match="at least one of each"):
        Running.start(subject, ids[:, :0])
    with pytest.raises(MismatchError, match="embeddings"):
        Running.start(subject, ids + 1000)
    running = Running.start(subject, ids)
    with pytest.raises(InputError, match="3 rows are under way, got tokens for 2"):
        running.feed(ids[:2])
    with pytest.raises(InputError, match="shape of the tokens"):
        running.feed(ids, where=torch.ones((3, 2), dtype=torch.bool))
    with pytest.raises(InputError, match="carries no recurrent state"):
        running.edit(AddState(StateVector({0: {"ssm": torch.zeros(3)}})))
