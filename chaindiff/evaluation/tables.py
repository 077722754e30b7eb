"""The results of an evaluation as tables: on the terminal, in markdown, on the page of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Generic, TypeVar

from chaindiff.evaluation.provenance import Figure, check_alike
from chaindiff.io.errors import in_lines

Table = list[list[str]]
R = TypeVar("R")
SCALE = {"kid": 1000.0}  # KID is shown in thousandths
SHOWN = ("fd", "kid", "cmmd", "swd", "precision", "recall", "alignment", "alignment_data")  # of all that is measured
NAMES = {
    "fd": "FD", "kid": "KID x1000", "swd": "SWD", "alignment": "alignment with captions",
    "alignment_data": "alignment of the data itself",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A row's figures for every seed, and the details beside them."""

    label: str
    about: Sequence[Mapping[str, Any]]  # one for each seed
    figures: Sequence[Sequence[Figure]]

    def of(self, metric: str, judge: str) -> list[Figure]:
        """One figure for each seed; empty if it was not measured."""
        return [f for seed in self.figures for f in seed if f.metric == metric and f.encoder == judge]

    def mean(self, metric: str, judge: str) -> float | None:
        found = self.of(metric, judge)
        return fmean(figure.value for figure in found) if found else None

    def error(self, metric: str, judge: str) -> float:
        """Standard error of the mean over seeds: of the seeds' scatter, or of the figures' own intervals if larger."""
        found = self.of(metric, judge)
        own = [(f.high - f.low) / 3.92 for f in found if f.low is not None and f.high is not None]
        within = math.hypot(*own) / len(found) if own else 0.0
        between = stdev(f.value for f in found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        return max(within, between)


@dataclass
class Group(Generic[R]):
    """Rows that belong in one table, to be measured or measured; `x` are the settings of a sweep."""

    title: str
    kind: str  # "main", "links", "sweep"
    rows: list[R] = field(default_factory=list)
    x: list[Any] = field(default_factory=list)


Results = Group[Measured]


def judges_of(rows: Iterable[Measured]) -> dict[str, bool]:
    """The judges in order, and whether each is of a family that the chain itself uses."""
    return {f.encoder or "": f.in_chain for row in rows for seed in row.figures for f in seed}


def figures_table(results: Results, metrics: Sequence[str] = SHOWN) -> Table:
    """A line for each row: every metric by every judge, the samples behind them, what sampling and training cost."""
    judges = judges_of(results.rows)
    columns = [(m, j) for j in judges for m in metrics if any(row.of(m, j) for row in results.rows)]
    head = ["row", *(f"{NAMES.get(m, m)} {j}{'*' if judges[j] else ''}" for m, j in columns)]
    lines = [[*head, "samples", "GFLOP a sample", "training PFLOP", "training images", "images/s"]]
    for row in results.rows:
        cells = [row.label, *(cell(row, metric, judge) for metric, judge in columns)]
        counts = f"{len(row.about)} x {row.about[0]['count']:,}" if len(row.about) > 1 else f"{row.about[0]['count']:,}"
        speed = 1 / fmean(a["seconds per image"] for a in row.about)
        lines.append([*cells, counts, number(row.about[0]["gflops"]), *training(row.about[0]), number(speed)])
    return lines


def training(about: Mapping[str, Any]) -> tuple[str, str]:
    """What training a row's stages cost, and the images that each has seen as they run; "-" where it is not known."""
    cost, seen = about["training pflop"], about["training images"].values()
    images = " + ".join("-" if count is None else f"{count:,}" for count in seen)
    return "-" if cost is None else number(cost), images or "-"


def cell(row: Measured, metric: str, judge: str) -> str:
    value = row.mean(metric, judge)
    if value is None:
        return "-"
    scale, error = SCALE.get(metric, 1.0), row.error(metric, judge)
    spread = f" ± {number(1.96 * error * scale)}" if error else ""
    return f"{number(value * scale)}{spread}"


def number(value: float) -> str:
    """Three digits, never in powers of ten."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")  # first, so that 9.999 is 10.0 and not 10.00
    if rounded == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def link_costs(results: Results, stages: Sequence[str], metric: str = "kid") -> Table:
    """What each stage's own samples add to the distance, one after the other from the first.

    The whole chain minus the chain whose first k variables are the data's; the differences and the rest, which is the
    measured stage's own, add up to the whole. 95% intervals by error propagation.
    """
    by_label = {row.label: row for row in results.rows}
    whole = last = by_label["the whole chain"]
    judges = {j: own for j, own in judges_of(results.rows).items() if whole.of(metric, j)}
    lines = [["stage", *(f"{NAMES[metric]} {judge}{'*' if own else ''}" for judge, own in judges.items())]]
    for count, stage in enumerate(stages, 1):
        row = by_label.get(f"{', '.join(stages[:count])} from the data") or by_label.get(f"{stage} from the data")
        if row is not None:
            lines.append([f"{stage}: sampled, not from the data", *(difference(last, row, metric, j) for j in judges)])
            last = row
    lines.append(["all else: the last stage, given the data's values", *(cell(last, metric, j) for j in judges)])
    return [*lines, ["the whole chain", *(cell(whole, metric, j) for j in judges)]]


def difference(before: Measured, after: Measured, metric: str, judge: str) -> str:
    """The first minus the second. Raises UserError if the figures were not measured alike."""
    a, b, scale = before.mean(metric, judge), after.mean(metric, judge), SCALE.get(metric, 1.0)
    if a is None or b is None:
        return "-"
    check_alike(before.of(metric, judge)[0], after.of(metric, judge)[0])
    error = math.hypot(before.error(metric, judge), after.error(metric, judge))
    return f"{number((a - b) * scale)} ± {number(1.96 * error * scale)}"


def markdown(table: Table) -> str:
    head, *rows = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def plain(table: Table) -> str:
    """Columns aligned with spaces, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return in_lines(*("  ".join(map(str.ljust, line, widths)).rstrip() for line in table))
