"""Features of a set on disk: appended in chunks, resumed at a chunk's end, read when they are asked for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from chaindiff.encoders.base import fingerprint
from chaindiff.evaluation.stored import Stored
from chaindiff.io.errors import UserError


@runtime_checkable
class Embedder(Protocol):
    """What makes a row of `width` numbers of every item of a chunk: an `Extractor` of images, a tower of texts."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def width(self) -> int: ...
    def __call__(self, chunk: Any, /) -> Float[Tensor, "n width"]: ...


@dataclass(frozen=True)
class AsTheyAre:
    """Of vectors, themselves."""

    name: str
    width: int
    identity: str = "as they are"

    def __call__(self, chunk: Float[Tensor, "n width"], /) -> Float[Tensor, "n width"]:
        return chunk.float()


class FeatureStore:
    """What an extractor makes of a set, mostly of images, in `folder`, under a name made of the identities of both.

    `items` identifies the set and its order (a digest of a data set and its split, of a run's samples). Numbers lie
    in one file of little-endian float32, row after row; a note beside it says how many rows are complete, and is
    renamed into place after they are on the disk, so that an interrupted chunk is cut off and made again.
    """

    def __init__(self, folder: Path, extractor: Embedder, items: str):
        self.extractor = extractor
        self.key = fingerprint([extractor.identity, items])
        name = re.sub(r"[^\w.-]+", "_", Path(extractor.name).name)
        self.path = Path(folder) / f"{name}-{self.key[:16]}.f32"
        self._note = self.path.with_suffix(".json")

    def __len__(self) -> int:
        """Complete rows."""
        try:
            note = json.loads(self._note.read_text())
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise UserError(f"not a note of features: {error}", str(self._note), "remove it") from error
        rows = note["rows"]
        there = self.path.stat().st_size if self.path.exists() else 0
        if note["key"] != self.key or note["width"] != self.extractor.width or there < self._bytes(rows):
            hint = "remove both files: they are made again"
            raise UserError("the features are not those that were written", str(self.path), hint)
        return rows

    def _bytes(self, rows: int) -> int:
        return 4 * rows * self.extractor.width

    def fill(self, chunks: Iterable[Any]) -> Iterator[int]:
        """Extract the features of chunks, of images uint8 [n, 3, h, w]; yields the rows done after each chunk.

        `chunks` is the whole set from its beginning: what is done already is passed over without extracting it.
        Memory holds one chunk. Raises UserError for features that are not finite.
        """
        done, seen = len(self), 0
        yield done
        for chunk in chunks:
            seen += len(chunk)
            if seen > done:
                self._append(self.extractor(chunk[len(chunk) - (seen - done) :]), done)
                done = seen
                yield done

    def _append(self, features: Tensor, done: int) -> None:
        if not features.isfinite().all():
            raise UserError(f"the features of '{self.extractor.name}' are not finite")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._note.with_name(f".{self._note.name}.{os.getpid()}.tmp")
        note = {"key": self.key, "rows": done + len(features), "width": self.extractor.width}
        note |= {"extractor": self.extractor.name, "identity": self.extractor.identity}
        try:
            with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
                file.truncate(self._bytes(done))
                file.seek(0, os.SEEK_END)
                file.write(features.cpu().contiguous().numpy().astype("<f4").tobytes())
                file.flush()
                os.fsync(file.fileno())
            temporary.write_text(json.dumps(note))
            os.replace(temporary, self._note)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            hint = "free some space or choose another folder; what is complete is untouched"
            raise UserError(f"cannot write {self.path}: {error}", hint=hint) from error

    def first(self, rows: int) -> Stored:
        """The first rows of those that are complete."""
        return Stored(self.path, min(rows, len(self)), self.extractor.width)

    @property
    def features(self) -> Stored:
        """All complete rows, left on the disk."""
        return self.first(len(self))
