from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exegete.coders.fit import fit_coder
from exegete.coders.neurons import NeuronCoder, Signs, neuron_coder, random_rotation
from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.subjects import load_subject
from exegete.subjects.subject import Subject
from exegete.testing import toy_llama
from exegete.types import SparseCode


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("neurons") / "toy", d=16)), device="cpu")


def inputs(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def dense(code: SparseCode) -> torch.Tensor:
    """The obvious way: one entry at a time."""
    if code.offsets is None:
        full = torch.zeros(len(code.indices), code.width)
        for row, (where, what) in enumerate(zip(code.indices.tolist(), code.values.tolist(), strict=True)):
            for i, value in zip(where, what, strict=True):
                full[row, i] += value
        return full
    offsets = code.offsets.tolist()
    full = torch.zeros(len(offsets) - 1, code.width)
    for row in range(len(offsets) - 1):
        for at in range(offsets[row], offsets[row + 1]):
            full[row, int(code.indices[at])] += float(code.values[at])
    return full


def reference(x: torch.Tensor, coder: NeuronCoder) -> torch.Tensor:
    """All signed axes, those that are not positive or too small cut, then the k largest of each input."""
    axes = torch.eye(coder.d_in) if coder.rotation is None else coder.rotation.float()
    if coder.signs == "both":
        axes = torch.cat([axes, -axes])
    y = x @ axes.T
    y = y * (y > coder.threshold)
    if coder.k is not None:
        kept = y.topk(coder.k)
        y = torch.zeros_like(y).scatter_(1, kept.indices, kept.values)
    return y


@pytest.mark.parametrize("k", [None, 1, 3, 8])
@pytest.mark.parametrize("signs", ["positive", "both"])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("rotated", [False, True])
def test_against_the_obvious_way(k: int | None, signs: Signs, threshold: float, rotated: bool) -> None:
    rotation = random_rotation(8, 3) if rotated else None
    coder = NeuronCoder(name="n", hookpoint="h", d=8, k=k, signs=signs, threshold=threshold, rotation=rotation)
    assert (coder.width, coder.k, coder.d_out) == (16 if signs == "both" else 8, k, 8)
    x = inputs(50, 8)
    code = coder.encode(x)
    expected = reference(x, coder)
    assert (code.offsets is None) == (k is not None)
    torch.testing.assert_close(dense(code), expected)
    assert torch.equal(dense(code) > 0, expected > 0)
    assert bool((code.values >= 0).all())
    rows = coder.decoder_rows(torch.arange(coder.width))
    torch.testing.assert_close(coder.decode(code), expected @ rows)
    torch.testing.assert_close(coder.decode(code, x), expected @ rows)


def test_top_neurons_by_hand() -> None:
    x = torch.tensor([[3.0, -5.0, 1.0, 2.0], [-1.0, -2.0, -3.0, 0.5]])
    code = NeuronCoder(name="n", hookpoint="h", d=4, k=2).encode(x)
    assert code.indices[0].tolist() == [0, 3]
    assert code.values.tolist() == [[3.0, 2.0], [0.5, 0.0]]  # one neuron is positive; the slot of a second is empty
    both = NeuronCoder(name="n", hookpoint="h", d=4, k=2, signs="both").encode(x)
    assert both.indices.tolist() == [[5, 0], [6, 5]]
    assert both.values.tolist() == [[5.0, 3.0], [3.0, 2.0]]


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_both_signs_lose_nothing(seed: int, d: int) -> None:
    x = inputs(5, d, seed)
    plain = NeuronCoder(name="n", hookpoint="h", d=d, signs="both")
    assert torch.equal(plain.decode(plain.encode(x)), x)
    turned = NeuronCoder(name="n", hookpoint="h", d=d, signs="both", rotation=random_rotation(d, seed))
    torch.testing.assert_close(turned.decode(turned.encode(x)), x, rtol=1e-4, atol=1e-5)


def test_many_inputs_and_wide_hookpoints_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:

    coder = NeuronCoder(name="n", hookpoint="h", d=8192, k=3, signs="both")
    x = inputs(7, 8192)
    whole = coder.encode(x)
    torch.testing.assert_close(dense(whole), reference(x, coder))
    assert torch.equal(coder.encode(x.T.contiguous().T).indices, whole.indices)
    monkeypatch.setattr("exegete.coders.kernels.rows_at_once", lambda *_: 2)
    assert torch.equal(coder.encode(x).indices, whole.indices)
    ragged = NeuronCoder(name="n", hookpoint="h", d=8192, threshold=2.0)
    parts = ragged.encode(x)
    monkeypatch.undo()
    again = ragged.encode(x)
    assert torch.equal(again.indices, parts.indices)
    assert torch.equal(torch.as_tensor(again.offsets), torch.as_tensor(parts.offsets))


def test_nothing_and_no_input() -> None:
    coder = NeuronCoder(name="n", hookpoint="h", d=4)
    code = coder.encode(-torch.ones(3, 4))
    assert code.offsets.tolist() == [0, 0, 0, 0]  # type: ignore[union-attr]
    assert torch.equal(coder.decode(code), torch.zeros(3, 4))
    assert coder.decode(coder.encode(torch.zeros(0, 4))).shape == (0, 4)


def test_rotations() -> None:
    one = random_rotation(32, 0, "layers.1", "input")
    torch.testing.assert_close(one @ one.T, torch.eye(32), rtol=0, atol=1e-5)
    assert torch.equal(one, random_rotation(32, 0, "layers.1", "input"))
    assert not torch.equal(one, random_rotation(32, 1, "layers.1", "input"))
    assert not torch.equal(one, random_rotation(32, 0, "layers.2", "input"))
    # Uniform over all orthogonal matrices: entries have mean 0 and variance 1 / d, in the first column as elsewhere;
    # without the signs of R the diagonal would be of one sign.
    many = torch.stack([random_rotation(4, seed) for seed in range(400)])
    assert many.mean(dim=0).abs().max() < 5 * (0.25 / 400) ** 0.5
    torch.testing.assert_close(many.square().mean(dim=0), torch.full((4, 4), 0.25), rtol=0, atol=0.06)


def test_hash_and_moves() -> None:
    made = {
        NeuronCoder(name="n", hookpoint="h", d=4).hash,
        NeuronCoder(name="n", hookpoint="h", d=5).hash,
        NeuronCoder(name="n", hookpoint="h", d=4, k=2).hash,
        NeuronCoder(name="n", hookpoint="h", d=4, signs="both").hash,
        NeuronCoder(name="n", hookpoint="h", d=4, threshold=0.1).hash,
        NeuronCoder(name="n", hookpoint="h", d=4, rotation=random_rotation(4, 0)).hash,
    }
    assert len(made) == 6
    coder = NeuronCoder(name="n", hookpoint="h", d=4, k=2, signs="both", rotation=random_rotation(4, 0))
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        moved = coder.to("cpu", dtype)
        assert (moved.hash, moved.dtype, moved.to("cpu", torch.float32).hash) == (coder.hash, dtype, coder.hash)
        assert moved.encode(inputs(2, 4)).values.dtype == dtype
    other = coder.placed(name="m", point=("g", "output"), target=("g", "output"))
    assert (other.name, other.point, other.target, other.hash) == ("m", ("g", "output"), ("g", "output"), coder.hash)
    assert coder.placed().point == coder.point
    with pytest.raises(InputError, match="reconstruct what they read"):
        coder.placed(target=("g", "output"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 0}, "k = 0"),
        ({"k": 5}, "k = 5"),
        ({"signs": "negative"}, "allowed: positive, both"),
        ({"threshold": -0.1}, "not negative"),
        ({"threshold": float("nan")}, "not negative"),
        ({"rotation": torch.eye(3)}, r"shape \[3, 3\], expected \[4, 4\]"),
        ({"rotation": torch.ones(4, 4)}, "not orthogonal"),
    ],
)
def test_bad_settings(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        NeuronCoder(name="n", hookpoint="h", d=4, **changes)  # type: ignore[arg-type]


def test_bad_inputs() -> None:
    coder = NeuronCoder(name="n", hookpoint="h", d=4)
    with pytest.raises(MismatchError, match=r"reads \[n, 4\]"):
        coder.encode(torch.zeros(2, 5))
    with pytest.raises(InputError, match="NaN or infinity"):
        coder.encode(torch.full((2, 4), torch.nan))
    with pytest.raises(MismatchError, match="4 latents, the code 8"):
        coder.decode(NeuronCoder(name="n", hookpoint="h", d=8).encode(torch.ones(1, 8)))
    half = NeuronCoder(name="n", hookpoint="h", d=4, dtype=torch.float16)
    with pytest.raises(InputError, match="overflows"):
        half.encode(torch.full((1, 4), 1e6))


def gated_neurons(subject: Subject, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """What a Llama MLP computes before its down projection, from its weights and its own input."""
    mlp = subject.model.model.layers[layer].mlp
    held: list[torch.Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda module, given: held.append(given[0]))
    with torch.no_grad():
        subject.model(tokens)
        handle.remove()
        x = held[0]
        neurons: torch.Tensor = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    return neurons


@pytest.mark.parametrize("spelling", ["layers.1.mlp", "layers.1.mlp.down_proj", "blocks.1.mlp.hook_post"])
def test_the_neurons_of_an_mlp(subject: Subject, spelling: str) -> None:
    coder = neuron_coder(subject, spelling, k=5)
    assert (coder.point, coder.width, coder.base_model) == (("layers.1.mlp.down_proj", "input"), 32, subject.name)
    name = "layers.1.mlp" if spelling == "layers.1.mlp" else "layers.1.mlp.down_proj"
    assert coder.name == f"{name}-neurons"
    assert coder.target == coder.point
    tokens = torch.arange(1, 41).view(2, 20)
    x = subject.capture(tokens, None, [coder.point])[coder.point].flatten(0, 1)
    neurons = gated_neurons(subject, tokens, 1).flatten(0, 1)
    torch.testing.assert_close(x, neurons)
    code = coder.encode(x)
    top = np.argsort(-neurons.numpy(), axis=1)[:, :5]
    assert [set(row) for row in code.indices.tolist()] == [set(row) for row in top.tolist()]
    torch.testing.assert_close(code.values, neurons.gather(1, code.indices).relu())
    fitted = fit_coder(coder, subject)
    assert (fitted.point, fitted.hash) == (coder.point, coder.hash)


def test_the_basis_of_other_hookpoints(subject: Subject) -> None:
    for spelling, point in {
        "layers.1": ("layers.1", "output"),
        "layers.1.self_attn": ("layers.1.self_attn", "output"),
        "blocks.1.hook_mlp_out": ("layers.1.mlp", "output"),
        "blocks.0.hook_resid_pre": ("layers.0", "input"),
        "norm": ("norm", "output"),
    }.items():
        coder = neuron_coder(subject, spelling, signs="both", threshold=0.5, rotation=3, name="own")
        assert (coder.point, coder.d_in, coder.width, coder.name) == (point, 16, 32, "own")
        assert (coder.threshold, coder.architecture) == (0.5, "neurons rotated")
        assert torch.equal(coder.rotation, random_rotation(16, 3, *point))  # type: ignore[arg-type]
    assert neuron_coder(subject, "layers.1.mlp", side="output").point == ("layers.1.mlp", "output")
    assert neuron_coder(subject, "layers.1.mlp", side="input").point == ("layers.1.mlp", "input")


def test_bad_hookpoints(subject: Subject) -> None:
    with pytest.raises(NotFoundError, match="did you mean"):
        neuron_coder(subject, "layers.7.mlp")
    with pytest.raises(InputError, match="stands for 3 hookpoints"):
        neuron_coder(subject, "layers.*.mlp")


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    from exegete.testing import toy_model, toy_tokenizer

    tokenizer = toy_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    mixture = Subject(toy_model(config), tokenizer, name="mixture")
    (name,) = [n for n in mixture.hookpoints() if n.endswith((".mlp", ".block_sparse_moe"))]
    with pytest.raises(InputError, match="mixture of experts"):
        neuron_coder(mixture, name)
    assert neuron_coder(mixture, "layers.0").d_in == 16
