"""Fingerprints of plain data and of files, by which cached features and trained weights are found."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any


def fingerprint(value: Any) -> str:
    """sha256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest(value: Any) -> str:
    """A short fingerprint of plain data: weights are identified by it, so it must never change."""
    return fingerprint(value)[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal; it is read again if its size or time has changed."""
    status = path.stat()
    return _file_digest(path, status.st_size, status.st_mtime_ns)


@cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
