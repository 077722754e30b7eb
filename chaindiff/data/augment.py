"""Augmentation with labels for the network: EDM's geometric set and colour jitter, a pure function of keys.

Karras et al. 2022 (arXiv 2206.00364), appendix F.2 and table 6; each transformation is applied with the same
probability and described by entries of a label that is zero for the identity:

    x-flip (1), y-flip (1), scale (1), rotation (2), anisotropic scale (2), translation (2)
    with colour: brightness (1), contrast (1), saturation (1), hue (2)

As published, the x-flip ignores the probability: half of all images are flipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from chaindiff.edm.random import Key, generator
from chaindiff.specs.training import AugmentSpec

SCALE = 0.2  # standard deviation of log2 of the scale, isotropic and anisotropic
ROTATED = 0.5  # share of the anisotropic scales whose axes are not the image's
SHIFT = 0.125  # standard deviation of the translation, as a share of the image's side
# Standard deviations at colour strength 1: brightness in units of [-1, 1], the others in log2.
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.5, 1.0
SHRINKS = 0.85  # below this scale in some direction, apply() averages over each pixel's area

VERSION = 2  # raised when a key gives another augmentation, so that cached embeddings are recomputed
GEOMETRIC, COLOUR = 9, 5  # entries of the label
UNIFORMS, NORMALS = 14, 7  # random numbers of a draw; the same count for every spec, so that options do not interact


@dataclass(frozen=True)
class Draw:
    """One augmentation for each of n images.

    `matrix` maps homogeneous coordinates (x right, y down, origin at the centre, 1 = the image's side) of the image to
    those of the augmented image; `colour` maps (r, g, b, 1) in [-1, 1].
    """

    label: Float[Tensor, "n augment_dim"]
    matrix: Float[Tensor, "n 3 3"]
    colour: Float[Tensor, "n 4 4"]


def augment_dim(spec: AugmentSpec) -> int:
    """Width of the label; 0 if there is none, in which case flips are not labelled."""
    if spec.probability == 0:
        return 0
    return GEOMETRIC + (COLOUR if spec.colour > 0 else 0)


def active(spec: AugmentSpec) -> bool:
    """Whether the augmentation changes any image."""
    return spec.probability > 0 or spec.flip


def draw(spec: AugmentSpec, keys: Sequence[tuple[Key, ...]]) -> Draw:
    """An augmentation for each key; the same for a key whatever the others are."""
    generators = [generator("augment", *key) for key in keys]
    uniform = np.array([g.random(UNIFORMS) for g in generators]).reshape(-1, UNIFORMS).T
    normal = np.array([g.standard_normal(NORMALS) for g in generators]).reshape(-1, NORMALS).T
    flips, scales, turns, anisos, shifts, brights, contrasts, vivids, hues = uniform[:9] < spec.probability
    angles = math.pi * (2 * uniform[11:] - 1)

    x_flip = (uniform[9] < 0.5) * float(spec.flip)
    y_flip = flips * (uniform[10] < 0.5)
    scale, rotation = scales * normal[0], turns * angles[0]
    # One number says whether the axes turn, and how far.
    aniso = anisos * normal[1]
    orientation = anisos * (uniform[12] < ROTATED) * math.pi * (2 * uniform[12] / ROTATED - 1)
    shift_x, shift_y = shifts * normal[2], shifts * normal[3]
    label = [x_flip, y_flip, scale, np.cos(rotation) - 1, np.sin(rotation)]
    label += [aniso * np.cos(orientation), aniso * np.sin(orientation), shift_x, shift_y]

    stretch = np.exp2(SCALE * aniso)
    matrix = (
        _translate(SHIFT * shift_x, SHIFT * shift_y)
        @ _rotate(-orientation) @ _stretch(stretch, 1 / stretch) @ _rotate(orientation)
        @ _rotate(-rotation)
        @ _stretch(np.exp2(SCALE * scale), np.exp2(SCALE * scale))
        @ _stretch(1.0 - 2 * x_flip, 1.0 - 2 * y_flip)
    )  # fmt: skip

    strength = spec.colour
    brightness, contrast, saturation = brights * normal[4], contrasts * normal[5], vivids * normal[6]
    hue = hues * angles[2] * min(strength, 1.0)
    colour = _colour(strength * brightness, strength * contrast, strength * saturation, hue)
    label += [brightness, contrast, saturation, np.cos(hue) - 1, np.sin(hue)]

    told = np.stack(label, axis=1)[:, : augment_dim(spec)]
    return Draw(*(torch.from_numpy(array).float() for array in (told, matrix, colour)))


def apply(images: Float[Tensor, "n 3 h w"], draw: Draw) -> Float[Tensor, "n 3 h w"]:
    """The images, in [-1, 1], augmented; the edges are reflected. Colours may leave [-1, 1].

    Flips alone are lossless. Other maps interpolate with a cubic kernel at the pixels' centres (lossless for quarter
    turns and shifts by whole pixels); those that shrink the image in some direction, so that pixels would be skipped,
    average 2 x 2 linearly interpolated points for each pixel.
    """
    linear = draw.matrix[:, :2, :2]
    signs = torch.eye(3, device=linear.device) * draw.matrix.sign()
    exact = (draw.matrix == signs).flatten(1).all(1)
    shrinks = torch.linalg.svdvals(linear)[:, -1] < SHRINKS
    out = images.clone()
    for flip, axis in ((linear[:, 0, 0] < 0, 3), (linear[:, 1, 1] < 0, 2)):
        rows = exact & flip
        out[rows] = out[rows].flip(axis)
    for rows, points in ((~exact & ~shrinks, 1), (~exact & shrinks, 2)):
        if rows.any():
            out[rows] = _warp(images[rows], draw.matrix[rows], points)
    coloured = (draw.colour != torch.eye(4, device=out.device)).flatten(1).any(1)
    if coloured.any():
        m = draw.colour[coloured]
        pixels = out[coloured].flatten(2)
        out[coloured] = torch.baddbmm(m[:, :3, 3:], m[:, :3, :3], pixels).view_as(out[coloured])
    return out


def _warp(images: Float[Tensor, "n 3 h w"], matrix: Float[Tensor, "n 3 3"], points: int) -> Float[Tensor, "n 3 h w"]:
    """Each output pixel is the mean of `points` squared samples of the input."""
    height, width = images.shape[2:]
    inverse = torch.linalg.inv(matrix.double())
    # From the output's grid_sample coordinates (-1 to 1 over each side) to the input's; lengths are in pixels between.
    pixels = torch.tensor([width / 2, height / 2], dtype=torch.float64, device=images.device)
    linear = inverse[:, :2, :2] * pixels[None, None, :] / pixels[None, :, None]
    a, c = linear.float(), (2 * inverse[:, :2, 2]).float()
    # The centres of a side's pixels, where the side reaches from -1 to 1.
    x, y = ((torch.arange(n, device=images.device) * 2 + 1 - n) / n for n in (points * width, points * height))
    grid = a[:, None, None, :, 0] * x[:, None] + (a[:, None, None, :, 1] * y[:, None, None] + c[:, None, None])
    mode = "bicubic" if points == 1 else "bilinear"
    out = F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(out, points) if points > 1 else out


def _matrices(*entries: np.ndarray | int) -> Float64[np.ndarray, "n 3 3"]:
    """A matrix for each image from its nine entries, row by row, each [n] or one for all."""
    return np.stack(np.broadcast_arrays(*entries), axis=-1).reshape(-1, 3, 3)


def _translate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _matrices(1, 0, x, 0, 1, y, 0, 0, 1)


def _stretch(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _matrices(x, 0, 0, 0, y, 0, 0, 0, 1)


def _rotate(angle: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return _matrices(cos, -sin, 0, sin, cos, 0, 0, 0, 1)


def _colour(brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Saturation and hue about the grey axis, then contrast about mid-grey, then brightness; all as one affine map.

    Hue turns (r, g, b) about the axis (1, 1, 1) / sqrt 3 (Rodrigues' formula):
    grey + cos * rest + sin * (axis x rest).
    """
    grey = np.full((3, 3), 1 / 3)
    rest = np.eye(3) - grey
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = np.cos(hue)[:, None, None], np.sin(hue)[:, None, None]
    vivid = np.exp2(SATURATION * saturation)[:, None, None]
    out = np.tile(np.eye(4), (len(hue), 1, 1))
    out[:, :3, :3] = np.exp2(CONTRAST * contrast)[:, None, None] * (grey + vivid * (cos * rest + sin * cross))
    out[:, :3, 3] = BRIGHTNESS * brightness[:, None]
    return out
