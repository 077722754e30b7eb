"""What a network is told of the stage that it is built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Interface:
    """The shapes of the generated variables by name, and what the network is told besides.

    `label_dim` is the width of all vector conditions together, `image_channels` that of image conditions, `context`
    the (length, width) of token conditions, `label_span` the order of magnitude of the noise labels.
    """

    variables: Mapping[str, tuple[int, ...]]
    label_dim: int = 0
    image_channels: int = 0
    context: tuple[int, int] | None = None
    augment_dim: int = 0
    label_span: float = 1.0
