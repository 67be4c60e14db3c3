from __future__ import annotations

import subprocess
import sys

import pytest

from exegete.errors import NotFoundError
from exegete.subjects.names import expand, natural


def names(stack: str, *inner: str, layers: int = 12, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    found = list(extra)
    for layer in range(layers):
        found += [f"{stack}.{layer}", *(f"{stack}.{layer}.{part}" for part in inner)]
    return tuple(found)


LLAMA = names(
    "layers",
    *("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
    extra=("embed_tokens",),
)
GPT2 = names("h", "ln_1", "attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj", extra=("wte", "wpe"))
NEOX = names("layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h", extra=("embed_in",))
GEMMA = names(
    "layers",
    *("self_attn", "self_attn.o_proj", "mlp", "post_attention_layernorm", "pre_feedforward_layernorm"),
    "post_feedforward_layernorm",
    extra=("embed_tokens",),
)
VISION = (
    *names("vision_tower.encoder.layers", "mlp", layers=2),
    "language_model.embed_tokens",
    *names("language_model.layers", "mlp", "self_attn", layers=3),
)


@pytest.mark.parametrize(
    ("pattern", "known", "expected"),
    [
        ("layers.1", LLAMA, [("layers.1", "output")]),
        ("model.layers.1.mlp", LLAMA, [("layers.1.mlp", "output")]),
        ("transformer.h.10", GPT2, [("h.10", "output")]),
        ("gpt_neox.layers.3.attention", NEOX, [("layers.3.attention", "output")]),
        ("embed_tokens", LLAMA, [("embed_tokens", "output")]),
        ("hook_embed", LLAMA, [("embed_tokens", "output")]),
        ("hook_embed", GPT2, [("wte", "output")]),
        ("hook_embed", NEOX, [("embed_in", "output")]),
        ("blocks.3.hook_resid_post", LLAMA, [("layers.3", "output")]),
        ("blocks.3.hook_resid_post", GPT2, [("h.3", "output")]),
        ("blocks.3.hook_resid_pre", LLAMA, [("layers.2", "output")]),
        ("blocks.0.hook_resid_pre", GPT2, [("h.0", "input")]),
        ("blocks.12.hook_resid_pre", LLAMA, [("layers.11", "output")]),
        ("blocks.3.hook_mlp_out", LLAMA, [("layers.3.mlp", "output")]),
        ("blocks.3.hook_mlp_out", GEMMA, [("layers.3.post_feedforward_layernorm", "output")]),
        ("blocks.3.hook_attn_out", LLAMA, [("layers.3.self_attn", "output")]),
        ("blocks.3.hook_attn_out", GPT2, [("h.3.attn", "output")]),
        ("blocks.3.hook_attn_out", NEOX, [("layers.3.attention", "output")]),
        ("blocks.3.hook_attn_out", GEMMA, [("layers.3.post_attention_layernorm", "output")]),
        ("blocks.3.mlp.hook_in", LLAMA, [("layers.3.mlp", "input")]),
        ("blocks.3.hook_resid_mid", GEMMA, [("layers.3.pre_feedforward_layernorm", "input")]),
        ("blocks.3.mlp.hook_post", LLAMA, [("layers.3.mlp.down_proj", "input")]),
        ("blocks.3.mlp.hook_post", NEOX, [("layers.3.mlp.dense_4h_to_h", "input")]),
        ("blocks.3.attn.hook_z", GPT2, [("h.3.attn.c_proj", "input")]),
        ("blocks.1[01].hook_resid_post", LLAMA, [("layers.10", "output"), ("layers.11", "output")]),
        ("10-gemmascope-res-16k", GEMMA, [("layers.10", "output")]),
        ("gemma-2-2b/10-gemmascope-res-16k__l0-72", GEMMA, [("layers.10", "output")]),
        ("6-res-jb", GPT2, [("h.5", "output")]),
        ("0-res-jb", GPT2, [("h.0", "input")]),
        ("5-gemmascope-mlp-16k", GEMMA, [("layers.5.post_feedforward_layernorm", "output")]),
        ("5-gemmascope-att-16k", GEMMA, [("layers.5.self_attn.o_proj", "input")]),
        ("5-att-kk", GPT2, [("h.5.attn.c_proj", "input")]),
        ("5-llamascope-att-32k", LLAMA, [("layers.5.self_attn", "output")]),
        ("5-gemmascope-transcoder-16k", GEMMA, [("layers.5.mlp", "input")]),
        ("layers.1", VISION, [("language_model.layers.1", "output")]),
        ("blocks.1.hook_mlp_out", VISION, [("language_model.layers.1.mlp", "output")]),
        ("hook_embed", VISION, [("language_model.embed_tokens", "output")]),
        ("layers.*.mlp", VISION, [(f"language_model.layers.{i}.mlp", "output") for i in range(3)]),
        ("vision_tower.encoder.layers.1", VISION, [("vision_tower.encoder.layers.1", "output")]),
    ],
)
def test_spellings(pattern: str, known: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    assert list(expand(pattern, known)) == expected


def test_globs_go_by_segment_in_natural_order() -> None:
    assert [n for n, _ in expand("layers.*", LLAMA)] == [f"layers.{i}" for i in range(12)]
    assert [n for n, _ in expand("model.layers.*.mlp", tuple(reversed(LLAMA)))] == [
        f"layers.{i}.mlp" for i in range(12)
    ]
    assert [n for n, _ in expand("layers.[13]", LLAMA)] == ["layers.1", "layers.3"]
    assert [n for n, _ in expand("blocks.*.hook_mlp_out", GPT2)] == [f"h.{i}.mlp" for i in range(12)]


def test_side_is_the_callers_where_the_spelling_does_not_fix_it() -> None:
    assert expand("layers.1.mlp", LLAMA, side="input") == (("layers.1.mlp", "input"),)
    assert expand("blocks.1.hook_mlp_out", LLAMA, side="input") == (("layers.1.mlp", "output"),)


def test_base_model_prefix() -> None:
    assert expand("odd.layers.1", LLAMA, prefix="odd") == (("layers.1", "output"),)
    with pytest.raises(NotFoundError):
        expand("odd.layers.1", LLAMA)


@pytest.mark.parametrize(
    "pattern",
    ["layers.12", "layers.*.nlp", "blocks.99.hook_resid_post", "blocks.13.hook_resid_pre", "30-gemmascope-res-16k",
     "3-what-is-this", "", "blocks.3.hook_scale", "hook_embed.x"],
)  # fmt: skip
def test_unknown(pattern: str) -> None:
    with pytest.raises(NotFoundError):
        expand(pattern, LLAMA)


def test_unknown_names_the_near_ones() -> None:
    with pytest.raises(NotFoundError, match=r"'layers\.3\.mpl'.*layers\.3\.mlp"):
        expand("layers.3.mpl", LLAMA)
    with pytest.raises(NotFoundError, match=r"understood are hook_embed, blocks\.L\.hook_resid_pre"):
        expand("blocks.3.hook_scale", LLAMA)
    with pytest.raises(NotFoundError, match="without the norm's gain"):
        expand("blocks.3.ln2.hook_normalized", LLAMA)


def test_the_stream_before_the_mlp() -> None:
    assert expand("blocks.3.hook_resid_mid", ["layers.3", "layers.3.post_attention_layernorm"]) == (
        ("layers.3.post_attention_layernorm", "input"),
    )
    assert expand("blocks.3.hook_resid_mid", ["h.3", "h.3.ln_2", "h.3.mlp"]) == (("h.3.ln_2", "input"),)
    olmo = ["layers.3", "layers.3.post_attention_layernorm", "layers.3.post_feedforward_layernorm"]
    with pytest.raises(NotFoundError):
        expand("blocks.3.hook_resid_mid", olmo)


def test_a_coder_repository_has_no_layer_modules() -> None:
    folders = ("layers.3.mlp", "layers.10.mlp")
    assert expand("blocks.10.hook_mlp_out", folders) == (("layers.10.mlp", "output"),)
    with pytest.raises(NotFoundError):
        expand("blocks.3.hook_resid_post", folders)


def test_natural_order() -> None:
    assert sorted(["h.10", "h.9.b", "h.9", "h", "a.x"], key=natural) == ["a.x", "h", "h.9", "h.9.b", "h.10"]


def test_packages_import_without_torch() -> None:
    code = "import sys, exegete.subjects, exegete.coders; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_exports_are_what_they_say() -> None:
    import exegete.coders
    import exegete.subjects

    for package in (exegete.coders, exegete.subjects):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="nonsense"):
            _ = package.nonsense
