"""Peers of equal parameters and FLOPs, as networks F(x, noise label): EDM as published, diffusers and others."""

from __future__ import annotations

import importlib
import math
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.io.errors import UserError
from chaindiff.networks.unet import UNet
from chaindiff.specs.network import UNetSpec


class Published(nn.Module):
    """EDM's DDPM++ with the operations of its authors' code (Karras et al. 2022, appendix F.2), from our weights.

    Contiguous float32; resampling by depthwise convolutions, biases added afterwards, attention by explicit products.
    """

    def __init__(self, unet: UNet):
        super().__init__()
        copied = {name: nn.Parameter(p.detach().clone().contiguous()) for name, p in unet.named_parameters()}
        self.weights = nn.ParameterDict({name.replace(".", "/"): p for name, p in copied.items()})
        self.layers = [(part, name) for part in ("enc", "dec") for name in getattr(unet, part)]

    def forward(self, x: Tensor, noise: Tensor, augment: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        half = self.weights["map_layer0/weight"].shape[1] // 2
        rate = (1 / 10_000) ** (torch.arange(half, device=x.device) / (half - 1))
        angle = noise.outer(rate)
        emb, skips = torch.cat([angle.sin(), angle.cos()], 1), list[Tensor]()
        if augment is not None:
            emb = emb + augment @ self.weights["map_augment/weight"].t()
        if labels is not None:
            emb = emb + self._linear(labels * math.sqrt(labels.shape[1]), "map_label")
        for name in ("map_layer0", "map_layer1"):
            emb = F.silu(self._linear(emb, name))
        for part, name in self.layers:
            at = f"{part}/{name}"
            if name.endswith("conv"):
                x = self._conv(x, at)
            elif name.endswith("norm"):
                x = F.silu(self._norm(x, at))
            else:
                x = torch.cat([x, skips.pop()], 1) if part == "dec" and "block" in name else x
                x = self._block(x, emb, at, name.rpartition("_")[2])
            if part == "enc":
                skips.append(x)
        return x

    def _block(self, x: Tensor, emb: Tensor, at: str, resample: str) -> Tensor:
        y = self._conv(F.silu(self._norm(x, f"{at}/norm0")), f"{at}/conv0", resample)
        y = F.silu(self._norm(y + self._linear(emb, f"{at}/affine")[:, :, None, None], f"{at}/norm1"))
        skip = self._conv(x, f"{at}/skip", resample) if f"{at}/skip/weight" in self.weights else x
        x = (self._conv(y, f"{at}/conv1") + skip) * math.sqrt(0.5)
        if f"{at}/qkv/weight" in self.weights:
            q, k, v = self._conv(self._norm(x, f"{at}/norm2"), f"{at}/qkv").unflatten(1, (-1, 3)).flatten(3).unbind(2)
            share = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(2)
            y = torch.einsum("nqk,nck->ncq", share, v).reshape(x.shape)
            x = (self._conv(y, f"{at}/proj") + x) * math.sqrt(0.5)
        return x

    def _linear(self, x: Tensor, at: str) -> Tensor:
        return x @ self.weights[f"{at}/weight"].t() + self.weights[f"{at}/bias"]

    def _norm(self, x: Tensor, at: str) -> Tensor:
        groups = next(g for g in range(min(32, x.shape[1] // 4), 0, -1) if x.shape[1] % g == 0)
        return F.group_norm(x, groups, self.weights[f"{at}/weight"], self.weights[f"{at}/bias"], 1e-6)

    def _conv(self, x: Tensor, at: str, resample: str = "") -> Tensor:
        weight, box = self.weights[f"{at}/weight"], x.new_full((x.shape[1], 1, 2, 2), 0.25)
        if resample == "up":
            x = F.conv_transpose2d(x, box * 4, groups=x.shape[1], stride=2)
        elif resample == "down":
            x = F.conv2d(x, box, groups=x.shape[1], stride=2)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2).add_(self.weights[f"{at}/bias"][:, None, None])


def authors(path: Path, unet: UNet, size: int, spec: UNetSpec) -> nn.Module:
    """EDM's own network from a user's copy of its code (a checkout, or networks.py in it), which is executed."""
    file = next((f for f in (path / "training" / "networks.py", path / "networks.py", path) if f.is_file()), None)
    if file is None:
        raise UserError("there is no training/networks.py in it", f"--edm {path}", "give a checkout of NVlabs/edm")
    augment = 0 if unet.map_augment is None else unet.map_augment.weight.shape[1]
    said = {"augment_dim": augment, "model_channels": spec.channels, "channel_mult": spec.mult}
    said |= {"num_blocks": spec.blocks, "attn_resolutions": spec.attention, "dropout": spec.dropout}
    sys.path[:0] = [str(file.parent.parent), str(file.parent)]  # it imports `torch_utils`
    try:
        network = _module("chaindiff_bench_edm", file).SongUNet(size, 3, 3, **said)
        network.load_state_dict(unet.state_dict(), strict=False)
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"does not make EDM's SongUNet: {error}", f"--edm {path}") from error
    finally:
        del sys.path[:2]
    return Authors(network)


class Authors(nn.Module):
    """EDM's own network, which takes class labels too."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor, augment: Tensor | None = None) -> Tensor:
        return self.network(x, noise, None, augment)


def _module(name: str, file: Path) -> ModuleType:
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def k_diffusion() -> ModuleType:
    """`k_diffusion.sampling`, without its package's other imports, which few have installed."""
    if "k_diffusion" not in sys.modules:
        found = find_spec("k_diffusion")
        if found is None:
            raise ImportError("k_diffusion")
        package = ModuleType("k_diffusion")
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


# Widths are multiples of 16, for which convolutions are fast, and FLOPs not above ours by more than 2%.
_DIFFUSERS: dict[int, tuple[tuple[int, ...], int, tuple[bool, ...]]] = {
    32: ((32, 64, 64), 2, (False, True, True)),
    64: ((144, 256, 256, 256), 4, (False, False, True, False)),
}
_DENOISING = {32: (32, (1, 2, 4)), 64: (192, (1, 2, 2, 2))}


def diffusers(size: int) -> nn.Module:
    """`UNet2DModel`."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    widths, layers, attends = _DIFFUSERS[size]
    network = UNet2DModel(
        sample_size=size,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=min(math.gcd(32, *widths), widths[0] // 4),
        attention_head_dim=max(widths),
    )
    return Answer(network, "sample")


def denoising(size: int, **options: Any) -> nn.Module:
    """denoising-diffusion-pytorch's `Unet`."""
    from denoising_diffusion_pytorch import Unet

    width, mults = _DENOISING[size]
    return Unet(width, dim_mults=mults, **options)


class Answer(nn.Module):
    """A network whose output is an attribute of what it returns."""

    def __init__(self, network: nn.Module, attribute: str):
        super().__init__()
        self.network, self.attribute = network, attribute

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return getattr(self.network(x, noise), self.attribute)
