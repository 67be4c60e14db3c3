"""Text as a site would write it: every next token is drawn from what a lens predicts there."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from exegete.errors import InputError
from exegete.lens.reading import require_room
from exegete.lens.states import StateReader, state_numbers
from exegete.streams import stream
from exegete.subjects.running import Running
from exegete.subjects.sites import residuals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exegete.lens.lens import Lens
    from exegete.subjects.recurrent_state import State


def generate_from_site(
    lens: Lens,
    site: int,
    tokens: Sequence[int],
    *,
    n: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Return up to ``n`` tokens that follow ``tokens`` where each is what the lens of a site predicts.

    What was generated is read again for every token, up to the site and no further, which is exact in every family; the
    time grows with the square of the length. The state that a state-aware lens reads is carried on.

    Args:
        lens: Any lens.
        site: Where; the last block's output gives what the model itself writes.
        tokens: Ids of the prompt, at least one.
        n: Most tokens.
        temperature: 0 takes the likeliest token.
        seed: Of the draws.
        stop: A token that ends the text, and is not part of what is returned.

    Raises:
        InputError: For an empty prompt, a text longer than the model reads, or a temperature below 0.
        NotFoundError: For a site that the lens does not have.
    """
    if not len(tokens):
        raise InputError("the prompt holds no token; give some text")
    if n < 1 or not 0.0 <= temperature < float("inf"):
        raise InputError(f"n is at least 1 and the temperature at least 0, got {n} and {temperature}")
    require_room(lens.subject, len(tokens) + n - 1)  # the last token written is not read
    draws = stream(seed, "lens generate", site)
    row = _Row(lens, site)
    made: list[int] = []
    with torch.no_grad():
        while len(made) < n:
            logits = row.logits([*tokens, *made]).double()
            if temperature:
                p = (logits / temperature).softmax(dim=-1).cpu().numpy()
                token = int(draws.choice(len(p), p=p / p.sum()))
            else:
                token = int(logits.argmax())
            if token == stop:
                break
            made.append(token)
    return made


@final
class _Row:
    """One text read at a site."""

    def __init__(self, lens: Lens, site: int) -> None:
        self._lens, self._site = lens, site
        self._running: Running | None = None
        if lens.reads_state(site):
            StateReader(lens.subject, (site,))  # refuses a subject that cannot be run on from its state

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return what the lens predicts after the last of the tokens, [V]; they begin with those of the call before."""
        tokens = torch.tensor([list(ids)])
        h = residuals(self._lens.subject, tokens, (self._site,))[self._site][:, -1]
        state = state_numbers(self._state(tokens), self._site) if self._lens.reads_state(self._site) else None
        return self._lens.logits(self._site, h, state)[0]

    def _state(self, tokens: torch.Tensor) -> State:
        """Return the state after the last of the tokens; what was read before goes on from where it is."""
        if self._running is None:
            self._running = Running.start(self._lens.subject, tokens)
        else:
            self._running.feed(tokens[:, self._running.tokens.shape[1] :])
        return self._running.state((self._site,))
