from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from exegete.coders.pca import pca_coder, principal_components
from exegete.coders.reading import activations
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
