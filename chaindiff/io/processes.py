"""The processes of one command, started by torchrun or `accelerate launch`: their ranks, and which of them reports."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

# The others wait while one process fits, draws or finishes its share. If a process dies, they do not go on waiting:
# the launcher terminates them all.
PATIENCE = timedelta(days=7)

T = TypeVar("T")


def processes() -> PartialState:
    """This process among those of the command: `process_index` of `num_processes`, `is_main_process`, and barriers.

    The first call joins the process group; all of them must see the same files. A single process never waits.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def share(missing: list[T]) -> list[T]:
    """This process's part of what is missing; waits until all have looked, before any of them writes."""
    state = processes()
    state.wait_for_everyone()
    return missing[state.process_index :: state.num_processes]


def first_to_fail() -> bool:
    """Whether this process is the first of the command to call this: it alone reports the error.

    Needs no process group, which may be what failed: the launcher keeps a store of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]  (public in its docs)

    address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "29500"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"chaindiff/failed/{attempt}", 1) == 1
    except DistError:
        return True  # better reported twice than not at all
