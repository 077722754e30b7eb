"""What `plan`, `train`, `sample` and `run` do: what is missing, in order, and no more."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from torch import Tensor

from chaindiff.assemble import Assembly, default_out
from chaindiff.chain import TILE
from chaindiff.drawing import chain_png
from chaindiff.given import check_given, read_given
from chaindiff.outputs import Samples
from chaindiff.page import write_run_report
from chaindiff.planning import ChainPlan
from chaindiff.progress import Bar
from chaindiff.smoke import smoke_version
from chaindiff.specs.errors import UserError
from chaindiff.specs.files import write_whole
from chaindiff.specs.load import LOCK, Loaded, load_recipe
from chaindiff.specs.lock import write_lock
from chaindiff.training.job import train_stage
from chaindiff.variables import digest

COMPILE_PAYS = 3e13  # floating-point operations of a whole run; below, compiling takes longer than it saves


def say(text: str) -> None:
    """A line for the person at the terminal; nothing when quiet."""
    get_console().print(text, highlight=False, markup=False, soft_wrap=True)


# ------------------------------------------------------------ plan


def plan(
    loaded: Loaded,
    want: Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
    picture: Path | None = None,
) -> ChainPlan:
    """Check a request, and print what it would run and what that costs; needs no weights, data or memory."""
    asked = loaded.recipe.sample
    found = Assembly(loaded).skeleton().plan(want or asked.want or None, tuple({**asked.given, **(given or {})}))
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
    for name in [stage] if stage else list(loaded.recipe.stages):
        unfinished = assembly.unfinished(name)
        if fresh and not unfinished:
            (assembly.folder(name) / "state.safetensors").unlink(missing_ok=True)
        weights = None if fresh else assembly.find_weights(name)
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
    options = {"count": count, "seed": seed, "batch": batch, "want": want, "given": given}
    changes = {key: value for key, value in options.items() if value is not None}
    sampled = sample_chain(Assembly(loaded.override({"sample": changes}), out))
    say(f"{sampled.samples.count} samples in {sampled.samples.folder}")
    return sampled


def sample_chain(assembly: Assembly) -> Sampled:
    """Make the samples that are missing from a run; those of other settings or weights are made anew."""
    asked, out = assembly.recipe.sample, assembly.out
    found = assembly.request
    chain = assembly.chain(set(found.running))
    made = [v for step in found.plan.steps if step.producer.kind != "encoder" for v in step.outputs]
    keep = list(dict.fromkeys([*made, *asked.want]))
    size = TILE if asked.exact else asked.batch  # as the chain streams them
    samples = Samples(out / "samples", [assembly.variables[v] for v in keep], asked.count, size)
    values = read_given(assembly, asked.given)
    lock = lock_of(assembly, found, chain.weights, values)
    if (out / LOCK).exists() and load_recipe(out).lock.get("samples") != lock["samples"]:
        if samples.folder.exists():
            say(f"the samples in {samples.folder} are of other settings or weights; they are made anew")
        samples.clear()
    if samples.complete:
        return Sampled(samples, found, chain.weights, lock, 0.0, {})
    out.mkdir(parents=True, exist_ok=True)
    write_lock(out, assembly.recipe, lock)
    if lock["execution"] == "compile":
        for stage in chain.stages:
            stage.network.compile()
    began, number = time.perf_counter(), samples.done()
    settings = {"seed": asked.seed, "batch": asked.batch, "exact": asked.exact}
    with Bar("sample", asked.count, number) as bar:
        for part in chain.stream(asked.count, want=keep, given=values, first=number, **settings):
            samples.write(number, part)
            number += len(next(iter(part.values())))
            bar.update(number)
    samples.write_grids()
    return Sampled(samples, found, chain.weights, lock, time.perf_counter() - began, chain.seconds)


def lock_of(
    assembly: Assembly, found: ChainPlan, weights: Mapping[str, Path], values: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a run resolved beside the recipe. `samples` fingerprints all that the samples depend on."""
    recipe = assembly.recipe
    asked = recipe.sample
    total = asked.count * sum(found.costs[name].total_flops for name in found.running)
    execution = asked.execution
    if asked.exact:
        execution = "eager"
    elif execution == "auto":
        execution = "compile" if total >= COMPILE_PAYS else "eager"
    digests = {name: file_digest(path) for name, path in weights.items()}
    depends = {
        "weights": digests,
        "samplers": {n: recipe.stages[n].sample.model_dump() for n in found.running},
        "links": {n: [link.model_dump() for _, link in assembly.links(n)] for n in found.running},
        "given": {n: hashlib.sha256(v.numpy().tobytes()).hexdigest() for n, v in values.items()},
        "sample": asked.model_dump(exclude={"execution", "given"}),
        "execution": execution,
    }
    return {
        "samples": digest(depends),
        "execution": execution,
        "weights": digests,
        "given": depends["given"],
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {p: version(p) for p in ("chain-diffusion-models", "torch", "numpy")},
    }


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------ run


def run(
    loaded: Loaded, out: Path | None = None, smoke: bool = False, given: Mapping[str, Any] | None = None
) -> Sampled:
    """All of a recipe: weights (shipped or found, else trained), samples, pictures and the page."""
    banner = ""
    if smoke:
        loaded = smoke_version(loaded)
        out = out or default_out(loaded.recipe)
        banner = "SMOKE RUN: tiny networks, a few training steps, the embedded images. Not results."
        say(banner)
    loaded = loaded.override({"sample": {"given": given or {}}})
    assembly, asked = Assembly(loaded, out), loaded.recipe.sample
    found = assembly.request
    untrained = [name for name in found.running if assembly.find_weights(name) is None]
    for name in found.running:
        if name not in untrained:
            say(f"stage {name}: weights {assembly.weights(name)}")
    if untrained:  # wrong weights or a mistyped class must not wait for the training
        explain_missing_data(assembly)
        check_given(assembly, asked.given)
    for name in untrained:
        train_stage(assembly, name)
    sampled = sample_chain(assembly)
    page = assembly.out / "report.html"
    if not sampled.seconds and page.exists():
        say(f"nothing to do: {assembly.out} is complete (delete {sampled.samples.folder} to sample again)")
        return sampled
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
        image_stages = [n for n in recipe.stages if assembly.generates(n).kind == "image"]
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
