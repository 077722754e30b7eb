"""What `chaindiff compare` shows: the settings in which runs differ, and their figures. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from chaindiff.commands.catalogue import runs
from chaindiff.evaluation.provenance import LIKE, read_evaluation
from chaindiff.evaluation.tables import NAMES, Measured, cell, plain
from chaindiff.io.errors import Lines, UserError, did_you_mean, in_lines
from chaindiff.specs.load import LOCK, Loaded, load_recipe

WIDEST = 40  # characters of a setting in the table
ABSENT = object()  # a field that a recipe does not have


@dataclass(frozen=True)
class Run:
    """A run as it was named, its locked recipe, and the figures of its evaluation; None if there was none."""

    name: str
    folder: Path
    loaded: Loaded
    figures: list[dict[str, Any]] | None  # the chain's own first

    @classmethod
    def open(cls, name: str) -> Run:
        """By path, or by name under `runs`. Raises UserError if it is not a run, and for broken figures."""
        folder = next((path for path in (Path(name), Path("runs") / name) if (path / LOCK).is_file()), None)
        if folder is None:
            hint = f"a run is a directory with {LOCK}; `chaindiff list runs` shows those under runs"
            raise UserError(f"there is no run '{name}'{did_you_mean(name, runs())}", hint=hint)
        return cls(name.rstrip("/"), folder, load_recipe(folder), figures_of(folder / "metrics.json"))

    @property
    def settings(self) -> dict[str, Any]:
        """Without those of the evaluation: the lock was written for the samples, and figures carry their own."""
        weights = {name: str(digest)[:12] for name, digest in (self.loaded.lock.get("weights") or {}).items()}
        return {**settings_of(self.loaded, "name", "description"), "weights": weights}

    @property
    def evaluate(self) -> str:
        """The command that measures this run."""
        return f"chaindiff evaluate {self.folder}"


@dataclass(frozen=True)
class Comparison:
    """`settings`: each field that differs, with its value in every run. `figures`: what two or more runs measured."""

    runs: Sequence[Run]
    settings: dict[str, list[Any]]
    figures: list[dict[str, Any]]
    notes: list[str]

    def facts(self) -> dict[str, Any]:
        """As plain data for scripts; a field that a recipe does not have is left out of its values."""
        names = [run.name for run in self.runs]
        settings = {
            path: {name: v for name, v in zip(names, values, strict=True) if v is not ABSENT}
            for path, values in self.settings.items()
        }
        figures = [{key: value for key, value in line.items() if key != "cells"} for line in self.figures]
        return {"runs": names, "settings": settings, "figures": figures, "notes": self.notes}

    def __str__(self) -> str:
        names, parts = [run.name for run in self.runs], ["no setting differs"]
        if self.settings:
            settings = [[path, *map(shown, values)] for path, values in self.settings.items()]
            parts = [plain([["setting", *names], *settings])]
        if self.figures:
            lines, warning = [], "not measured alike" if any(line["unlike"] for line in self.figures) else ""
            for line in self.figures:
                title = f"{NAMES.get(line['metric'], line['metric'])} {line['judge']} of '{line['of']}'"
                cells = [line["cells"].get(name, "-") for name in names]
                told = [f"{field} {', '.join(map(shown, by_run.values()))}" for field, by_run in line["unlike"].items()]
                lines.append([line["row"], title, *cells, "; ".join(told)])  # such as `count 260, 1000`
            parts.append(plain([["row", "figure", *names, warning], *lines]))
        return Lines("\n\n".join([*parts, *([in_lines(*self.notes)] if self.notes else [])]))


def compare(names: Sequence[str]) -> Comparison:
    """Two or more runs. Raises UserError for fewer, and for names that are not runs."""
    found = [Run.open(name) for name in names]
    if len({run.folder.resolve() for run in found}) < max(2, len(found)):
        raise UserError("compare takes two or more different runs", hint="chaindiff compare RUN RUN")
    notes = [f"{run.name} was not evaluated; evaluate it: {run.evaluate}" for run in found if run.figures is None]
    lines = lines_of(found)
    if not notes and not lines:
        notes.append("the runs have no figure in common: measure the same variable by the same judges")
    return Comparison(found, dict(differences([run.settings for run in found])), lines, notes)


# ------------------------------------------------------------ settings


def settings_of(loaded: Loaded, *without: str) -> dict[str, Any]:
    """A recipe's settings, but for those of its evaluation and these."""
    return loaded.recipe.model_dump(mode="json", exclude={"evaluate", *without})


def differences(values: Sequence[Any], path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The fields, as deep down as they can be named, in which recipes differ, with the value in each."""
    if all(value == values[0] for value in values) or path.endswith(".description"):
        return
    if all(isinstance(value, dict) for value in values):
        keys: dict[str, None] = {key: None for value in values for key in value}
        for key in keys:
            yield from differences([value.get(key, ABSENT) for value in values], f"{path}.{key}" if path else key)
    elif all(isinstance(v, list) and len(v) == len(values[0]) and any(isinstance(i, dict) for i in v) for v in values):
        for index, items in enumerate(zip(*values, strict=True)):
            yield from differences(items, f"{path}.{index}")
    else:
        yield path, list(values)


def shown(value: Any) -> str:
    """A setting in a table's cell."""
    if value is ABSENT:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


# ------------------------------------------------------------ figures


def figures_of(path: Path) -> list[dict[str, Any]] | None:
    """The figures of an evaluation with the details of each; None if there is no evaluation."""
    if (found := read_evaluation(path)) is None:
        return None
    own = found.figures[0].row if found.figures else ""
    labels = {figure.row: "the chain" if figure.row == own else figure.row for figure in found.figures}
    return [{**f.model_dump(by_alias=True), "figure": f, "label": labels[f.row]} for f in found.figures]


def lines_of(found: Sequence[Run]) -> list[dict[str, Any]]:
    """A line for every figure that two or more runs have, means over seeds: of the chain itself, and of other rows
    by the same label."""
    lines: dict[tuple[str, str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in found:
        for figure in run.figures or ():
            key = (figure["label"], figure["of"], figure["metric"], figure["encoder"] or "")
            lines.setdefault(key, {}).setdefault(run.name, []).append(figure)
    return [line(*key, by_run) for key, by_run in lines.items() if len(by_run) > 1]


def line(row: str, of: str, metric: str, judge: str, by_run: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One figure of several runs, and how the conditions of its measurement differ."""
    told = {field: {name: seeds[0].get(field) for name, seeds in by_run.items()} for field in (*LIKE, "from data")}
    measured = {name: Measured("", [], [[figure["figure"]] for figure in seeds]) for name, seeds in by_run.items()}
    return {
        "row": row,
        "of": of,
        "metric": metric,
        "judge": judge,
        "means": {name: fmean(figure["value"] for figure in seeds) for name, seeds in by_run.items()},
        "seeds": {name: [figure["seed"] for figure in seeds] for name, seeds in by_run.items()},
        "unlike": {f: values for f, values in told.items() if len({json.dumps(v) for v in values.values()}) > 1},
        "cells": {name: cell(found, metric, judge) for name, found in measured.items()},
    }
