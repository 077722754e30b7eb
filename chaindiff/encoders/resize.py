"""Antialiased resizing of images: the results are PIL's, without its rounding to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from chaindiff.encoders.base import Encoder
from chaindiff.io.errors import UserError
from chaindiff.specs.recipe import EnlargeSpec, ResizeSpec

Filter = Literal["box", "bilinear", "bicubic"]


def resize(images: Float[Tensor, "n c h w"], side: int, kernel: Filter) -> Float[Tensor, "n c side side"]:
    """Resize images in [-1, 1] as PIL does. Overshoot of the cubic kernel is clamped, once at the end (PIL: twice)."""
    height, width = images.shape[2:]
    if (height, width) == (side, side):
        return images
    if kernel == "box":
        if height == width and height % side == 0:
            return F.avg_pool2d(images, height // side)
        return _box(height, side, images) @ images @ _box(width, side, images).T
    out = F.interpolate(images, (side, side), mode=kernel, antialias=True, align_corners=False)
    return out.clamp(-1, 1) if kernel == "bicubic" else out


def _box(source: int, side: int, like: Tensor) -> Float[Tensor, "side source"]:
    """Each output pixel is the mean of the input pixels whose centres lie in it (the nearest one, if none does)."""
    factor = source / side
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) * factor
    reach = (torch.arange(source, dtype=torch.float64) + 0.5 - centres[:, None]) / max(factor, 1)
    weights = ((reach > -0.5) & (reach <= 0.5)).to(torch.float64)
    return (weights / weights.sum(1, keepdim=True)).to(like)


class Resize(Encoder):
    """image -> image of another size."""

    def __init__(self, name: str, spec: ResizeSpec | EnlargeSpec, source: Sequence[int], shape: Sequence[int]):
        square = len(source) == len(shape) == 3 and source[1] == source[2] and shape[1] == shape[2]
        if not square or source[0] != shape[0]:
            raise UserError(
                f"an image of shape {list(source)} cannot be resized to {list(shape)}",
                f"variables.{name}.shape",
                "both should be square images [channels, side, side] with the same number of channels",
            )
        self.name, self.of, self.side = name, spec.of, shape[-1]
        self.filter: Filter = spec.filter

    def features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c side side"]:
        return resize(x, self.side, self.filter)
