"""One network for an image and vectors: every variable comes with its own noise level, and all are denoised at once.

Two streams, as denoising side by side beats one shared stream (V-Co, arXiv 2603.16792): a U-Net is conditioned on the
noisy vectors and their levels, and a prior for each vector on the image's level and on image features of the U-Net.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chaindiff.edm.denoiser import State
from chaindiff.networks.blocks import LEVEL_FREQUENCIES, sinusoids
from chaindiff.networks.interface import Condition, Interface
from chaindiff.networks.prior import Prior
from chaindiff.networks.unet import UNet


class Joint(nn.Module):
    """One image or map and any number of vectors, in any order.

    `image` and `vector` are the settings of the U-Net and of the priors; `seen` is the number of image features
    that the priors receive.
    """

    memory_format = UNet.memory_format

    def __init__(self, interface: Interface, *, image: dict[str, Any], vector: dict[str, Any], seen: int):
        super().__init__()
        shapes = dict(interface.variables)
        self.pictured = str(interface.grid)
        self.channels, size, _ = shapes.pop(self.pictured)
        self.names, widths = [*shapes], [shape[0] for shape in shapes.values()]
        self.label_span, level = interface.label_span, 2 * LEVEL_FREQUENCIES
        length, context = interface.context or (0, 0)
        told = interface.label_dim + sum(widths) + level * len(widths)
        shared: dict[str, Any] = {"augment_dim": interface.augment_dim, "context_dim": context}
        inputs = self.channels + interface.image_channels
        self.image = UNet(size, inputs, self.channels + seen, label_dim=told, **shared, **image)
        shared |= {"context_length": length, "label_span": self.label_span}
        self.vectors = nn.ModuleList(
            Prior(width, label_dim=told - width + seen, **shared, **vector) for width in widths
        )

    def forward(self, x: State, noise: Mapping[str, Tensor], condition: Condition) -> State:
        """The raw network F of every variable."""
        given = [] if condition.labels is None else [condition.labels]
        # Labels are scaled for one-hot vectors of norm 1: so are the vectors, of unit variance per entry, and levels.
        levels = {v: sinusoids(noise[v] / self.label_span) / math.sqrt(LEVEL_FREQUENCIES) for v in x}
        values = {v: x[v] / math.sqrt(x[v].shape[1]) for v in self.names}

        def told(*parts: Tensor, but: str | None = None, images: Tensor | None = None) -> Condition:
            others = [v for v in self.names if v != but]
            labels = torch.cat([*given, *(values[v] for v in others), *(levels[v] for v in others), *parts], dim=1)
            return replace(condition, labels=labels, images=images)

        raw = self.image(
            {self.pictured: x[self.pictured]}, noise, told(images=condition.images)
        )[self.pictured]  # fmt: skip
        seen = raw[:, self.channels :].mean((2, 3))
        out = {self.pictured: raw[:, : self.channels]}
        for name, prior in zip(self.names, self.vectors, strict=True):
            out |= prior({name: x[name]}, noise, told(levels[self.pictured], seen, but=name))
        return out
