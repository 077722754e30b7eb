"""What distinguishes one published U-Net of EDM's family from another (Karras et al. 2022, appendix F.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Init = tuple[str, float]  # (distribution, gain)


@dataclass(frozen=True)
class Arch:
    """Initial weights, normalisation, resampling, attention, and how noise level and label become the embedding."""

    init: Init
    init_zero: Init
    init_attention: Init
    init_augment: Init
    bias_gain: float = 0.0
    eps: float = 1e-6
    skip_scale: float = math.sqrt(0.5)
    taps: tuple[int, ...] = (1, 1)
    resample_projection: bool = True
    head_channels: int | None = None  # None: one head
    adaptive_scale: bool = False
    attention_everywhere: bool = False  # every decoder block of an attention resolution, not only the last
    fourier: bool = False
    noise_width: int = 1  # noise embedding, in units of `channels`
    noise_endpoint: bool = True  # the slowest sinusoid has frequency 1 / max_positions
    noise_swapped: bool = True  # sines come before cosines
    label_joins: Literal["noise", "embedding"] = "noise"  # before the mapping layers, or after them
    residual_input: bool = False  # the downsampled image is added to the encoder at every level
    wide_input: bool = False  # the first convolution is as wide as the first level
    output: Literal["dec", "out"] = "dec"  # the published names of the output layers

    def heads(self, channels: int) -> int:
        """Attention heads of a block with this many channels."""
        return 1 if self.head_channels is None else channels // self.head_channels


XAVIER, KAIMING = ("xavier", 1.0), ("kaiming", math.sqrt(1 / 3))
DDPMPP = Arch(init=XAVIER, init_zero=("xavier", 1e-5), init_attention=("xavier", math.sqrt(0.2)), init_augment=XAVIER)
ARCHS = {
    "ddpmpp": DDPMPP,
    "ncsnpp": replace(DDPMPP, taps=(1, 3, 3, 1), fourier=True, noise_width=2, residual_input=True),
    "adm": Arch(
        init=KAIMING,
        init_zero=("kaiming", 0.0),
        init_attention=KAIMING,
        init_augment=("kaiming", 0.0),
        bias_gain=1.0,
        eps=1e-5,
        skip_scale=1.0,
        resample_projection=False,
        head_channels=64,
        adaptive_scale=True,
        attention_everywhere=True,
        noise_endpoint=False,
        noise_swapped=False,
        label_joins="embedding",
        wide_input=True,
        output="out",
    ),
}
