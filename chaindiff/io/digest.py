"""Fingerprints of plain data and of files, by which cached features and trained weights are found."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from chaindiff.io.errors import UserError
from chaindiff.io.files import regular


def fingerprint(value: Any) -> str:
    """sha256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest(value: Any) -> str:
    """A short fingerprint of plain data: weights are identified by it, so it must never change."""
    return fingerprint(value)[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal; it is read again if it may have changed. Raises UserError if that fails."""
    try:
        return _file_digest(path, *unchanged(path.stat()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def unchanged(status: os.stat_result) -> tuple[int, int, int]:
    """Size and times, which differ once a file has changed; unlike mtime, nobody can set ctime back."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@cache
def _file_digest(path: Path, *unchanged: int) -> str:
    with regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
