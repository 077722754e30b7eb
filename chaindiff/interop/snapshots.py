"""Snapshots of the training of EDM, EDM2 and VCDM: pickles {ema, loss_fn, dataset_kwargs ...}, read as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chaindiff.interop.pickles import Array, Object, read_pickle
from chaindiff.interop.published import Published, load_network, published
from chaindiff.io.errors import UserError
from chaindiff.networks import MPUNet, Prior, UNet

LONGEST = 200  # characters of a module's full name, at most
AUGMENT = ("p", "xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac")  # strengths of EDM's augmentation


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot holds. `noise` is (mean, std) of ln sigma in training; `augment` its strengths by name."""

    class_name: str
    published: Published
    network: UNet | MPUNet | Prior
    noise: tuple[float, float] | None
    augment: dict[str, float]


def read_snapshot(path: Path) -> Snapshot:
    """The EMA network of a snapshot, and what it records of its training.

    Raises UserError if the file cannot be read safely, or its network is not one of EDM's, EDM2's or VCDM's.
    """
    content = read_pickle(path)
    ema = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(ema, Object) or not isinstance(ema.state, dict):
        found = (
            f"it holds {', '.join(sorted(map(str, content))):.100}" if isinstance(content, dict) else "not a mapping"
        )
        raise UserError(f"{path} is a pickle, but not a snapshot of EDM, EDM2 or VCDM with an object 'ema': {found}")
    try:
        stored = arrays(ema, path.stat().st_size)
        inner = ema.state.get("_modules") or {}
        model = inner.get("model") or inner.get("unet") or ema
        said = {**settings(ema), **settings(model), **ema.state, **model.state}
        described = published(ema.name, said, {name: array.size for name, array in stored.items()})
        described = replace(described, settings=settings(ema))
        network = load_network(described, {name: array.tensor() for name, array in stored.items()})
    except UserError as error:
        raise UserError(f"{path}: {error.message}", hint=error.hint) from error
    loss, pipe = (_state(content.get(name)) for name in ("loss_fn", "augment_pipe"))
    noise = (loss["P_mean"], loss["P_std"]) if {"P_mean", "P_std"} <= loss.keys() else None
    return Snapshot(ema.name, described, network, noise, {name: pipe[name] for name in AUGMENT if name in pipe})


def _state(found: Any) -> dict[str, float]:
    """The numbers in an object's state."""
    state = found.state if isinstance(found, Object) and isinstance(found.state, dict) else {}
    return {name: float(value) for name, value in state.items() if type(value) in (int, float)}


def settings(record: Object) -> dict[str, Any]:
    """The arguments with which an object was created, as far as they are numbers, texts or lists of these."""
    kwargs, kinds = record.state.get("_init_kwargs"), (type(None), bool, int, float, str)
    return {
        str(name): value
        for name, value in (kwargs.items() if isinstance(kwargs, dict) else ())
        if all(type(item) in kinds for item in (value if isinstance(value, list | tuple) else [value]))
    }


def arrays(root: Object, limit: int) -> dict[str, Array]:
    """Parameters and buffers of a module by their full names, as torch's own `state_dict` gives them.

    Raises UserError if a module is not one, if one with inner modules appears twice, or if there would be more than
    `limit` bytes of tensors.
    """
    found: dict[str, Array] = {}
    queue, seen = [("", root)], set()
    while queue:
        prefix, module = queue.pop()
        state = module.state if isinstance(module, Object) else None
        if not isinstance(state, dict) or id(module) in seen or len(prefix) > LONGEST:
            raise UserError(f"'{prefix[:80]}' is not a module, is part of the network twice, or is nested too deeply")
        if state.get("_modules"):  # layers may share a rotary embedding
            seen.add(id(module))
        parts = {name: state.get(name) or {} for name in ("_parameters", "_buffers", "_modules")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise UserError(f"the module '{prefix[:80]}' has no parameters, buffers or modules by name")
        passing = state.get("_non_persistent_buffers_set") or ()
        for name, value in (parts["_parameters"] | parts["_buffers"]).items():
            if value is None or name in passing:
                continue
            if not isinstance(value, Array):
                raise UserError(f"'{f'{prefix}{name}':.80}' is not a tensor")
            found[f"{prefix}{name}"] = value
        queue += [(f"{prefix}{name}.", part) for name, part in parts["_modules"].items() if part is not None]
    total = sum(array.bytes for array in found.values())
    if total > limit:
        raise UserError(f"its tensors share memory: {total} bytes of them in a file of {limit}")
    return found


def kind_of(snapshot: Snapshot) -> str:
    """A one-line description for people."""
    p = snapshot.published
    count = sum(parameter.numel() for parameter in snapshot.network.parameters())
    size = " x ".join(map(str, p.shape[1:])) + f", {p.in_channels} channels" if p.shape[1:] else f"{p.shape[0]} entries"
    labels = f"label of {' + '.join(map(str, p.given or (p.label_dim,)))}" if p.label_dim else "no label"
    augment = f"augmentation label of {p.augment_dim}" if p.augment_dim else "no augmentation label"
    return f"{p.class_name} ({p.network.arch}), {size}, {count:,} parameters, {labels}, {augment}"
