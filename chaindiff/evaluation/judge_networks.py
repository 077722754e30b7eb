"""Small classifiers of 32x32 images whose pooled features judge samples; unrelated to any encoder of a chain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIZE = 32


class PreActivation(nn.Module):
    """Residual block with normalisation and activation before each convolution (He et al. 2016, 1603.05027)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.norm0, self.norm1 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv0 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv1 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if (channels, stride) != (out, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm0(x))
        x = x if self.skip is None else self.skip(y)
        return x + self.conv1(F.relu(self.norm1(self.conv0(y))))


class ConvTrunk(nn.Module):
    """Pre-activation ResNet of 0.4 M parameters -> 96 features, the mean over positions."""

    family, width = "resnet", 96

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, 1, 1, bias=False)
        blocks = [(24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)]
        self.blocks = nn.Sequential(*(PreActivation(*block) for block in blocks))
        self.norm = nn.BatchNorm2d(self.width)

    def forward(self, x: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n width"]:
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))


class VitTrunk(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) of 0.5 M parameters: 4x4 patches -> 96 features (mean token)."""

    family, width = "vit", 96

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, self.width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIZE // 4) ** 2, self.width))
        layer = nn.TransformerEncoderLayer(
            self.width, 4, 4 * self.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, nn.LayerNorm(self.width), enable_nested_tensor=False)

    def forward(self, x: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n width"]:
        return self.layers(self.patches(x).flatten(2).transpose(1, 2) + self.places).mean(1)


TRUNKS = {"conv": ConvTrunk, "vit": VitTrunk}
