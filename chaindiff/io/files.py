"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from chaindiff.io.errors import UserError

UNWRITABLE = "free some space or choose another folder with --out; the last complete file is untouched"


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file (text as UTF-8) under a temporary name beside it, then renames; makes the folder if need be.

    Raises UserError if it cannot be written (a full disk, no permission); what stood there before is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {path}: a file lies where its folder should be", hint=UNWRITABLE) from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", hint=UNWRITABLE) from error


def cache_folder() -> Path:
    """Where what can be made again is kept for all runs: $CHAINDIFF_CACHE, else ~/.cache/chaindiff."""
    return Path(os.environ.get("CHAINDIFF_CACHE", "~/.cache/chaindiff")).expanduser()
