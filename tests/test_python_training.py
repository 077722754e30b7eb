"""Training and saving in Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from python_parts import POINT, SIDE, UNET, Broken, columns, small
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import chaindiff as cd
from chaindiff.chain import chain as chain_module
from chaindiff.commands import sample as commands
from chaindiff.io import tensorfile
from chaindiff.specs.load import load_recipe

# ------------------------------------------------------------ training, saving


def test_training_goes_on_from_its_folder_and_ends_alike(tmp_path) -> None:
    settings = {"images": 64, "batch": 16, "checkpoint_every": 16, "execution": "eager"}
    whole, again = small(), small()
    cd.train(whole, columns(), folder=tmp_path / "a", **settings)

    def stop(progress):
        if progress.images == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cd.train(again, columns(), folder=tmp_path / "b", progress=stop, **settings)
    again = small()
    cd.train(again, columns(), folder=tmp_path / "b", **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not whole.training and (tmp_path / "a/stages/point/metrics.jsonl").exists()


def test_any_dataset_trains_and_what_it_lacks_an_encoder_makes() -> None:
    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, row):
            return {"image": torch.full((3, 8, 8), row / 12.0), "kind": "ab"[row % 2]}

    class Brightness:
        name, of, seen = "brightness", "image", 0

        def __call__(self, image):
            self.seen += len(image)
            return image.mean((1, 2, 3))[:, None]

    image, brightness, kind = (
        cd.Variable.image("image", 3, 8),
        cd.Variable.vector("brightness", 1),
        cd.Variable.label("kind", 2),
    )
    encoder = Brightness()
    chain = cd.Chain([cd.Diffusion(image, given=[brightness, kind], network=UNET)], encoders=[encoder])
    cd.train(chain, Pictures(), images=48, batch=8)
    assert encoder.seen == 12, "every item is encoded once"
    given = {"brightness": torch.zeros(1, 1), "kind": 1}
    assert chain.sample(2, given=given, steps=2)["image"].shape == (2, 3, 8, 8)


def test_texts_are_encoded_where_images_are_augmented() -> None:
    class Length:
        name, of = "length", "text"

        def __call__(self, texts):
            return torch.tensor([[float(len(text))] for text in texts])

    image, length = cd.Variable.image("image", 3, 8), cd.Variable.vector("length", 1)
    chain = cd.Chain([cd.Diffusion(image, given=[length], network=UNET)], encoders=[Length()])
    data = {"image": torch.rand(12, 3, 8, 8) * 2 - 1, "text": ["a", "bb", "ccc"] * 4}
    cd.train(chain, data, images=16, batch=8, augment={"flip": True})
    assert chain.sample(2, given={"length": torch.ones(1, 1)}, steps=2)["image"].shape == (2, 3, 8, 8)


def test_grey_images_are_columns_of_numbers_within_their_range() -> None:
    chain = cd.Chain([cd.Diffusion(cd.Variable.image("image", 1, 8), network=UNET)])
    grey = torch.rand(12, 1, 8, 8)
    cd.train(chain, {"image": grey}, images=8, batch=8)
    with pytest.raises(cd.UserError, match=r"'image' of the data holds numbers outside \[-1, 1\]"):
        cd.train(chain, {"image": grey * 255}, images=8, batch=8)


def test_mistakes_of_training_are_explained() -> None:
    stage = small()
    for call, expected in (
        (lambda: cd.train(stage, images=8), "train needs data: a dataset of items, columns of tensors, or a function"),
        (
            lambda: cd.train(stage, columns(), images=8, btch=4),
            "train: unknown field 'btch'; did you mean 'batch'?",
        ),
        (lambda: cd.train(stage, {"side": torch.zeros(4, 1)}, images=8, batch=4), "no 'point'"),
        (
            lambda: cd.train(cd.Chain([stage]), columns(), only="pont", images=8),
            "there is no stage 'pont' to train; did you",
        ),
    ):
        with pytest.raises(cd.UserError) as caught:
            call()
        assert expected in str(caught.value)


def test_a_stage_file_is_enough_to_build_the_stage(tmp_path) -> None:
    stage = small(sampler={"steps": 3, "guidance": 2.0}, precondition="x0", noise={"mean": -1.0, "std": 1.0})
    cd.save_stage(stage, tmp_path / "point.safetensors")
    again = cd.load_stage(tmp_path / "point.safetensors")
    assert again.sampler == stage.sampler and again.noise == stage.noise and again.precondition == stage.precondition
    given = {"side": torch.ones(1, 1)}
    assert torch.equal(
        cd.Chain([again]).sample(2, given=given)["point"], cd.Chain([stage]).sample(2, given=given)["point"]
    )
    own = cd.Diffusion(POINT, network=nn.Identity(), name="own")
    own.network.weight = nn.Parameter(torch.zeros(1))
    cd.save_stage(own, tmp_path / "own.safetensors")
    with pytest.raises(cd.UserError, match=r"the network is custom code\n  load_stage\(path, network=\.\.\.\)"):
        cd.load_stage(tmp_path / "own.safetensors")


def test_a_stage_file_runs_no_code_that_nobody_allowed(tmp_path, monkeypatch) -> None:
    (tmp_path / "evil_net.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    cd.save_stage(small(), "point.safetensors")
    tensors, kept = tensorfile.load(Path("point.safetensors"))
    said = json.loads(kept["stage"]) | {"network": {"kind": "evil_net:Net", "settings": {}}}
    tensorfile.save(Path("evil.safetensors"), tensors, {**kept, "stage": said})
    with pytest.raises(cd.UserError, match="the network is code, 'evil_net:Net', which runs only where you allow it"):
        cd.load_stage("evil.safetensors")
    assert not Path("ran").exists()
    network = cd.Prior(width=16, depth=1, heads=2)
    assert cd.load_stage("evil.safetensors", network=network).network_spec == network


def test_a_loaded_stages_state_can_be_saved(tmp_path) -> None:
    """Weights may lie in memory as convolutions like them; a state_dict is in order."""
    stage = cd.load("vcdm_emoji16").stages["image16"]
    save_file(stage.state_dict(), tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == stage.state_dict().keys()


RECIPE = """\
name: mine
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image64: {kind: image, shape: [3, 64, 64]}
  image8: {kind: image, shape: [3, 8, 8], encoder: {kind: resize, of: image64}}
stages:
  image8:
    network: {kind: unet, channels: 16, mult: [1, 1], blocks: 1, attention: []}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
sample: {want: [image8], count: 2}
"""


def test_a_stage_of_python_in_a_recipe_and_the_other_way_round(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE)
    image = cd.load("mine.yaml").variables["image8"]
    network = cd.UNet(channels=16, mult=[1, 1], blocks=1, attention=[])
    stage = cd.Diffusion(image, network=network, sampler={"steps": 2})
    pictures = {"image8": torch.rand(16, 3, 8, 8) * 2 - 1}
    cd.train(stage, pictures, images=16, batch=8)
    cd.save_stage(stage, "python.safetensors")
    made = cd.load("mine.yaml", stages={"image8": {"weights": "python.safetensors"}})
    assert torch.equal(made.sample(2)["image8"], cd.Chain([stage]).sample(2)["image8"])
    # The other way round: the recipe trains, Python builds the stage from the file alone.
    chain = cd.train(cd.load("mine.yaml"))
    again = cd.load_stage("runs/mine/stages/image8/weights.safetensors")
    assert torch.equal(cd.Chain([again]).sample(2)["image8"], chain.sample(2)["image8"])
    # A stage of another parametrisation is refused, though its tensors fit.
    cd.save_stage(cd.Diffusion(image, network=network, precondition="v"), "other.safetensors")
    with pytest.raises(cd.UserError, match="of another network: it was trained with V"):
        _ = cd.load("mine.yaml", stages={"image8": {"weights": "other.safetensors"}}).stages["image8"]


def test_a_saved_chain_of_a_recipe_is_a_run_that_loads_anywhere(tmp_path, monkeypatch) -> None:
    chain = cd.load("vcdm_emoji16", changes=["stages.*.sample.steps=2"])
    expected = chain.sample(2)
    chain.save(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    again = cd.load(tmp_path / "there")
    assert all(torch.equal(again.sample(2)[name], expected[name]) for name in expected)
    assert {path.is_relative_to(tmp_path / "there") for path in again.weights.values()} == {True}
    assert again.origin.assembly.encoders["clip"].path.exists()


def test_a_stage_trained_on_other_data_is_not_saved_as_the_recipes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE)
    chain = cd.load("mine.yaml")
    with pytest.raises(cd.UserError, match="a recipe's own training takes no folder"):
        cd.train(chain, folder="x")
    cd.train(chain, {"image8": torch.rand(16, 3, 8, 8) * 2 - 1}, images=16, batch=8)
    assert chain.sample(1)["image8"].shape == (1, 3, 8, 8)
    with pytest.raises(cd.UserError, match="stage 'image8' was trained on other data than mine's"):
        chain.save("there")


def test_a_run_is_planned_as_often_for_many_batches_as_for_one(tmp_path, monkeypatch) -> None:
    counts, resolve = [], chain_module.resolve
    for batch in (8, 1):
        calls = []
        monkeypatch.setattr(chain_module, "resolve", lambda *request, calls=calls: calls.append(1) or resolve(*request))
        loaded = load_recipe(
            "vcdm_emoji16", changes=["stages.*.sample.steps=1", "sample.count=8", f"sample.batch={batch}"]
        )
        commands.sample(loaded, out=tmp_path / str(batch))
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_code_of_a_saved_chain_is_handed_in_again(tmp_path) -> None:
    cd.Chain([Broken({"side": torch.zeros(2, 1)}), small(sampler={"steps": 2})], name="mixed").save(tmp_path / "chain")
    with pytest.raises(cd.UserError, match=r"the stage 'side' of .* is custom code\n  .*objects=\[\.\.\.\]"):
        cd.load(tmp_path / "chain")
    again = cd.load(tmp_path / "chain", objects=[Broken({"side": torch.zeros(2, 1)})])
    assert again.name == "mixed" and again.sample(2)["point"].shape == (2, 2)


def test_an_encoder_handed_in_is_no_stage_of_its_name(tmp_path) -> None:
    class Halved:
        name, of = "side", "point"

        def __call__(self, value: Tensor) -> Tensor:
            return value[:, :1]

    prior = cd.Diffusion(SIDE, network=cd.Prior(width=16, depth=1, heads=2), sampler={"steps": 2})
    cd.Chain([prior, small(sampler={"steps": 2})], [Halved()], name="both").save(tmp_path / "chain")
    again = cd.load(tmp_path / "chain", objects=[Halved()])
    assert isinstance(again.stages["side"], cd.Diffusion) and again.sample(2)["point"].shape == (2, 2)
