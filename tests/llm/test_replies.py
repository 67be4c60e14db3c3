"""Kept replies: one payer for a key, nothing stored is paid again, and no file can stop the work."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import InputError
from exegete.files import fault_hook
from exegete.llm import replies
from exegete.llm.leases import Leases
from exegete.llm.replies import KEY_VERSION, ReplyCache, default_cache_path, request_key
from exegete.llm.reply_text import decode_reply, encode_reply
from exegete.types import LLMReply, LLMRequest, TokenLogprob

ASK = LLMRequest(messages=({"role": "user", "content": "hé"},), temperature=0.5, stage="explain")


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def answer(text: str = "yes", **more: Any) -> LLMReply:
    return LLMReply(text=text, finish="stop", prompt_tokens=7, completion_tokens=2, cost=0.5, **more)


def claim(cache: ReplyCache, number: int) -> LLMReply | None:
    return asyncio.run(cache.claim(key(number)))


def store(cache: ReplyCache, number: int, text: str = "yes") -> None:
    assert claim(cache, number) is None
    cache.put(key(number), answer(text))


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[ReplyCache]:
    cache = ReplyCache(path, **options)
    try:
        yield cache
    finally:
        cache.close()


def kill(cache: ReplyCache) -> None:
    """What the kernel does for a killed process: its connection and locks are gone, nothing more is written."""
    if cache._database is not None:
        cache._aside.join()
        cache._database.close()
    if cache._leases is not None:
        cache._leases.close()


# ------------------------------------------------------------------ keys


def test_the_key_is_the_hash_of_canonical_json() -> None:
    text = (
        '{"logprobs":0,"max_tokens":500,"messages":[{"content":"h\\u00e9","role":"user"}],"model":"m",'
        '"prompt":null,"prompt_logprobs":false,"sample_index":0,"schema":null,"seed":null,"stop":[],'
        f'"temperature":0.5,"version":{KEY_VERSION}}}'
    )
    assert request_key("m", ASK) == hashlib.sha256(text.encode()).hexdigest()


def test_everything_that_determines_the_output_is_in_the_key() -> None:
    prompt = replace(ASK, messages=(), prompt="hé")
    others = [
        replace(ASK, messages=({"role": "system", "content": "hé"},)),
        replace(ASK, messages=(*ASK.messages, *ASK.messages)),
        prompt,
        replace(prompt, prompt_logprobs=True),
        replace(ASK, temperature=0.0),
        replace(ASK, max_tokens=501),
        replace(ASK, seed=0),
        replace(ASK, sample_index=1),
        replace(ASK, stop=("a",)),
        replace(ASK, stop=("a", "b")),
        replace(ASK, schema={}),
        replace(ASK, schema={"a": (1, 2)}),
        replace(ASK, logprobs=1),
    ]
    keys = [request_key("m", ASK), request_key("n", ASK), *(request_key("m", other) for other in others)]
    assert len(set(keys)) == len(keys)


def test_what_does_not_determine_it_is_not() -> None:
    assert request_key("m", replace(ASK, stage="fuzzing")) == request_key("m", ASK)
    assert request_key("m", replace(ASK, messages=({"content": "hé", "role": "user"},))) == request_key("m", ASK)
    assert request_key("m", replace(ASK, temperature=0)) == request_key("m", replace(ASK, temperature=0.0))
    one, two = replace(ASK, schema={"a": 1, "b": [2]}), replace(ASK, schema={"b": (2,), "a": 1})
    assert request_key("m", one) == request_key("m", two)


# ------------------------------------------------------------------ keeping


def test_a_reply_comes_back_as_it_was_and_free(tmp_path: Path) -> None:
    logprobs = (
        TokenLogprob(token="日", logprob=-0.1, alternatives={"a": -math.inf, "\ud800": -2}),
        TokenLogprob(token="", logprob=None),
    )
    reply = answer("né\ud800\0", cached_tokens=3, logprobs=logprobs, prompt_logprobs=())
    with opened(tmp_path / "new" / "folder" / "replies.db") as cache:
        assert claim(cache, 1) is None
        cache.put(key(1), reply)
        expected = replace(reply, cached=True, cost=0.0)
        assert claim(cache, 1) == expected
    with opened(tmp_path / "new" / "folder" / "replies.db") as cache:
        assert claim(cache, 1) == expected


@given(
    st.text(), st.none() | st.integers(0, 10**12), st.lists(st.tuples(st.text(), st.none() | st.floats(max_value=0)))
)
def test_any_reply_survives_the_text_it_is_kept_as(text: str, count: int | None, tokens: list[Any]) -> None:
    logprobs = tuple(TokenLogprob(token=t, logprob=p, alternatives={} if p is None else {t: p}) for t, p in tokens)
    reply = LLMReply(text=text, finish="stop", prompt_tokens=count, cached=True, cost=0.0, logprobs=logprobs)
    assert decode_reply(encode_reply(reply)) == reply


def test_only_whole_replies_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path / "replies.db") as cache:
        for number, finish in enumerate(("length", "refused", "error")):
            assert claim(cache, number) is None
            text = None if finish == "error" else "x"
            cache.put(key(number), LLMReply(text=text, finish=finish))  # type: ignore[arg-type]
            assert claim(cache, number) is None
            cache.release(key(number))


def test_the_first_of_two_replies_stays(tmp_path: Path) -> None:
    with opened(tmp_path / "replies.db") as cache:
        store(cache, 1, "first")
        cache.put(key(1), answer("second"))
        reply = claim(cache, 1)
        assert reply is not None
        assert reply.text == "first"


# ------------------------------------------------------------------ one payer


def test_of_many_tasks_one_pays(tmp_path: Path) -> None:
    paid: list[int] = []

    async def one(cache: ReplyCache, number: int) -> LLMReply:
        kept = await cache.claim(key(number))
        if kept is not None:
            return kept
        paid.append(number)
        await asyncio.sleep(0.01)
        cache.put(key(number), answer(str(number)))
        return answer(str(number))

    async def main() -> None:
        numbers = [n % 10 for n in range(200)]
        got = await asyncio.gather(*(one(caches[n % 2], number) for n, number in enumerate(numbers)))
        assert [reply.text for reply in got] == [str(number) for number in numbers]

    with opened(tmp_path / "replies.db") as first, opened(tmp_path / "replies.db") as second:
        caches = (first, second)
        asyncio.run(main())
    assert sorted(paid) == list(range(10))


def test_when_the_payer_fails_the_next_one_pays(tmp_path: Path) -> None:
    tries: list[int] = []

    async def one(cache: ReplyCache, number: int) -> bool:
        if await cache.claim(key(0)) is not None:
            return True
        tries.append(number)
        await asyncio.sleep(0.005)
        if len(tries) < 3:
            cache.release(key(0))
            return False
        cache.put(key(0), answer())
        return True

    async def main() -> list[bool]:
        return await asyncio.gather(*(one(cache, n) for n in range(6)))

    with opened(tmp_path / "replies.db") as cache:
        assert sum(asyncio.run(main())) == 4
    assert len(tries) == 3


def test_a_task_cancelled_while_it_waits_leaves_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        assert await cache.claim(key(0)) is None
        waiting = asyncio.ensure_future(cache.claim(key(0)))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        cache.release(key(0))
        assert await cache.claim(key(0)) is None

    with opened(tmp_path / "replies.db") as cache:
        asyncio.run(main())


def test_closing_gives_leases_back(tmp_path: Path) -> None:
    with opened(tmp_path / "replies.db") as other:
        with opened(tmp_path / "replies.db") as cache:
            assert claim(cache, 0) is None
        assert claim(other, 0) is None


def test_patience_ends(tmp_path: Path) -> None:
    now = iter(range(0, 10**6, 40))
    with opened(tmp_path / "replies.db") as holder, opened(tmp_path / "replies.db", patience=100) as cache:
        assert claim(holder, 0) is None
        cache._clock = lambda: float(next(now))
        assert claim(cache, 0) is None
        cache.put(key(0), answer())
        assert claim(holder, 0) is not None


_PAYER = """
import asyncio, hashlib, os, random, sys
from pathlib import Path
from exegete.llm.replies import ReplyCache
from exegete.llm.reply_text import decode_reply, encode_reply
from exegete.types import LLMReply

path, seed, n = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
key = lambda i: hashlib.sha256(str(i).encode()).hexdigest()

async def one(cache, i):
    if await cache.claim(key(i)) is None:
        os.write(1, b"paid %d\\n" % i)
        await asyncio.sleep(0.0005 * (i % 4))
        cache.put(key(i), LLMReply(text=str(i), finish="stop"))
        os.write(1, b"stored %d\\n" % i)

async def main():
    cache = ReplyCache(path)
    os.write(1, b"ready\\n")
    sys.stdin.readline()
    order = list(range(n))
    random.Random(seed).shuffle(order)
    gate = asyncio.Semaphore(8)
    async def limited(i):
        async with gate:
            await one(cache, i)
    await asyncio.gather(*(limited(i) for i in order))
    cache.close()

asyncio.run(main())
"""


def payer(path: Path, seed: int, n: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _PAYER, str(path), str(seed), str(n)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def begin(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()


def lines(process: subprocess.Popen[bytes]) -> list[str]:
    assert process.stdout is not None
    with process.stdout as stream:
        said = stream.read().decode().splitlines()
    process.wait()
    return said


def test_of_three_processes_one_pays(tmp_path: Path) -> None:
    processes = [payer(tmp_path / "replies.db", seed, 120) for seed in range(3)]
    for process in processes:
        begin(process)
    paid = [int(line.split()[1]) for process in processes for line in lines(process) if line.startswith("paid")]
    assert sorted(paid) == list(range(120))
    assert all(process.returncode == 0 for process in processes)


def test_real_kills_at_random_moments(tmp_path: Path) -> None:
    draw, stored = random.Random(3), set[int]()
    for attempt in range(3):
        process = payer(tmp_path / "replies.db", attempt, 4000)
        begin(process)
        assert process.stdout is not None
        first = [process.stdout.readline().decode() for _ in range(draw.randint(1, 400))]
        time.sleep(draw.uniform(0, 0.01))
        os.kill(process.pid, signal.SIGKILL)
        said = first + lines(process)
        assert not stored & {int(line.split()[1]) for line in said if line.startswith("paid")}
        stored |= {int(line.split()[1]) for line in said if line.startswith("stored")}
    assert stored
    with opened(tmp_path / "replies.db") as cache:
        for number in stored:
            reply = claim(cache, number)
            assert reply is not None
            assert reply.text == str(number)


_HOLDER = """
import asyncio, sys
from pathlib import Path
from exegete.llm.replies import ReplyCache
cache = ReplyCache(Path(sys.argv[1]))
assert asyncio.run(cache.claim(sys.argv[2])) is None
print("held", flush=True)
sys.stdin.readline()
"""


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "replies.db"), key(0)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"held\n"

    async def main() -> None:
        waiting = asyncio.ensure_future(cache.claim(key(0)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert await asyncio.wait_for(waiting, 30) is None

    with opened(tmp_path / "replies.db") as cache:
        asyncio.run(main())
    process.stdin.close()
    process.stdout.close()


def test_leases_are_shared_by_nobody(tmp_path: Path) -> None:
    one, two = Leases(tmp_path / "lock"), Leases(tmp_path / "lock")
    assert one.take(key(0))
    assert not one.take(key(0))
    assert not two.take(key(0))
    two.drop(key(0))  # not its own
    assert not two.take(key(0))
    assert two.take(key(1))
    one.drop(key(0))
    assert two.take(key(0))
    assert one.share()
    assert not one.alone()
    two.close()
    assert one.take(key(0))
    assert one.alone()
    one.close()


# ------------------------------------------------------------------ stops


class Killed(BaseException):
    pass


def test_after_a_stop_at_every_point_nothing_stored_is_paid_again(tmp_path: Path) -> None:
    names: list[str] = []
    point = stopped = 1
    while stopped:
        path, stored, stopped, passed = tmp_path / f"{point}" / "replies.db", list[int](), 0, 0

        def hook(name: str, last: int = point) -> None:
            nonlocal passed
            passed += 1
            names.append(name)
            if passed == last:
                raise Killed(name)

        cache: ReplyCache | None = None
        try:
            with fault_hook(hook):
                cache = ReplyCache(path)
                for number in range(3):
                    store(cache, number)
                    stored.append(number)
        except Killed:
            stopped = 1
        if cache is not None:
            kill(cache)
        with opened(path) as again:
            for number in range(3):
                if claim(again, number) is None:
                    assert number not in stored
                    again.put(key(number), answer())
        point += 1
    assert set(names) == {
        "before commit replies", "after commit replies", "lease taken", "before commit reply", "after commit reply"
    }  # fmt: skip


# ------------------------------------------------------------------ files that do not do as they should


def test_while_another_process_writes_a_reply_waits_in_memory_with_its_lease(tmp_path: Path) -> None:
    path = tmp_path / "replies.db"
    with opened(path) as cache, opened(path) as other:
        store(cache, 0)
        cache._aside.join()
        assert claim(cache, 1) is None
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        cache.put(key(1), answer("paid"))
        cache.release(key(1))  # as a caller does at its end: the lease is kept until the reply is stored
        assert claim(cache, 1) is not None
        other._patience = -1.0  # look once
        assert not other._leases.take(key(1))  # type: ignore[union-attr]
        lock.execute("ROLLBACK")
        lock.close()
        cache._retry_at = -math.inf
        store(cache, 2)
        reply = claim(other, 1)
        assert reply is not None
        assert reply.text == "paid"


@pytest.mark.parametrize("locked", [3, 10**6])
def test_a_file_that_stays_locked_is_gone_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: int
) -> None:
    monkeypatch.setattr(replies, "_POLL", (0.0, 0.0))
    looks = 0

    def find(_: str) -> LLMReply | None:
        nonlocal looks
        looks += 1
        if looks <= locked:
            raise sqlite3.OperationalError("locked")
        return answer()

    with opened(tmp_path / "replies.db") as cache:
        monkeypatch.setattr(cache, "_find", find)
        assert (claim(cache, 0) is None) == (locked > 3)
        assert cache._leases is not None
        assert cache._leases.take(key(0)) == (locked == 3)


def test_a_reply_too_long_for_the_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MOST_BYTES", 1000)
    with opened(tmp_path / "replies.db") as cache:
        store(cache, 0, "x" * 1000)
        assert claim(cache, 0) is None


def test_what_waits_in_memory_is_stored_on_closing(tmp_path: Path) -> None:
    path = tmp_path / "replies.db"
    cache = ReplyCache(path)
    store(cache, 0)
    cache._aside.join()
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    store(cache, 1)
    lock.execute("ROLLBACK")
    lock.close()
    cache.close()
    with opened(path) as again:
        assert claim(again, 1) is not None


def test_a_full_disk_loses_no_reply_of_this_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "replies.db"
    cache = ReplyCache(path)
    store(cache, 0)
    cache._aside.join()
    assert cache._database is not None
    pages = cache._database.execute("PRAGMA page_count").fetchone()[0]
    cache._database.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(1, 20):
        store(cache, number, "x" * 3000)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "work goes on without" in caplog.text
    assert all(claim(cache, number) is not None for number in range(20))
    with opened(path) as other:
        assert claim(other, 19) is None  # nobody waits for what cannot be stored
    cache._database.execute("PRAGMA max_page_count = 100000")
    cache.close()
    with opened(path) as again:
        assert all(claim(again, number) is not None for number in range(20))


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with opened(tmp_path / "file" / "replies.db") as cache:
        for number in range(3):
            assert claim(cache, number) is None
            cache.put(key(number), answer())
            cache.release(key(number))
        assert cache.evict() == 0
    assert len(caplog.records) == 1
    assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize("kind", ["garbage", "other", "hooked", "cut"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "replies.db"
    if kind == "garbage":
        path.write_bytes(b"no database at all" * 500)
    elif kind == "other":
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE replies (x)")
        database.close()
    else:
        with opened(path) as cache:
            store(cache, 0)
        if kind == "hooked":
            with sqlite3.connect(path) as database:
                database.execute("CREATE TRIGGER t AFTER INSERT ON replies BEGIN DELETE FROM replies; END")
            database.close()
        else:
            path.write_bytes(path.read_bytes()[:100] + b"\xff" * 8000)
    before = path.read_bytes()
    (tmp_path / "replies.db.damaged-1").write_text("an earlier one")
    with opened(path) as cache:
        store(cache, 1)
        assert claim(cache, 1) is not None
    assert len(caplog.records) == 1
    assert "set aside" in caplog.text
    assert (tmp_path / "replies.db.damaged-2").read_bytes() == before


def test_a_damaged_file_that_another_uses_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "replies.db"
    path.write_bytes(b"no database at all" * 500)
    user = Leases(tmp_path / "replies.db.lock")
    assert user.share()
    with opened(path) as cache:
        assert claim(cache, 0) is None
        cache.put(key(0), answer())
    assert path.read_bytes() == b"no database at all" * 500
    assert not list(tmp_path.glob("*damaged*"))
    assert len(caplog.records) == 1
    user.close()


def test_a_newer_format_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "replies.db"
    with opened(path) as cache:
        store(cache, 0)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with opened(path) as cache:
        assert claim(cache, 0) is None
    assert "upgrade exegete" in caplog.text
    assert [p.name for p in tmp_path.iterdir() if "damaged" in p.name] == []


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "[" * 100_000, '{"text":1}', b"\xff",
        '{"text":"a","prompt_tokens":-1,"cached_tokens":0,"completion_tokens":1,"logprobs":null,"prompt_logprobs":null}',
        '{"text":"a","prompt_tokens":1,"cached_tokens":0,"completion_tokens":true,"logprobs":null,"prompt_logprobs":null}',
        '{"text":"a","prompt_tokens":1,"cached_tokens":0,"completion_tokens":1,"logprobs":[["a"]],"prompt_logprobs":null}',
        '{"text":"a","prompt_tokens":1,"cached_tokens":0,"completion_tokens":1,"logprobs":[["a","b",{}]],'
        '"prompt_logprobs":null}',
    ],
)  # fmt: skip
def test_a_damaged_reply_is_asked_for_again(
    tmp_path: Path, text: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "replies.db"
    with opened(path) as cache:
        store(cache, 0)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE replies SET reply = ?", (text,))
    database.close()
    with opened(path) as cache:
        store(cache, 0, "again")
        reply = claim(cache, 0)
        assert reply is not None
        assert reply.text == "again"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("seed", range(6))
def test_a_file_damaged_anywhere_stops_nothing(tmp_path: Path, seed: int) -> None:
    path, draw = tmp_path / "replies.db", random.Random(seed)
    with opened(path) as cache:
        for number in range(100):
            store(cache, number, "x" * 500)
    data = bytearray(path.read_bytes())
    for _ in range(12):
        place = draw.randrange(len(data))
        data[place : place + 300] = draw.randbytes(300)[: len(data) - place]
    path.write_bytes(data)
    with opened(path) as cache:
        for number in range(100):
            if claim(cache, number) is None:
                cache.put(key(number), answer())
        cache.evict()


# ------------------------------------------------------------------ forgetting


def in_file(path: Path) -> set[bytes]:
    with sqlite3.connect(path) as database:
        rows = {row[0] for row in database.execute("SELECT key FROM replies")}
    database.close()
    return rows


def test_too_many_bytes_forget_the_longest_unused(tmp_path: Path) -> None:
    path, now = tmp_path / "replies.db", [0.0]
    with opened(path, clock=lambda: now[0]) as cache:
        for number in range(600):
            now[0] += 10_000
            store(cache, number, "x" * 4000)
        for number in range(5):
            assert claim(cache, number) is not None
        cache._max_bytes = 1_000_000
        forgotten = cache.evict()
        assert 300 <= forgotten < 600
        assert all(claim(cache, number) is not None for number in [*range(5), *range(forgotten + 5, 600)])
    assert in_file(path) == {bytes.fromhex(key(n)) for n in [*range(5), *range(forgotten + 5, 600)]}
    assert path.stat().st_size <= 1_000_000


def test_what_lies_unused_too_long_is_forgotten(tmp_path: Path) -> None:
    path, now = tmp_path / "replies.db", [0.0]
    with opened(path, max_days=2, clock=lambda: now[0]) as cache:
        for number in range(4):
            store(cache, number)
            cache._aside.join()
            now[0] += 86_400 * 0.4
        assert claim(cache, 0) is not None  # used now
        now[0] += 86_400 * 1.0
        assert cache.evict() == 1
    assert in_file(path) == {bytes.fromhex(key(n)) for n in (0, 2, 3)}


def test_others_write_while_old_replies_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "replies.db"
    with opened(path) as cache, opened(path) as other:
        for number in range(600):
            store(cache, number, "x" * 1000)
        cache._aside.join()
        written: list[int] = []

        def pause(_: float) -> None:
            store(other, 1000 + len(written))
            assert not other._pending
            written.append(1)

        assert other._database is not None
        other._stored = 1  # no thread of its own
        other._database.execute("PRAGMA busy_timeout = 0")
        monkeypatch.setattr(time, "sleep", pause)
        cache._max_bytes = 100_000
        assert cache.evict() >= 256
        assert len(written) >= 2


def test_a_long_run_forgets_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_TIDY", 32)
    monkeypatch.setattr(replies, "_STEP", 8)
    path = tmp_path / "replies.db"
    with opened(path, max_bytes=400_000) as cache:
        for number in range(400):
            store(cache, number, "x" * 4000)
            if number % 32 == 31:
                cache._aside.join()
    assert 20 < len(in_file(path)) < 200


# ------------------------------------------------------------------ where


def test_where_replies_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EXEGETE_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_path() == tmp_path / ".cache" / "exegete" / "replies.db"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_path() == tmp_path / ".cache" / "exegete" / "replies.db"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_path() == tmp_path / "xdg" / "exegete" / "replies.db"
    monkeypatch.setenv("EXEGETE_CACHE", str(tmp_path / "own"))
    assert default_cache_path() == tmp_path / "own" / "replies.db"
    with opened(default_cache_path()) as cache:
        store(cache, 0)
    assert (tmp_path / "own").stat().st_mode & 0o077 == 0


def test_without_a_home_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    for name in ("EXEGETE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match="EXEGETE_CACHE"):
        default_cache_path()
