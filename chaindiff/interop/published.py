"""Networks of EDM, EDM2 and VCDM as networks of this package (Karras et al. 2022, 2024; Harvey & Wood 2023).

Names and shapes of the tensors say what a network is; our U-Nets keep the published names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from chaindiff.interop.pickles import Array, Object
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError, did_you_mean, some
from chaindiff.networks import Interface, MPUNet, Prior, UNet, build
from chaindiff.networks.arch import ARCHS
from chaindiff.specs.network import PriorSpec, UNetSpec
from chaindiff.specs.noise import IddpmSpec, Precondition

Shapes = Mapping[str, tuple[int, ...]]
Found = tuple[UNetSpec | PriorSpec, tuple[int, ...], int]  # network, what it generates, input channels

UNETS = ("SongUNet", "DhariwalUNet")
# Preconditioners: our kind, the levels with a counterpart here, and settings with the only values ever published.
PRECONDITIONERS: dict[str, tuple[str, dict[str, str], dict[str, list]]] = {
    "EDMPrecond": ("edm", {}, {"softmax_onehot": [False], "noise_mult": [1], "pred_x0": [0, 1]}),  # VCDM's too
    "VPPrecond": ("vp", {"beta_d": "beta_d", "beta_min": "beta_min", "epsilon_t": "eps"}, {"M": [1000]}),
    "VEPrecond": ("ve", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}, {}),
    "iDDPMPrecond": ("iddpm", {"M": "levels"}, {"C_1": [0.001], "C_2": [0.008]}),
    "Precond": ("edm", {}, {
        "label_balance": [0.5], "concat_balance": [0.5], "res_balance": [0.3], "attn_balance": [0.3],
        "clip_act": [256], "channels_per_head": [64], "resample_filter": [[1, 1]],
    }),
}  # fmt: skip
# Tensors of preconditioners that sampling does without: noise levels, from C_1, C_2 and M; the weight of EDM2's loss.
APART = {
    "iDDPMPrecond": ("u",),
    "Precond": ("logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"),
}
BLOCK = re.compile(r"enc\.(\d+)x\1_block\d+\.conv(_res)?0\.weight")
LAYERS = "causal_transformer.layers."
# Our names in VCDM's auxiliary network and the published ones, in a layer and outside; the rest of a name follows.
LAYER = {
    "norm_attention.weight": "0.norm.g", "q.": "0.to_q.", "kv.": "0.to_kv.", "null": "0.null_kv", "up.": "1.1.",
    "freqs": "0.rotary_emb.freqs", "proj.": "0.to_out.0.", "norm_out.weight": "0.to_out.1.g", "down.": "1.5.",
    "norm_forward.weight": "1.0.g",
}  # fmt: skip
PRIOR = {
    "map_noise_up.": "to_time_embeds.0.1.net.0.0.", "map_noise_middle.": "to_time_embeds.0.1.net.1.0.",
    "map_noise_down.": "to_time_embeds.0.1.net.2.", "map_label.": "to_cond_embeds.0.", "query": "learned_query",
    "map_augment.": "to_augment_embeds.0.", "norm.weight": "causal_transformer.norm.g",
    "out.": "causal_transformer.project_out.", "bias.": "causal_transformer.rel_pos_bias.relative_attention_bias.",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published network in terms of this package."""

    class_name: str
    precondition: Precondition | None  # None: a U-Net by itself
    network: UNetSpec | PriorSpec
    shape: tuple[int, ...]  # of what it generates
    in_channels: int
    label_dim: int
    augment_dim: int
    label_dropout: float
    sigma_data: float
    prefix: str  # of its tensors, within a preconditioner
    given: tuple[int, ...]  # sizes of the parts of its label, where known
    settings: dict[str, Any] = field(default_factory=dict)  # as the published constructor took them

    def build(self) -> Any:
        """The network on the meta device: names and shapes, no memory."""
        told: dict[str, Any] = {"label_dim": self.label_dim, "augment_dim": self.augment_dim}
        with torch.device("meta"):
            if isinstance(self.precondition, IddpmSpec):
                settings = self.network.model_dump(exclude={"kind"})
                return UNet(self.shape[1], self.in_channels, self.shape[0], learns_variances=True, **told, **settings)
            images = self.in_channels - self.shape[0] if len(self.shape) == 3 else 0
            return build(self.network, Interface({"x": self.shape}, image_channels=images, **told))

    def theirs(self, name: str) -> str:
        """The published name of one of our tensors."""
        if isinstance(self.network, UNetSpec):
            return self.prefix + name
        head, table = self.prefix, PRIOR
        if name.startswith("blocks."):
            _, number, name = name.split(".", 2)
            head, table = f"{head}{LAYERS}{number}.", LAYER
        ours = next(ours for ours in table if name.startswith(ours))
        return head + table[ours] + name.removeprefix(ours)


def published(class_name: str, said: Mapping[str, Any], shapes: Shapes) -> Published:
    """What a published class holds whose tensors have these shapes; `said` are its and its network's settings.

    Raises UserError naming the class, setting or tensor that was never published.
    """
    if class_name not in (known := (*UNETS, *PRECONDITIONERS)):
        problem = f"the network class '{class_name:.80}' cannot be imported{did_you_mean(class_name, known)}"
        raise UserError(problem, hint="known are the networks of EDM, EDM2 and VCDM")
    kind, levels, fixed = PRECONDITIONERS.get(class_name, ("", {}, {}))
    for name, values in fixed.items():
        if _single(said.get(name)) not in (None, *values):
            raise UserError(f"{class_name}: {name} is not supported but for {' or '.join(map(str, values))}")
    precondition = None
    if kind:
        fields = {ours: said[theirs] for theirs, ours in levels.items() if theirs in said}
        kind = "x0" if _single(said.get("pred_x0")) else kind
        precondition = _checked(class_name, TypeAdapter(Precondition).validate_python, {"kind": kind, **fields})
    prefix = "unet." if class_name == "Precond" else "model." if kind else ""
    inner = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    try:
        network, shape, channels = (_prior if "learned_query" in inner else _unet)(class_name, inner, said)
    except (LookupError, ArithmeticError, ValueError) as error:
        raise UserError(f"{class_name}: its tensors are not those of a network of EDM, EDM2 or VCDM") from error
    if isinstance(precondition, IddpmSpec):  # whose network also predicts a variance
        shape = (shape[0] // 2, *shape[1:])

    def width(*names: str) -> int:
        return next((inner[name][-1] for name in names if name in inner), 0)

    label = width("map_label.weight", "emb_label.weight", "to_cond_embeds.0.weight")
    return Published(
        class_name=class_name,
        precondition=precondition,
        network=network,
        shape=shape,
        in_channels=channels,
        label_dim=label,
        augment_dim=width("map_augment.weight", "to_augment_embeds.0.weight"),
        label_dropout=_number(class_name, "label_dropout", said.get("label_dropout", 0)),
        sigma_data=_number(class_name, "sigma_data", said.get("sigma_data", 0.5)),
        prefix=prefix,
        given=_given(said.get("structure"), shape, label),
    )


def _single(found: Any) -> Any:
    """VCDM has some settings as sequences or tensors, an entry for each variable that is generated: one."""
    items = found.tensor().flatten().tolist() if isinstance(found, Array) else found
    return items[0] if isinstance(items, list | tuple) and len(items) == 1 else items


def _checked(class_name: str, made: Callable[[Any], Any], said: Any) -> Any:
    try:
        return made(said)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"{class_name}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error


def _number(class_name: str, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{class_name}: {name} should be a number")
    return float(value)


def _given(structure: Any, shape: tuple[int, ...], label: int) -> tuple[int, ...]:
    """The sizes of the vectors that VCDM's network was conditioned on, in their order."""
    state = structure.state if isinstance(structure, Object) and isinstance(structure.state, dict) else {}
    shapes = state.get("shapes")
    shapes = shapes if isinstance(shapes, list) else []
    widths = [s[0] for s in shapes if isinstance(s, tuple) and len(s) == 1 and isinstance(s[0], int)]
    if shape[0] in widths and len(shape) == 1:
        widths.remove(shape[0])
    return tuple(widths) if sum(widths) == label else ()


def _unet(class_name: str, shapes: Shapes, said: Mapping[str, Any]) -> Found:
    widths: dict[int, list[int]] = {}
    for tensor, shape in shapes.items():
        if found := BLOCK.fullmatch(tensor):
            widths.setdefault(int(found[1]), []).append(shape[0])
    sides = sorted(widths, reverse=True)
    top, edm2 = f"{sides[0]}x{sides[0]}", "emb_noise.weight" in shapes
    arch = "adm" if "out_conv.weight" in shapes else "ncsnpp" if "map_noise.freqs" in shapes else "ddpmpp"
    channels = shapes["emb_noise.weight"][1] if edm2 else shapes["map_layer0.weight"][0] // 4
    attends = [s for s in sides if {f"enc.{s}x{s}_block0.{q}.weight" for q in ("qkv", "attn_qkv")} & shapes.keys()]
    spec = {
        "kind": "unet", "arch": "edm2" if edm2 else arch, "channels": channels, "attention": attends,
        "mult": [widths[side][0] // channels for side in sides], "blocks": len(widths[sides[0]]),
        "dropout": said.get("dropout", 0.0 if edm2 else 0.1),
    }  # fmt: skip
    if len(sides) > 20 or sides[0] % 2 ** (len(sides) - 1):
        raise UserError(f"{class_name}: {len(sides)} resolutions do not fit {sides[0]} pixels")
    outputs = shapes["out_conv.weight" if "out_conv.weight" in shapes else f"dec.{top}_aux_conv.weight"][0]
    inputs = shapes[f"enc.{top}_conv.weight"][1] - edm2
    return _checked(class_name, UNetSpec.model_validate, spec), (outputs, sides[0], sides[0]), inputs


def _prior(class_name: str, shapes: Shapes, said: Mapping[str, Any]) -> Found:
    (width,), each = shapes["learned_query"], shapes[f"{LAYERS}0.0.null_kv"][1]
    depth = len({tensor.split(".")[2] for tensor in shapes if tensor.startswith(LAYERS)})
    spec = {"kind": "prior", "arch": "vcdm", "width": width, "depth": depth, "heads": width // each}
    return _checked(class_name, PriorSpec.model_validate, spec), (width,), 0


def load_network(described: Published, state_dict: Mapping[str, Tensor]) -> UNet | MPUNet | Prior:
    """A published network with its weights, in float32; a preconditioner around it is removed.

    Raises UserError if names, number or shapes of the tensors are not those of the network.
    """
    apart, spec = APART.get(described.class_name, ()), described.network
    found = {name: value for name, value in state_dict.items() if name not in apart}
    if isinstance(spec, UNetSpec) and len(spec.mult) * spec.blocks > len(found):  # before so many blocks are built
        raise UserError(f"{described.class_name}: {len(found)} tensors are too few for {spec.blocks} blocks a level")
    network = described.build()
    ours = {described.theirs(name): name for name in network.state_dict()}
    tensors = {ours.get(name, name): value for name, value in found.items()}
    problems = tensorfile.misfits(network, tensors)
    problems += [f"{name} is {value.dtype}" for name, value in tensors.items() if not value.is_floating_point()]
    taps = torch.tensor(ARCHS[spec.arch].taps if spec.arch in ARCHS else (1, 1), dtype=torch.float32)
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    problems += [
        f"{name} is another filter than {taps.int().tolist()}"
        for name, value in tensors.items()
        if name.endswith(".resample_filter") and (value.shape != kernel.shape or not torch.equal(value.float(), kernel))
    ]
    if problems:
        raise UserError(f"{described.class_name}: its tensors do not fit together: {some(problems, 4)}")
    network.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return network.eval()
