"""The ledger of a run: what every request cost, and a budget that is never exceeded.

Before a request is sent its worst case is reserved: as many prompt tokens as it can possibly have, and ``max_tokens``
of reply. The reply settles it at what the server counted. What nobody knows (a lost reply, a killed process) stays
counted at its worst case, so the ledger never shows less than the bill.

Money is counted in whole picodollars (10⁻¹² of a dollar), so that sums are exact. The database's log is not flushed at
every commit: a killed process loses nothing, a power cut may lose the last moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sqlite3
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from exegete.codec import to_json
from exegete.errors import BudgetError, BusyError, InputError
from exegete.files import canonical_json
from exegete.llm.backend import DIRECT
from exegete.llm.database import Aside, Layout, is_busy, open_database, read_database, transaction
from exegete.llm.prices import Price
from exegete.types import LLMReply, LLMRequest

LAYOUT = Layout(
    kind="ledger",
    application=0x4558454C,  # "EXEL"
    version=1,
    statements=(
        "CREATE TABLE accounts (id INTEGER PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL, "
        "UNIQUE (stage, model))",
        # Of an open or lost call the worst case; picodollars is NULL where no price is known.
        "CREATE TABLE calls (id INTEGER PRIMARY KEY, account INTEGER NOT NULL, outcome TEXT NOT NULL, "
        "requests INTEGER NOT NULL, prompt INTEGER NOT NULL, cached INTEGER NOT NULL, completion INTEGER NOT NULL, "
        "picodollars INTEGER)",
        # One row: the sums over all calls but kept replies.
        "CREATE TABLE spent (tokens INTEGER NOT NULL, picodollars INTEGER NOT NULL)",
    ),
    page=1024,  # every request writes two pages twice, and its rows are short
)

MESSAGE_TOKENS = 16
"""Most tokens that a chat template puts around one message, beside its role."""
REQUEST_TOKENS = 256
"""Most tokens that a chat template puts around a whole conversation: its start, the reply's opening, a system text of
its own with today's date."""

_PICO = 10**12
_MEMORY = ":memory:"
_WRITE_BACK = 4096  # requests between two times that the log is written back
_NO_BUDGET = 2**62  # tokens or picodollars: the largest that the database counts
_MOST_TOKENS, _MOST_DOLLARS = 10**7, 1e4  # of one request, whatever a server says
_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What the requests of one stage and model with one outcome used and cost.

    ``outcome`` is ``stop``, ``length``, ``refused`` or ``error`` as the reply says, ``lost`` (no reply came back, or
    the process was killed: counted at its worst case), ``open`` (under way, likewise) or ``cached`` (kept from before:
    tokens that were not paid again). ``dollars`` is the sum over the requests whose price is known, ``unpriced`` the
    number of those whose price is not.
    """

    stage: str
    model: str
    outcome: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    dollars: float
    unpriced: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Worst:
    """The worst case of one request: tokens, how many of them were learnt to be needed, its rates and picodollars."""

    prompt: int
    completion: int
    more_prompt: int
    more_completion: int
    rates: tuple[int, int, int] | None
    picodollars: int | None

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion


@final
@dataclass(eq=False, slots=True)
class _Ticket:
    """A place in the queue of requests that wait for budget."""

    woken: asyncio.Future[None] | None = field(default=None)

    def wake(self) -> None:
        if self.woken is not None and not self.woken.done():
            self.woken.set_result(None)


def most_prompt_tokens(request: LLMRequest) -> int:
    """Return a number of prompt tokens that no tokenizer exceeds.

    A token stands for at least one byte of UTF-8, so the bytes of all texts, roles and the schema bound their tokens;
    chat templates add at most MESSAGE_TOKENS a message and REQUEST_TOKENS a request.
    """
    texts = [text for message in request.messages for text in message.values()]
    total = sum(map(_n_bytes, texts)) + MESSAGE_TOKENS * len(request.messages) + REQUEST_TOKENS
    if request.prompt is not None:
        total += _n_bytes(request.prompt)
    if request.schema is not None:
        total += len(canonical_json(to_json(request.schema)))
    return total


@final
class Spending:
    """The ledger of one run, and what of its budget is left for one model.

    ``path`` may be ":memory:". ``budget`` [dollars] and ``budget_tokens`` bound all that the ledger holds, of earlier
    commands too. One process writes at a time (the run lock sees to it): calls that an earlier one left open are
    counted as lost. Use it from one thread at a time.

    ``price`` is that of the list; with ``batch``, all but DIRECT questions are counted at that of batch files.

    Raises InputError for a budget in dollars without a price; when first used, CorruptError for a file that is no
    ledger.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        model: str,
        price: Price | None,
        batch: bool = False,
        budget: float | None = None,
        budget_tokens: int | None = None,
    ) -> None:
        if budget is not None and price is None:
            raise InputError(
                f"no price of {model} is known, so a budget in dollars cannot be kept; name its price in a file "
                "(setting llm.prices), or set llm.budget_tokens instead"
            )
        self.path = path
        self._model = model
        self._direct = None if price is None else _rates(price)
        self._rates = _rates(price.in_batch()) if price is not None and batch else self._direct
        self._budget = budget
        self._most_picodollars = _NO_BUDGET if budget is None else min(math.floor(budget * _PICO), _NO_BUDGET)
        self._most_tokens = _NO_BUDGET if budget_tokens is None else min(budget_tokens, _NO_BUDGET)
        self._open: dict[int, _Worst] = {}
        self._queue: deque[_Ticket] = deque()
        self._accounts: dict[str, int] = {}
        self._kept: dict[str, int] = {}
        self._more_prompt = self._more_completion = 0
        self._opened: sqlite3.Connection | None = None
        self._aside: Aside | None = None

    async def reserve(self, request: LLMRequest, prompt_tokens: int | None = None) -> int:
        """Reserve the worst case of a request and return the reservation's id, to be settled or cancelled.

        ``prompt_tokens`` is their exact number where known. While replies under way might leave enough, this waits, in
        the order of asking. Raises BudgetError when they cannot.
        """
        worst = self._worst(request, prompt_tokens)
        if not self._queue and (granted := self._grant(worst, request.stage)) is not None:
            return granted
        self._refuse_if_hopeless(worst)
        ticket = _Ticket()
        self._queue.append(ticket)
        try:
            while True:
                if self._queue[0] is ticket and (granted := self._grant(worst, request.stage)) is not None:
                    return granted
                ticket.woken = asyncio.get_running_loop().create_future()
                await ticket.woken
        finally:
            self._queue.remove(ticket)
            self._wake()

    def settle(self, reservation: int, reply: LLMReply) -> float | None:
        """Count a reply at what the server says it used; return its dollars, None where no price is known.

        Counts that the server left out are taken at their worst case. A cost that the server named goes before the
        table of prices. Raises KeyError when there is no such open reservation.
        """
        worst = self._open[reservation]
        prompt = worst.prompt if reply.prompt_tokens is None else _clamp(reply.prompt_tokens)
        completion = worst.completion if reply.completion_tokens is None else _clamp(reply.completion_tokens)
        cached = min(_clamp(reply.cached_tokens), prompt)
        picodollars = _picodollars(worst.rates, prompt, completion, cached)
        if reply.cost is not None and 0 <= reply.cost <= _MOST_DOLLARS:
            picodollars = math.ceil(reply.cost * _PICO)
        self._learn(worst, prompt, completion)
        with self._transaction("ledger"):
            self._database.execute(
                "UPDATE calls SET outcome = ?, prompt = ?, cached = ?, completion = ?, picodollars = ? WHERE id = ?",
                (reply.finish, prompt, cached, completion, picodollars, reservation),
            )
            self._add(prompt + completion - worst.tokens, (picodollars or 0) - (worst.picodollars or 0))
        self._closed(reservation)
        return None if picodollars is None else picodollars / _PICO

    def settle_unknown(self, reservation: int) -> None:
        """Count a request whose reply was lost at its worst case. Raises KeyError as ``settle`` does."""
        if reservation not in self._open:
            raise KeyError(reservation)
        with self._transaction("ledger"):
            self._database.execute("UPDATE calls SET outcome = 'lost' WHERE id = ?", (reservation,))
        self._closed(reservation)

    def cancel(self, reservation: int) -> None:
        """Take back a reservation that was surely not billed. Raises KeyError as ``settle`` does."""
        worst = self._open[reservation]
        with self._transaction("ledger"):
            self._database.execute("DELETE FROM calls WHERE id = ?", (reservation,))
            self._add(-worst.tokens, -(worst.picodollars or 0))
        self._closed(reservation)

    def cached(self, reply: LLMReply, stage: str = "") -> None:
        """Count a kept reply: nothing is spent, but the tokens that were not paid again are on the ledger."""
        prompt, completion = _clamp(reply.prompt_tokens or 0), _clamp(reply.completion_tokens or 0)
        with self._transaction("ledger"):
            if (row := self._kept.get(stage)) is None:
                row = self._kept[stage] = self._kept_row(stage)
            self._database.execute(
                "UPDATE calls SET requests = requests + 1, prompt = prompt + ?, completion = completion + ? "
                "WHERE id = ?",
                (prompt, completion, row),
            )

    def totals(self) -> list[Spent]:
        """Return what was spent so far, ordered by stage, model and outcome."""
        return _totals(self._database)

    def close(self) -> None:
        """Count what is still open as lost, and close the file."""
        for reservation in list(self._open):
            self.settle_unknown(reservation)
        if self._aside is not None:
            self._aside.join()
        if self._opened is not None:
            self._opened.close()

    # ---------------------------------------------------------------- private

    @property
    def _database(self) -> sqlite3.Connection:
        """The file, opened when it is first needed: a run that is refused before leaves nothing behind."""
        if self._opened is None:
            if self.path != _MEMORY:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self._opened = open_database(self.path, LAYOUT, timeout=5.0)
            self._aside = Aside(self.path, LAYOUT)
            with self._transaction("ledger opened"):
                if self._opened.execute("SELECT count(*) FROM spent").fetchone()[0] == 0:
                    self._opened.execute("INSERT INTO spent VALUES (0, 0)")
                self._opened.execute("UPDATE calls SET outcome = 'lost' WHERE outcome = 'open'")
        return self._opened

    def _worst(self, request: LLMRequest, prompt_tokens: int | None) -> _Worst:
        prompt = most_prompt_tokens(request) if prompt_tokens is None else prompt_tokens
        prompt, completion = prompt + self._more_prompt, request.max_tokens + self._more_completion
        rates = self._direct if request.stage in DIRECT else self._rates
        return _Worst(
            prompt=prompt,
            completion=completion,
            more_prompt=self._more_prompt,
            more_completion=self._more_completion,
            rates=rates,
            picodollars=_picodollars(rates, prompt, completion, None),
        )

    def _grant(self, worst: _Worst, stage: str) -> int | None:
        """Open a reservation if it fits beside everything counted so far; None when it does not."""
        picodollars = worst.picodollars or 0
        with self._transaction("reservation"):
            fits = self._database.execute(
                "UPDATE spent SET tokens = tokens + ?, picodollars = picodollars + ? "
                "WHERE tokens + ? <= ? AND picodollars + ? <= ?",
                (worst.tokens, picodollars, worst.tokens, self._most_tokens, picodollars, self._most_picodollars),
            )
            if fits.rowcount:
                added = self._database.execute(
                    "INSERT INTO calls (account, outcome, requests, prompt, cached, completion, picodollars) "
                    "VALUES (?, 'open', 1, ?, 0, ?, ?)",
                    (self._account(stage), worst.prompt, worst.completion, worst.picodollars),
                )
        if not fits.rowcount:
            self._refuse_if_hopeless(worst)
            return None
        assert added.lastrowid is not None
        self._open[added.lastrowid] = worst
        return added.lastrowid

    def _refuse_if_hopeless(self, worst: _Worst) -> None:
        """Raise BudgetError when a request would not fit even if nothing that is open were billed."""
        tokens, picodollars = self._database.execute("SELECT tokens, picodollars FROM spent").fetchone()
        tokens = self._most_tokens - tokens + sum(w.tokens for w in self._open.values())
        picodollars = self._most_picodollars - picodollars + sum(w.picodollars or 0 for w in self._open.values())
        if (worst.picodollars or 0) > picodollars:
            raise BudgetError(
                f"the next request to {self._model} may cost ${(worst.picodollars or 0) / _PICO:.6f}, and "
                f"${max(0, picodollars) / _PICO:.6f} of the budget of ${self._budget} is left; everything so far is "
                "kept: raise llm.budget and run it again"
            )
        if worst.tokens > tokens:
            raise BudgetError(
                f"the next request to {self._model} may use {worst.tokens} tokens, and {max(0, tokens)} of the budget "
                f"of {self._most_tokens} are left; everything so far is kept: raise llm.budget_tokens and run it again"
            )

    def _learn(self, worst: _Worst, prompt: int, completion: int) -> None:
        """Make the worst case worse when a server counted more, whose template or reasoning is longer than allowed."""
        more_prompt = prompt - worst.prompt + worst.more_prompt
        more_completion = completion - worst.completion + worst.more_completion
        if more_prompt <= self._more_prompt and more_completion <= self._more_completion:
            return
        self._more_prompt = max(self._more_prompt, more_prompt)
        self._more_completion = max(self._more_completion, more_completion)
        _log.warning(
            "%s counted %d prompt and %d completion tokens where at most %d and %d were expected; more is reserved "
            "from now on", self._model, prompt, completion, worst.prompt, worst.completion,
        )  # fmt: skip

    def _closed(self, reservation: int) -> None:
        del self._open[reservation]
        if reservation % _WRITE_BACK == 0 and self.path != _MEMORY and self._aside is not None:
            self._aside.start()
        self._wake()

    def _wake(self) -> None:
        if self._queue:
            self._queue[0].wake()

    def _add(self, tokens: int, picodollars: int) -> None:
        self._database.execute(
            "UPDATE spent SET tokens = tokens + ?, picodollars = picodollars + ?", (tokens, picodollars)
        )

    def _account(self, stage: str) -> int:
        known = self._accounts.get(stage)
        if known is None:
            self._database.execute("INSERT OR IGNORE INTO accounts (stage, model) VALUES (?, ?)", (stage, self._model))
            row = self._database.execute(
                "SELECT id FROM accounts WHERE stage = ? AND model = ?", (stage, self._model)
            ).fetchone()
            known = self._accounts[stage] = int(row[0])
        return known

    def _kept_row(self, stage: str) -> int:
        account = self._account(stage)
        row = self._database.execute(
            "SELECT id FROM calls WHERE account = ? AND outcome = 'cached'", (account,)
        ).fetchone()
        if row is not None:
            return int(row[0])
        added = self._database.execute(
            "INSERT INTO calls (account, outcome, requests, prompt, cached, completion, picodollars) "
            "VALUES (?, 'cached', 0, 0, 0, 0, 0)",
            (account,),
        )
        assert added.lastrowid is not None
        return added.lastrowid

    @contextlib.contextmanager
    def _transaction(self, name: str) -> Iterator[None]:
        try:
            with transaction(self._database, name):
                yield
        except sqlite3.OperationalError as error:
            self._forget_rows()
            kind = BusyError if is_busy(error) else InputError
            raise kind(f"the ledger {self.path} cannot be written: {error}; no request is sent without it") from error
        except BaseException:
            self._forget_rows()
            raise

    def _forget_rows(self) -> None:
        """Forget the rows found or made: some of them may have been rolled back."""
        self._accounts.clear()
        self._kept.clear()


def read_totals(path: Path) -> list[Spent]:
    """Return what a ledger holds, opened for reading only; nothing when there is none yet.

    Raises CorruptError, InputError and BusyError when it cannot be read.
    """
    database = read_database(path, LAYOUT)
    if database is None:
        return []
    with contextlib.closing(database):
        return _totals(database)


def _totals(database: sqlite3.Connection) -> list[Spent]:
    rows = database.execute(
        "SELECT stage, model, outcome, sum(requests), sum(prompt), sum(cached), sum(completion), "
        "coalesce(sum(picodollars), 0), sum(CASE WHEN picodollars IS NULL THEN requests ELSE 0 END) "
        "FROM calls JOIN accounts ON accounts.id = calls.account GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    return [
        Spent(
            stage=stage, model=model, outcome=outcome, requests=requests, prompt_tokens=prompt, cached_tokens=cached,
            completion_tokens=completion, dollars=picodollars / _PICO, unpriced=unpriced,
        )
        for stage, model, outcome, requests, prompt, cached, completion, picodollars, unpriced in rows
    ]  # fmt: skip


def _picodollars(rates: tuple[int, int, int] | None, prompt: int, completion: int, cached: int | None) -> int | None:
    """Return the cost by the table of prices; ``cached`` is None for the worst case."""
    if rates is None:
        return None
    full, from_cache, reply = rates
    if cached is None:
        return prompt * max(full, from_cache) + completion * reply
    return (prompt - cached) * full + cached * from_cache + completion * reply


def _rates(price: Price) -> tuple[int, int, int]:
    return _rate(price.input), _rate(price.cached), _rate(price.output)


def _rate(dollars: float) -> int:
    """Return whole picodollars a token, rounded up, of dollars a million tokens."""
    return math.ceil(round(dollars * 1e6, 3))  # 1.1 · 10⁶ may come out a hair above


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _clamp(count: int) -> int:
    return min(max(count, 0), _MOST_TOKENS)
