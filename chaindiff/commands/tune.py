"""`chaindiff tune`: fits a joint stage's path of noise levels to its trained network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.formulation import curves
from chaindiff.chain.stage import Values, evaluating
from chaindiff.edm.families import Ruler
from chaindiff.edm.levels import Path as Levels
from chaindiff.edm.random import Draws
from chaindiff.edm.tuning import Errors, fitted, lost
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import write_whole
from chaindiff.io.progress import Bar, say
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.training import prepare
from chaindiff.specs.load import Loaded
from chaindiff.specs.path import SharedPath
from chaindiff.specs.yaml import dump

GRID = {2: 13, 3: 7, 4: 5}  # levels of each variable, by the number of variables: 169 to 625 combinations
ROWS = 32  # that the network sees at once


@dataclass(frozen=True)
class Tuned:
    """A fitted path: the file that was written, and by the paths' names what Euler's method would lose on them."""

    path: Path
    override: dict[str, Any]
    lost: dict[str, float]
    evaluations: int

    def facts(self) -> dict[str, Any]:
        """As plain data for scripts."""
        return {"file": str(self.path), "lost": self.lost, "evaluations": self.evaluations, "override": self.override}


def tune(
    loaded: Loaded, stage: str | None = None, steps: int | None = None, count: int = 128, out: Path | None = None
) -> Tuned:
    """Fit a stage's sampling path to its weights on `count` rows of its data; writes an override file.

    Raises UserError for a stage that generates one variable, or was not trained on all combinations of levels.
    """
    assembly = Assembly(loaded)
    name = _stage(assembly, stage)
    made: Diffusion = assembly.stages[name].load(assembly.stages[name].weights())
    names, ruler = [*made.generates], Ruler()
    grid = np.linspace(0, 1, GRID[len(names)])
    levels = ruler.sigma(torch.from_numpy(grid)).clamp_min(ruler.low).tolist()
    for node in product(levels, repeat=len(names)):
        if not made.family.drew(at := dict(zip(names, node, strict=True))):
            said = ", ".join(f"{v} {level:.3g}" for v, level in at.items())
            raise UserError(
                f"stage '{name}' has not learned every combination of levels, such as {said}",
                loaded.where(f"stages.{name}.path"),
                "a path can be fitted to a stage that was trained with path: {kind: independent}",
            )
    begun, batches = time.perf_counter(), prepare(assembly, name)
    chunks = [batches([*range(first, min(first + ROWS, count))]) for first in range(0, count, ROWS)]
    errors = Errors.of(measured(made, chunks, levels))
    present = made.path()
    steps = steps or present.steps
    together = curves(SharedPath(kind="shared"), names).path(names, steps)
    points, least = fitted(errors, steps, ruler)
    found = {
        f"the present path, {present.steps} steps": float(lost(errors, _progress(present, ruler), ruler)),
        f"all together, {steps} steps": float(lost(errors, _progress(together, ruler), ruler)),
        f"the fitted path, {steps} steps": least,
    }
    even = [round(k / steps, 6) for k in range(steps + 1)]
    table = {v: [[x, round(float(y), 4)] for x, y in zip(even, points[:, i], strict=True)] for i, v in enumerate(names)}
    sample = {"steps": steps, "path": {"kind": "table", "time": "edm", "points": table}}
    override = {"stages": {name: {"sample": sample}}}
    path = assembly.out / f"{name}.path.yaml" if out is None else out
    spoken = f"# by chaindiff tune {loaded.spoken} --path: take it with --set @{path}\n"
    write_whole(path, spoken + dump(override))
    say(*(f"{what}: Euler's method would lose {value:.3g} of the variance" for what, value in found.items()))
    ahead, evaluations = points.mean(0), len(levels) ** len(names) * count
    say(f"{names[int(ahead.argmax())]} leads, by {np.ptp(ahead):.2f} of a pass on average")
    say(f"{evaluations:,} evaluations of the network in {time.perf_counter() - begun:.0f} s")
    say(f"wrote {path}: take it with --set @{path}")
    return Tuned(path, override, found, evaluations)


def _stage(assembly: Assembly, name: str | None) -> str:
    """The joint stage that was named, or the only one."""
    stages = assembly.recipe.stages
    joint = [each for each, spec in stages.items() if len(spec.generates or ()) > 1]
    if name is not None and name not in stages:
        raise UserError(f"there is no stage '{name}'{did_you_mean(name, stages)}", f"--stage {name}")
    if name is None and len(joint) > 1:
        raise UserError(f"several stages have a path: {', '.join(joint)}", hint=f"choose one: --stage {joint[0]}")
    if not joint or (name is not None and name not in joint):
        who = f"stage '{name}' generates" if name else "every stage of this recipe generates"
        raise UserError(f"{who} one variable; a path is for several that are generated together")
    if len(assembly.recipe.stages[chosen := name or joint[0]].generates or ()) > max(GRID):
        raise UserError(f"stage '{chosen}' generates more than {max(GRID)} variables; a path of so many is not fitted")
    return chosen


def _progress(path: Levels, ruler: Ruler) -> torch.Tensor:
    """Every variable's progress at the steps of a path, [steps + 1, variables]."""
    levels = torch.tensor([[*path.sigma(k).values()] for k in range(path.steps + 1)], dtype=torch.float64)
    return ruler.progress(levels)


@torch.no_grad()
def measured(stage: Diffusion, chunks: Sequence[Values], levels: Sequence[float]) -> Float64[np.ndarray, "..."]:
    """The denoiser's squared error at every combination of levels, from the highest, with one axis for each variable.

    It is the mean over the variables, of each relative to its own where all are pure noise. Every combination sees the
    same rows with the same noise, so that differences between neighbours are the levels'.
    """
    names = [*stage.generates]
    total = {v: np.zeros([len(levels)] * len(names)) for v in names}
    nodes = [*product(range(len(levels)), repeat=len(names))]
    with evaluating(stage), Bar("measure errors", len(chunks) * len(nodes)) as bar:
        for number, chunk in enumerate(chunks):
            batch = {v: value.to(stage.like) if value.is_floating_point() else value for v, value in chunk.items()}
            clean, rows = {v: batch[v] for v in names}, len(batch[names[0]])
            draws = Draws(range(number * ROWS, number * ROWS + rows), 0, stage.name, "tune").on(stage.like.device)
            noise = {v: draws.of(v).normal("noise", shape=clean[v].shape[1:]).to(clean[v]) for v in names}
            bound = stage.bind({v.name: batch[v.name] for v in stage.given}, draws)
            bound = replace(bound, condition=replace(bound.condition, augment=batch.get("augment_labels")))
            for done, node in enumerate(nodes):
                sigma = {v: levels[place] for v, place in zip(names, node, strict=True)}
                found = bound({v: clean[v] + sigma[v] * noise[v] for v in names}, sigma).x0
                for v in names:
                    total[v][node] += float((found[v] - clean[v]).double().square().flatten(1).mean(1).sum())
                bar.update(number * len(nodes) + done + 1)
    return np.mean([error / error.flat[0] for error in total.values()], axis=0)
