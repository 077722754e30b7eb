"""Snapshots of EDM2's averages while a stage trains, and averages of other lengths reconstructed from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chaindiff.edm.ema import UNIFORM, Average, PowerEma, coefficients, gamma_of
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.files import remove_leftovers
from chaindiff.io.metadata import about

TOLERANCE = 0.1  # relative L2 error of a profile beyond which a reconstruction is refused


def write(folder: Path, averages: Iterable[Average[Any]], images: int, metadata: Mapping[str, Any]) -> None:
    """A file for every power-function average in `folder`/snapshots: weights of the stage, in half precision."""
    for average in averages:
        if isinstance(average, PowerEma):
            path = folder / "snapshots" / f"{images:09d}-{average.sigma_rel}.safetensors"
            halves = {name: _half(tensor) for name, tensor in average.model.state_dict().items()}
            said = {"images": str(images), "sigma_rel": str(average.sigma_rel)}
            tensorfile.save(path, halves, {**metadata, **said})


def _half(tensor: Tensor) -> Tensor:
    """float16, whose 11 bits disturb an average less than bfloat16's 8; tensors beyond its range stay as they are."""
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and bool(half.isfinite().all()) else tensor


def remove_after(folder: Path, images: int) -> None:
    """Delete snapshots of what is about to be trained (again), and what a killed process left."""
    remove_leftovers(folder / "snapshots")
    for path in _files(folder):
        if int(path.name.split("-")[0]) > images:
            path.unlink()


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "snapshots").glob("[0-9]*-*.safetensors"))


# ------------------------------------------------------------ reconstruction


@dataclass(frozen=True)
class Snapshot:
    """One file: the average of width `sigma_rel` after so many images."""

    path: Path
    images: int
    sigma_rel: float
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        """Raises UserError if the file is broken, or not a snapshot."""
        metadata = tensorfile.metadata(path)
        kept = about(metadata, path)
        if kept.sigma_rel is None or kept.profile_error is not None:
            raise UserError(f"{path} is not a snapshot of a power-function average")
        return cls(path, kept.images, kept.sigma_rel, metadata)


def reconstruct_stage(folder: Path, sigma_rel: float, out: Path, at_images: int | None = None) -> str:
    """`reconstruct` from the snapshots of a stage's folder. Raises UserError if it has none."""
    files = _files(folder)
    if not files:
        stages = [path.parent for path in sorted(folder.glob("stages/*/snapshots"))]
        raise UserError(
            f"there are no snapshots in {folder}",
            hint=f"a stage's folder has them: {', '.join(map(str, stages))}"
            if stages
            else "training writes them with  train: {ema: {kind: power, snapshot_every: IMAGES}}",
        )
    return reconstruct(files, sigma_rel, at_images, out=out)


def reconstruct(files: Sequence[Path], sigma_rel: float, at_images: int | None = None, *, out: Path) -> str:
    """Write the average of width `sigma_rel` after `at_images` images (none: the last snapshot's) to the file `out`.

    The file is a stage's weights, in single precision. Sums are in float64 (EDM2, section 3.2 and appendix C). Returns
    what was written, in words: from how many snapshots, and the relative L2 error of the profile.
    Raises UserError for a width that these snapshots do not reach, and for snapshots of different networks.
    """
    if not 0 < sigma_rel < UNIFORM:
        raise UserError(
            f"std {sigma_rel:g} is not a width of a power-function average",
            hint=f"it must be above 0 and below {UNIFORM:.4f}, that of the plain average of all weights so far",
        )
    found = sorted((Snapshot.read(path) for path in files), key=lambda s: (s.images, s.sigma_rel))
    for other in found[1:]:
        if other.metadata.get("identity") != found[0].metadata.get("identity"):
            raise UserError(
                f"{other.path} and {found[0].path} are snapshots of different networks",
                hint="all must come from one training run of one stage",
            )
    last = found[-1].images
    at_images = last if at_images is None else at_images
    if not 0 < at_images <= last:
        raise UserError(f"the snapshots end at {last} images, before {at_images}")
    end = min(s.images for s in found if s.images >= at_images)
    found = [s for s in found if s.images <= end]
    weights, error = _solve(found, sigma_rel, at_images)
    if error > TOLERANCE:
        count = f"{len(found)} snapshots" if len(found) > 1 else "the only snapshot"
        raise UserError(
            f"std {sigma_rel:g} at {at_images} images cannot be reconstructed: {count} up to there "
            f"would miss its profile by {error:.0%}",
            hint=_reachable(found, at_images),
        )
    said = {**found[-1].metadata, "images": str(at_images), "sigma_rel": str(sigma_rel), "profile_error": str(error)}
    tensorfile.save(out, _combine(found, weights), said)
    made = f"std {sigma_rel:g} at {at_images} images, of {len(found)} snapshots"
    return f"{out}: {made}; its profile is within {error:.2%}"


def _solve(found: Sequence[Snapshot], sigma_rel: float, images: int) -> tuple[list[float], float]:
    gammas = np.array([gamma_of(s.sigma_rel) for s in found])
    ends = np.array([float(s.images) for s in found])
    weights, error = coefficients(gammas, ends, gamma_of(sigma_rel), float(images))
    return weights.tolist(), error


def _combine(found: Sequence[Snapshot], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of the snapshots' tensors; numbers that are not floating point are the last one's."""
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(found, weights, strict=True):
        tensors, _ = tensorfile.load(snapshot.path)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if total and shapes != {name: tensor.shape for name, tensor in total.items()}:
            raise UserError(f"{snapshot.path} and {found[0].path} are snapshots of different networks")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                total[name] = tensor
            elif name in total:
                total[name].add_(tensor.double(), alpha=weight)
            else:
                total[name] = tensor.double() * weight
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}


def _reachable(found: Sequence[Snapshot], images: int) -> str:
    """The widths that these snapshots do give, on a grid."""
    near = [s for s in np.geomspace(0.005, 0.28, 60).tolist() if _solve(found, s, images)[1] <= TOLERANCE]
    mend = "more snapshots reach further: train.ema.snapshot_every, train.ema.tracks"
    return f"they reach widths from {min(near):.3f} to {max(near):.3f}; {mend}" if near else mend
