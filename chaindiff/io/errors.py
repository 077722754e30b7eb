"""Errors for people: where, what, the nearest valid name, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000  # characters of one line of a message: a file's whole text may stand where a name was expected


class UserError(Exception):
    """A mistake in a recipe, on the command line or in data; the command line prints it and exits with status 2."""

    def __init__(self, message: str, where: str | None = None, hint: str | None = None):
        self.message, self.where, self.hint = message, where, hint
        super().__init__(message)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        lines = (f"{text}\n  {self.hint}" if self.hint else text).split("\n")
        return "\n".join(x if len(x) <= LONGEST else f"{x[: LONGEST * 3 // 4]} ... {x[-LONGEST // 4 :]}" for x in lines)


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
