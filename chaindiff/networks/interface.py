"""Inputs and outputs of networks: one signature for all, keyed by variable names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from chaindiff.edm.denoiser import State
from chaindiff.specs.link import largest_grid


@dataclass(frozen=True)
class Condition:
    """The conditioning of a network, besides its noisy input and noise level.

    `labels`: given vectors and labels, concatenated with the indicators of every link. `images`: given images, as
    channels at the resolution of the generated image. `context`: given tokens. `augment`: the augmentation's label.
    `prepared`: what the network's `prepare` made of these.
    """

    labels: Float[Tensor, "batch label_dim"] | None = None
    images: Float[Tensor, "batch channels height width"] | None = None
    context: Float[Tensor, "batch tokens features"] | None = None
    augment: Float[Tensor, "batch augment_dim"] | None = None
    prepared: Any = None


@runtime_checkable
class Network(Protocol):
    """F of the preconditioned denoiser: `x` scaled by c_in, `noise` is c_noise [batch], each by variable.

    A network with an attribute `learns_variances` that is true outputs twice the channels of every variable: its
    prediction, then its variance. One with a `memory_format` receives images in it, and returns them so. One with a
    method `prepare(condition) -> Condition` adds there what it computes of the condition alone; sampling calls it once,
    and then the network with what it returned.
    """

    def __call__(self, x: State, noise: Mapping[str, Tensor], condition: Condition) -> State: ...


@dataclass(frozen=True)
class Interface:
    """What a network must fit: the shapes that it generates, and the sizes of everything in a `Condition`.

    `label_span` is the order of magnitude of the noise labels (1, or 1000 where they count time steps).
    """

    variables: Mapping[str, tuple[int, ...]]
    label_dim: int = 0
    image_channels: int = 0
    context: tuple[int, int] | None = None
    augment_dim: int = 0
    label_span: float = 1.0

    @property
    def grid(self) -> str | None:
        """The variable that given images are concatenated with: the largest image or map, if any."""
        return largest_grid(self.variables)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the one variable that is generated."""
        (shape,) = self.variables.values()
        return shape
