"""Two processes under torchrun against one: the same gradients, weights and files; one message when one fails."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from safetensors.torch import save_file

from chaindiff import cli
from chaindiff.chain.variable import Variable
from chaindiff.commands.smoke import smoke_version
from chaindiff.data import open_data
from chaindiff.edm.random import Draws
from chaindiff.io import tensorfile
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe
from chaindiff.specs.recipe import DataSpec
from chaindiff.specs.training import AugmentSpec
from chaindiff.training import cache
from chaindiff.training.batches import Batches

IMAGES, BATCH = 12, 8
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1},
}
# Adam magnifies rounding errors below its eps, and clipping would hide a wrong scale of the gradients.
TRAIN = "{images: 32, batch: 8, execution: eager, log_every: 1, optimizer: {lr: 1.0e-2, eps: 1.0e-2, clip: 0}}"
RECIPE = """
name: tiny
data: {{path: {folder}/data}}
variables:
  image: {{kind: image, shape: [3, 16, 16]}}
  clip: {{kind: vector, shape: [8], encoder: {{kind: open_clip, model: {folder}/clip, of: image}}}}
stages:
  clip:
    network: {{kind: prior, width: 16, depth: 1, heads: 2}}
    augment: &augment {{probability: 0.5, variants: 3}}
    train: &train {train}
    sample: {{steps: 2}}
  image:
    given: [{{variable: clip, dropout: 0.3, noise: 0.3, null: learned}}]
    network: {{kind: unet, channels: 16, mult: [1, 2], blocks: 1, attention: [8], dropout: 0.0}}
    augment: *augment
    train: *train
    sample: {{steps: 2}}
sample: {{want: [image], count: 11, batch: 2, seed: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a tiny CLIP model, and a recipe of both."""
    import open_clip

    folder, rng = tmp_path_factory.mktemp("recipe"), np.random.default_rng(0)
    for name in ("data", "clip"):
        (folder / name).mkdir()
    for index in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"data/{index:02d}.png")
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**CLIP).state_dict(), folder / "clip/open_clip_model.safetensors")
    (folder / "tiny.yaml").write_text(RECIPE.format(folder=folder, train=TRAIN))
    return folder


def alone(*command: str | Path) -> None:
    """One process, this one."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in command])
    assert ended.value.code == 0


def together(*program: str | Path, caches: Path) -> subprocess.CompletedProcess[str]:
    """Two processes under torchrun, with as many threads each as this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CHAINDIFF_CACHE": str(caches)}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, program)],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        timeout=600,
    )


ONE_STEP = ("--stage", "image", "--set", f"stages.image.train.images={BATCH}")
INTERRUPTED = ("clip/000002.safetensors", "image/000006.png", "image/000010.png")  # of the batches 1, 3 and 5
MEASURED = ("--count", "100", "--links", "--sweep", "stages.image.sample.steps=1,2", "--judge", "pixels:2")
EXACT = ("--set", "sample.exact=true", "--count", "40")


@dataclass(frozen=True)
class Done:
    """Folders of runs that one process (`one`) and two of them (`two`) made; `noted` is by command, then by rank."""

    one: Path
    two: Path
    noted: dict[str, list[dict]]
    said: str

    def changed(self, command: str, rank: int) -> list[Path]:
        return [Path(path) for path in self.noted[command][rank]["changed"] if str(self.two) in path]


def exact(run: Path) -> list[str]:
    return [*EXACT, "--set", f"stages.*.weights={run}"]


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Runs of one process, then of two, each in a folder of its own."""
    recipe, one, two = folder / "tiny.yaml", tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD", ranks.SHARD)
        patch.setenv("CHAINDIFF_CACHE", str(one / "cache"))
        alone("run", recipe, "--out", one / "trained/run")
        alone("train", recipe, "--out", one / "step/run", *ONE_STEP)
        alone("sample", recipe, "--out", one / "trained/exact", *exact(one / "trained/run"), "--batch", "5")
        shutil.copytree(one / "trained/run", one / "more/run")
        shutil.copytree(one / "trained/run", one / "measured/run")
        alone("evaluate", recipe, "--out", one / "measured/run", *MEASURED)
        for name in ("sampled", "interrupted", "more", "measured"):
            shutil.copytree(one / "trained/run", two / name / "run")
        shutil.rmtree(two / "sampled/run/samples")
        for name in INTERRUPTED:
            (two / "interrupted/run/samples" / name).unlink()
        alone("train", recipe, "--out", one / "more/run", "--stage", "image", "--more", "16")

        commands = {
            "trained": ["train", "--out", two / "trained/run"],
            "step": ["train", "--out", two / "step/run", *ONE_STEP, "--set", "stages.image.train.accumulate=2"],
            "more": ["train", "--out", two / "more/run", "--stage", "image", "--more", "16"],
            "sampled": ["run", "--out", two / "sampled/run"],
            "again": ["run", "--out", two / "sampled/run"],
            "interrupted": ["run", "--out", two / "interrupted/run"],
            "exact": ["sample", "--out", two / "sampled/exact", *exact(two / "sampled/run"), "--batch", "3"],
            "measured": ["evaluate", "--out", two / "measured/run", *MEASURED],
            "mistaken": ["sample", "--out", two / "sampled/run", "--set", "sample.cuont=3"],
        }
        lines = [[name, str(recipe), *map(str, options)] for name, *options in commands.values()]
        (two / "commands.json").write_text(json.dumps(lines))
        ended = together(ranks.__file__, two / "commands.json", two, caches=two / "cache")
        assert ended.returncode == 0, ended.stderr
        notes = [json.loads((two / f"{rank}.json").read_text()) for rank in range(2)]
        noted = {name: [note[index] for note in notes] for index, name in enumerate(commands)}

        shutil.copytree(two / "trained/run", two / "back/run")
        alone("train", recipe, "--out", two / "back/run", "--stage", "image", "--more", "16")
    return Done(one, two, noted, ended.stdout + ended.stderr)


def stage_file(run: Path, stage: str = "image", name: str = "weights.safetensors") -> Path:
    return run / "stages" / stage / name


def metrics(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in stage_file(run, stage, "metrics.jsonl").read_text().splitlines()]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return tensorfile.load(path)[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_command_ended_well(done: Done) -> None:
    expected = {name: [2, 2] if name == "mistaken" else [0, 0] for name in done.noted}
    assert {name: [note["status"] for note in notes] for name, notes in done.noted.items()} == expected


# ------------------------------------------------------------ training


def test_gradients_are_those_of_one_process(done: Done) -> None:
    """After Adam's first step its first moment is (1 - beta1) times the gradient; here also of two micro-batches."""
    one, two = (tensors(stage_file(run / "step/run", name="state.safetensors")) for run in (done.one, done.two))
    names = [name for name in one if name.endswith(".exp_avg")]
    scale = max(float(one[name].norm()) for name in names)
    assert scale > 1e-4
    wrong = {n for n in names if float((two[n] - one[n]).norm()) > 1e-5 * max(float(one[n].norm()), 1e-3 * scale)}
    assert wrong == set()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_weight_of_a_recipe_has_a_gradient(path: Path) -> None:
    """Averaging over processes waits for the gradient of every weight."""
    assembly = Assembly(smoke_version(load_recipe(path)))
    for name in assembly.recipe.stages:
        stage = assembly.stages[name].build()
        batch = {"augment_labels": torch.zeros(2, stage.augment_dim)} if stage.augment_dim else {}
        for variable in assembly.stages[name].variables:
            shape = () if variable.kind == "label" else variable.shape
            batch[variable.name] = torch.zeros(2, *shape, dtype=torch.long if variable.kind == "label" else None)
        stage.loss(batch, Draws(range(2), 0, name)).mean().backward()
        assert [key for key, weight in stage.named_parameters() if weight.grad is None] == []


def test_weights_and_losses_after_several_steps_are_those_of_one_process(done: Done) -> None:
    for stage in ("clip", "image"):
        runs = [run / "trained/run" for run in (done.one, done.two)]
        one, two = (tensors(stage_file(run, stage, "state.safetensors")) for run in runs)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=f"{stage} {name}")
        mine, theirs = (metrics(run, stage) for run in runs)
        assert [entry["images"] for entry in theirs] == [8, 16, 24, 32]
        assert [e["loss"] for e in theirs] == pytest.approx([e["loss"] for e in mine], rel=1e-5)
    before, after = (
        tensors(stage_file(done.one / run, name="state.safetensors")) for run in ("step/run", "trained/run")
    )
    assert max(float((after[n] - before[n]).abs().max()) for n in after if n.startswith("model.")) > 1e-2


@pytest.mark.parametrize("then", ["more", "back"])
def test_training_goes_on_under_another_number_of_processes(done: Done, then: str) -> None:
    """One process and then two, or the other way round: as one that made all the steps."""
    one, two = done.one / "more/run", done.two / then / "run"
    assert [entry["images"] for entry in metrics(two, "image")] == [8, 16, 24, 32, 40, 48]
    assert tensorfile.metadata(stage_file(two))["images"] == "48"
    mine, theirs = tensors(stage_file(one)), tensors(stage_file(two))
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5, msg=name)


def test_embeddings_are_shared_out_and_those_of_one_process(done: Done) -> None:
    one, two = (sorted((run / "cache").rglob("*.safetensors")) for run in (done.one, done.two))
    assert (
        [path.name for path in one]
        == [path.name for path in two]
        == [f"{first:06d}.safetensors" for first in range(0, 36, ranks.SHARD)]
    )
    assert all(torch.equal(tensors(a)["features"], tensors(b)["features"]) for a, b in zip(one, two, strict=True))
    made = [[p for p in done.changed("trained", rank) if p in two] for rank in range(2)]
    assert made == [two[0::2], two[1::2]]


def test_the_first_process_alone_writes_what_training_makes(done: Done) -> None:
    for command in ("trained", "step", "more"):
        run = done.two / command / "run"
        assert stage_file(run) in done.changed(command, 0)
        assert [path for path in done.changed(command, 1) if path.is_relative_to(run)] == []


# ------------------------------------------------------------ sampling


def test_samples_are_to_the_byte_those_of_one_process(done: Done) -> None:
    one, two = done.one / "trained/run", done.two / "sampled/run"
    assert len(files(one / "samples")) == 11 + 1 + 6
    assert files(two / "samples") == files(one / "samples")
    assert load_recipe(two).lock == load_recipe(one).lock
    assert "image [3 x 16 x 16], the first 11 of 11" in (two / "report.html").read_text()


def test_batches_are_shared_out_and_the_rest_is_left_to_the_first_process(done: Done) -> None:
    samples = done.two / "sampled/run/samples"
    made = [done.changed("sampled", rank) for rank in range(2)]
    wrote = [{path for path in paths if path.suffix and path.parent.name != "counts"} for paths in made]
    assert wrote[1] == {samples / f"clip/00000{n}.safetensors" for n in (2, 6)} | {
        samples / "clip/000010.safetensors"
    } | {samples / f"image/{n:06d}.png" for n in (2, 3, 6, 7, 10)}
    assert wrote[0] & wrote[1] == set()
    assert {samples / "image/grid.png", samples.parent / "recipe.lock.yaml", samples.parent / "report.html"} <= wrote[0]


def test_a_second_run_does_nothing(done: Done) -> None:
    assert done.said.count(f"nothing to do: {done.two}/sampled/run is complete") == 1
    assert [done.changed("again", rank) for rank in range(2)] == [[], []]


def test_an_interrupted_run_makes_the_missing_batches_alone(done: Done) -> None:
    run = done.two / "interrupted/run"
    assert files(run / "samples") == files(done.one / "trained/run/samples")
    made = [
        {p.stem for p in done.changed("interrupted", rank) if p.parent == run / "samples/image"} for rank in range(2)
    ]
    assert made == [{"000010", "grid"}, {"000006"}]


def test_exact_samples_are_to_the_byte_those_of_one_process_with_another_batch(done: Done) -> None:
    one = files(done.one / "trained/exact/samples")
    assert len(one) == 40 + 1 + 3
    assert files(done.two / "sampled/exact/samples") == one


# ------------------------------------------------------------ measuring


def measured(run: Path) -> dict:
    """What an evaluation wrote, without what it says of the time that samples took."""
    found = json.loads((run / "metrics.json").read_text())
    for figure in found["figures"]:
        figure.pop("seconds per image")
    for table in (part["table"] for part in found["parts"] if part["table"] and "images/s" in part["table"][0]):
        timing = table[0].index("images/s")
        for row in table:
            row.pop(timing)
    return found


def test_figures_are_to_the_byte_those_of_one_process(done: Done) -> None:
    one, two = (measured(run / "measured/run") for run in (done.one, done.two))
    assert {figure["row"] for figure in one["figures"]} == {
        *("tiny", "the whole chain", "clip from the data", "steps 1", "steps 2")
    }
    assert json.dumps(two) == json.dumps(one)


def test_rows_are_shared_out_and_the_first_process_alone_measures_them(done: Done) -> None:
    """Three rows: those of the chain itself and of its own number of steps are one."""
    folder = done.two / "measured/run/evaluation"
    drawn = sorted((folder / "rows").glob("*/*.safetensors"))
    wrote = [{p for p in done.changed("measured", rank) if p.is_relative_to(folder) and p.suffix} for rank in range(2)]
    assert [len(wrote[rank] & set(drawn)) for rank in range(2)] == [2, 1]
    assert wrote[0].isdisjoint(wrote[1])
    assert {path.parent.parent for path in wrote[1]} <= {folder / "data", folder / "rows"}
    assert done.two / "measured/run/metrics.json" in done.changed("measured", 0)


# ------------------------------------------------------------ mistakes


def test_a_mistake_is_said_once(done: Done) -> None:
    assert done.said.count("error: ") == 1
    assert "'cuont'" in done.said
    assert "did you mean 'count'?" in done.said


def test_a_process_that_fails_ends_all_with_one_message(folder: Path, tmp_path: Path) -> None:
    """An image that only the second process reads, in the first step, while the first waits for its gradients."""
    data = open_data(DataSpec(path=str(shutil.copytree(folder / "data", tmp_path / "data"))))
    image = Variable.image("image", 3, 16)
    rows = Batches(data, image, [image], {}, {}, {}, AugmentSpec(), 0).rows(range(BATCH))
    broken = tmp_path / "data" / data.names[rows[6]]
    broken.write_bytes(broken.read_bytes()[:100])
    recipe = tmp_path / "plain.yaml"
    network = "{kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}"
    recipe.write_text(
        f"{{name: plain, data: {{path: {tmp_path}/data}}, variables: {{image: {{kind: image, shape: [3, 16, 16]}}}},\n"
        f"stages: {{image: {{network: {network}, train: {TRAIN}}}}}}}\n"
    )
    ended = together("-m", "chaindiff", "train", recipe, "--out", tmp_path / "run", caches=tmp_path)
    assert ended.returncode != 0
    messages = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, ended.stderr
    assert data.names[rows[6]] in messages[0]
    assert ended.stderr.count("Traceback") == ended.stderr.count("ChildFailedError(") == 1, "the launcher's own"
    assert not (tmp_path / "run/stages/image/state.safetensors").exists()
