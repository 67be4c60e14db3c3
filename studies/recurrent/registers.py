"""E3 and E4: a language of two registers, steered in the residual stream, in the recurrent state, and in both.

A text is BOS, then rounds of a concept and its word. Every concept has a polite word and a rude one; a text keeps to
one register, which nothing tells before its first word. So after BOS and a concept an unsteered model says the polite
word half of the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from studies.recurrent.models import RECURRENT, Batch, Training, labels_after, new_model, subject_of, train

from exegete.steering import Contrast, Question, SteeringVector, Sweep, fit_vector, sweep
from exegete.streams import stream
from exegete.subjects import Subject
from exegete.subjects.edits import AddVector
from exegete.subjects.recurrent_state import AddState
from exegete.subjects.running import Running
from exegete.subjects.sites import site_point

CONCEPTS, ROUNDS = 16, 6
FOR_VECTORS, FOR_TESTS = 12, 8
HISTORIES: Final = 60
VOCABULARY: Final = 1 + 3 * CONCEPTS
CONTRASTS: Final = ("answer", "history", "history, state read late")
_PARTS: Final = ((1, 1 + CONCEPTS), (1 + CONCEPTS, VOCABULARY))
"""Which tokens are concepts, and which are words."""
Tokens = tuple[int, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """Which concepts vectors are made of and which are asked about; four are in both."""

    vectors: tuple[int, ...]
    tests: tuple[int, ...]

    @classmethod
    def drawn(cls, seed: int) -> Language:
        """Return the concepts of a seed."""
        order = stream(seed, "studies", "concepts").permutation(CONCEPTS).tolist()
        return cls(vectors=tuple(order[:FOR_VECTORS]), tests=tuple(order[-FOR_TESTS:]))

    def questions(self) -> list[Question]:
        """Return each test concept after BOS, with its polite word as what is wanted."""
        return [Question(prompt=(0, concept(c)), match=(word(c, 0),), other=(word(c, 1),)) for c in self.tests]

    def answers(self) -> list[Contrast]:
        """Return pairs that end in the polite and in the rude word of one concept."""
        return [_pair((0, concept(c)), (c,), ()) for c in self.vectors]

    def histories(self, seed: int, *, asked: bool) -> list[Contrast]:
        """Return pairs of two rounds in one register and, where ``asked``, a third concept behind them."""
        draw = stream(seed, "studies", "histories")
        found = []
        for _ in range(HISTORIES):
            first, second, third = draw.choice(self.vectors, 3, replace=False).tolist()
            found.append(_pair((0, concept(first)), (first, second), (concept(third),) if asked else ()))
        return found


def concept(c: int) -> int:
    """Return the token of a concept."""
    return 1 + c


def word(c: int, register: int) -> int:
    """Return a concept's word: the polite one (0) or the rude one (1)."""
    return 1 + CONCEPTS * (1 + register) + c


def _pair(begin: Tokens, concepts: Sequence[int], end: Tokens) -> Contrast:
    def text(register: int) -> Tokens:
        middle: list[int] = [word(concepts[0], register)]
        for c in concepts[1:]:
            middle += [concept(c), word(c, register)]
        return (*begin, *middle, *end)

    return Contrast(positive=text(0), negative=text(1), shared=len(begin))


def texts(seed: int, rows: int = 64) -> Any:
    """Return batches of texts of the language."""

    def batch(step: int) -> Batch:
        draw = stream(seed, "studies", "registers", step)
        concepts, register = draw.integers(CONCEPTS, size=(rows, ROUNDS)), draw.integers(2, size=(rows, 1))
        tokens = np.zeros((rows, 1 + 2 * ROUNDS), np.int64)
        tokens[:, 1::2] = 1 + concepts
        tokens[:, 2::2] = 1 + CONCEPTS * (1 + register) + concepts
        found = torch.from_numpy(tokens)
        return found, labels_after(found)

    return batch


def register_study(family: str, seed: int, *, training: Training, controls: int) -> dict[str, Any]:
    """Train on the language, make vectors of contrasts, and sweep them beside random ones as long."""
    model = new_model(family, VOCABULARY, seed=seed)
    loss = train(model, texts(seed), training)
    subject, language = subject_of(model, f"registers-{family}"), Language.drawn(seed)
    swept, lost = {}, {}
    vectors = dict(_vectors(subject, language, seed))
    for name, vector in vectors.items():
        found = sweep(
            subject,
            vector,
            language.questions(),
            behaviour=name,
            per_component=True,
            controls=controls,
            control_sites="all",
            seed=seed,
        )
        swept[name] = list(_plain(found))
        lost[name] = _lost(subject, vector, language)
    untouched = _untouched(subject, vectors["answer"], language)
    return {"loss": loss, "least": least(), "swept": swept, "lost": lost, "untouched": untouched}


def least() -> float:
    """Return the loss of a model that knows the language, nats per token: concepts, and a register once."""
    return float((ROUNDS * np.log(CONCEPTS) + np.log(2)) / (2 * ROUNDS))


def _vectors(subject: Subject, language: Language, seed: int) -> Iterator[tuple[str, SteeringVector]]:
    """Yield the vectors: of answers, of histories, and of histories with the state read after the question as well.

    A state is edited before the question is read, so a history's is taken there; the residual stream is edited at the
    question, so it is read there.
    """
    state = subject.recurrent
    sites = range(-1, 4)
    yield "answer", fit_vector(subject, language.answers(), sites=tuple(sites), state=state).vector
    asked = fit_vector(subject, language.histories(seed, asked=True), sites=tuple(sites), state=state).vector
    if not state:
        yield "history", asked
        return
    before = fit_vector(subject, language.histories(seed, asked=False), sites=(), state=state).vector
    yield "history", dataclasses.replace(asked, state=before.state)
    yield "history, state read late", asked


def _plain(found: Sweep) -> Iterator[dict[str, Any]]:
    for curve in found.curves:
        match, nonsense = found.values[curve.behaviour, curve.site, curve.mode, curve.components]
        yield {
            "mode": curve.mode,
            "components": curve.components,
            "site": curve.site,
            "multipliers": list(found.multipliers),
            "match": match.mean(axis=1).tolist(),
            "nonsense": nonsense.mean(axis=1).tolist(),
            "effect": curve.effect.value,
            "spearman": curve.spearman.value,
            "random_mean": curve.random_mean,
            "random_most": curve.random_most,
        }


def _lost(subject: Subject, vector: SteeringVector, language: Language) -> list[dict[str, Any]]:
    """Return what concepts and the words of other concepts get, at each site, of multipliers −1 and 1."""
    prompts = torch.tensor([question.prompt for question in language.questions()])
    running, found = Running.start(subject, prompts[:, :-1]), []
    for site, direction in vector.residual.items():
        for multiplier in (-1.0, 1.0):
            edit = AddVector(target=site_point(subject, site), vector=multiplier * direction)
            p = running.copy().feed(prompts[:, -1:], edits=[edit])[:, -1].softmax(dim=-1)
            own = sum(p[range(len(p)), [word(c, register) for c in language.tests]].mean() for register in (0, 1))
            concepts, words = (float(p[:, first:end].sum(dim=1).mean()) for first, end in _PARTS)
            found.append({"site": site, "multiplier": multiplier, "concepts": concepts, "words": words - float(own)})
    return found


def _untouched(subject: Subject, vector: SteeringVector, language: Language) -> bool | None:
    """Return whether an edited copy of a pass leaves the pass itself as it was, bit for bit; None without a state."""
    if subject.model.config.model_type not in RECURRENT:
        return None
    prompts = torch.tensor([question.prompt for question in language.questions()])
    running = Running.start(subject, prompts[:, :-1])
    before = running.copy().feed(prompts[:, -1:])
    steered = running.copy()
    steered.edit(AddState(vector.state, 3.0))
    changed = steered.feed(prompts[:, -1:])
    after = running.feed(prompts[:, -1:])
    return bool(torch.equal(before, after)) and not bool(torch.equal(before, changed))
