from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from exegete.coders import kernels
from exegete.coders.pca import pca_coder, principal_components
from exegete.coders.reading import activations, norm_limit
from exegete.errors import InputError, NotFoundError
from exegete.subjects import load_subject
from exegete.subjects.subject import Subject
from exegete.testing import toy_llama
from exegete.types import Array, Rows


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("pca") / "toy", d=16)), device="cpu")


def rows(n: int = 12, length: int = 20) -> Rows:
    """Two documents in each row, the last positions padding, and some positions not counted."""
    draw = np.random.default_rng(0)
    documents = np.repeat(np.arange(2)[None], n, axis=0).repeat(length // 2, axis=1) + 2 * np.arange(n)[:, None]
    documents[:, -3:] = -1
    mask = (documents >= 0) & (draw.random((n, length)) < 0.8)
    tokens = draw.integers(1, 300, (n, length)).astype(np.uint32)
    return Rows(tokens=tokens, documents=documents.astype(np.int32), mask=mask)


def captured(subject: Subject, given_: Rows, hookpoint: str, by_document: bool = False) -> Array:
    documents = torch.from_numpy(given_.documents.astype(np.int64))
    x = subject.capture(
        torch.from_numpy(given_.tokens.astype(np.int64)),
        (documents >= 0).long(),
        [(hookpoint, "output")],
        documents if by_document else None,
    )[hookpoint, "output"]
    return np.asarray(x[torch.from_numpy(given_.mask)].double().numpy())


def flipped(components: Array) -> Array:
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return np.asarray(components * np.sign(largest))


@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 9), st.integers(1, 17))
def test_against_sklearn_in_any_batches(seed: int, n: int, d: int, batch: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, d)) * np.arange(1, d + 1) ** 2 + 100 * draw.standard_normal(d)
    components = min(n - 1, d)
    mean, found = principal_components(torch.split(torch.from_numpy(x), batch), components)
    known = PCA(components, svd_solver="full").fit(x)
    np.testing.assert_allclose(mean.numpy(), x.mean(axis=0), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(np.abs((found.numpy() * flipped(known.components_)).sum(axis=1)), 1, atol=1e-6)
    assert bool((found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("by_document", [False, True])
def test_a_coder_of_principal_components(subject: Subject, by_document: bool) -> None:
    coder = pca_coder(subject, "blocks.1.hook_resid_post", rows(), components=5, by_document=by_document)
    x = captured(subject, rows(), "layers.1", by_document)
    known = PCA(5, svd_solver="full").fit(x)
    expected = flipped(known.components_)
    assert (coder.name, coder.point, coder.width, coder.k) == ("layers.1-pca", ("layers.1", "output"), 10, None)
    np.testing.assert_allclose(coder.encoder.numpy(), np.concatenate([expected, -expected]), atol=1e-5)
    np.testing.assert_allclose(coder.decoder_bias.numpy(), known.mean_, atol=1e-5)
    code = coder.encode(torch.from_numpy(x).float())
    made = coder.decode(code).numpy()
    np.testing.assert_allclose(made, known.inverse_transform(known.transform(x)), atol=1e-4)
    assert (captured(subject, rows(), "layers.1", not by_document) != x).any()


def test_options(subject: Subject) -> None:
    coder = pca_coder(subject, "layers.0.mlp", rows(), components=3, signs="positive", k=2, side="input", name="p")
    assert (coder.name, coder.point, coder.width, coder.k) == ("p", ("layers.0.mlp", "input"), 3, 2)
    few = pca_coder(subject, "layers.1", rows(), components=3, most=10)
    x = captured(subject, rows(), "layers.1")[:10]
    np.testing.assert_allclose(few.decoder_bias.numpy(), x.mean(axis=0), atol=1e-5)


def test_activations_come_in_row_order(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from exegete.coders import reading

    x = torch.from_numpy(captured(subject, rows(), "layers.1")).float()
    (whole,) = activations(subject, ("layers.1", "output"), rows())
    torch.testing.assert_close(whole, x)
    monkeypatch.setattr(reading, "_BATCH_TOKENS", 60)
    parts = list(activations(subject, ("layers.1", "output"), rows()))
    assert len(parts) == 4
    torch.testing.assert_close(torch.cat(parts), x)
    assert sum(len(p) for p in activations(subject, ("layers.1", "output"), rows(), most=55)) == 55
    empty = rows()
    empty.mask[:] = False
    assert list(activations(subject, ("layers.1", "output"), empty)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"components": 17}, "at most 16 principal components, 17 were asked for"),
        ({"components": 0}, "0 were asked for"),
        ({"components": 10, "most": 10}, "10 activations of 16 dimensions have at most 9"),
        ({"components": 1, "most": 0}, "0 activations of 0 dimensions have at most 0"),
        ({"components": 2, "signs": "negative"}, "allowed: positive, both"),
        ({"components": 2, "hookpoint": "layers.*"}, "stands for 3 hookpoints"),
        ({"components": 2, "hookpoint": "layers.x"}, "did you mean"),
        ({"components": 2, "k": 5}, "k = 5"),
    ],
)
def test_bad_settings(subject: Subject, options: dict[str, object], words: str) -> None:
    given_ = {"hookpoint": "layers.1", **options}
    with pytest.raises(InputError, match=words) as raised:
        pca_coder(subject, given_.pop("hookpoint"), rows(), **given_)  # type: ignore[arg-type]
    assert isinstance(raised.value, NotFoundError) == ("did you mean" in words)


def with_sink(monkeypatch: pytest.MonkeyPatch, place: tuple[int, int]) -> None:
    """Let the activation at one place of the first rows read be 100 times as long, its direction that of no other."""
    plain = Subject.capture

    def capture(self: Subject, *args: Any) -> dict[Any, torch.Tensor]:
        found = plain(self, *args)
        for x in found.values():
            norm = float(x[place].norm())
            x[place] = 0.0
            x[place][0] = 100 * norm
        return found

    monkeypatch.setattr(Subject, "capture", capture)


def test_a_sink_turns_no_component(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = rows()
    place = (2, int(np.flatnonzero(given_.mask[2])[1]))
    without = Rows(tokens=given_.tokens, documents=given_.documents, mask=given_.mask.copy())
    without.mask[place] = False
    expected = pca_coder(subject, "layers.1", without, components=3)
    with_sink(monkeypatch, place)
    found = pca_coder(subject, "layers.1", given_, components=3)
    assert torch.equal(found.encoder, expected.encoder)
    assert torch.equal(found.decoder_bias, expected.decoder_bias)
    turned = pca_coder(subject, "layers.1", given_, components=3, sink_norm=0)
    assert float(turned.encoder[0] @ expected.encoder[0]) < 0.9
    assert float(turned.encoder[0, 0]) > 0.99
    n = int(given_.mask.sum())
    (kept,) = activations(subject, ("layers.1", "output"), given_)
    assert len(kept) == n - 1
    assert sum(map(len, activations(subject, ("layers.1", "output"), given_, most=n - 1))) == n - 1
    assert sum(map(len, activations(subject, ("layers.1", "output"), given_, sink_norm=1000.0))) == n


def test_the_limit_is_that_of_the_first_batch_with_positions(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from exegete.coders import reading

    monkeypatch.setattr(reading, "_BATCH_TOKENS", 60)  # three rows
    given_ = rows()
    given_.mask[:3] = False
    x = torch.from_numpy(captured(subject, given_, "layers.1")).float()
    norms = x.norm(dim=1)
    limit = 1.02 * norms[: int(given_.mask[3:6].sum())].median()
    parts = list(activations(subject, ("layers.1", "output"), given_, sink_norm=1.02))
    assert len(parts) == 3
    assert 0 < int((norms > limit).sum()) < len(x)
    torch.testing.assert_close(torch.cat(parts), x[norms <= limit])


def test_norm_limits_by_hand() -> None:
    assert norm_limit(torch.tensor([1.0, 5.0, 2.0]), 10.0) == 20.0
    assert norm_limit(torch.tensor([1.0, 5.0, 2.0]), 0.0) == float("inf")
    assert norm_limit(torch.zeros(3), 10.0) == float("inf")


@pytest.mark.parametrize("sink_norm", [-1.0, float("nan"), float("inf")])
def test_a_sink_norm_that_is_none(subject: Subject, sink_norm: float) -> None:
    with pytest.raises(InputError, match="sink_norm is a multiple of the median norm"):
        pca_coder(subject, "layers.1", rows(), components=2, sink_norm=sink_norm)


class _WithoutFloat64(torch.Tensor):
    """A tensor of a device that has no float64, until it is on the CPU."""

    def double(self, *_: Any, **__: Any) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_batches_of_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels.has_float64(torch.device("mps"))
    assert kernels.has_float64(torch.device("cpu"))
    assert kernels.has_float64(torch.device("cuda", 1))
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    mean, expected = principal_components([x], 3)
    monkeypatch.setattr(kernels, "has_float64", lambda device: False)
    own, found = principal_components([x.as_subclass(_WithoutFloat64)], 3)
    assert (own.dtype, found.dtype) == (torch.float64, torch.float64)
    assert torch.equal(found, expected)
    assert torch.equal(own, mean)
