"""What a run resolves beside its recipe: the fingerprint of what samples depend on, and how they are executed."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chaindiff.chain.plan import ChainPlan
from chaindiff.chain.request import Value
from chaindiff.encoders.clip_files import pinned
from chaindiff.execution.prepare import kept, locked
from chaindiff.io.digest import digest, file_digest
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.recipe import OpenClipSpec
from chaindiff.specs.stage import StageSpec


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
        "given": {n: hashlib.sha256(_bytes(v)).hexdigest() for n, v in values.items()},
        "sample": recipe.sample.model_dump(exclude={"execution", "precision", "max_memory", "given", "count"}),
    }


def _bytes(value: Value) -> bytes:
    return value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()


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
    """What a run resolved beside the recipe. `samples` fingerprints all that the samples depend on but how they are
    executed; that stays as the run's lock says, `before`, if that is of this request."""
    depends = depends_on(assembly, found, weights, values)
    samples = digest(depends)
    decided = kept(before, assembly.recipe.sample) if samples == before.get("samples") else None
    encoders = {name: spec.encoder for name, spec in assembly.coders.items()}
    models = {n: model for n, spec in encoders.items() if isinstance(spec, OpenClipSpec) and (model := pinned(spec))}
    return {
        "samples": samples,
        "count": assembly.recipe.sample.count,
        "execution": None if decided is None else locked(decided),
        **({"models": models} if models else {}),
        "weights": depends["weights"],
        "given": depends["given"],
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {p: version(p) for p in ("chain-diffusion-models", "torch", "numpy")},
    }
