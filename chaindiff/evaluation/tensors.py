"""Samples in memory against a reference in memory: the figures of `chaindiff evaluate` for any chain, in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from chaindiff.evaluation.features import extractor
from chaindiff.evaluation.provenance import Figure
from chaindiff.evaluation.study import distances
from chaindiff.io.errors import UserError
from chaindiff.show.images import to_uint8


def measure(
    samples: Tensor, reference: Tensor, judges: Sequence[str] = ("judge_conv", "judge_vit"), *, seed: int = 0
) -> list[Figure]:
    """KID, Fréchet distance, precision, recall, density and coverage of samples by every judge.

    Images are [n, 3, height, width], uint8 or in [-1, 1]; vectors are [n, width], and need no judge.
    Raises UserError for unlike shapes, unknown judges and weights that are not there.
    """
    if samples.shape[1:] != reference.shape[1:] or samples.ndim not in (2, 4):
        shapes = f"{list(samples.shape)} and {list(reference.shape)}"
        raise UserError(f"samples and reference should be images or vectors of one shape, not {shapes}")
    about: dict[str, Any] = {"reference": f"{len(reference)} given", "count": len(samples), "seed": seed}
    if samples.ndim == 2:
        found = distances(reference.float(), samples.float(), "", seed)
        return [Figure.of(metric, value, **about) for metric, value in found.items()]
    figures = []
    for name in judges:
        judge = extractor(name)
        real, fake = (judge(to_uint8(x)) for x in (reference, samples))
        said = {**about, "encoder": judge.name, "encoder_identity": judge.identity}
        said["resize"] = f"{samples.shape[-1]} -> {judge.size} bicubic"
        figures += [Figure.of(metric, value, **said) for metric, value in distances(real, fake, name, seed).items()]
    return figures
