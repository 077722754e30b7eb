"""Rows of tensors on disk, in shards of a fixed size: missing ones are computed, the others are read in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError


class Shards:
    """`count` rows of named tensors in `folder`: safetensors files of `size` rows, each named after its first row.

    `key` identifies all that the rows depend on but their number. A file that is missing, damaged, of another key or
    has too few rows is computed again, so that interrupted work resumes; one with more rows than needed is used.
    `about` is written beside the key, for readers of a single file.
    """

    def __init__(self, folder: Path, key: str, count: int, size: int = 4096, about: str = ""):
        self.folder, self.key, self.count, self.size, self.about = folder, key, count, size, about

    def __len__(self) -> int:
        return self.count

    def path(self, first: int) -> Path:
        return self.folder / f"{first:06d}.safetensors"

    # -- writing

    def missing(self) -> list[range]:
        """The rows of every missing file."""
        return [rows for rows in _parts(range(self.count), self.size) if not self.holds(rows)]

    def holds(self, rows: range) -> bool:
        """Whether the file of these rows exists and is complete."""
        return self._read(rows) is not None

    def fill(
        self, make: Callable[[range], Mapping[str, Tensor]], batch: int, mine: Sequence[range] | None = None
    ) -> Iterator[tuple[int, int]]:
        """Compute what is missing, `batch` rows at a time, yielding (rows done, rows in all).

        `mine` is this process's share of what is missing; what others compute counts as done. Memory holds one file.
        """
        mine = self.missing() if mine is None else mine
        done = self.count - sum(map(len, mine))
        yield done, self.count
        for rows in mine:
            made = []
            for part in _parts(rows, batch):
                made.append(make(part))
                done += len(part)
                if part.stop == rows.stop:  # rows are safely done once their file is written
                    self.write(rows.start, {name: torch.cat([values[name] for values in made]) for name in made[0]})
                yield done, self.count

    def write(self, first: int, tensors: Mapping[str, Tensor]) -> None:
        """One file of rows, from number `first`."""
        tensorfile.save(self.path(first), tensors, {"identity": f"{self.key} {self.about}".strip()})

    # -- reading

    def __getitem__(self, name: str) -> Stored:
        """The rows of one tensor, read on demand, which raises UserError where they are missing."""
        return Stored(self, name, self.count)

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of the file that holds row `number`, mapped into memory. Raises UserError without it."""
        rows = range(self.count)[number - number % self.size :][: self.size]
        if (tensors := self._read(rows)) is None:
            message = f"{self.folder} is not complete: {self.path(rows.start).name} is missing or damaged"
            raise UserError(message, hint="run the same command again: it computes what is missing")
        return tensors

    def _read(self, rows: range) -> dict[str, Tensor] | None:
        try:
            tensors, metadata = tensorfile.load(self.path(rows.start))
        except UserError:
            return None
        own = metadata.get("identity", "").split(" ")[0] == self.key
        own = own and all(len(tensor) >= len(rows) for tensor in tensors.values())
        return tensors if own else None


class Stored:
    """The first `count` rows of one tensor of `shards`, read on demand, with as much of its interface as metrics need.

    Files are reopened every time: pages that stayed mapped would count as this process's memory.
    """

    device = torch.device("cpu")

    def __init__(self, shards: Shards, name: str, count: int):
        self.shards, self.name, self.count = shards, name, count

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _none(self) -> Tensor:
        return self.shards.read(0)[self.name][:0].clone()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count, *self._none.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self._none.dtype

    def __getitem__(self, which: slice | Sequence[int] | Tensor) -> Tensor:
        """Rows by their numbers, or a slice of them."""
        numbers = np.asarray(range(len(self))[which] if isinstance(which, slice) else which, np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {len(self)}")
        homes, out = numbers // self.shards.size, self._none.new_empty(len(numbers), *self.shape[1:])
        for home in np.unique(homes).tolist():
            here, first = np.flatnonzero(homes == home), home * self.shards.size
            out[here] = self.shards.read(first)[self.name][numbers[here] - first]
        return out

    def split(self, rows: int) -> Iterator[Tensor]:
        """All rows, in chunks of `rows`."""
        return (self[first : first + rows] for first in range(0, len(self), rows))


Vectors = Tensor | Stored


def _parts(rows: range, size: int) -> list[range]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]
