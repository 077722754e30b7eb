"""Python first: everything that a recipe can do, by public names alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import chaindiff as cd
from chaindiff.chain import chain as chain_module
from chaindiff.commands import sample as commands
from chaindiff.io import tensorfile
from chaindiff.specs.load import load_recipe

SIDE, POINT = cd.Variable.vector("side", 1), cd.Variable.vector("point", 2)
UNET = cd.UNet(channels=16, mult=[1, 1], blocks=1, attention=[], dropout=0.3)


def small(**settings) -> cd.Diffusion:
    torch.manual_seed(0)
    network = cd.Prior(width=16, depth=1, heads=2)
    stage = cd.Diffusion(POINT, given=[(SIDE, {"dropout": 0.2})], network=network, **settings)
    for parameter in stage.parameters():  # the last layer begins at zero
        nn.init.normal_(parameter, std=0.1)
    return stage


def columns(rows: int = 40) -> dict[str, Tensor]:
    torch.manual_seed(1)
    side = torch.randn(rows, 1)
    return {"side": side, "point": torch.cat([side, -side], dim=1)}


# ------------------------------------------------------------ names


def test_every_public_name_is_there_and_nothing_else() -> None:
    for name in cd.__all__:
        assert getattr(cd, name) is not None
    with pytest.raises(AttributeError, match="module 'chaindiff' has no attribute 'Chian'"):
        _ = cd.Chian


def test_no_page_of_the_docs_imports_from_a_private_home() -> None:
    docs = Path(__file__).parents[1] / "docs"
    for page in [*docs.rglob("*.md"), docs.parent / "README.md"]:
        private = [
            line for line in page.read_text().splitlines() if line.startswith(("from chaindiff.", "import chaindiff."))
        ]
        assert not private, f"{page.name}: {private}"


def test_configs_may_be_mappings_and_their_mistakes_name_the_field() -> None:
    network = {"kind": "prior", "width": 16, "depth": 1, "heads": 2}
    stage = cd.Diffusion(POINT, network=network, sampler={"steps": 3}, precondition="x0")
    assert stage.sampler == cd.Sampler(steps=3) and stage.network_spec == cd.Prior(width=16, depth=1, heads=2)
    for settings, expected in (
        ({"sampler": {"stps": 3}}, "point.sampler: unknown field 'stps'; did you mean 'steps'?"),
        ({"given": [(SIDE, {"dropout": 2})]}, "point.given.side: dropout: should be at most 1, not 2"),
    ):
        with pytest.raises(cd.UserError) as caught:
            cd.Diffusion(POINT, network=network, **settings)
        assert expected in str(caught.value)


# ------------------------------------------------------------ sampling


def test_sampling_puts_stages_in_eval_mode_and_restores_them() -> None:
    torch.manual_seed(0)
    stage = cd.Diffusion(cd.Variable.image("image", 3, 8), network=UNET, sampler={"steps": 3})
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.1)
    chain = cd.Chain([stage.train()])
    assert torch.equal(chain.sample(2)["image"], chain.sample(2)["image"]), "dropout is off"
    assert stage.training and stage.network.training


def test_settings_of_one_call_leave_the_stage_as_it_was() -> None:
    stage = small(sampler={"steps": 3})
    chain, given = cd.Chain([stage]), {"side": torch.ones(1, 1)}
    before = chain.sample(4, given=given)["point"]
    others = [
        chain.sample(4, given=given, **options)["point"]
        for options in ({"steps": 6}, {"solver": "ddim"}, {"dtype": torch.bfloat16}, {"noise": 0})
    ]
    assert all((other - before).abs().max() > 1e-6 for other in others)
    assert torch.equal(chain.sample(4, given=given, steps=3, solver="heun", guidance=1.0)["point"], before)
    assert torch.equal(chain.sample(4, given=given)["point"], before)
    assert stage.sampler == cd.Sampler(steps=3) and stage.autocast is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance": {"sid": 2.0}}, "guidance: no stage that runs can go without 'sid'; did you mean 'side'?"),
        (
            {"solver": "hern"},
            "point.sampler: solver: 'hern' is not one of euler, heun, dpmpp_2m, ddim; did you mean 'heun'?",
        ),
        (
            {"stages": {"point": {"sampler": {"eta": 1.0}}}},
            "point.sampler: eta: is for ddim and dpmpp_2m; heun takes",
        ),
        ({"stages": {"point": {"sampler": {"links": {"side": {"keep": 1}}}}}}, "links.side.keep: 1 was not trained"),
        (
            {"stages": {"point": {"sampler": {"links": {"sid": {}}}}}},
            "links.sid: the stage is not given 'sid'; did you mean",
        ),
        ({"stages": {"pont": {}}}, "there is no stage 'pont'; did you mean 'point'?"),
        (
            {"stages": {"point": {"sampler": {"stps": 3}}}},
            "point.sampler: unknown field 'stps'; did you mean",
        ),
    ],
)
def test_settings_that_nothing_takes_are_refused(options, expected) -> None:
    with pytest.raises(cd.UserError) as caught:
        cd.Chain([small()]).sample(2, given={"side": torch.ones(1, 1)}, **options)
    assert expected in str(caught.value)
    plain = cd.Chain([cd.Diffusion(SIDE, network=Nothing)])
    with pytest.raises(cd.UserError, match="guidance: no stage that runs was trained with dropout"):
        plain.sample(2, guidance=2.0)
    with pytest.raises(cd.UserError, match="steps: no diffusion stage runs here"):
        cd.Chain([Broken({"side": torch.zeros(2, 1)})]).sample(2, steps=3)


def test_scales_go_to_the_stages_that_have_them() -> None:
    first = cd.Diffusion(SIDE, network=cd.Prior(width=16, depth=1, heads=2), sampler={"steps": 3})
    chain, given = cd.Chain([first, small(sampler={"steps": 3})]), {"side": torch.ones(1, 1)}
    one, all_of_it = (chain.sample(2, given=given, guidance=g)["point"] for g in ({"side": 2.0}, 2.0))
    assert torch.equal(one, all_of_it) and not torch.equal(one, chain.sample(2, given=given)["point"])
    assert torch.equal(chain.sample(2, guidance=2.0)["side"], chain.sample(2)["side"]), "it has nothing to go without"


def test_one_number_shares_its_noise_between_rows() -> None:
    chain, given = cd.Chain([small(sampler={"steps": 3})]), {"side": torch.ones(1, 1)}
    whole = chain.sample(4, given=given)["point"]
    torch.testing.assert_close(chain.sample(3, given=given, noise=2)["point"], whole[2:3].expand(3, 2))
    torch.testing.assert_close(chain.sample(2, given=given, noise=[3, 1])["point"], whole[[3, 1]])
    with pytest.raises(cd.UserError, match="noise has 2 numbers for 3 samples"):
        chain.sample(3, given=given, noise=[0, 1])


def test_previews_end_in_the_samples() -> None:
    first = cd.Diffusion(SIDE, network=cd.Prior(width=16, depth=1, heads=2), sampler={"steps": 3})
    chain = cd.Chain([first, small(sampler={"steps": 2})])
    previews = list(chain.previews(5, batch=3))
    assert [(p.stage, p.step, p.steps) for p in previews[:5]] == [
        ("side", 1, 3), ("side", 2, 3), ("side", 3, 3), ("point", 1, 2), ("point", 2, 2),
    ]  # fmt: skip
    done = [p.done for p in previews]
    assert done == sorted(done) and done[-1] == pytest.approx(1) and done[4] == pytest.approx(0.6)
    assert previews[0].sigma["side"] < 80 and previews[4].sigma == {"point": 0.0}
    assert previews[0].x0["side"].shape == (3, 1) and list(previews[5].samples) == [3, 4]
    last = torch.cat([previews[4].x["point"], previews[9].x["point"]]).float()
    torch.testing.assert_close(last, chain.sample(5, batch=3)["point"])


def test_gradients_are_as_they_were_while_a_preview_is_in_hand() -> None:
    for _ in cd.Chain([small(sampler={"steps": 2})]).previews(2, given={"side": torch.ones(1, 1)}):
        assert torch.is_grad_enabled()


def test_labels_and_texts_by_name_need_no_tensors() -> None:
    chain = cd.load("deep_emoji", changes=["stages.*.sample.steps=2"])
    by_name, by_number = (chain.sample(2, given={"group": v}, want=["clip"]) for v in ("Objects", 3))
    names = chain.origin.assembly.columns["group"].classes
    assert torch.equal(chain.sample(2, given={"group": names.index("Objects")}, want=["clip"])["clip"], by_name["clip"])
    assert names[3] == "Objects" or not torch.equal(by_name["clip"], by_number["clip"])
    several = chain.sample(2, given={"group": ["Objects", 3]}, want=["clip"])["clip"]
    torch.testing.assert_close(several[1], by_number["clip"][1])
    with pytest.raises(cd.UserError, match=r"'Objcts' is not a class of group; did you mean 'Objects'\?"):
        chain.sample(1, given={"group": "Objcts"})


def test_a_caption_is_encoded_on_the_way() -> None:
    chain = cd.load("text_emoji", changes=["stages.*.sample.steps=2"])
    red, mixed = (
        chain.sample(2, given={"caption": c}, want=["clip"])["clip"] for c in ("red heart", ["red heart", "dog"])
    )
    torch.testing.assert_close(red[0], mixed[0])
    assert (red[1] - mixed[1]).abs().max() > 0.1
    assert [step.producer.name for step in chain.plan(["clip"], ["caption"]).plan.steps] == ["text", "clip"]


def test_a_stage_without_weights_says_so() -> None:
    with torch.device("meta"):
        stage = small()
    with pytest.raises(cd.UserError, match="stage 'point' has no weights: it was built for planning only"):
        cd.Chain([stage]).sample(1, given={"side": torch.ones(1, 1)})


def test_a_chain_says_what_it_is_in_a_line_and_a_picture() -> None:
    chain = cd.load("vcdm_ffhq")  # without weights or data
    assert repr(chain) == "Chain(vcdm_ffhq: clip; image given clip)"
    assert chain._repr_svg_().startswith("<svg") and "NFE 158" in str(chain.plan())
    assert repr(small()) == "Diffusion(point: point [2] given side; Prior, 4,002 parameters)"
    with pytest.raises(cd.UserError, match="stage 'clip' has no weights yet"):
        _ = chain.stages["clip"]
    with pytest.raises(KeyError, match=r"there is no stage 'clp'; did you mean 'clip'\?"):
        _ = chain.stages["clp"]


def test_what_differs_between_two_variables_is_said() -> None:
    for other, expected in (
        (cd.Variable.vector("side", 2), "its shape is [2], not [1]"),
        (cd.Variable("side", "vector", (1,), sigma_data=1.0), "its sigma_data is 1.0, not 0.5"),
    ):
        stages = [cd.Diffusion(SIDE, network=UNET_OF_NONE), cd.Diffusion(POINT, given=[other], network=UNET_OF_NONE)]
        with pytest.raises(cd.UserError, match="a different 'side' from the rest of the chain") as caught:
            cd.Chain(stages)
        assert expected in str(caught.value)
    recipe = cd.load("vcdm_emoji16").variables["clip"]
    with pytest.raises(cd.UserError, match=r"its encoder\.reduce\.k is 16, not 32"):
        other = cd.load("vcdm_emoji16", changes=["variables.clip.encoder.reduce.k=16", "variables.clip.shape=[16]"])
        twin = cd.Variable(recipe.name, "vector", (32,), meaning=other.variables["clip"].meaning)
        cd.Chain([cd.Diffusion(recipe, network=UNET_OF_NONE), cd.Diffusion(POINT, given=[twin], network=UNET_OF_NONE)])


class Nothing(nn.Module):
    def __init__(self, interface=None):
        super().__init__()

    def forward(self, x, noise, condition):
        return x


UNET_OF_NONE = Nothing


# ------------------------------------------------------------ stages that are not ours


class Broken:
    """A stage that does not give what it says."""

    name, given, conditionals = "side", (), frozenset()

    def __init__(self, made: dict[str, Tensor]):
        self.made, self.generates = made, {"side": SIDE}

    def sample(self, given, draws):
        yield self.made

    def loss(self, batch, draws):
        raise NotImplementedError

    def cost(self, moving):
        return cd.Cost()


@pytest.mark.parametrize(
    ("made", "found"),
    [({}, "nothing"), ({"side": torch.zeros(3, 1)}, r"shape \[3, 1\]"), ({"side": torch.zeros(2)}, r"shape \[2\]")],
)
def test_a_stage_that_gives_something_else_is_named(made, found) -> None:
    chain = cd.Chain([Broken(made)])
    with pytest.raises(
        cd.UserError, match=rf"stage 'side' should give 2 samples of side \[1\], but its `sample` gave {found}"
    ):
        chain.sample(2)


def test_a_stage_with_nothing_to_train_is_refused_by_train_and_left_out_of_a_chain() -> None:
    with pytest.raises(cd.UserError, match=r"stage 'side' has nothing to train"):
        cd.train(Broken({}), columns(), images=8, batch=8)
    chain = cd.Chain([Broken({"side": torch.zeros(4, 1)}), small()])
    cd.train(chain, columns(), images=8, batch=8)
    assert chain.sample(4, steps=2)["point"].shape == (4, 2)


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


# ------------------------------------------------------------ figures


def test_measure_finds_what_is_alike_and_what_is_not() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 400, 3)
    alike, apart = ({f.metric: f.value for f in cd.measure(x, b)} for x in (a, 3 * a + 2))
    assert alike["fd"] < 0.1 < 5 < apart["fd"] and alike["recall"] > 0.9
    images = torch.rand(200, 3, 16, 16) * 2 - 1
    figures = cd.measure(images, images.flip(3), judges=["judge_conv"])
    assert {f.encoder for f in figures} == {"judge_conv"} and {f.count for f in figures} == {200}
    with pytest.raises(cd.UserError, match=r"images or vectors of one shape, not \[400, 3\] and \[200, 3, 16, 16\]"):
        cd.measure(a, images)


# ------------------------------------------------------------ imports


HEAVY = ("open_clip", "transformers", "matplotlib", "tensorboard", "torch._dynamo", "sympy")


def imported(code: str, *arguments: str, cwd: Path) -> str:
    code += f"\nimport sys; print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=cwd)
    return said.stdout


def test_loading_a_recipe_imports_nothing_that_it_does_not_use(tmp_path) -> None:
    assert imported("import chaindiff as cd; cd.load('vcdm_emoji')", cwd=tmp_path) == "heavy: []\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "vcdm_emoji"], "in all: NFE"),
        (["run", "edm_emoji16", "--count=2", "--set=stages.image16.sample.steps=1"], "nothing to do"),
    ],
)
def test_a_second_time_a_command_imports_little_more_than_torch(arguments, said, tmp_path) -> None:
    """Networks were counted the first time, and what there is to do was done."""
    code = "from chaindiff.cli import main\ntry: main()\nexcept SystemExit: pass"
    imported(code, *arguments, cwd=tmp_path)
    again = imported(code, *arguments, cwd=tmp_path)
    assert said in again and again.endswith("heavy: []\n")
