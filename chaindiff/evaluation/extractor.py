"""A feature extractor: a fixed network that turns images into vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from chaindiff.io.digest import fingerprint

RESIZE = "PIL bicubic, antialiased, 8 bits"
BATCH = 64  # images of one forward pass


@dataclass(eq=False)
class Extractor:
    """Images -> features, by a module whose input is (pixel - mean) / std, pixels from 0 to 255.

    `family` names the architecture that it may share with encoders in a chain; images are resized to `size` by PIL's
    bicubic filter from 8 bits to 8 bits; `weights` is the sha256 of the file, `about` what else the features depend on.
    """

    name: str
    family: str
    module: nn.Module
    size: int
    width: int
    weights: str | None = None
    mean: tuple[float, ...] = (127.5,) * 3
    std: tuple[float, ...] = (127.5,) * 3
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = self.module.eval().to(self.device)

    @property
    def identity(self) -> str:
        """sha256 of weights and preprocessing."""
        about = {"extractor": self.name.partition(":")[0], "resize": RESIZE, **self.about}
        return fingerprint({**about, **{name: getattr(self, name) for name in ("weights", "size", "mean", "std")}})

    def __call__(self, images: UInt8[Tensor, "batch _ h w"]) -> Float[Tensor, "batch width"]:
        """float32, on the host; grey images are shown as RGB."""
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (self.mean, self.std))
        out = [torch.empty(0, self.width)]
        with torch.inference_mode():
            for part in images.expand(-1, 3, -1, -1).split(BATCH):
                x = (resize(part, self.size).to(self.device).float() - mean) / std
                out.append(self.module(x).flatten(1).float().cpu())
        return torch.cat(out)


def resize(images: UInt8[Tensor, "n 3 h w"], size: int) -> UInt8[Tensor, "n 3 size size"]:
    """PIL's bicubic filter, antialiased, on 8 bits: the resizing that the literature has settled on.

    Parmar et al. 2022 (arXiv 2104.11222) show how others change the figures.
    """
    if tuple(images.shape[2:]) == (size, size):
        return images
    out = np.empty((len(images), size, size, 3), np.uint8)
    for row, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        pixels = Image.fromarray(np.ascontiguousarray(image))
        out[row] = np.asarray(pixels.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()
