"""The U-Nets of EDM: DDPM++, NCSN++ and ADM as options of one network (Karras et al. 2022, appendix F.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.networks.blocks import (
    Block,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
)


@dataclass(frozen=True)
class Arch:
    """What distinguishes one published U-Net from another."""

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
    attention_everywhere: bool = False  # every decoder block of an attention resolution, not the last alone
    fourier: bool = False
    noise_width: int = 1  # noise embedding, in units of `channels`
    residual_input: bool = False  # the downsampled image is added to the encoder at every level
    late_label: bool = False  # the label joins after the mapping layers


XAVIER = ("xavier", 1.0)
SONG = {
    "init": XAVIER,
    "init_zero": ("xavier", 1e-5),
    "init_attention": ("xavier", math.sqrt(0.2)),
    "init_augment": XAVIER,
}
KAIMING = ("kaiming", math.sqrt(1 / 3))
ARCHS = {
    "ddpmpp": Arch(**SONG),
    "ncsnpp": Arch(**SONG, taps=(1, 3, 3, 1), fourier=True, noise_width=2, residual_input=True),
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
        late_label=True,
    ),
}


class UNet(nn.Module):
    """A U-Net of EDM's family.

    Conditioning by kind: a vector joins the noise embedding (`class_labels`), images are extra input channels,
    tokens are extra keys and values of the attention (`context`).
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        *,
        arch: str = "ddpmpp",
        label_dim: int = 0,
        augment_dim: int = 0,
        context_dim: int = 0,
        channels: int = 128,
        mult: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_init: str = "published",
    ):
        super().__init__()
        a = self.arch = ARCHS[arch]
        embedding, noise = channels * 4, channels * a.noise_width
        self.label_dim, self.context_dim = label_dim, context_dim
        self.map_noise = FourierEmbedding(noise) if a.fourier else PositionalEmbedding(noise, not a.late_label)
        self.map_label = None
        if label_dim:
            # ADM draws label weights with variance 1 / label_dim; the others scale the label itself by its square root.
            init = ("kaiming", math.sqrt(label_dim)) if a.late_label else a.init
            self.map_label = Linear(label_dim, embedding if a.late_label else noise, init, bias=not a.late_label)
            if label_init == "zeros":
                nn.init.zeros_(self.map_label.weight)
        self.map_augment = Linear(augment_dim, noise, a.init_augment, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise, embedding, a.init, bias_gain=a.bias_gain)
        self.map_layer1 = Linear(embedding, embedding, a.init, bias_gain=a.bias_gain)

        def block(inputs: int, outputs: int, attend: bool, resample: str | None = None) -> Block:
            heads = 0 if not attend else 1 if a.head_channels is None else outputs // a.head_channels
            return Block(
                inputs,
                outputs,
                embedding,
                init=a.init,
                init_zero=a.init_zero,
                init_attention=a.init_attention,
                bias_gain=a.bias_gain,
                resample=resample,
                taps=a.taps,
                resample_projection=a.resample_projection,
                heads=heads,
                context=context_dim if attend else 0,
                dropout=dropout,
                skip_scale=a.skip_scale,
                eps=a.eps,
                adaptive_scale=a.adaptive_scale,
            )

        self.enc = nn.ModuleDict()
        skips, width, image_width = [], channels * (mult[0] if a.late_label else 1), in_channels
        for level, factor in enumerate(mult):
            size = f"{resolution >> level}x{resolution >> level}"
            if level == 0:
                self.enc[f"{size}_conv"] = Conv2d(in_channels, width, 3, a.init, bias_gain=a.bias_gain)
            else:
                self.enc[f"{size}_down"] = block(width, width, False, "down")
                if a.residual_input:
                    self.enc[f"{size}_aux_residual"] = Conv2d(
                        image_width, width, 3, a.init, "down", a.taps, filter_last=True
                    )
                    image_width = width
            skips.append(width)
            for index in range(blocks):
                self.enc[f"{size}_block{index}"] = block(width, channels * factor, resolution >> level in attention)
                width = channels * factor
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, factor in reversed(list(enumerate(mult))):
            size = f"{resolution >> level}x{resolution >> level}"
            if level == len(mult) - 1:
                self.dec[f"{size}_in0"] = block(width, width, True)
                self.dec[f"{size}_in1"] = block(width, width, False)
            else:
                self.dec[f"{size}_up"] = block(width, width, False, "up")
            for index in range(blocks + 1):
                attend = resolution >> level in attention and (index == blocks or a.attention_everywhere)
                self.dec[f"{size}_block{index}"] = block(width + skips.pop(), channels * factor, attend)
                width = channels * factor
        norm, conv = GroupNorm(width, a.eps), Conv2d(width, out_channels, 3, a.init_zero)
        if a.late_label:
            self.out_norm, self.out_conv = norm, conv
        else:  # published names of the DDPM++ and NCSN++ output layers
            size = f"{resolution}x{resolution}"
            self.dec[f"{size}_aux_norm"], self.dec[f"{size}_aux_conv"] = norm, conv

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Float[Tensor, "batch emb"]:
        emb = self.map_noise(noise_labels)
        if not self.arch.late_label:
            emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)  # published networks swap the halves
            if self.map_label is not None and class_labels is not None:
                emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        if not self.arch.late_label:
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        noise_labels: Float[Tensor, " batch"],
        class_labels: Float[Tensor, "batch label_dim"] | None = None,
        augment_labels: Float[Tensor, "batch augment_dim"] | None = None,
        context: Float[Tensor, "batch tokens context_dim"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """The raw network F of the preconditioned denoiser; absent labels count as zeros."""
        if self.map_label is not None and class_labels is None:
            class_labels = x.new_zeros(x.shape[0], self.label_dim)
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips, image = [], x
        for name, layer in self.enc.items():
            if "aux_residual" in name:
                x = skips[-1] = image = (x + layer(image)) / math.sqrt(2)
                continue
            x = layer(x, emb, context) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb, context)
            elif isinstance(layer, GroupNorm):
                x = F.silu(layer(x))
            else:
                x = layer(x)
        return x if not self.arch.late_label else self.out_conv(F.silu(self.out_norm(x)))
