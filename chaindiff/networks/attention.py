"""Blocks of transformers: adaptive norms (DiT; Peebles & Xie 2023) and attention across streams (MMDiT; Esser 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["layer", "rms"]


# ------------------------------------------------------------ positions


def cells(height: int, width: int, extent: tuple[int, int], like: Tensor) -> Float[Tensor, "cells 2"]:
    """Where the cells of a grid lie, row by row, on a larger grid over the same area, whose cells are 1 apart."""
    rows, columns = (
        (torch.arange(n, device=like.device).to(like.dtype) + 0.5) * (whole / n) - 0.5
        for n, whole in zip((height, width), extent, strict=True)
    )
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


def angles(places: Float[Tensor, "tokens axes"], count: int) -> Float[Tensor, "tokens count"]:
    """Places times frequencies 10000^(-i / n), of which every axis has n = count / axes."""
    each = count // places.shape[1]
    frequencies = 10_000.0 ** (-torch.arange(each, device=places.device).to(places.dtype) / each)
    return (places[:, :, None] * frequencies).flatten(1)


def sincos(places: Float[Tensor, "tokens axes"], width: int) -> Float[Tensor, "tokens width"]:
    """Absolute positions: sines and cosines of width / 2 angles."""
    angle = angles(places, width // 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def rotate(x: Float[Tensor, "batch heads tokens c"], angle: Float[Tensor, "tokens half"]) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of features turned, so that q k depends on differences of angles."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


# ------------------------------------------------------------ layers


def normalised(x: Float[Tensor, "*rows width"], norm: Norm) -> Float[Tensor, "*rows width"]:
    """Without weights of its own: the scale that depends on the conditioning takes their place."""
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, norm: Norm) -> Tensor:
    """adaLN (Peebles & Xie 2023, section 3.2)."""
    return torch.addcmul(shift, normalised(x, norm), scale + 1)


class RmsNorm(nn.Module):
    """Of queries and keys, in their own precision, with a weight for every feature."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-6)


class Mlp(nn.Module):
    """GELU, or SwiGLU (Shazeer 2020) with two thirds of the hidden features, which has as many parameters."""

    def __init__(self, width: int, ratio: float, gated: bool):
        super().__init__()
        hidden = int(width * ratio * 2 / 3 if gated else width * ratio)
        self.up, self.down = nn.Linear(width, hidden * (1 + gated)), nn.Linear(hidden, width)
        self.gated = gated

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        if self.gated:
            gate, value = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Part(nn.Module):
    """The weights of one stream in a block."""

    def __init__(self, width: int, heads: int, ratio: float, gated: bool, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (RmsNorm(width // heads) if qk_norm else nn.Identity() for _ in "qk")
        self.mlp = Mlp(width, ratio, gated)

    def project(self, x: Float[Tensor, "batch tokens width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, heads, tokens, features]."""
        q, k, v = rearrange(self.qkv(x), "b n (qkv heads c) -> qkv b heads n c", qkv=3, heads=self.heads)
        return self.q_norm(q), self.k_norm(k), v


class JointBlock(nn.Module):
    """Every stream is normalised, projected and transformed by its own part, and attends to all and the context.

    With one part, all streams share its weights. Context tokens are extra keys and values, as in the U-Net.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        parts: int = 1,
        ratio: float = 4.0,
        gated: bool = False,
        norm: Norm = "layer",
        qk_norm: bool = False,
        context: bool = False,
    ):
        super().__init__()
        self.norm: Norm = norm
        self.heads, self.qk_norm = heads, qk_norm
        self.parts = nn.ModuleList(Part(width, heads, ratio, gated, qk_norm) for _ in range(parts))
        self.context_kv = nn.Linear(width, 2 * width) if context else None

    def project(self, context: Float[Tensor, "batch tokens width"]) -> tuple[Tensor, Tensor]:
        """Keys and values of context tokens, [batch, heads, tokens, features]."""
        assert self.context_kv is not None
        k, v = rearrange(self.context_kv(context), "b n (kv heads c) -> kv b heads n c", kv=2, heads=self.heads)
        return normalised(k, "rms") if self.qk_norm else k, v

    def forward(
        self,
        streams: Sequence[Float[Tensor, "batch _ width"]],
        told: Sequence[Float[Tensor, "batch width"]],
        angle: Float[Tensor, "tokens half"] | None = None,
        given: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """The streams after this block; `told` modulates each, `angle` holds the rotary positions of all of them, and
        `given` the keys and values of context tokens."""
        parts: list[Any] = [self.parts[number % len(self.parts)] for number in range(len(streams))]
        changes = [part.modulation(c)[:, None].chunk(6, dim=-1) for part, c in zip(parts, told, strict=True)]
        projected = [
            part.project(modulated(x, shift, scale, self.norm))
            for part, x, (shift, scale, *_) in zip(parts, streams, changes, strict=True)
        ]
        q, k, v = (each[0] if len(each) == 1 else torch.cat(each, dim=2) for each in zip(*projected, strict=True))
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        if given is not None:
            k, v = (torch.cat([own, extra.to(own.dtype)], dim=2) for own, extra in zip((k, v), given, strict=True))
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")
        out = []
        for part, x, own, (_, _, gate, shift, scale, last) in zip(
            parts, streams, y.split([x.shape[1] for x in streams], dim=1), changes, strict=True
        ):
            x = x + gate * part.proj(own)
            out.append(x + last * part.mlp(modulated(x, shift, scale, self.norm)))
        return out
