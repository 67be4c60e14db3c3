"""Tiny models of three families, trained from nothing in seconds on one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from exegete.subjects import Subject
from exegete.subjects.fast_scan import fast_scan
from exegete.testing import toy_tokenizer

FAMILIES: Final[Mapping[str, str]] = {"mamba": "Mamba", "llama": "Llama", "rwkv": "RWKV-4"}
"""Model types of transformers, and what they are called on the page."""
RECURRENT: Final = ("mamba", "rwkv")
WIDTH, LAYERS = 64, 4
_OWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "mamba": {"state_size": 16},
    "llama": {
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    },
    "rwkv": {"attention_hidden_size": WIDTH, "rescale_every": 0},
}
Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids [rows, positions] and what is to follow each of them, −100 where nothing is asked."""
IGNORED: Final = -100


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long a model is trained, at what rate at most, and with how much weight decay."""

    steps: int
    rate: float = 4e-3
    decay: float = 0.01


def prepared(threads: int = 1) -> None:
    """Make this process compute on so many threads, and numbers too small to count zero: RWKV and Mamba make many."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def new_model(family: str, vocabulary: int, *, seed: int, tied: bool = True) -> Any:
    """Return an untrained causal language model of four blocks and 64 dimensions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=tied,
        **_OWN[family],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def train(model: Any, batch: Callable[[int], Batch], how: Training) -> float:
    """Train a model on the batches of steps 0, 1, … and return the mean loss of the last tenth of them, nats.

    AdamW, gradients clipped at norm 1, the rate rising over a tenth of the steps and then falling linearly to 0. The
    model stays in evaluation mode: none of the families has dropout here, and RWKV's modes differ in nothing else.
    """
    model.requires_grad_(True)
    steps, warm, losses = how.steps, max(1, how.steps // 10), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, betas=(0.9, 0.98), weight_decay=how.decay)
    with fast_scan(model):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = how.rate * min((step + 1) / warm, (steps - step) / (steps - warm + 1))
            tokens, labels = batch(step)
            logits = model(input_ids=tokens, use_cache=False)["logits"]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def subject_of(model: Any, name: str, tokenizer: Any = None) -> Subject:
    """Return a model as a subject. Languages of bare ids take the toy tokenizer, of which nothing is then asked."""
    return Subject(model, toy_tokenizer() if tokenizer is None else tokenizer, name=name)


def labels_after(tokens: torch.Tensor) -> torch.Tensor:
    """Return what follows each token in its row, ``IGNORED`` after the last."""
    return torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), IGNORED)], dim=1)
