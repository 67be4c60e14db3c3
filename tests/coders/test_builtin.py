from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exegete.coders.baselines import untrained_coder
from exegete.coders.builtin import BUILTINS, BuiltinSpec, build_builtin, parse_builtin
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import NeuronCoder, neuron_coder
from exegete.coders.pca import pca_coder
from exegete.coders.reading import activations
from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.subjects import load_subject
from exegete.subjects.subject import Subject
from exegete.testing import toy_llama
from exegete.types import Rows


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("builtin") / "toy", d=16)), device="cpu")


def rows() -> Rows:
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 300, (40, 32)).astype(np.uint32)
    return Rows(tokens=tokens, documents=np.zeros((40, 32), np.int32), mask=np.ones((40, 32), bool))


def unread() -> Rows:
    raise AssertionError("no text is needed")


def built(
    text: str, subject: Subject, *hookpoints: str, sample: Callable[[], Rows] = unread, **options: Any
) -> dict[str, Any]:
    spec = parse_builtin(text)
    assert spec is not None
    return build_builtin(spec, subject, hookpoints, sample, 5, **options)


@pytest.mark.parametrize(
    ("text", "kind", "what", "options", "tokens"),
    [
        ("neurons", "neurons", "", {}, 0),
        (
            "neurons:k=32,rotation=7,signs=both,threshold=0.5",
            "neurons",
            "",
            {"k": 32, "rotation": 7, "signs": "both", "threshold": 0.5},
            0,
        ),
        ("directions:a/b,c=1/v.npy", "directions", "a/b,c=1/v.npy", {}, 0),
        (
            "directions:~/v:1.npy,signs=positive,unit=True",
            "directions",
            "~/v:1.npy",
            {"signs": "positive", "unit": True},
            0,
        ),
        ("pca:components=256", "pca", "", {"components": 256}, 65536),
        ("pca:components=256, tokens=99", "pca", "", {"components": 256, "tokens": 99}, 99),
        ("random:topk,width=4096,k=32", "random", "topk", {"width": 4096, "k": 32}, 0),
        ("random:batchtopk,width=64,k=3", "random", "batchtopk", {"width": 64, "k": 3}, 1024),
        ("random:jumprelu,width=64", "random", "jumprelu", {"width": 64}, 0),
        ("random:jumprelu,width=64,l0=2.5", "random", "jumprelu", {"width": 64, "l0": 2.5}, 1024),
    ],
)
def test_grammar(text: str, kind: str, what: str, options: dict[str, Any], tokens: int) -> None:
    spec = parse_builtin(text)
    assert spec == BuiltinSpec(kind=kind, what=what, options=options)
    assert spec is not None
    assert spec.tokens == tokens
    assert kind in BUILTINS


@pytest.mark.parametrize("text", ["org/name", "neuronsaurus", "", "./neurons", "x=neurons", "PCA:components=3"])
def test_other_specs_are_left_alone(text: str) -> None:
    assert parse_builtin(text) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("neurons:", ["'' in 'neurons:'", "k=…, rotation=…, signs=…, threshold=…"]),
        ("neurons:32", ["'32'", "options of neurons"]),
        ("neurons:K=32", ["'K=32'", "not understood"]),
        ("neurons:k=3,k=4", ["'k=4'", "given twice"]),
        ("neurons:k=three", ["k in", "a whole number", "'three'"]),
        ("neurons:k=-3", ["a whole number"]),
        ("neurons:threshold=-1", ["a number that is not negative"]),
        ("neurons:threshold=nan", ["a number that is not negative"]),
        ("neurons:threshold=x", ["a number that is not negative"]),
        ("neurons:signs=negative", ["positive or both"]),
        ("directions", ["lacks a FILE", "directions:FILE"]),
        ("directions:unit=true", ["lacks a FILE"]),
        ("directions:v.npy,unit=1", ["true or false"]),
        ("pca", ["lacks components"]),
        ("pca:tokens=3", ["lacks components"]),
        ("random", ["lacks an architecture"]),
        ("random:width=3", ["lacks an architecture"]),
        ("random:topk", ["lacks width"]),
        ("random:crosscoder,width=3", ["'crosscoder'", "known: topk"]),
        ("random:topk,narrow,width=3", ["'narrow'", "options of random"]),
    ],
)
def test_bad_specs(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        parse_builtin(text)
    assert all(word in str(raised.value) for word in words), raised.value


def test_neurons(subject: Subject) -> None:
    coders = built("neurons:k=4,rotation=2,signs=both", subject, "layers.*.mlp", "layers.2", "layers.2")
    assert list(coders) == ["layers.0.mlp-neurons", "layers.1.mlp-neurons", "layers.2.mlp-neurons", "layers.2-neurons"]
    for name, coder in coders.items():
        again = neuron_coder(subject, name.removesuffix("-neurons"), k=4, rotation=2, signs="both")
        assert isinstance(coder, NeuronCoder)
        assert (coder.name, coder.point, coder.hash) == (name, again.point, again.hash)
    lens = built("neurons", subject, "blocks.*.mlp.hook_post", "blocks.0.hook_resid_pre")
    assert [c.point for c in lens.values()] == [
        *((f"layers.{i}.mlp.down_proj", "input") for i in range(3)),
        ("layers.0", "input"),
    ]


def test_directions(subject: Subject, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.eye(16)[:3])
    coders = built(f"directions:{tmp_path / 'v.npy'},signs=positive", subject, "model.layers.1", "blocks.0.mlp.hook_in")
    assert [(n, c.point, c.width) for n, c in coders.items()] == [
        ("layers.1-directions", ("layers.1", "output"), 3),
        ("layers.0.mlp-directions", ("layers.0.mlp", "input"), 3),
    ]
    with pytest.raises(MismatchError, match="reads 16 dimensions"):
        built(f"directions:{tmp_path / 'v.npy'}", subject, "blocks.0.mlp.hook_post")
    with pytest.raises(NotFoundError, match="no file"):
        built("directions:none.npy", subject, "layers.1")


def test_pca(subject: Subject) -> None:
    (coder,) = built("pca:components=4,tokens=500,signs=positive", subject, "layers.1", sample=rows).values()
    again = pca_coder(subject, "layers.1", rows(), components=4, most=500, signs="positive")
    assert (coder.name, coder.hash, coder.width) == ("layers.1-pca", again.hash, 4)
    other = pca_coder(subject, "layers.1", rows(), components=4, signs="positive")
    assert coder.hash != other.hash
    (apart,) = built("pca:components=4", subject, "layers.1", sample=rows, by_document=True).values()
    assert apart.width == 8
    none = Rows(tokens=rows().tokens, documents=rows().documents, mask=rows().mask & False)
    with pytest.raises(InputError, match="0 activations"):
        built("pca:components=4", subject, "layers.1", sample=lambda: none)


def test_random(subject: Subject) -> None:
    (coder,) = built("random:topk,width=64,k=3", subject, "layers.1").values()
    again = untrained_coder("topk", d_in=16, width=64, k=3, seed=5, hookpoint="layers.1", name="x")
    assert (coder.name, coder.hash, coder.base_model) == ("layers.1-random", again.hash, subject.name)
    coders = built("random:batchtopk,width=64,k=3", subject, "layers.0", "layers.1", sample=rows)
    for coder in coders.values():
        assert isinstance(coder, LinearCoder)
        x = torch.cat(list(activations(subject, coder.point, rows(), most=1024)))
        assert len(coder.encode(x).values) / 1024 == pytest.approx(3, abs=0.01)
    assert coders["layers.0-random"].hash != coders["layers.1-random"].hash
    none = Rows(tokens=rows().tokens, documents=rows().documents, mask=rows().mask & False)
    with pytest.raises(InputError, match="needs a sample"):
        built("random:jumprelu,width=64,l0=3", subject, "layers.0", sample=lambda: none)
    with pytest.raises(InputError, match="needs k"):
        built("random:topk,width=64", subject, "layers.0")


def test_hookpoints(subject: Subject) -> None:
    for text in ("neurons", "directions:v.npy", "pca:components=3", "random:topk,width=4,k=1"):
        with pytest.raises(InputError, match="name hookpoints, such as"):
            built(text, subject)
    with pytest.raises(NotFoundError, match="did you mean"):
        built("neurons", subject, "layers.9")
    with pytest.raises(InputError, match=r"two coders would be called 'layers\.0-neurons'.*NAME=SPEC"):
        built("neurons", subject, "layers.0", "blocks.0.hook_resid_pre")
