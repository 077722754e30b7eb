"""Initialise a stage from another network's weights: shared parts are copied, new conditioning starts at zero.

The stage then starts as the same function (VCDM, section 4; GLIDE, section 2.4, for input channels).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from chaindiff.chain.conditioning import Link
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.formulation import preconditioning
from chaindiff.edm.precondition import IDDPM
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError, some
from chaindiff.io.metadata import About, about
from chaindiff.networks.unet import UNet
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.noise import Precondition

LABEL, LABEL_BIAS, AUGMENT = (f"network.map_{part}" for part in ("label.weight", "label.bias", "augment.weight"))
INPUT = re.compile(r"network\.enc\.\d+x\d+_(conv|aux_residual)\.weight")  # convolutions of the noisy image itself
OUTPUT = re.compile(r"network\.(out_conv|dec\.\d+x\d+_aux_conv)\.(weight|bias)")
SHOWN = 6  # problems in a message
READABLE = "give the weights of a stage, or what `chaindiff import SNAPSHOT.pkl` makes of a snapshot"


@dataclass(frozen=True)
class Begun:
    """What was not simply copied from the file to the stage: `new` starts at zero, `left` was not used."""

    new: tuple[str, ...]
    left: tuple[str, ...]


def begin_from(stage: Diffusion, path: Path) -> Begun:
    """Initial weights from a file of another stage or of an imported network; on the meta device only their shapes.

    Raises UserError as `begin` does, and if the file is missing or not a safetensors file.
    """
    if not path.is_file():
        raise UserError(f"there is no weights file {path}", hint="correct the path, or leave `init` out")
    read = tensorfile.shapes if next(stage.parameters()).is_meta else tensorfile.load
    try:
        tensors, kept = read(path)
    except UserError as error:
        raise UserError(error.message, hint=READABLE) from error
    return begin(stage, tensors, kept, str(path))


def begin(stage: Diffusion, tensors: Mapping[str, Tensor], kept: Mapping[str, str], where: str) -> Begun:
    """Initial weights from tensors by name, so that the stage's output is at first the network's, whatever its new
    conditioning.

    - Label projection: columns of shared variables are copied, those of others start at zero.
    - Augmentation projection: its label is zero unless an image was augmented, so that it may differ: shared columns
      are copied, others start at zero, and a stage without augmentation leaves it out.
    - Input channels of given images, and null values of absent variables, start at zero.
    - Of a network that also learned variances (iDDPM), the output channels for them are left out.

    `kept` is the metadata of the file. Raises UserError listing all that is missing, unexpected or of another shape,
    and if the network was trained with another preconditioning.
    """
    # A bare network's file (an imported one) names parameters without the stage's prefix.
    known = {k if k.startswith(("network.", "conditioner.")) else f"network.{k}": v for k, v in tensors.items()}
    said = about(kept, where)
    problems = other_preconditioning(stage, said)
    new: list[str] = []
    left = [AUGMENT] if AUGMENT in known and AUGMENT not in stage.state_dict() else []
    own = stage.state_dict()
    for name, value in own.items():
        given = known.get(name)
        if name == LABEL and given is not None:
            own[name], fresh, wrong = _label(stage, value, given, said)
            new += fresh
            problems += wrong
        elif given is not None and given.shape == value.shape:
            own[name] = given
        elif given is None and (name in (LABEL, LABEL_BIAS, AUGMENT) or name.startswith("conditioner.")):
            own[name] = torch.zeros_like(value)
            new += [f"{LABEL} of {told}" for told in columns(stage.conditioner)] if name == LABEL else [name]
        elif given is not None and _widens(stage, name, value, given):
            width = min(given.shape[1], value.shape[1])
            own[name] = torch.zeros_like(value)
            own[name][:, :width] = given[:, :width]
            new.append(name)
        elif given is not None and _learns_variances(stage, name, value, given):
            own[name] = given[: len(value)]
            left.append(f"{name} of variances")
        elif given is None:
            problems.append(f"{name} is missing")
        else:
            problems.append(f"{name} has shape {list(given.shape)}, expected {list(value.shape)}")
    problems += [f"{name} is unexpected" for name in known if name not in own and name not in left]
    if problems:
        raise UserError(
            f"{where} cannot initialise this stage: {some(problems, SHOWN)}",
            hint="the stage needs the network's settings, preconditioning and label; it may be conditioned on more",
        )
    stage.load_state_dict(own)
    return Begun(tuple(new), tuple(left))


def other_preconditioning(stage: Diffusion, said: About) -> list[str]:
    """What the file says of its preconditioning, against the stage's; files of bare tensors name none."""
    kept = said.precondition or (said.stage and said.stage.precondition)
    if kept is None:
        return []
    try:
        spread = said.sigma_data or next(iter(stage.generates.values())).sigma_data
        trained = preconditioning(TypeAdapter(Precondition).validate_python(kept), spread)
    except ValueError:
        return [f"it was trained with an unknown preconditioning: {kept!s:.80}"]
    return [] if trained == stage.precondition else [f"it was trained with {trained}, not {stage.precondition}"]


def _widens(stage: Diffusion, name: str, value: Tensor, given: Tensor) -> bool:
    """Whether two projections differ only in the width of their input."""
    if given.ndim != value.ndim or (given.shape[0], *given.shape[2:]) != (value.shape[0], *value.shape[2:]):
        return False
    added = value.shape[1] - given.shape[1]
    return name == AUGMENT or (INPUT.fullmatch(name) is not None and added == stage.conditioner.image_channels)


def _learns_variances(stage: Diffusion, name: str, value: Tensor, given: Tensor) -> bool:
    doubled = given.shape == (2 * value.shape[0], *value.shape[1:])
    return isinstance(stage.precondition, IDDPM) and OUTPUT.fullmatch(name) is not None and doubled


# ------------------------------------------------------------ the label projection


def columns(links: Iterable[Link]) -> dict[str, range]:
    """The columns of the label for each given variable and for its link features, in the order of the links."""
    found, at = {}, 0
    for link in links:
        value = link.variable.shape[0] if link.variable.kind in ("vector", "label") else 0
        told = f"the link features of {link.variable.name}"
        for name, width in ((link.variable.name, value), (told, link.label_width - value)):
            if width:
                found[name] = range(at, at + width)
                at += width
    return found


def _label(stage: Diffusion, value: Tensor, given: Tensor, said: About) -> tuple[Tensor, list[str], list[str]]:
    """The label projection with the file's columns in their places: the tensor, what is new, what is wrong."""
    ours = columns(stage.conditioner)
    width, total = given.shape[1], value.shape[1]
    theirs = _trained_columns(stage, said, width)
    if theirs is None:  # columns without names: as a whole, or of the one variable that is as wide
        alike = [name for name, place in ours.items() if len(place) == width]
        if width == total:
            pairs = [(range(width), range(width))]
        elif len(alike) == 1:
            pairs = [(range(width), ours[alike[0]])]
        else:
            parts = ", ".join(f"{name} {len(place)}" for name, place in ours.items())
            which = f"{' and '.join(alike)} all fit" if alike else "none fits"
            return value, [], [f"it has a label of {width} entries; of this stage's ({parts}) {which}"]
    else:
        pairs = [(place, ours[name]) for name, place in theirs.items() if name in ours]
        wrong = [
            f"it has {len(place)} entries of {name}, this stage {len(ours.get(name, ()))}"
            for name, place in theirs.items()
            if len(ours.get(name, ())) != len(place)
        ]
        if wrong:
            return value, [], wrong
    # DDPM++ and NCSN++ multiply the label by the square root of its width, which grows.
    scale = (
        math.sqrt(width / total)
        if isinstance(stage.network, UNet) and stage.network.arch.label_joins == "noise"
        else 1.0
    )
    weight = torch.zeros_like(value)
    for source, target in pairs:
        weight[:, target] = given[:, source].to(weight) * scale
    filled = [target for _, target in pairs]
    whole = width == total and theirs is None
    fresh = [] if whole else [f"{LABEL} of {name}" for name, place in ours.items() if place not in filled]
    return weight, fresh, []


def _trained_columns(stage: Diffusion, said: About, width: int) -> dict[str, range] | None:
    """The columns of a stage's file, which names what the stage was conditioned on; None where that is unknown."""
    ours = {link.variable.name: link.variable for link in stage.conditioner}
    links = []
    for given in said.stage.given if said.stage else ():
        try:  # earlier versions said there what sampling does to the variable
            spec = LinkSpec(**{key: value for key, value in given.items() if not key.startswith("sample_")})
        except ValidationError:  # a file of another version
            return None
        variable = ours.get(spec.variable)
        trained = said.variables.get(spec.variable)
        if variable is None or trained is None or variable.identity != trained.identity:
            return None
        links.append(Link(variable, spec, stage.target))
    found = columns(links)
    return found if found and max(place.stop for place in found.values()) == width else None
