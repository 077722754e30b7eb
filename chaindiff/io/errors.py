"""Errors for people: where, what, the nearest valid name, how to fix it."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache

LONGEST = 2000  # characters of one line of a message: a file's whole text may stand where a name was expected

# What moves the cursor, ends a line, colours or reorders a terminal's text, and what cannot be printed at all.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Lines(str):
    """Text that is quoted already, whose line breaks are meant."""


def in_lines(*texts: str) -> Lines:
    """Each text on a line of its own, which nothing in a name can end."""
    return Lines("\n".join(map(quoted, texts)))


def quoted(text: str) -> str:
    """Text that a terminal shows as it is: control characters in names, classes and files as escapes (`\\x1b`)."""
    return (
        text if isinstance(text, Lines) else CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    )


@cache
def note(text: str) -> None:
    """A line for the person, once, that stops nothing; on stderr, for stdout may be read by a program."""
    print(quoted(f"note: {text}"), file=sys.stderr)


class UserError(Exception):
    """A mistake in a recipe, on the command line or in data; the command line prints it and exits with status 2."""

    def __init__(self, message: str, where: str | None = None, hint: str | None = None):
        self.message, self.where, self.hint = quoted(message), where and quoted(where), hint and quoted(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        said = (f"{text}\n  {self.hint}" if self.hint else text).split("\n")
        return "\n".join(x if len(x) <= LONGEST else f"{x[: LONGEST * 3 // 4]} ... {x[-LONGEST // 4 :]}" for x in said)


def some(problems: Sequence[str], most: int) -> str:
    """The first of several problems, and how many more there are."""
    return "; ".join(problems[:most]) + (f"; and {len(problems) - most} more" if len(problems) > most else "")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None if nothing is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A tail for a message: the nearest name, else the known ones."""
    names = list(names)
    close = nearest(name, names)
    if close:
        return f"; did you mean '{close}'?"
    return f"; known: {', '.join(map(str, names))}" if names else ""
