"""Networks of EDM and VCDM (Karras et al. 2022; Harvey & Wood 2023) as networks of this package: names and settings.

Our U-Nets keep the published names of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError, did_you_mean, some
from chaindiff.networks.arch import ARCHS
from chaindiff.networks.unet import UNet
from chaindiff.specs.base import Spec
from chaindiff.specs.network import UNetSpec
from chaindiff.specs.noise import IddpmSpec, Precondition, PreconditionSpec, VeSpec, VpSpec

# Constructors of the published classes: their arguments, with defaults; ... is required.
COMMON = {"img_resolution": ..., "in_channels": ..., "out_channels": ..., "label_dim": 0, "augment_dim": 0}
INNER = {"channel_mult_emb": 4, "dropout": 0.1, "label_dropout": 0}
UNETS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        **COMMON, **INNER, "model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4,
        "attn_resolutions": [16], "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard",
        "decoder_type": "standard", "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        **COMMON, **INNER, "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}  # fmt: skip
WRAPPER = {"img_resolution": ..., "img_channels": ..., "label_dim": 0, "use_fp16": False, "model_type": "SongUNet"}
ADM = {**WRAPPER, "model_type": "DhariwalUNet"}
# Preconditioners: our spec, then the constructor's own arguments; further ones go on to the U-Net.
PRECONDITIONERS: dict[str, tuple[type[Spec], str, dict[str, Any]]] = {
    "EDMPrecond": (PreconditionSpec, "edm", {**ADM, "sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5}),
    "VPPrecond": (VpSpec, "vp", {**WRAPPER, "beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VEPrecond": (VeSpec, "ve", {**WRAPPER, "sigma_min": 0.02, "sigma_max": 100}),
    "iDDPMPrecond": (IddpmSpec, "iddpm", {**ADM, "C_1": 0.001, "C_2": 0.008, "M": 1000}),
}
# Which of those arguments have a counterpart here; the others have their defaults in every published network.
LEVELS: dict[str, dict[str, str]] = {
    "EDMPrecond": {},
    "VPPrecond": {"beta_d": "beta_d", "beta_min": "beta_min", "epsilon_t": "eps"},
    "VEPrecond": {"sigma_min": "sigma_min", "sigma_max": "sigma_max"},
    "iDDPMPrecond": {"M": "levels"},
}
# What distinguishes the architectures; other combinations were not published.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "SongUNet": {
        "ddpmpp": {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"}
        | {"resample_filter": [1, 1], "decoder_type": "standard", "channel_mult_emb": 4},
        "ncsnpp": {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
        | {"resample_filter": [1, 3, 3, 1], "decoder_type": "standard", "channel_mult_emb": 4},
    },
    "DhariwalUNet": {"adm": {"channel_mult_emb": 4}},
}
SETTINGS = {  # published -> ours
    "model_channels": "channels", "channel_mult": "mult", "num_blocks": "blocks", "attn_resolutions": "attention",
    "dropout": "dropout",
}  # fmt: skip
COMPUTED = {("iDDPMPrecond", "u")}  # tables that are not weights: noise levels, from C_1, C_2 and M
LARGEST = 65_536  # of any size that a snapshot states; the largest published is 1,024


@dataclass(frozen=True)
class Published:
    """A published network in terms of this package."""

    class_name: str
    precondition: Precondition | None  # None: a U-Net by itself
    network: UNetSpec
    resolution: int
    in_channels: int
    out_channels: int
    label_dim: int
    augment_dim: int
    label_dropout: float
    sigma_data: float
    settings: dict[str, Any] = field(default_factory=dict)  # as the published constructor took them

    def build(self) -> UNet:
        """The network on the meta device: names and shapes, no memory."""
        learns = isinstance(self.precondition, IddpmSpec)  # which doubles the output channels
        with torch.device("meta"):
            return UNet(
                self.resolution,
                self.in_channels,
                self.out_channels // (1 + learns),
                learns_variances=learns,
                label_dim=self.label_dim,
                augment_dim=self.augment_dim,
                **self.network.model_dump(exclude={"kind"}),
            )


def published(class_name: str, kwargs: Mapping[str, Any]) -> Published:
    """What a published class and its keyword arguments describe.

    Raises UserError naming the class or argument that is unknown or not supported.
    """
    precondition, inner, said, sigma_data = None, class_name, dict(kwargs), 0.5
    if class_name in PRECONDITIONERS:
        _, kind, signature = PRECONDITIONERS[class_name]
        outer = _complete(class_name, signature, {k: said.pop(k) for k in signature if k in said})
        precondition = _precondition(class_name, outer)
        sigma_data = _number(class_name, "sigma_data", outer.get("sigma_data", 0.5))
        channels = _size(class_name, "img_channels", outer["img_channels"])
        doubled = 2 if kind == "iddpm" else 1  # the iDDPM network also predicts a variance
        said |= {name: outer[name] for name in ("img_resolution", "label_dim")}
        said |= {"in_channels": channels, "out_channels": channels * doubled}
        inner = str(outer["model_type"])
    if inner not in UNETS:
        known = [*UNETS, *PRECONDITIONERS]
        raise UserError(
            f"the network class '{inner:.80}' cannot be imported{did_you_mean(inner, known)}",
            hint="known are EDM's U-Nets, which VCDM's image networks are too; VCDM's auxiliary network is not: train "
            "it with the card clip_prior",
        )
    found = _complete(inner, UNETS[inner], said)
    sizes = {name: _size(inner, name, found[name]) for name in (*COMMON, "model_channels", "num_blocks")}
    for name in ("channel_mult", "attn_resolutions"):
        if not isinstance(found[name], list | tuple):
            raise UserError(f"{inner}: {name} should be a list, not {found[name]!r:.40}")
        found[name] = [_size(inner, name, item) for item in found[name]]
    ours = {ours: found[name] for name, ours in SETTINGS.items()}
    network = _checked(inner, UNetSpec, {"kind": "unet", "arch": _variant(inner, found), **ours})
    _refuse_shape(inner, network, sizes["img_resolution"])
    return Published(
        class_name=inner,
        precondition=precondition,
        network=network,
        resolution=sizes["img_resolution"],
        in_channels=sizes["in_channels"],
        out_channels=sizes["out_channels"],
        label_dim=sizes["label_dim"],
        augment_dim=sizes["augment_dim"],
        label_dropout=_number(inner, "label_dropout", found["label_dropout"]),
        sigma_data=sigma_data,
        settings=dict(kwargs),
    )


def _precondition(class_name: str, outer: Mapping[str, Any]) -> Precondition:
    """Our spec of a published preconditioner. Raises UserError for levels that no published network has."""
    made, kind, signature = PRECONDITIONERS[class_name]
    levels = LEVELS[class_name]
    for name in signature.keys() - ADM.keys() - levels.keys() - {"sigma_data"}:
        if outer[name] != signature[name]:
            raise UserError(f"{class_name}: {name}={outer[name]!r:.40} is not supported, only {signature[name]}")
    return _checked(class_name, made, {"kind": kind, **{ours: outer[name] for name, ours in levels.items()}})


def _checked(class_name: str, made: type[Spec], said: Mapping[str, Any]) -> Any:
    try:
        return made(**said)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"{class_name}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error


def _complete(class_name: str, signature: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in said if name not in signature]
    if unknown:
        raise UserError(f"{class_name} has no argument '{unknown[0]}'{did_you_mean(unknown[0], signature)}")
    missing = [name for name, default in signature.items() if default is ... and name not in said]
    if missing:
        raise UserError(f"{class_name}: the argument '{missing[0]}' is missing")
    return {**signature, **said}


def _size(class_name: str, name: str, value: Any) -> int:
    least = 0 if name in ("label_dim", "augment_dim") else 1
    if type(value) is not int or not least <= value <= LARGEST:
        raise UserError(f"{class_name}: {name} should be a whole number from {least} to {LARGEST}, not {value!r:.40}")
    return value


def _number(class_name: str, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{class_name}: {name} should be a number, not {value!r:.40}")
    return float(value)


def _variant(class_name: str, found: Mapping[str, Any]) -> str:
    """The architecture of these settings. Raises UserError naming the setting that matches none."""
    wrong = {
        arch: [name for name, value in fixed.items() if _plain(found[name]) != value]
        for arch, fixed in VARIANTS[class_name].items()
    }
    arch = min(wrong, key=lambda name: len(wrong[name]))
    for name in wrong[arch]:
        have = VARIANTS[class_name][arch][name]
        raise UserError(f"{class_name}: {name}={found[name]!r:.40} is not supported; {arch} has {have!r}")
    return arch


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _refuse_shape(class_name: str, network: UNetSpec, resolution: int) -> None:
    levels = len(network.mult)
    if not levels or resolution % 2 ** (levels - 1):
        raise UserError(f"{class_name}: {levels} levels of channel_mult do not fit {resolution} pixels")
    widths = {resolution >> level: network.channels * factor for level, factor in enumerate(network.mult)}
    attending = [widths[at] for at in {*network.attention, min(widths)} if at in widths]
    if network.arch == "adm" and any(width % 64 for width in attending):
        raise UserError(f"{class_name}: model_channels={network.channels} is not divisible into heads of 64 channels")


def load_edm_network(class_name: str, kwargs: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> UNet:
    """A published network with its weights, in float32.

    `class_name` and `kwargs` are a U-Net's (SongUNet, DhariwalUNet), or a preconditioner's around one (EDMPrecond,
    VPPrecond, VEPrecond, iDDPMPrecond), which is removed: `published` tells which it was. Raises UserError if an
    argument is not supported, or names, number or shapes of the tensors are not those of the network.
    """
    described = published(class_name, kwargs)
    prefix = "model." if class_name in PRECONDITIONERS else ""  # of the U-Net within a preconditioner
    kept = {name: value for name, value in state_dict.items() if (class_name, name) not in COMPUTED}
    tensors = {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
    if len(described.network.mult) * described.network.blocks > len(tensors):  # before so many blocks are built
        raise UserError(f"{class_name}: {len(tensors)} tensors are too few for num_blocks={described.network.blocks}")
    network = described.build()
    problems = [f"unexpected {name}" for name in kept if not name.startswith(prefix)]
    problems += tensorfile.misfits(network, tensors)
    problems += [f"{name} is {value.dtype}" for name, value in tensors.items() if not value.is_floating_point()]
    taps = torch.tensor(ARCHS[described.network.arch].taps, dtype=torch.float32)
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    problems += [
        f"{name} is another filter than {taps.int().tolist()}"
        for name, value in tensors.items()
        if name.endswith(".resample_filter") and (value.shape != kernel.shape or not torch.equal(value.float(), kernel))
    ]
    if problems:
        raise UserError(f"{class_name}: its tensors do not fit its arguments: {some(problems, 4)}")
    network.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return network.eval()
