"""Published networks: their outputs against reference numbers, what is refused, and stages that begin from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exact import call
from fixture_files import fixture
from published import module, snapshot
from torch import Tensor, nn

from chaindiff import cli
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.interop.edm import load_edm_network, published
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.networks.interface import Condition
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe
from chaindiff.specs.sampling import SamplerSpec
from chaindiff.training.begin import Begun, begin_from

IMAGE = Variable.image("image", 3, 16)
KINDS = ["ddpmpp", "ncsnpp", "adm"]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def reference(arch: str) -> tuple[str, dict, dict[str, Tensor], dict[str, Tensor]]:
    """Class, arguments, weights and reference numbers of a fixture."""
    tensors, metadata = fixture(f"{arch}_tiny")
    return metadata["class"], json.loads(metadata["kwargs"]), part(tensors, "state."), tensors


def whole(kind: str = "edm") -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Arguments, weights and reference numbers of a preconditioner."""
    tensors, metadata = fixture(f"precond_{kind}")
    return {"img_resolution": 16, "img_channels": 3, **json.loads(metadata["kwargs"])}, part(tensors, "state."), tensors


def off(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


# ------------------------------------------------------------ networks


@pytest.mark.parametrize("arch", KINDS)
def test_published_networks_give_the_reference_outputs(arch) -> None:
    class_name, kwargs, state, tensors = reference(arch)
    network = load_edm_network(class_name, kwargs, state)
    assert published(class_name, kwargs).network.arch == arch
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    inputs = part(tensors, "in.")
    labels = inputs.get("class_labels"), inputs.get("augment_labels")
    out = call(network.double(), inputs["x"], inputs["noise_labels"], *labels)
    assert off(out, tensors["out.y"]) < 1e-5


@pytest.mark.parametrize("kind", ["edm", "vp", "ve", "iddpm"])
def test_a_preconditioner_is_taken_off(kind) -> None:
    class_name = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond", "iddpm": "iDDPMPrecond"}[kind]
    kwargs, state, tensors = whole(kind)
    network = load_edm_network(class_name, kwargs, state)
    described = published(class_name, kwargs)
    assert described.precondition is not None
    assert (described.precondition.kind, described.class_name, described.sigma_data) == (kind, "SongUNet", 0.5)
    sampler = SamplerSpec(sigma_min=0.05, sigma_max=50)  # levels that all of them know
    stage = Diffusion(IMAGE, network=network, precondition=described.precondition, sampler=sampler).double().eval()
    with torch.no_grad():
        state, sigma = {"image": tensors["in.x"].double()}, {"image": tensors["in.sigma"].double().flatten()}
        denoised = stage.denoise(state, sigma, Condition()).x0["image"]
    assert off(denoised, tensors["out.D"]) < 1e-5


@pytest.mark.parametrize(
    ("class_name", "said", "kind", "channels"),
    [
        ("VPPrecond", {"epsilon_t": 1e-3}, {"kind": "vp", "beta_d": 19.9, "beta_min": 0.1, "eps": 1e-3}, 3),
        ("VEPrecond", {}, {"kind": "ve", "sigma_min": 0.02, "sigma_max": 100.0}, 3),
        ("iDDPMPrecond", {"M": 500}, {"kind": "iddpm", "levels": 500}, 6),
        ("EDMPrecond", {"sigma_data": 1.0}, {"kind": "edm"}, 3),
    ],
)
def test_preconditioners_by_name(class_name, said, kind, channels) -> None:
    found = published(class_name, {"img_resolution": 64, "img_channels": 3, **said})
    assert found.precondition is not None
    assert found.precondition.model_dump(exclude={"loss"}) == kind
    assert found.out_channels == channels
    assert found.sigma_data == said.get("sigma_data", 0.5)
    assert found.network.arch == ("adm" if class_name in ("EDMPrecond", "iDDPMPrecond") else "ddpmpp")  # EDM's defaults


@pytest.mark.parametrize(
    ("count", "class_name", "said"),
    [
        (61_805_571, "EDMPrecond", {"model_type": "SongUNet", "augment_dim": 9}),
        (
            62_761_091,
            "VEPrecond",
            {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "augment_dim": 9}
            | {"resample_filter": [1, 3, 3, 1]},
        ),
        (61_871_235, "EDMPrecond", {"model_type": "SongUNet", "augment_dim": 9, "label_dim": 512}),
        (295_899_267, "EDMPrecond", {"label_dim": 1000}),
    ],
)
def test_defaults_of_the_published_classes(count, class_name, said) -> None:
    network = published(class_name, {"img_resolution": 64, "img_channels": 3, **said}).build()
    assert sum(parameter.numel() for parameter in network.parameters()) == count


SIZES = {"img_resolution": 16, "in_channels": 3, "out_channels": 3}


@pytest.mark.parametrize(
    ("class_name", "said", "message"),
    [
        ("SongUNet", {"model_chanels": 64}, "SongUNet has no argument 'model_chanels'; did you mean 'model_channels'?"),
        ("DhariwalUNet", {"embedding_type": "fourier"}, "DhariwalUNet has no argument 'embedding_type'"),
        ("SongUNet", {"channel_mult_emb": 8}, "SongUNet: channel_mult_emb=8 is not supported; ddpmpp has 4"),
        ("SongUNet", {"decoder_type": "skip"}, "decoder_type='skip' is not supported; ddpmpp has 'standard'"),
        ("SongUNet", {"resample_filter": [1, 2, 1]}, "resample_filter=[1, 2, 1] is not supported"),
        ("SongUNet", {"embedding_type": "fourier"}, "embedding_type='fourier' is not supported; ddpmpp has"),
        ("SongUNet", {"model_channels": 10**9}, "model_channels should be a whole number from 1 to 65536"),
        ("SongUNet", {"in_channels": "3"}, "in_channels should be a whole number from 1"),
        ("SongUNet", {"channel_mult": 2}, "channel_mult should be a list"),
        ("SongUNet", {"channel_mult": [1] * 9}, "9 levels of channel_mult do not fit 16 pixels"),
        ("SongUNet", {"dropout": 2}, "SongUNet: dropout: Input should be less than or equal to 1"),
        ("SongUNetX", {}, "the network class 'SongUNetX' cannot be imported; did you mean 'SongUNet'?"),
        ("AuxiliaryTransformer", {}, "'AuxiliaryTransformer' cannot be imported"),
    ],
)
def test_what_was_never_published_is_refused_by_name(class_name, said, message) -> None:
    with pytest.raises(UserError) as error:
        published(class_name, {**SIZES, **said})
    assert message in str(error.value)


def test_arguments_of_preconditioners_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"EDMPrecond: sigma_max=80 is not supported, only inf"):
        published("EDMPrecond", {"img_resolution": 16, "img_channels": 3, "sigma_max": 80})
    with pytest.raises(UserError, match=r"iDDPMPrecond: C_1=0.1 is not supported, only 0.001"):
        published("iDDPMPrecond", {"img_resolution": 16, "img_channels": 3, "C_1": 0.1})
    with pytest.raises(UserError, match=r"EDMPrecond: the argument 'img_channels' is missing"):
        published("EDMPrecond", {"img_resolution": 16})


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    class_name, kwargs, state, _ = reference("ddpmpp")

    def message(state: dict[str, Tensor], **said) -> str:
        with pytest.raises(UserError) as error:
            load_edm_network(class_name, {**kwargs, **said}, state)
        return str(error.value)

    less = {k: v for k, v in state.items() if k != "map_layer0.bias"}
    assert "missing map_layer0.bias" in message(less)
    assert "unexpected enc.16x16_block9.conv0.weight" in message(
        {**state, "enc.16x16_block9.conv0.weight": torch.zeros(1)}
    )
    assert "unexpected optimizer.step" in message({**state, "optimizer.step": torch.zeros(1)})
    assert "map_label.weight is [16, 10], expected [16, 9]" in message(state, label_dim=9)
    assert "SongUNet: blocks: " in message(state, num_blocks=60_000)  # more than any network may have
    assert "too few for num_blocks=600" in message(state, num_blocks=600)
    name = "enc.8x8_down.conv0.resample_filter"
    assert f"{name} is another filter than [1, 1]" in message({**state, name: state[name] * 2})
    assert "map_layer0.bias is torch.int64" in message({**state, "map_layer0.bias": torch.zeros(64).long()})


# ------------------------------------------------------------ snapshots


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def edm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional snapshot of EDM with reference numbers."""
    kwargs, state, _ = whole()
    path = tmp_path_factory.mktemp("snapshot") / "network-snapshot-200000.pkl"
    path.write_bytes(snapshot(module("EDMPrecond", {**kwargs, "use_fp16": True}, state)))
    return path


RECIPE = """
name: tiny
data: {{path: {data}}}
variables:
  image: {{kind: image, shape: [3, 16, 16]}}
  clip: {{kind: vector, shape: [128], encoder: {{kind: open_clip, model: clip_emoji, of: image}}}}
stages:
  image:
    network: {{kind: unet, channels: 16, mult: [1, 2], blocks: 1, attention: [8], dropout: 0.3}}
    train: {{images: 16, batch: 8}}
    sample: {{steps: 3}}
sample: {{want: [image], count: 2, batch: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(data="emoji64"))
    return path


def test_import_writes_a_network_and_says_how_to_begin_from_it(tmp_path, edm, capsys) -> None:
    out = tmp_path / "edm.safetensors"
    status, said, error = command(capsys, "import", edm, "--out", out)
    assert (status, error) == (0, "")
    assert "EDMPrecond of SongUNet (ddpmpp), 16 x 16, 3 channels, " in said
    assert "parameters, no label, no augmentation label" in said
    _, expected, _ = whole()
    tensors, kept = tensorfile.load(out)
    assert {f"model.{name}" for name in tensors} == expected.keys()
    assert all(torch.equal(value, expected[f"model.{name}"].float()) for name, value in tensors.items())
    assert (kept["format"], kept["class"], kept["sigma_data"]) == ("chaindiff-network/1", "EDMPrecond", "0.5")
    assert json.loads(kept["kwargs"])["use_fp16"] is True
    assert json.loads(kept["noise"]) == [-1.2, 1.2]
    assert json.loads(kept["augment"])["p"] == 0.15

    # What is printed is a stage of a recipe; only data, variables and training are missing.
    stage = said[said.index("stages:") : said.index("to sample")]
    path = tmp_path / "begun.yaml"
    head = "name: begun\ndata: {path: emoji64}\nvariables: {image: {kind: image, shape: [3, 16, 16]}}\n"
    path.write_text(head + stage)
    loaded = load_recipe(path, changes=["stages.image.train.images=8"])
    begun = begin_from(Assembly(loaded).stages["image"].build(), Path(loaded.recipe.stages["image"].init or ""))
    assert begun == Begun(("network.map_augment.weight",), ())


def test_import_for_a_recipe_writes_weights_that_sample(tmp_path, edm, recipe, capsys) -> None:
    out = tmp_path / "weights.safetensors"
    status, said, error = command(capsys, "import", edm, "--recipe", recipe, "--out", out)
    assert (status, error) == (0, "")
    said_set = f"--set stages.image.weights={out}"
    assert said_set in said
    assembly = Assembly(load_recipe(recipe, changes=[f"stages.image.weights={out}"]), tmp_path / "run")
    stage = assembly.stages["image"].load(assembly.stages["image"].weights())
    _, _, tensors = whole()
    denoised = stage.bind({})({"image": tensors["in.x"]}, {"image": tensors["in.sigma"].flatten()}).x0["image"]
    assert off(denoised, tensors["out.D"]) < 1e-5
    assert "identity" not in tensorfile.metadata(out), "nobody may take it for trained here"
    status, _, error = command(capsys, "sample", recipe, *said_set.split(), "--out", tmp_path / "run")
    assert (status, error) == (0, "")
    assert len(list((tmp_path / "run/samples/image").glob("0*.png"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "stages.image.network.channels=32"], "channels is 32, but 16 in the snapshot"),
        (["--set", "stages.image.network.attention=[]"], "attention is [], but [8] in the snapshot"),
        (
            ["--set", "variables.image.shape=[3, 32, 32]", "--set", "stages.image.network.attention=[16]"],
            "3 x 32 x 32, but the snapshot 16 pixels",
        ),
        (["--set", "stages.image.given=[clip]"], "was not trained with: network.map_label.weight of clip"),
        (["--set", "stages.image.precondition.kind=x0"], "it was trained with EDM(sigma_data=0.5), not Direct("),
        (["--set", "variables.image.sigma_data=1"], "it was trained with EDM(sigma_data=0.5), not EDM(sigma_data=1.0)"),
        (["--stage", "imag"], "there is no stage 'imag'; did you mean 'image'?"),
        (["--out", "x.pt"], "weights are written as .safetensors"),
    ],
)
def test_a_snapshot_of_another_stage_is_refused(edm, recipe, capsys, options, message) -> None:
    status, _, error = command(capsys, "import", edm, "--recipe", recipe, *options)
    assert status == 2
    assert message in error
    assert "Traceback" not in error


def test_another_preconditioning_goes_to_a_stage_that_has_it(tmp_path, recipe, capsys) -> None:
    path, out = tmp_path / "vp.pkl", tmp_path / "vp.safetensors"
    kwargs, state, _ = whole()
    path.write_bytes(snapshot(module("VPPrecond", kwargs, state), loss_fn=None, augment_pipe=None))
    asked = ["import", path, "--recipe", recipe, "--out", out, "--set", "stages.image.precondition"]
    status, _, error = command(capsys, *asked[:-2])
    assert status == 2
    assert "it was trained with VP(beta_d=19.9, beta_min=0.1, eps=1e-05" in error
    assert not out.exists()
    status, _, error = command(capsys, *asked[:-1], "stages.image.precondition.kind=vp")
    assert (status, error) == (0, "")
    assert json.loads(tensorfile.metadata(out)["stage"])["precondition"]["kind"] == "vp"


def test_what_is_no_snapshot_of_an_image_network(tmp_path, capsys) -> None:
    path = tmp_path / "x.pkl"
    kwargs, state, _ = whole()
    prior = module("AuxiliaryPrecond", {"width": 512}, {"query": torch.zeros(4)})
    odd = module("EDMPrecond", {**kwargs, "model_type": nn.Identity}, state)
    nested = module("EDMPrecond", {**kwargs, "channel_mult": [[1], 2]}, state)
    for ema, message in [
        (prior, "VCDM's auxiliary network is not: train it with the card clip_prior"),
        (
            None,
            "not a snapshot of EDM or VCDM with an object 'ema': it holds augment_pipe, dataset_kwargs, ema, loss_fn",
        ),
        (odd, "it refers to 'torch.nn.modules.linear.Identity'"),
        (nested, "the argument 'channel_mult' is not a number, a text or a list"),
    ]:
        path.write_bytes(snapshot(ema))
        status, _, error = command(capsys, "import", path, "--out", tmp_path / "x.safetensors")
        assert (status, message in error, "Traceback" in error) == (2, True, False), error
    assert command(capsys, "import", path, "--stage", "image")[2] == (
        "error: --stage and --set apply to a recipe: add --recipe RECIPE\n"
    )
    assert not (tmp_path / "x.safetensors").exists()
