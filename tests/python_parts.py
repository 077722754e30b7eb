"""A small stage and its data, as Python makes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import chaindiff as cd

SIDE, POINT = cd.Variable.vector("side", 1), cd.Variable.vector("point", 2)
UNET = cd.UNet(channels=16, mult=[1, 1], blocks=1, attention=[], dropout=0.3)


def small(**settings) -> cd.Diffusion:
    torch.manual_seed(0)
    network = cd.Prior(width=16, depth=1, heads=2)
    stage = cd.Diffusion(POINT, given=[(SIDE, {"dropout": 0.2})], network=network, **settings)
    for parameter in stage.parameters():  # the last layer begins at zero
        nn.init.normal_(parameter, std=0.1)
    return stage


def columns(rows: int = 40) -> dict[str, Tensor]:
    torch.manual_seed(1)
    side = torch.randn(rows, 1)
    return {"side": side, "point": torch.cat([side, -side], dim=1)}


class Broken:
    """A stage that does not give what it says."""

    name, given, conditionals = "side", (), frozenset()

    def __init__(self, made: dict[str, Tensor]):
        self.made, self.generates = made, {"side": SIDE}

    def sample(self, given, draws):
        yield self.made

    def loss(self, batch, draws):
        raise NotImplementedError

    def cost(self, moving):
        return cd.Cost()
