"""What an evaluation leaves in a run: metrics.json with every figure and its provenance, and plots beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import add, sub
from pathlib import Path
from typing import Any

from chaindiff.evaluation.provenance import Part, read_evaluation
from chaindiff.evaluation.rows import Row
from chaindiff.evaluation.study import Study
from chaindiff.evaluation.tables import SCALE, Measured, Results, Table, figures_table, judges_of, link_costs, number
from chaindiff.evaluation.vectors import vector_report
from chaindiff.io.errors import UserError
from chaindiff.io.files import read_within, write_whole
from chaindiff.io.progress import say
from chaindiff.show import plots
from chaindiff.show.images import grid, png_bytes
from chaindiff.show.page import Picture, Section

METRICS = "metrics.json"
FLATTERS = "* a judge of an architecture family that the chain itself uses: it flatters the chain"
COPIES = (
    "Distance to the nearest training image. Samples that copy training images lie nearer to them than held-out images "
    "do. Closest pairs: a sample, then its nearest training image."
)


class Report:
    """Collects the parts of an evaluation; `write` puts them into the run's directory."""

    def __init__(self, folder: Path, weights: Mapping[str, Mapping[str, Path]] | None = None):
        self.folder, self.weights = folder, weights or {}  # the latter of the rows that are compared
        self.parts: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []

    def add(self, title: str, note: str = "", table: Table | None = None, **pictures: bytes) -> None:
        names = {}
        for name, png in pictures.items():
            names[name] = f"{len(self.parts):02d}-{name}.png"
            write_whole(self.folder / names[name], png)
        self.parts.append({"title": title, "note": note, "table": table or [], "pictures": names})

    # ------------------------------------------------------------ parts

    def add_group(self, results: Results, stages: Sequence[str] = ()) -> None:
        """A table of rows; of a sweep, curves; of links, what each stage's own samples cost."""
        self.figures += [
            {**about, **figure.model_dump()}
            for row in results.rows
            for about, seed in zip(row.about, row.figures, strict=True)
            for figure in seed
        ]
        pictures = {}
        if len(results.rows) > 1:
            pictures["kid"] = kid_curves(results) if results.kind == "sweep" else kid_bars(results)
        self.add(results.title, provenance(results.rows), figures_table(results), **pictures)
        if results.kind == "links" and stages:
            note = "KID of the whole chain, split into what each stage's own samples add to it; 95% intervals."
            note += f" {FLATTERS}." * any(judges_of(results.rows).values())
            self.add("Link by link", note, link_costs(results, stages))

    def add_memorisation(self, study: Study, row: Row) -> None:
        """Distances to the nearest training image, of samples beside those of held-out images."""
        for judge in dict.fromkeys([study.judges[0], "pixels"]):
            found = study.memorisation(row, judge)
            if found is None:
                self.add("Memorisation", "not measured: the data has no held-out split (`evaluate.held_out`)")
                return
            table = [["measure", "value"], *([name, number(value)] for name, value in found.summary().items())]
            sets = {"samples": found.samples.numpy(), "held-out images": found.held_out.numpy()}
            distances = plots.histograms(sets, f"{judge}: nearest training image", "distance")
            pairs = png_bytes(grid(study.pairs(row, found), columns=8))
            self.add(f"Memorisation, by {judge}", COPIES, table, distances=distances, pairs=pairs)

    def add_priors(self, study: Study, row: Row) -> None:
        """Every sampled vector against held-out ones: a prior can be judged without an image."""
        if (held := study.held(row)) is None:
            return
        sets = held, study.data(row, None)
        for name in row.made:
            if row.assembly.variables[name].kind != "vector":
                continue
            values = [data.values.of(name, range(data.count)) for data in sets]
            found = vector_report(row.samples(name), *values)
            counts = f"{len(values[0]):,} held-out and {len(values[1]):,} training ones"
            note = f"{row.count:,} sampled '{name}' against {counts}."
            self.add(f"The prior of '{name}' alone", note, vector_table(found))

    # ------------------------------------------------------------ files

    def facts(self) -> dict[str, Any]:
        """The figures and where everything lies, as plain data for scripts."""
        out = self.folder.parent
        return {
            "out": str(out),
            "metrics": str(out / METRICS),
            "page": str(out / "report.html"),
            "weights": {row: {name: str(path) for name, path in of.items()} for row, of in self.weights.items()},
            "figures": self.figures,
        }

    def write(self) -> Path:
        path = self.folder.parent / METRICS
        write_whole(path, json.dumps({"parts": self.parts, "figures": self.figures}, indent=1).encode())
        return path


def sections(out: Path) -> list[Section]:
    """The parts of an evaluation for the page of a run; none if there was no evaluation."""

    def pictures(part: Part) -> list[Picture]:
        return [Picture(name, read_within(out, out / "evaluation" / file)) for name, file in part.pictures.items()]

    try:
        found = read_evaluation(out / METRICS)
        return [Section(p.title, p.note, p.table, pictures(p)) for p in found.parts] if found else []
    except (UserError, OSError) as error:  # what was sampled is shown all the same
        say(f"the page shows no evaluation: {error}")
        return []


def provenance(rows: Sequence[Measured]) -> str:
    """What all figures of a table share."""
    everything = [figure for row in rows for seed in row.figures for figure in seed]
    figures = {figure.encoder: figure for figure in everything}
    one = everything[0]
    lines = [f"Reference: {one.reference}, split {one.split}; means over seeds, ± 95% intervals."]
    aligned = next((figure for figure in everything if figure.metric == "alignment"), None)
    if aligned is not None:
        lines.append(
            "Alignment: mean cosine of a sample and the caption of the image that it was made for, beside that of "
            f"those images themselves ({aligned.reference}, split {aligned.split})."
        )
    for figure in figures.values():
        if figure.encoder_identity is not None:
            lines.append(f"{figure.encoder}: weights {figure.encoder_identity[:12]}, resized {figure.resize}")
    return "\n".join(lines + ([FLATTERS] if any(f.in_chain for f in figures.values()) else []))


def vector_table(found: dict[str, Any]) -> Table:
    """`vector_report` as a table: every measure of the samples beside its floor."""
    lines = [["measure", "sampled", "held out: the floor", "training set"]]
    for name in ("frechet", "kid", "precision", "recall", "density", "coverage"):
        values = found[name] or {"sampled": None, "floor": None}
        plain = [v["value"] if isinstance(v, dict) else v for v in values.values()]
        lines.append([name, *("-" if v is None else number(v) for v in plain), ""])
    for name in ("norm", "cosine"):
        spread = [f"{number(found[name][k]['mean'])} (sd {number(found[name][k]['std'])})" for k in found[name]]
        lines.append([name, *spread])
    novelty = found["novelty"]
    lines.append(["nearest training embedding, median distance", number(novelty["median_sample"]),
                  number(novelty["median_held_out"]), ""])  # fmt: skip
    lines.append(["share nearer to training than 95% of held-out", number(novelty["share"]), "0.05", ""])
    return lines


def kid_curves(results: Results) -> bytes:
    numeric = all(isinstance(x, int | float) for x in results.x)
    x = [float(v) for v in (results.x if numeric else range(len(results.x)))]
    judges = [judge for judge in judges_of(results.rows) if results.rows[0].of("kid", judge)]
    found = [plots.Curve(judge, x, *kid_of(results.rows, judge)) for judge in judges]
    return plots.curves(found, results.title, results.title.split(",")[0].split(".")[-1], "KID x1000")


def kid_bars(results: Results) -> bytes:
    judge = next(iter(judges_of(results.rows)))
    values = zip(*kid_of(results.rows, judge), strict=True)
    return plots.bars({row.label: v for row, v in zip(results.rows, values, strict=True)}, judge, "KID x1000")


def kid_of(rows: Sequence[Measured], judge: str) -> tuple[list[float], list[float], list[float]]:
    """The value of every row, and the ends of its 95% interval."""
    values = [SCALE["kid"] * (row.mean("kid", judge) or 0.0) for row in rows]
    spreads = [SCALE["kid"] * 1.96 * row.error("kid", judge) for row in rows]
    return values, list(map(sub, values, spreads)), list(map(add, values, spreads))
