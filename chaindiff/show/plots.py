"""Plots of an evaluation, as PNG bytes: a metric against a setting, and histograms of distances."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#1f5fa8", "#c8553d", "#3f8f5b", "#8a5fa8", "#8d7b3a")


@dataclass(frozen=True)
class Curve:
    """A metric at several settings, each with its interval."""

    label: str
    x: Sequence[float]
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def curves(given: Sequence[Curve], title: str, x_title: str, y_title: str, log: bool = False) -> bytes:
    """Curves with their intervals; settings that are not numbers should come as 0, 1, 2 ..."""
    canvas, axes = _axes(title, x_title, y_title)
    for curve, colour in zip(given, COLOURS * len(given), strict=False):
        look = {"color": colour, "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.5}
        axes.errorbar(curve.x, curve.value, _spread(curve.value, curve.low, curve.high), label=curve.label, **look)
    if log:
        axes.set_xscale("log", base=2)
        points = sorted({x for curve in given for x in curve.x})
        axes.set_xticks(points, [f"{x:g}" for x in points])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return _png(canvas)


def histograms(parts: Mapping[str, Float[np.ndarray, " n"]], title: str, x_title: str) -> bytes:
    """Densities over shared bins, so that sets of different sizes are comparable."""
    canvas, axes = _axes(title, x_title, "density")
    bins = np.histogram_bin_edges(np.concatenate(list(parts.values())), 40).tolist()
    for (label, values), colour in zip(parts.items(), COLOURS, strict=False):
        axes.hist(values, bins, density=True, label=label, color=colour, alpha=0.45)
    axes.legend(frameon=False, fontsize=8)
    return _png(canvas)


def bars(values: Mapping[str, tuple[float, float, float]], title: str, x_title: str) -> bytes:
    """One bar per row, (value, low, high), the first on top."""
    canvas, axes = _axes(title, x_title, "", height=1.2 + 0.38 * len(values))
    value, low, high = zip(*values.values(), strict=True)
    axes.barh(list(values), value, xerr=_spread(value, low, high), color=COLOURS[0], alpha=0.8, capsize=3)
    axes.invert_yaxis()
    return _png(canvas)


def _spread(value: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Float[np.ndarray, "2 n"]:
    return np.abs(np.subtract([value, high], [low, value]))


def _axes(title: str, x_title: str, y_title: str, height: float = 3.4):  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure as Canvas  # slow to import, and most commands draw nothing

    canvas = Canvas(figsize=(5.4, height), dpi=130, layout="constrained")
    axes = canvas.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_title, fontsize=9)
    axes.set_ylabel(y_title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def _png(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()
