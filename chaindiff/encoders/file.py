"""Precomputed embeddings: rows of a file, one for every image of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chaindiff.encoders.embedding import Embedding
from chaindiff.io.digest import file_digest
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import regular_path, user_path
from chaindiff.specs.recipe import FileSpec

CHUNK = 4096  # rows checked at once
HOW = "rows follow the order of the data's images, or `names` in the metadata of a .safetensors file"


class FileVectors(Embedding):
    """The vectors of a file, which is opened on first use. New images cannot be encoded."""

    spec: FileSpec
    of = ""

    def __init__(self, name: str, spec: FileSpec, shape: Sequence[int], sigma_data: float, kind: str):
        super().__init__(name, spec, shape, sigma_data, kind)
        self.where = f"variables.{name}.encoder.path"
        self.path = user_path(spec.path, self.where)

    def features(self, x: Any) -> Tensor:
        raise UserError(f"'{self.name}' comes from the file {self.path}, which cannot encode anything", self.where)

    @property
    def content(self) -> str:
        """sha256 of the file; empty if it is missing: weights that were trained on it work without it."""
        return file_digest(self.path) if self.path.is_file() else ""

    @cached_property
    def features_identity(self) -> dict[str, Any]:
        return {"kind": "file", "identity": self.spec.called, "content": self.content}

    def rows_of(self, names: Sequence[str]) -> FileFeatures:
        """The vectors of these images. Raises UserError for a file that is missing, damaged or incomplete."""
        if not self.path.is_file():
            hint = "write it (docs/how-to/own-encoder.md shows how), or set `path` to its location"
            raise UserError(f"there is no file {self.path}", self.where, hint)
        try:
            numbers, known = self._numpy() if self.path.suffix == ".npy" else self._safetensors()
        except (SafetensorError, OSError, ValueError, EOFError) as error:
            hint = "expected plain numbers in a .safetensors or .npy file; pickled objects are never read"
            raise UserError(f"{self.path} is not a complete file of numbers: {error}", self.where, hint) from error
        if numbers.ndim != 2:
            shape = list(numbers.shape)
            raise UserError(f"{self.path} holds numbers of shape {shape}; expected [rows, width]", self.where)
        self.check_shape(numbers.shape[1], f"the vectors in {self.path} have")
        features = FileFeatures(numbers, self._order(len(numbers), known, names))
        for number, chunk in enumerate(features.split(CHUNK)):
            if not bool((finite := chunk.isfinite().all(1)).all()):
                name = names[number * CHUNK + int((~finite).nonzero()[0])]
                message = f"the vector of the image '{name}' in {self.path} is not finite (NaN or infinity)"
                raise UserError(message, self.where)
        return features

    def _safetensors(self) -> tuple[Tensor, list[str] | None]:
        with safe_open(regular_path(self.path), "pt") as file:  # its tensors stay mapped when it is closed
            held = list(file.keys())
            only = held[0] if len(held) == 1 else None
            named = next((name for name in ("features", self.name) if name in held), only)
            if named is None:
                tail = did_you_mean(self.name, held)
                raise UserError(f"{self.path} holds no tensor 'features' or '{self.name}'{tail}", self.where)
            metadata, wanted = file.metadata() or {}, self.spec.identity
            if wanted is not None and metadata.get("identity", wanted) != wanted:
                message = f"{self.path} says that it holds '{metadata['identity']}', not '{wanted}'"
                raise UserError(message, self.where, "set `identity` to what the numbers are, or give that file")
            names = metadata.get("names")
            return file.get_tensor(named), None if names is None else self._names(names)

    def _names(self, text: str) -> list[str]:
        names = from_json(text)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"`names` in the metadata of {self.path} is not a JSON list of file names", self.where)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"`names` in the metadata of {self.path} has '{twice[0]}' more than once", self.where)
        return names

    def _numpy(self) -> tuple[Tensor, None]:
        # "c": nothing is written to the file
        array = np.load(regular_path(self.path), mmap_mode="c", allow_pickle=False)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"its dtype is {array.dtype}")
        native = array.dtype in (np.float16, np.float32, np.float64)
        return torch.from_numpy(array if native else array.astype(np.float32)), None

    def _order(self, rows: int, known: list[str] | None, names: Sequence[str]) -> Tensor | None:
        """The row of each image; None if they are in the data's order."""
        counted = "has 1 row" if rows == 1 else f"has {rows} rows"
        if known is None:
            if rows != len(names):
                raise UserError(f"{self.path} {counted}, but the data has {len(names)} images", self.where, HOW)
            return None
        if rows != len(known):
            raise UserError(f"{self.path} {counted}, but its metadata has {len(known)} `names`", self.where)
        place = {name: row for row, name in enumerate(known)}
        if missing := [name for name in names if name not in place]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            such = f"its `names` look like '{known[0]}'" if known else "its `names` are empty"
            raise UserError(f"{self.path} has no row for the image '{missing[0]}'{more}", self.where, such)
        return torch.tensor([place[name] for name in names])


class FileFeatures:
    """Rows of a file by image; every augmented variant of an image has the same one."""

    def __init__(self, numbers: Tensor, order: Tensor | None):
        self.numbers, self.order = numbers, order

    def __len__(self) -> int:
        return len(self.numbers) if self.order is None else len(self.order)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Float[Tensor, "n width"]:
        rows = rows if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.int64)
        return self.numbers[rows if self.order is None else self.order[rows]].float()

    def split(self, rows: int) -> Iterator[Tensor]:
        return (self[first : first + rows] for first in range(0, len(self), rows))
