"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, arXiv 2312.02696, appendix B); its names of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.edm.denoiser import State
from chaindiff.networks.interface import Condition

HEAD = 64  # channels of a head
BALANCE = 0.3  # of a block's residual branch, and of its attention
CLIP = 256.0  # of activations at the end of a block


def normalised(x: Tensor, *dims: int) -> Tensor:
    """To unit root mean square over some dimensions (equation 47, with epsilon 1e-4)."""
    length = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    count = math.prod(x.shape[d] for d in dims)
    return x / (1e-4 + length / math.sqrt(count)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Equation 81."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Equation 88."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Both parts contribute equally, whatever their channels (equation 103 with t = 1/2)."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / 2)
    return torch.cat([a * (scale / math.sqrt(n)), b * (scale / math.sqrt(m))], dim=1)


class MPFourier(nn.Module):
    """Random cosines of the noise label, of unit variance (equation 75); `freqs` are angular."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Float[Tensor, " batch"]) -> Float[Tensor, "batch channels"]:
        return (torch.outer(x, self.freqs.to(x.dtype)) + self.phases.to(x.dtype)).cos() * math.sqrt(2)


class MPConv(nn.Module):
    """A convolution (or, without kernel, a linear layer) whose weights have unit norm by output (equations 47 and 66).

    In training they are normalised in place too, so that the step size does not decay (forced normalisation).
    """

    def __init__(self, inputs: int, outputs: int, *kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w, dims = self.weight, range(1, self.weight.ndim)
        if self.training:
            with torch.no_grad():
                w.copy_(normalised(w, *dims))
        w = (normalised(w, *dims) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPBlock(nn.Module):
    """A residual block with optional resampling and cosine attention; in the encoder its input has unit pixel norm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        encoder: bool,
        resample: str | None,
        attend: bool,
        dropout: float,
    ):
        super().__init__()
        self.encoder, self.resample, self.dropout = encoder, resample, dropout
        self.heads = outputs // HEAD if attend else 0
        self.conv_res0 = MPConv(outputs if encoder else inputs, outputs, 3, 3)
        self.emb_linear, self.emb_gain = MPConv(embedding, outputs), nn.Parameter(torch.zeros([]))
        self.conv_res1 = MPConv(outputs, outputs, 3, 3)
        self.conv_skip = MPConv(inputs, outputs, 1, 1) if inputs != outputs else None
        if self.heads:
            self.attn_qkv, self.attn_proj = MPConv(outputs, 3 * outputs, 1, 1), MPConv(outputs, outputs, 1, 1)

    def forward(self, x: Float[Tensor, "batch c h w"], embedding: Float[Tensor, "batch emb"]) -> Tensor:
        if self.resample:
            x = F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        if self.encoder:
            x = normalised(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(mp_silu(x)) * (self.emb_linear(embedding, self.emb_gain) + 1)[:, :, None, None]
        y = self.conv_res1(F.dropout(mp_silu(y), self.dropout, self.training))
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, BALANCE)
        if self.heads:
            parts = rearrange(self.attn_qkv(x), "b (heads c qkv) h w -> qkv b heads (h w) c", heads=self.heads, qkv=3)
            q, k, v = normalised(parts, -1)
            y = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads (h w) c -> b (heads c) h w", h=x.shape[2])
            x = mp_sum(x, self.attn_proj(y), BALANCE)
        return x.clamp(-CLIP, CLIP)


class MPUNet(nn.Module):
    """EDM2's U-Net. Given vectors and labels join the noise embedding, given images are extra input channels."""

    memory_format = torch.channels_last

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        *,
        label_dim: int = 0,
        channels: int = 192,
        mult: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (16, 8),
        dropout: float = 0.0,
    ):
        super().__init__()
        noise, embedding, self.label_dim = channels * mult[0], channels * max(mult), label_dim
        self.emb_fourier, self.emb_noise = MPFourier(noise), MPConv(noise, embedding)
        self.emb_label = MPConv(label_dim, embedding) if label_dim else None

        def block(inputs: int, outputs: int, attend: bool, encoder: bool, resample: str | None = None) -> MPBlock:
            return MPBlock(inputs, outputs, embedding, encoder, resample, attend, dropout)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, skips = channels * mult[0], []
        for level, factor in enumerate(mult):
            side, wide = resolution >> level, channels * factor
            if level:
                self.enc[f"{side}x{side}_down"] = block(width, width, False, True, "down")
            else:
                self.enc[f"{side}x{side}_conv"] = MPConv(in_channels + 1, width, 3, 3)
            skips.append(width)
            for index in range(blocks):
                self.enc[f"{side}x{side}_block{index}"] = block(width, wide, side in attention, True)
                width = wide
                skips.append(width)
        for level, factor in reversed(list(enumerate(mult))):
            side, wide = resolution >> level, channels * factor
            if level == len(mult) - 1:
                self.dec[f"{side}x{side}_in0"] = block(width, width, True, False)
                self.dec[f"{side}x{side}_in1"] = block(width, width, False, False)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, False, False, "up")
            for index in range(blocks + 1):
                self.dec[f"{side}x{side}_block{index}"] = block(width + skips.pop(), wide, side in attention, False)
                width = wide
        self.out_conv, self.out_gain = MPConv(width, out_channels, 3, 3), nn.Parameter(torch.zeros([]))

    def forward(self, x: State, noise: Mapping[str, Tensor], condition: Condition) -> State:
        """The raw network F of the preconditioned denoiser, for one image; absent labels count as zeros."""
        ((name, image),) = x.items()
        parts = [image, image.new_ones(len(image), 1, *image.shape[2:])]  # a channel of ones instead of biases
        if condition.images is not None:
            parts.insert(1, condition.images.to(image.dtype))
        y = torch.cat(parts, dim=1).contiguous(memory_format=torch.channels_last)
        emb = self.emb_noise(self.emb_fourier(noise[name]))
        if self.emb_label is not None:
            labels = emb.new_zeros(len(emb), self.label_dim) if condition.labels is None else condition.labels
            emb = mp_sum(emb, self.emb_label(labels.to(emb.dtype) * math.sqrt(self.label_dim)), 0.5)
        emb = mp_silu(emb).to(y.dtype)
        skips = []
        for layer in self.enc.values():
            y = layer(y, emb) if isinstance(layer, MPBlock) else layer(y)
            skips.append(y)
        for key, layer in self.dec.items():
            y = layer(mp_cat(y, skips.pop()) if "block" in key else y, emb)
        return {name: self.out_conv(y, self.out_gain)}
