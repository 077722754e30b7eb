"""Grids of images, as PNG. The picture of a chain is drawn in `drawing`, which needs no torch."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Num, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from chaindiff.io.errors import UserError
from chaindiff.io.files import write_whole

LINE = 14  # pixels per line of a caption


def to_uint8(x: Num[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to 0..255, rounded and clamped; uint8 is returned unchanged. Raises UserError for NaN or infinity."""
    if x.dtype == torch.uint8:
        return x
    if not bool(torch.isfinite(x).all()):
        raise UserError("images have values that are not finite (NaN or infinity)", hint="the model may have diverged")
    return ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_image(x: Num[Tensor, "channels height width"]) -> Image.Image:
    """One image in [-1, 1] or of 8 bits, RGB or grey."""
    shape = "1 h w -> h w" if len(x) == 1 else "c h w -> h w c"
    return Image.fromarray(rearrange(to_uint8(x), shape).cpu().numpy())


def grid(
    images: Float[Tensor, "n channels height width"],
    columns: int | None = None,
    scale: int | None = None,
    pad: int = 2,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Images in [-1, 1] in rows, with a white gap of `pad` pixels around each, and `captions` under them if any.

    `columns`: about as many as rows by default. `scale`: each pixel becomes scale x scale; by default images smaller
    than 64 (or 96, with captions) are enlarged to at least that. Raises UserError if there are no images.
    """
    if len(images) == 0:
        raise UserError("a grid needs at least one image")
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    scale = scale or max(1, math.ceil((96 if captions else 64) / max(height, width)))
    rows = math.ceil(count / columns)
    texts = [_wrapped(caption, width * scale) for caption in captions]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    tiles = repeat(to_uint8(images), "n c h w -> n (rgb c) (h y) (w x)", rgb=3 // channels, y=scale, x=scale)
    tiles = F.pad(tiles, (0, pad, 0, pad + lines * LINE, 0, 0, 0, rows * columns - count), value=255)
    step_y, step_x = tiles.shape[2:]
    pixels = rearrange(tiles, "(row column) c h w -> (row h) (column w) c", column=columns)
    sheet = Image.fromarray(F.pad(pixels, (0, 0, pad, 0, pad, 0), value=255).cpu().numpy())
    for index, text in enumerate(texts):
        row, column = divmod(index, columns)
        place = (column * step_x + pad + width * scale // 2, row * step_y + pad + height * scale)
        ImageDraw.Draw(sheet).multiline_text(place, text, "black", _font(), "ma", align="center")
    return sheet


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(LINE - 3)


def _wrapped(text: str, width: int) -> str:
    """A caption in lines that are no wider than an image; truncated after two."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font().getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2])


def png_bytes(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Image.Image, path: str | os.PathLike[str], sync: bool = True) -> None:
    """Writes a PNG, whole or not at all; `sync` as `files.whole` takes it."""
    write_whole(path, png_bytes(image), sync)
