"""Every shipped recipe is planned, every shipped weight is found, and the user's own command says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chaindiff.assemble import Assembly
from chaindiff.specs.load import available, load_recipe
from chaindiff.training import checkpoint

RECIPES = sorted(available("recipe"))
TRAINED = ["edm_emoji16", "vcdm_emoji16", "vcdm_emoji", "deep_emoji"]


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chaindiff", *arguments], capture_output=True, text=True, cwd=cwd, timeout=600
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans(name: str) -> None:
    assembly = Assembly(load_recipe(name))
    found = assembly.skeleton().plan(assembly.recipe.sample.want)
    assert found.running
    assert sum(found.share(stage) for stage in found.running) == pytest.approx(1)
    assert all(found.costs[stage].flops > 0 for stage in found.running)
    assert f"{name}: sample" in str(found)


def test_the_required_recipes_are_there() -> None:
    assert {*TRAINED, "vcdm_ffhq"} <= set(RECIPES)


def test_vcdm_ffhq_has_the_published_size_and_budget() -> None:
    found = Assembly(load_recipe("vcdm_ffhq")).skeleton().plan(["image"])
    assert found.costs["image"].parameters == 61_871_235
    assert found.costs["image"].flops == pytest.approx(84e9, rel=0.02)
    assert found.costs["image"].nfe == 79
    assert found.share("clip") < 0.05


def test_the_prior_costs_at_most_five_percent_of_the_image_stages() -> None:
    found = Assembly(load_recipe("vcdm_emoji")).skeleton().plan(["image"])
    images = found.costs["image16"].total_flops + found.costs["image"].total_flops
    assert found.costs["clip"].total_flops <= 0.05 * images


@pytest.mark.parametrize("name", TRAINED)
def test_shipped_weights_are_found_and_load(name: str, tmp_path: Path) -> None:
    assembly = Assembly(load_recipe(name), tmp_path / name)
    for stage in assembly.recipe.stages:
        path = assembly.find_weights(stage)
        assert path is not None, f"no shipped weights for stage '{stage}'"
        assert "assets" in path.parts
        assert int(checkpoint.metadata(path)["images"]) >= assembly.recipe.stages[stage].train.images
        assert path.stat().st_size < 25e6
    assembly.chain()


def test_recipes_share_weights_by_identity() -> None:
    chains = [Assembly(load_recipe(name)) for name in ("vcdm_emoji16", "vcdm_emoji", "deep_emoji")]
    assert len({chain.identity("image16") for chain in chains}) == 1
    assert chains[0].identity("clip") == chains[1].identity("clip") != chains[2].identity("clip")
    assert Assembly(load_recipe("edm_emoji16")).identity("image16") != chains[0].identity("image16")


def test_the_baseline_has_the_same_network_and_budget_as_the_chain() -> None:
    plain, chain = (load_recipe(name).recipe.stages["image16"] for name in ("edm_emoji16", "vcdm_emoji16"))
    assert plain.model_copy(update={"given": chain.given}) == chain


def test_training_settings_are_part_of_the_identity_and_logging_is_not() -> None:
    plain = Assembly(load_recipe("vcdm_emoji")).identity("image16")
    assert Assembly(load_recipe("vcdm_emoji", set=["stages.image16.train.batch=64"])).identity("image16") != plain
    assert Assembly(load_recipe("vcdm_emoji", set=["stages.image16.train.log_every=7"])).identity("image16") == plain
    assert Assembly(load_recipe("vcdm_emoji", set=["stages.image16.sample.steps=7"])).identity("image16") == plain


def test_missing_data_is_explained(tmp_path: Path) -> None:
    done = command("run", "vcdm_ffhq", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for words in (
        "vcdm_ffhq.yaml:3",
        str(tmp_path / "datasets" / "ffhq-64x64.zip"),
        "expected a folder of images, a zip of images",
        "chaindiff run vcdm_ffhq --set data.path=FOLDER",
        "--set stages.image.init=WEIGHTS.safetensors",
        "chaindiff run vcdm_ffhq --smoke",
        "chaindiff run vcdm_emoji",
    ):
        assert words in done.stderr


def test_smoke_runs_the_whole_pipeline(tmp_path: Path) -> None:
    done = command("run", "vcdm_ffhq", "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "vcdm_ffhq_smoke"
    assert "SMOKE RUN" in done.stdout
    assert "SMOKE RUN" in (out / "report.html").read_text()
    for path in (
        "recipe.lock.yaml",
        "chain.svg",
        "stages/clip/weights.safetensors",
        "stages/image/weights.safetensors",
        "stages/image/metrics.jsonl",
        "samples/image/000003.png",
        "samples/image/grid.png",
        "samples/clip/000000.safetensors",
    ):
        assert (out / path).exists(), path
