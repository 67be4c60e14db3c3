from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from exegete.coders.directions import direction_coder, load_directions, read_directions
from exegete.errors import CorruptError, InputError, NotFoundError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_by_hand() -> None:
    directions = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    x = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    coder = direction_coder(directions, "layers.3", name="p")
    assert (coder.width, coder.point, coder.architecture) == (4, ("layers.3", "output"), "relu")
    code = coder.encode(x)
    assert code.offsets.tolist() == [0, 2, 3]  # type: ignore[union-attr]
    assert code.indices.tolist() == [0, 1, 2]
    assert code.values.tolist() == [7.0, 2.0, 3.0]
    one = direction_coder(directions, "layers.3", name="p", unit=True, bias=torch.tensor([5.0, -4.0]))
    code = one.encode(x)
    torch.testing.assert_close(code.values, torch.tensor([2.4, 1.0, 0.4, 2.0]))  # 12/5; −(2−4)/2; 2/5; −(0−4)/2
    assert code.indices.tolist() == [0, 3, 0, 3]


@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 8))
def test_a_direction_on_its_own_is_projected_on(seed: int, unit: bool, d: int) -> None:
    direction, x = normal(d, seed=seed) + 0.1, normal(20, d, seed=seed + 1)
    coder = direction_coder(direction, "h.0", name="p", unit=unit)
    projection = (x @ direction)[:, None] * direction / direction.square().sum()
    torch.testing.assert_close(coder.decode(coder.encode(x)), projection, rtol=1e-3, atol=1e-4)


def test_unit_length_changes_no_firing() -> None:
    given_: dict[str, Any] = {"bias": normal(30), "threshold": normal(30).abs(), "name": "p"}
    directions, x = normal(30, 6), normal(100, 6)
    plain, unit = (direction_coder(directions, "h.0", unit=u, **given_) for u in (False, True))
    one, other = plain.encode(x), unit.encode(x)
    assert plain.architecture == "jumprelu"
    assert torch.equal(one.indices, other.indices)
    lengths = directions.norm(dim=1)[one.indices % 30]
    torch.testing.assert_close(one.values / lengths, other.values)
    pre = x @ directions.T + given_["bias"]
    both = torch.cat([pre, -pre], dim=1)
    assert torch.equal(one.indices, (both > given_["threshold"].repeat(2)).nonzero()[:, 1])
    positive = direction_coder(directions, "h.0", signs="positive", **given_)
    assert positive.width == 30
    assert torch.equal(positive.encode(x).indices, (pre > given_["threshold"]).nonzero()[:, 1])


@pytest.mark.parametrize(
    "file", ["v.npy", "v.npz", "v.safetensors", "v.pt", "bare.pt", "table.npz", "named.pth", "one.npy"]
)
def test_files(tmp_path: Path, file: str) -> None:
    directions = normal(3, 4)
    path = tmp_path / file
    if file == "v.npy":
        np.save(path, directions.double().numpy())
    elif file == "one.npy":
        np.save(path, directions[0].numpy())
    elif file == "v.npz":
        np.savez(path, anything=directions.numpy())
    elif file == "table.npz":
        np.savez(path, directions=directions.numpy(), bias=np.ones(3), threshold=np.array([1, 2, 3]))
    elif file == "v.safetensors":
        save_file({"directions": directions, "bias": torch.ones(3)}, path)
    elif file == "bare.pt":
        torch.save(directions, path)
    else:
        torch.save({"steer": directions} if file == "v.pt" else {"layer": {"vector": directions}}, path)
    coder = load_directions(path, "layers.1", name="v", signs="positive", side="input")
    assert (coder.name, coder.point, coder.width) == ("v", ("layers.1", "input"), 1 if file == "one.npy" else 3)
    assert torch.equal(coder.encoder, directions[: coder.width])
    assert torch.equal(coder.encoder_bias, torch.full((coder.width,), float(file in ("table.npz", "v.safetensors"))))
    if file == "table.npz":
        assert coder.activation.tensors["threshold"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"directions": torch.zeros(2, 3, 4)}, r"\[n, d\], got shape \[2, 3, 4\]"),
        ({"directions": torch.zeros(0, 4)}, r"got shape \[0, 4\]"),
        ({"directions": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}, "direction 1 is zero"),
        ({"directions": torch.full((2, 2), torch.inf)}, "directions holds NaN"),
        ({"bias": torch.ones(3)}, r"bias has shape \[3\], expected \[2\]"),
        ({"bias": torch.full((2,), torch.nan)}, "bias holds NaN"),
        ({"threshold": torch.ones(2, 2)}, r"threshold has shape \[2, 2\]"),
        ({"threshold": -torch.ones(2)}, "not negative"),
        ({"signs": "negative"}, "allowed: positive, both"),
    ],
)
def test_bad_directions(changes: dict[str, Any], words: str) -> None:
    given_: dict[str, Any] = {"directions": torch.eye(2), "hookpoint": "h.0", "name": "p"}
    with pytest.raises(InputError, match=words):
        direction_coder(**{**given_, **changes})


class Opener:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no file"):
        read_directions(tmp_path / "none.npy")
    (tmp_path / "v.txt").write_text("1 2 3")
    with pytest.raises(InputError, match=r"readable are \.npy, \.safetensors"):
        read_directions(tmp_path / "v.txt")
    np.savez(tmp_path / "two.npz", a=np.ones(3), b=np.ones(3))
    with pytest.raises(InputError, match="holds a, b; a file of directions"):
        read_directions(tmp_path / "two.npz")
    np.savez(tmp_path / "more.npz", directions=np.ones((1, 3)), bias=np.ones(1), scale=np.ones(1))
    with pytest.raises(InputError, match="holds bias, directions, scale"):
        read_directions(tmp_path / "more.npz")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    with pytest.raises(InputError, match="no real numbers"):
        read_directions(tmp_path / "words.npy")
    torch.save({"directions": torch.ones(2, 2, dtype=torch.complex64)}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="no real numbers"):
        read_directions(tmp_path / "c.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds no tensors"):
        read_directions(tmp_path / "list.pt")
    np.save(tmp_path / "objects.npy", np.array([tmp_path], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptError, match="damaged"):
        read_directions(tmp_path / "objects.npy")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CorruptError, match="damaged"):
        read_directions(tmp_path / "cut.npy")
    torch.save(Opener(tmp_path / "ran"), tmp_path / "code.pt")
    with pytest.raises(InputError, match="could run code"):
        read_directions(tmp_path / "code.pt")
    assert not (tmp_path / "ran").exists()
