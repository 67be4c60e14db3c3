"""Surprisal: does the explanation make a language model expect the text? (arXiv 2410.13928, section 3.3.3, App. D.3).

info(x; z) = log p(x | z) − log p(x | z̃): what a description z saves a reader of the text x, in nats, against the fixed
description z̃ of nothing in particular. The score is the AUROC of info between firing and silent windows. As defined, p
is that of all tokens of x, the first included. (The released code leaves out the first token, leaves a loss of zero in
padded windows, and lets windows of later batches see those of earlier ones.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete.errors import ConfigError
from exegete.examples.render import plain_texts
from exegete.llm.client import run_closing
from exegete.llm.reader import Reader
from exegete.llm.reading_server import reading_request
from exegete.prompts import prompt_hash, turns
from exegete.scorers.controls import OTHER_LATENT, by_control, named_controls, needs_of, panel
from exegete.scorers.scorer import Scorer, Scoring
from exegete.scorers.valued import value_judgements, value_scores
from exegete.types import Array, Explanation, LatentId, LLMRequest, Windows
from exegete.views import LatentView, Need

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient

PROMPT: Final = "surprisal-1"
UNRELATED: Final = "Various unrelated sentences."
"""z̃ (App. D.3 of the paper)."""
_CHECKED: Final = 8
_HOLE: Final = "{explanation}"
Item = tuple[Explanation, LatentView]


def beginning(explanation: str, *, shown: bool = True) -> str:
    """Return the text after which a window is read: entries of other features and their texts, then this one.

    Without the other entries where ``shown`` is False. Spaces and line ends of the explanation become single spaces,
    since a line end is what ends it.
    """
    (_, head), *others = turns(PROMPT)
    parts = [text for _, text in others]
    blocks = [f"{asked}\n{answer}" for asked, answer in zip(parts[::2], parts[1::2], strict=False)] if shown else []
    return "\n\n".join([head, *blocks, parts[-1].replace(_HOLE, " ".join(explanation.split()))]) + "\n"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One explanation of a latent, and what it is held against."""

    explanation: Explanation
    others: list[tuple[str, Explanation]]

    @property
    def texts(self) -> list[str]:
        """What is to be read of it, its own text first."""
        return [str(e.text) for e in (self.explanation, *(e for _, e in self.others))]


def _windows(view: LatentView) -> Windows:
    """Return the test windows that are read: all, or some evenly spread ones of each class where that only checks."""
    windows = view.examples.part("test")
    if view.reader is None or view.reader.natural or not view.reader.final:
        return windows
    kept, probability = [], windows.probability.copy()
    for fires in (True, False):
        places = np.flatnonzero(windows.fires == fires)
        some = (
            places[np.unique(np.linspace(0, len(places) - 1, _CHECKED).round().astype(int))] if len(places) else places
        )
        probability[some] *= len(some) / max(1, len(places))
        kept.append(some)
    return replace(windows, probability=probability).take(np.sort(np.concatenate(kept)))


@final
class SurprisalScorer(Scorer):
    """Reads every test window under the explanation, under z̃, and under each control; judgements hold info in nats.

    Nothing is generated. A window that could not be read under the explanation or under z̃ has failed. z̃ is read once
    for all explanations of a latent and their controls. Where nothing could be read of an explanation (the prompt is
    longer than a small model reads), the latent is read once more without the entries of other features, z̃ too;
    ``entries`` of the detail says which it was.

    ``controls`` are the nulls read beside it; of the donors' explanations the nearest ``donors`` in firing rate. A
    model of this process that was not trained on natural language shows only that all this works, on 8 windows a class.
    """

    def __init__(self, *, controls: str | Sequence[str] = (OTHER_LATENT,), donors: int = 3) -> None:
        if donors < 0:
            raise ConfigError(f"donors is a number of other latents' explanations, at least 0, got {donors}")
        self._controls, self._donors = named_controls(controls), donors

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        return {"name": "surprisal", "args": {"controls": list(self._controls), "donors": self._donors}}

    @property
    def prompt_hash(self) -> str:
        """That of the text before the window."""
        return prompt_hash(PROMPT)

    @property
    def needs(self) -> frozenset[Need]:
        """Examples, what reads log probabilities, and donors for their null."""
        needed: set[Need] = {"examples", "reader"}
        return frozenset(needed | needs_of(self._controls, self._donors))

    def judged_by(self, llm: LLMClient | None) -> str:
        """The reader."""
        return "reader"

    def score(self, items: Sequence[Item], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, a latent's together; no scores where there is no explanation.

        Raises InputError for a view without a reader, LLMError when the reader cannot be used at all.
        """
        latents: dict[tuple[LatentId, int], list[Item]] = {}
        for explanation, view in items:
            if explanation.status != "ok":
                yield Scoring(explanation=explanation, scores=(), judgements={})
            else:
                latents.setdefault((view.latent, id(view.examples)), []).append((explanation, view))
        readers = [view.require_reader() for _, view in items]
        for scorings in run_closing(list(latents.values()), self._latent, concurrency, readers):
            yield from scorings

    def pairs(self, texts: Sequence[str], view: LatentView, *, shown: bool = True) -> list[tuple[str, str]]:
        """Return what is read of a latent: every test window after each of ``texts``, (beginning, continuation)."""
        windows = plain_texts(_windows(view).tokens, view.tokens)
        begun = [beginning(text, shown=shown) for text in texts]
        return [(before, window) for before in begun for window in windows]

    def planned(self, explanation: Explanation, view: LatentView) -> Sequence[LLMRequest]:
        """Return the requests that a server would be sent to read a latent with this explanation alone."""
        texts = [UNRELATED, *_Task(explanation=explanation, others=self._others(explanation, view)).texts]
        return [reading_request(before + window) for before, window in self.pairs(list(dict.fromkeys(texts)), view)]

    async def _latent(self, items: Sequence[Item]) -> list[Scoring]:
        view = items[0][1]
        tasks = [_Task(explanation=e, others=self._others(e, v)) for e, v in items]
        nats = await self._nats([text for task in tasks for text in task.texts], view)
        shown = [not np.isnan(self._info(nats, task.texts[0])).all() for task in tasks]
        bare = [text for task, kept in zip(tasks, shown, strict=True) if not kept for text in task.texts]
        again = await self._nats(bare, view, shown=False) if bare else {}
        return [
            self._scoring(view, task, nats if kept else again, shown=kept)
            for task, kept in zip(tasks, shown, strict=True)
        ]

    def _others(self, explanation: Explanation, view: LatentView) -> list[tuple[str, Explanation]]:
        found = panel(explanation, view, self._controls)
        donors = [pair for pair in found if pair[0] == OTHER_LATENT]
        return [*donors[: self._donors], *(pair for pair in found if pair[0] != OTHER_LATENT)]

    async def _nats(self, texts: Sequence[str], view: LatentView, *, shown: bool = True) -> dict[str, Array]:
        """Return log p of every test window, float64 [n], after each text and after z̃; NaN where it was not read."""
        reader: Reader = view.require_reader()
        unique = list(dict.fromkeys([UNRELATED, *texts]))
        read = await reader.logprobs(self.pairs(unique, view, shown=shown))
        values = np.array([np.nan if nats is None else nats for nats in read], np.float64)
        return dict(zip(unique, values.reshape(len(unique), -1), strict=True))

    @staticmethod
    def _info(nats: Mapping[str, Array], text: str) -> Array:
        info: Array = nats[text] - nats[UNRELATED]
        return info

    def _scoring(self, view: LatentView, task: _Task, nats: Mapping[str, Array], *, shown: bool) -> Scoring:
        windows = _windows(view)
        own, *rest = (self._info(nats, text) for text in task.texts)
        controls = by_control(self._controls, task.others, rest)
        judged = {
            name: tuple(j for v in values for j in value_judgements(windows, v)) for name, values in controls.items()
        }
        return Scoring(
            explanation=task.explanation,
            scores=value_scores(self.label, view, windows, own, controls),
            judgements={"none": value_judgements(windows, own), **judged},
            detail={"reader": view.require_reader().name, "entries": shown},
        )
