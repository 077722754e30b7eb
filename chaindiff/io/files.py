"""Files that are written atomically, and the paths that people write."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaindiff.io.errors import UserError

UNWRITABLE = "free some space or choose another folder with --out; the last complete file is untouched"


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


def regular(path: Path) -> Path:
    """A path that leads to a regular file: a pipe keeps its reader waiting, and a device may have no end.

    Raises OSError, as opening it would, for a file that is not there, a directory, and everything else.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "it is not a regular file", str(path))
    return path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside a file, renamed to it at the end; creates the folder if needed.

    Raises UserError if it cannot be written (a full disk, no permission); an existing file is left untouched.
    """
    if not path.name:  # "", "." and "/"
        raise UserError(f"cannot write {path}: it is a directory", hint="give the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {path}: a file is where its folder should be", hint=UNWRITABLE) from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", hint=UNWRITABLE) from error


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file (text as UTF-8) as `whole` does."""
    with whole(Path(path)) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def read_within(folder: Path, path: Path) -> bytes:
    """A regular file below a folder. Raises UserError for a link or a `..` that leads out of it, and for no file."""
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise UserError("is no file of this run, so the page does not show it", str(path), "delete it, or its name")
    return regular(path).read_bytes()


def cache_folder() -> Path:
    """The cache that all runs share: $CHAINDIFF_CACHE, else ~/.cache/chaindiff."""
    return user_path(os.environ.get("CHAINDIFF_CACHE", "~/.cache/chaindiff"))
