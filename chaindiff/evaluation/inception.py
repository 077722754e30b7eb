"""The Inception-v3 of December 2015 up to its 2048 pooled features: the network behind FID.

Szegedy et al. 2016 (arXiv 1512.00567), with the particulars of the published TensorFlow graph: 1008 classes, average
pools that leave the padding out of the mean, and a maximum pool in the last block. Parameters carry the names of the
files in use (`weights-inception-2015-12-05-6726825d.pth`, also called `pt_inception-...`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIZE, WIDTH, CLASSES = 299, 2048, 1008
Kernel = int | tuple[int, int]


class Layer(NamedTuple):
    name: str
    out: int
    kernel: Kernel


Branch = Sequence[Layer | tuple[Layer, ...]]  # convolutions in turn; several at once split the branch at its end


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, pad: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else 0
        self.conv = nn.Conv2d(channels, out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, and a pooled one: `pool` channels through a 1x1 convolution, or the pool alone.

    Without `pool`, the last convolution of each branch and the pool have stride 2 and no padding.
    """

    def __init__(self, channels: int, branches: Sequence[Branch], pool: int = 0, largest: bool = False):
        super().__init__()
        self.halve, self.largest, self.paths = pool == 0, largest, []
        for branch in branches:
            width, path = channels, []
            for number, step in enumerate(branch):
                layers = (step,) if isinstance(step, Layer) else step
                last = number == len(branch) - 1
                for name, out, kernel in layers:
                    reduce = last and self.halve
                    self.add_module(name, Conv(width, out, kernel, 2 if reduce else 1, not reduce))
                path.append([layer.name for layer in layers])
                width = sum(layer.out for layer in layers)
            self.paths.append(path)
        if pool:
            self.branch_pool = Conv(channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for path in self.paths:
            y = x
            for names in path:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            out.append(y)
        if self.halve:
            out.append(F.max_pool2d(x, 3, 2))
        else:
            pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            out.append(self.branch_pool(pooled))
        return torch.cat(out, 1)


def _a(channels: int, pool: int) -> Mixed:
    double: Branch = [Layer("branch3x3dbl_1", 64, 1), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)]
    return Mixed(
        channels,
        [[Layer("branch1x1", 64, 1)], [Layer("branch5x5_1", 48, 1), Layer("branch5x5_2", 64, 5)], double],
        pool,
    )


def _b(channels: int) -> Mixed:
    double: Branch = [Layer("branch3x3dbl_1", 64, 1), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)]
    return Mixed(channels, [[Layer("branch3x3", 384, 3)], double])


def _c(channels: int, inner: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    single: Branch = [
        Layer("branch7x7_1", inner, 1),
        Layer("branch7x7_2", inner, row),
        Layer("branch7x7_3", 192, column),
    ]
    double: Branch = [
        Layer("branch7x7dbl_1", inner, 1),
        Layer("branch7x7dbl_2", inner, column),
        Layer("branch7x7dbl_3", inner, row),
        Layer("branch7x7dbl_4", inner, column),
        Layer("branch7x7dbl_5", 192, row),
    ]
    return Mixed(channels, [[Layer("branch1x1", 192, 1)], single, double], 192)


def _d(channels: int) -> Mixed:
    seven: Branch = [
        Layer("branch7x7x3_1", 192, 1),
        Layer("branch7x7x3_2", 192, (1, 7)),
        Layer("branch7x7x3_3", 192, (7, 1)),
        Layer("branch7x7x3_4", 192, 3),
    ]
    return Mixed(channels, [[Layer("branch3x3_1", 192, 1), Layer("branch3x3_2", 320, 3)], seven])


def _e(channels: int, largest: bool) -> Mixed:
    row, column = (1, 3), (3, 1)
    single: Branch = [
        Layer("branch3x3_1", 384, 1),
        (Layer("branch3x3_2a", 384, row), Layer("branch3x3_2b", 384, column)),
    ]
    double: Branch = [
        Layer("branch3x3dbl_1", 448, 1),
        Layer("branch3x3dbl_2", 384, 3),
        (Layer("branch3x3dbl_3a", 384, row), Layer("branch3x3dbl_3b", 384, column)),
    ]
    return Mixed(channels, [[Layer("branch1x1", 320, 1)], single, double], 192, largest)


class Inception(nn.Module):
    """Images at 299 x 299, scaled to (x - 128) / 128 -> 2048 features. `fc` is kept so that files load whole."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_c(768, inner) for inner in (128, 160, 160, 192))
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, largest=False), _e(2048, largest=True)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Float[Tensor, "n 3 299 299"]) -> Float[Tensor, "n 2048"]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))
