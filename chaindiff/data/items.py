"""Any map-style dataset as data, with the interface that training and evaluation use for images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from chaindiff.data.images import ImageData, square
from chaindiff.encoders.resize import resize
from chaindiff.io.errors import UserError, did_you_mean

LOOKED_AT = 16  # items inspected for the fingerprint and the resolution, spread over the set
GREY = (0.299, 0.587, 0.114)  # of red, green and blue
ROUNDING = 1e-3  # how far a float image may leave [-1, 1]


class Items:
    """Items of a dataset (len, getitem -> mapping of names to values), or columns {name: [rows, ...]}, as data.

    A value is an image (a tensor [c, h, w], uint8 or float in [-1, 1]; a PIL image; an array [h, w, c] of uint8), a
    label (int or text), a text, or numbers of one shape in every item. `image` names the entry that holds the chain's
    image, by default "image". An item's `name`, if it has one, is the key by which its augmentation is drawn; otherwise
    that is its row number. An item must be the same at every access.
    """

    def __init__(self, dataset: Any, image: str = "image", name: str = "items"):
        self._dataset, self._name = dataset, name
        self._columns: dict[str, Sequence[Any]] = dict(dataset) if isinstance(dataset, Mapping) else {}
        self._seen: dict[str, list[Any]] = {}
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            message = f"{name}: {type(dataset).__name__} is not a map-style dataset: it needs len(...) and [row]"
            raise UserError(message, hint="turn an iterable dataset into a list of its items first")
        lengths = {column: len(values) for column, values in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{name}: expected columns of equal length, not {lengths}")
        self._rows = next(iter(lengths.values()), 0) if isinstance(dataset, Mapping) else len(dataset)
        if not self._rows:
            raise UserError(f"{name}: there are no items")
        self._entries = list(self._columns or self._item(0))
        self.image = image if image in self._entries else "image"

    def __len__(self) -> int:
        return self._rows

    @property
    def fields(self) -> list[str]:
        """What the items hold besides the image and a name."""
        return [entry for entry in self._entries if entry not in (self.image, "name")]

    @cached_property
    def names(self) -> list[str]:
        return self.field("name") if "name" in self._entries else [str(row) for row in range(len(self))]

    @property
    def description(self) -> str:
        size = f" at {self.resolution} x {self.resolution}" if self.image in self._entries else ""
        return f"{self._name}: {len(self)} items{size}"

    @cached_property
    def resolution(self) -> int:
        """Side of the images, after a crop to squares: the smallest of a few items."""
        return min(self._picture(row, None).shape[-1] for row in self._some)

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the class, the name, the length, whole columns of numbers, and a few of other items.

        It keys the cache of embeddings: two sets of one class that differ only in items not inspected need different
        names.
        """
        about = [type(self._dataset).__name__, self._name, len(self), self._entries]
        hashed = hashlib.sha256(json.dumps(about).encode())
        for entry in self._entries:
            column = self._columns.get(entry)
            whole = isinstance(column, Tensor | np.ndarray)
            for value in [column] if whole else [self._value(row, entry) for row in self._some]:
                hashed.update(_bytes(value))
        return hashed.hexdigest()

    @property
    def content(self) -> str:
        """All that the items hold, as far as `digest` looks."""
        return self.digest

    # -- fields

    def field(self, name: str) -> list[str]:
        """One entry of every item as text; a missing value is empty."""
        return ["" if value is None else str(_plain(value)) for value in self._all(name)]

    def categories(self, name: str, size: int = 0) -> tuple[list[str], list[int]]:
        """Class names and the class of every item: integers are used unchanged, texts are numbered in sorted order.

        Integers below `size` are of so many classes.
        """
        values = [_plain(value) for value in self._all(name)]
        for row, value in enumerate(values):
            if not isinstance(value, int | str) or (isinstance(value, int) and value < 0):
                got = f"{value}" if isinstance(value, int | float) else f"of type {type(value).__name__}"
                message = f"{self._at(row)}: '{name}' is not a label: {got}"
                raise UserError(message, hint="expected a text, or a whole number from 0")
        if all(isinstance(value, int) for value in values):
            return [str(number) for number in range(max(max(values) + 1, size))], [int(value) for value in values]
        ordered = sorted({str(value) for value in values})
        place = {value: index for index, value in enumerate(ordered)}
        return ordered, [place[str(value)] for value in values]

    def column(self, name: str) -> Float[Tensor, "rows *shape"]:
        """Numbers of every item. Raises UserError if they differ in shape or are not finite."""
        values = self._all(name)
        if not isinstance(values, Tensor | np.ndarray):
            try:
                tensors = [torch.as_tensor(value) for value in values]
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{self._name}: '{name}' is not made of numbers: {error}") from error
            for row, tensor in enumerate(tensors):
                if tensor.shape != tensors[0].shape:
                    shapes = f"{list(tensor.shape)}, but that of the first item {list(tensors[0].shape)}"
                    raise UserError(f"{self._at(row)}: '{name}' has shape {shapes}")
            values = torch.stack(tensors)
        numbers = torch.as_tensor(values).float()
        if not bool((finite := numbers.reshape(len(self), -1).isfinite().all(1)).all()):
            raise UserError(f"{self._at(int((~finite).nonzero()[0]))}: '{name}' is not finite (NaN or infinity)")
        return numbers

    # -- pixels

    def images(
        self, indices: Sequence[int] | np.ndarray, size: int, channels: int = 3
    ) -> UInt8[Tensor, "n channels size size"]:
        """Images as uint8; smaller ones are enlarged."""
        return ((self.pixels(indices, size, channels) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def pixels(
        self, indices: Sequence[int] | np.ndarray, size: int, channels: int = 3
    ) -> Float[Tensor, "n channels size size"]:
        """Images in [-1, 1]: floats of this size are left unchanged, others are resized with antialiasing.

        Of one channel for grey items, else Rec. 601's grey of RGB, as PIL's.
        """
        pictures = [self._picture(int(row), size) for row in indices]
        found = torch.stack(pictures) if pictures else torch.empty(0, 3, size, size)
        return found if channels != 1 else (found * torch.tensor(GREY)[:, None, None]).sum(1, keepdim=True)

    def _picture(self, row: int, size: int | None) -> Float[Tensor, "3 side side"]:
        """One image, cropped at the centre to a square; of its own size if `size` is None."""
        value = self._value(row, self.image)
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
            value = Image.fromarray(value.squeeze(2) if value.shape[2:] == (1,) else value)
        if isinstance(value, Image.Image):
            try:
                array = np.asarray(square(value, size or min(value.size)))
            except Exception as error:  # PIL reads a file when its pixels are accessed
                raise UserError(f"{self._at(row)}: '{self.image}' is not a readable image: {error}") from error
            return torch.from_numpy(array.transpose(2, 0, 1).copy()).float() / 127.5 - 1
        if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[0] not in (1, 3):
            got = f"of shape {list(value.shape)}" if hasattr(value, "shape") else f"of type {type(value).__name__}"
            hint = "expected a tensor [3, h, w] (or grey, [1, h, w]), an array [h, w, 3] of uint8, or a PIL image"
            raise UserError(f"{self._at(row)}: '{self.image}' is not an image: {got}", hint=hint)
        if value.dtype == torch.uint8:
            image = value.float() / 127.5 - 1
        else:
            image = value.float()
            low, high = image.amin().item(), image.amax().item()
            if not -1 - ROUNDING <= low <= high <= 1 + ROUNDING:  # false for NaN
                numbers = f"holds numbers from {low:g} to {high:g}; images should be in [-1, 1] or uint8"
                raise UserError(f"{self._at(row)}: '{self.image}' {numbers}")
        side = min(image.shape[1:])
        top, left = ((length - side) // 2 for length in image.shape[1:])
        image = image[:, top : top + side, left : left + side].expand(3, side, side)
        kernel = "box" if size and side % size == 0 else "bicubic"
        return image if size in (None, side) else resize(image[None], size, kernel)[0]

    # -- items

    @property
    def _some(self) -> list[int]:
        return np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).round().astype(int)).tolist()

    def _at(self, row: int) -> str:
        return f"{self._name}, item {row}"

    def _item(self, row: int) -> Mapping[str, Any]:
        item = self._dataset[row]
        if not isinstance(item, Mapping):
            hint = "expected a mapping of names to values, such as {'image': ..., 'label': ...}; wrap the dataset"
            raise UserError(f"{self._at(row)} is of type {type(item).__name__}", hint=hint)
        return item

    def _value(self, row: int, entry: str) -> Any:
        if entry in self._columns:
            return self._columns[entry][row]
        item = {} if self._columns else self._item(row)
        if entry not in item:
            raise UserError(f"{self._at(row)} has no '{entry}'{did_you_mean(entry, item or self._columns)}")
        return item[entry]

    def _all(self, entry: str) -> Any:
        """An entry of every item, read from the dataset once."""
        if entry in self._columns:
            return self._columns[entry]
        if entry not in self._seen:
            self._seen[entry] = [self._value(row, entry) for row in range(len(self))]
        return self._seen[entry]


def _plain(value: Any) -> Any:
    """A number of a tensor or an array as Python's own."""
    return value.item() if hasattr(value, "item") and len(value.reshape(-1)) == 1 else value


def _bytes(value: Any) -> bytes:
    """What a fingerprint includes of a value: numbers and plain data themselves, else the type."""
    if isinstance(value, Tensor):
        value = (value.float() if value.is_floating_point() else value).cpu().numpy()
    elif isinstance(value, Image.Image):
        value = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return f"{value.dtype} {value.shape}".encode() + value.tobytes()
    return json.dumps(value, default=lambda other: type(other).__name__).encode()


Data = ImageData | Items
