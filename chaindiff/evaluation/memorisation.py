"""Whether samples are new: how near they lie to the training set, beside how near held-out data lies to it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from chaindiff.evaluation.neighbours import nearest
from chaindiff.io.shards import Vectors

QUANTILE = 0.05  # of held-out distances: samples nearer than that are counted


@dataclass(frozen=True)
class Memorisation:
    """Distances to the nearest training row, of samples and of held-out rows, and what they say.

    `share`: of the samples, those nearer to the training set than 95% of the held-out rows are; a model that makes
    new data has about 0.05, one that copies has 1. `ratio`: median distance of samples over that of held-out rows.
    """

    samples: Float64[Tensor, " samples"]
    held_out: Float64[Tensor, " held_out"]
    neighbours: Int64[Tensor, " samples"]  # each sample's nearest training row
    threshold: float
    share: float
    ratio: float

    @property
    def closest(self) -> list[tuple[int, int, float]]:
        """(sample, training row, distance), nearest first."""
        order = self.samples.argsort(stable=True).tolist()
        return [(i, int(self.neighbours[i]), float(self.samples[i])) for i in order]

    def summary(self) -> dict[str, float]:
        """The numbers alone."""
        medians = {"median_sample": self.samples.median().item(), "median_held_out": self.held_out.median().item()}
        return {"share": self.share, "ratio": self.ratio, "threshold": self.threshold, **medians}


def memorisation(
    samples: Float[Vectors, "samples width"],
    train: Float[Vectors, "train width"],
    held_out: Float[Vectors, "rows width"],
) -> Memorisation:
    """Compare distances to the nearest training row, in the space of the rows: pixels, or an extractor's features.

    `held_out` must be data that training never saw and of which the training set holds no near copies: those would
    lower the threshold and hide copying. Raises UserError for an empty training set.
    """
    near, neighbours = (found[:, 0].cpu() for found in nearest(samples, train))
    floor = nearest(held_out, train)[0][:, 0].cpu()
    threshold = floor.quantile(QUANTILE).item()
    share = (near < threshold).double().mean().item()
    middle = floor.median().item()
    ratio = near.median().item() / middle if middle else float("nan")
    return Memorisation(near, floor, neighbours, threshold, share, ratio)
