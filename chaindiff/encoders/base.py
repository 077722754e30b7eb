"""What every encoder offers: values of a variable, and what says how its features come about."""

from __future__ import annotations

import hashlib
import json
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import Tensor


def fingerprint(plain: Any) -> str:
    """sha256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal; it is read again if its size or time has changed."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Encoder:
    """A deterministic map from the variable `of` to the variable `name`: value = scale(features(x)).

    The features of expensive encoders are kept, under their `features_identity`; `scale` reduces and standardises them.
    """

    name: str
    of: str

    def features(self, x: Any) -> Tensor:
        raise NotImplementedError

    def scale(self, features: Tensor) -> Tensor:
        return features

    def __call__(self, x: Any) -> Tensor:
        return self.scale(self.features(x))

    @cached_property
    def features_identity(self) -> dict[str, Any]:
        """What the features are: the kind of encoder, its weights and its preprocessing; never its name in a recipe."""
        return {}
