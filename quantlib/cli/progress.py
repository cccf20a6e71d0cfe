"""Progress of the stages: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_SECONDS = 5.0
"""Least time between two plain lines: a log of an hour's run stays readable."""


class Bars:
    """A `quantlib.pipeline.run.Progress` that writes to a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage, self._total, self._done = "", 0, 0
        self._started = self._spoke = self._ticked = self._longest = 0.0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, stage: str, total: int, since: float | None = None) -> None:
        """Begin a stage of `total` steps. A stage with nothing left to do is not shown.

        since: when it really began, on `time.monotonic`, if that was not now.
        """
        self._stage, self._total, self._done = stage, total, 0
        self._spoke = time.monotonic()
        self._started = self._ticked = self._spoke if since is None else since
        self._longest = 0.0
        if total > 0 and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task(stage, total=total, message="")
            self._bar.start()

    def tick(self, message: str = "") -> None:
        """One step is done; `message` says which."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._ticked)
        self._done, self._ticked = self._done + 1, now
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, message=escape(message))
        elif self._done < self._total and now - self._spoke >= LINE_SECONDS:
            self._spoke = now
            which = f" ({message})" if message else ""
            self.say(f"{self._stage}: {self._done} of {self._total}{self._left()}{which}")

    def finish(self) -> None:
        """End the stage, whether all its steps were done or an error stopped it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif 0 < self._total <= self._done:
            self.say(f"{self._stage}: done in {_duration(time.monotonic() - self._started)}")
        self._total = 0

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, markup=False, soft_wrap=True)

    def _left(self) -> str:
        """Without the longest step: an embedding among a hundred linears tells nothing of them."""
        if self._done < 2:
            return ""
        passed = self._ticked - self._started - self._longest
        left = passed / (self._done - 1) * (self._total - self._done)
        return f", about {_duration(left)} left"


def by_stage(bars: Bars) -> Callable[[str, int, int], None]:
    """`bars` as the callback `(stage, done, total)` that `quantlib.evaluation.compare` calls.

    It hears of a stage when its first step is done, so a stage begins where the one before ended.
    """
    current, ended = "", time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal current, ended
        if stage != current:
            bars.start(stage, total, ended)
            current = stage
        bars.tick()
        if done >= total:
            bars.finish()
            current, ended = "", time.monotonic()

    return report


def _bar(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[message]}"),
        console=console,
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 60 else f"{minutes / 60:.1f} h"
