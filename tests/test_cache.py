"""The embedding cache and fitting: rows against direct computation, interruption, damage, statistics files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from chaindiff.chain.variable import Variable
from chaindiff.data import ImageData, augment, open_data
from chaindiff.encoders import build_encoder
from chaindiff.io.errors import UserError
from chaindiff.specs.recipe import DataSpec, VariableSpec
from chaindiff.specs.training import AugmentSpec
from chaindiff.training.batches import Batches
from chaindiff.training.cache import EmbeddingCache
from chaindiff.training.fit import fit

SPEC = AugmentSpec(probability=0.5, variants=3, seed=4)
STILL = AugmentSpec(flip=False, variants=3)
IMAGES, SIDE = 7, 16

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    import open_clip

    folder = tmp_path_factory.mktemp("model")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> ImageData:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return open_data(DataSpec(path=str(folder)))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("chaindiff.training.cache.SHARD", 8)


def encoder(model: Path, k: int | None = None, fitted: Path | None = None, **options):
    clip = {"kind": "open_clip", "of": "image", "model": str(model), **options}
    if k:
        clip["reduce"] = {"kind": "pca", "k": k}
    variables = {
        "image": VariableSpec(kind="image", shape=[3, SIDE, SIDE]),
        "clip": VariableSpec(kind="vector", shape=[k or 8], encoder=clip),
    }
    return build_encoder("clip", variables, fitted)


@pytest.fixture
def cache(tmp_path, model, data) -> EmbeddingCache:
    return EmbeddingCache(tmp_path, encoder(model), data, SPEC, SIDE)


def again(cache: EmbeddingCache) -> EmbeddingCache:
    return EmbeddingCache(cache.folder.parent, cache.encoder, cache.data, cache.spec, cache.side)


def features(cache: EmbeddingCache, *pairs: tuple[int, int]) -> torch.Tensor:
    """Of images and their variants."""
    return cache["features"][[index * cache.variants + variant for index, variant in pairs]]


def direct(cache: EmbeddingCache, index: int, variant: int) -> torch.Tensor:
    image = cache.data.images([index], SIDE).float() / 127.5 - 1
    drawn = augment.draw(cache.spec, [(cache.spec.seed, cache.data.names[index], variant)])
    with torch.inference_mode():
        return cache.encoder.features(augment.apply(image, drawn))[0]


def test_rows_are_the_features_of_the_augmented_images(cache):
    assert cache.missing() == [range(8), range(8, 16), range(16, 21)] and len(cache) == 21
    progress = list(cache.build(batch=3))
    assert progress[0] == (0, 21) and progress[-1] == (21, 21)
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    assert cache.missing() == again(cache).missing() == []
    pairs = [(6, 2), (0, 0), (3, 1), (0, 0), (5, 1)]
    rows = features(again(cache), *pairs)
    torch.testing.assert_close(rows, torch.stack([direct(cache, *pair) for pair in pairs]), rtol=1e-4, atol=1e-5)
    everything = features(cache, *((index, variant) for index in range(7) for variant in range(3)))
    assert torch.equal(torch.cat(list(cache["features"].split(5))), everything)
    assert list(cache.build(batch=3)) == [(21, 21)]


def test_without_augmentation_one_variant_stands_for_all(tmp_path, model, data):
    cache = EmbeddingCache(tmp_path, encoder(model, scaling="raw"), data, STILL, SIDE)
    list(cache.build())
    assert len(cache) == IMAGES
    torch.testing.assert_close(features(cache, (2, 0))[0], direct(cache, 2, 0), rtol=1e-4, atol=1e-5)
    image = Variable.image("image", 3, SIDE)
    clip = Variable.vector("clip", 8)
    batches = Batches(data, image, [clip], {"clip": cache.encoder}, {"clip": cache["features"]}, {}, STILL, 0)
    rows = batches.rows(range(IMAGES))
    assert torch.equal(batches(list(range(IMAGES)))["clip"], features(cache, *((row, 0) for row in rows)))


def test_an_interrupted_build_goes_on(cache):
    for done, _ in cache.build(batch=4):
        if done == 12:  # one shard of 8 is written, the second is half done
            break
    assert [path.name for path in sorted(cache.folder.iterdir())] == ["000000.safetensors"]
    first = (cache.folder / "000000.safetensors").stat().st_mtime_ns
    assert [done for done, _ in again(cache).build(batch=4)] == [8, 12, 16, 20, 21]
    assert (cache.folder / "000000.safetensors").stat().st_mtime_ns == first
    assert again(cache).missing() == []


@pytest.mark.parametrize("damage", ["truncated", "another's", "missing"])
def test_a_damaged_shard_is_made_anew(cache, damage):
    list(cache.build())
    expected = features(cache, (4, 0))
    path = cache.folder / "000008.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "missing":
        path.unlink()
    else:
        path.unlink()
        save_file({"features": torch.zeros(8, 8)}, path, {"identity": "another's"})
    fresh = again(cache)
    assert fresh.missing() == [range(8, 16)]
    with pytest.raises(UserError) as error:
        features(fresh, (4, 0))
    assert "is not complete: 000008.safetensors is missing" in str(error.value)
    assert "run the same command again" in str(error.value)
    assert [done for done, _ in fresh.build()] == [13, 21]
    assert torch.equal(features(again(cache), (4, 0)), expected)


def test_ranks_share_the_shards(cache):
    missing = cache.missing()
    for rank, steps in ((0, [(8, 21), (16, 21), (21, 21)]), (1, [(13, 21), (21, 21)])):
        assert list(again(cache).build(8, missing[rank::2])) == steps
    assert cache.missing() == []


def test_the_key_covers_all_that_the_numbers_depend_on(tmp_path, model, data):
    def key(spec=SPEC, size=SIDE, over=data, **options) -> str:
        return EmbeddingCache(tmp_path, encoder(model, **options), over, spec, size).key

    other = open_data(DataSpec(path="emoji64", split="test"))
    specs = [SPEC.model_copy(update=u) for u in ({"seed": 5}, {"variants": 4}, {"probability": 0.4}, {"colour": 0.1})]
    assert len({key(), key(size=8), key(over=other), key(STILL), *map(key, specs)}) == 8
    assert key(k=3) == key() == key(scaling="raw")  # reducing and scaling come after


def test_embeddings_that_are_not_finite(cache):
    cache.encoder.model.visual.proj.data.fill_(float("nan"))
    with pytest.raises(UserError) as error:
        list(cache.build())
    assert "the embedding 'clip' of the image '0.png' is not finite" in str(error.value)


def test_nothing_to_cache_without_variants(tmp_path, model, data):
    with pytest.raises(ValueError, match="nothing to cache"):
        EmbeddingCache(tmp_path, encoder(model), data, AugmentSpec(probability=0.1), SIDE)


# -- fitting


def test_fitted_values_have_the_deviation_asked_for(tmp_path, model, cache):
    list(cache.build())
    path = tmp_path / "clip.safetensors"
    fresh = encoder(model, k=3)
    fit(fresh, cache["features"], path)
    everything = cache["features"][:]
    values = fresh.scale(everything)
    torch.testing.assert_close(values.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.T @ values / len(values), 0.25 * torch.eye(3), rtol=0, atol=1e-3)

    loaded = encoder(model, k=3, fitted=path)
    assert loaded.fitted and loaded.statistics.digest == fresh.statistics.digest
    assert torch.equal(loaded.scale(everything), values)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["digest"] == loaded.statistics.digest and int(metadata["rows"]) == 21
    assert 0 < float(metadata["explained"]) < 1


def test_statistics_of_another_encoder_are_refused(tmp_path, model, cache):
    list(cache.build())
    path = fit(encoder(model, k=3), cache["features"], tmp_path / "clip.safetensors")
    for options in ({"k": 2}, {"k": 3, "scaling": "raw"}, {}):
        with pytest.raises(UserError) as error:
            encoder(model, fitted=path, **options)
        assert f"{path}: these statistics were not fitted for the encoder of 'clip'" in str(error.value)
        assert "its model, weights, preprocessing, reducer or scaling differs" in str(error.value)


def test_missing_and_broken_statistics(tmp_path, model, cache):
    list(cache.build())
    path = tmp_path / "clip.safetensors"
    with pytest.raises(UserError) as error:
        encoder(model, k=3, fitted=path)
    assert f"variable 'clip' needs statistics of its embeddings, and there is no {path}" in str(error.value)
    assert "training a stage that uses it fits them" in str(error.value)
    assert encoder(model, scaling="raw", fitted=path).fitted  # needs none

    fit(encoder(model, k=3), cache["features"], path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="not a complete file of fitted statistics"):
        encoder(model, k=3, fitted=path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="the statistics are damaged: their digest does not match"):
        encoder(model, k=3, fitted=path)


def test_fitting_needs_a_complete_cache(tmp_path, model, cache):
    with pytest.raises(UserError, match=r"is not complete: 000000\.safetensors is missing"):
        fit(encoder(model, k=3), cache["features"], tmp_path / "clip.safetensors")
