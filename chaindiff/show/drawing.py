"""The picture of a chain: variables and stages from left to right, as SVG and PNG. Imports no torch."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from chaindiff.io.files import write_whole

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure

BoxStyle = Literal["variable", "given", "wanted", "stage", "source", "idle"]
ArrowStyle = Literal["link", "noisy", "encoder", "decoder", "idle"]


@dataclass(frozen=True)
class Box:
    """A variable or a stage. `lines`: small print under the name. `idle`: not run by this request."""

    name: str
    lines: Sequence[str] = ()
    style: BoxStyle = "variable"
    title: str | None = None  # shown instead, if a stage and its variable share a name


@dataclass(frozen=True)
class Arrow:
    """From one box to another, by name. `noisy`: a link with noise-conditioning augmentation; `encoder`: dashed."""

    src: str
    dst: str
    label: str = ""
    style: ArrowStyle = "link"


# ------------------------------------------------------------ layout, in points

TITLE, SMALL, LEADING = 11.25, 9.0, 12.6  # font sizes; line spacing
GAP_X, GAP_Y, LANE, MARGIN = 42.0, 20.0, 22.5, 15.0
FILLS: dict[BoxStyle, tuple[str, str]] = {  # fill, line
    "variable": ("#ffffff", "#8a94a3"),
    "given": ("#d9dee6", "#4b5563"),
    "wanted": ("#e3f1e4", "#3d8b4b"),
    "stage": ("#e4edfb", "#3f6fb5"),
    "source": ("#f7ecd9", "#b07d2b"),
    "idle": ("#fafafa", "#d0d4da"),
}
LINES: dict[ArrowStyle, str] = {"link": "#4b5563", "noisy": "#b4483c", "encoder": "#3d7f8f", "idle": "#cdd2d9"}
LINES["decoder"] = LINES["encoder"]
INKS = ("#1f2430", "#5b6472"), ("#a7adb7", "#b3b9c2")  # of the name and the small print; of idle boxes
Point = tuple[float, float]
Curve = tuple[list[Point], Point]  # start, then cubic Bezier segments of three points each; position of the label


@dataclass(eq=False)
class _Rect:
    """Position of a box, by its centre (x, y). Without a size: where a long arrow passes a layer."""

    layer: int
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    column: float = 0.0  # width of the layer


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), ismath=False)[0]


def _size(box: Box) -> Point:
    widths = [_text_width(box.title or box.name, TITLE, "bold"), *(_text_width(line, SMALL) for line in box.lines)]
    return max(57.0, max(widths) + 20), 16.5 + TITLE + len(box.lines) * LEADING


def _layers(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> tuple[dict[str, int], list[Arrow], list[Arrow]]:
    """Layer of every box by topological generation; arrows that go from left to right, and those that loop back.

    Stages set the direction: an encoder of a generated variable loops back.
    """
    import networkx as nx  # here: a plan in words does without

    graph = nx.DiGraph()
    graph.add_nodes_from(box.name for box in boxes)
    generated = {arrow.dst for arrow in arrows if arrow.style != "encoder"}
    forward, around = [], []
    for arrow in sorted(arrows, key=lambda arrow: arrow.style == "encoder"):
        observes = arrow.style == "encoder" and arrow.dst in generated
        if observes or nx.has_path(graph, arrow.dst, arrow.src):
            around.append(arrow)
        else:
            forward.append(arrow)
            graph.add_edge(arrow.src, arrow.dst)
    layer = {name: i for i, names in enumerate(nx.topological_generations(graph)) for name in names}
    for name in reversed(list(nx.topological_sort(graph))):  # a box without inputs is placed next to its first reader
        if not graph.in_degree(name) and graph.out_degree(name):
            layer[name] = min(layer[after] for after in graph.successors(name)) - 1
    return layer, forward, around


def _layout(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> tuple[dict[str, _Rect], list[tuple[Arrow, Curve]]]:
    known = {box.name for box in boxes}
    for arrow in arrows:
        for end in (arrow.src, arrow.dst):
            if end not in known:
                raise ValueError(f"arrow {arrow.src} -> {arrow.dst}: no box '{end}'")
    import networkx as nx

    layer, forward, around = _layers(boxes, arrows)
    rects = {box.name: _Rect(layer[box.name], *_size(box)) for box in boxes}
    beside, routes = nx.Graph(), []
    beside.add_nodes_from(rects.values())
    for arrow in forward:
        passing = [_Rect(i) for i in range(layer[arrow.src] + 1, layer[arrow.dst])]
        routes.append([rects[arrow.src], *passing, rects[arrow.dst]])
        nx.add_path(beside, routes[-1])
    columns = [[r for r in beside if r.layer == i] for i in range(max(layer.values(), default=-1) + 1)]
    gaps = [GAP_X] * len(columns)
    for arrow in forward:  # room for the labels
        gaps[layer[arrow.src]] = max(gaps[layer[arrow.src]], _text_width(arrow.label, SMALL) + 33)
    _place(columns, beside, gaps)
    curves = [(arrow, _through(stops)) for arrow, stops in zip(forward, routes, strict=True)]
    lanes = {1: 0, -1: 0}  # below and above everything
    for arrow in sorted(around, key=lambda a: abs(layer[a.src] - layer[a.dst])):
        ends = rects[arrow.src], rects[arrow.dst]
        below, above = (all(r is columns[r.layer][i] for r in ends) for i in (-1, 0))
        side = -1 if above and (not below or lanes[-1] < lanes[1]) else 1
        lanes[side] += 1
        curves.append((arrow, _around(*ends, columns, side, lanes[side] * LANE)))
    return rects, curves


def _place(columns: Sequence[list[_Rect]], beside: nx.Graph, gaps: Sequence[float]) -> None:
    """Columns as wide as their widest box; in each, order and heights by relaxation towards neighbours."""
    x = 0.0
    for column, gap in zip(columns, gaps, strict=True):
        width = max(r.width for r in column)
        for i, r in enumerate(column):
            r.x, r.y, r.column = x + width / 2, (i - len(column) / 2) * LANE, width
        x += width + gap
    for sweep in range(40):
        side = (-1) ** sweep
        for column in columns[::side]:
            for r in column:  # first by the neighbours on one side, which avoids most crossings
                near = [other.y for other in beside[r] if sweep >= 10 or other.layer == r.layer - side]
                r.y = fmean(near or [r.y])
            centre = fmean(r.y for r in column)
            column.sort(key=lambda r: r.y)
            for above, below in itertools.pairwise(column):
                below.y = max(below.y, above.y + (above.height + below.height) / 2 + GAP_Y)
            shift = centre - fmean(r.y for r in column)
            for r in column:
                r.y += shift


def _through(stops: Sequence[_Rect]) -> Curve:
    """From the right side of the first box to the left side of the last, past the boxes between."""
    first, last = stops[0], stops[-1]
    points: list[Point] = [(first.x + first.width / 2, first.y)]
    for stop in stops[1:]:
        wide = stop.width if stop is last else stop.column
        (x0, y0), (x1, y1) = points[-1], (stop.x - wide / 2, stop.y)
        middle = (x0 + x1) / 2
        points += [(middle, y0), (middle, y1), (x1, y1)]
        if stop is not last:
            points += [(x1, y1), (x1 + wide, y1), (x1 + wide, y1)]
    return points, ((points[0][0] + points[3][0]) / 2, (points[0][1] + points[3][1]) / 2)


def _around(src: _Rect, dst: _Rect, columns: Sequence[Sequence[_Rect]], side: int, away: float) -> Curve:
    """Along a lane below (side 1) or above (side -1) everything, through the gaps between columns if needed."""
    lane = side * (max(side * r.y + r.height / 2 for column in columns for r in column) + away)

    def leave(r: _Rect) -> list[Point]:  # from the box to the lane
        if r is columns[r.layer][-1 if side > 0 else 0]:
            return [(r.x, r.y + side * r.height / 2), (r.x, lane)]
        x, y = r.x + r.column / 2 + GAP_X / 4, r.y + side * r.height / 4
        return [(r.x + r.width / 2, y), (x, y), (x, lane)]

    corners = [*leave(src), *reversed(leave(dst))]
    (x0, _), (x1, _) = (corner for corner in corners if corner[1] == lane)
    points = corners[:1]
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        enter, out = _short_of(corner, before), _short_of(corner, after)
        points += [points[-1], points[-1], enter, corner, corner, out]
    return [*points, points[-1], points[-1], corners[-1]], ((x0 + x1) / 2, lane)


def _short_of(corner: Point, other: Point, bend: float = 10.5) -> Point:
    length = math.dist(corner, other)
    share = min(bend, length / 2) / length if length else 0.0
    return (corner[0] + (other[0] - corner[0]) * share, corner[1] + (other[1] - corner[1]) * share)


# ------------------------------------------------------------ drawing


def _figure(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> Figure:
    from matplotlib import patches
    from matplotlib.figure import Figure
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    figure = Figure((1, 1))  # one inch; saving crops it to its content
    points = Affine2D().scale(1 / 72, -1 / 72) + figure.transFigure  # y points down
    letters = {"ha": "center", "va": "center_baseline", "parse_math": False, "transform": points}
    rects, curves = _layout(boxes, arrows)
    for arrow, (way, label_at) in curves:
        colour, path = LINES[arrow.style], Path(way, [Path.MOVETO, *[Path.CURVE4] * (len(way) - 1)])
        dash = (0, (3.8, 2.5)) if arrow.style == "encoder" else "-"
        line = patches.PathPatch(path, fill=False, edgecolor=colour, linewidth=1.2, linestyle=dash, transform=points)
        style = "-|>, head_length=6.8, head_width=3"
        head = patches.FancyArrowPatch(path=path, arrowstyle=style, mutation_scale=1, linewidth=0, transform=points)
        head.set_color(colour)  # without the line, whose dashes it would inherit
        figure.add_artist(line)
        figure.add_artist(head)
        if arrow.label:
            cleared = {"facecolor": "white", "linewidth": 0, "boxstyle": "round,pad=0.15"}
            figure.text(*label_at, arrow.label, size=SMALL, color=colour, bbox=cleared, **letters)
    for box in boxes:
        rect, (fill, edge), (ink, muted) = rects[box.name], FILLS[box.style], INKS[box.style == "idle"]
        corner = rect.x - rect.width / 2, rect.y - rect.height / 2
        rounded = f"round, pad=0, rounding_size={4.5 if box.style == 'stage' else min(13.5, rect.height / 2)}"
        shape = patches.FancyBboxPatch(corner, rect.width, rect.height, rounded, linewidth=1.1, transform=points)
        shape.set(facecolor=fill, edgecolor=edge)
        figure.add_artist(shape)
        top = rect.y - len(box.lines) * LEADING / 2
        figure.text(rect.x, top, box.title or box.name, size=TITLE, weight="bold", color=ink, **letters)
        for i, line in enumerate(box.lines):
            figure.text(rect.x, top + TITLE / 2 + (i + 0.62) * LEADING, line, size=SMALL, color=muted, **letters)
    return figure


def _drawn(boxes: Sequence[Box], arrows: Sequence[Arrow], **options: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "chain"}):  # text stays text; reproducible files
        _figure(boxes, arrows).savefig(buffer, bbox_inches="tight", pad_inches=MARGIN / 72, **options)
    return buffer.getvalue()


def chain_svg(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> str:
    """The picture as a standalone SVG. Raises ValueError if an arrow names no box."""
    text = _drawn(boxes, arrows, format="svg", metadata={"Title": "the chain", "Date": None}).decode()
    return text[text.index("<svg") :]  # as notebooks and pages embed it


def chain_png(boxes: Sequence[Box], arrows: Sequence[Arrow], path: str | os.PathLike[str], scale: float = 2.0) -> None:
    """The same picture as a PNG, `scale` pixels to one of the SVG. Raises ValueError if an arrow names no box."""
    write_whole(path, _drawn(boxes, arrows, format="png", dpi=96 * scale))
