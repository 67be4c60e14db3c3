from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exegete.coders import random_coder
from exegete.coders.activations import JumpReLU, TopK
from exegete.coders.coder import SparseCoder
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import neuron_coder
from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.subjects import Subject, load_subject
from exegete.subjects.edits import AddVector, Edit, EditLatent, direction, edited, latent_values
from exegete.testing import toy_llama, toy_subject_model
from exegete.types import SparseCode

LAYER: Any = ("layers.1", "output")
MLP: Any = ("layers.1.mlp", "output")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("model") / "toy")), device="cpu")


def tokens(rows: int = 3, length: int = 6, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = subject.model(input_ids=ids, use_cache=False).logits
    return found


def linear(activation: Any = None, *, d: int = 32, width: int = 64, seed: int = 0, **options: Any) -> LinearCoder:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    given: dict[str, Any] = {
        "name": "c",
        "hookpoint": "layers.1",
        "encoder": normal(width, d),
        "encoder_bias": normal(width),
        "decoder": normal(width, d),
        "decoder_bias": normal(d),
        "activation": activation or TopK(5),
    }
    return LinearCoder(**{**given, **options})


def coders(subject: Subject) -> dict[str, SparseCoder]:
    jump = JumpReLU(threshold=torch.full((64,), 0.5))
    return {
        "topk": linear(),
        "jumprelu": linear(jump),
        "layer norm": linear(input_norm="layer_norm"),
        "constant norm": linear(jump, input_norm="constant_norm", subtract_decoder_bias=True),
        "transcoder": linear(hookpoint="layers.1.mlp", side="input", target=MLP, input_norm="rms_norm"),
        "skip": linear(hookpoint="layers.1.mlp", side="input", target=MLP, skip=torch.randn(32, 32) * 0.1),
        "neurons": neuron_coder(subject, "layers.1.mlp", k=8),
        "rotated neurons": neuron_coder(subject, "layers.1.mlp", k=8, rotation=3),
        "random": random_coder(linear(), 1),
    }


KINDS = (
    "topk", "jumprelu", "layer norm", "constant norm", "transcoder", "skip", "neurons", "rotated neurons", "random"
)  # fmt: skip


@pytest.fixture(params=KINDS)
def coder(request: pytest.FixtureRequest, subject: Subject) -> SparseCoder:
    return coders(subject)[request.param]


def dense(code: SparseCode, index: int) -> list[float]:
    """The values of one latent, read off code by code."""
    found = []
    offsets = code.offsets
    for row in range(len(code.indices) if offsets is None else len(offsets) - 1):
        part = row if offsets is None else slice(int(offsets[row]), int(offsets[row + 1]))
        pairs = zip(code.indices[part].tolist(), code.values[part].tolist(), strict=True)
        found.append(sum(value for latent, value in pairs if latent == index))
    return found


def test_the_value_of_a_latent_is_what_the_encoder_gives(coder: SparseCoder) -> None:
    x = torch.randn(40, coder.d_in, generator=torch.Generator().manual_seed(1))
    code = coder.encode(x)
    index = int(code.indices.reshape(-1)[0])
    assert latent_values(coder, index, x).tolist() == pytest.approx(dense(code, index))
    assert latent_values(coder, index, x).abs().max() > 0


def by_definition(
    coder: SparseCoder, x: torch.Tensor, y: torch.Tensor, index: int, change: Callable[[float], float]
) -> torch.Tensor:
    """h′ = decode(c′, x) + (h − decode(c, x)), with the code of each input rebuilt latent by latent."""
    code = coder.encode(x)
    values = dense(code, index)
    rows = []
    for i, value in enumerate(values):
        part = i if code.offsets is None else slice(int(code.offsets[i]), int(code.offsets[i + 1]))
        kept = code.indices[part] != index
        indices = torch.cat([code.indices[part][kept], torch.tensor([index])])[None]
        new = torch.cat([code.values[part][kept], torch.tensor([change(value)])])[None]
        old = torch.cat([code.values[part][kept], torch.tensor([value])])[None]
        one = x[i : i + 1]
        after = coder.decode(SparseCode(indices=indices, values=new, width=coder.width), one)
        before = coder.decode(SparseCode(indices=indices, values=old, width=coder.width), one)
        rows.append(after + (y[i : i + 1] - before))
    return torch.cat(rows)


CHANGES: dict[Any, Callable[[float], float]] = {
    "add": lambda value: value + 2.5,
    "clamp": lambda value: 2.5,
    "ablate": lambda value: 0.0,
}


@pytest.mark.parametrize("kind", list(CHANGES))
def test_a_latent_is_edited_as_the_definition_says(coder: SparseCoder, kind: Any, subject: Subject) -> None:
    ids = tokens()
    points = [coder.point, coder.target]
    caught = subject.capture(ids, None, points)
    x, y = (caught[point][:, 4:].reshape(-1, caught[point].shape[-1]) for point in points)
    index = int(coder.encode(x).indices.reshape(-1)[0])
    wanted = by_definition(coder, x, y, index, CHANGES[kind])
    with edited(subject, [EditLatent(coder, index, kind=kind, strength=2.5)], slice(4, None)):
        after = subject.capture(ids, None, [coder.target])[coder.target]
    torch.testing.assert_close(after[:, 4:].reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(after[:, :4], caught[coder.target][:, :4])


@pytest.mark.parametrize("strength", [0.0, torch.zeros(3)])
def test_adding_nothing_changes_no_bit(coder: SparseCoder, strength: Any, subject: Subject) -> None:
    ids = tokens()
    plain = logits(subject, ids)
    with edited(subject, [EditLatent(coder, 3, strength=strength)]):
        assert torch.equal(logits(subject, ids), plain)
    assert torch.equal(logits(subject, ids), plain)


def test_clamping_to_the_own_value_and_ablating_a_silent_latent_change_nothing(subject: Subject) -> None:
    coder, ids = linear(), tokens(1, 4)
    x = subject.capture(ids, None, [LAYER])[LAYER][0]
    code, plain = coder.encode(x), logits(subject, ids)
    silent = next(i for i in range(64) if i not in code.indices)
    with edited(subject, [EditLatent(coder, silent, kind="ablate")]):
        assert torch.equal(logits(subject, ids), plain)
    firing = int(code.indices[-1, 0])
    value = float(latent_values(coder, firing, x)[-1])
    with edited(subject, [EditLatent(coder, firing, kind="clamp", strength=value)], slice(3, None)):
        torch.testing.assert_close(logits(subject, ids), plain, rtol=1e-5, atol=1e-5)


def test_each_row_has_its_own_strength(subject: Subject) -> None:
    ids = tokens(1, 5).expand(3, -1)
    coder, strengths = linear(input_norm="layer_norm"), torch.tensor([0.0, 1.0, 4.0])
    with edited(subject, [EditLatent(coder, 7, strength=strengths)]):
        together = logits(subject, ids)
    for row, strength in enumerate(strengths.tolist()):
        with edited(subject, [EditLatent(coder, 7, strength=strength)]):
            torch.testing.assert_close(logits(subject, ids)[row], together[row], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1


def test_a_mask_names_other_positions_in_every_row(subject: Subject) -> None:
    ids = tokens(2, 5)
    mask = torch.tensor([[True, False, False, False, True], [False, False, True, False, False]])
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    plain = subject.capture(ids, None, [LAYER])[LAYER]
    with edited(subject, [AddVector(target=LAYER, vector=vector, strength=3.0)], mask):
        after = subject.capture(ids, None, [LAYER])[LAYER]
    torch.testing.assert_close(after, plain + mask[:, :, None] * 3.0 * vector)
    assert torch.equal(after[~mask], plain[~mask])


def test_edits_of_one_point_follow_one_another(subject: Subject) -> None:
    ids, vector = tokens(), torch.ones(32)
    half = AddVector(target=LAYER, vector=vector, strength=0.5)
    with edited(subject, [half, half]):
        twice = logits(subject, ids)
    with edited(subject, [AddVector(target=("model.layers.1", "output"), vector=vector)]):
        torch.testing.assert_close(logits(subject, ids), twice, rtol=1e-5, atol=1e-5)


def test_an_edit_of_an_input_reaches_the_module(subject: Subject) -> None:
    ids, vector = tokens(), torch.randn(32, generator=torch.Generator().manual_seed(2))
    with edited(subject, [AddVector(target=("layers.2", "input"), vector=vector)]):
        before_layer = logits(subject, ids)
    with edited(subject, [AddVector(target=("layers.1", "output"), vector=vector)]):
        assert torch.equal(logits(subject, ids), before_layer)
    plain = subject.capture(ids, None, [("layers.1.mlp", "input")])["layers.1.mlp", "input"]
    with edited(subject, [AddVector(target=("layers.1.mlp", "input"), vector=vector)]):
        after = subject.capture(ids, None, [("layers.1.mlp.gate_proj", "input")])["layers.1.mlp.gate_proj", "input"]
    torch.testing.assert_close(after, plain + vector)


def test_a_direction_is_the_decoder_row_times_the_inputs_scale() -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(4)) * 3
    plain, normed = linear(), linear(input_norm="constant_norm")
    torch.testing.assert_close(direction(plain, 9, x), plain.decoder[9].expand(6, -1), rtol=1e-4, atol=1e-5)
    scale = x.norm(dim=1, keepdim=True) / 32**0.5
    torch.testing.assert_close(direction(normed, 9, x), scale * normed.decoder[9], rtol=1e-4, atol=1e-4)


def test_half_floats_keep_the_direction() -> None:
    exact = linear(input_norm="constant_norm")
    exact.decoder_bias += 30.0  # beside which one unit of a latent is a rounding error in half floats
    half = exact.to("cpu", torch.bfloat16)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    found, wanted = direction(half, 9, x).float(), direction(exact, 9, x)
    assert (torch.cosine_similarity(found, wanted) > 0.999).all()
    torch.testing.assert_close(found.norm(dim=1), wanted.norm(dim=1), rtol=0.15, atol=0)


def test_what_cannot_be_edited_is_refused(subject: Subject) -> None:
    ids, vector = tokens(), torch.ones(32)
    coder = linear()
    with pytest.raises(InputError, match="edited by add, clamp, ablate"):
        EditLatent(coder, 0, kind="double")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 to 63, got 64"):
        EditLatent(coder, 64)
    with pytest.raises(NotFoundError), edited(subject, [AddVector(target=("layers.9", "output"), vector=vector)]):
        pass
    with (
        pytest.raises(InputError, match="stands for 3"),
        edited(subject, [AddVector(target=("layers.*", "output"), vector=vector)]),
    ):
        pass
    with (
        pytest.raises(MismatchError, match="has 32 dimensions"),
        edited(subject, [AddVector(target=LAYER, vector=torch.ones(5))]),
    ):
        logits(subject, ids)
    backwards = linear(hookpoint="layers.2", target=("layers.1", "output"))
    with pytest.raises(InputError, match="comes after it"), edited(subject, [EditLatent(backwards, 0)]):
        logits(subject, ids)
    with (
        pytest.raises(InputError, match=r"never runs 'layers\.1'"),
        edited(subject, [AddVector(target=LAYER, vector=vector)]),
    ):
        subject.capture(ids, None, [("layers.0", "output")])  # ends before the second layer
    assert not subject.model._forward_pre_hooks
    assert not subject.model.base_model.layers[1]._forward_hooks


@pytest.mark.parametrize("family", ["gpt2", "opt", "mamba", "mamba2", "rwkv", "recurrent_gemma", "mixtral", "zamba2"])
def test_a_vector_is_added_in_every_kind_of_family(family: str, tmp_path: Path) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    subject = load_subject(str(toy_subject_model(family, tmp_path / family)), device="cpu")
    name = next(n for n in subject.hookpoints() if n.endswith((".0", ".1")) and n.count(".") <= 2)
    target: Any = (name.rpartition(".")[0] + ".1", "output")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ids = tokens(2, 6)
    plain = subject.capture(ids, None, [target])[target]
    edit: Edit = AddVector(target=target, vector=vector)
    with edited(subject, [edit], slice(3, None)):
        after = subject.capture(ids, None, [target])[target]
        moved = logits(subject, ids)
    torch.testing.assert_close(after[:, 3:], plain[:, 3:] + vector, rtol=1e-4, atol=1e-5)
    assert torch.equal(after[:, :3], plain[:, :3])
    torch.testing.assert_close(moved[:, :3], logits(subject, ids)[:, :3], rtol=1e-4, atol=1e-4)
    assert (moved[:, 3:] - logits(subject, ids)[:, 3:]).abs().max() > 0.05
