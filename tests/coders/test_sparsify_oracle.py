"""EleutherAI's sparsify writes the checkpoints; what it computes is what we must compute."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.coders import load_coder, load_coders

KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": {"activation": "groupmax"},
    "multi": {"multi_topk": True},
    "factor": {"num_latents": 0, "expansion_factor": 4},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sparsify import SparseCoder, SparseCoderConfig
    folder = tmp_path_factory.mktemp("sparsify")
    coders: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, options in KINDS.items():
            coder = SparseCoder(24, SparseCoderConfig(**{"num_latents": 96, "k": 8, **options}))
            for parameter in coder.parameters():
                parameter.data = torch.randn_like(parameter) * (
                    0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                )
            coder.save_to_disk(folder / name / "layers.3")
            coder.save_to_disk(folder / "many" / f"layers.{len(coders)}.mlp")
            coder.save_to_disk(folder / "seeds" / "h.0" / f"seed{len(coders)}")
            coders[name] = coder
    return folder, coders


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(50, 24, generator=torch.Generator().manual_seed(1))


def reconstruction(peer: Any, x: torch.Tensor) -> Any:
    """The peer's forward pass; under multi_topk that returns what its training loss needs, four times k latents."""
    return peer.decode(*peer.encode(x)[:2]) if peer.cfg.multi_topk else peer(x).sae_out


@pytest.mark.parametrize("kind", KINDS)
def test_same_code_and_reconstruction(peers: tuple[Path, dict[str, Any]], x: torch.Tensor, kind: str) -> None:
    folder, coders = peers
    peer, ours = coders[kind], load_coder(str(folder / kind), "layers.3")
    transcode = bool(KINDS[kind].get("transcode"))
    assert (ours.width, ours.k, ours.side) == (96, 8, "input" if transcode else "output")
    with torch.no_grad():
        theirs = peer.encode(x)
        whole = reconstruction(peer, x)
    code = ours.encode(x)
    order, other = theirs.top_indices.sort(dim=1), code.indices.sort(dim=1)
    fires = (theirs.top_acts.gather(1, order.indices) > 0) | (code.values.gather(1, other.indices) > 0)
    assert fires.float().mean() > 0.9
    assert torch.equal(order.values[fires], other.values[fires])
    torch.testing.assert_close(
        code.values.gather(1, other.indices), theirs.top_acts.gather(1, order.indices), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.decode(code, x), whole, rtol=1e-5, atol=1e-5)


def test_same_layouts(peers: tuple[Path, dict[str, Any]], x: torch.Tensor) -> None:
    folder, coders = peers
    for i, (name, coder) in enumerate(load_coders(str(folder / "many")).items()):
        assert name == f"layers.{i}.mlp"
        with torch.no_grad():
            expected = reconstruction(coders[list(KINDS)[i]], x)
        torch.testing.assert_close(coder.decode(coder.encode(x), x), expected, rtol=1e-5, atol=1e-5)
    assert list(load_coders(str(folder / "seeds"))) == [f"h.0-seed{i}" for i in range(len(KINDS))]
