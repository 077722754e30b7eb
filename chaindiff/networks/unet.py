"""The U-Nets of EDM: DDPM++, NCSN++ and ADM as options of one network (Karras et al. 2022, appendix F.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.edm.denoiser import State
from chaindiff.networks.arch import ARCHS
from chaindiff.networks.blocks import Block, Conv2d, FourierEmbedding, GroupNormSilu, Linear, PositionalEmbedding
from chaindiff.networks.interface import Condition


class UNet(nn.Module):
    """A U-Net of EDM's family.

    Conditioning by kind: vectors join the noise embedding, images are extra input channels, tokens are extra keys and
    values of the attention.
    """

    memory_format = torch.channels_last  # of its images, inside and outside

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
        learns_variances: bool = False,
    ):
        super().__init__()
        a = self.arch = ARCHS[arch]
        embedding, noise = channels * 4, channels * a.noise_width
        self.label_dim, self.context_dim, self.learns_variances = label_dim, context_dim, learns_variances
        self.map_noise = FourierEmbedding(noise) if a.fourier else PositionalEmbedding(noise, a.noise_endpoint)
        self.map_label = None
        if label_dim:
            # ADM draws label weights with variance 1 / label_dim; the others scale the label itself by its square root.
            late = a.label_joins == "embedding"
            init = ("kaiming", math.sqrt(label_dim)) if late else a.init
            self.map_label = Linear(label_dim, embedding if late else noise, init, bias=not late)
            if label_init == "zeros":
                nn.init.zeros_(self.map_label.weight)
        self.map_augment = Linear(augment_dim, noise, a.init_augment, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise, embedding, a.init, bias_gain=a.bias_gain)
        self.map_layer1 = Linear(embedding, embedding, a.init, bias_gain=a.bias_gain)

        def block(inputs: int, outputs: int, attend: bool, resample: str | None = None) -> Block:
            context = context_dim if attend else 0
            return Block(
                inputs, outputs, embedding, a, resample=resample, attend=attend, context=context, dropout=dropout
            )

        self.enc = nn.ModuleDict()
        skips, width, image_width = [], channels * (mult[0] if a.wide_input else 1), in_channels
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
        outputs = out_channels * (1 + learns_variances)
        norm, conv = GroupNormSilu(width, a.eps), Conv2d(width, outputs, 3, a.init_zero)
        if a.output == "out":
            self.out_norm, self.out_conv = norm, conv
        else:
            size = f"{resolution}x{resolution}"
            self.dec[f"{size}_aux_norm"], self.dec[f"{size}_aux_conv"] = norm, conv

    def forward(self, x: State, noise: Mapping[str, Tensor], condition: Condition) -> State:
        """The raw network F of the preconditioned denoiser, for one image; absent labels count as zeros."""
        ((name, image),) = x.items()
        if condition.images is not None:
            image = torch.cat([image, condition.images.to(image.dtype)], dim=1)
        image = image.contiguous(memory_format=torch.channels_last)
        given = condition if condition.prepared is not None else self.prepare(condition)
        return {name: self.denoise(image, self.embed(noise[name], given), given.prepared["context"])}

    def prepare(self, condition: Condition) -> Condition:
        """With the embeddings of labels and augmentation, and every block's keys and values of the context."""
        label = augment = None
        if self.map_label is not None:
            told = self.map_label.weight.new_zeros(1, self.label_dim) if condition.labels is None else condition.labels
            label = self.map_label(told if self.arch.label_joins == "embedding" else told * math.sqrt(self.label_dim))
        if self.map_augment is not None and condition.augment is not None:
            augment = self.map_augment(condition.augment)
        context = {}
        for half in ("enc", "dec"):
            for name, block in getattr(self, half).items():
                if condition.context is not None and getattr(block, "heads", 0) and block.context_kv is not None:
                    context[half, name] = block.project(condition.context)
        return replace(condition, prepared={"label": label, "augment": augment, "context": context})

    def embed(self, noise: Float[Tensor, " batch"], given: Condition) -> Float[Tensor, "batch emb"]:
        """The embedding of noise level, labels and augmentation, of a prepared condition, that every block receives."""
        late, told, augment = self.arch.label_joins == "embedding", given.prepared["label"], given.prepared["augment"]
        emb = self.map_noise(noise)
        if self.arch.noise_swapped:
            emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)
        if told is not None and not late:
            emb = emb + told
        if augment is not None:
            emb = emb + augment
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb + told if told is not None and late else emb)

    def denoise(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        emb: Float[Tensor, "batch emb"],
        context: Mapping[tuple[str, str], Tensor],
    ) -> Float[Tensor, "batch out_channels height width"]:
        """The U-Net itself; `context` holds the blocks' keys and values."""
        skips, image = [], x
        for name, layer in self.enc.items():
            if "aux_residual" in name:
                x = skips[-1] = image = (x + layer(image)) / math.sqrt(2)
                continue
            x = layer(x, emb, context.get(("enc", name))) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if isinstance(layer, Block) and x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb, context.get(("dec", name))) if isinstance(layer, Block) else layer(x)
        return x if self.arch.output == "dec" else self.out_conv(self.out_norm(x))
