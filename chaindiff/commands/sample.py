"""`chaindiff sample`: makes the missing samples of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaindiff.chain.plan import ChainPlan
from chaindiff.chain.request import TILE, rows_of
from chaindiff.chain.stage import learns
from chaindiff.commands.plan import asking
from chaindiff.io.errors import UserError
from chaindiff.io.memory import noted
from chaindiff.io.processes import processes, share
from chaindiff.io.progress import say, shown
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.execution import lock_of, prepare
from chaindiff.recipe.given import read_given
from chaindiff.recipe.samples import GRID, Samples
from chaindiff.recipe.samples import draw as draw_samples
from chaindiff.recipe.stage import check_fitted
from chaindiff.specs.load import LOCK, Loaded, load_recipe
from chaindiff.specs.lock import write_lock


@dataclass(frozen=True)
class Sampled:
    """What sampling left behind; `seconds` is 0 if everything was there already."""

    samples: Samples
    plan: ChainPlan
    weights: dict[str, Path]
    lock: dict[str, Any]
    seconds: float
    stage_seconds: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """Where everything is, as plain data for scripts."""
        out = self.samples.folder.parent
        page = out / "report.html"
        return {
            "out": str(out),
            "count": self.samples.count,
            "samples": {v.name: str(self.samples.folder / v.name) for v in self.samples.variables},
            "grids": [str(path) for path in self.samples.grids],
            "page": str(page) if page.exists() else None,
            "lock": str(out / LOCK),
            "weights": {name: str(path) for name, path in self.weights.items()},
            "seconds": self.seconds,
            "stage_seconds": self.stage_seconds,
        }


def sample(
    loaded: Loaded,
    out: Path | None = None,
    count: int | None = None,
    seed: int | None = None,
    batch: int | None = None,
    want: Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Sampled:
    """Sample with existing weights."""
    loaded = asking(loaded, count=count, seed=seed, batch=batch, want=want, given=given)
    sampled = sample_chain(Assembly(loaded, out))
    say(f"{sampled.samples.count} samples in {sampled.samples.folder}")
    return sampled


def sample_chain(assembly: Assembly) -> Sampled:
    """Make the samples that are missing from a run; those of other settings or weights are made again.

    Several processes divide the batches. A batch does not depend on its process, so the files are those of one.
    """
    asked, out, state = assembly.recipe.sample, assembly.out, processes()
    found = assembly.request
    if all(step.producer.kind == "encoder" for step in found.plan.steps):
        say(nothing_runs(assembly))
    weights = {n: assembly.stages[n].weights() for n in found.running if learns(found.chain.stages.outlines[n])}
    check_fitted(weights)
    made = [v for step in found.plan.steps if step.producer.kind != "encoder" for v in step.outputs]
    keep = list(dict.fromkeys([*made, *asked.want]))
    size = TILE if asked.exact else asked.batch  # as the chain streams them
    values = read_given(assembly, asked.given, asked.count)
    texts = [rows_of(value, range(min(asked.count, GRID))) for value in values.values() if isinstance(value, list)]
    captions = [", ".join(row) for row in zip(*texts, strict=True)]
    samples = Samples(out / "samples", [assembly.versioned(v) for v in keep], asked.count, size, captions)
    before = load_recipe(out).lock if (out / LOCK).exists() else {}
    lock = lock_of(assembly, found, weights, values, before)
    stale = bool(before) and before.get("samples") != lock["samples"]
    if samples.complete and not stale:
        state.wait_for_everyone()
        return Sampled(samples, found, weights, lock, 0.0, {})
    chain = assembly.chain(found.running)  # weights that do not load are found before anything is deleted
    state.wait_for_everyone()  # all of them have read the lock before one changes it
    if state.is_main_process:
        if stale and samples.folder.exists():
            say(f"the samples in {samples.folder} are of other settings or weights; they are made again")
            samples.clear()
        write_lock(out, assembly.recipe, lock)
    state.wait_for_everyone()
    mine = share(samples.missing())
    prepare(chain, lock["execution"], asked.precision)
    began = time.perf_counter()
    settings = {"seed": asked.seed, "batch": asked.batch, "exact": asked.exact, "want": keep, "given": values}
    less = f"lower sample.batch (--batch), now {size}"
    if asked.exact:
        less = f"sample.exact always takes {size} at a time; without it, lower sample.batch (--batch)"
    with noted(less):
        shown("sample", draw_samples(chain, samples, mine, **settings))
    state.wait_for_everyone()
    if state.is_main_process:
        samples.write_grids()
    return Sampled(samples, found, weights, lock, time.perf_counter() - began, chain.seconds)


def nothing_runs(assembly: Assembly) -> str:
    """Why a request samples nothing, and what to give instead so that stages run."""
    request, given, chain, told = assembly.request.plan, assembly.recipe.sample.given, assembly.chain(), []
    read = {made: step.inputs[0] for step in request.steps for made in step.outputs}  # encoders read one variable each

    def runs(want: str, given: Sequence[str]) -> bool:
        try:
            return bool(chain.plan([want], given).running)
        except UserError:
            return False

    for want in request.want:
        origin = want
        while origin not in given:
            origin = read[origin]
        text = f"'{want}' is computed from the given '{origin}'" if origin != want else f"'{want}' is given"
        others = [name for name in given if name != origin]
        ways = (name for name in pictured(assembly, want) if name not in given and runs(want, [name, *others]))
        if way := next(ways, None):
            value = given[origin] if isinstance(given[origin], str) else "FILE"
            text += f"; to sample variations of a picture, condition its stage on one: --given {way}={value}"
        told.append(text)
    return f"no stage runs: {'; '.join(told)}"


def pictured(assembly: Assembly, variable: str) -> list[str]:
    """What a variable's stage is conditioned on and a picture can supply."""
    specs = assembly.recipe.variables
    stages = [n for n in assembly.recipe.stages if variable in {v.name for v in assembly.stages[n].generates}]
    links = [link.name for stage in stages for link, _ in assembly.stages[stage].links]
    return [name for name in links if specs[name].kind == "image" or specs[name].encoder is not None]
