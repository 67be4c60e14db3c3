"""How the measured processes of `benchmarks/collect.py` are told what to do: one JSON line in, one JSON line out.

Every side lives in a process of its own that stays alive, so that the sides' repeats can be interleaved. This module
is shared by the peer's environment and therefore imports neither torch nor exegete.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, final

ROOT = Path(__file__).parents[1]
RUN = "run"
CHECK = "check"
MEMORY = "memory"


class Side(ABC):
    """One measured side; made once, then asked any number of times."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked, and say how long it took on the clock and on the cores, in seconds."""
        begun, cores = time.perf_counter(), time.process_time()
        found = self.do(request)
        found.setdefault("seconds", time.perf_counter() - begun)
        found.setdefault("cpu_seconds", time.process_time() - cores)
        return found

    @abstractmethod
    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked: ``do`` is run, check (the floor only) or memory, ``depth`` says which hookpoints."""


def serve(make: Any) -> None:
    """Answer requests with the side that ``make`` returns, until the input ends; all other output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        side: Side = make()
    except Exception as error:  # noqa: BLE001 (whatever keeps a side from starting is told to the driver)
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        return
    say({"ready": True})
    for line in sys.stdin:
        try:
            say(side.answer(json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
            raise


def resident_anonymous() -> int:
    """Bytes of RAM this process holds that no file backs: what a growing collection costs."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon")


class SideFailedError(Exception):
    """A side could not be started, or ended."""


@final
class Process:
    """The driver's end of a measured process."""

    def __init__(self, python: Path, module: str, folder: Path, threads: int, log: TextIO) -> None:
        command = [str(python), "-m", f"benchmarks.{module}", str(folder), str(threads)]
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
        if not python.exists():
            raise SideFailedError(f"there is no {python}")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
        )
        self._receive()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        if self._process.stdin is None:
            raise SideFailedError("the process has no input")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended without an answer"}
        if "error" in answer:
            self.close()
            raise SideFailedError(answer["error"])
        return answer


def arguments(given: Sequence[str]) -> tuple[Path, int]:
    """Return the folder and the number of threads a measured process was started with."""
    return Path(given[1]), int(given[2])
