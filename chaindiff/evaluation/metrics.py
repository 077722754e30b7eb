"""The metrics, in one place. Features are [n, width], in a tensor or in a file (`Stored`), which stays there.

`Moments` streams: its memory does not grow with the samples. The others read their features in blocks, several times;
working memory is a few blocks of 512 rows and of 512 x 512 numbers, and some numbers for every row.
"""

from chaindiff.evaluation.interval import Interval, mean_interval
from chaindiff.evaluation.kernels import cmmd, gaussian_mmd, kid
from chaindiff.evaluation.memorisation import Memorisation, memorisation
from chaindiff.evaluation.moments import Moments, frechet_distance
from chaindiff.evaluation.neighbours import density_coverage, nearest, precision_recall
from chaindiff.evaluation.patches import laplacian_pyramid, sliced_wasserstein, sliced_wasserstein_laplacian
from chaindiff.evaluation.vectors import alignment, vector_report

__all__ = [
    "Interval",
    "Memorisation",
    "Moments",
    "alignment",
    "cmmd",
    "density_coverage",
    "frechet_distance",
    "gaussian_mmd",
    "kid",
    "laplacian_pyramid",
    "mean_interval",
    "memorisation",
    "nearest",
    "precision_recall",
    "sliced_wasserstein",
    "sliced_wasserstein_laplacian",
    "vector_report",
]
