"""Whether samples are new: how near they lie to the training set, beside how near held-out data lies to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from chaindiff.evaluation.neighbours import nearest
from chaindiff.io.shards import Vectors

__all__ = ["Memorisation", "memorisation", "nearest"]

QUANTILE = 0.05  # of held-out distances: samples nearer than that are counted
BINS = 40  # of the histograms


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

    def histograms(self, bins: int = BINS) -> tuple[list[float], list[float], list[float]]:
        """Edges of the bins, and the shares of samples and of held-out rows in each."""
        top = max(self.samples.max().item(), self.held_out.max().item()) or 1.0
        edges = torch.linspace(0, top, bins + 1, dtype=torch.float64)
        counts = [torch.histc(x, bins, 0, top) / len(x) for x in (self.samples, self.held_out)]
        return edges.tolist(), counts[0].tolist(), counts[1].tolist()

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

    `held_out` must be data that training never saw and of which the training set holds no near copies; what it holds
    of them raises the threshold's distance and hides copying. Raises UserError for an empty training set.
    """
    near, neighbours = nearest(samples, train)
    floor, _ = nearest(held_out, train)
    near, floor = near[:, 0], floor[:, 0]
    threshold = floor.quantile(QUANTILE).item()
    share = (near < threshold).double().mean().item()
    middle = floor.median().item()
    ratio = near.median().item() / middle if middle else float("nan")
    return Memorisation(near.cpu(), floor.cpu(), neighbours[:, 0].cpu(), threshold, share, ratio)
