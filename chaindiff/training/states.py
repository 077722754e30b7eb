"""Checkpoints of a training run: all that it needs to resume. The last two are kept in case the newer is damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chaindiff.edm.ema import Average
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.metadata import DAMAGED, about
from chaindiff.io.progress import say

MOMENTS = ("exp_avg", "exp_avg_sq")  # of every parameter, kept by Adam and AdamW
NEWEST, PREVIOUS = "state.safetensors", "state.previous.safetensors"


@dataclass(frozen=True)
class State:
    """A checkpoint after `images` of `total` images."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    images: int
    total: int


def last(folder: Path) -> State | None:
    """The newest intact checkpoint in a stage's folder, or None; says so if a newer one is damaged.

    Raises UserError if there are checkpoints but none is intact.
    """
    damage: UserError | None = None
    for path in (folder / NEWEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            found = _read(path)
        except UserError as error:
            damage = damage or error
            continue
        if damage is not None:
            _note(f"{damage.message}; training resumes from the previous checkpoint, at {found.images} images")
        return found
    if damage is not None:
        hint = f"delete it to retrain that stage, and {PREVIOUS} too if it is there"
        raise UserError(damage.message, hint=hint)
    return None


@cache
def _note(text: str) -> None:
    say(text)


def _read(path: Path) -> State:
    tensors, kept = tensorfile.load(path)
    if "images" not in kept:
        raise UserError(f"{path} is not a training state: its metadata does not say how many images were seen")
    said = about(kept, path)
    images, total, batch = said.images, said.total, said.batch
    if images < 1 or total < 0 or (total and images >= total + batch):
        raise UserError(f"{path} is a training state with an impossible number of images: {images} of {total}")
    steps = [value for name, value in tensors.items() if name.startswith("optimizer.") and name.endswith(".step")]
    if not steps:
        raise UserError(f"{path} is a training state without an optimizer")
    if not all(step.numel() == 1 and 1 <= float(step) <= images / batch for step in steps):
        raise UserError(f"{path} is a training state with an impossible number of optimizer steps")
    return State(path, tensors, kept, images, total)


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], damaged: bool = False) -> None:
    """Write the newest checkpoint and keep the one before, unless that is `damaged`: then an older one stays."""
    tensorfile.save(folder / NEWEST, tensors, metadata, None if damaged else folder / PREVIOUS)


def discard(folder: Path) -> None:
    """Delete all checkpoints."""
    for name in (PREVIOUS, NEWEST):  # in this order, so that the previous one never passes for the newest
        (folder / name).unlink(missing_ok=True)


def state_tensors(stage: nn.Module, emas: Mapping[str, Average], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a run needs to resume, as flat named tensors."""
    tensors = {f"model.{k}": v for k, v in stage.state_dict().items()}
    for name, ema in emas.items():
        tensors |= {f"{name}.{k}": v for k, v in ema.model.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in entry.items()}
    return tensors


def restore(
    tensors: dict[str, Tensor],
    stage: nn.Module,
    emas: Mapping[str, Average],
    optimizer: torch.optim.Optimizer,
    where: str,
) -> None:
    """Load a checkpoint's tensors. Raises UserError if they are of another stage or optimizer."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    tensorfile.fill(stage, part("model."), where)
    for name, ema in emas.items():
        tensorfile.fill(ema.model, part(f"{name}."), where)
    state, kept, names = {}, part("optimizer."), ("step", *MOMENTS)
    for index, like in enumerate(stage.parameters()):
        own = {name: kept.pop(f"{index}.{name}") for name in names if f"{index}.{name}" in kept}
        if not own:
            continue  # a parameter that no loss has reached yet
        fits = len(own) == len(names) and own["step"].numel() == 1 and 1 <= float(own["step"]) < math.inf
        if not fits or any(own[name].shape != like.shape for name in MOMENTS):
            raise UserError(f"{where}: the optimizer's state of parameter {index} does not fit it", hint=DAMAGED)
        # Moments in the parameter's memory format are many times faster.
        moments = {name: torch.empty_like(like).copy_(own[name]) for name in MOMENTS}
        state[index] = {"step": own["step"].float().reshape(()), **moments}
    if kept:
        raise UserError(f"{where}: the optimizer's state holds the unknown '{min(kept)}'", hint=DAMAGED)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
