"""Train TopK coders on the activations of one of the demo's language models, and save them in sparsify's layout.

    python training/coders.py --model OUT/hf --out OUT/coders

One coder for the residual stream after layer 2, and for a Llama another for the output of its MLP, each with the usual
TopK objective (normalised squared error) plus an auxiliary term that lets dead latents explain what is left over.
A coder that is already in ``--out`` is not trained again; within one, training resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from exegete.subjects.fast_scan import fast_scan

from text import documents, encode, training_files

HOOKPOINTS = {"llama": ("layers.2", "layers.2.mlp"), "mamba": ("layers.2",)}
ROW = 256


def rows_of(encoded: list[np.ndarray]) -> torch.Tensor:
    """Cut files into full rows ``[n, ROW]``, BOS first, as the collecting stage does; short tails are left out."""
    rows = []
    for ids in encoded:
        body = ids[1:].astype(np.int64)
        rows += [np.concatenate([[0], body[i : i + ROW - 1]]) for i in range(0, len(body) - ROW + 2, ROW - 1)]
    return torch.from_numpy(np.stack(rows))


@torch.inference_mode()
def activations(model: PreTrainedModel, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the hookpoints' outputs at all but the BOS position, ``[rows * (ROW - 1), d]`` float16."""
    inner = model.base_model
    modules = {name: inner.get_submodule(name) for name in HOOKPOINTS[model.config.model_type]}
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Any:
        def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            kept[name].append(value[:, 1:].reshape(-1, value.shape[-1]).half())

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    with fast_scan(model):
        for chunk in torch.split(rows, 32):
            inner(input_ids=chunk, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


class TopK(torch.nn.Module):
    """A TopK coder in sparsify's parametrisation."""

    def __init__(self, mean: torch.Tensor, width: int, k: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        decoder = torch.nn.functional.normalize(torch.randn(width, len(mean), generator=generator), dim=1)
        self.k = k
        self.W_dec = torch.nn.Parameter(decoder.clone())
        self.encoder_weight = torch.nn.Parameter(decoder.clone())
        self.encoder_bias = torch.nn.Parameter(torch.zeros(width))
        self.b_dec = torch.nn.Parameter(mean.clone())

    def pre(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations ``[n, width]``."""
        return torch.nn.functional.linear(x - self.b_dec, self.encoder_weight, self.encoder_bias)

    def code(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and indices of the k strongest latents, ``[n, k]`` each."""
        values, indices = self.pre(x).relu().topk(self.k, sorted=False)
        return values, indices

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Reconstruction ``[n, d]``."""
        return torch.nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum") + (
            self.b_dec
        )


@torch.no_grad()
def measure(coder: TopK, x: torch.Tensor) -> dict[str, float]:
    """Fraction of variance unexplained, share of latents alive (≥ 10 firings per 100k tokens), and mean L0."""
    mean = x.float().mean(0)
    error = total = 0.0
    counts = torch.zeros(len(coder.W_dec))
    for chunk in torch.split(x, 8192):
        batch = chunk.float()
        values, indices = coder.code(batch)
        error += float((batch - coder.decode(values, indices)).square().sum())
        total += float((batch - mean).square().sum())
        counts += torch.bincount(indices[values > 0], minlength=len(counts))
    rates = counts / len(x)
    return {
        "fvu": error / total,
        "alive": float((rates >= 1e-4).float().mean()),
        "l0": float(rates.sum()),
        "median_rate": float(rates.median()),
    }


def train(x: torch.Tensor, held: torch.Tensor, checkpoint: Path, arguments: argparse.Namespace) -> TopK:
    """Train one coder on ``x`` [n, d] float16."""
    steps, batch = arguments.steps, 4096
    scale = float(x[:200_000].float().std())
    coder = TopK(x[:200_000].float().mean(0), arguments.width, arguments.k)
    optimizer = torch.optim.Adam(coder.parameters(), lr=arguments.rate, betas=(0.9, 0.999), fused=True)
    silent = torch.zeros(arguments.width)
    first = 0
    if checkpoint.exists():
        saved: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        coder.load_state_dict(saved["coder"])
        optimizer.load_state_dict(saved["optimizer"])
        silent, first = saved["silent"], saved["step"]
    begun = time.time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, (step + 1) / 100, (steps - step) / (0.3 * steps))
        picks = torch.randint(0, len(x), (batch,), generator=torch.Generator().manual_seed(step))
        inputs = x[picks].float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pre = coder.pre(inputs)
        pre = pre.float()
        values, indices = pre.relu().topk(arguments.k, sorted=False)
        error = inputs - coder.decode(values, indices)
        loss = error.square().mean() / scale**2
        dead = silent > arguments.dead_after
        if bool(dead.any()):
            count = min(arguments.k, int(dead.sum()))
            masked = pre.masked_fill(~dead, -torch.inf)
            extra, which = masked.relu().topk(count, sorted=False)
            guess = torch.nn.functional.embedding_bag(which, coder.W_dec, per_sample_weights=extra, mode="sum")
            loss = loss + (error.detach() - guess).square().mean() / scale**2 / 16
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            slope = coder.W_dec.grad
            assert slope is not None
            slope -= (slope * coder.W_dec).sum(1, keepdim=True) * coder.W_dec
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            coder.W_dec.copy_(torch.nn.functional.normalize(coder.W_dec, dim=1))
            silent += batch
            silent[indices[values > 0]] = 0
        if (step + 1) % 200 == 0:
            found = measure(coder, held[:50_000])
            seconds = (time.time() - begun) / (step + 1 - first)
            print(f"step {step + 1} {found} dead {int(dead.sum())} {seconds:.2f} s/step", flush=True)
            state = {
                "coder": coder.state_dict(),
                "optimizer": optimizer.state_dict(),
                "silent": silent,
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    return coder


def save(coder: TopK, folder: Path) -> None:
    """Write sparsify's layout in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": coder.encoder_weight,
        "encoder.bias": coder.encoder_bias,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    save_file({k: v.detach().half().contiguous() for k, v in tensors.items()}, folder / "sae.safetensors")
    settings = {
        "activation": "topk",
        "expansion_factor": len(coder.W_dec) // len(coder.b_dec),
        "normalize_decoder": True,
        "num_latents": len(coder.W_dec),
        "k": coder.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": len(coder.b_dec),
    }
    (folder / "cfg.json").write_text(json.dumps(settings) + "\n")


def main() -> None:
    """Train each coder and write ``metrics.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder with the tokenizer inside")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--dead-after", type=int, default=400_000, help="tokens without a firing")
    parser.add_argument("--held-out-every", type=int, default=1, help="measure on every N-th held-out file")
    parser.add_argument("--rows", type=int, default=16_000, help="train rows whose activations are kept")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    rows = rows_of(encode(training_files(), arguments.model))
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[: arguments.rows]
    train_x = activations(model, rows[chosen])
    held = documents("held_out", tests=False)[:: arguments.held_out_every]
    held_x = activations(model, rows_of(encode(held, arguments.model)))
    print(f"{len(next(iter(train_x.values())))} train positions", flush=True)
    metrics: dict[str, Any] = {}
    for name in train_x:
        coder = train(train_x[name], held_x[name], arguments.out / f"{name}.checkpoint.pt", arguments)
        save(coder, arguments.out / name)
        metrics[name] = {"width": arguments.width, "k": arguments.k, **measure(coder, held_x[name])}
        metrics[name]["held_out_positions"] = len(held_x[name])
        print(name, metrics[name], flush=True)
    (arguments.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
