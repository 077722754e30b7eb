"""The training loop against EDM's, written again from the paper: 60 steps on the same data with the same noise."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from exact import normal
from torch import Tensor

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.random import Draws
from chaindiff.io import tensorfile
from chaindiff.networks.interface import Condition
from chaindiff.specs.network import UNetSpec
from chaindiff.specs.training import EmaSpec, OptimizerSpec, TrainSpec
from chaindiff.training import loop

SHAPE, BATCH, STEPS, SEED = (3, 4, 4), 4, 60, 5
ELEMENTS = math.prod(SHAPE)
LR, WARMUP, HALF_LIFE, RAMPUP = 2e-3, 160, 40, 0.3
Weights = dict[str, Tensor]
exact = partial(Draws, dtype=torch.float64)


def fresh() -> Diffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = UNetSpec(kind="unet", arch="ddpmpp", channels=16, mult=[1], blocks=1, attention=[], dropout=0.0)
        return Diffusion(Variable.image("image", SHAPE[0], SHAPE[1]), network=network, name="image").double()


def images(samples: list[int]) -> Weights:
    return {"image": torch.stack([normal(SHAPE, "pictures", s).double() / 2 for s in samples])}


def ours(folder: Path, **changes) -> tuple[Weights, Weights]:
    """The weights and their average."""
    published = {"lr": LR, "warmup": WARMUP, "clip": 0, "eps": 1e-8 / ELEMENTS}
    spec = TrainSpec(
        images=BATCH * STEPS,
        batch=BATCH,
        accumulate=2,
        optimizer=OptimizerSpec(**{**published, **changes}),
        ema=EmaSpec(half_life=HALF_LIFE, rampup=RAMPUP),
        execution="eager",
        seed=SEED,
    )
    stage = fresh()
    for _ in loop.train(stage, images, spec, folder, total=spec.images, metadata={"identity": "i"}):
        pass
    weights = tensorfile.load(folder / "weights.safetensors")[0]
    return {name: value.detach() for name, value in stage.named_parameters()}, weights


def theirs() -> tuple[Weights, Weights]:
    """EDM, equations 2 and 8, tables 1 and 7 and appendix F; Adam (Kingma & Ba 2015, algorithm 1).

    As in EDM's released loop, the loss is summed over pixels and divided by the batch, and the warm-up of the learning
    rate and of the average count the images before the step.
    """
    stage = fresh()
    parameters = dict(stage.named_parameters())
    average = {name: value.detach().clone() for name, value in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in parameters.items()}
    second = copy.deepcopy(first)
    for step in range(STEPS):
        before = step * BATCH
        samples = list(range(before, before + BATCH))
        clean, draws = images(samples)["image"], exact(samples, SEED, "image")
        sigma = (-1.2 + 1.2 * draws.normal("sigma")).exp()[:, None, None, None]
        noisy = clean + sigma * draws.normal("noise", shape=SHAPE)
        total = sigma**2 + 0.25
        raw = stage.network({"image": noisy / total.sqrt()}, {"image": sigma.flatten().log() / 4}, Condition())["image"]
        denoised = 0.25 / total * noisy + 0.5 * sigma / total.sqrt() * raw
        loss = (total / (0.5 * sigma) ** 2 * (denoised - clean) ** 2).sum() / BATCH
        gradients = torch.autograd.grad(loss, [*parameters.values()])
        rate = LR * min(before / WARMUP, 1)
        half_life = min(HALF_LIFE, before * RAMPUP)
        keep = 0.5 ** (BATCH / half_life) if half_life else 0.0
        with torch.no_grad():
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                moment = first[name] / (1 - 0.9 ** (step + 1))
                spread = (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
                value -= rate * moment / (spread + 1e-8)
                average[name] = keep * average[name] + (1 - keep) * value
    return {name: value.detach() for name, value in parameters.items()}, average


def apart(one: Weights, other: Weights) -> float:
    """The largest difference of a weight."""
    return max(float((one[name] - other[name]).detach().abs().max()) for name in other)


@pytest.fixture(autouse=True)
def float64(monkeypatch) -> None:
    monkeypatch.setattr(loop, "Draws", exact)


@pytest.fixture(scope="module")
def reference() -> tuple[Weights, Weights]:
    return theirs()


def test_60_steps_are_those_of_edm(tmp_path, reference) -> None:
    begin = dict(fresh().named_parameters())
    assert apart(reference[0], begin) > 0.02  # they went somewhere
    assert apart(reference[0], reference[1]) > 1e-3  # and the average is behind
    for found, expected in zip(ours(tmp_path), reference, strict=True):
        assert apart(found, expected) < 1e-9


@pytest.mark.parametrize(
    "changes", [{"eps": 1e-8}, {"clip": 0.1}, {"warmup": 0}], ids=lambda changes: next(iter(changes))
)
def test_other_settings_are_told_apart(tmp_path, reference, changes) -> None:
    assert apart(ours(tmp_path, **changes)[0], reference[0]) > 1e-5
