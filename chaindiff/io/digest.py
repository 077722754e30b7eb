"""Fingerprints: of plain data, and of files. What was computed or trained is found again by them."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from chaindiff.io.errors import UserError


def fingerprint(value: Any) -> str:
    """sha256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest(value: Any) -> str:
    """A short fingerprint of plain data: identities of weights are made of it, so it never changes."""
    return fingerprint(value)[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal; it is read again if it may have changed. Raises UserError if that fails."""
    try:
        return _file_digest(path, *unchanged(path.stat()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def unchanged(status: os.stat_result) -> tuple[int, int, int]:
    """What stays as long as a file does: its size and times. That of its change is nobody's to set back."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@cache
def _file_digest(path: Path, *unchanged: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
