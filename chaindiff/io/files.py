"""Files that are written atomically and survive a power failure, and the paths that people write."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Literal, cast

from chaindiff.io.errors import UserError

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT
TEXT_BYTES = 64 << 20  # of a file that is read whole: JSON, metrics, a picture in a page
UNWRITABLE = "free some space or choose another folder with --out; the last complete file is untouched"
OURS = re.compile(r"\..+\.[0-9a-f]{16}\.chaindiff\.tmp")
EARLIER = re.compile(r"\.tmp\w{6}")  # of safetensors' own writer, which earlier versions used; it takes no lock
OLD = 3600  # seconds without a write after which such a file counts as abandoned


def user_path(path: str | os.PathLike[str], where: str | None = None) -> Path:
    """A path as a person wrote it, with `~` and `~NAME` in full. Raises UserError for one that no file can have."""
    try:
        if b"\0" in os.fsencode(found := Path(path).expanduser()):
            raise ValueError("a zero character")
    except RuntimeError as error:
        raise UserError(f"{path}: the home directory is not known", where, "write the path in full") from error
    except ValueError as error:  # what is not in UTF-8, too
        raise UserError(f"{str(path)!r}: no file has such a name", where, "write the path of the file") from error
    return found


def folder_path(path: str | os.PathLike[str]) -> Path:
    """A folder to write to, as a person wrote it. Raises UserError for no name, and what `user_path` raises."""
    if path == "":
        raise UserError("the folder's name is empty", hint="write its path; a dot is the current folder")
    return user_path(path)


def regular(path: Path, mode: Literal["rb", "ab"] = "rb") -> BufferedIOBase:
    """A regular file, open: a pipe keeps its reader waiting, and a device may have no end.

    What is checked is what was opened, so that nothing can take its place. Raises OSError, as opening it would, for a
    file that is not there, a directory, and everything else.
    """
    with suppress(FileNotFoundError):
        _refuse_others(os.stat(path), path)  # before anything is opened: opening a device may do something
    handle = os.open(path, (os.O_RDONLY if mode == "rb" else APPEND) | os.O_NONBLOCK, 0o666)
    try:
        _refuse_others(os.fstat(handle), path)
        return cast(BufferedIOBase, open(handle, mode))
    except OSError:
        os.close(handle)
        raise


def _refuse_others(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, "it is not a regular file", str(path))


def regular_path(path: Path) -> Path:
    """The path of a regular file, for libraries that open it themselves; raises what `regular` raises."""
    regular(path).close()
    return path


def read_whole(path: Path, most: int = TEXT_BYTES) -> bytes:
    """All of a regular file. Raises OSError for one of more than `most` bytes, and what `regular` raises."""
    with regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(errno.EFBIG, f"it is larger than {most >> 20} MiB", str(path))
        return file.read(size)


@contextmanager
def whole(path: Path, before: Path | None = None, sync: bool = True) -> Iterator[IO[bytes]]:
    """A new file with a temporary name beside `path`; flushed to the disk and renamed at the end. Makes the folder.

    An existing file is kept under the name `before`, if that is given. Without `sync` a power failure may damage the
    new one: for files that are verified when they are read and easily made again. Raises UserError if it cannot be
    written (a full disk, no permission); the existing file is then left as it was.
    """
    if not path.name:  # "", "." and "/"
        raise UserError(f"cannot write {path}: it is a directory", hint="give the name of a file")
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
        raise UserError(f"cannot write {path}: a file is where its folder should be", hint=UNWRITABLE) from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", hint=UNWRITABLE) from error


def _temporary(path: Path) -> IO[bytes]:
    """A new file, locked while it is open: the lock ends with the process, which tells leftovers from live files."""
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(8)}.chaindiff.tmp"), "x+b")  # noqa: SIM115
        with suppress(OSError):  # a file system without locks, where nothing counts as a leftover either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else it was removed before it was locked
            return file
        file.close()


def _sync(folder: Path) -> None:
    with suppress(OSError):  # not every file system can, and not every folder may be read
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@cache
def remove_leftovers(folder: Path) -> None:
    """Delete, once per process, temporary files that killed writers left in a folder; never a live writer's."""
    for path in folder.glob(".*"):
        ours, earlier = OURS.fullmatch(path.name), EARLIER.fullmatch(path.name)
        if not ours and not earlier:
            continue
        with suppress(OSError):  # gone by now, another user's, in use, or without locks
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_file() and (ours or _abandoned(handle)):
                    path.unlink()
            finally:
                os.close(handle)


def _abandoned(handle: int) -> bool:
    """Whether an open file is the beginning of a safetensors file of ours that nobody is writing."""
    old, start = os.fstat(handle).st_mtime < time.time() - OLD, os.read(handle, 1 << 16)
    return old and start[8:].startswith(b'{"__metadata__":') and b'"identity":' in start


def write_whole(path: str | os.PathLike[str], data: bytes | str, sync: bool = True) -> None:
    """Writes a file (text as UTF-8) as `whole` does."""
    with whole(Path(path), sync=sync) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def read_within(folder: Path, path: Path) -> bytes:
    """A regular file below a folder. Raises UserError for a link or a `..` that leads out of it, and for no file."""
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise UserError("is no file of this run, so the page does not show it", str(path), "delete it, or its name")
    return read_whole(path)


def cache_folder() -> Path:
    """The cache that all runs share: $CHAINDIFF_CACHE, else ~/.cache/chaindiff."""
    return user_path(os.environ.get("CHAINDIFF_CACHE", "~/.cache/chaindiff"))
