"""The prior for vectors: a DALL-E 2 style decoder-only transformer (Ramesh et al. 2022, section 2.2; VCDM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.edm.denoiser import State
from chaindiff.networks.blocks import PositionalEmbedding
from chaindiff.networks.interface import Condition


class TransformerBlock(nn.Module):
    """Pre-norm causal self-attention and a GELU feed-forward layer of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.proj(attended), self.dropout, self.training)
        hidden = F.gelu(self.up(self.norm_forward(x)))
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class Prior(nn.Module):
    """Tokens [context ...][augment label][condition][noise level][noised vector][query]; the output is the query's."""

    def __init__(
        self,
        dim: int,
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        context_dim: int = 0,
        context_length: int = 0,
        width: int = 512,
        depth: int = 6,
        heads: int = 8,
        dropout: float = 0.0,
        label_span: float = 1.0,
    ):
        super().__init__()
        self.label_scale = 1000 / label_span
        self.map_noise = PositionalEmbedding(width, endpoint=True)
        self.map_noise_up, self.map_noise_down = nn.Linear(width, width), nn.Linear(width, width)
        self.map_label = nn.Linear(label_dim, width) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_context = nn.Linear(context_dim, width) if context_dim else None
        self.map_input, self.query = nn.Linear(dim, width), nn.Parameter(torch.randn(width) * 0.02)
        tokens = 3 + bool(label_dim) + bool(augment_dim) + context_length
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: State, noise: Mapping[str, Tensor], condition: Condition) -> State:
        """The raw network F of the preconditioned denoiser, for one vector; absent labels count as zeros."""
        ((name, vector),) = x.items()
        batch = len(vector)
        # The noise label ln(sigma)/4 spans about 3 units; a factor of 1000 spreads it over the sinusoids' range. Labels
        # that are times up to 1000 already have that range.
        level = self.map_noise_down(F.silu(self.map_noise_up(self.map_noise(noise[name] * self.label_scale))))
        given = condition if condition.prepared is not None else self.prepare(condition)
        tokens = [token.expand(batch, -1, -1) for token in given.prepared]
        tokens += [level[:, None], self.map_input(vector)[:, None], self.query.expand(batch, 1, -1)]
        y = torch.cat(tokens, dim=1) + self.position
        for block in self.blocks:
            y = block(y)
        return {name: self.out(self.norm(y[:, -1]))}

    def prepare(self, condition: Condition) -> Condition:
        """With the tokens of context, augmentation and labels."""
        tokens = []
        if self.map_context is not None and condition.context is not None:
            tokens.append(self.map_context(condition.context))
        for layer, label in ((self.map_augment, condition.augment), (self.map_label, condition.labels)):
            if layer is not None:
                tokens.append(layer(layer.weight.new_zeros(1, layer.in_features) if label is None else label)[:, None])
        return replace(condition, prepared=tokens)
