"""Image data sets: an indexed sequence of square images with metadata."""

from __future__ import annotations

import io
import posixpath
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from chaindiff.data.metadata import Row, fields, keep, of_folders, read_metadata, values
from chaindiff.data.sources import IMAGES, METADATA, Source, open_source
from chaindiff.io.code import create
from chaindiff.io.digest import fingerprint
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import regular_path
from chaindiff.specs.code import CodeDataSpec
from chaindiff.specs.recipe import Data, DataSpec

if TYPE_CHECKING:
    import torch

    from chaindiff.data.items import Items

MEMORY_BYTES = 1 << 30  # a set smaller than this at one size stays in memory once decoded
HEADERS = 1000  # images inspected to find the resolution


def open_data(spec: Data | str, image: str | None = None, **fields: Any) -> ImageData | Items:
    """The images that a recipe names, in order of their file names, filtered by `where` and `split`.

    In Python a path is enough, with `split` and `where` beside it. User-defined data are what the code returns; items
    of a plain data set hold their picture under the name `image`.
    Raises UserError if the data is missing, has no images, or has invalid metadata.
    """
    if isinstance(spec, str):
        spec = DataSpec(path=spec, **fields)
    if isinstance(spec, CodeDataSpec):
        found = create(spec, where="data")
        if isinstance(found, ImageData):
            return found
        from chaindiff.data.items import Items  # it imports torch

        return Items(found, image or "image")
    source = open_source(spec.path)
    names = source.names()
    rows = read_metadata(source, names)
    if not rows:
        raise UserError("there are no images", str(source.path), "expected .png, .jpg, .webp, ... at any depth")
    if told := len(names) == len(rows):  # there is no metadata
        rows = of_folders(rows)
    rows = keep(rows, spec.where, str(source.path))
    kept = keep(rows, {} if spec.split is None else {"split": spec.split}, str(source.path))
    name = "/".join(filter(None, [posixpath.splitext(source.path.name)[0], spec.split]))
    return ImageData(source, kept, list(rows.values()), name, told)


class ImageData:
    """Images with fields. Row i is the image `names[i]`; the names are sorted.

    Images are cropped at the centre to squares and resized with antialiasing (box for whole-number factors, bicubic
    otherwise, as PIL does it); transparency is composited on white.
    """

    def __init__(
        self, source: Source, rows: dict[str, Row], siblings: Sequence[Row], name: str, by_folder: bool = False
    ):
        self.names, self._by_folder = list(rows), by_folder
        self._source, self._rows, self._siblings, self._name = source, list(rows.values()), siblings, name
        self._memory: dict[
            tuple[int, int], tuple[torch.Tensor, np.ndarray]
        ] = {}  # of a size: images, which are decoded

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_memory": {}}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def description(self) -> str:
        return f"{self._name}: {len(self)} images at {self.resolution} x {self.resolution}"

    @cached_property
    def resolution(self) -> int:
        """Side of the images as stored, after the crop: the smallest of at most 1,000 images, spread over the set."""
        some = np.unique(np.linspace(0, len(self) - 1, HEADERS).round().astype(int))
        return min(min(self._open(index).size) for index in some.tolist())

    @cached_property
    def digest(self) -> str:
        """sha256 over names, sizes and checksums of the images, wherever they are stored."""
        stamps = zip(self.names, self._source.stamps(self.names), strict=True)
        return fingerprint([[name, *stamp] for name, stamp in stamps])

    @cached_property
    def content(self) -> str:
        """sha256 over the images and their fields; what folders say is in the images' names."""
        return fingerprint([self.digest, [{}] * len(self) if self._by_folder else self._rows])

    # -- fields

    @cached_property
    def fields(self) -> list[str]:
        """The names of the metadata's fields."""
        return fields(self._siblings)

    def field(self, name: str) -> list[str]:
        """One field of every image as text: a list's items are joined by commas, a missing value is empty."""
        self._check(name)
        return [", ".join(values(row, name)) for row in self._rows]

    def categories(self, name: str, size: int = 0) -> tuple[list[str], list[int]]:
        """The sorted values of a field (as numbers if they all are), and the position of each image's value.

        The values are those of every split, so that positions mean the same in all of them. Numbers below `size` that
        are fewer are themselves the positions: a subset of so many classes.
        Raises UserError if an image lacks the field.
        """
        self._check(name)
        known = {value for row in self._siblings for value in values(row, name)}
        numbers = all(value.isdecimal() and len(value) < 20 for value in known)
        ordered = sorted(known, key=int) if numbers else sorted(known)
        position = {value: index for index, value in enumerate(ordered)}
        if numbers and len(ordered) < size and int(ordered[-1]) < size:
            ordered, position = [str(number) for number in range(size)], {value: int(value) for value in known}
        for file, row in zip(self.names, self._rows, strict=True):
            if len(values(row, name)) != 1:
                message = f"needs one value of '{name}' to be a label; it has {len(values(row, name))}"
                raise UserError(message, self._source.where(file))
        return ordered, [position[values(row, name)[0]] for row in self._rows]

    def column(self, name: str) -> torch.Tensor:
        """A field that is a list of numbers for every image, [n, numbers]. Raises UserError if it is not."""
        import torch

        try:
            numbers = torch.tensor([row[name] for row in self._rows], dtype=torch.float32).reshape(len(self), -1)
            if bool(numbers.isfinite().all()):
                return numbers
        except (KeyError, TypeError, ValueError, RuntimeError):
            pass
        raise UserError(
            f"the data has no '{name}' that is a list of as many numbers for every image",
            str(self._source.path),
            "an encoder computes it from images or texts, {kind: file} reads it from a file, or dataset.json holds it",
        )

    def _check(self, name: str) -> None:
        if name not in self.fields:
            message = f"the images have no field '{name}'{did_you_mean(name, self.fields)}"
            hint = f"fields come from {' or '.join(sorted(METADATA))} beside the images"
            raise UserError(message, str(self._source.path), hint)

    # -- pixels

    def images(self, indices: Sequence[int] | np.ndarray, size: int, channels: int = 3) -> torch.Tensor:
        """Images as uint8 [n, channels, size, size], in RGB or grey (1); smaller ones are enlarged.

        Raises UserError for an image that cannot be read.
        """
        import torch

        rows = np.asarray(indices, dtype=np.int64)
        if len(self) * channels * size * size > MEMORY_BYTES:
            decoded = [torch.from_numpy(self._decode(index, size, channels)) for index in rows.tolist()]
            return torch.stack(decoded) if decoded else torch.empty(0, channels, size, size, dtype=torch.uint8)
        if (size, channels) not in self._memory:
            empty = torch.empty(len(self), channels, size, size, dtype=torch.uint8)
            self._memory[size, channels] = empty, np.zeros(len(self), dtype=bool)
        memory, known = self._memory[size, channels]
        for index in rows[~known[rows]].tolist():
            memory[index] = torch.from_numpy(self._decode(index, size, channels))
            known[index] = True
        return memory[torch.from_numpy(rows)]

    def pixels(self, indices: Sequence[int] | np.ndarray, size: int, channels: int = 3) -> torch.Tensor:
        """Images in [-1, 1], [n, channels, size, size]."""
        return self.images(indices, size, channels).float() / 127.5 - 1

    def _open(self, index: int) -> Image.Image:
        """The image, its pixels not yet decoded."""
        name = self.names[index]
        content = self._source.read(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused below
                image = open_image(io.BytesIO(content))
        except Exception as error:  # PIL's readers raise whatever the format's parser raises
            raise self._unreadable(name, error) from error
        limit = Image.MAX_IMAGE_PIXELS
        if limit and image.width * image.height > limit:
            raise UserError(
                f"refused: {image.width} x {image.height} pixels; the limit is {limit} in all",
                self._source.where(name),
                "make the image smaller, or remove it (and its row of the metadata)",
            )
        return image

    def _decode(self, index: int, size: int, channels: int = 3) -> UInt8[np.ndarray, "channels size size"]:
        image = self._open(index)
        try:
            pixels = np.asarray(square(image, size, "L" if channels == 1 else "RGB"))
            return pixels.reshape(size, size, channels).transpose(2, 0, 1).copy()
        except Exception as error:
            raise self._unreadable(self.names[index], error) from error

    def _unreadable(self, name: str, error: Exception) -> UserError:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "the format is unknown" if self._source.read(name) else "the file is empty"
        hint = "the file may be truncated: replace it, or remove it (and its row of the metadata)"
        return UserError(f"not a readable image: {reason}", self._source.where(name), hint)


def open_image(file: io.BytesIO | Path) -> Image.Image:
    """An image of a known format, whatever its name says: PIL would start Ghostscript for PostScript. Raises as PIL."""
    return Image.open(regular_path(file) if isinstance(file, Path) else file, formats=sorted({*IMAGES.values()}))


def square(image: Image.Image, size: int, mode: str = "RGB") -> Image.Image:
    """Any image in this mode, of size x size: upright, on white, cropped at the centre, resized with antialiasing.

    Of several frames the first is used. Raises ValueError for pixels without a known range: other than 8 or 16 bits.
    """
    if image.format in ("JPEG", "MPO", "TIFF", "WEBP"):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"its pixels range from {pixels.min()} to {pixels.max()}: expected 8 or 16 bits")
        image = Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side == size:
        return image
    return image.resize((size, size), Image.Resampling.BOX if side % size == 0 else Image.Resampling.BICUBIC)
