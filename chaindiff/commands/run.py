"""What `plan`, `train`, `sample` and `run` do: what is missing, in order, and no more."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import get_console

from chaindiff.chain.plan import ChainPlan
from chaindiff.chain.request import TILE, rows_of
from chaindiff.chain.stage import learns
from chaindiff.commands.page import write_run_report
from chaindiff.commands.smoke import smoke_version
from chaindiff.evaluation.evaluate import evaluate as measure
from chaindiff.evaluation.report import METRICS, Report
from chaindiff.evaluation.tables import plain
from chaindiff.io.errors import UserError
from chaindiff.io.files import write_whole
from chaindiff.io.memory import noted
from chaindiff.io.processes import processes, share
from chaindiff.io.progress import shown
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.execution import lock_of, prepare
from chaindiff.recipe.given import check_given, read_given
from chaindiff.recipe.samples import Samples
from chaindiff.recipe.samples import draw as draw_samples
from chaindiff.recipe.stage import check_fitted
from chaindiff.recipe.training import check_begin, train_stage
from chaindiff.show.drawing import chain_png
from chaindiff.specs.load import LOCK, Loaded, load_recipe
from chaindiff.specs.lock import write_lock
from chaindiff.specs.yaml import wrap


def _read(recipe: Loaded | str | Path) -> Loaded:
    """In Python a recipe may be named, as on the command line."""
    return recipe if isinstance(recipe, Loaded) else load_recipe(recipe)


def say(text: str) -> None:
    """A line for the person at the terminal; nothing when quiet."""
    get_console().print(text, highlight=False, markup=False, soft_wrap=True)


def asking(loaded: Loaded, **options: Any) -> Loaded:
    """The recipe with what a command's options ask of its samples; None asks nothing."""
    return loaded.override({"sample": {n: wrap(v, f"--{n}") for n, v in options.items() if v is not None}})


# ------------------------------------------------------------ plan


def plan(
    loaded: Loaded,
    want: Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
    picture: Path | None = None,
) -> ChainPlan:
    """Check a request, and print what it would run and what that costs; needs no weights, data or memory."""
    loaded = asking(loaded, want=want, given=given)
    assembly = Assembly(loaded)
    found = assembly.request
    check_begin(assembly, loaded.recipe.stages)
    say(str(found))
    if picture is not None:
        draw(found, picture)
        say(f"\nwrote {picture}")
    return found


def draw(found: ChainPlan, path: Path) -> None:
    """The chain's picture as SVG or PNG, by the file's suffix."""
    if path.suffix == ".svg":
        write_whole(path, found.svg().encode())
    elif path.suffix == ".png":
        chain_png(*found.drawing(), path)
    else:
        raise UserError(f"--picture {path}: pictures are .svg or .png")


# ------------------------------------------------------------ train


def train(
    loaded: Loaded, stage: str | None = None, more: int = 0, out: Path | None = None, fresh: bool = False
) -> None:
    """Train one stage, or all in order; with `more`, go on from the run's or the shipped weights.

    Training that was stopped goes on in every case; `fresh` begins anew where it had ended.
    """
    assembly = Assembly(loaded, out)
    names = [stage] if stage else list(loaded.recipe.stages)
    check_begin(assembly, names, fresh)
    for name in names:
        unfinished = assembly.stages[name].unfinished
        processes().wait_for_everyone()  # all of them have looked before one changes anything
        if fresh and not unfinished:
            (assembly.stages[name].folder / "state.safetensors").unlink(missing_ok=True)
        weights = None if fresh else assembly.stages[name].find_weights()
        if weights is not None and weights.exists() and not more and not unfinished:
            say(f"stage {name} has weights: {weights} (--more IMAGES goes on from them, --fresh trains anew)")
        else:
            train_stage(assembly, name, start=weights, more=more)


# ------------------------------------------------------------ sample


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
    """Sample with the weights that are there."""
    loaded = asking(loaded, count=count, seed=seed, batch=batch, want=want, given=given)
    sampled = sample_chain(Assembly(loaded, out))
    say(f"{sampled.samples.count} samples in {sampled.samples.folder}")
    return sampled


def sample_chain(assembly: Assembly) -> Sampled:
    """Make the samples that are missing from a run; those of other settings or weights are made anew.

    Several processes share the batches out. A batch is the same whoever makes it, so their files are those of one.
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
    texts = [rows_of(value, range(asked.count)) for value in values.values() if isinstance(value, list)]
    captions = [", ".join(row) for row in zip(*texts, strict=True)]
    samples = Samples(out / "samples", [assembly.variables[v] for v in keep], asked.count, size, captions)
    before = load_recipe(out).lock if (out / LOCK).exists() else {}
    lock = lock_of(assembly, found, weights, values, before)
    if lock["samples"] != before.get("samples"):  # another request: how it is executed is decided anew
        lock = lock_of(assembly, found, weights, values, {})
    stale = bool(before) and before.get("samples") != lock["samples"]
    if samples.complete and not stale:
        state.wait_for_everyone()
        return Sampled(samples, found, weights, lock, 0.0, {})
    chain = assembly.chain(found.running)  # weights that do not load are found before anything is deleted
    state.wait_for_everyone()  # all of them have read the lock before one changes it
    if state.is_main_process:
        if stale and samples.folder.exists():
            say(f"the samples in {samples.folder} are of other settings or weights; they are made anew")
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
    """Why a request samples nothing, and what to give in place of it so that stages run."""
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
            text += f"; to sample variations of a picture give what its stage is given, such as --given {way}={value}"
        told.append(text)
    return f"no stage runs: {'; '.join(told)}"


def pictured(assembly: Assembly, variable: str) -> list[str]:
    """What the stage of a variable is given and a picture can stand for."""
    specs = assembly.recipe.variables
    stages = [n for n in assembly.recipe.stages if variable in {v.name for v in assembly.stages[n].generates}]
    links = [link.name for stage in stages for link, _ in assembly.stages[stage].links]
    return [name for name in links if specs[name].kind == "image" or specs[name].encoder is not None]


# ------------------------------------------------------------ evaluate


def evaluate(
    recipe: Loaded | str | Path,
    out: Path | None = None,
    given: Mapping[str, Any] | None = None,
    count: int | None = None,
    seeds: Sequence[int] = (),
    judges: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Measure a chain, say what was found, and show it on the page of the run, which is made if there is none."""
    asked = {"count": count, "seeds": list(seeds), "judges": list(judges)}
    changed = {"evaluate": {key: value for key, value in asked.items() if value}}
    loaded = asking(_read(recipe).override(changed), given=given)
    report, assembly = measure(loaded, out=out, **options), Assembly(loaded, out)
    sampled, page = sample_chain(assembly), assembly.out / "report.html"
    if not processes().is_main_process:
        return report
    for part in report.parts:
        say(f"\n{part['title']}\n{part['note']}\n\n{plain(part['table']) if part['table'] else ''}")
    write_run_report(page, assembly, sampled)
    say(f"\nfigures: {assembly.out / METRICS}\npage: {page}")
    return report


# ------------------------------------------------------------ run


def run(
    recipe: Loaded | str | Path,
    out: Path | None = None,
    smoke: bool = False,
    count: int | None = None,
    seed: int | None = None,
    batch: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> Sampled:
    """All of a recipe: weights (shipped or found, else trained), samples, pictures and the page."""
    loaded, banner = _read(recipe), ""
    if smoke:
        loaded = smoke_version(loaded)
        out = out or Path("runs") / loaded.recipe.name
        banner = "SMOKE RUN: tiny networks, a few training steps, the embedded images. Not results."
        say(banner)
    loaded = asking(loaded, count=count, seed=seed, batch=batch, given=given)
    assembly, asked = Assembly(loaded, out), loaded.recipe.sample
    found = assembly.request
    learning = [name for name in found.running if learns(found.chain.stages.outlines[name])]
    untrained = [name for name in learning if assembly.stages[name].find_weights() is None]
    for name in learning:
        if name not in untrained:
            say(f"stage {name}: weights {assembly.stages[name].weights()}")
    if untrained:  # wrong weights or a mistyped class must not wait for the training
        explain_missing_data(assembly)
        check_given(assembly, asked.given)
        check_begin(assembly, untrained)
    for name in untrained:
        train_stage(assembly, name)
    sampled = sample_chain(assembly)
    page = assembly.out / "report.html"
    if not sampled.seconds and page.exists():
        say(f"nothing to do: {assembly.out} is complete (delete {sampled.samples.folder} to sample again)")
        return sampled
    if processes().is_main_process:
        draw(sampled.plan, assembly.out / "chain.svg")
        write_run_report(page, assembly, sampled, banner)
    if sampled.seconds:
        say(f"{sampled.samples.count} samples in {sampled.seconds:.1f} s")
    say("\n".join(f"grid: {path}" for path in reversed(sampled.samples.grids)))
    say(f"page: {page}")
    return sampled


def explain_missing_data(assembly: Assembly) -> None:
    """Before training: is the data there? If not, everything that a person can do about it."""
    recipe = assembly.recipe
    try:
        len(assembly.data)
    except UserError as error:
        image_stages = [n for n in recipe.stages if [v.kind for v in assembly.stages[n].generates] == ["image"]]
        begin = f"--set stages.{image_stages[-1]}.init=WEIGHTS.safetensors" if image_stages else ""
        raise UserError(
            error.message,
            error.where,
            f"{error.hint or ''}\n  {recipe.name} has no shipped weights, so it trains on its own images first. You can"
            f"\n    train on any folder of images:   chaindiff run {assembly.loaded.spoken} --set data.path=FOLDER"
            f"\n    begin from EDM weights:          add {begin}"
            f"\n    see the whole pipeline at once:  chaindiff run {assembly.loaded.spoken} --smoke"
            f"\n    sample a chain that is trained:  chaindiff run vcdm_emoji",
        ) from error
