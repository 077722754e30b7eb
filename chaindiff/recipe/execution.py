"""How a request is executed: compiled or not, in which precision; and the fingerprint of what samples depend on."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chaindiff.chain.chain import Chain
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.plan import ChainPlan
from chaindiff.chain.request import Value
from chaindiff.encoders.clip_files import pinned
from chaindiff.io.digest import digest, file_digest
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.recipe import OpenClipSpec
from chaindiff.specs.stage import StageSpec

COMPILE_PAYS = 3e13  # floating-point operations of a whole run; below, compiling takes longer than it saves


def prepare(chain: Chain, execution: str, precision: str) -> None:
    """Compile the networks of a chain that can run, and have them compute in bf16, as the request says."""
    for stage in chain.stages.loaded.values():
        if isinstance(stage, Diffusion):
            stage.autocast = torch.bfloat16 if precision == "bf16" else None
            if execution == "compile" and stage.network._compiled_call_impl is None:
                stage.network.compile()


def chosen_execution(assembly: Assembly, found: ChainPlan, before: str | None = None) -> str:
    """Eager or compiled: as the recipe says; under `auto`, as the run decided `before`, else whichever is faster."""
    asked = assembly.recipe.sample
    if asked.exact:
        return "eager"
    if asked.execution == "auto" and before is not None:
        return before
    total = asked.count * sum(found.costs[name].total_flops for name in found.running)
    return asked.execution if asked.execution != "auto" else "compile" if total >= COMPILE_PAYS else "eager"


def depends_on(
    assembly: Assembly, found: ChainPlan, weights: Mapping[str, Path], values: Mapping[str, Value]
) -> dict[str, Any]:
    """Everything that samples depend on except their number and how they are executed, as plain data."""
    recipe = assembly.recipe
    decoded = [step.producer.name for step in found.plan.steps if step.producer.kind == "decoder"]
    decoders = {n: spec.model_dump() for n in decoded if (spec := recipe.variables[n].decoder) is not None}
    return {
        **({"decoders": decoders} if decoders else {}),
        "weights": {name: file_digest(path) for name, path in weights.items()},
        "samplers": {n: sampler_settings(recipe.stages[n]) for n in found.running},
        "links": {n: [link.model_dump() for _, link in assembly.stages[n].links] for n in found.running},
        "given": {n: value_digest(v) for n, v in values.items()},
        "sample": recipe.sample.model_dump(exclude={"execution", "given", "count"}),
    }


def value_digest(value: Value) -> str:
    return hashlib.sha256(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()).hexdigest()


def sampler_settings(stage: StageSpec) -> dict[str, Any]:
    """The sampler's settings that its samples depend on: one variable alone has no offset."""
    return stage.sample.model_dump(exclude=set() if len(stage.generates or ()) > 1 else {"path", "variables"})


def lock_of(
    assembly: Assembly,
    found: ChainPlan,
    weights: Mapping[str, Path],
    values: Mapping[str, Value],
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run resolved beside the recipe. `samples` fingerprints all that the samples depend on; `before` is what
    the run's lock says already."""
    depends = depends_on(assembly, found, weights, values)
    for decided in (before.get("execution"), None):
        execution = chosen_execution(assembly, found, decided)
        samples = digest({**depends, "execution": execution})
        if samples == before.get("samples"):
            break  # else it is another request: how it is executed is decided again
    encoders = {name: spec.encoder for name, spec in assembly.coders.items()}
    models = {n: model for n, spec in encoders.items() if isinstance(spec, OpenClipSpec) and (model := pinned(spec))}
    return {
        "samples": samples,
        "count": assembly.recipe.sample.count,
        "execution": execution,
        **({"models": models} if models else {}),
        "weights": depends["weights"],
        "given": depends["given"],
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {p: version(p) for p in ("chain-diffusion-models", "torch", "numpy")},
    }
