"""How far two sets of features [n, width] are apart, in tensors or in files (`Stored`), which stay there.

Moments stream. The others read their features in blocks, several times; working memory is a few blocks of 512 rows and
of 512 x 512 numbers, and some numbers for every row.
"""

from __future__ import annotations

from chaindiff.encoders.moments import Moments
from chaindiff.evaluation.blocks import BLOCK
from chaindiff.evaluation.frechet import frechet_distance
from chaindiff.evaluation.interval import Interval
from chaindiff.evaluation.kernels import cmmd, kid
from chaindiff.evaluation.neighbours import density_coverage, precision_recall
from chaindiff.io.shards import Vectors


def distances(real: Vectors, fake: Vectors, judge: str = "", seed: int = 0) -> dict[str, float | Interval]:
    """How far features of samples are from those of the data, in every way that a judge's features allow."""
    values: dict[str, float | Interval] = {"kid": kid(real, fake, seed=seed)}
    if min(len(real), len(fake)) > real.shape[1]:  # else the covariance is singular, and the distance refused
        values["fd"] = frechet_distance(*(Moments.over(f.split(BLOCK)) for f in (real, fake)))
    if judge.startswith("open_clip"):
        values["cmmd"] = cmmd(real, fake)
    values["precision"], values["recall"] = precision_recall(real, fake)
    values["density"], values["coverage"] = density_coverage(real, fake)
    return values
