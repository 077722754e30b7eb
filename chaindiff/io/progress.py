"""Progress for people: a bar on a terminal, an occasional line in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chaindiff.io.errors import in_lines

EVERY = 20.0  # seconds between lines where there is no terminal


def say(*texts: str) -> None:
    """Lines for the person at the terminal; nothing when quiet."""
    get_console().print(in_lines(*texts), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing is said, and no bar shown, while this lasts."""
    console = get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


class Bar:
    """Counts up to `total`; `text` is shown beside the bar."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total = title, total
        self.console = get_console()
        self._next, self._text = time.monotonic() + EVERY, ""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        columns = *columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}")
        self._progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._progress.add_task(title, total=total, completed=done, text="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._progress.stop()

    def update(self, done: int, text: str | None = None) -> None:
        self._text = self._text if text is None else text
        self._progress.update(self._task, completed=done, text=self._text)
        if not self.console.is_terminal and (time.monotonic() >= self._next or done >= self.total):
            self._next = time.monotonic() + EVERY
            words = f"{self.title}: {done:,} of {self.total:,}" + (f"; {self._text}" if self._text else "")
            say(words)


def shown(title: str, steps: Iterator[tuple[int, int]]) -> None:
    """Runs steps that yield (done, total), with a bar if there is anything to do."""
    done, total = next(steps, (0, 0))
    if done < total:
        with Bar(title, total, done) as bar:
            for done, _ in steps:
                bar.update(done)
