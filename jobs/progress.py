"""What a person sees while a job runs: live bars on a terminal, plain timed lines elsewhere.

with reporter.task("feedback", total=1000, unit="judgements") as task:
    task.advance(10)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_INTERVAL_S = 15.0


class Task(Protocol):
    """Handle of one piece of long work."""

    def advance(self, amount: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


class _BarTask:
    def __init__(self, progress: Progress, task_id: TaskID) -> None:
        self._progress = progress
        self._id = task_id

    def advance(self, amount: int = 1) -> None:
        self._progress.advance(self._id, amount)

    def note(self, text: str) -> None:
        self._progress.update(self._id, note=text)


class _PlainTask:
    """Prints at most one line per interval, so that a log file stays readable."""

    def __init__(self, reporter: Reporter, label: str, total: int | None, unit: str) -> None:
        self._reporter = reporter
        self._label = label
        self._total = total
        self._unit = unit
        self._done = 0
        self._note = ""
        self._started = self._printed = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            self._reporter.line(self._describe(now))

    def note(self, text: str) -> None:
        self._note = text

    def _describe(self, now: float) -> str:
        elapsed = max(now - self._started, 1e-9)
        rate = max(self._done, 0) / elapsed
        text = f"  {self._label}: {self._done}"
        if self._total:
            text += f"/{self._total} {self._unit}, {rate:.1f}/s"
            if rate > 0:
                text += f", about {(self._total - self._done) / rate:.0f} s left"
        else:
            text += f" {self._unit}, {rate:.1f}/s"
        return text + (f" ({self._note})" if self._note else "")

    def summary(self) -> str:
        elapsed = time.monotonic() - self._started
        return f"  {self._label}: {self._done} {self._unit} in {elapsed:.1f} s"


class Reporter:
    """One per driver. `quiet` leaves errors only."""

    def __init__(self, *, quiet: bool = False, stream_is_terminal: bool | None = None) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() if stream_is_terminal is None else stream_is_terminal
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._started = time.monotonic()

    def line(self, text: str) -> None:
        """One line for the person watching, with the seconds since the start."""
        if not self._quiet:
            seconds = time.monotonic() - self._started
            # One call: arms report from several threads.
            self._console.print(Text.assemble((f"{seconds:6.1f}s ", "dim"), text))

    def result(self, text: str) -> None:
        """What the job is for, on standard output, where a script can read it."""
        if not self._quiet:
            print(text)

    def skipped(self, stage: str) -> None:
        self.line(f"{stage}: up to date, skipped")

    @contextmanager
    def task(self, label: str, *, total: int | None = None, unit: str = "items") -> Iterator[Task]:
        """Shows label, rate and time left while the block runs."""
        if self._quiet or not self._terminal:
            plain = _PlainTask(self, label, total, unit)
            yield plain
            self.line(plain.summary())
            return
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        started = time.monotonic()
        with progress:
            task_id = progress.add_task(label, total=total, note="")
            yield _BarTask(progress, task_id)
            done = int(progress.tasks[0].completed)
        self.line(f"  {label}: {done} {unit} in {time.monotonic() - started:.1f} s")
