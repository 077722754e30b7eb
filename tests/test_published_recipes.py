"""Recipes at full scale have the sizes, budgets and samplers of their papers, and every recipe runs as a smoke test."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from chaindiff.commands.smoke import smoke_version
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import available, load_recipe

# EDM, tables 1 and 7, the commands of its README and the snapshots' parameter counts; the README of VCDM's code.
# recipe -> stage, parameters, network evaluations, (batch, lr, dropout, augmentation, training images, EMA half-life)
PUBLISHED = {
    "edm_cifar10": ("image", 55_733_891, 35, (512, 1e-3, 0.13, 0.12, 200e6, 0.5e6)),
    "edm_ffhq": ("image", 61_805_571, 79, (256, 2e-4, 0.05, 0.15, 200e6, 0.5e6)),
    "edm_imagenet64": ("image", 295_899_267, 511, (4096, 1e-4, 0.10, 0.0, 2500e6, 50e6)),
    "vcdm_ffhq": ("image", 61_871_235, 79, (128, 1e-4, 0.05, 0.15, 200e6, 0.5e6)),
    "vcdm_afhq": ("image", 61_871_235, 79, (128, 1e-4, 0.05, 0.15, 200e6, 0.5e6)),
}
# (S_churn, S_min, S_max, S_noise)
CHURN = {
    "edm_cifar10": (0, 0, None, 1),
    "edm_ffhq": (0, 0, None, 1),
    "edm_imagenet64": (40, 0.05, 50, 1.003),
    "vcdm_ffhq": (50, 0, None, 1.007),
    "vcdm_afhq": (50, 0, None, 1.007),
    "vcdm_imagenet64": (50, 0, None, 1.007),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_settings_are_the_published_ones(name: str) -> None:
    stage, parameters, evaluations, settings = PUBLISHED[name]
    assembly = Assembly(load_recipe(name))
    spec, train = assembly.recipe.stages[stage], assembly.recipe.stages[stage].train
    cost = assembly.chain().plan([stage]).costs[stage]
    assert (cost.parameters, cost.nfe) == (parameters, evaluations)
    dropout, half_life = spec.network.dropout, train.ema.half_life
    found = (train.batch, train.optimizer.lr, dropout, spec.augment.probability, train.images, half_life)
    assert found == settings
    assert train.optimizer.warmup == 10e6 and train.optimizer.betas == (0.9, 0.999)


@pytest.mark.parametrize("name", ["vcdm_ffhq", "vcdm_afhq"])
def test_vcdms_auxiliary_network_has_the_published_size(name: str) -> None:
    """24,786,432 parameters, and a linear layer for the augmentation's label of 9."""
    cost = Assembly(load_recipe(name)).chain().plan(["clip"]).costs["clip"]
    assert (cost.parameters, cost.nfe) == (24_786_432 + 10 * 512, 79)


@pytest.mark.parametrize("name", CHURN)
def test_every_stage_trains_as_edm_does(name: str) -> None:
    """Its eps of 1e-8 is for the loss summed over elements, on ImageNet times 100; nothing clips its gradients."""
    loaded = load_recipe(name)
    for stage, spec in loaded.recipe.stages.items():
        train, elements = spec.train, math.prod(loaded.recipe.variables[stage].shape)
        factor = 100 if getattr(spec.network, "arch", "") == "adm" else 1  # --ls=100
        assert train.optimizer.eps == pytest.approx(1e-8 / elements / factor, rel=1e-3)
        assert (train.optimizer.clip, train.optimizer.warmup, train.ema.rampup) == (0, 10e6, 0.05)


@pytest.mark.parametrize("name", CHURN)
def test_samplers_are_the_published_ones(name: str) -> None:
    for stage in load_recipe(name).recipe.stages.values():
        assert stage.sample.levels == (0.002, 80) and stage.sample.rho == 7 and stage.sample.solver == "heun"
        churn = stage.sample.churn
        assert (churn.amount, churn.min, churn.max, churn.noise) == CHURN[name]


def test_class_conditional_vcdm_tells_both_stages_the_class() -> None:
    """p(clip | class) p(image | clip, class): a label of 1,512 entries, beside EDM's 1,000."""
    assembly, edm = Assembly(load_recipe("vcdm_imagenet64")), Assembly(load_recipe("edm_imagenet64"))
    plan = assembly.chain().plan(["image"])
    assert [step.producer.name for step in plan.plan.steps] == ["label", "clip", "image"]
    assert set(plan.plan.steps[2].inputs) == {"label", "clip"}
    width = 4 * 192  # of the noise embedding, where ADM adds the label; the augmentation label enters before it
    more = 512 * width + 9 * 192
    assert plan.costs["image"].parameters - edm.chain().plan(["image"]).costs["image"].parameters == more


@pytest.mark.parametrize("name", sorted(available("recipe")))
def test_the_smoke_version_of_every_recipe_plans(name: str) -> None:
    """On embedded images, with their classes for every label: seven for ImageNet's thousand."""
    loaded = smoke_version(load_recipe(name))
    assembly = Assembly(loaded)
    assert loaded.recipe.name == f"{name}_smoke"
    assert assembly.request.running
    for variable, spec in loaded.recipe.variables.items():
        if spec.kind == "label" and spec.encoder is None:
            assert len(assembly.columns[variable].classes) == spec.shape[0]


def smoke(name: str, folder: Path) -> None:
    command = [sys.executable, "-m", "chaindiff", "run", name, "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "SMOKE RUN" in done.stderr and found["count"] == 4
    assert all((folder / path).is_file() for path in [found["page"], found["lock"], *found["grids"]])


def test_the_baseline_runs_as_a_smoke_test(tmp_path: Path) -> None:
    smoke("edm_cifar10", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(available("recipe")))
def test_every_recipe_runs_as_a_smoke_test(name: str, tmp_path: Path) -> None:
    smoke(name, tmp_path)
