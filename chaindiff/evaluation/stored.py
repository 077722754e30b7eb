"""Rows of numbers that stay on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Stored:
    """Rows of little-endian float32 in a file, read when they are asked for: as much of a tensor as metrics need.

    `len`, `shape`, slices without a step, rows by their numbers, and `split`. A memory map would be read as lazily, but
    its pages are counted as the process's memory until the system wants them back.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, path: Path, rows: int, width: int):
        self.path, self.shape = path, torch.Size((rows, width))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | Int64[Tensor, " some"]) -> Float[Tensor, "some width"]:
        width = self.shape[1]
        if isinstance(which, slice):
            first, end, step = which.indices(len(self))
            if step != 1:
                raise ValueError("stored rows are sliced without a step")
            if end <= first:
                return torch.empty(0, width)
            part = np.fromfile(self.path, "<f4", count=(end - first) * width, offset=4 * first * width)
            return torch.from_numpy(part.reshape(end - first, width))
        some = np.empty((len(which), width), "<f4")
        if some.size:
            with open(self.path, "rb", buffering=0) as file:
                for row, number in zip(some, which.tolist(), strict=True):
                    file.seek(4 * number * width)
                    file.readinto(row.data)
        return torch.from_numpy(some)

    def split(self, rows: int) -> Iterator[Float[Tensor, "_ width"]]:
        """All rows, so many at a time."""
        for first in range(0, len(self), rows):
            yield self[first : first + rows]


Vectors = Tensor | Stored
