"""Networks of VCDM and EDM2 by the shapes of their tensors, which say all but a few constants (Harvey & Wood 2023;
Karras et al. 2024)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from chaindiff.interop.edm import Published, checked, number, refuse_shape
from chaindiff.interop.pickles import Array, Object
from chaindiff.io.errors import UserError
from chaindiff.specs.network import PriorSpec, UNetSpec
from chaindiff.specs.noise import PreconditionSpec

Shapes = Mapping[str, tuple[int, ...]]

BLOCK = re.compile(r"enc\.(\d+)x\1_block\d+\.conv(_res)?0\.weight")
# Settings that the shapes do not show, with the only values that were published.
FIXED: dict[str, dict[str, Any]] = {
    "EDMPrecond": {"softmax_onehot": False},
    "Precond": {"label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3}
    | {"clip_act": 256, "channels_per_head": 64, "resample_filter": [1, 1]},
}
LOGVAR = ("logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight")  # the loss's weight, for training


def inferred(ema: Object, shapes: Shapes) -> Published:
    """What VCDM's EDMPrecond or EDM2's Precond holds. Raises UserError naming what was never published."""
    kind, prefix = ("Precond", "unet.") if ema.name == "Precond" else ("EDMPrecond", "model.")
    model = (ema.state.get("_modules") or {}).get(prefix[:-1])
    if not isinstance(model, Object) or not isinstance(model.state, dict):
        raise UserError(f"{ema.name}: its network '{prefix[:-1]}' is missing")
    said = {**(model.state.get("_init_kwargs") or {}), **model.state}
    for name, value in FIXED[kind].items():
        if said.get(name, value) != value:
            raise UserError(f"{model.name:.80}: {name}={said[name]!r:.40} is not supported, only {value}")
    if any(factor != 1 for factor in _numbers(ema.state.get("noise_mult"))):
        raise UserError(f"{ema.name}: noise_mult is not supported, only 1")
    inner = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    predicts = "x0" if any(_numbers(ema.state.get("pred_x0"))) else "edm"
    name = model.name.rpartition(".")[2]
    try:
        network, shape, channels = (_prior if "learned_query" in inner else _unet)(name, inner)
    except (LookupError, ArithmeticError) as error:
        raise UserError(f"{name:.80}: its tensors are not those of a network of VCDM or EDM2: {error}") from error
    label = next(
        (inner[k][1] for k in ("map_label.weight", "emb_label.weight", "to_cond_embeds.0.weight") if k in inner), 0
    )
    augment = next((inner[k][1] for k in ("map_augment.weight", "to_augment_embeds.0.weight") if k in inner), 0)
    return Published(
        class_name=name,
        precondition=PreconditionSpec(kind=predicts),
        network=network,
        shape=shape,
        in_channels=channels,
        label_dim=label,
        augment_dim=augment,
        label_dropout=number(ema.name, "label_dropout", said.get("label_dropout", 0)),
        sigma_data=number(ema.name, "sigma_data", ema.state.get("sigma_data", 0.5)),
        prefix=prefix,
        apart=LOGVAR if kind == "Precond" else (),
        given=_given(ema.state.get("structure"), shape, label),
    )


def _numbers(found: Any) -> list[Any]:
    if isinstance(found, Array):
        return found.tensor().flatten().tolist()
    return [*found] if isinstance(found, list | tuple) else [] if found is None else [found]


def _given(structure: Any, shape: tuple[int, ...], label: int) -> tuple[int, ...]:
    """The sizes of the vectors that it was conditioned on, in their order."""
    shapes = (
        structure.state.get("shapes") if isinstance(structure, Object) and isinstance(structure.state, dict) else ()
    )
    widths = [s[0] for s in shapes or () if isinstance(s, tuple) and len(s) == 1]
    if shape[0] in widths and len(shape) == 1:
        widths.remove(shape[0])
    return tuple(widths) if sum(widths) == label else ()


def _unet(name: str, shapes: Shapes) -> tuple[UNetSpec, tuple[int, ...], int]:
    widths: dict[int, list[int]] = {}
    for tensor, shape in shapes.items():
        if found := BLOCK.fullmatch(tensor):
            widths.setdefault(int(found[1]), []).append(shape[0])
    sides = sorted(widths, reverse=True)
    top, edm2 = f"{sides[0]}x{sides[0]}", "emb_noise.weight" in shapes
    other = "adm" if "out_conv.weight" in shapes else "ncsnpp" if "map_noise.freqs" in shapes else "ddpmpp"
    channels = shapes["emb_noise.weight"][1] if edm2 else shapes["map_layer0.weight"][0] // 4
    outputs = shapes["out_conv.weight" if "out_conv.weight" in shapes else f"dec.{top}_aux_conv.weight"][0]
    spec = checked(
        name,
        UNetSpec,
        {
            "kind": "unet",
            "arch": "edm2" if edm2 else other,
            "channels": channels,
            "mult": [widths[side][0] // channels for side in sides],
            "blocks": len(widths[sides[0]]),
            "attention": [
                side
                for side in sides
                if any(f"enc.{side}x{side}_block0.{a}.weight" in shapes for a in ("qkv", "attn_qkv"))
            ],
        },
    )
    refuse_shape(name, spec, sides[0])
    return spec, (outputs, sides[0], sides[0]), shapes[f"enc.{top}_conv.weight"][1] - edm2


def _prior(name: str, shapes: Shapes) -> tuple[PriorSpec, tuple[int, ...], int]:
    layers = "causal_transformer.layers."
    (width,), each = shapes["learned_query"], shapes[f"{layers}0.0.null_kv"][1]
    depth = len({tensor.split(".")[2] for tensor in shapes if tensor.startswith(layers)})
    spec = {"kind": "prior", "arch": "vcdm", "width": width, "depth": depth, "heads": width // each}
    return checked(name, PriorSpec, spec), (width,), 0
