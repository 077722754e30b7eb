"""A diffusion transformer over any number of images, maps, vectors and tokens, each at its own noise level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.edm.denoiser import State
from chaindiff.networks.attention import JointBlock, Norm, Part, angles, cells, modulated, sincos
from chaindiff.networks.blocks import PositionalEmbedding
from chaindiff.networks.interface import Condition, Interface

FREQUENCIES = 256  # features of a noise level, as in DiT


class Transformer(nn.Module):
    """DiT (Peebles & Xie 2023) for one variable, MMDiT (Esser et al. 2024) or a shared sequence for several.

    Every variable has its own embedding, level embedding and output layer: images and maps in patches, a vector as one
    token, tokens as they are. `streams` says how several variables meet: "own" weights and modulation for each, joined
    by attention; "shared" weights, modulated by each variable's own level; or "merged": cells at the same place of
    equal grids are summed into one token, which is the embedding of concatenated channels, and modulated by all levels.
    Given vectors and labels modulate all streams, given images are channels of the largest grid, given tokens are keys
    and values. Modulations and output layers begin at zero: each block is the identity and the output 0 (adaLN-zero).
    """

    def __init__(
        self,
        interface: Interface,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch: int | Mapping[str, int] = 2,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        ratio: float = 4.0,
        norm: Norm = "layer",
        positions: Literal["sincos", "rotary", "both"] = "sincos",
        qk_norm: bool = False,
        streams: Literal["own", "shared", "merged"] = "own",
    ):
        super().__init__()
        self.norm: Norm = norm
        self.width, self.head_width, self.positions = width, width // heads, positions
        self.names, self.label_scale = [*interface.variables], 1000 / interface.label_span
        self.pictured = interface.grid if interface.image_channels else None
        # Where a variable's tokens are: the number of a stream and of a segment in it; a segment is a grid or a row.
        self.segments: list[list[tuple[int, ...]]] = []
        self.places: list[tuple[int, int]] = []
        self.patches: list[int] = []
        self.embed, self.levels, self.out = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for name, shape in interface.variables.items():
            side = (patch if isinstance(patch, int) else patch[name]) if len(shape) == 3 else 1
            values = shape[0] * side**2 if len(shape) == 3 else shape[-1]
            given = interface.image_channels * side**2 if name == self.pictured else 0
            row = shape[:1] if len(shape) == 2 else (1,)
            segment = (shape[1] // side, shape[2] // side) if len(shape) == 3 else row
            if streams != "merged" or not self.segments:
                self.segments.append([])
            if streams != "merged" or len(segment) == 1 or segment not in self.segments[-1]:
                self.segments[-1].append(segment)
                at = len(self.segments[-1]) - 1
            else:
                at = self.segments[-1].index(segment)
            self.places.append((len(self.segments) - 1, at))
            self.patches.append(side)
            self.embed.append(nn.Linear(values + given, width))
            self.levels.append(nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)))
            self.out.append(nn.Linear(width, values))
        self.frequencies = PositionalEmbedding(FREQUENCIES, endpoint=False)
        self.label = nn.Linear(interface.label_dim, width, bias=False) if interface.label_dim else None
        self.augment = nn.Linear(interface.augment_dim, width, bias=False) if interface.augment_dim else None
        self.context = nn.Linear(interface.context[1], width) if interface.context else None
        parts = len(self.segments) if streams == "own" else 1
        settings = {"ratio": ratio, "gated": mlp == "swiglu", "norm": norm, "qk_norm": qk_norm}
        self.blocks = nn.ModuleList(
            JointBlock(width, heads, parts=parts, context=self.context is not None, **settings) for _ in range(depth)
        )
        self.last = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(parts))
        self._begin()

    def _begin(self) -> None:
        """Initial weights as DiT's: Xavier, 0.02 for what enters the modulation, zeros where a block or output ends."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for group in (self.levels, self.label, self.augment):
            for layer in group.modules() if group is not None else ():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        parts = [layer for layer in self.modules() if isinstance(layer, Part)]
        for layer in (*(part.modulation for part in parts), *self.last, *self.out):
            nn.init.zeros_(layer.get_parameter("weight"))

    def forward(self, x: State, noise: Mapping[str, Tensor], condition: Condition) -> State:
        """The raw network F of every variable; absent labels count as zeros."""
        given = condition if condition.prepared is not None else self.prepare(condition)
        streams, told = self._tokens(x, condition), self._told(noise, given.prepared[0])
        absolute, angle = self._positions(next(iter(x.values())))
        streams = [stream + place for stream, place in zip(streams, absolute, strict=True)]
        for block, context in zip(self.blocks, given.prepared[1], strict=True):
            streams = block(streams, told, angle, context)
        found = []
        for number, (stream, c) in enumerate(zip(streams, told, strict=True)):
            shift, scale = self.last[number % len(self.last)](c)[:, None].chunk(2, dim=-1)
            lengths = [_length(segment) for segment in self.segments[number]]
            found.append(modulated(stream, shift, scale, self.norm).split(lengths, dim=1))
        out = {}
        for name, (stream, at), layer, side in zip(self.names, self.places, self.out, self.patches, strict=True):
            value, height = layer(found[stream][at]), self.segments[stream][at][0]
            if x[name].ndim == 4:
                value = rearrange(value, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=side, q=side)
            out[name] = value.reshape(x[name].shape)
        return out

    def prepare(self, condition: Condition) -> Condition:
        """With the embeddings of labels and augmentation, and every block's keys and values of the context."""
        given = ((self.label, condition.labels), (self.augment, condition.augment))
        shared = [layer(value) for layer, value in given if layer is not None and value is not None]
        context: list[Any] = [None] * len(self.blocks)
        if self.context is not None and condition.context is not None:
            tokens, blocks = self.context(condition.context), cast("Iterable[JointBlock]", self.blocks)
            context = [block.project(tokens) for block in blocks]
        return replace(condition, prepared=(shared, context))

    def _tokens(self, x: State, condition: Condition) -> list[Tensor]:
        """The tokens of every stream; of variables that share a segment, the sum."""
        held: dict[tuple[int, int], Tensor] = {}
        for name, place, layer, side in zip(self.names, self.places, self.embed, self.patches, strict=True):
            value = x[name]
            if name == self.pictured and condition.images is not None:
                value = torch.cat([value, condition.images.to(value.dtype)], dim=1)
            if value.ndim == 4:
                value = rearrange(value, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
            token = layer(value[:, None] if value.ndim == 2 else value)
            held[place] = held[place] + token if place in held else token
        parts = [[held[number, at] for at in range(len(row))] for number, row in enumerate(self.segments)]
        return [each[0] if len(each) == 1 else torch.cat(each, dim=1) for each in parts]

    def _told(self, noise: Mapping[str, Tensor], shared: Sequence[Tensor]) -> list[Tensor]:
        """What modulates each stream: the levels of its variables, and embeddings of what is given."""
        told: dict[int, Tensor] = {}
        for name, (stream, _), layer in zip(self.names, self.places, self.levels, strict=True):
            # As in the prior: labels that are no times up to 1000 are spread over the sinusoids' range.
            level = layer(self.frequencies(noise[name] * self.label_scale))
            told[stream] = sum(shared, start=level) if stream not in told else told[stream] + level
        return [F.silu(told[stream]) for stream in range(len(self.segments))]

    def _positions(self, like: Tensor) -> tuple[list[Tensor | float], Tensor | None]:
        """Absolute positions of every stream, and the rotary angles of all tokens; grids cover the same area."""
        grids = [segment for row in self.segments for segment in row if len(segment) == 2]
        extent = max(grids, key=_length, default=(1, 1))
        like = like if like.dtype == torch.float64 else like.float()
        absolute, turned = [], []
        for row in self.segments:
            added = []
            for segment in row:
                grid = cells(*segment, extent, like) if len(segment) == 2 else None
                line = torch.arange(_length(segment), device=like.device).to(like.dtype)[:, None]
                place, fixed = (line, True) if grid is None else (grid, self.positions != "rotary")
                added.append(sincos(place, self.width) if fixed else like.new_zeros(len(place), self.width))
                half = self.head_width // 2
                turned.append(like.new_zeros(len(line), half) if grid is None else angles(grid, half))
            absolute.append(torch.cat(added))
        return absolute, torch.cat(turned) if self.positions != "sincos" and grids else None


def _length(segment: tuple[int, ...]) -> int:
    return segment[0] * segment[-1] if len(segment) == 2 else segment[0]
