"""What the suite measures of ours: networks, training, sampling, encoding."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import nn

from chaindiff.bench.timing import Side
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.data import augment, open_data
from chaindiff.execution import packages
from chaindiff.execution.runner import Tiled
from chaindiff.io.digest import digest
from chaindiff.networks.interface import Condition
from chaindiff.recipe.load import load
from chaindiff.specs.network import UNetSpec
from chaindiff.specs.training import AugmentSpec
from chaindiff.training.objects import train

BATCH, STEPS = 64, 3
SMALL = UNetSpec(kind="unet", channels=32, mult=[1, 2, 2], blocks=2, dropout=0.0)  # 1.75 M parameters
FFHQ = UNetSpec(kind="unet", dropout=0.05)  # 61.8 M
AUGMENT = AugmentSpec(probability=0.12, variants=1)
EAGER = "chaindiff, eager float32"
WAYS = {"chaindiff": ("compile", "bf16"), EAGER: ("eager", "float32")}
quietly = torch.no_grad()


def stage(spec: UNetSpec | nn.Module, size: int, **more: Any) -> Diffusion:
    """A stage with initial weights."""
    torch.manual_seed(0)
    return Diffusion(Variable("image", "image", (3, size, size)), network=spec, **more).eval()


def executed(made: Diffusion, execution: str = "eager", precision: str = "float32") -> Diffusion:
    """The stage, executed in this way as `chaindiff sample` does: compiled from the packages in the user's cache."""
    dtype = torch.bfloat16 if precision == "bf16" else None
    made.autocast = dtype
    if execution == "compile":
        device, shape = made.like.device, packages.shape_key(made.network_spec, made.interface, made.like.device)
        key = digest([shape, packages.weights_key(made), BATCH, precision])
        path = packages.find(key) or packages.build(key, made.network, made.interface, BATCH, dtype, device)
        made.run = Tiled(made.network, packages.load(path, device), made.interface, BATCH)
    return made


def denoised(spec: UNetSpec | nn.Module, size: int, batch: int, *how: str) -> Side:
    """One evaluation of a stage's denoiser."""
    made, x, sigma = stage(spec, size), torch.randn(batch, 3, size, size), torch.rand(batch) + 0.1
    cost = made.cost(["image"])
    run = partial(executed(made, *how).denoise, {"image": x}, {"image": sigma}, Condition())
    facts = {"parameters": float(cost.parameters), "flops": float(cost.flops)} if cost.flops else {}
    return Side(quietly(run), batch, facts, warm=1 if cost.flops * batch > 1e11 else 2)


def evaluate_32() -> dict[str, Side]:
    ways = {**WAYS, "chaindiff, eager bf16": ("eager", "bf16")}
    return {name: denoised(SMALL, 32, BATCH, *how) for name, how in ways.items()}


def evaluate_ffhq64() -> dict[str, Side]:
    return {"chaindiff": denoised(FFHQ, 64, 4, "eager", "bf16"), EAGER: denoised(FFHQ, 64, 4)}


def train_32() -> dict[str, Side]:
    data = open_data("emoji64")

    def seconds(execution: str, precision: str, made: Diffusion) -> float:
        """Of a step. Two more follow those that are timed, whose batches may be made ahead; the last writes files."""
        stamps: list[float] = []
        said = {"images": BATCH * (STEPS + 3), "batch": BATCH, "execution": execution, "precision": precision}
        train(made, data, augment=AUGMENT, progress=lambda _: stamps.append(time.perf_counter()), **said)
        return (stamps[STEPS] - stamps[0]) / STEPS

    made = {name: stage(SMALL, 32, augment_dim=augment.GEOMETRIC) for name in WAYS}
    return {name: Side(partial(seconds, *how, made[name]), BATCH, warm=1) for name, how in WAYS.items()}


def sample_16() -> dict[str, Side]:
    return {"chaindiff": Side(partial(load("edm_emoji16").sample, BATCH, solver="dpmpp_2m", steps=6), BATCH, warm=1)}


def chain() -> dict[str, Side]:
    """In Python: as the recipe says, and by EDM's solver."""
    sample = load("vcdm_emoji").sample
    heun = partial(sample, BATCH, solver="heun", steps=18)
    ways = {"chaindiff": partial(sample, BATCH), "chaindiff, Heun 18": heun}
    return {name: Side(way, BATCH, warm=1) for name, way in ways.items()}


def encode() -> dict[str, Side]:
    encoder, images = load("vcdm_emoji").encoders["clip"], open_data("emoji64").pixels(range(256), 64)
    return {"chaindiff": Side(quietly(partial(encoder, images)), len(images))}
