"""The processes of one command, started by torchrun or `accelerate launch`: their ranks, and which of them reports."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from chaindiff.io.errors import UserError
from chaindiff.io.files import read_whole

if TYPE_CHECKING:
    from accelerate import PartialState

# The others wait while one process fits, draws or finishes its share. If a process dies, they do not go on waiting:
# the launcher terminates them all.
PATIENCE = timedelta(days=7)
MOMENT = 2.0  # seconds that a command waits for another one to finish with a run's directory

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


def from_main(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; the others wait for it."""
    state = processes()
    if state.num_processes == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [make() if state.is_main_process else None]
    return broadcast_object_list(found)[0]


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other commands from writing to a run's directory; of several processes, the first holds the lock for all.

    Raises UserError, naming the process that holds it. Readers take no lock.
    """
    state = processes()
    with _locked(folder) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path, made = folder / ".lock", [place for place in (folder, *folder.parents) if not place.exists()]
    lock, held, busy = FileLock(path), "", None
    try:
        lock.acquire(timeout=MOMENT)
        with suppress(OSError):  # a full disk: the lock holds without it
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        busy = error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        busy = error if path.exists() else None  # somebody else's; else nothing can be written here, locked or not
    if busy is not None:
        with suppress(OSError):
            held = read_whole(path).decode(errors="replace")[:200]
        raise UserError(
            f"{folder} is in use by {held or 'another process'}",
            hint="wait until it has finished, or choose another folder with --out",
        ) from busy
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                path.unlink()  # before the release: whoever opened it meanwhile sees that it is gone, and tries again
            lock.release()
        for place in made:
            with suppress(OSError):  # only what is still empty: a refused request leaves nothing
                place.rmdir()


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
