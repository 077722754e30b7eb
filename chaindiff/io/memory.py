"""Out-of-memory errors: what was being done, and how to need less memory. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# What torch says on a CPU, on a GPU, and of a GPU on the host. Its CPU allocator raises no class of its own.
_FULL = ("can't allocate memory", "not enough memory", "out of memory")
_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def full(error: BaseException) -> bool:
    """Whether the host's or a GPU's memory was exhausted."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


@contextmanager
def noted(*notes: str) -> Iterator[None]:
    """Adds notes (PEP 678) to an out-of-memory error; tracebacks and `told` show them."""
    try:
        yield
    except Exception as error:
        if full(error):
            for note in notes:
                error.add_note(note)
        raise


def told(error: BaseException) -> str:
    """The error as a message for people."""
    whose = "the GPU's memory" if type(error).__name__ == "OutOfMemoryError" else "the memory"
    asked = _ASKED.search(str(error))
    notes = getattr(error, "__notes__", None) or ["lower --batch, train.batch or the size of the network"]
    return "\n  ".join([f"{whose} is full{f' (another {asked[1]} were requested)' if asked else ''}", *notes])
