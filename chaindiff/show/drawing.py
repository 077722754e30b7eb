"""The picture of a chain: variables and stages from left to right, as SVG and PNG. Imports no torch."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape

import networkx as nx

from chaindiff.io.files import write_whole

BoxStyle = Literal["variable", "given", "wanted", "stage", "source", "idle"]
ArrowStyle = Literal["link", "noisy", "encoder", "decoder", "idle"]


@dataclass(frozen=True)
class Box:
    """A variable or a stage. `lines`: small print under the name. `idle`: a part that this request does not run."""

    name: str
    lines: Sequence[str] = ()
    style: BoxStyle = "variable"
    title: str | None = None  # what is shown, if a stage and its variable have one name


@dataclass(frozen=True)
class Arrow:
    """From one box to another, by name. `noisy`: a link with noise-conditioning augmentation; `encoder`: dashed."""

    src: str
    dst: str
    label: str = ""
    style: ArrowStyle = "link"


# ------------------------------------------------------------ layout

TITLE, SMALL = 15.0, 12.0  # sizes of letters
GAP_X, GAP_Y, LANE, MARGIN = 56.0, 26.0, 30.0, 20.0
FONT = "DejaVu Sans, Verdana, Geneva, sans-serif"
INK, MUTED = "#1f2430", "#5b6472"
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
Point = tuple[float, float]


@dataclass(eq=False)
class _Rect:
    """A placed box; (x, y) is its centre. A dummy (no box) is where a long arrow passes a layer."""

    box: Box | None
    layer: int
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0


@dataclass
class _Curve:
    """Start, then cubic Bezier segments of three points each."""

    arrow: Arrow
    points: list[Point]
    label_at: Point = (0.0, 0.0)


@dataclass
class _Layout:
    width: float = 0.0
    height: float = 0.0
    rects: list[_Rect] = field(default_factory=list)
    curves: list[_Curve] = field(default_factory=list)


def text_width(text: str, size: float) -> float:
    """Width of a line of text in DejaVu Sans, about (never much too small)."""
    ems = {"narrow": 0.36, "wide": 0.98, "upper": 0.72, "other": 0.62}
    kinds = ("narrow" if c in "iljtf.,:;|!'()[] " else "wide" if c in "mwMW@%→" else "upper" if c.isupper() else "other"
             for c in text)  # fmt: skip
    return size * sum(ems[kind] for kind in kinds)


def _size(box: Box) -> tuple[float, float]:
    widths = [text_width(box.title or box.name, TITLE) * 1.08, *(text_width(line, SMALL) for line in box.lines)]
    return max(76.0, max(widths) + 26), 22 + TITLE + len(box.lines) * SMALL * 1.4


def _layers(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> tuple[dict[str, int], list[Arrow], list[Arrow]]:
    """Layer of every box by topological generation; arrows that go from left to right, and those that go around.

    Stages set the direction: an encoder of something that a stage generates goes around.
    """
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
    for name in reversed(list(nx.topological_sort(graph))):  # a box that begins a chain stands next to its first reader
        if not graph.in_degree(name) and graph.out_degree(name):
            layer[name] = min(layer[after] for after in graph.successors(name)) - 1
    return layer, forward, around


def _layout(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> _Layout:
    known = {box.name for box in boxes}
    for arrow in arrows:
        for end in (arrow.src, arrow.dst):
            if end not in known:
                raise ValueError(f"arrow {arrow.src} -> {arrow.dst}: no box '{end}'")
    layer, forward, around = _layers(boxes, arrows)
    rects = {box.name: _Rect(box, layer[box.name], *_size(box)) for box in boxes}
    routes: list[tuple[Arrow, list[_Rect]]] = []
    dummies: list[_Rect] = []
    for arrow in forward:
        between = range(layer[arrow.src] + 1, layer[arrow.dst])
        passing = [_Rect(None, i, 0.0, 6.0) for i in between]
        dummies += passing
        routes.append((arrow, [rects[arrow.src], *passing, rects[arrow.dst]]))
    beside = _neighbours(routes)
    columns = _order([*rects.values(), *dummies], beside)
    gaps = [GAP_X] * len(columns)
    for arrow, stops in routes:  # room for the labels
        gaps[stops[0].layer] = max(gaps[stops[0].layer], text_width(arrow.label, SMALL) + 44)
    _place(columns, beside, gaps)
    layout = _Layout(rects=list(rects.values()))
    for arrow, stops in routes:
        points, label_at = _through(stops, columns)
        layout.curves.append(_Curve(arrow, points, label_at))
    lanes = {1: 0, -1: 0}  # below and above everything
    for arrow in sorted(around, key=lambda a: abs(layer[a.src] - layer[a.dst])):
        src, dst = rects[arrow.src], rects[arrow.dst]
        below = all(r is columns[r.layer][-1] for r in (src, dst))
        above = all(r is columns[r.layer][0] for r in (src, dst))
        side = -1 if above and (not below or lanes[-1] < lanes[1]) else 1
        lanes[side] += 1
        points, label_at = _around(src, dst, columns, side, lanes[side] * LANE)
        layout.curves.append(_Curve(arrow, points, label_at))
    places = [
        (r.x + sx * r.width / 2, r.y + sy * r.height / 2) for r in layout.rects for sx in (-1, 1) for sy in (-1, 1)
    ]
    places += [point for curve in layout.curves for point in curve.points]
    left, top = (min((p[i] for p in places), default=0.0) - MARGIN for i in (0, 1))
    right, bottom = (max((p[i] for p in places), default=0.0) + MARGIN for i in (0, 1))
    layout.width, layout.height = right - left, bottom - top
    for rect in layout.rects:
        rect.x, rect.y = rect.x - left, rect.y - top
    for curve in layout.curves:
        curve.points = [(x - left, y - top) for x, y in curve.points]
        curve.label_at = (curve.label_at[0] - left, curve.label_at[1] - top)
    return layout


def _neighbours(routes: Iterable[tuple[Arrow, list[_Rect]]]) -> dict[_Rect, list[_Rect]]:
    beside: dict[_Rect, list[_Rect]] = {}
    for _, stops in routes:
        for a, b in itertools.pairwise(stops):
            beside.setdefault(a, []).append(b)
            beside.setdefault(b, []).append(a)
    return beside


def _order(rects: Sequence[_Rect], beside: dict[_Rect, list[_Rect]]) -> list[list[_Rect]]:
    """Boxes of every layer from top to bottom, by barycentres: few crossings."""
    columns = [[r for r in rects if r.layer == i] for i in range(max((r.layer for r in rects), default=-1) + 1)]
    rank: dict[_Rect, float] = {}

    def number(column: Sequence[_Rect]) -> None:
        rank.update({r: (i + 0.5) / len(column) for i, r in enumerate(column)})

    def centre(r: _Rect, side: int) -> float:
        near = [rank[other] for other in beside.get(r, ()) if other.layer == r.layer + side]
        return sum(near) / len(near) if near else rank[r]

    for column in columns:
        number(column)
    for side in (-1, 1) * 3:
        for column in columns[::-side]:
            column.sort(key=lambda r: centre(r, side))
            number(column)
    return columns


def _place(columns: Sequence[Sequence[_Rect]], beside: dict[_Rect, list[_Rect]], gaps: Sequence[float]) -> None:
    """Coordinates: columns as wide as their widest box, `gaps` after them; heights by relaxation towards neighbours."""
    x = 0.0
    for i, column in enumerate(columns):
        width = max(r.width for r in column)
        y = 0.0
        for r in column:
            r.x, r.y = x + width / 2, y + r.height / 2
            y += r.height + GAP_Y
        for r in column:
            r.y -= (y - GAP_Y) / 2
        x += width + gaps[i]
    for sweep in range(40):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            for r in column:
                if near := beside.get(r):
                    r.y = 0.5 * r.y + 0.5 * sum(other.y for other in near) / len(near)
            for _ in range(len(column)):  # push apart, sharing the overlap
                for above, below in itertools.pairwise(column):
                    overlap = above.y + above.height / 2 + GAP_Y - (below.y - below.height / 2)
                    if overlap > 0:
                        above.y -= overlap / 2
                        below.y += overlap / 2


def _through(stops: Sequence[_Rect], columns: Sequence[Sequence[_Rect]]) -> tuple[list[Point], Point]:
    """From the right side of the first box to the left side of the last, past the boxes between."""
    first, last = stops[0], stops[-1]
    points: list[Point] = [(first.x + first.width / 2, first.y)]
    label_at = points[0]
    for i, stop in enumerate(stops[1:], 1):
        wide = max(r.width for r in columns[stop.layer]) / 2
        target = (last.x - last.width / 2, last.y) if stop is last else (stop.x - wide, stop.y)
        (x0, y0), (x1, y1) = points[-1], target
        middle = (x0 + x1) / 2
        points += [(middle, y0), (middle, y1), target]
        if i == 1:
            label_at = (middle, (y0 + y1) / 2)
        if stop is not last:
            x1, x2 = target[0], stop.x + wide
            points += [(x1 + (x2 - x1) / 3, y1), (x2 - (x2 - x1) / 3, y1), (x2, y1)]
    return points, label_at


def _around(
    src: _Rect, dst: _Rect, columns: Sequence[Sequence[_Rect]], side: int, away: float
) -> tuple[list[Point], Point]:
    """Along a lane below (side 1) or above (side -1) everything, if need be by way of the gaps between columns."""
    lane = side * (max(side * r.y + r.height / 2 for column in columns for r in column) + away)

    def leave(r: _Rect) -> tuple[Point, float]:  # where it leaves the box, and the x at which it goes to the lane
        if r is columns[r.layer][-1 if side > 0 else 0]:
            return (r.x, r.y + side * r.height / 2), r.x
        column = max(other.width for other in columns[r.layer]) / 2
        return (r.x + r.width / 2, r.y + side * r.height / 4), r.x + column + GAP_X / 4

    (start, x0), (end, x1) = leave(src), leave(dst)
    bend = min(14.0, abs(x0 - x1) / 2)
    corners = [start] if x0 == start[0] else [start, (x0, start[1])]
    corners += [(x0, lane), (x1, lane)] + ([end] if x1 == end[0] else [(x1, end[1]), end])
    points: list[Point] = [corners[0]]
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        enter, out = _short_of(corner, before, bend), _short_of(corner, after, bend)
        points += [points[-1], enter, enter, corner, corner, out]
    points += [points[-1], corners[-1], corners[-1]]
    return points, ((x0 + x1) / 2, lane)


def _short_of(corner: Point, other: Point, by: float) -> Point:
    length = math.dist(corner, other)
    share = min(by, length / 2) / length if length else 0.0
    return (corner[0] + (other[0] - corner[0]) * share, corner[1] + (other[1] - corner[1]) * share)


# ------------------------------------------------------------ drawing


def chain_svg(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> str:
    """The picture as a standalone SVG. Raises ValueError if an arrow names no box."""
    layout = _layout(boxes, arrows)
    width, height = layout.width, layout.height
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="{FONT}" role="img" aria-label="the chain">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for curve in layout.curves:
        colour, (start, *rest) = LINES[curve.arrow.style], curve.points
        path = f"M{start[0]:.1f},{start[1]:.1f}C" + " ".join(f"{x:.1f},{y:.1f}" for x, y in rest)
        dash = ' stroke-dasharray="6 4"' if curve.arrow.style == "encoder" else ""
        out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')
        head = " ".join(f"{x:.1f},{y:.1f}" for x, y in _head(curve.points))
        out.append(f'<polygon points="{head}" fill="{colour}"/>')
    for rect in layout.rects:
        assert rect.box is not None
        fill, line = FILLS[rect.box.style]
        left, top = rect.x - rect.width / 2, rect.y - rect.height / 2
        out.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{rect.width:.1f}" height="{rect.height:.1f}" '
            f'rx="{_radius(rect):.1f}" fill="{fill}" stroke="{line}" stroke-width="1.5"/>'
        )
        for text, y, size, bold, colour in _texts(rect):
            weight = ' font-weight="bold"' if bold else ""
            out.append(
                f'<text x="{rect.x:.1f}" y="{y:.1f}" font-size="{size:.0f}"{weight} fill="{colour}" '
                f'text-anchor="middle" dominant-baseline="central">{escape(text)}</text>'
            )
    for curve in layout.curves:
        if curve.arrow.label:
            (x, y), colour, wide = curve.label_at, LINES[curve.arrow.style], text_width(curve.arrow.label, SMALL)
            out.append(
                f'<rect x="{x - wide / 2:.1f}" y="{y - SMALL * 0.7:.1f}" width="{wide:.1f}" '
                f'height="{SMALL * 1.4:.1f}" rx="4" fill="#ffffff"/>'
                f'<text x="{x:.1f}" y="{y:.1f}" font-size="{SMALL:.0f}" fill="{colour}" text-anchor="middle" '
                f'dominant-baseline="central">{escape(curve.arrow.label)}</text>'
            )
    return "\n".join([*out, "</svg>", ""])


def chain_png(boxes: Sequence[Box], arrows: Sequence[Arrow], path: str | os.PathLike[str], scale: float = 2.0) -> None:
    """The same picture as a PNG, `scale` pixels to a unit of the SVG. Raises ValueError if an arrow names no box."""
    from matplotlib import patches
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.path import Path

    layout = _layout(boxes, arrows)
    dpi = 72.0  # a unit is a point, so that sizes of letters are those of the SVG
    figure = Figure(figsize=(layout.width / dpi, layout.height / dpi), dpi=dpi * scale)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, layout.width), ylim=(layout.height, 0))
    axes.axis("off")
    for curve in layout.curves:
        colour = LINES[curve.arrow.style]
        codes = [Path.MOVETO, *[Path.CURVE4] * (len(curve.points) - 1)]
        dash = (0, (3.8, 2.5)) if curve.arrow.style == "encoder" else "-"
        axes.add_patch(
            patches.PathPatch(Path(curve.points, codes), fill=False, edgecolor=colour, linewidth=1.6, linestyle=dash)
        )
        axes.add_patch(patches.Polygon(_head(curve.points), facecolor=colour, linewidth=0))
    for rect in layout.rects:
        assert rect.box is not None
        fill, line = FILLS[rect.box.style]
        corner = (rect.x - rect.width / 2, rect.y - rect.height / 2)
        style = patches.BoxStyle("Round", pad=0, rounding_size=_radius(rect))
        axes.add_patch(
            patches.FancyBboxPatch(
                corner, rect.width, rect.height, boxstyle=style, facecolor=fill, edgecolor=line, linewidth=1.5
            )
        )
        for text, y, size, bold, colour in _texts(rect):
            weight = "bold" if bold else "normal"
            axes.text(
                rect.x, y, text, size=size, weight=weight, color=colour, ha="center", va="center_baseline",
                parse_math=False,
            )  # fmt: skip
    for curve in layout.curves:
        if curve.arrow.label:
            axes.text(
                *curve.label_at, curve.arrow.label, size=SMALL, color=LINES[curve.arrow.style], ha="center",
                va="center_baseline", parse_math=False,
                bbox={"facecolor": "white", "linewidth": 0, "boxstyle": "round,pad=0.15"},
            )  # fmt: skip
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_whole(path, buffer.getvalue())


def _radius(rect: _Rect) -> float:
    """Variables are pill-shaped, stages have corners."""
    assert rect.box is not None
    return 6.0 if rect.box.style == "stage" else min(18.0, rect.height / 2)


def _texts(rect: _Rect) -> Iterator[tuple[str, float, float, bool, str]]:
    """(text, height of its middle, size, bold, colour) of every line in a box."""
    assert rect.box is not None
    idle = rect.box.style == "idle"
    block = TITLE + len(rect.box.lines) * SMALL * 1.4
    y = rect.y - block / 2 + TITLE / 2
    yield rect.box.title or rect.box.name, y, TITLE, True, "#a7adb7" if idle else INK
    for i, line in enumerate(rect.box.lines):
        yield line, y + TITLE / 2 + (i + 0.62) * SMALL * 1.4, SMALL, False, "#b3b9c2" if idle else MUTED


def _head(points: Sequence[Point]) -> list[Point]:
    """The triangle at the end of an arrow."""
    tip = points[-1]
    tail = next(p for p in reversed(points) if math.dist(p, tip) > 1e-6)
    ux, uy = ((tip[i] - tail[i]) / math.dist(tip, tail) for i in (0, 1))
    back = (tip[0] - 9 * ux, tip[1] - 9 * uy)
    return [tip, (back[0] - 4 * uy, back[1] + 4 * ux), (back[0] + 4 * uy, back[1] - 4 * ux)]
