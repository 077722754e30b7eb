"""Building blocks of EDM's family of U-Nets (DDPM++, NCSN++, ADM): convolutions, embeddings, the residual block.

Names of parameters are those of published EDM networks, so that their weights load unchanged.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.kernels.group_norm import group_norm_silu
from chaindiff.networks.arch import Arch, Init

LEVEL_FREQUENCIES = 8  # of the sinusoids of a noise level


def init_weight(shape: tuple[int, ...], init: Init) -> Tensor:
    """Initial weights of EDM's networks: xavier or kaiming uniform, times a gain (EDM, appendix F.2 and its tables)."""
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    kind, gain = init
    bound = math.sqrt(6 / (fan_in + fan_out)) if kind == "xavier" else math.sqrt(3 / fan_in)
    return torch.empty(shape).uniform_(-1, 1) * (bound * gain)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, init: Init, bias: bool = True, bias_gain: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(init_weight((outputs, inputs), init))
        first = init_weight((outputs, inputs), init)[:, 0] * bias_gain if bias_gain else torch.zeros(outputs)
        self.bias = nn.Parameter(first) if bias else None

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution with optional 2x up- or downsampling by a separable filter; kernel 0 resamples only.

    `filter_last` applies the filter after the convolution, as NCSN++'s residual input path does.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        init: Init,
        resample: str | None = None,
        taps: tuple[int, ...] = (1, 1),
        filter_last: bool = False,
        bias_gain: float = 0.0,
    ):
        super().__init__()
        self.resample, self.filter_last, self.box = resample, filter_last, tuple(taps) == (1, 1)
        self.weight = self.bias = None
        if kernel:
            self.weight = nn.Parameter(init_weight((outputs, inputs, kernel, kernel), init))
            first = (
                init_weight((outputs, inputs * kernel**2), init)[:, 0] * bias_gain
                if bias_gain
                else torch.zeros(outputs)
            )
            self.bias = nn.Parameter(first)
        row = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer(
            "resample_filter", torch.outer(row, row)[None, None] / row.sum() ** 2 if resample else None
        )

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height2 width2"]:
        if self.filter_last:
            return self._filter(self._convolve(x, self._reach()))
        return self._convolve(self._filter(x), 0)

    def _reach(self) -> int:
        return 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2

    def _convolve(self, x: Tensor, extra: int) -> Tensor:
        if self.weight is None:
            return x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, padding=self.weight.shape[-1] // 2 + extra)

    def _filter(self, x: Tensor) -> Tensor:
        if self.resample_filter is None:
            return x
        if self.box:  # the 2x2 box filter has dedicated kernels, many times faster than a depthwise convolution
            return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, groups=channels, stride=2, padding=0 if self.filter_last else self._reach())
        return F.conv_transpose2d(x, taps * 4, groups=channels, stride=2, padding=self._reach())


class GroupNorm(nn.Module):
    """Group normalisation with min(32, channels // 4) groups (EDM's rule), or the next fewer that divides them."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        wanted = max(1, min(32, channels // 4))
        self.groups, self.eps = next(g for g in range(wanted, 0, -1) if channels % g == 0), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GroupNormSilu(GroupNorm):
    """silu(norm(x + added) (1 + scale) + shift), each of these [batch, channels] and optional."""

    def forward(
        self,
        x: Float[Tensor, "batch channels *space"],
        *,
        scale: Float[Tensor, "batch channels"] | None = None,
        shift: Float[Tensor, "batch channels"] | None = None,
        added: Float[Tensor, "batch channels"] | None = None,
    ) -> Float[Tensor, "batch channels *space"]:
        return group_norm_silu(x, self.groups, self.weight, self.bias, self.eps, scale=scale, shift=shift, added=added)


class PositionalEmbedding(nn.Module):
    """Sinusoids of the noise label, [cos | sin]; `endpoint` ends at 1 / max_positions."""

    def __init__(self, channels: int, endpoint: bool, max_positions: int = 10_000):
        super().__init__()
        self.channels, self.endpoint, self.max_positions = channels, endpoint, max_positions

    def forward(self, x: Float[Tensor, " batch"]) -> Float[Tensor, "batch channels"]:
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x.device) / (half - self.endpoint)
        angle = torch.outer(x, ((1 / self.max_positions) ** exponent).to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features of the noise label (NCSN++)."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, x: Float[Tensor, " batch"]) -> Float[Tensor, "batch channels"]:
        angle = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Block(nn.Module):
    """Residual block with optional resampling, attention over pixels and cross-attention to context tokens.

    The embedding enters before the second norm as a shift, or (`adaptive_scale`, ADM) after it as scale and shift.
    Context tokens are extra keys and values of the block's own attention, as in GLIDE (section 2.1).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        arch: Arch,
        *,
        resample: str | None = None,
        attend: bool = False,
        context: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        a, init = arch, {"init": arch.init, "bias_gain": arch.bias_gain}
        self.in_channels, self.out_channels, self.heads = inputs, outputs, a.heads(outputs) if attend else 0
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, a.skip_scale, a.adaptive_scale
        self.norm0 = GroupNormSilu(inputs, a.eps)
        self.conv0 = Conv2d(inputs, outputs, 3, resample=resample, taps=a.taps, **init)
        self.affine = Linear(embedding, outputs * (2 if a.adaptive_scale else 1), **init)
        self.norm1 = GroupNormSilu(outputs, a.eps)
        self.conv1 = Conv2d(outputs, outputs, 3, a.init_zero)
        self.skip = None
        if outputs != inputs or resample:
            kernel = 1 if a.resample_projection or outputs != inputs else 0
            self.skip = Conv2d(inputs, outputs, kernel, resample=resample, taps=a.taps, **init)
        if attend:
            self.norm2 = GroupNorm(outputs, a.eps)
            self.qkv = Conv2d(outputs, outputs * 3, 1, a.init_attention)
            self.proj = Conv2d(outputs, outputs, 1, a.init_zero)
            self.context_kv = Linear(context, outputs * 2, a.init_attention) if context else None

    def forward(
        self,
        x: Float[Tensor, "batch inputs height width"],
        embedding: Float[Tensor, "batch emb"],
        given: Float[Tensor, "2 batch heads tokens c"] | None = None,
    ) -> Float[Tensor, "batch outputs height2 width3"]:
        """`given` are the keys and values of context tokens, by `project`."""
        y = self.conv0(self.norm0(x))
        told = self.affine(embedding).to(y.dtype)
        if self.adaptive_scale:
            scale, shift = told.chunk(2, dim=1)
            y = self.norm1(y, scale=scale, shift=shift)
        else:
            y = self.norm1(y, added=told)
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        y = (y + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.heads:
            y = (y + self.proj(self._attend(self.norm2(y), given))) * self.skip_scale
        return y

    def project(self, context: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "2 batch heads tokens c"]:
        """The keys and values of context tokens."""
        assert self.context_kv is not None
        return rearrange(self.context_kv(context), "b n (kv heads c) -> kv b heads n c", heads=self.heads, kv=2)

    def _attend(self, x: Tensor, given: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b (heads c qkv) h w -> qkv b heads (h w) c", heads=self.heads, qkv=3)
        if given is not None:
            k, v = (torch.cat([own, extra.to(own.dtype)], dim=2) for own, extra in zip((k, v), given, strict=True))
        y = F.scaled_dot_product_attention(q, k, v)
        return rearrange(y, "b heads (h w) c -> b (heads c) h w", h=x.shape[2])


def sinusoids(label: Float[Tensor, " batch"]) -> Float[Tensor, "batch features"]:
    """Cosines and sines of a noise label, with doubling frequencies."""
    angle = label[:, None] * (2.0 ** torch.arange(LEVEL_FREQUENCIES, device=label.device)).to(label.dtype)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
