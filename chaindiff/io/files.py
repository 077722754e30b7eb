"""Files that are written atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaindiff.io.errors import UserError

UNWRITABLE = "free some space or choose another folder with --out; the last complete file is untouched"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside a file, renamed to it at the end; creates the folder if needed.

    Raises UserError if it cannot be written (a full disk, no permission); an existing file is left untouched.
    """
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


def cache_folder() -> Path:
    """The cache that all runs share: $CHAINDIFF_CACHE, else ~/.cache/chaindiff."""
    return Path(os.environ.get("CHAINDIFF_CACHE", "~/.cache/chaindiff")).expanduser()
