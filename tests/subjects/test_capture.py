from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from exegete.errors import InputError
from exegete.subjects.hooks import capture
from exegete.subjects.randomise import randomised
from exegete.subjects.subject import Subject
from exegete.testing import toy_model, toy_tokenizer

CONFIGS: dict[str, tuple[Any, str, str]] = {
    "llama": (
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=400,
            initializer_range=0.2,
        ),
        "layers",
        "mlp",
    ),
    "gpt2": (
        transformers.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, vocab_size=400, bos_token_id=0, eos_token_id=0, n_positions=64
        ),
        "h",
        "mlp",
    ),
    "neox": (
        transformers.GPTNeoXConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=400
        ),
        "layers",
        "mlp",
    ),
    "mamba": (
        transformers.MambaConfig(hidden_size=16, num_hidden_layers=3, vocab_size=400, state_size=4),
        "layers",
        "mixer",
    ),
    "rwkv": (
        transformers.RwkvConfig(hidden_size=16, num_hidden_layers=3, vocab_size=400, attention_hidden_size=16),
        "blocks",
        "feed_forward",
    ),
}


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    tokenizer = toy_tokenizer()
    return {name: Subject(toy_model(config, seed=3), tokenizer, name=name) for name, (config, _, _) in CONFIGS.items()}


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 400, (rows, length), generator=torch.Generator().manual_seed(5))


def hooks_on(subject: Subject) -> int:
    """How many hooks are installed; transformers itself leaves some after output_hidden_states."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())


def slow(subject: Subject, ids: torch.Tensor, name: str, side: str) -> torch.Tensor:
    """The activations by a plain hook on a whole forward pass."""
    found: list[Any] = []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]) if side == "input" else output)

    handle = subject.model.base_model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        subject.model(ids, use_cache=False)
    handle.remove()
    value = found[0][0] if isinstance(found[0], tuple) else found[0]
    assert isinstance(value, torch.Tensor)
    return value


@pytest.mark.parametrize("kind", CONFIGS)
def test_capture_equals_plain_hooks_and_stops_there(subjects: dict[str, Subject], kind: str) -> None:
    subject, ids = subjects[kind], tokens()
    _, stack, inner = CONFIGS[kind]
    points: list[Any] = [(f"{stack}.1", "output"), (f"{stack}.1.{inner}", "input"), (f"{stack}.0", "input")]
    before = hooks_on(subject)
    runs: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
        for name, module in subject.model.named_modules()
        if name
    ]
    caught = subject.capture(ids, torch.ones_like(ids), points)
    for handle in handles:
        handle.remove()
    assert any(f"{stack}.1" in name for name in runs)
    assert not any(f"{stack}.2" in name or "head" in name or "norm_f" in name or "ln_out" in name for name in runs)
    assert list(caught) == points
    for (name, side), value in caught.items():
        assert value.shape == (2, 7, 16)
        torch.testing.assert_close(value, slow(subject, ids, name, side), rtol=1e-5, atol=1e-6)
    assert hooks_on(subject) == before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "mamba"])
def test_capture_equals_hidden_states(subjects: dict[str, Subject], kind: str) -> None:
    subject, ids = subjects[kind], tokens()
    stack = CONFIGS[kind][1]
    with torch.no_grad():
        states = subject.model(ids, output_hidden_states=True).hidden_states
    caught = list(
        subject.capture(
            ids, None, [(f"{stack}.0", "input"), (f"{stack}.0", "output"), (f"{stack}.1", "output")]
        ).values()
    )
    skipped = 1 if kind == "mamba" else 0  # its hidden states begin with the output of layer 0
    for value, state in zip(caught[skipped:], states, strict=False):
        torch.testing.assert_close(value, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "mamba"])
def test_padding_on_the_right_changes_nothing(subjects: dict[str, Subject], kind: str) -> None:
    subject, ids = subjects[kind], tokens()
    stack = CONFIGS[kind][1]
    point: Any = (f"{stack}.2", "output")
    alone = subject.capture(ids, None, [point])[point]
    padded = torch.cat([ids, tokens(2, 4)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 4, dtype=torch.long)], dim=1)
    together = subject.capture(padded, mask, [point])[point]
    torch.testing.assert_close(together[:, :7], alone, rtol=1e-5, atol=1e-6)


def test_the_mask_is_passed_on(subjects: dict[str, Subject]) -> None:
    subject, ids = subjects["llama"], tokens(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    other = ids.clone()
    other[0, :2] = (other[0, :2] + 1) % 400
    point: Any = ("layers.2", "output")
    first, second = (subject.capture(i, mask, [point])[point] for i in (ids, other))
    torch.testing.assert_close(first[:, 2:], second[:, 2:])
    assert not torch.allclose(first[:, 2:], subject.capture(ids, None, [point])[point][:, 2:])


def test_keys_are_the_points_as_given(subjects: dict[str, Subject]) -> None:
    points: list[Any] = [("blocks.1.hook_resid_pre", "output"), ("h.0", "output"), ("transformer.h.0", "output")]
    caught = subjects["gpt2"].capture(tokens(), None, points)
    assert list(caught) == points
    assert torch.equal(caught[points[0]], caught[points[1]])
    assert subjects["gpt2"].capture(tokens(), None, []) == {}


def test_names_across_architectures(subjects: dict[str, Subject]) -> None:
    assert subjects["gpt2"].resolve("blocks.1.hook_attn_out") == ("h.1.attn",)
    assert subjects["gpt2"].resolve("transformer.h.1.mlp") == ("h.1.mlp",)
    assert subjects["gpt2"].points("1-res-jb") == (("h.0", "output"),)
    assert subjects["neox"].resolve("gpt_neox.layers.*.mlp") == ("layers.0.mlp", "layers.1.mlp", "layers.2.mlp")
    assert subjects["neox"].points("blocks.2.attn.hook_z") == (("layers.2.attention.dense", "input"),)
    assert subjects["mamba"].resolve("backbone.layers.1") == ("layers.1",)
    assert subjects["mamba"].resolve("hook_embed") == ("embeddings",)
    assert subjects["rwkv"].resolve("blocks.1.hook_resid_post") == ("blocks.1",)
    assert subjects["gpt2"].d("h.1.mlp.c_proj", "input") == 64  # no torch.nn.Linear, so by a probe


def test_points_without_activations(subjects: dict[str, Subject]) -> None:
    before = hooks_on(subjects["gpt2"])
    with pytest.raises(InputError, match=r"input of hookpoint 'embed_tokens' holds no activations"):
        subjects["llama"].capture(tokens(), None, [("embed_tokens", "input")])
    with pytest.raises(InputError, match="not \\[rows, positions"):
        subjects["gpt2"].capture(tokens(), None, [("wpe", "output")])
    assert hooks_on(subjects["gpt2"]) == before


class Odd(torch.nn.Module):
    """Modules that return a mapping, share a part, flatten rows, have heads, write in place, or never run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.shared = torch.nn.Linear(4, 4)
        self.flat = torch.nn.Linear(4, 4)
        self.heads = torch.nn.Identity()
        self.mapping = Mapping()
        self.idle = torch.nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        first = self.shared(x)
        kept = self.heads(first.unflatten(-1, (2, 2)))
        kept.zero_()
        second = self.shared(x + 1)
        flat = self.flat(second.flatten(0, 1))
        out: torch.Tensor = self.mapping(x=flat.view_as(x))["out"]
        return out


class Mapping(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"nothing": None, "out": 2 * x}


def test_odd_modules() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Odd()
    modules = dict(model.named_modules())
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    points: list[Any] = [(n, "output") for n in ("shared", "heads", "flat", "mapping")] + [("mapping", "input")]
    caught = capture(model, modules, ids, torch.ones_like(ids), points)
    with torch.no_grad():
        first = model.shared(model.embed(ids))
        flat = model.flat(model.shared(model.embed(ids) + 1))
    torch.testing.assert_close(caught["shared", "output"], first)
    torch.testing.assert_close(caught["heads", "output"], first)
    torch.testing.assert_close(caught["flat", "output"], flat)
    torch.testing.assert_close(caught["mapping", "input"], flat)
    torch.testing.assert_close(caught["mapping", "output"], 2 * flat)
    assert not any(value.requires_grad for value in caught.values())
    with pytest.raises(InputError, match="never runs 'idle'"):
        capture(model, modules, ids, None, [("shared", "output"), ("idle", "output")])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_randomised(subjects: dict[str, Subject], kind: str) -> None:
    subject = subjects[kind]
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    null = randomised(subject, 4)
    assert null.name == f"{kind}@randomised-4"
    assert null.hash != subject.hash
    assert len({null.hash, randomised(subject, 5).hash}) == 2
    again, other = (dict(randomised(subject, seed).model.named_parameters()) for seed in (4, 5))
    drawn = 0
    for name, new in null.model.named_parameters():
        old = before[name]
        assert torch.equal(old, dict(subject.model.named_parameters())[name])
        assert torch.equal(new, again[name])
        torch.testing.assert_close(new.norm(), old.norm(), rtol=1e-4, atol=1e-6)
        if new.ndim == 1:
            assert torch.equal(new.sort().values, old.sort().values)
        elif old.norm() > 0:
            drawn += 1
            correlation = torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1]
            assert not torch.equal(new, other[name])
            assert abs(float(correlation)) < 0.7
            assert abs(float(new.mean() / new.std())) < 1.0
    assert drawn > 10
    assert null.model.training is False
    tied = subject.model.lm_head.weight is subject.model.get_input_embeddings().weight
    assert (null.model.lm_head.weight is null.model.get_input_embeddings().weight) == tied
    assert kind != "gpt2" or tied
    point: Any = (f"{CONFIGS[kind][1]}.1", "output")
    assert torch.isfinite(null.capture(tokens(), None, [point])[point]).all()


def test_randomised_permutes_vectors(subjects: dict[str, Subject]) -> None:
    subject = Subject(toy_model(CONFIGS["llama"][0], seed=3), subjects["llama"].tokenizer, name="x")
    with torch.no_grad():
        subject.model.base_model.layers[0].input_layernorm.weight.copy_(torch.arange(16.0))
    weight = randomised(subject, 0).model.base_model.layers[0].input_layernorm.weight
    assert torch.equal(weight.sort().values, torch.arange(16.0))
    assert not torch.equal(weight, torch.arange(16.0))


def test_randomised_refuses_weights_that_are_not_there(subjects: dict[str, Subject]) -> None:
    subject = Subject(toy_model(CONFIGS["llama"][0]), subjects["llama"].tokenizer, name="x")
    subject.model.base_model.layers[2].to("meta")
    with pytest.raises(InputError, match="some weights of x are left on disk; load it without a device map"):
        randomised(subject, 0)
