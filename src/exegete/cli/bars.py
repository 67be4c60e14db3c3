"""Progress bars with rates and time left, on a terminal only."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, final

from exegete.progress import Progress, Silent

if TYPE_CHECKING:
    import rich.progress

log = logging.getLogger("exegete")


def progress_for(quiet: int) -> Progress:
    """Return bars on a terminal, timed lines where stderr is no terminal, nothing when quiet."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()


@final
class Bars(Progress):
    """One bar per stage."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def start(self, stage: str, total: int, unit: str) -> None:
        """Open a bar."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.end()
        self._bar = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TaskProgressColumn(text_format="", show_speed=True),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(stage, total=total, unit=unit)

    def advance(self, amount: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)

    def end(self) -> None:
        """Close the bar, leaving it on the screen."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


@final
class Lines(Progress):
    """A line when a stage ends: what, how much, how long."""

    def __init__(self) -> None:
        self._stage: tuple[str, int, str] | None = None
        self._begun = 0.0
        self._done = 0

    def start(self, stage: str, total: int, unit: str) -> None:
        """Note the start."""
        self.end()
        self._stage, self._begun, self._done = (stage, total, unit), time.monotonic(), 0

    def advance(self, amount: int) -> None:
        """Count."""
        self._done += amount

    def end(self) -> None:
        """Write the line."""
        if self._stage is not None:
            stage, total, unit = self._stage
            seconds = time.monotonic() - self._begun
            sys.stderr.write(f"exegete: {stage}: {self._done:,} of {total:,} {unit} in {seconds:.1f} s\n")
        self._stage = None
