"""The ledger: what is counted, that the budget holds whatever happens, and that nobody waits in vain."""

from __future__ import annotations

import asyncio
import os
import random
import selectors
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import exegete.demo
from exegete.errors import BudgetError, BusyError, CorruptError, InputError
from exegete.files import fault_hook
from exegete.llm.prices import Price
from exegete.llm.spending import MESSAGE_TOKENS, REQUEST_TOKENS, Spending, Spent, most_prompt_tokens, read_totals
from exegete.types import LLMReply, LLMRequest

T = TypeVar("T")
PRICE = Price(input=2, cached=0.5, output=8)


def ask(text: str = "hello", *, max_tokens: int = 10, stage: str = "explain") -> LLMRequest:
    return LLMRequest(messages=({"role": "user", "content": text},), max_tokens=max_tokens, stage=stage)


def answer(prompt: int | None = 100, completion: int | None = 5, **more: Any) -> LLMReply:
    return LLMReply(text="x", finish="stop", prompt_tokens=prompt, completion_tokens=completion, **more)


def ledger(path: Path | str = ":memory:", *, price: Price | None = PRICE, **budget: Any) -> Spending:
    return Spending(path, model="m", price=price, **budget)


def dollars(spending: Spending) -> float:
    return sum(spent.dollars for spent in spending.totals())


class _Clock(selectors.DefaultSelector):
    """Waits for nothing: time moves on to the next timer, and a loop without one has a deadlock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("everything waits and nothing will ever happen")
        self.now += max(0.0, timeout)
        return super().select(0)


def simulate(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in simulated time."""
    clock = _Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(work)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
            clock.now += 1e9
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()


# ------------------------------------------------------------------ the worst case


def test_most_prompt_tokens_by_hand() -> None:
    request = LLMRequest(
        messages=({"role": "system", "content": "né"}, {"role": "user", "content": "\ud800日"}), schema={"a": [1]}
    )
    texts = len("system") + 3 + len("user") + 3 + 3
    assert most_prompt_tokens(request) == texts + 2 * MESSAGE_TOKENS + REQUEST_TOKENS + len('{"a":[1]}')
    assert most_prompt_tokens(LLMRequest(prompt="four")) == 4 + REQUEST_TOKENS


_TOKENIZER = Tokenizer.from_file(str(Path(exegete.demo.__file__).parent / "assets" / "model" / "tokenizer.json"))


@given(st.text(max_size=200))
def test_a_real_tokenizer_never_makes_more_tokens(text: str) -> None:
    assert (
        len(_TOKENIZER.encode(text, add_special_tokens=False).ids)
        <= most_prompt_tokens(LLMRequest(prompt=text)) - REQUEST_TOKENS
    )


# ------------------------------------------------------------------ what is counted


def test_a_settled_request_by_hand() -> None:
    async def main() -> None:
        spending = ledger()
        request = ask(max_tokens=10)
        one = await spending.reserve(request, 100)
        assert spending.totals() == [
            Spent(
                stage="explain", model="m", outcome="open", requests=1, prompt_tokens=100, cached_tokens=0,
                completion_tokens=10, dollars=(100 * 2 + 10 * 8) / 1e6, unpriced=0,
            )
        ]  # fmt: skip
        cost = spending.settle(one, answer(90, 7, cached_tokens=40))
        assert cost == (50 * 2 + 40 * 0.5 + 7 * 8) / 1e6
        assert spending.totals() == [
            Spent(
                stage="explain", model="m", outcome="stop", requests=1, prompt_tokens=90, cached_tokens=40,
                completion_tokens=7, dollars=cost, unpriced=0,
            )
        ]  # fmt: skip
        spending.close()

    simulate(main())


def test_outcomes_and_stages_are_told_apart() -> None:
    async def main() -> None:
        spending = ledger()
        for finish in ("stop", "length", "refused", "error"):
            one = await spending.reserve(ask(stage="fuzzing"), 100)
            text = None if finish == "error" else ""
            spending.settle(one, LLMReply(text=text, finish=finish, prompt_tokens=50, completion_tokens=1))
        spending.settle_unknown(await spending.reserve(ask(stage="detection"), 100))
        spending.cancel(await spending.reserve(ask(stage="detection"), 100))
        await spending.reserve(ask(stage="explain"), 100)
        spending.cached(answer(30, 3), "fuzzing")
        spending.cached(answer(30, 3), "fuzzing")
        spending.cached(answer(None, None), "explain")
        found = {(s.stage, s.outcome): (s.requests, s.prompt_tokens, s.completion_tokens) for s in spending.totals()}
        assert found == {
            ("detection", "lost"): (1, 100, 10),
            ("explain", "cached"): (1, 0, 0),
            ("explain", "open"): (1, 100, 10),
            ("fuzzing", "cached"): (2, 60, 6),
            ("fuzzing", "error"): (1, 50, 1),
            ("fuzzing", "length"): (1, 50, 1),
            ("fuzzing", "refused"): (1, 50, 1),
            ("fuzzing", "stop"): (1, 50, 1),
        }
        assert sum(s.dollars for s in spending.totals() if s.outcome == "cached") == 0
        spending.close()

    simulate(main())


def test_what_the_server_did_not_count_is_taken_at_its_worst() -> None:
    async def main() -> None:
        spending = ledger()
        assert spending.settle(await spending.reserve(ask(), 100), answer(None, 4)) == (100 * 2 + 4 * 8) / 1e6
        assert spending.settle(await spending.reserve(ask(), 100), answer(50, None)) == (50 * 2 + 10 * 8) / 1e6
        spending.close()

    simulate(main())


def test_a_cost_that_the_server_names_goes_first_unless_it_is_nonsense() -> None:
    async def main() -> None:
        spending = ledger()
        assert spending.settle(await spending.reserve(ask(), 100), answer(cost=0.25)) == 0.25
        table = (100 * 2 + 5 * 8) / 1e6
        for cost in (-1.0, float("nan"), float("inf"), 1e30):
            assert spending.settle(await spending.reserve(ask(), 100), answer(cost=cost)) == table
        spending.close()
        spending = ledger(price=None)
        assert spending.settle(await spending.reserve(ask(), 100), answer(cost=0.25)) == 0.25
        spending.close()

    simulate(main())


def test_counts_of_nonsense_neither_crash_nor_give_money_back() -> None:
    async def main() -> None:
        spending = ledger()
        for prompt, completion, cached in ((-5, -5, -5), (10**30, 10**30, 10**30), (10, 1, 10**9)):
            reply = answer(prompt, completion, cached_tokens=cached)
            assert (spending.settle(await spending.reserve(ask(), 100), reply) or 0) >= 0
        spending.close()

    simulate(main())


def test_without_a_price_only_tokens_are_counted_and_it_says_so() -> None:
    async def main() -> None:
        spending = ledger(price=None, budget_tokens=1000)
        assert spending.settle(await spending.reserve(ask(), 100), answer()) is None
        spending.cached(answer(), "explain")
        stop = next(s for s in spending.totals() if s.outcome == "stop")
        assert (stop.dollars, stop.unpriced, stop.prompt_tokens) == (0, 1, 100)
        assert sum(s.unpriced for s in spending.totals()) == 1
        spending.close()
        with pytest.raises(InputError, match="no price of m is known"):
            ledger(price=None, budget=1.0)

    simulate(main())


def test_a_reservation_ends_once() -> None:
    async def main() -> None:
        spending = ledger()
        one = await spending.reserve(ask(), 100)
        spending.settle(one, answer())
        for end in (spending.settle_unknown, spending.cancel, lambda i: spending.settle(i, answer())):
            with pytest.raises(KeyError):
                end(one)
        spending.close()

    simulate(main())


def test_a_server_that_counts_more_than_can_be_makes_the_next_reservation_larger(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        spending = ledger(budget_tokens=10_000)
        both = [await spending.reserve(ask(max_tokens=10), 100) for _ in range(2)]
        for one in both:
            spending.settle(one, answer(130, 15))
        await spending.reserve(ask(max_tokens=10), 100)
        still = next(s for s in spending.totals() if s.outcome == "open")
        assert (still.prompt_tokens, still.completion_tokens) == (130, 15)
        assert len(caplog.records) == 1
        spending.close()

    simulate(main())


# ------------------------------------------------------------------ the budget


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    async def main() -> None:
        spending = ledger(budget=0.001)
        with pytest.raises(BudgetError, match=r"may cost \$0.002080"):
            await spending.reserve(ask(max_tokens=10), 1000)
        one = await spending.reserve(ask(max_tokens=10), 400)  # 0.00088
        with pytest.raises(BudgetError):
            await spending.reserve(ask(max_tokens=10), 1000)
        spending.settle(one, answer(400, 10))
        with pytest.raises(BudgetError, match=r"\$0.000120 of the budget"):
            await spending.reserve(ask(max_tokens=10), 100)
        spending.close()
        spending = ledger(price=None, budget_tokens=100)
        with pytest.raises(BudgetError, match="may use 110 tokens, and 100 of the budget of 100 are left"):
            await spending.reserve(ask(max_tokens=10), 100)
        await spending.reserve(ask(max_tokens=10), 90)
        spending.close()

    simulate(main())


def test_a_request_waits_while_open_ones_may_leave_enough() -> None:
    async def main() -> None:
        spending = ledger(budget_tokens=300)
        one = await spending.reserve(ask(max_tokens=100), 100)
        waiting = asyncio.ensure_future(spending.reserve(ask(max_tokens=50), 100))
        await asyncio.sleep(5)
        assert not waiting.done()
        spending.settle(one, answer(100, 50))
        assert await waiting
        spending.close()

    simulate(main())


def test_a_request_that_waited_in_vain_is_refused() -> None:
    async def main() -> None:
        spending = ledger(budget_tokens=300)
        one = await spending.reserve(ask(max_tokens=100), 100)
        waiting = [asyncio.ensure_future(spending.reserve(ask(max_tokens=m), 100)) for m in (50, 60, 1)]
        await asyncio.sleep(1)
        spending.settle_unknown(one)
        got = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(g) for g in got] == [BudgetError] * 3
        spending.close()

    simulate(main())


def test_waiting_is_in_the_order_of_asking() -> None:
    async def main() -> None:
        spending = ledger(budget_tokens=1000)
        order: list[str] = []

        async def one(name: str, prompt: int) -> int:
            granted = await spending.reserve(ask(max_tokens=10), prompt)
            order.append(name)
            return granted

        first = [await spending.reserve(ask(max_tokens=10), 390) for _ in range(2)]
        large = asyncio.ensure_future(one("large", 490))
        await asyncio.sleep(0)
        small = asyncio.ensure_future(one("small", 40))  # would fit at once, before the large one
        await asyncio.sleep(1)
        assert order == []
        spending.cancel(first[0])
        await asyncio.gather(large, small)
        assert order == ["large", "small"]
        spending.close()

    simulate(main())


def test_one_that_gives_up_waiting_holds_nobody_up() -> None:
    async def main() -> None:
        spending = ledger(budget_tokens=1000)
        await spending.reserve(ask(max_tokens=10), 790)
        large = asyncio.ensure_future(spending.reserve(ask(max_tokens=10), 490))
        await asyncio.sleep(0)
        small = asyncio.ensure_future(spending.reserve(ask(max_tokens=10), 40))
        await asyncio.sleep(1)
        large.cancel()
        assert await small
        with pytest.raises(asyncio.CancelledError):
            await large
        spending.close()

    simulate(main())


def _simulated_run(seed: int, folder: Path) -> tuple[int, int]:
    """One run that is killed and reopened a few times, with a server that bills; returns what it did.

    The bill is kept here, apart from the ledger; after every event it is held against the budget.
    """
    draw = random.Random(seed)
    path: Path | str = folder / f"{seed}.db" if seed % 5 == 0 else ":memory:"
    lives = draw.randint(2, 3) if path != ":memory:" else 1
    priced = draw.random() < 0.8
    price = Price(input=draw.uniform(0.1, 20), cached=0.05, output=draw.uniform(0.1, 80)) if priced else None
    tokens = draw.randint(500, 6000)
    budget = (
        draw.uniform(0.2, 2) * tokens * (price.input + price.output) / 2e6 if price and draw.random() < 0.8 else None
    )
    most_tokens = tokens if budget is None or draw.random() < 0.3 else None
    billed = {"tokens": 0, "dollars": 0.0}
    answered = refused = 0

    def bill(prompt: int, cached: int, completion: int) -> None:
        billed["tokens"] += prompt + completion
        billed["dollars"] += price.dollars(prompt, completion, cached=cached) if price else 0
        assert most_tokens is None or billed["tokens"] <= most_tokens
        assert budget is None or billed["dollars"] <= budget * (1 + 1e-12)

    async def one(spending: Spending) -> None:
        nonlocal answered, refused
        await asyncio.sleep(draw.uniform(0, 3))
        prompt, most = draw.randint(1, 300), draw.randint(1, 300)
        try:
            reservation = await spending.reserve(ask(max_tokens=most), prompt)
        except BudgetError:
            refused += 1
            return
        fate = draw.random()
        await asyncio.sleep(draw.expovariate(1))
        if fate < 0.1:  # the connection was never made
            spending.cancel(reservation)
            return
        share = draw.choice([1.0, draw.random()])  # often all of the worst case
        used = (prompt if share == 1 else draw.randint(1, prompt), round(most * share))
        cached = draw.randint(0, used[0])
        bill(used[0], cached, used[1])
        await asyncio.sleep(draw.expovariate(2))  # a kill here: billed, and nobody knows
        if fate < 0.25:
            spending.settle_unknown(reservation)
        else:
            spending.settle(reservation, answer(used[0], used[1], cached_tokens=cached))
        answered += 1

    async def life(spending: Spending, seconds: float) -> None:
        tasks = [asyncio.ensure_future(one(spending)) for _ in range(12)]
        done, _ = await asyncio.wait(tasks, timeout=seconds)
        for task in done:
            task.result()

    for last in [False] * (lives - 1) + [True]:
        spending = ledger(path, price=price, budget=budget, budget_tokens=most_tokens)
        simulate(life(spending, 1e6 if last else draw.uniform(0, 5)))
        if last:
            totals = spending.totals()
            assert sum(s.prompt_tokens + s.completion_tokens for s in totals) >= billed["tokens"]
            assert sum(s.dollars for s in totals) >= billed["dollars"] * (1 - 1e-9)
            spending.close()
        else:
            spending._database.close()  # killed: nothing more is written
    return answered, refused


def test_the_budget_holds_in_a_thousand_simulated_runs() -> None:
    memory = Path("/dev/shm")  # where there is one: a thousand files need no disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        runs = [_simulated_run(seed, Path(folder)) for seed in range(1000)]
    assert sum(answered for answered, _ in runs) > 3000
    assert sum(refused for _, refused in runs) > 1000


# ------------------------------------------------------------------ kills and files


class Killed(BaseException):
    pass


def _work_until(spending: Spending, point: int) -> tuple[int, bool]:
    """Do one of everything, stopping at the given fault point; returns the tokens billed, and whether it got there."""
    billed = passed = 0

    def hook(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            raise Killed(name)

    async def main() -> None:
        nonlocal billed
        one = await spending.reserve(ask(max_tokens=10), 100)
        billed += 60 + 6
        spending.settle(one, answer(60, 6))
        two = await spending.reserve(ask(max_tokens=10, stage="fuzzing"), 50)
        billed += 50 + 10
        spending.settle_unknown(two)
        spending.cancel(await spending.reserve(ask(max_tokens=10), 20))
        spending.cached(answer(5, 5), "explain")

    try:
        with fault_hook(hook):
            simulate(main())
    except Killed:
        return billed, True
    return billed, False


def test_a_stop_at_every_point_leaves_a_ledger_that_shows_no_less_than_the_bill(tmp_path: Path) -> None:
    point = stopped = 1
    while stopped:
        path = tmp_path / f"{point}.db"
        spending = ledger(path, budget_tokens=1000)
        billed, got_there = _work_until(spending, point)
        spending._database.close()
        spending = ledger(path, budget_tokens=1000)
        paid = [s for s in spending.totals() if s.outcome not in ("cached",)]
        counted = sum(s.prompt_tokens + s.completion_tokens for s in paid)
        assert billed <= counted <= 100 + 10 + 50 + 10 + 20 + 10
        left = 1000 - counted
        with pytest.raises(BudgetError):
            simulate(spending.reserve(ask(max_tokens=1), left))
        assert simulate(spending.reserve(ask(max_tokens=1), left - 1))
        spending.close()
        stopped, point = int(got_there), point + 1
    assert point > 12


def test_what_a_killed_process_left_open_counts_at_its_worst(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    spending = ledger(path)
    simulate(spending.reserve(ask(max_tokens=10), 100))
    assert [s.outcome for s in read_totals(path)] == ["open"]
    spending._database.close()
    spending = ledger(path, budget_tokens=110 + 19)
    assert [(s.outcome, s.prompt_tokens, s.completion_tokens) for s in spending.totals()] == [("lost", 100, 10)]
    with pytest.raises(BudgetError):
        simulate(spending.reserve(ask(max_tokens=10), 10))
    spending.close()


def test_closing_counts_what_is_open_as_lost(tmp_path: Path) -> None:
    spending = ledger(tmp_path / "ledger.db")
    simulate(spending.reserve(ask(max_tokens=10), 100))
    spending.close()
    assert [s.outcome for s in read_totals(tmp_path / "ledger.db")] == ["lost"]


_SPENDER = """
import asyncio, os, sys
from pathlib import Path
from exegete.llm.prices import Price
from exegete.llm.spending import Spending
from exegete.types import LLMReply, LLMRequest

async def one(spending, i):
    request = LLMRequest(messages=({"role": "user", "content": "x"},), max_tokens=10 + i % 7)
    reservation = await spending.reserve(request, 100)
    os.write(1, b"billed %d\\n" % (50 + i % 7))
    await asyncio.sleep(0.001 * (i % 5))
    reply = LLMReply(text="x", finish="stop", prompt_tokens=40, completion_tokens=10 + i % 7)
    spending.settle(reservation, reply)

async def main():
    spending = Spending(Path(sys.argv[1]), model="m", price=None, budget_tokens=1_000_000)
    os.write(1, b"ready\\n")
    gate = asyncio.Semaphore(8)
    async def limited(i):
        async with gate:
            await one(spending, i)
    await asyncio.gather(*(limited(i) for i in range(20000)))

asyncio.run(main())
"""


def test_real_kills_at_random_moments(tmp_path: Path) -> None:
    path, draw, billed = tmp_path / "ledger.db", random.Random(7), 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", _SPENDER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        billed += sum(int(line.split()[1]) for line in lines)
        totals = read_totals(path)
        assert sum(s.prompt_tokens + s.completion_tokens for s in totals) >= billed
    spending = ledger(path, price=None)
    assert {s.outcome for s in spending.totals()} <= {"stop", "lost"}
    assert sum(s.requests for s in spending.totals() if s.outcome == "lost") <= 3 * 8
    spending.close()


def test_reading_totals_beside_a_writer_and_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    assert read_totals(path) == []
    path.touch()
    assert read_totals(path) == []
    spending = ledger(path)
    spending.settle(simulate(spending.reserve(ask(), 100)), answer())
    assert read_totals(path) == spending.totals()
    spending.close()
    assert len(read_totals(path)) == 1


def test_files_that_are_no_ledger_are_refused(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database at all" * 500)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE calls (x)")
    database.close()
    hooked = tmp_path / "hooked.db"
    opened = ledger(hooked)
    assert opened.totals() == []
    opened.close()
    with sqlite3.connect(hooked) as database:
        database.execute("CREATE TRIGGER t AFTER INSERT ON calls BEGIN DELETE FROM calls; END")
    database.close()
    for path in (garbage, other, hooked):
        with pytest.raises(CorruptError, match=path.name):
            ledger(path).totals()
        with pytest.raises(CorruptError, match=path.name):
            read_totals(path)
    newer = tmp_path / "newer.db"
    opened = ledger(newer)
    assert opened.totals() == []
    opened.close()
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(InputError, match="upgrade exegete"):
        ledger(newer).totals()


def test_a_ledger_is_made_when_it_is_first_needed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.db"
    spending = ledger(path)
    spending.close()
    assert not path.parent.exists()
    spending = ledger(path)
    spending.cached(LLMReply(text="kept", finish="stop", prompt_tokens=3, completion_tokens=1))
    spending.close()
    assert [total.outcome for total in read_totals(path)] == ["cached"]


def test_a_ledger_that_cannot_be_written_stops_before_anything_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    spending = ledger(path)
    spending._database.execute("PRAGMA busy_timeout = 10")
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(BusyError, match="no request is sent without it"):
        simulate(spending.reserve(ask(), 100))
    lock.execute("ROLLBACK")
    lock.close()
    assert spending.totals() == []
    pages = spending._database.execute("PRAGMA page_count").fetchone()[0]
    spending._database.execute(f"PRAGMA max_page_count = {pages}")

    async def many() -> None:
        for _ in range(200):
            await spending.reserve(ask(), 100)

    with pytest.raises(InputError, match="cannot be written"):
        simulate(many())
    spending._database.execute("PRAGMA max_page_count = 100000")
    granted = simulate(spending.reserve(ask(), 100))
    spending.settle(granted, answer())
    spending.close()
    assert {s.outcome for s in read_totals(path)} == {"lost", "stop"}
