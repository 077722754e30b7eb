"""Sliced Wasserstein distance between patches of Laplacian pyramids: structure at each scale, without any encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from chaindiff.edm.random import generator
from chaindiff.io.errors import UserError

SMALLEST = 16  # side of the coarsest level
BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # Burt & Adelson 1983, a = 0.375


def sliced_wasserstein_laplacian(
    images_a: UInt8[Tensor, "a 3 h w"],
    images_b: UInt8[Tensor, "b 3 _ _"],
    *,
    seed: int = 0,
    patches: int = 128,
    patch: int = 7,
    directions: int = 512,
) -> dict[int, float]:
    """For each level of the pyramid, named by its side: the distance between the sets' patches, times 1000.

    Karras et al. 2018 (arXiv 1710.10196), section 5: `patches` patches of `patch` x `patch` pixels from every image,
    each channel standardised over a set's patches (so that a shift of a level's mean colour goes unseen), then the mean
    over random directions of the 1-d Wasserstein distance. Levels halve the side down to 16.
    Raises UserError for images of unlike sizes or counts.
    """
    if images_a.shape != images_b.shape:
        raise UserError(f"images of {list(images_a.shape)} and of {list(images_b.shape)} cannot be compared")
    pyramids = [laplacian_pyramid(x.float() / 127.5 - 1) for x in (images_a, images_b)]
    out = {}
    for level_a, level_b in zip(*pyramids, strict=True):
        side = level_a.shape[-1]
        rows = [_standard(_patches(x, patches, patch, seed)) for x in (level_a, level_b)]
        out[side] = 1000 * sliced_wasserstein(*rows, directions=directions, seed=seed)
    return out


def sliced_wasserstein(
    a: Float[Tensor, "rows width"], b: Float[Tensor, "rows width"], *, directions: int = 512, seed: int = 0
) -> float:
    """Mean over random directions of the 1-d Wasserstein distance of the rows' projections (Rabin et al. 2011).

    Raises UserError for unlike counts.
    """
    if a.shape != b.shape:
        raise UserError(f"sets of {list(a.shape)} and {list(b.shape)} numbers cannot be compared")
    lines = torch.from_numpy(generator(seed, "directions").standard_normal((directions, a.shape[1]))).to(a)
    total = 0.0
    for some in F.normalize(lines, dim=1).split(32):
        (x, _), (y, _) = ((rows @ some.T).sort(0) for rows in (a, b))
        total += (x - y).abs().double().mean(0).sum().item()
    return total / directions


def laplacian_pyramid(images: Float[Tensor, "n c h w"]) -> list[Tensor]:
    """Differences between successive Gaussian levels, finest first, and the coarsest level itself."""
    levels = []
    while images.shape[-1] % 2 == 0 and images.shape[-1] // 2 >= SMALLEST:
        smaller = _blur(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = 4 * smaller
        levels.append(images - _blur(spread))
        images = smaller
    return [*levels, images]


def _blur(images: Tensor) -> Tensor:
    channels = images.shape[1]
    kernel = torch.outer(BINOMIAL, BINOMIAL).to(images).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=channels)


def _patches(images: Tensor, count: int, side: int, seed: int) -> Float[Tensor, "patches c side side"]:
    """Patches at random places, the same places in every set of as many images."""
    n, _, size, _ = images.shape
    places = generator(seed, "patches", size).integers(size - side + 1, size=(n, count, 2))
    rows, columns = torch.from_numpy(places).unbind(-1)
    windows = images.unfold(2, side, 1).unfold(3, side, 1)
    return windows[torch.arange(n)[:, None], :, rows, columns].flatten(0, 1)


def _standard(patches: Float[Tensor, "patches c side side"]) -> Float[Tensor, "patches width"]:
    """Mean 0 and deviation 1 of every channel, then a row for each patch."""
    std, mean = torch.std_mean(patches, (0, 2, 3), keepdim=True)
    return ((patches - mean) / std.clamp(min=1e-8)).flatten(1)
