"""Maps: grids of features that are no images, from files, towers and code; fitted by channel, decoded, refused."""

# ruff: noqa: E501 (a table of mistakes has one a line)

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from open_clip.transformer import VisionTransformer
from recipe_text import message, write
from safetensors.torch import load_file, save_file
from torch import Tensor

import chaindiff as cd
from chaindiff import cli
from chaindiff.chain.conditioning import Conditioner, Given, Link
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.commands.smoke import smoke_version
from chaindiff.data import open_data
from chaindiff.encoders import FileVectors, OpenClipImage
from chaindiff.encoders.embedding import rows
from chaindiff.encoders.statistics import Statistics
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.training import prepare
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.load import load_recipe
from chaindiff.specs.recipe import DataSpec, FileSpec, OpenClipSpec
from chaindiff.training.fit import fit

CHANNELS, SIDE = 5, 4
RECIPE = """\
name: maps
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 16, 16]}
  latent: {kind: map, shape: [3, 4, 4], encoder: {kind: file, path: latents.safetensors, reduce: {kind: pca, k: 3}}}
stages:
  latent:
    network: {kind: unet, channels: 16, mult: [1, 1], blocks: 1, attention: []}
    augment: {flip: false}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
  image:
    given: [latent]
    network: {kind: transformer, width: 16, depth: 1, heads: 2, patch: 4}
    augment: {flip: false}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
sample: {want: [latent], count: 3, batch: 2, execution: eager}
"""
ALONE = RECIPE.replace(RECIPE[RECIPE.index("  image:\n    given") : RECIPE.index("sample: {want")], "")


def changed(*pairs: str, text: str = ALONE) -> str:
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def images() -> int:
    return len(open_data(DataSpec(path="emoji64", split="test", where={"style": "google"})))


def latents(count: int, seed: int = 0) -> Tensor:
    """Channels of different means and deviations, which are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixed = (
        torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator) * torch.tensor([9.0, 5, 3, 1, 0.5])[:, None, None]
    )
    turn = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator))[0]
    values = torch.einsum("ij,njhw->nihw", turn, mixed) + torch.arange(CHANNELS)[:, None, None] * 7.0
    return values.contiguous()


@pytest.fixture
def here(tmp_path, monkeypatch, images) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file({"features": latents(images)}, "latents.safetensors")
    write(tmp_path, ALONE)
    return tmp_path


def encoder(**said) -> FileVectors:
    spec = FileSpec(kind="file", path="latents.safetensors", **said)
    width = said["reduce"]["k"] if said.get("reduce") else CHANNELS
    return FileVectors("latent", spec, [width, SIDE, SIDE], 0.5, "map")


def chaindiff(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


# ------------------------------------------------------------ statistics by channel


def test_channels_are_standardised_over_all_positions(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    values, made = latents(50), encoder()
    fit(made, values, tmp_path / "fitted.safetensors")
    mean, std = values.double().mean((0, 2, 3)), values.double().std((0, 2, 3), unbiased=False)
    expected = (values.double() - mean[:, None, None]) / std[:, None, None] * 0.5
    found = made.scale(values)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert load_file(tmp_path / "fitted.safetensors")["std"].shape == (CHANNELS,)
    torch.testing.assert_close(made.features_of(found), values, rtol=0, atol=1e-4)


def test_principal_components_are_those_of_positions(tmp_path, monkeypatch) -> None:
    """Against numpy's eigenvectors of the channels' covariance; what `features_of` returns is the projection."""
    monkeypatch.chdir(tmp_path)
    values, made = latents(50), encoder(reduce={"kind": "pca", "k": 2})
    fit(made, values, tmp_path / "fitted.safetensors")
    flat = values.double().movedim(1, -1).flatten(0, 2)
    assert torch.equal(rows(values).double(), flat)
    variance, vectors = torch.linalg.eigh(torch.cov(flat.T, correction=0))
    top = vectors[:, -2:].flip(1)
    expected = ((flat - flat.mean(0)) @ top / variance[-2:].flip(0).sqrt() * 0.5).unflatten(0, (50, SIDE, SIDE))
    found = made.scale(values).double()
    signs = (found.movedim(1, -1) * expected).sum((0, 1, 2)).sign()
    torch.testing.assert_close(found, (expected * signs).movedim(-1, 1), rtol=0, atol=1e-4)
    projected = flat.mean(0) + (flat - flat.mean(0)) @ top @ top.T
    back = projected.unflatten(0, (50, SIDE, SIDE)).movedim(-1, 1)
    torch.testing.assert_close(made.features_of(found.float()).double(), back, rtol=0, atol=1e-3)


def test_vectors_come_back_too() -> None:
    spec = FileSpec(kind="file", path="x.npy", scaling="raw", reduce={"kind": "pca", "k": 3})
    made, values = FileVectors("x", spec, [3], 0.5, "vector"), torch.randn(40, 3)
    made.statistics, _ = Statistics.fit([values], 3)
    torch.testing.assert_close(made.features_of(made.scale(values)), values, rtol=0, atol=1e-5)


# ------------------------------------------------------------ files


def test_a_file_of_maps_gives_rows_and_says_what_is_wrong(here, images) -> None:
    names = [f"{number:06d}.png" for number in range(images)]
    assert torch.equal(encoder().rows_of(names)[[2, 0]], latents(images)[[2, 0]])
    broken = latents(images)
    broken[7, 2, 1, 3] = torch.nan
    for wrong, expected in (
        (broken, "the map of the image '000007.png' in"),
        (latents(images).flatten(1), "expected [rows, channels, height, width]"),
        (latents(images)[:, :4], "the maps in latents.safetensors have 4 channels on a grid of 4 x 4"),
        (latents(images)[..., :2].contiguous(), "have 5 channels on a grid of 4 x 2"),
    ):
        save_file({"features": wrong.contiguous()}, "latents.safetensors")
        with pytest.raises(UserError) as caught:
            encoder().rows_of(names)
        assert expected in str(caught.value)


def test_trained_sampled_and_saved(here) -> None:
    assert chaindiff("run", "r.yaml") == 0
    files = sorted(path.name for path in Path("runs/maps/samples/latent").iterdir())
    assert files == ["000000.safetensors", "000002.safetensors"], "numbers, no pictures and no grid"
    kept = load_file("runs/maps/samples/latent/000000.safetensors")["latent"]
    assert kept.shape == (2, 3, 4, 4)
    chain = cd.load("runs/maps")
    torch.testing.assert_close(chain.sample(3, batch=2)["latent"][:2], kept, rtol=0, atol=1e-5)
    batch = prepare(Assembly(load_recipe("r.yaml")), "latent")(list(range(16)))["latent"]
    assert batch.shape == (16, 3, 4, 4) and float(batch.abs().max()) > 1, "no range, no clamping"


def test_a_wrong_normalisation_is_refused_before_weights_load(here, images) -> None:
    cd.train(cd.load("r.yaml"))
    weights = ["--set", "stages.latent.weights=runs/maps/stages/latent/weights.safetensors"][1]
    plain = {"variables.latent.encoder.reduce": None, "variables.latent.shape": [5, 4, 4]}
    for change in ({"variables.latent.encoder.scaling": "raw"}, {"variables.latent.sigma_data": 1.0}, plain):
        changes = [weights, *(f"{key}={value}".replace("None", "null") for key, value in change.items())]
        with pytest.raises(UserError, match="were not trained on this 'latent'"):
            Assembly(load_recipe("r.yaml", changes=changes)).stages["latent"].weights()
    # The same recipe with statistics of other latents: everything is called the same, the numbers are not.
    save_file({"features": latents(images, seed=1)}, "latents.safetensors")
    fitted = next(Path("runs/maps/encoders").iterdir())
    fitted.unlink()
    made = encoder(reduce={"kind": "pca", "k": 3})
    fit(made, latents(images, seed=1), fitted)
    with pytest.raises(UserError, match=r"trained on other content .*the statistics of 'latent'"):
        Assembly(load_recipe("r.yaml", changes=[weights])).stages["latent"].weights()


def test_a_file_does_not_follow_augmentation(here) -> None:
    write(
        here, changed("augment: {flip: false}", "augment: {flip: true}", "train: {images", "train: {images", text=ALONE)
    )
    recipe = changed("    generates", "    generates", text=JOINT)
    write(here, recipe.replace("augment: {flip: false}", "augment: {flip: true}"))
    with pytest.raises(UserError, match="the map 'latent' does not follow the augmentation of 'image'"):
        prepare(Assembly(load_recipe("r.yaml")), "both")


JOINT = ALONE.replace("  latent:\n    network", "  both:\n    generates: [latent, image]\n    network").replace(
    "{kind: unet, channels: 16, mult: [1, 1], blocks: 1, attention: []}",
    "{kind: transformer, width: 16, depth: 1, heads: 2, patch: {latent: 1, image: 4}, streams: merged}",
)


def test_a_map_and_an_image_together(here) -> None:
    write(here, JOINT)
    chain = cd.load("r.yaml")
    cd.train(chain)
    out = chain.sample(2, want=["latent", "image"])
    assert out["latent"].shape == (2, 3, 4, 4) and out["image"].shape == (2, 3, 16, 16)
    assert chain.sample(2, given={"latent": out["latent"]}, want=["image"])["image"].isfinite().all()


# ------------------------------------------------------------ towers


def tower(shape: list[int], **said) -> OpenClipImage:
    spec = OpenClipSpec(kind="open_clip", of="image", model="clip_emoji", **said)
    return OpenClipImage("patches", spec, [3, 64, 64], shape, 0.5, "map")


def test_the_last_features_of_a_tower() -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    vector = OpenClipImage("v", OpenClipSpec(kind="open_clip", of="image", model="clip_emoji"), [3, 64, 64], [128], 0.5)
    made = tower([320, 3, 3])
    found = made.features(images)
    assert found.shape == (2, 320, 3, 3)
    with (
        torch.no_grad()
    ):  # what follows in the tower, its last convolution, pooling and projection, gives the embedding
        trunk, head = vector.model.visual.trunk, vector.model.visual.head
        pooled = trunk.forward_head(trunk.bn2(trunk.conv_head(found)))
        torch.testing.assert_close(head(pooled), vector.features(images), rtol=0, atol=1e-4)
    finer = tower([320, 6, 6]).features(images)
    torch.testing.assert_close(finer[..., 0, 0], found[..., 0, 0], rtol=0, atol=1e-5)
    assert made.features_identity != vector.features_identity and "grid" not in vector.features_identity
    with pytest.raises(UserError, match=r"has shape \[8, 3, 3\], but the last features of 'clip_emoji' have 320 chann"):
        tower([8, 3, 3]).features(images)


def test_patch_tokens_of_a_vit() -> None:
    """The tokens that open_clip itself returns beside the pooled one, row by row."""
    said = {"image_size": 24, "patch_size": 6, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "output_dim": 8}
    visual, made = VisionTransformer(**said, output_tokens=True).eval(), tower([32, 4, 4])
    vars(made)["model"] = SimpleNamespace(visual=visual)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        _, tokens = visual(images)
        torch.testing.assert_close(made._map(images).flatten(2).mT, tokens, rtol=0, atol=1e-5)
    vars(made)["model"] = SimpleNamespace(visual=torch.nn.Identity())
    with pytest.raises(UserError, match="open_clip gives no maps of features of the image tower of 'clip_emoji'"):
        made._map(images)


def test_maps_of_a_tower_are_cached_fitted_and_generated(here) -> None:
    text = "encoder: {kind: open_clip, model: clip_emoji, of: image, reduce: {kind: pca, k: 3}}"
    write(here, changed("encoder: {kind: file, path: latents.safetensors, reduce: {kind: pca, k: 3}}", text))
    cd.train(cd.load("r.yaml"))
    out = cd.load("runs/maps").sample(2, given={"image": torch.zeros(2, 3, 16, 16)}, want=["latent"])["latent"]
    assert out.shape == (2, 3, 4, 4) and torch.equal(out[0], out[1]), "computed from the image"


def test_smoke_replaces_the_file(here) -> None:
    spec = smoke_version(load_recipe("r.yaml")).recipe.variables["latent"]
    assert spec.shape == [3, 4, 4] and spec.encoder.kind == "open_clip"
    assert chaindiff("run", "r.yaml", "--smoke", "--out", "smoke") == 0


# ------------------------------------------------------------ code and decoders


CODE = """\
import torch
from torch.nn import functional as F

def pooled():
    return lambda images: torch.cat([F.avg_pool2d(images, 4), 30 + F.avg_pool2d(images, 4)[:, :2]], 1)

def enlarged():
    def decode(latent):
        torch.save(latent, "seen.pt")
        return F.interpolate(latent[:, :3].clamp(-1, 1), scale_factor=4)
    return decode
"""


def own_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "code").mkdir()
    (here / "code" / "own_maps.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(here / "code"))


def test_maps_and_decoders_of_one_s_own(here, monkeypatch) -> None:
    own_code(here, monkeypatch)
    text = changed(
        "shape: [3, 4, 4], encoder: {kind: file, path: latents.safetensors, reduce: {kind: pca, k: 3}}",
        'shape: [5, 4, 4], encoder: {kind: "own_maps:pooled", of: image}',
        "shape: [3, 16, 16]}",
        'shape: [3, 16, 16], decoder: {kind: "own_maps:enlarged", of: latent}}',
        "want: [latent]",
        "want: [image]",
    )
    write(here, text)
    chain = cd.load("r.yaml", allow_code=True)
    cd.train(chain)
    assert chain.sample(2)["image"].shape == (2, 3, 16, 16)
    given = chain.sample(1, given={"image": torch.zeros(1, 3, 16, 16)}, want=["latent"])["latent"]
    assert given.shape == (1, 5, 4, 4) and float(given.max()) == 30


def test_a_decoder_reads_what_the_encoder_computed_not_its_standardised_form(here, monkeypatch, images) -> None:
    own_code(here, monkeypatch)
    decoder = 'shape: [3, 16, 16], decoder: {kind: "own_maps:enlarged", of: latent}}'
    file = "encoder: {kind: file, path: latents.safetensors}"
    write(
        here,
        changed(
            "shape: [3, 4, 4], encoder: {kind: file, path: latents.safetensors, reduce: {kind: pca, k: 3}}",
            f"shape: [5, 4, 4], {file}",
            "shape: [3, 16, 16]}",
            decoder,
        ),
    )
    chain = cd.load("r.yaml", allow_code=True)
    cd.train(chain)
    batch = prepare(Assembly(load_recipe("r.yaml", allow_code=True)), "latent")
    row, value = batch.rows([5])[0], batch([5])["latent"]
    chain.sample(1, given={"latent": value}, want=["image"])
    torch.testing.assert_close(torch.load("seen.pt")[0], latents(images)[row], rtol=0, atol=1e-3)


# ------------------------------------------------------------ conditioning


def test_given_maps_are_channels_beside_what_is_generated() -> None:
    image, latent = Variable.image("image", 3, 8), Variable.map("latent", 4, 8, 8)
    conditioner = Conditioner([Link(latent, LinkSpec(variable="latent", dropout=0.5), image)])
    value = torch.randn(2, 4, 8, 8)
    assert conditioner.image_channels == 4 and conditioner.label_dim == 1
    found = conditioner({"latent": Given(value, torch.tensor([True, False]))}, 2, value)
    assert found.images is not None
    assert torch.equal(found.images[0], value[0]) and not found.images[1].any()
    for network in (
        {"kind": "unet", "channels": 16, "mult": [1], "blocks": 1, "attention": []},
        cd.Transformer(width=16, depth=1, heads=2),
    ):
        stage = Diffusion(image, given=[latent], network=network, sampler={"steps": 1})
        assert cd.Chain([stage]).sample(2, given={"latent": value}, want=["image"])["image"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(Variable.image("image", 3, 16), "'image' 16 x 16"), (Variable.vector("clip", 4), "'clip' no grid at all")],
)
def test_a_given_map_of_another_size_is_refused(target: Variable, expected: str) -> None:
    network = {"kind": "transformer", "width": 16, "depth": 1, "heads": 2}
    with pytest.raises(UserError, match=f"the map 'latent' has a grid of 8 x 8, and {expected}: a given map becomes"):
        Diffusion(target, given=[Variable.map("latent", 4, 8, 8)], network=network)


def test_maps_need_not_be_square_and_have_a_kind_of_their_own() -> None:
    wide = cd.Variable.map("wide", 2, 4, 6)
    stage = cd.Diffusion(wide, network=cd.Transformer(width=16, depth=1, heads=2), sampler=cd.Sampler(steps=1))
    assert cd.Chain([stage]).sample(1)["wide"].shape == (1, 2, 4, 6)
    assert Variable.map("x", 3, 8, 8).identity != Variable.image("x", 3, 8).identity
    with pytest.raises(UserError, match="a unet generates square images and maps"):
        cd.Diffusion(wide, network=cd.UNet(channels=16, mult=[1], blocks=1, attention=[]))


# ------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RECIPE, "stages.image.given.0: the map 'latent' has a grid of 4 x 4, and 'image' 16 x 16: a given map becomes"),
        (changed("shape: [3, 4, 4]", "shape: [3, 4]"), "latent.shape: expected [channels, height, width] for kind map"),
        (changed("shape: [3, 4, 4]", "shape: [2, 4, 4]"), "encoder.reduce.k: 3 components do not fit a map of shape"),
        (changed("kind: pca", "kind: kmeans"), "encoder.reduce: clusters whole vectors; the channels of a map are reduced"),
        (changed("shape: [3, 4, 4]", "shape: [3, 4, 6]"), "network.kind: a unet generates square images and maps, not 4 x 6"),
        (changed("{kind: map, shape: [3, 4, 4], encoder: {kind: file, path: latents.safetensors, reduce: {kind: pca, k: 3}}}", "{kind: map, shape: [3, 4, 4]}"), "which needs an encoder: data has no map"),
        (changed("{kind: unet, channels: 16, mult: [1, 1], blocks: 1, attention: []}", "{kind: prior}"), "a prior generates vectors, not a map; use a unet or a transformer"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(text: str, expected: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text)
    assert expected in message("r.yaml")
