from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exegete.errors import InputError, NotFoundError
from exegete.subjects import Subject, load_subject
from exegete.testing import FAMILIES, toy_subject_model

# Where the layers are, and which entry of the hidden states is the output of layer 0 (some have no embedding entry).
STACKS = {"gpt2": "h", "rwkv": "blocks", "xlstm": "blocks", "opt": "decoder.layers"}
NO_EMBEDDING_ENTRY = {"mamba", "mamba2", "falcon_mamba", "rwkv"}
ATTENTION_ONLY = {
    *("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "opt", "mixtral", "qwen3_moe"),
}
MIXTURES = {"mixtral", "qwen3_moe", "granitemoehybrid"}
NEURONS = {  # down projections, those of layers that have one
    "llama": ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "layers.2.mlp.down_proj"],
    "gpt_neox": [f"layers.{i}.mlp.dense_4h_to_h" for i in range(3)],
    "gpt2": [f"h.{i}.mlp.c_proj" for i in range(3)],
    "opt": [f"decoder.layers.{i}.fc2" for i in range(3)],
    "rwkv": [f"blocks.{i}.feed_forward.value" for i in range(3)],
    "xlstm": [f"blocks.{i}.ffn.proj_down" for i in range(3)],
    "recurrent_gemma": [f"layers.{i}.mlp_block.down_proj" for i in range(3)],
    "jamba": ["layers.0.feed_forward.down_proj", "layers.1.feed_forward.down_proj"],
    "zamba2": [f"layers.{i}.shared_transformer.feed_forward.down_proj" for i in (1, 2)],
    "falcon_h1": [f"layers.{i}.feed_forward.down_proj" for i in range(3)],
    "bamba": [f"layers.{i}.feed_forward.down_proj" for i in range(3)],
    "nemotron_h": ["layers.2.mixer.down_proj"],
    "qwen3_next": ["layers.0.mlp.down_proj"],
    "kimi_linear": ["layers.0.mlp.down_proj", "layers.2.mlp.down_proj"],
    "lfm2": [f"layers.{i}.feed_forward.w2" for i in range(3)],
}
_LOADED: dict[str, tuple[Path, Subject]] = {}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    return name


@pytest.fixture
def subject(family: str, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    if family not in _LOADED:
        folder = toy_subject_model(family, tmp_path_factory.mktemp("models") / family)
        _LOADED[family] = folder, load_subject(str(folder), device="cpu")
    return _LOADED[family][1]


def stack(family: str) -> str:
    return STACKS.get(family, "layers")


def tokens(rows: int = 2, length: int = 7, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, 400, (rows, length), generator=torch.Generator().manual_seed(seed))


def sides(family: str) -> list[Any]:
    return [(f"{stack(family)}.{i}", side) for i in range(3) for side in ("input", "output")]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def plain(subject: Subject, ids: torch.Tensor, family: str) -> tuple[dict[Any, torch.Tensor], Any]:
    """Inputs and outputs of the layers by plain hooks on a whole pass, and what that pass returned."""
    found: dict[Any, torch.Tensor] = {}
    handles = []
    for name in (f"{stack(family)}.{i}" for i in range(3)):

        def hook(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            found[name, "input"] = given.clone()
            found[name, "output"] = (output[0] if isinstance(output, tuple) else output).clone()

        module = subject.model.base_model.get_submodule(name)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        output = subject.model(ids, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return found, output


def test_layers_are_hookpoints(subject: Subject, family: str) -> None:
    names = [f"{stack(family)}.{i}" for i in range(3)]
    assert set(names) <= set(subject.hookpoints())
    assert subject.points(f"{stack(family)}.*") == tuple((name, "output") for name in names)
    assert subject.points("blocks.*.hook_resid_post") == tuple((name, "output") for name in names)
    assert subject.d(names[1]) == subject.d(names[1], "input") == (64 if family == "xlstm" else 32)


def test_capture_equals_plain_hooks_and_hidden_states(subject: Subject, family: str) -> None:
    ids = tokens()
    caught = subject.capture(ids, None, sides(family))
    expected, output = plain(subject, ids, family)
    assert list(caught) == sides(family)
    for point in sides(family):
        close(caught[point], expected[point])
    for i in range(2):  # the last entry may lie behind the last norm
        name = f"{stack(family)}.{i}"
        close(caught[name, "output"], output.hidden_states[i + (family not in NO_EMBEDDING_ENTRY)])
        change = (caught[name, "output"] - caught[name, "input"]).norm() / caught[name, "input"].norm()
        assert change > 0.02, "the layer does so little that this test would see no mistake"
    assert (family == "rwkv") <= isinstance(raw(subject, ids, f"{stack(family)}.0"), tuple)


def raw(subject: Subject, ids: torch.Tensor, name: str) -> Any:
    found: list[Any] = []
    handle = subject.model.base_model.get_submodule(name).register_forward_hook(lambda m, a, o: found.append(o))
    with torch.no_grad():
        subject.model(ids, use_cache=False)
    handle.remove()
    return found[0]


def test_rows_together_equal_rows_alone_and_again(subject: Subject, family: str) -> None:
    ids = tokens(3, 9)
    points = sides(family)
    together = subject.capture(ids, None, points)
    for row in range(3):
        alone = subject.capture(ids[row : row + 1], None, points)
        for point in points:
            close(together[point][row : row + 1], alone[point])
    again = subject.capture(ids, None, points)  # nothing is left over from the passes between
    assert all(torch.equal(together[point], again[point]) for point in points)


def test_padding_on_the_right_changes_nothing_before_it(subject: Subject, family: str) -> None:
    ids, points = tokens(), sides(family)
    alone = subject.capture(ids, None, points)
    padded = torch.cat([ids, tokens(2, 4, seed=6)], dim=1)
    mask = (torch.arange(11) < 7).long().expand(2, 11)
    for given in ((padded, mask, points), (padded, None, points, torch.where(mask == 1, 4, -1))):
        together = subject.capture(*given)
        for point in points:
            close(together[point][:, :7], alone[point])


def test_the_pass_ends_at_the_deepest_point(subject: Subject, family: str) -> None:
    runs: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
        for name, module in subject.model.base_model.named_modules()
    ]
    subject.capture(tokens(), None, [(f"{stack(family)}.1", "output"), (f"{stack(family)}.0", "output")])
    short = runs.copy()
    runs.clear()
    with torch.no_grad():
        subject.model.base_model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    assert short == runs[: len(short)]
    assert short[-1].startswith(f"{stack(family)}.1")
    assert not any(name.startswith(f"{stack(family)}.1") for name in runs[len(short) :])
    assert any(name.startswith(f"{stack(family)}.2") for name in runs[len(short) :])


def test_bfloat16(subject: Subject, family: str) -> None:
    folder = _LOADED[family][0]
    half = load_subject(str(folder), device="cpu", dtype="bfloat16")
    assert half.hash == subject.hash
    assert half.recurrent == subject.recurrent
    point: Any = (f"{stack(family)}.0", "output")
    value = half.capture(tokens(), None, [point])[point]
    expected = subject.capture(tokens(), None, [point])[point]
    wide = family in ("mamba", "mamba2", "falcon_mamba")  # these keep the residual stream in float32
    assert value.dtype == (torch.float32 if wide else torch.bfloat16)
    error = (value.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.median()) < 0.05  # the median, as an expert may change


def test_recurrent(subject: Subject, family: str) -> None:
    assert subject.recurrent == (family not in ATTENTION_ONLY)


def test_neurons(subject: Subject, family: str) -> None:
    layers = f"{stack(family)}.*"
    if family in MIXTURES:
        with pytest.raises(InputError, match="mixture of experts"):
            subject.neurons(layers)
        return
    if "mamba" in family:
        with pytest.raises(InputError, match="nor does any layer of this model"):
            subject.neurons(layers)
        return
    found = subject.neurons(layers)
    names = NEURONS.get(family, NEURONS["llama"])
    assert found == tuple((name, "input") for name in names)
    values = subject.capture(tokens(), None, found)
    for name, side in found:
        module = subject.model.base_model.get_submodule(name)
        width = module.in_features if isinstance(module, torch.nn.Linear) else module.nf and module.weight.shape[0]
        assert values[name, side].shape == (2, 7, width)
        assert subject.neurons(name) == subject.neurons(name.rpartition(".")[0]) == ((name, "input"),)


def test_neurons_in_other_spellings(tmp_path: Path) -> None:
    gemma = load_subject(str(toy_subject_model("gemma2", tmp_path / "gemma")), device="cpu")
    one: Any = (("layers.1.mlp.down_proj", "input"),)
    for pattern in ("layers.1", "model.layers.1.mlp", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"):
        assert gemma.neurons(pattern) == one
    assert len(gemma.neurons("layers.*.mlp")) == len(gemma.neurons("blocks.*.mlp.hook_post")) == 3
    with pytest.raises(InputError, match=r"'layers\.1\.self_attn' holds no MLP; name a layer"):
        gemma.neurons("layers.1.self_attn")
    with pytest.raises(NotFoundError, match="did you mean"):
        gemma.neurons("layers.1.mpl")
    ids = tokens()
    points: list[Any] = [("layers.1.mlp", "input"), *one]
    read, post = gemma.capture(ids, None, points).values()
    mlp = gemma.model.base_model.layers[1].mlp
    with torch.no_grad():
        close(post, torch.nn.functional.gelu(mlp.gate_proj(read), approximate="tanh") * mlp.up_proj(read))


def test_neurons_beside_mixtures(tmp_path: Path) -> None:
    mixed = load_subject(str(toy_subject_model("qwen3_next", tmp_path / "mixed")), device="cpu")
    with pytest.raises(InputError, match=r"'layers\.1\.mlp' is a mixture of experts.*dense MLP"):
        mixed.neurons("layers.1")
    with pytest.raises(InputError, match="mixture of experts"):
        mixed.neurons("layers.1.mlp")
    shared: Any = (("layers.1.mlp.shared_expert.down_proj", "input"),)
    assert mixed.neurons("layers.1.mlp.shared_expert") == mixed.neurons(shared[0][0]) == shared
    with pytest.raises(NotFoundError):
        mixed.points("blocks.1.mlp.hook_post")


def test_rwkv_keeps_its_weights_and_its_scale(tmp_path: Path) -> None:
    """The stock model halves weights in place; the loaded one does not, and computes the same."""
    folder = toy_subject_model("rwkv", tmp_path / "rwkv", num_hidden_layers=5)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert stock.config.rescale_every == 2
    subject = load_subject(str(folder), device="cpu")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    ids = tokens()
    with torch.no_grad():
        expected = stock(ids, output_hidden_states=True)
        logits = subject.model(ids).logits
    # Not closer, because the epsilon of its norms weighs more on halved values.
    torch.testing.assert_close(logits, expected.logits, rtol=1e-3, atol=1e-3)
    points: list[Any] = [(f"blocks.{i}", "output") for i in range(5)]
    caught = subject.capture(ids, None, points)
    for i, point in enumerate(points):  # the stock's hidden states are halved after every second block
        scaled = expected.hidden_states[i] * 2 ** ((i + 1) // 2)
        torch.testing.assert_close(caught[point], scaled, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    changed = stock.rwkv.blocks[4].feed_forward.value.weight
    assert torch.equal(changed * 4, before["rwkv.blocks.4.feed_forward.value.weight"])


def test_an_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="unknown family 'lama'; did you mean llama"):
        toy_subject_model("lama", tmp_path)
