"""Files that are whole or not there, and stay so when the power fails."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from chaindiff.io.errors import UserError

UNWRITABLE = "free some space or choose another folder with --out; the last complete file is untouched"
OURS = re.compile(r"\..+\.[0-9a-f]{16}\.chaindiff")
EARLIER = re.compile(r"\.tmp\w{6}")  # of safetensors' own writer, which earlier versions took; it holds no lock
OLD = 3600  # seconds without a write after which nobody is writing a file any more


@contextmanager
def whole(path: Path, before: Path | None = None, sync: bool = True) -> Iterator[IO[bytes]]:
    """A new file under a temporary name beside `path`, renamed and on the disk at the end; makes the folder.

    What stood there is kept under the name `before`, if one is given. Without `sync` a power failure may damage the
    file: for what is looked into before it counts, and easily made again. Raises UserError if the file cannot be
    written (a full disk, no permission); what stood there before is left as it was.
    """
    try:
        new = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with _temporary(path) as file:
            try:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
                if before is not None and path.exists():
                    os.replace(path, before)
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        for folder in [path.parent, *(made.parent for made in new)] if sync else []:
            _sync(folder)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {path}: a file lies where its folder should be", hint=UNWRITABLE) from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", hint=UNWRITABLE) from error


def _temporary(path: Path) -> IO[bytes]:
    """A file that nobody else has, locked for as long as it is open: its lock ends with the process."""
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(8)}.chaindiff"), "x+b")  # noqa: SIM115
        with suppress(OSError):  # a file system without locks, where nothing is taken for a leftover either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else it was removed before it was locked
            return file
        file.close()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(handle)
    finally:
        os.close(handle)


@cache
def remove_leftovers(folder: Path) -> None:
    """Delete, once per process, what writers that were killed have left in a folder; never a living one's file."""
    for path in folder.glob(".*"):
        ours, earlier = OURS.fullmatch(path.name), EARLIER.fullmatch(path.name)
        if not ours and not earlier:
            continue
        with suppress(OSError):  # gone by now, another user's, in use, or without locks
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                old = os.fstat(handle).st_mtime < time.time() - OLD
                if path.is_file() and (ours or (old and b'"identity":' in os.read(handle, 1 << 16))):
                    path.unlink()
            finally:
                os.close(handle)


def write_whole(path: str | os.PathLike[str], data: bytes | str, sync: bool = True) -> None:
    """Writes a file (text as UTF-8) as `whole` does."""
    with whole(Path(path), sync=sync) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def cache_folder() -> Path:
    """Where what can be made again is kept for all runs: $CHAINDIFF_CACHE, else ~/.cache/chaindiff."""
    return Path(os.environ.get("CHAINDIFF_CACHE", "~/.cache/chaindiff")).expanduser()
