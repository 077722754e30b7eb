"""One network for an image and vectors: every variable comes with its own noise level, and all are denoised at once.

Two streams, as denoising side by side beats one shared stream (V-Co, arXiv 2603.16792): a U-Net is told the noisy
vectors and their levels, and a prior for each vector is told the image's level and what the U-Net saw in the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chaindiff.networks.condition import LEVEL_FREQUENCIES, sinusoids
from chaindiff.networks.prior import Prior
from chaindiff.networks.unet import UNet


class Joint(nn.Module):
    """`shapes` are those of one image [channels, size, size] and of any number of vectors [width], in any order.

    `image` and `vector` are the settings of the U-Net and of the priors; `seen` is how many features of the image the
    priors are told. Inputs and outputs of `forward` are in the order of the shapes.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        *,
        image: dict[str, Any],
        vector: dict[str, Any],
        seen: int,
        label_dim: int = 0,
        image_channels: int = 0,
        label_span: float = 1.0,
        context_dim: int = 0,
        context_length: int = 0,
        augment_dim: int = 0,
    ):
        super().__init__()
        self.place = next(i for i, shape in enumerate(shapes) if len(shape) == 3)
        self.channels, size, _ = shapes[self.place]
        widths = [shape[0] for shape in shapes if len(shape) == 1]
        self.label_span, level = label_span, 2 * LEVEL_FREQUENCIES
        told = label_dim + sum(widths) + level * len(widths)
        shared: dict[str, Any] = {"augment_dim": augment_dim, "context_dim": context_dim}
        self.image = UNet(
            size, self.channels + image_channels, self.channels + seen, label_dim=told, **shared, **image
        )  # fmt: skip
        shared |= {"context_length": context_length, "label_span": label_span}
        self.vectors = nn.ModuleList(
            Prior(width, label_dim=told - width + seen, **shared, **vector) for width in widths
        )

    def forward(
        self,
        x: Sequence[Tensor],
        noise_labels: Sequence[Float[Tensor, " batch"]],
        class_labels: Float[Tensor, "batch label_dim"] | None = None,
        augment_labels: Float[Tensor, "batch augment_dim"] | None = None,
        context: Float[Tensor, "batch tokens context_dim"] | None = None,
    ) -> tuple[Tensor, ...]:
        """The raw network F of every variable."""
        given = [] if class_labels is None else [class_labels]
        # Labels are scaled for one-hot ones, of norm 1: so are the vectors, whose entries have variance 1, and levels.
        levels = [sinusoids(label / self.label_span) / math.sqrt(LEVEL_FREQUENCIES) for label in noise_labels]
        image, image_label, image_level = x[self.place], noise_labels[self.place], levels.pop(self.place)
        vectors = [value for i, value in enumerate(x) if i != self.place]
        labels = [label for i, label in enumerate(noise_labels) if i != self.place]
        values = [value / math.sqrt(value.shape[1]) for value in vectors]
        told = torch.cat([*given, *values, *levels], dim=1)
        raw = self.image(image, image_label, told, augment_labels, context)
        seen = raw[:, self.channels :].mean((2, 3))
        out: list[Tensor] = []
        for i, (prior, value, label) in enumerate(zip(self.vectors, vectors, labels, strict=True)):
            others = [part for j, part in enumerate(values) if j != i] + [
                part for j, part in enumerate(levels) if j != i
            ]
            told = torch.cat([*given, *others, image_level, seen], dim=1)
            out.append(prior(value, label, told, augment_labels, context))
        out.insert(self.place, raw[:, : self.channels])
        return tuple(out)
