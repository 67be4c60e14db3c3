from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exegete.coders import weights
from exegete.coders.weights import TensorInfo
from exegete.errors import CorruptError, ExegeteError, InputError, NotFoundError

TENSORS = {
    "W_enc": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "b_dec": torch.tensor([0.5, -2.0]),
    "steps": torch.tensor(7),
    "scale": torch.tensor(1.5, dtype=torch.float64),
    "half": torch.tensor([[1.0, 2.0]], dtype=torch.float16),
}
INFOS = {
    "W_enc": TensorInfo(shape=(4, 3), dtype="F32"),
    "b_dec": TensorInfo(shape=(2,), dtype="F32"),
    "steps": TensorInfo(shape=(), dtype="I64"),
    "scale": TensorInfo(shape=(), dtype="F64"),
    "half": TensorInfo(shape=(1, 2), dtype="F16"),
}
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")


class Counting(io.RawIOBase):
    """A stream that counts the bytes read from it."""

    def __init__(self, data: bytes) -> None:
        self.inner = io.BytesIO(data)
        self.read_bytes = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.inner.seek(offset, whence)

    def tell(self) -> int:
        return self.inner.tell()

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read(len(buffer))
        buffer[: len(data)] = data
        self.read_bytes += len(data)
        return len(data)


def saved(folder: Path, suffix: str, tensors: dict[str, torch.Tensor]) -> Path:
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    else:
        torch.save(tensors, path)
    return path


def header(path: Path) -> dict[str, TensorInfo]:
    with path.open("rb") as stream:
        return weights.header(stream, str(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_saved_is_found(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path, suffix, TENSORS)
    assert header(path) == INFOS
    found = weights.tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    some = weights.tensors(path, ["b_dec", "steps"])
    assert some.keys() == {"b_dec", "steps"}
    with pytest.raises(CorruptError, match=rf"weights\{suffix} lacks b_enc, x; it has b_dec$"):
        weights.tensors(path, iter(["b_enc", "b_dec", "x"]))


def test_kinds_that_only_torch_has(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor([True])}
    for suffix in (".safetensors", ".pt"):
        path = saved(tmp_path, suffix, tensors)
        assert {n: (i.dtype, i.floating) for n, i in header(path).items()} == {
            "a": ("BF16", True),
            "b": ("BOOL", False),
        }
        assert torch.equal(weights.tensors(path)["a"], tensors["a"])
    wide = saved(tmp_path, ".pt", {"a": torch.ones(2).to(torch.float8_e4m3fn)})
    assert header(wide)["a"] == TensorInfo(shape=(2,), dtype="F8_E4M3")
    assert header(wide)["a"].floating


def test_kinds_that_only_numpy_has(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, W=np.arange(6, dtype=">f4").reshape(2, 3).T, name=np.array("gpt2"), kind=np.array(["a", "b"]))
    assert header(path)["W"] == TensorInfo(shape=(3, 2), dtype="F32")
    found = weights.tensors(path)
    assert found["W"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found.keys() == {"W"}
    np.savez_compressed(path, W=np.zeros((100, 100), np.float32))
    assert header(path)["W"].shape == (100, 100)
    assert weights.tensors(path)["W"].shape == (100, 100)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_header_costs_little(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path, suffix, {"W": torch.zeros(12_500, 1000), "b": torch.zeros(4)})
    data = path.read_bytes()
    assert len(data) > 50_000_000
    stream = Counting(data)
    found = weights.header(stream, f"hub/x{suffix}")  # type: ignore[arg-type]
    assert found["W"] == TensorInfo(shape=(12_500, 1000), dtype="F32")
    assert stream.read_bytes < 200_000
    if suffix == ".pt":
        stream = Counting(data)
        assert weights.settings(stream, "x.pt") == {}  # type: ignore[arg-type]
        assert stream.read_bytes < 200_000


def test_nested_tables_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    parameter = torch.nn.Parameter(torch.ones(2))
    state = {"model": {"W": parameter, "deep": {"b": torch.zeros(3)}}, "cfg": {"k": 4, "names": ["x"]}, "lr": 0.5, 7: 1}
    torch.save(state, path)
    assert {n: i.shape for n, i in header(path).items()} == {"model.W": (2,), "model.deep.b": (3,)}
    with path.open("rb") as stream:
        assert weights.settings(stream, "ae.pt") == {"cfg.k": 4, "cfg.names": ["x"], "lr": 0.5, "7": 1}
    found = weights.tensors(path)
    assert found.keys() == {"model.W", "model.deep.b"}
    assert not found["model.W"].requires_grad
    assert weights.tensors(path, ["model.W"]).keys() == {"model.W"}
    assert weights.flat({"a": {}, "b": {"c": 1}}) == {"b.c": 1}
    assert weights.flat([1]) == {}


def test_tables_without_end(tmp_path: Path) -> None:
    around: dict[str, Any] = {"a": 1}
    around["self"] = around
    laughs: dict[str, Any] = {}
    for _ in range(12):
        laughs = {str(i): laughs for i in range(10)}
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"a": deep}
    for i, data in enumerate((around, laughs, deep)):
        with pytest.raises(ValueError, match="it holds over"):
            weights.flat(data)
        torch.save(data, tmp_path / f"{i}.pt")
        with pytest.raises(CorruptError, match=r"\.pt is damaged: it holds over"):
            header(tmp_path / f"{i}.pt")


def refused(path: Path, error: type[ExegeteError] | tuple[type[ExegeteError], ...], match: str) -> None:
    """Neither header nor tensors of a file are read; the reason is one line."""
    for read in (header, weights.tensors):
        with pytest.raises(error, match=match) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("cut", [0, 1, 7, 9, 40, -1, -40])
def test_truncated(tmp_path: Path, suffix: str, cut: int) -> None:
    path = saved(tmp_path, suffix, TENSORS)
    path.write_bytes(path.read_bytes()[:cut])
    refused(path, CorruptError, rf"weights\{suffix} is damaged")


def outcome(path: Path) -> str:
    """What reading a file says; errors that are not ours are not caught."""
    said = ""
    for read in (header, weights.tensors):
        try:
            read(path)
        except (CorruptError, InputError) as error:
            said += str(error)
    return said


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_noise(tmp_path: Path, suffix: str) -> None:
    """Whatever a few changed bytes do, it is an error of ours, or the file still reads."""
    path = saved(tmp_path, suffix, TENSORS)
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        assert "\n" not in outcome(path)


def test_compressed_noise(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, W=np.random.default_rng(0).standard_normal((30, 30)).astype(np.float32))
    whole = path.read_bytes()
    draw = random.Random(1)
    for _ in range(150):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        assert "\n" not in outcome(path)


def raw_safetensors(path: Path, head: object, body: bytes = b"\0" * 16, length: int | None = None) -> Path:
    data = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(data) if length is None else length) + data + body)
    return path


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ({"W": ENTRY}, {"length": 1 << 40}),
        ({"W": ENTRY}, {"length": 5}),
        ({"W": ENTRY}, {"length": 90 << 20}),
        ({"W": ENTRY}, {"body": b""}),
        ({"W": ENTRY}, {"body": b"\0" * 17}),
        ({"W": {**ENTRY, "data_offsets": [0, 1 << 50]}}, {}),
        ([1], {}),
        ({"W": 3}, {}),
        ({"W": {**ENTRY, "shape": "x"}}, {}),
        (b'{"W": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1e999]}}', {}),
        (b'{"W": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}', {}),
        (b"[" * 200_000, {}),
        (b"\xff\xfe", {}),
    ],
)
def test_safetensors_that_lie(tmp_path: Path, head: object, options: dict[str, Any]) -> None:
    refused(raw_safetensors(tmp_path / "a.safetensors", head, **options), CorruptError, r"a\.safetensors is damaged")


def test_safetensors_whose_shapes_do_not_fit_their_bytes(tmp_path: Path) -> None:
    for entry in ({"shape": [1 << 40]}, {"shape": [-4]}, {"dtype": "F64"}, {"data_offsets": [8, 0]}):
        path = raw_safetensors(tmp_path / "a.safetensors", {"W": {**ENTRY, **entry}})
        refused(path, CorruptError, r"a\.safetensors is damaged")


def raw_npz(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(shape: str, descr: str = "'<f4'", body: bytes = b"\0" * 16) -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + body


def test_npz_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    assert header(raw_npz(path, {"W.npy": npy("(4,)")}))["W"].shape == (4,)
    for data in (
        npy("(1000000000000,)"),
        npy("(-4,)"),
        npy("(3,)"),
        npy("(4.0,)"),
        npy("(4,)", "'<f8'"),
        b"",
        b"\x93NU",
    ):
        refused(raw_npz(path, {"W.npy": data}), CorruptError, r"a\.npz is damaged")
    refused(raw_npz(path, {"W.npy": npy("(4,)"), "readme.txt": b"hello"}), CorruptError, "damaged")
    long = b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFFF) + b" " * (1 << 25)
    refused(raw_npz(path, {"W.npy": long}, zipfile.ZIP_DEFLATED), CorruptError, "damaged")
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "plain.npy").rename(path)
    refused(path, CorruptError, "damaged")


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.target,)


def test_code_is_neither_read_nor_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    objects = np.empty(1, dtype=object)
    objects[0] = Trap(ran)
    np.savez(tmp_path / "a.npz", W=objects)
    refused(tmp_path / "a.npz", CorruptError, "holds Python objects, which are not read")
    for data in (Trap(ran), {"W": torch.ones(2), "extra": Trap(ran)}, [Trap(ran)]):
        torch.save(data, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", InputError, r"a\.pt holds more than tensors .* convert it to \.safetensors")
        with (tmp_path / "a.pt").open("rb") as stream, pytest.raises(InputError, match="could run code"):
            weights.settings(stream, "a.pt")
        torch.save(data, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        refused(tmp_path / "a.pt", (InputError, CorruptError), r"a\.pt")
        (tmp_path / "a.pt").write_bytes(pickle.dumps(data))
        refused(tmp_path / "a.pt", (InputError, CorruptError), r"a\.pt")
    assert not ran.exists()
    torch.save(Trap(ran), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)  # the trap works
    assert ran.exists()


def test_the_old_format_of_torch(tmp_path: Path) -> None:
    torch.save({"W": torch.ones(2, 3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert header(tmp_path / "a.pt") == {"W": TensorInfo(shape=(2, 3), dtype="F32")}
    assert torch.equal(weights.tensors(tmp_path / "a.pt")["W"], torch.ones(2, 3))


def test_a_compressed_pickle_is_a_bomb(tmp_path: Path) -> None:
    """PyTorch stores its archives uncompressed; in a compressed one a kilobyte can ask for a gigabyte."""
    torch.save({"W": torch.ones(2), "cfg": "x" * 5_000_000}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    refused(tmp_path / "bomb.pt", CorruptError, "it is compressed, which PyTorch's own files never are")


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.ones(3, 3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.ones(3, device="meta"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds(tmp_path: Path, made: Callable[[], torch.Tensor]) -> None:
    torch.save({"W": made()}, tmp_path / "a.pt")
    with pytest.raises((CorruptError, InputError)):
        weights.tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_that_are_not_finite(tmp_path: Path, suffix: str, bad: float) -> None:
    path = saved(tmp_path, suffix, {"good": torch.ones(3), "W": torch.tensor([1.0, bad])})
    with pytest.raises(CorruptError, match="W holds NaN or infinity"):
        weights.tensors(path)
    assert weights.tensors(path, ["good"]).keys() == {"good"}


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"x")
    refused(tmp_path / "a.gguf", InputError, r"a\.gguf is no weight file that can be read; readable are \.safetensors")
    for suffix in SUFFIXES:
        with pytest.raises(NotFoundError, match=r"there is no .*gone"):
            weights.tensors(tmp_path / f"gone{suffix}")
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(CorruptError, match="folder"):
            weights.tensors(tmp_path / f"folder{suffix}")
