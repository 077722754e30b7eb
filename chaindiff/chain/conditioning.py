"""Conditioning by kind of variable: vectors and labels join the noise embedding, images and maps are channels, tokens
attention.

Every link can be absent, and can carry noise whose level is an input of the network (noise-conditioning augmentation;
Ho et al. 2022, Saharia et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.chain.variable import Variable
from chaindiff.edm.denoiser import expand
from chaindiff.edm.precondition import noise_label
from chaindiff.io.errors import UserError
from chaindiff.networks.blocks import LEVEL_FREQUENCIES, sinusoids
from chaindiff.networks.interface import Condition
from chaindiff.specs.link import LinkSpec, no_channels

LEVEL_WIDTH = 2 * LEVEL_FREQUENCIES + 1


@dataclass(frozen=True)
class Given:
    """One given variable's value for a batch, before its stage receives it.

    `present` marks the samples in which the value is present; `sigma` and `noise` (unit, in the received shape)
    are the link's noise-conditioning augmentation; of a vector, only the first `keep` entries are used.
    """

    value: Tensor | None
    present: Bool[Tensor, " batch"] | None = None
    sigma: Float[Tensor, " batch"] | None = None
    noise: Tensor | None = None
    keep: Int[Tensor, " batch"] | None = None


def level_features(sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch features"]:
    """Sinusoids of ln(sigma)/4, and a separate feature for sigma = 0."""
    exact = (sigma == 0).to(sigma.dtype)[:, None]
    return torch.cat([sinusoids(noise_label(sigma)) * (1 - exact), exact], dim=1)


class Link(nn.Module):
    """How one given variable reaches a stage.

    Networks scale their label input for one-hot labels, whose norm is 1. A link with `keep` enters as a long vector,
    its length and perhaps a noise level; each is scaled to a norm of about 1, or together they would drown out the
    noise embedding that they are added to.
    """

    def __init__(self, variable: Variable, spec: LinkSpec, target: Variable):
        super().__init__()
        self.variable, self.spec = variable, spec
        self.received = (variable.shape[0], *target.shape[1:]) if variable.kind == "image" else variable.shape
        if variable.kind == "map" and (wrong := no_channels(variable.name, variable.shape, target.name, target.shape)):
            raise UserError(wrong)
        self.null = nn.Parameter(torch.zeros(self.received)) if spec.null == "learned" else None
        # One-hot among the lengths of `keep`, zeros for none: in place of the presence flag.
        self.lengths = sorted({k for k in spec.keep if k})
        self.tells_presence = spec.dropout > 0 and spec.presence and not self.lengths
        self.tells_level = spec.noise > 0

    @property
    def label_width(self) -> int:
        own = self.variable.shape[0] if self.variable.kind in ("vector", "label") else 0
        return own + self.tells_presence + len(self.lengths) + LEVEL_WIDTH * self.tells_level

    def receive(self, value: Tensor) -> Tensor:
        """The value as this stage takes it: labels one-hot, images at the stage's resolution."""
        if self.variable.kind == "label" and not value.is_floating_point():
            return F.one_hot(value.long(), self.variable.shape[0]).float()
        if self.variable.kind == "image" and value.shape[1:] != self.received:
            return F.interpolate(value, self.received[1:], mode="bilinear", antialias=True, align_corners=False)
        return value

    def forward(self, given: Given, batch: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The received value, [batch, *received], and its features for the noise embedding, [batch, features]."""
        null = like.new_zeros(self.received) if self.null is None else self.null
        value = null.expand(batch, *self.received) if given.value is None else self.receive(given.value).to(like.dtype)
        present = given.present
        if present is None:
            present = torch.full((batch,), given.value is not None, device=like.device)
        if given.keep is not None:
            present = present & (given.keep.to(like.device) > 0)
        sigma = like.new_zeros(batch) if given.sigma is None else given.sigma.to(like)
        if self.tells_level and given.noise is not None and given.value is not None:
            # Noise is added to the received value, then the variance is scaled back to the data's.
            level, spread = expand(sigma, value), self.variable.sigma_data
            value = (value + level * given.noise.to(like)) * (spread / (level**2 + spread**2).sqrt())
        known = present.reshape(-1, *[1] * len(self.received))
        told = [present.to(like.dtype)[:, None]] if self.tells_presence else []
        if self.lengths:
            keep = torch.full_like(present, self.lengths[-1], dtype=torch.long) if given.keep is None else given.keep
            keep = keep.to(like.device)[:, None]
            known = known & (torch.arange(self.received[0], device=like.device) < keep)
            which = torch.cat([keep == length for length in self.lengths], dim=1)
            told.append((which & present[:, None]).to(like.dtype))
        value = torch.where(known, value, null.to(like.dtype))
        if self.tells_level:
            told.append(level_features(sigma) * present[:, None])
            if self.lengths:
                told[-1] = told[-1] / math.sqrt(LEVEL_FREQUENCIES)
        if self.lengths:
            value = value / (self.variable.sigma_data * math.sqrt(self.received[0]))
        return value, torch.cat(told, dim=1) if told else None


class Conditioner(nn.Module):
    """Puts the given variables of a stage into the form that its network takes."""

    def __init__(self, links: Sequence[Link]):
        super().__init__()
        self.links = nn.ModuleDict({link.variable.name: link for link in links})

    @property
    def label_dim(self) -> int:
        return sum(link.label_width for link in self)

    @property
    def image_channels(self) -> int:
        return sum(link.received[0] for link in self if link.variable.kind in ("image", "map"))

    @property
    def context(self) -> tuple[int, int] | None:
        """(length, width) of all token conditions; widths are padded to the widest."""
        shapes = [link.received for link in self if link.variable.kind == "tokens"]
        return (sum(s[0] for s in shapes), max(s[1] for s in shapes)) if shapes else None

    def __len__(self) -> int:
        return len(self.links)

    def __iter__(self) -> Iterator[Link]:
        return iter(cast("Iterable[Link]", self.links.values()))

    def forward(self, given: Mapping[str, Given], batch: int, like: Tensor) -> Condition:
        labels: list[Tensor] = []
        images: list[Tensor] = []
        context: list[Tensor] = []
        for link in self:
            value, told = link(given[link.variable.name], batch, like)
            kind = {"image": images, "map": images, "tokens": context}.get(link.variable.kind, labels)
            kind.append(value)
            if told is not None:
                labels.append(told)
        if context:
            width = max(c.shape[-1] for c in context)
            context = [F.pad(c, (0, width - c.shape[-1])) for c in context]
        return Condition(*(torch.cat(parts, dim=1) if parts else None for parts in (labels, images, context)))


def training_level(uniform: Float[Tensor, " batch"], largest: float) -> Float[Tensor, " batch"]:
    """Levels of a link's noise in training: 0 with probability 0.1, else uniform up to the largest (Imagen, 3.3)."""
    return largest * ((uniform - 0.1) / 0.9).clamp_min(0)
