"""A subject in which planted latents do something: intervention on it, and generated texts run through it.

The subject has no attention and no layers that compute: what it says next depends on its last token alone, so that the
effect of an edit can be computed without running it. Every planted latent writes the direction that makes the tokens of
its program likelier, and reads the one on which these tokens lie.
"""

from __future__ import annotations

import math
import tempfile
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete.llm.scripted import Evidence, SimulatedJudge
from exegete.scorers.generation import GenerationScorer
from exegete.scorers.intervention import InterventionScorer
from exegete.scorers.intervention_measuring import token_set
from exegete.scorers.intervention_prompts import draw_prompts
from exegete.testing.instruments import Instrument, Known, Scores, scored
from exegete.testing.settings import Round, Setting
from exegete.testing.worlds import World
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.subjects import Subject

HOOKPOINT: Final = "layers.0"
TARGET: Final = 1.0
PROMPTS: Final = 30
TEXTS: Final = 30
"""Texts that the judge writes to fit an explanation, and as many not to."""
THRESHOLD: Final = 0.6
"""What a latent has to read of a token to fire on it; the tokens of its program give about 1, others about 0."""
_D: Final = 256
_SHARP: Final = 3.0  # length of the rows that logits are read with
_STRENGTHS: Final = np.linspace(0.0, 2.0, 401)
_EPSILON: Final = 1e-6
_ALL: Final = 1 << 30


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
        x = self.embedding[last] + strength * self.directions[latent]
        x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + _EPSILON)
        logits = x @ self.readout.T
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


class OnSubject(Instrument, ABC):
    """An instrument that runs the acting subject, made once for a world."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self._made: tuple[World, Acting] | None = None

    @property
    def every(self) -> int:
        """One latent of four, since passes of a subject take long."""
        return 4

    def acting(self, world: World) -> Acting:
        """Return the subject of a world."""
        if self._made is None or self._made[0] is not world:
            self._made = world, make_acting(world)
        return self._made[1]


@final
class Intervening(OnSubject):
    """Intervention without a language model: the probability that an explanation's tokens gain at a KL of 1."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self._scorer = InterventionScorer(
            kind="tokens", targets=[TARGET], headline=TARGET, n_score=PROMPTS, controls="none"
        )

    @property
    def name(self) -> str:
        """The scorer's label."""
        return self._scorer.label

    @property
    def headline(self) -> str:
        """The probability gained at the one target."""
        return f"mass_kl_{TARGET:g}"

    @property
    def damaged(self) -> bool:
        """What is damaged is no rule, and names no tokens."""
        return False

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the gain over all prompts that could be drawn, at the strength that has the target there."""
        acting = self.acting(setting.round.world)
        view = replace(setting.view(), subject=acting.subject, coder=acting.coder)
        bos = acting.subject.bos
        every = draw_prompts(view, "test", _ALL, context=64, bos=bos)
        last, counts = np.unique([prompt.tokens[-1] for prompt in every], return_counts=True)
        sets = [list(token_set(setting.explanation(rung))) for rung in rungs]
        clean = acting.next_tokens(last, setting.latent, 0.0)
        divergence, gained = [], []
        for strength in _STRENGTHS.tolist():
            edited = acting.next_tokens(last, setting.latent, strength)
            divergence.append((clean * np.log(clean / edited)).sum(axis=1))
            gained.append([(edited - clean)[:, tokens].sum(axis=1) for tokens in sets])
        kl, mass = np.array(divergence), np.array(gained)  # [strengths, tokens], [strengths, rungs, tokens]
        n = min(PROMPTS, int(counts.sum()))
        taken = rng.multivariate_hypergeometric(counts, n, size=draws) / n
        shares = np.vstack([counts / counts.sum(), taken])
        found = np.array([_at_target(kl @ share, mass @ share) for share in shares])
        return Known(expected=found[0], drawn=found[1:])

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer on the acting subject."""
        acting = self.acting(made.world)
        items = [
            (s.explanation(rung), replace(s.view(), subject=acting.subject, coder=acting.coder))
            for s in made.settings
            for rung in rungs
        ]
        return scored(self._scorer, items)


@final
class Generating(OnSubject):
    """Generation: the share of texts, written by a simulated judge to fit an explanation, that fire the latent."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self._scorer = GenerationScorer(fitting=TEXTS, other=TEXTS, controls="none")

    @property
    def name(self) -> str:
        """``generation``."""
        return self._scorer.label

    @property
    def headline(self) -> str:
        """The share that fires."""
        return "share_firing"

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the chance that a text of the judge's fires the latent, and shares of as many as it writes."""
        acting, frame = self.acting(setting.round.world), setting.round.frame
        texts = list(frame.places)
        fires = acting.fires[setting.latent]
        encoded = acting.subject.tokenizer(texts, add_special_tokens=False)["input_ids"]
        fired = np.array([bool(fires[ids].any()) for ids in encoded])
        at = [frame.places[text] for text in texts]
        chances = []
        for rung in rungs:
            fits = setting.claim(rung).anywhere[at]
            right = self.evidence.true_positive_rate
            chances.append(right * fired[fits].mean() + (1 - right) * fired[~fits].mean() if fits.any() else np.nan)
        expected = np.array(chances)
        drawn = rng.binomial(TEXTS, np.nan_to_num(expected), size=(draws, len(rungs))) / TEXTS
        return Known(expected=expected, drawn=drawn)

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer with a simulated judge on the acting subject."""
        acting = self.acting(made.world)
        judge = SimulatedJudge(
            true_positive_rate=self.evidence.true_positive_rate,
            false_positive_rate=self.evidence.false_positive_rate,
            seed=seed,
            predicates=made.predicates(rungs),
            windows={text: made.frame.tokens[place] for text, place in made.frame.places.items()},
        )
        items = [
            (s.explanation(rung), replace(s.view(), llm=judge, subject=acting.subject, coder=acting.coder))
            for s in made.settings
            for rung in rungs
        ]
        return scored(self._scorer, items)


def _at_target(kl: Array, mass: Array) -> Array:
    """Return each rung's gain at the target, from KLs [strengths] and gains [strengths, rungs] by strength."""
    strength = np.interp(TARGET, kl, _STRENGTHS)
    return np.array([np.interp(strength, _STRENGTHS, gained) for gained in mass.T])
