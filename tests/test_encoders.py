"""Encoders: resizing against PIL, towers against open_clip's own transforms, statistics against numpy, identities."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from chaindiff.encoders import Statistics, build_encoder
from chaindiff.encoders.resize import resize
from chaindiff.io.errors import UserError
from chaindiff.specs.clip_models import known_models
from chaindiff.specs.recipe import VariableSpec

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESSING = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a small random open_clip model."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESSING}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def specs(folder: Path | str, shape: int = 8, kind: str = "image", **encoder) -> dict[str, VariableSpec]:
    source = {"kind": "image", "shape": [3, 24, 24]} if kind == "image" else {"kind": kind}
    clip = {"kind": "open_clip", "of": "source", "model": str(folder), **encoder}
    variables = {"source": source, "clip": {"kind": "vector", "shape": [shape], "encoder": clip}}
    return {name: VariableSpec(**value) for name, value in variables.items()}


def resizing(source: list[int], shape: list[int], kernel: str = "box") -> dict[str, VariableSpec]:
    small = {"kind": "image", "shape": shape, "encoder": {"kind": "resize", "of": "image", "filter": kernel}}
    return {"image": VariableSpec(kind="image", shape=source), "small": VariableSpec(**small)}


def pixels(n: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def scaled(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def features(n: int, width: int = 8) -> torch.Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + 3).float()


def refusal(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


# -- resize


@pytest.mark.parametrize("kernel", ["box", "bilinear", "bicubic"])
@pytest.mark.parametrize("source, side", [(24, 12), (24, 8), (24, 9), (25, 10), (12, 30), (24, 24)])
def test_resize_as_pil(kernel, source, side):
    """PIL in floating point to rounding error, and PIL on bytes within one level."""
    images = pixels(2, source) // 2 + 64  # nothing to be cut off, which PIL does after each direction
    out = ((resize(scaled(images), side, kernel) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    method = Image.Resampling[kernel.upper()]
    exact = [
        [Image.fromarray(p.astype(np.float32)).resize((side, side), method) for p in i.transpose(2, 0, 1)]
        for i in images
    ]
    np.testing.assert_allclose(out, np.array(exact, dtype=np.float32).transpose(0, 2, 3, 1), atol=1e-3)
    rounded = [Image.fromarray(i).resize((side, side), method) for i in images]
    assert np.abs(out - np.stack(rounded)).max() < 1.6  # each direction rounds by half a level, then gains at most 1.1


def test_overshoot_is_cut_off():
    edge = torch.ones(1, 3, 16, 16)
    edge[..., :8] = -1
    out = resize(edge, 24, "bicubic")
    assert out.min() == -1 and out.max() == 1 and resize(edge * 0.5, 24, "bicubic").max() > 0.51


def test_resize_encoder():
    encoder = build_encoder("small", resizing([3, 24, 24], [3, 12, 12]), Path("unused"))
    x = scaled(pixels(2))
    expected = x.reshape(2, 3, 12, 2, 12, 2).mean((3, 5))
    torch.testing.assert_close(encoder(x), expected)
    assert (encoder.name, encoder.of) == ("small", "image")
    other = build_encoder("small", resizing([3, 24, 24], [3, 12, 12], "bicubic"))
    assert not torch.equal(encoder(x), other(x))


@pytest.mark.parametrize("shape", [[3, 12, 10], [1, 12, 12], [12]])
def test_resize_refuses_other_shapes(shape):
    variables = resizing([3, 24, 24], [3, 12, 12])
    variables["small"] = variables["small"].model_copy(update={"shape": shape})  # unchecked
    message = refusal(lambda: build_encoder("small", variables))
    assert f"variables.small.shape: an image of shape [3, 24, 24] cannot be resized to {shape}" in message


# -- towers


def test_image_tower_as_open_clip_does_it(tiny):
    """PIL image -> the model's own transforms -> encode_image, against our path from tensors."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    images = pixels(3)
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([transform(Image.fromarray(i)) for i in images]))
        encoder = build_encoder("clip", specs(tiny, scaling="raw"))
        got = encoder(scaled(images))
    assert encoder.fitted and (encoder.name, encoder.of) == ("clip", "source")
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * expected.abs().max().item())  # PIL rounds to levels
    assert not torch.allclose(got.norm(dim=1), torch.ones(3))  # raw, not normalised


def test_preprocessing_is_the_models_own(tiny):
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    images = pixels(2)
    expected = torch.stack([transform(Image.fromarray(i)) for i in images])
    got = build_encoder("clip", specs(tiny, scaling="raw")).preprocess(scaled(images))
    assert (got - expected).abs().max() < 1.01 / 255 / 0.7


def test_text_tower(tiny):
    model = open_clip.create_model(f"local-dir:{tiny}").eval()
    texts = ["a red heart", "", "a very long text that is longer than the context of the model"]
    with torch.inference_mode():
        expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tiny}")(texts))
        got = build_encoder("clip", specs(tiny, kind="text", scaling="raw"))(texts)
    torch.testing.assert_close(got, expected)


def test_parts_of_a_batch(tiny, monkeypatch):
    encoder = build_encoder("clip", specs(tiny, scaling="raw"))
    x = scaled(pixels(5))
    whole = encoder.features(x)
    monkeypatch.setattr("chaindiff.encoders.clip.BATCH", 2)
    torch.testing.assert_close(encoder.features(x), whole)


def test_a_weights_file_for_a_named_model(tiny, tmp_path):
    (tmp_path / "tiny-named.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-named.json")
    weights = tiny / "open_clip_model.safetensors"
    named = build_encoder("clip", specs("tiny-named", pretrained=str(weights), scaling="raw"))
    folder = build_encoder("clip", specs(tiny, scaling="raw"))
    for key, value in folder.model.state_dict().items():
        assert torch.equal(named.model.state_dict()[key], value)
    assert named.features_identity["weights"] == folder.features_identity["weights"]
    assert named.files.preprocessing["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert named.files.preprocessing["std"] == list(open_clip.OPENAI_DATASET_STD)
    assert named.features_identity != folder.features_identity


def test_a_tag_decides_about_quick_gelu(tiny, monkeypatch):
    monkeypatch.setattr("open_clip.download_pretrained", lambda tag: str(tiny / "open_clip_model.safetensors"))
    quick = build_encoder("clip", specs("ViT-B-32", shape=512, pretrained="openai", scaling="raw"))
    assert quick.features_identity["model"]["quick_gelu"] is True
    laion = build_encoder("clip", specs("ViT-B-32", shape=512, pretrained="laion2b_s34b_b79k", scaling="raw"))
    assert laion.features_identity["model"]["quick_gelu"] is False


def test_the_embedded_model():
    encoder = build_encoder("clip", specs("clip_emoji", shape=32, reduce={"kind": "pca", "k": 32}))
    assert encoder.files.width == 128 and not encoder.fitted and len(Statistics.belongs_to(encoder)) == 64
    assert "model" not in vars(encoder)  # the identity needs no weights in memory


# -- what is wrong with models


def test_shapes_that_do_not_fit(tiny):
    message = refusal(lambda: build_encoder("clip", specs(tiny, shape=9)))
    assert "variable 'clip' has shape [9], but the embedding of the model has 8 numbers" in message
    assert "set shape: [8]" in message
    variables = specs(tiny, shape=2, reduce={"kind": "pca", "k": 2})
    variables["clip"] = variables["clip"].model_copy(update={"shape": [8]})  # unchecked
    message = refusal(lambda: build_encoder("clip", variables))
    assert "has shape [8], but the embedding reduced to 2 numbers" in message


@pytest.mark.parametrize(
    "model, pretrained, message",
    [
        ("ViT-B-23", None, "there is no open_clip model 'ViT-B-23'; did you mean 'ViT-B-32'?"),
        ("clip_emojis", None, "did you mean 'clip_emoji'?"),
        ("ViT-B-32", None, "needs weights\n  set pretrained to a tag (known: openai, "),
        ("ViT-B-32", "opnai", "'opnai' is neither a weights file nor a tag of 'ViT-B-32'; did you mean 'openai'?"),
        ("clip_emoji", "openai", "has its own weights; `pretrained: openai` is not used"),
        ("some/where", None, "there is no open_clip_config.json in"),
    ],
)
def test_models_that_are_not_there(model, pretrained, message):
    assert message in refusal(lambda: build_encoder("clip", specs(model, shape=512, pretrained=pretrained)))


def test_open_clips_name_of_a_folder_is_the_folder(tiny, monkeypatch):
    """One encoder with one identity, by the path and by `local-dir:`, also beside an embedded model's name."""
    monkeypatch.chdir(tiny.parent)
    plain, named, bare = (specs(said)["clip"] for said in (tiny, f"local-dir:{tiny}", f"local-dir:{tiny.name}"))
    assert (named, bare.encoder.model) == (plain, f"./{tiny.name}")
    one, other = (
        build_encoder("clip", specs(m, scaling="raw"))(scaled(pixels(1))) for m in (tiny, f"local-dir:{tiny}")
    )
    assert torch.equal(one, other)
    assert "there is no open_clip_config.json in" in refusal(
        lambda: build_encoder("clip", specs("local-dir:clip_emoji"))
    )


def test_names_are_known_without_importing_open_clip(monkeypatch):
    names = set(open_clip.list_models()) - {"tiny-named"}  # which another test registers
    monkeypatch.delitem(sys.modules, "open_clip")
    assert set(known_models()) == {"clip_emoji", *names}
    assert "open_clip" not in sys.modules


def test_no_network(monkeypatch):
    def download(tag):
        raise OSError("no connection\nwith details")

    monkeypatch.setattr("open_clip.download_pretrained", download)
    message = refusal(lambda: build_encoder("clip", specs("ViT-B-32", shape=512, pretrained="openai")))
    assert "the weights 'openai' of 'ViT-B-32' are not here and cannot be downloaded: no connection\n" in message
    assert "set pretrained to the file" in message and "clip_emoji (embedded)" in message


def test_broken_folders(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    encoder = build_encoder("clip", specs(folder, scaling="raw"))
    message = refusal(lambda: encoder(scaled(pixels(1))))
    assert f"open_clip cannot load '{folder}' from {weights}" in message and "may be incomplete" in message
    weights.unlink()
    assert "expected open_clip_model.safetensors or" in refusal(lambda: build_encoder("clip", specs(folder)))
    (folder / "open_clip_config.json").write_text("{}")
    assert "is not a model's configuration" in refusal(lambda: build_encoder("clip", specs(folder)))


# -- statistics


def test_principal_components_against_numpy(tiny):
    x = features(500)
    fitted, share = Statistics.fit(iter(x.split([100, 1, 399])), 3)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
    vectors = vectors[:3] * np.sign(vectors[:3][np.arange(3), np.abs(vectors[:3]).argmax(1)])[:, None]
    np.testing.assert_allclose(fitted.components, vectors, atol=1e-5)
    np.testing.assert_allclose(fitted.std, singular[:3] / np.sqrt(500), rtol=1e-5)
    np.testing.assert_allclose(fitted.mean, x.mean(0), rtol=1e-5)
    assert share == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())

    encoder = build_encoder("clip", specs(tiny, shape=3, reduce={"kind": "pca", "k": 3}))
    encoder.statistics = fitted
    values = encoder.scale(x)
    np.testing.assert_allclose(values, centred @ vectors.T / (singular[:3] / np.sqrt(500)) * 0.5, atol=1e-4)
    torch.testing.assert_close(values.std(0, correction=0), torch.full((3,), 0.5), rtol=1e-4, atol=0)
    nearest = centred @ vectors.T @ vectors + x.double().numpy().mean(0)
    unscaled = values * (fitted.std / 0.5) @ fitted.components + fitted.mean
    np.testing.assert_allclose(unscaled, nearest, atol=1e-4)


def test_standardising_without_a_reducer(tiny):
    x = features(300)
    x[:, 2] = 7.25  # a dimension that says nothing
    encoder = build_encoder("clip", specs(tiny))
    encoder.statistics, share = Statistics.fit([x], None)
    values = encoder.scale(x)
    expected = ((x - x.mean(0)) / x.std(0, correction=0) * 0.5).numpy()
    expected[:, 2] = 0
    np.testing.assert_allclose(values, expected, atol=1e-4)
    unscaled = values * (encoder.statistics.std / 0.5) + encoder.statistics.mean
    torch.testing.assert_close(unscaled, x, rtol=0, atol=1e-4)
    assert share == 1


def test_raw_values_are_left_alone(tiny):
    x = features(50)
    assert build_encoder("clip", specs(tiny, scaling="raw")).scale(x) is x
    reduced = build_encoder("clip", specs(tiny, shape=2, scaling="raw", reduce={"kind": "pca", "k": 2}))
    assert not reduced.fitted
    assert "statistics of variable 'clip' are not fitted yet" in refusal(lambda: reduced.scale(x))
    reduced.statistics, _ = Statistics.fit([x], 2)
    torch.testing.assert_close(reduced.scale(x).std(0, correction=0), reduced.statistics.std)


def test_more_components_than_embeddings():
    message = refusal(lambda: Statistics.fit([features(5)], 6))
    assert "6 principal components cannot be fitted to 5 embeddings of 8 numbers" in message
    assert "choose a smaller k" in message


# -- identity


def test_identity_says_what_the_values_are(tiny, tmp_path):
    def key(folder=tiny, fitted=None, name="clip", **options) -> tuple:
        variables = specs(folder, **options)
        encoder = build_encoder(name, {**variables, name: variables["clip"]})
        return Statistics.belongs_to(encoder), fitted and fitted.digest

    moved = Path(shutil.copytree(tiny, tmp_path / "elsewhere"))
    base = key()
    assert key(moved) == base and key(name="other_name") == base
    trained = Path(shutil.copytree(tiny, tmp_path / "trained"))
    save_file(
        {k: v + 1 for k, v in open_clip.CLIP(**CONFIG).state_dict().items()}, trained / "open_clip_model.safetensors"
    )
    fit = Statistics.fit([features(20)], None)[0]
    pca = {"shape": 2, "reduce": {"kind": "pca", "k": 2}}
    others = [key(trained), key(scaling="raw"), key(**pca), key(fitted=fit), key(kind="text")]
    assert len({base, *others}) == 6
