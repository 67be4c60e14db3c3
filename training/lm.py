"""Train one of the demo's causal language models (Llama or Mamba architecture) on train-side standard-library text.

    python training/lm.py --tokenizer TOK --out OUT [--architecture mamba]

Checkpoints go to ``OUT/checkpoint.pt`` every ``--save-every`` steps; the same command resumes. The learning rate is
constant after a warm-up and falls linearly to zero over the last ``--cooldown`` share of ``--steps``; a run may be
resumed with other ``--steps`` as long as its cooldown has not begun. Rows are 256 tokens long before the cooldown and
512 in it, at the same number of tokens a step. Batch ``s`` depends on ``s`` and the row length alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from exegete.subjects.fast_scan import fast_scan

from text import documents, encode, training_files

LENGTH = 512


def build(architecture: str, vocabulary: int) -> PreTrainedModel:
    """Return the untrained model: a Llama of about 3.6 M parameters or a Mamba of about 1.8 M."""
    torch.manual_seed(0)
    if architecture == "mamba":
        return MambaForCausalLM(
            MambaConfig(
                vocab_size=vocabulary,
                hidden_size=192,
                num_hidden_layers=4,
                state_size=16,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=None,
                pad_token_id=None,
                initializer_range=0.04,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=576,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=None,
            initializer_range=0.04,
        )
    )


def batch(stream: torch.Tensor, step: int, tokens: int, length: int) -> torch.Tensor:
    """Return ``[tokens / length, length]`` ids: BOS, then a random stretch of the stream."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 17)
    starts = torch.randint(0, len(stream) - length, (tokens // length,), generator=generator)
    rows = stream[starts[:, None] + torch.arange(length - 1)]
    return torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], dim=1)


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, encoded: list[np.ndarray], n_bytes: int, length: int = LENGTH) -> float:
    """Held-out bits per byte over non-overlapping rows of ``length`` (BOS first); every byte of every file counts."""
    rows = []
    for ids in encoded:
        body = ids[1:].astype(np.int64)
        rows += [np.concatenate([[0], body[i : i + length - 1]]) for i in range(0, len(body), length - 1)]
    rows.sort(key=len)
    nats = 0.0
    for i in range(0, len(rows), 16):
        group = rows[i : i + 16]
        width = max(map(len, group))
        padded = np.stack([np.pad(r, (0, width - len(r)), constant_values=-100) for r in group])
        batch_ids = torch.from_numpy(padded)
        with fast_scan(model):
            logits = model(input_ids=batch_ids.clamp_min(0)).logits[:, :-1].float()
        nats += float(
            torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), batch_ids[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
            )
        )
    return nats / math.log(2) / n_bytes


def optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for what is no matrix: embeddings, norms, convolutions, decay rates."""
    named = model.named_parameters()
    hidden = [p for n, p in named if p.ndim == 2 and not any(part in n for part in ("embed", "lm_head", "A_log"))]
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adamw]


def schedule(step: int, steps: int, cooldown: float) -> float:
    """Return the factor on the learning rate at a step."""
    left = (steps - step) / max(1.0, cooldown * steps)
    return min(1.0, (step + 1) / 60, left)


def main() -> None:
    """Train, then write the Hugging Face folder and ``metrics.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=("llama", "mamba"), default="llama")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--cooldown", type=float, default=0.4)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--held-out-every", type=int, default=1, help="measure on every N-th held-out file in the end")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    torch.set_flush_denormal(arguments.architecture == "mamba")  # states that have decayed

    stream = torch.from_numpy(np.concatenate(encode(training_files(), arguments.tokenizer)).astype(np.int64))
    held = documents("held_out", tests=False)[:: arguments.held_out_every]
    held_ids, held_bytes = encode(held, arguments.tokenizer), sum(len(f.text.encode()) for f in held)
    model = build(
        arguments.architecture,
        int(json.loads((arguments.tokenizer / "tokenizer.json").read_text())["model"]["vocab"].__len__()),
    )
    groups = optimizers(model, arguments.rate)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters; {len(stream)} train tokens; {held_bytes} held-out bytes", flush=True)

    checkpoint = arguments.out / "checkpoint.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(groups, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, seconds = saved["step"], saved["seconds"]

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=rows, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())

    compiled = torch.compile(loss_of, dynamic=False)
    begun = time.time() - seconds
    smooth = 0.0
    for step in range(first, arguments.steps):
        factor = schedule(step, arguments.steps, arguments.cooldown)
        for optimizer in groups:
            for group in optimizer.param_groups:
                group["lr"] = arguments.rate * factor
        length = LENGTH if step >= (1 - arguments.cooldown) * arguments.steps else LENGTH // 2
        rows = batch(stream, step, arguments.batch, length)
        with fast_scan(model, compiled=True):
            loss = compiled(rows)
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in groups:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == first else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 20 == 0:
            rate = (step + 1 - first) * arguments.batch / max(1e-9, time.time() - begun - seconds)
            print(f"step {step + 1} loss {smooth:.3f} lr x{factor:.2f} {rate:.0f} tok/s", flush=True)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in groups],
                "step": step + 1,
                "seconds": time.time() - begun,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        if (step + 1) % 500 == 0:
            quarter = held[::4]
            found = bits_per_byte(model, held_ids[::4], sum(len(f.text.encode()) for f in quarter))
            print(f"step {step + 1} held-out {found:.3f} bits/byte (a quarter of the files)", flush=True)

    model.half().save_pretrained(arguments.out / "hf")
    model = AutoModelForCausalLM.from_pretrained(arguments.out / "hf", dtype=torch.float32)
    metrics = {
        "parameters": parameters,
        "train_tokens": len(stream),
        "train_files": len(training_files()),
        "seen_tokens": arguments.steps * arguments.batch,
        "seconds": round(time.time() - begun),
        "held_out_files": len(held),
        "held_out_bytes": held_bytes,
        "bits_per_byte_512": bits_per_byte(model, held_ids, held_bytes),
        "bits_per_byte_256": bits_per_byte(model, held_ids, held_bytes, 256),
    }
    (arguments.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
