"""A subject in which planted latents do something: intervention on it, and generated texts run through it.

The subject has no attention and no layers that compute: what it says next depends on its last token alone, so that the
effect of an edit can be computed without running it. Every planted latent writes the direction that makes the tokens of
its program likelier, and reads the one on which these tokens lie.
"""

from __future__ import annotations

import math
import tempfile
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete.llm.scripted import Evidence
from exegete.scorers.intervention_measuring import token_set
from exegete.testing.instruments import Instrument
from exegete.testing.worlds import World
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.subjects import Subject

HOOKPOINT: Final = "layers.0"
THRESHOLD: Final = 0.6
"""What a latent has to read of a token to fire on it; the tokens of its program give about 1, others about 0."""
_D: Final = 256
_SHARP: Final = 3.0  # length of the rows that logits are read with
_EPSILON: Final = 1e-6


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Acting:
    """The subject and its coder, and their parts: embeddings and read-out [ids, d], directions [latents, d].

    ``fires`` [latents, ids] says on which tokens each latent fires, wherever they stand.
    """

    subject: Subject
    coder: SparseCoder
    embedding: Array
    readout: Array
    directions: Array
    fires: Array

    def next_tokens(self, last: Array, latent: int, strength: float) -> Array:
        """Return the probabilities after each of these last tokens [n, ids], the latent written so strongly."""
        return _softmax(self.embedding[last] + strength * self.directions[latent], self.readout)

    def transitions(self, latent: int, strength: float) -> Array:
        """Return the same after every token [ids, ids], in single precision."""
        x = self.embedding + strength * self.directions[latent]
        return _softmax(x.astype(np.float32), self.readout.astype(np.float32))


def _softmax(x: Array, readout: Array) -> Array:
    """Return the probabilities that are read out of residuals [n, d], normed as the subject does."""
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + x.dtype.type(_EPSILON))
    logits = x @ readout.T
    masses = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Array = masses / masses.sum(axis=1, keepdims=True)
    return found


def make_acting(world: World, *, seed: int = 0) -> Acting:
    """Return a subject in which each latent of a world makes the tokens of its program likelier."""
    import torch

    from exegete.coders.activations import JumpReLU
    from exegete.coders.linear import LinearCoder
    from exegete.demo import assets
    from exegete.subjects import load_subject

    rng = np.random.default_rng(seed)
    n = len(world.table)
    embedding = rng.standard_normal((n, _D))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    readout = _SHARP * rng.standard_normal((n, _D)) / math.sqrt(_D)
    sets = [token_set(world.explanation(latent.index, "exact", world.seed)) for latent in world.latents]
    rows = np.array([readout[list(tokens)].mean(axis=0) for tokens in sets])
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory(prefix="exegete-acting-") as folder:
        _write(Path(folder), assets() / "model", embedding, readout)
        subject = load_subject(folder, device="cpu", dtype="float32")
    readers = np.array([embedding[list(tokens)].sum(axis=0) for tokens in sets])
    coder = LinearCoder(
        name=world.store.name,
        hookpoint=HOOKPOINT,
        encoder=torch.from_numpy(readers).float(),
        encoder_bias=torch.zeros(len(sets)),
        decoder=torch.from_numpy(directions).float(),
        decoder_bias=torch.zeros(_D),
        activation=JumpReLU(torch.full((len(sets),), THRESHOLD)),
    )
    return Acting(
        subject=subject,
        coder=coder,
        embedding=embedding.astype(np.float32).astype(np.float64),
        readout=readout.astype(np.float32).astype(np.float64),
        directions=directions,
        fires=readers @ embedding.T > THRESHOLD,
    )


def _write(folder: Path, tokenizer: Path, embedding: Array, readout: Array) -> None:
    """Write a Llama of one layer that adds nothing, with this embedding and read-out."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    from exegete.testing.models import toy_model

    kept: Any = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(embedding),
        hidden_size=_D,
        intermediate_size=_D,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=_EPSILON,
        tie_word_embeddings=False,
        bos_token_id=kept.bos_token_id,
        eos_token_id=kept.eos_token_id,
    )
    model = toy_model(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.from_numpy(embedding).float())
        model.lm_head.weight.copy_(torch.from_numpy(readout).float())
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    kept.save_pretrained(folder)


@final
class Stage:
    """The subject that instruments act on, made once for a world, and what they compute of it."""

    def __init__(self) -> None:
        self._made: tuple[World, Acting] | None = None
        self._kept: dict[tuple[object, ...], Any] = {}

    def acting(self, world: World) -> Acting:
        """Return the subject of a world; what was kept of another is forgotten."""
        if self._made is None or self._made[0] is not world:
            self._made = world, make_acting(world)
            self._kept.clear()
        return self._made[1]

    def kept(self, name: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Return what was made under this name of the world's subject, else make it."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


class OnSubject(Instrument, ABC):
    """An instrument that runs the acting subject."""

    def __init__(self, evidence: Evidence, stage: Stage) -> None:
        super().__init__(evidence)
        self.stage = stage

    def acting(self, world: World) -> Acting:
        """Return the subject of a world."""
        return self.stage.acting(world)
