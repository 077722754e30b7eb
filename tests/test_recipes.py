"""Every shipped recipe is planned, every shipped weight is found, and the user's own command says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import chaindiff as cd
from chaindiff.data import open_data
from chaindiff.io import tensorfile
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.given import read_given
from chaindiff.recipe.samples import read_image
from chaindiff.specs.load import available, load_recipe
from chaindiff.specs.recipe import DataSpec

RECIPES = sorted(available("recipe"))
TRAINED = ["edm_emoji16", "vcdm_emoji16", "vcdm_emoji", "deep_emoji"]


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chaindiff", *arguments], capture_output=True, text=True, cwd=cwd, timeout=600
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans(name: str) -> None:
    assembly = Assembly(load_recipe(name))
    found = assembly.request
    assert found.running
    assert sum(found.share(stage) for stage in found.running) == pytest.approx(1)
    assert all(found.costs[stage].flops > 0 for stage in found.running)
    assert f"{name}: sample" in str(found)


def test_the_required_recipes_are_there() -> None:
    assert {*TRAINED, "vcdm_ffhq"} <= set(RECIPES)


def test_vcdm_ffhq_has_the_published_size_and_budget() -> None:
    found = Assembly(load_recipe("vcdm_ffhq")).chain().plan(["image"])
    assert found.costs["image"].parameters == 61_871_235
    assert found.costs["image"].flops == pytest.approx(84e9, rel=0.02)
    assert found.costs["image"].nfe == 79
    assert found.share("clip") < 0.05


def test_the_prior_costs_at_most_five_percent_of_the_image_stages() -> None:
    found = Assembly(load_recipe("vcdm_emoji")).chain().plan(["image"])
    images = found.costs["image16"].total_flops + found.costs["image"].total_flops
    assert found.costs["clip"].total_flops <= 0.05 * images


@pytest.mark.parametrize("name", TRAINED)
def test_shipped_weights_are_found_and_load(name: str, tmp_path: Path) -> None:
    assembly = Assembly(load_recipe(name), tmp_path / name)
    for stage in assembly.recipe.stages:
        path = assembly.stages[stage].find_weights()
        assert path is not None, f"no shipped weights for stage '{stage}'"
        assert "assets" in path.parts
        assert int(tensorfile.metadata(path)["images"]) >= assembly.recipe.stages[stage].train.images
        assert path.stat().st_size < 25e6
    assembly.chain()


def test_recipes_share_weights_by_identity() -> None:
    chains = [Assembly(load_recipe(name)) for name in ("vcdm_emoji16", "vcdm_emoji", "deep_emoji")]
    assert len({chain.stages["image16"].identity for chain in chains}) == 1
    assert chains[0].stages["clip"].identity == chains[1].stages["clip"].identity != chains[2].stages["clip"].identity
    assert Assembly(load_recipe("edm_emoji16")).stages["image16"].identity != chains[0].stages["image16"].identity


def test_64_pixels_without_a_cascade_need_one_stage_to_be_trained(tmp_path: Path) -> None:
    """The prior and its encoder's statistics are those of vcdm_emoji, shipped; the image stage has no weights yet."""
    chain, plain = (Assembly(load_recipe(f"{kind}_emoji64"), tmp_path / kind) for kind in ("vcdm", "edm"))
    shipped = Assembly(load_recipe("vcdm_emoji"), tmp_path / "other")
    assert chain.stages["clip"].find_weights() == shipped.stages["clip"].find_weights() != None  # noqa: E711
    assert chain.encoders["clip"].path == shipped.encoders["clip"].path
    assert chain.encoders["clip"].path.exists()
    assert chain.stages["image64"].find_weights() is plain.stages["image64"].find_weights() is None
    assert 10e6 < chain.request.costs["image64"].parameters < 20e6


@pytest.mark.parametrize("stage", ["image16", "image64"])
def test_the_baseline_has_the_same_network_and_budget_as_the_chain(stage: str) -> None:
    names = (f"{kind}_emoji{stage.removeprefix('image')}" for kind in ("edm", "vcdm"))
    plain, chain = (load_recipe(name).recipe.stages[stage] for name in names)
    assert plain.model_copy(update={"given": chain.given}) == chain


def test_training_settings_are_part_of_the_identity_and_logging_is_not() -> None:
    plain = Assembly(load_recipe("vcdm_emoji")).stages["image16"].identity
    assert (
        Assembly(load_recipe("vcdm_emoji", changes=["stages.image16.train.batch=64"])).stages["image16"].identity
        != plain
    )
    assert (
        Assembly(load_recipe("vcdm_emoji", changes=["stages.image16.train.log_every=7"])).stages["image16"].identity
        == plain
    )
    assert (
        Assembly(load_recipe("vcdm_emoji", changes=["stages.image16.sample.steps=7"])).stages["image16"].identity
        == plain
    )


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


EIGHT = ["--set", "sample.count=8", "--set", "sample.precision=float32"]  # as Python samples


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job's first eight images, from an empty directory."""
    folder = tmp_path_factory.mktemp("main")
    done = command("run", "vcdm_emoji", *EIGHT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_main_job_samples_from_shipped_weights(main_job: Path) -> None:
    """Pictures look like emoji on white: bright corners, something in the middle, and no two alike."""
    images = torch.stack([read_image(main_job / "runs/vcdm_emoji/samples/image" / f"{n:06d}.png") for n in range(8)])
    assert images.shape == (8, 3, 32, 32)
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean()
    middle = images[:, :, 12:20, 12:20].mean()
    assert corners > 0.8
    assert middle < corners - 0.3
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + torch.eye(8) * 1e3
    assert distances.min() > 3


def test_the_main_job_does_nothing_twice(main_job: Path) -> None:
    done = command("run", "vcdm_emoji", *EIGHT, cwd=main_job)
    assert done.returncode == 0
    assert "nothing to do" in done.stdout


def test_exact_samples_are_the_same_files_for_any_batch_and_made_once(tmp_path: Path) -> None:
    pictures = []
    for batch in (5, 64):
        arguments = ["run", "vcdm_emoji16", "--out", str(tmp_path / f"batch{batch}")]
        for change in ("exact=true", f"batch={batch}", "count=18"):
            arguments += ["--set", f"sample.{change}"]
        assert command(*arguments, cwd=tmp_path).returncode == 0
        assert "nothing to do" in command(*arguments, cwd=tmp_path).stdout
        folder = tmp_path / f"batch{batch}" / "samples" / "image16"
        pictures.append([(folder / f"{n:06d}.png").read_bytes() for n in range(18)])
    assert pictures[0] == pictures[1]


def test_python_samples_are_those_of_the_command_line(main_job: Path) -> None:
    out = cd.load("vcdm_emoji").sample(8, seed=0, batch=64)
    assert out["clip"].shape == (8, 32)
    file = read_image(main_job / "runs/vcdm_emoji/samples/image/000005.png")
    assert (out["image"][5].clamp(-1, 1) - file).abs().max() < 1 / 127.5


def test_a_picture_given_for_its_embedding(tmp_path: Path) -> None:
    """`--given clip=FILE` encodes the picture; the embedding stage does not run, and the embedding is the encoder's."""
    picture = tmp_path / "photo.png"
    data = open_data(DataSpec(path="emoji64"))
    pixels = data.images([data.names.index("images/google/1f431.png")], 64)[0]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(picture)
    assembly = Assembly(load_recipe("vcdm_emoji"), tmp_path / "run")
    value = read_given(assembly, {"clip": str(picture)})["clip"]
    encoder = assembly.encoders["clip"].build()
    assert torch.allclose(value, encoder(pixels[None].float() / 127.5 - 1), atol=1e-5)
    chain = assembly.chain({"image16", "image"})
    assert set(chain.sample(2, given={"clip": value})) == {"image16", "image"}


def test_training_goes_on_from_shipped_weights(tmp_path: Path) -> None:
    """`--more` counts on from the images behind the shipped file, and hardly moves its weights in a few steps."""
    out = tmp_path / "more"
    done = command(
        *("train", "edm_emoji16", "--more", "256", "--out", str(out)),
        *("--set", "stages.image16.train.execution=eager"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    tensors, metadata = tensorfile.load(out / "stages/image16/weights.safetensors")
    shipped = Assembly(load_recipe("edm_emoji16"), tmp_path / "other").stages["image16"].find_weights()
    assert shipped is not None
    before, kept = tensorfile.load(shipped)
    assert int(metadata["images"]) == int(kept["images"]) + 256
    change = max((tensors[k] - before[k].float()).abs().max().item() for k in tensors)
    assert 0 < change < 0.05


TEXT_RECIPE = """
name: text_prior
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image64: {kind: image, shape: [3, 64, 64]}
  caption: {kind: text, source: given}
  text:
    kind: vector
    shape: [8]
    encoder: {kind: open_clip, model: clip_emoji, of: caption, reduce: {kind: pca, k: 8}}
  clip:
    kind: vector
    shape: [16]
    encoder: {kind: open_clip, model: clip_emoji, of: image64, reduce: {kind: pca, k: 16}}
stages:
  clip:
    given: [{variable: text, dropout: 0.1}]
    network: {kind: prior, width: 32, depth: 1, heads: 2}
    precondition: {kind: x0}
    augment: {probability: 0.1, variants: 1}
    train: {images: 64, batch: 16, execution: eager}
    sample: {steps: 3, guidance: 2.0}
sample: {want: [clip], count: 4}
"""


def test_a_prior_given_text_trains_and_samples(tmp_path: Path) -> None:
    """An unCLIP-like prior: captions and images through the two towers, reduced and standardised."""
    (tmp_path / "text.yaml").write_text(TEXT_RECIPE)
    done = command("run", "text.yaml", "--given", "caption=a red heart", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "text_prior"
    embeddings, _ = tensorfile.load(out / "samples" / "clip" / "000000.safetensors")
    assert embeddings["clip"].shape == (4, 16)
    assert embeddings["clip"].isfinite().all()
    fitted = sorted(path.name.split("-")[0] for path in (out / "encoders").iterdir())
    assert fitted == ["clip", "text"]
    assert (
        command("run", "text.yaml", "--given", "caption=a red heart", cwd=tmp_path).stdout.count("nothing to do") == 1
    )
