"""The transformer of VCDM's auxiliary network (Harvey & Wood 2023): cosine attention with one key for all heads."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

BUCKETS, FARTHEST = 32, 128  # of the relative positions
ROTARY = 32  # features of each head that are turned, at most
SCALE = 16.0  # of the cosine of query and key


class RelativeBias(nn.Module):
    """T5's bias of each head by distance (Raffel et al. 2020, section 2.1), causal: exact at first, then logarithmic.

    Keys are counted from the null key, which every query sees: query i is as far from null as from the first token.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(BUCKETS, heads))

    def forward(self, tokens: int) -> Float[Tensor, "heads tokens keys"]:
        places = torch.arange(tokens + 1, device=self.weight.device)
        ahead = places - places[:tokens, None]  # of the key, counted from null, before the query
        distance, exact = (-ahead).clamp_min(0), BUCKETS // 2
        far = exact + ((distance / exact).clamp_min(1).log() / math.log(FARTHEST / exact) * exact).long()
        bucket = torch.where(distance < exact, distance, far.clamp_max(BUCKETS - 1))
        return self.weight[bucket].masked_fill((ahead > 1)[..., None], -math.inf).permute(2, 0, 1)


def turned(x: Float[Tensor, "batch heads tokens c"], angle: Float[Tensor, "tokens pairs"]) -> Tensor:
    """Rotary positions (Su et al. 2021) of neighbouring features; those beyond the pairs stay."""
    part, rest = x[..., : 2 * angle.shape[1]], x[..., 2 * angle.shape[1] :]
    one, other = part[..., ::2], part[..., 1::2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    both = torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2)
    return torch.cat([both, rest], dim=-1)


class CosineBlock(nn.Module):
    """Causal attention to one key and value for all heads (multi-query) and to a null, then SwiGLU; both pre-norm."""

    freqs: Tensor

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout, each = heads, dropout, width // heads
        self.norm_attention, self.norm_out, self.norm_forward = (nn.LayerNorm(width, bias=False) for _ in range(3))
        self.q, self.kv, self.proj = (nn.Linear(width, n, bias=False) for n in (width, 2 * each, width))
        self.null = nn.Parameter(torch.randn(2, each))
        self.up, self.down = nn.Linear(width, 8 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        count = min(ROTARY, each)
        self.register_buffer("freqs", 10_000.0 ** (-torch.arange(0, count, 2) / count))

    def forward(
        self, x: Float[Tensor, "batch tokens width"], bias: Float[Tensor, "heads tokens keys"]
    ) -> Float[Tensor, "batch tokens width"]:
        normed = self.norm_attention(x)
        q = self.q(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(normed)[:, None].chunk(2, dim=-1)
        angle = torch.outer(torch.arange(x.shape[1], device=x.device).to(self.freqs), self.freqs)
        null_k, null_v = self.null.to(k.dtype).expand(len(x), 1, -1, -1).split(1, dim=2)
        k, v = torch.cat([null_k, turned(k, angle)], dim=2), torch.cat([null_v, v], dim=2)
        q, k = F.normalize(turned(q, angle), dim=-1), F.normalize(k, dim=-1)
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=SCALE)
        y = self.norm_out(self.proj(y.transpose(1, 2).flatten(2)))
        x = x + F.dropout(y, self.dropout, self.training)
        value, gate = self.up(self.norm_forward(x)).chunk(2, dim=-1)
        return x + F.dropout(self.down(value * F.silu(gate)), self.dropout, self.training)
