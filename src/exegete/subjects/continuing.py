"""What a subject says after prompts, as it is and edited: the next token, or a sampled continuation.

All but the last token of every prompt is read once, unedited, and kept in the model's own cache; whatever is asked then
runs the last token alone, on a copy of that cache. An edit therefore acts from the last prompt token on. Where a
family's cache does not give what a whole pass gives, every question is a whole pass: RWKV, whose single steps mix up
the rows of a batch, RecurrentGemma, which keeps its state in its modules, and any other that a first trial finds.

Prompts are batched by their exact length and never padded: a recurrent state has no notion of padding.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from exegete.errors import InputError
from exegete.subjects.edits import Edit, edited
from exegete.subjects.subject import Subject

Editing = Callable[[torch.Tensor], Edit]
"""Makes an edit of the strength of every row [rows]."""
Noise = Callable[[int], torch.Tensor]
"""Gumbel noise [prompts, vocabulary] of each step: the same under every edit (common random numbers)."""
ROWS_AT_ONCE = 256
_CACHES = ("past_key_values", "cache_params")
_EXACT, _HALF = 1e-4, 0.05  # of the largest logit, in float32 and below
_VERDICTS: weakref.WeakKeyDictionary[Subject, bool] = weakref.WeakKeyDictionary()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Prompts of one length: ``tokens`` [n, length], their places among all, and what was read of them (or None)."""

    tokens: torch.Tensor
    places: torch.Tensor
    cache: Any | None


@final
class Prompts:
    """Prompts of a subject, their clean beginnings read once.

    Args:
        subject: The model.
        prompts: Token ids of each, at least one token; BOS where the model should see one.
        cached: Whether beginnings are kept; False makes every question a whole pass, None tries the model out.

    Raises:
        InputError: For no prompts, or an empty one.
    """

    def __init__(self, subject: Subject, prompts: Sequence[Sequence[int]], *, cached: bool | None = None) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InputError("give at least one prompt, each of at least one token")
        self._subject, self._n = subject, len(prompts)
        self.cached = steps_exactly(subject) if cached is None else cached
        self._batches: list[_Batch] = []
        for length in sorted({len(prompt) for prompt in prompts}):
            places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            tokens = torch.tensor([[int(t) for t in prompts[i]] for i in places], device=subject.device)
            cache = _beginning(subject, tokens[:, :-1]) if self.cached and length > 1 else None
            self._batches.append(_Batch(tokens=tokens, places=torch.tensor(places), cache=cache))

    def __len__(self) -> int:
        return self._n

    @torch.no_grad()
    def log_probabilities(self, editing: Editing | None = None, strengths: Sequence[float] = (0.0,)) -> torch.Tensor:
        """Return log p of the next token after every prompt at each strength [strengths, prompts, vocabulary].

        Float32, on the subject's device. Without ``editing`` it is the clean model, whatever the strengths.
        """
        found: torch.Tensor | None = None
        for batch, which, rows in self._parts(len(strengths)):
            state = _State(self._subject, batch, rows, cached=self.cached)
            with self._edited(editing, torch.tensor(strengths)[which], state):
                logits = state.next()
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
            state = _State(self._subject, batch, rows, cached=self.cached)
            places = batch.places[rows]
            with self._edited(editing, torch.tensor(strengths)[which], state):
                for step in range(steps):
                    logits = state.next()
                    tokens = (logits + noise(step).to(logits)[places.to(logits.device)]).argmax(dim=-1)
                    found[which, places, step] = tokens.cpu()
                    state.append(tokens)
        return found

    def _parts(self, n: int) -> Iterator[tuple[_Batch, torch.Tensor, torch.Tensor]]:
        """Yield batches with the strengths and rows [m] to run at once: every pair, in parts that bound memory."""
        for batch in self._batches:
            pairs = torch.cartesian_prod(torch.arange(n), torch.arange(len(batch.tokens))).reshape(-1, 2)
            for part in torch.split(pairs, ROWS_AT_ONCE):
                yield batch, part[:, 0], part[:, 1]

    def _edited(
        self, editing: Editing | None, strengths: torch.Tensor, state: _State
    ) -> contextlib.AbstractContextManager[None]:
        if editing is None:
            return contextlib.nullcontext()
        return edited(self._subject, [editing(strengths)], state.where)


@final
class _State:
    """Some rows of a batch on their way: the tokens that the next pass reads, and what was read before."""

    def __init__(self, subject: Subject, batch: _Batch, rows: torch.Tensor, *, cached: bool) -> None:
        self._model = subject.model
        tokens = batch.tokens[rows.to(batch.tokens.device)]
        self._cached = cached
        self._cache = None if batch.cache is None else copied(batch.cache, rows.to(tokens.device))
        self._tokens = tokens[:, -1:] if cached else tokens
        self.where = slice(None) if cached else slice(tokens.shape[1] - 1, None)

    def next(self) -> torch.Tensor:
        """Return the logits of the next token [rows, vocabulary], float32."""
        output = _run(self._model, self._tokens, self._cache, keep=self._cached)
        if self._cached:
            self._cache = _cache_of(output)
        logits: torch.Tensor = output["logits"][:, -1]
        return logits.float()

    def append(self, tokens: torch.Tensor) -> None:
        """Take in the tokens [rows] that came next."""
        self._tokens = tokens[:, None] if self._cached else torch.cat([self._tokens, tokens[:, None]], dim=1)


def copied(cache: Any, rows: torch.Tensor) -> Any:
    """Return a copy of a model's cache that holds the given rows of it, in this order; the cache stays as it is."""
    chosen = copy.deepcopy(cache)
    chosen.reorder_cache(rows)
    return chosen


def steps_exactly(subject: Subject) -> bool:
    """Tell whether steps of one token on a copied cache give the logits of whole passes.

    Tried out once for each subject: a few rows, some of them twice, an edit of nothing but the order.
    """
    if subject not in _VERDICTS:
        _VERDICTS[subject] = _tried(subject)
    return _VERDICTS[subject]


@torch.no_grad()
def _tried(subject: Subject) -> bool:
    vocabulary = int(subject.model.get_input_embeddings().weight.shape[0])
    tokens = ((torch.arange(24).reshape(3, 8) * 37 + 11) % vocabulary).to(subject.device)
    rows = torch.tensor([1, 0, 1, 2], device=subject.device)
    try:
        cache = _beginning(subject, tokens[:, :5])
        found = []
        for _ in range(2):  # the second time shows whether the first changed what it began from
            running = copied(cache, rows)
            for at in range(5, 8):
                output = _run(subject.model, tokens[rows, at : at + 1], running, keep=True)
                running = _cache_of(output)
            found.append(output["logits"][:, -1].float())
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError):
        return False  # a cache of a kind of its own
    whole = _run(subject.model, tokens, None, keep=False)["logits"][rows, -1].float()
    bound = (_EXACT if subject.dtype == torch.float32 else _HALF) * float(whole.abs().max())
    return all(bool(((logits - whole).abs() <= bound).all()) for logits in found)


@torch.no_grad()
def _beginning(subject: Subject, tokens: torch.Tensor) -> Any:
    """Return the cache after tokens [rows, length], read without the head."""
    return _cache_of(_run(subject.model.base_model, tokens, None, keep=True))


def _run(model: Any, tokens: torch.Tensor, cache: Any | None, *, keep: bool) -> Mapping[str, Any]:
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": keep, "logits_to_keep": 1}
    if cache is not None:
        options[next(name for name in _CACHES if name in known)] = cache
    output: Mapping[str, Any] = model(input_ids=tokens, **{n: v for n, v in options.items() if n in known})
    return output


def _cache_of(output: Mapping[str, Any]) -> Any:
    """Return the cache in a model's output. Raises KeyError where it holds none that is known."""
    for name in _CACHES:
        if output.get(name) is not None:
            return output[name]
    raise KeyError("cache")
