"""What a subject says after prompts, as it is and edited: the next token, or a sampled continuation.

All but the last token of every prompt is read once, unedited, and kept; whatever is asked then runs the last token
alone, on a copy of what was kept. An edit therefore acts from the last prompt token on. Where single steps of a family
do not give what a whole pass gives (``verdicts.py``), every question is a whole pass.

Prompts are batched by their exact length and never padded: a recurrent state has no notion of padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch

from exegete.errors import InputError
from exegete.subjects.edits import Edit
from exegete.subjects.running import Running
from exegete.subjects.subject import Subject
from exegete.subjects.verdicts import verdict

Editing = Callable[[torch.Tensor], Edit]
"""Makes an edit of the strength of every row [rows]."""
Noise = Callable[[int], torch.Tensor]
"""Gumbel noise [prompts, vocabulary] of each step: the same under every edit (common random numbers)."""
ROWS_AT_ONCE = 256


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Prompts of one length: their places among all, all that was read of them, and the ``last`` tokens [n, 1]."""

    places: torch.Tensor
    read: Running
    last: torch.Tensor


@final
class Prompts:
    """Prompts of a subject, their clean beginnings read once.

    Args:
        subject: The model.
        prompts: Token ids of each, at least one token; BOS where the model should see one.
        cached: Whether beginnings are kept; False makes every question a whole pass, None goes by the verdict.

    Raises:
        InputError: For no prompts, or an empty one.
    """

    def __init__(self, subject: Subject, prompts: Sequence[Sequence[int]], *, cached: bool | None = None) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InputError("give at least one prompt, each of at least one token")
        self._n = len(prompts)
        self.cached = verdict(subject).exact if cached is None else cached
        self._batches: list[_Batch] = []
        for length in sorted({len(prompt) for prompt in prompts}):
            places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            tokens = torch.tensor([[int(t) for t in prompts[i]] for i in places], device=subject.device)
            read = Running.begin(subject, len(places), whole=not self.cached)
            if length > 1:
                read.feed(tokens[:, :-1], last=True)
            self._batches.append(_Batch(places=torch.tensor(places), read=read, last=tokens[:, -1:]))

    def __len__(self) -> int:
        return self._n

    @torch.no_grad()
    def log_probabilities(self, editing: Editing | None = None, strengths: Sequence[float] = (0.0,)) -> torch.Tensor:
        """Return log p of the next token after every prompt at each strength [strengths, prompts, vocabulary].

        Float32, on the subject's device. Without ``editing`` it is the clean model, whatever the strengths.
        """
        found: torch.Tensor | None = None
        for batch, which, rows in self._parts(len(strengths)):
            edits = () if editing is None else (editing(torch.tensor(strengths)[which]),)
            running = batch.read.copy(rows)
            logits = running.feed(batch.last[rows.to(batch.last.device)], edits=edits, last=True)[:, 0]
            if found is None:
                found = logits.new_empty((len(strengths), self._n, logits.shape[-1]))
            found[which, batch.places[rows]] = logits.log_softmax(dim=-1)
        assert found is not None  # there is at least one prompt
        return found

    @torch.no_grad()
    def continuations(
        self, noise: Noise, steps: int, editing: Editing | None = None, strengths: Sequence[float] = (0.0,)
    ) -> torch.Tensor:
        """Return sampled continuations at temperature 1 [strengths, prompts, steps] int64.

        Tokens are drawn by the Gumbel-max trick: the one with the greatest log p + noise, so that two strengths under
        the same noise differ no more than their distributions do. The edit acts on the last prompt token and on every
        token after it.
        """
        found = torch.zeros((len(strengths), self._n, steps), dtype=torch.long)
        for batch, which, rows in self._parts(len(strengths)):
            edits = () if editing is None else (editing(torch.tensor(strengths)[which]),)
            running, places = batch.read.copy(rows), batch.places[rows]
            tokens = batch.last[rows.to(batch.last.device)]
            for step in range(steps):
                logits = running.feed(tokens, edits=edits, last=True)[:, 0]
                tokens = (logits + noise(step).to(logits)[places.to(logits.device)]).argmax(dim=-1, keepdim=True)
                found[which, places, step] = tokens[:, 0].cpu()
        return found

    def _parts(self, n: int) -> Iterator[tuple[_Batch, torch.Tensor, torch.Tensor]]:
        """Yield batches with the strengths and rows [m] to run at once: every pair, in parts that bound memory."""
        for batch in self._batches:
            pairs = torch.cartesian_prod(torch.arange(n), torch.arange(len(batch.last))).reshape(-1, 2)
            for part in torch.split(pairs, ROWS_AT_ONCE):
                yield batch, part[:, 0], part[:, 1]
