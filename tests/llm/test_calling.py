"""Further attempts, kept replies, the ledger and the stop, around a backend that does what a test says."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import pytest

from exegete.config import LLMConfig
from exegete.errors import BudgetError, ConfigError, InputError, LLMError
from exegete.files import fault_hook
from exegete.llm.backend import Backend, Capabilities, Send, TransientError
from exegete.llm.calling import Caller
from exegete.llm.client import gather_all, gather_limited
from exegete.llm.limits import Breaker, Limits
from exegete.llm.open import client_from_spec
from exegete.llm.prices import Price
from exegete.llm.replies import ReplyCache
from exegete.llm.spending import Spending
from exegete.types import LLMReply, LLMRequest

Step = str | LLMReply | Exception


@final
class FakeBackend(Backend):
    """Answers from a script, or by a function of request and attempt; each attempt takes a second."""

    def __init__(self, script: Sequence[Step] | Callable[[LLMRequest, int], Step] = (), seconds: float = 1.0) -> None:
        self.script, self.seconds = script, seconds
        self.sent: list[tuple[float, LLMRequest]] = []
        self.finished: list[str] = []
        self.probing: Send | None = None
        self.closed = 0

    @property
    def name(self) -> str:
        return "http://fake#toy"

    async def send(self, request: LLMRequest) -> LLMReply:
        self.sent.append((asyncio.get_running_loop().time() - 1000.0, request))
        number = len(self.sent) - 1
        step = self.script(request, number) if callable(self.script) else self.script[number]
        await asyncio.sleep(self.seconds)
        if isinstance(step, Exception):
            raise step
        self.finished.append(text_of(request))
        return done(step) if isinstance(step, str) else step

    async def check(self) -> None:
        pass

    def probe_through(self, send: Send) -> None:
        self.probing = send

    async def capabilities(self) -> Capabilities:
        assert self.probing is not None
        reply = await self.probing(asked("what can you do?"))
        return Capabilities(logprobs=reply.text == "logprobs")

    async def close(self) -> None:
        self.closed += 1


def asked(text: str = "hello", **options: Any) -> LLMRequest:
    return LLMRequest(messages=({"role": "user", "content": text},), **options)


def text_of(request: LLMRequest) -> str:
    return request.messages[0]["content"]


def done(text: str, finish: Any = "stop", **options: Any) -> LLMReply:
    return LLMReply(text=text, finish=finish, **{"prompt_tokens": 10, "completion_tokens": 2, **options})


def busy(**options: Any) -> TransientError:
    return TransientError("HTTP 429", status=429, throttled=True, unpaid=True, **options)


def broken(**options: Any) -> TransientError:
    return TransientError("HTTP 500", status=500, **options)


def ledger(path: Any = ":memory:", **options: Any) -> Spending:
    return Spending(path, model="toy", price=Price(input=1.0, cached=0.5, output=2.0), **options)


# -- further attempts -------------------------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again_after_growing_times(run_virtual: Any) -> None:
    backend = FakeBackend([broken(), broken(), broken(), "there"])
    reply = run_virtual(Caller(backend, retries=5, backoff=2.0).reply(asked()))
    assert reply == done("there")
    times = [time for time, _ in backend.sent]
    gaps = [later - earlier - 1.0 for earlier, later in pairwise(times)]
    for gap, longest in zip(gaps, (2.0, 4.0, 8.0), strict=True):
        assert longest / 2 <= gap <= longest + 0.01


def test_after_the_last_attempt_it_is_an_error_that_says_why(run_virtual: Any) -> None:
    backend = FakeBackend(lambda request, number: broken())
    reply = run_virtual(Caller(backend, retries=2).reply(asked()))
    assert reply == LLMReply(text=None, finish="error", error="HTTP 500 (3 attempts)")
    assert len(backend.sent) == 3


@pytest.mark.parametrize("failure", [busy(retry_after=30.0), broken(retry_after=30.0)])
def test_retry_after_is_waited_for(run_virtual: Any, failure: Exception) -> None:
    backend = FakeBackend([failure, "there"])
    run_virtual(Caller(backend).reply(asked()))
    assert backend.sent[1][0] >= 31.0


def test_an_error_reply_is_not_tried_again(run_virtual: Any) -> None:
    backend = FakeBackend([LLMReply(text=None, finish="error", error="too long")])
    assert run_virtual(Caller(backend).reply(asked())).error == "too long"
    assert len(backend.sent) == 1


def test_the_first_refusal_stops_everything_with_the_same_line(run_virtual: Any) -> None:
    backend = FakeBackend(lambda request, number: "fine" if number < 3 else LLMError("the key is refused (401)"))
    caller = Caller(backend, limits=Limits(1))

    async def work() -> list[Any]:
        return await asyncio.gather(*(caller.reply(asked(str(i))) for i in range(50)), return_exceptions=True)

    results = run_virtual(work())
    assert [r.text for r in results[:3]] == ["fine"] * 3
    assert {str(r) for r in results[3:]} == {"the key is refused (401)"}
    assert len(backend.sent) == 4
    with pytest.raises(LLMError, match="the key is refused"):
        run_virtual(caller.reply(asked("later")))
    assert len(backend.sent) == 4


def test_attempts_that_wait_to_be_tried_again_stop_too(run_virtual: Any) -> None:
    backend = FakeBackend(lambda request, number: broken() if number == 0 else LLMError("gone (404)"))
    caller = Caller(backend, backoff=50.0)

    async def work() -> list[Any]:
        return await asyncio.gather(*(caller.reply(asked(str(i))) for i in range(2)), return_exceptions=True)

    assert [str(r) for r in run_virtual(work())] == ["gone (404)"] * 2
    assert len(backend.sent) == 2


def test_a_broken_server_stops_the_run_and_every_call_ends(run_virtual: Any) -> None:
    backend = FakeBackend(lambda request, number: broken())
    caller = Caller(backend, limits=Limits(8, breaker=Breaker(failures=10, pauses=(5.0,))), retries=50)

    async def work() -> list[Any]:
        return await asyncio.gather(*(caller.reply(asked(str(i))) for i in range(20)), return_exceptions=True)

    results = run_virtual(work())
    assert len({str(r) for r in results}) == 1
    assert all(isinstance(r, LLMError) and not isinstance(r, TransientError) for r in results)
    assert caller.limits.under_way == 0


def test_tokens_a_minute_count_the_most_and_then_what_was_used(run_virtual: Any) -> None:
    backend = FakeBackend(lambda request, number: done("x", prompt_tokens=100, completion_tokens=50))
    caller = Caller(backend, limits=Limits(8, tokens_per_minute=1000))

    async def work() -> None:
        await asyncio.gather(*(caller.reply(asked(str(i), max_tokens=100)) for i in range(15)))

    run_virtual(work())
    minutes = Counter(int(time // 60) for time, _ in backend.sent)
    assert minutes == {0: 5, 1: 5, 2: 5}


def test_what_was_refused_for_being_too_much_takes_no_tokens_of_the_minute(run_virtual: Any) -> None:
    backend = FakeBackend([busy(), busy(), "there"])
    run_virtual(Caller(backend, limits=Limits(8, tokens_per_minute=700)).reply(asked(max_tokens=400)))
    assert backend.sent[-1][0] < 10.0  # at its most a request takes nearly all


# -- kept replies -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Any:
    cache = ReplyCache(tmp_path / "replies.db")
    yield cache
    cache.close()


def test_a_kept_reply_is_not_asked_again_and_costs_nothing(kept: ReplyCache) -> None:
    backend, spending = FakeBackend(["one"], 0.0), ledger()
    caller = Caller(backend, replies=kept, spending=spending)
    first, second = asyncio.run(caller.reply(asked(stage="a"))), asyncio.run(caller.reply(asked(stage="b")))
    assert (first.text, first.cached, second.text, second.cached) == ("one", False, "one", True)
    assert len(backend.sent) == 1
    rows = [(s.stage, s.outcome, s.requests) for s in spending.totals()]
    assert rows == [("a", "stop", 1), ("b", "cached", 1)]
    assert sum(s.dollars for s in spending.totals()) == pytest.approx((10 * 1.0 + 2 * 2.0) / 1e6)
    spending.close()


NO_TEXT = LLMReply(text=None, finish="error", error="x")


@pytest.mark.parametrize("step", [done("cut", "length"), done("no", "refused"), NO_TEXT, broken()])
def test_what_is_no_whole_reply_is_asked_again(kept: ReplyCache, step: Any) -> None:
    backend = FakeBackend([step, "whole"], 0.0)
    caller = Caller(backend, replies=kept, retries=0)
    assert asyncio.run(caller.reply(asked())).finish != "stop"
    assert asyncio.run(caller.reply(asked())).text == "whole"


def test_equal_requests_at_once_are_sent_once(kept: ReplyCache) -> None:
    backend = FakeBackend(lambda request, number: "one", 0.05)
    caller = Caller(backend, replies=kept)

    async def work() -> list[LLMReply]:
        return await asyncio.gather(*(caller.reply(asked()) for _ in range(20)))

    assert {r.text for r in asyncio.run(work())} == {"one"}
    assert len(backend.sent) == 1


@pytest.mark.parametrize("failure", [LLMError("refused"), KeyboardInterrupt()])
def test_a_lease_is_given_back_however_it_ends(kept: ReplyCache, failure: Any) -> None:
    caller = Caller(FakeBackend([failure], 0.0), replies=kept)
    if isinstance(failure, KeyboardInterrupt):
        caller = Caller(FakeBackend(lambda request, number: "x", 99.0), replies=kept)
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(caller.reply(asked()), 0.01))
    else:
        with pytest.raises(LLMError):
            asyncio.run(caller.reply(asked()))
    other = Caller(FakeBackend(["whole"], 0.0), replies=kept)
    assert asyncio.run(asyncio.wait_for(other.reply(asked()), 5.0)).text == "whole"


# -- the ledger -------------------------------------------------------------------------------------------------------


def outcomes(spending: Spending) -> dict[str, int]:
    return {s.outcome: s.requests for s in spending.totals()}


def test_every_attempt_is_on_the_ledger_at_what_it_may_have_cost(run_virtual: Any) -> None:
    spending = ledger()
    backend = FakeBackend([busy(), broken(), "there"])
    run_virtual(Caller(backend, spending=spending).reply(asked()))
    assert outcomes(spending) == {"lost": 1, "stop": 1}  # the refused one surely was not billed
    spending.close()


def test_a_refusal_is_not_billed_and_a_cancelled_call_may_have_been(run_virtual: Any) -> None:
    spending = ledger()
    caller = Caller(FakeBackend([LLMError("refused")]), spending=spending)
    with pytest.raises(LLMError):
        run_virtual(caller.reply(asked()))
    assert outcomes(spending) == {}
    slow = Caller(FakeBackend(["x"], 99.0), spending=spending)
    with pytest.raises(TimeoutError):
        run_virtual(asyncio.wait_for(slow.reply(asked()), 1.0))
    assert outcomes(spending) == {"lost": 1}
    spending.close()


def test_a_budget_that_is_used_up_raises_and_stops_nothing_else(run_virtual: Any) -> None:
    spending = ledger(budget_tokens=2000)
    backend = FakeBackend(lambda request, number: done("x", prompt_tokens=300, completion_tokens=100))
    caller = Caller(backend, spending=spending)

    async def work() -> list[Any]:
        calls = (caller.reply(asked(str(i), max_tokens=100)) for i in range(9))
        return await asyncio.gather(*calls, return_exceptions=True)

    results = run_virtual(work())
    assert {type(r) for r in results} == {LLMReply, BudgetError}
    assert sum(s.prompt_tokens + s.completion_tokens for s in spending.totals()) <= 2000
    small = ledger()
    assert run_virtual(Caller(backend, spending=small).reply(asked())).text == "x"
    assert caller.limits.stopped is None
    for one in (spending, small):
        one.close()


def test_probes_are_paid_for_never_kept_and_stop_nothing(run_virtual: Any, kept: ReplyCache) -> None:
    spending = ledger()
    backend = FakeBackend(["logprobs", LLMError("no such route (404)"), "fine"])
    caller = Caller(backend, spending=spending, replies=kept)
    assert run_virtual(caller.capabilities()) == Capabilities(logprobs=True)
    with pytest.raises(LLMError, match="route"):
        run_virtual(caller.capabilities())
    assert run_virtual(caller.reply(asked())).text == "fine"
    assert outcomes(spending) == {"stop": 2}
    spending.close()


# -- killed at any point ----------------------------------------------------------------------------------------------


class KilledError(BaseException):
    pass


POINTS = ["request reserved", "reply received", "reply stored", "reply settled"]

RUNS = """
import asyncio, json, os, random, signal, sqlite3, sys, time
from pathlib import Path
from exegete.files import fault_hook
from exegete.llm.backend import Backend, Capabilities
from exegete.llm.calling import Caller
from exegete.llm.prices import Price
from exegete.llm.replies import ReplyCache
from exegete.llm.spending import Spending
from exegete.types import LLMReply, LLMRequest

class Server(Backend):
    name = "toy"
    def __init__(self, folder): self.log = folder / "sent"
    async def send(self, request):
        with self.log.open("a") as log:
            log.write(request.prompt + "\\n")
        await asyncio.sleep(0.002)
        return LLMReply(text=request.prompt, finish="stop", prompt_tokens=1, completion_tokens=1)
    async def check(self): pass
    async def capabilities(self): return Capabilities()
    async def close(self): pass

async def ask(folder):
    spending = Spending(folder / "ledger.db", model="toy", price=Price(input=1.0, cached=1.0, output=1.0))
    caller = Caller(Server(folder), replies=ReplyCache(folder / "replies.db"), spending=spending)
    replies = await asyncio.gather(*(caller.reply(LLMRequest(prompt=str(i), max_tokens=5)) for i in range(6)))
    found = [r.cached for r in replies], {s.outcome: s.requests for s in spending.totals()}
    assert [r.text for r in replies] == list("012345")
    caller.end()
    return found

def forked(work):
    child = os.fork()
    if child == 0:
        try: work()
        finally: os._exit(1)
    return child

def killed_at(folder, point):
    passed = []
    def hook(name):
        passed.append(name)
        if passed.count(point) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    def work():
        with fault_hook(hook): asyncio.run(ask(folder))
        often = sorted(name for name in set(passed) if passed.count(name) > 2)
        (folder / "points").write_text(json.dumps(often))
    _, status = os.waitpid(forked(work), 0)
    assert os.WIFSIGNALED(status) == (point is not None)

def killed_after(folder, seconds):
    child = forked(lambda: asyncio.run(ask(folder)))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

top = Path(sys.argv[1])
def fresh(name):
    folder = top / name.replace(" ", "-")
    folder.mkdir()
    return folder
def stored(folder):
    if not (folder / "replies.db").exists(): return 0
    with sqlite3.connect(folder / "replies.db") as database:
        try: return database.execute("SELECT count(*) FROM replies").fetchone()[0]
        except sqlite3.OperationalError: return 0  # killed before there was a table
def told(name, folder):
    sent = (folder / "sent").read_text().split() if (folder / "sent").exists() else []
    before = stored(folder)
    cached, ends = asyncio.run(ask(folder))
    print(json.dumps([name, before, sum(cached), len(sent), len((folder / "sent").read_text().split()), ends]))

whole = fresh("whole")
begun = time.monotonic()
killed_at(whole, None)
taken = time.monotonic() - begun
for point in json.loads((whole / "points").read_text()):
    folder = fresh(point)
    killed_at(folder, point)
    told(point, folder)
for seed in range(3):
    folder = fresh(f"moment {seed}")
    killed_after(folder, random.Random(seed).uniform(0.0, taken))
    told("moment", folder)
"""


def test_after_a_kill_at_any_point_no_stored_reply_is_asked_again_and_the_ledger_holds_all(tmp_path: Path) -> None:
    """Killed at the third passing of every point that is passed, and at three random moments, then run again."""
    ended = subprocess.run([sys.executable, "-c", RUNS, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    points = [name for name, *_ in found]
    assert set(POINTS) < set(points)
    assert points.count("moment") == 3
    for _, stored, cached, sent, sent_in_all, ends in found:
        assert cached == stored  # none is lost
        assert sent_in_all == sent + 6 - stored  # none is asked again
        assert set(ends) <= {"stop", "lost", "cached"}
        assert ends.get("stop", 0) + ends.get("lost", 0) >= sent_in_all  # nothing that was sent is missing
    middle = {name: stored for name, stored, *_ in found}
    assert 0 < middle["reply settled"] < 6


def test_the_points_are_those_that_are_passed(run_virtual: Any, kept: ReplyCache) -> None:
    passed: list[str] = []
    spending = ledger()
    with fault_hook(passed.append):
        run_virtual(Caller(FakeBackend(["x"]), replies=kept, spending=spending).reply(asked()))
    assert [name for name in passed if name in POINTS] == POINTS
    spending.close()


# -- work on many -----------------------------------------------------------------------------------------------------


def test_after_a_refusal_what_is_under_way_ends_and_is_given(run_virtual: Any) -> None:
    """Two requests an item: what was sent is waited for, nothing new is sent, finished items are given first."""
    steps: Callable[[LLMRequest, int], Step] = lambda request, number: (  # noqa: E731
        LLMError("refused (401)") if number == 4 else text_of(request)
    )
    backend = FakeBackend(steps)
    caller = Caller(backend, limits=Limits(8))

    async def work(item: int) -> int:
        first = await caller.reply(asked(f"{item} first"))
        if item == 0:
            return item
        await asyncio.sleep(0.5 * item)
        second = await caller.reply(asked(f"{item} second"))
        assert (first.text, second.text) == (f"{item} first", f"{item} second")
        return item

    given: list[int] = []

    async def main() -> None:
        async for item, result in gather_limited(list(range(9)), work, 3):
            assert item == result
            given.append(item)

    with pytest.raises(LLMError, match="refused"):
        run_virtual(main())
    # 0, 1, 2 begin; 0 ends, 3 begins; 1 sends its second, then 2; that of 1 is refused; 3 cannot send any more.
    assert given == [0, 2]
    assert len(backend.sent) == 6
    assert len(backend.finished) == 5


def test_any_other_exception_cancels_the_rest(run_virtual: Any) -> None:
    cancelled: list[int] = []

    async def work(item: int) -> int:
        if item == 1:
            raise ValueError("a bug")
        try:
            await asyncio.sleep(99)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return item

    async def main() -> None:
        async for _ in gather_limited(list(range(3)), work, 3):
            pass

    with pytest.raises(ValueError, match="a bug"):
        run_virtual(main())
    assert cancelled == [0, 2]


def test_gather_all_waits_for_every_call_before_it_raises(run_virtual: Any) -> None:
    ended: list[int] = []

    async def one(i: int) -> int:
        await asyncio.sleep(i)
        ended.append(i)
        if i == 1:
            raise LLMError("refused")
        return i

    assert run_virtual(gather_all([one(0), one(2)])) == [0, 2]
    with pytest.raises(LLMError):
        run_virtual(gather_all([one(1), one(3)]))
    assert ended == [0, 2, 1, 3]


# -- made from a name -------------------------------------------------------------------------------------------------


def test_a_client_comes_with_everything_around_it(tmp_path: Path) -> None:
    config = LLMConfig(temperature=0.5, budget_tokens=10, requests_per_minute=3)
    client = client_from_spec("http://127.0.0.1:9#toy", config, folder=tmp_path, cache=tmp_path / "kept" / "replies.db")
    assert isinstance(client, Caller)
    assert (client.name, client.temperature) == ("http://127.0.0.1:9#toy", 0.5)
    assert not (tmp_path / "ledger.db").exists()  # made when something is spent
    assert (tmp_path / "kept" / "replies.db").is_file()
    with pytest.raises(BudgetError):
        asyncio.run(client.reply(asked()))
    client.end()


def test_without_kept_replies_no_file_is_made(tmp_path: Path) -> None:
    config = LLMConfig(reply_cache=False)
    client = client_from_spec("http://127.0.0.1:9#toy", config, cache=tmp_path / "replies.db")
    assert client is not None
    client.end()
    assert list(tmp_path.iterdir()) == []


def test_a_budget_in_dollars_needs_a_price(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prices.*budget_tokens"):
        client_from_spec("http://127.0.0.1:9#toy", LLMConfig(budget=5.0), cache=tmp_path / "replies.db")
    (tmp_path / "prices.yaml").write_text("toy: {input: 1.0, output: 2.0}\n")
    config = LLMConfig(budget=5.0, prices=str(tmp_path / "prices.yaml"))
    client = client_from_spec("http://127.0.0.1:9#toy", config, cache=tmp_path / "replies.db")
    assert client is not None
    client.end()


@pytest.mark.parametrize("spec", ["gpt", "hf/", "vllm/", "openai/"])
def test_unknown_names_are_refused_with_the_known_forms(spec: str) -> None:
    with pytest.raises(InputError, match="hf/MODEL"):
        client_from_spec(spec, LLMConfig())


def test_models_of_this_process_take_no_batch_files() -> None:
    with pytest.raises(ConfigError, match="this process"):
        client_from_spec("hf/toy", LLMConfig(batch=True))
