"""K-means: the algorithm against closed forms and brute force, clusters as labels and vectors, a recipe of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from chaindiff.encoders import Statistics, build_encoder, kmeans
from chaindiff.encoders.kmeans import cluster, nearest
from chaindiff.io.errors import UserError
from chaindiff.specs.load import load_recipe
from chaindiff.specs.recipe import VariableSpec


def chunked(rows: np.ndarray, *sizes: int) -> Callable[[], list[Tensor]]:
    tensor = torch.from_numpy(rows.astype(np.float32))
    return lambda: list(tensor.split(list(sizes) or len(tensor)))


def blobs(sizes: list[int], width: int = 3, apart: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    """Unit-variance blobs, shuffled, and the blob of every row."""
    rng = np.random.default_rng(0)
    centres = apart * np.eye(len(sizes), width) + apart * np.arange(len(sizes))[:, None]
    which = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (centres[which] + rng.normal(size=(len(which), width))).astype(np.float32), which


def spread(rows: np.ndarray) -> float:
    return float(((rows - rows.mean(0)) ** 2).sum())


# ------------------------------------------------------------ the algorithm


def test_separate_blobs_are_found_exactly() -> None:
    """Centroids are the blobs' means, counts their sizes, largest first; inertia is the sum within them."""
    sizes = [50, 7, 120, 1, 30]
    rows, which = blobs(sizes)
    found = cluster(chunked(rows, 100, 1, 107), 5, seed=0)
    largest = np.argsort(-np.array(sizes))
    assert found.counts.tolist() == sorted(sizes, reverse=True)
    expected = np.stack([rows[which == blob].astype(np.float64).mean(0) for blob in largest])
    np.testing.assert_allclose(found.centroids, expected, rtol=1e-6)
    within = sum(spread(rows[which == blob].astype(np.float64)) for blob in range(5))
    assert found.inertia == pytest.approx(within, rel=1e-5)
    assert (nearest(torch.from_numpy(rows), found.centroids).numpy() == np.argsort(largest)[which]).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_best_partition_of_a_few_rows(seed: int) -> None:
    """Against every way to part 8 rows in 3."""
    rows = np.random.default_rng(seed).normal(size=(8, 2)).astype(np.float32)
    exact = rows.astype(np.float64)
    best = min(
        sum(spread(exact[np.array(labels) == c]) for c in range(3))
        for labels in itertools.product(range(3), repeat=8)
        if set(labels) == {0, 1, 2}
    )
    assert min(cluster(chunked(rows), 3, s).inertia for s in range(3)) == pytest.approx(best, rel=1e-6)


def test_clusters_are_a_function_of_data_and_seed_in_whatever_chunks() -> None:
    rows = np.random.default_rng(2).normal(size=(300, 4))
    one, other = cluster(chunked(rows), 6, 0), cluster(chunked(rows, 1, 99, 200), 6, 0)
    assert torch.equal(one.counts, other.counts)
    torch.testing.assert_close(one.centroids, other.centroids, rtol=0, atol=1e-6)
    assert torch.equal(one.centroids, cluster(chunked(rows), 6, 0).centroids)
    assert not torch.equal(one.centroids, cluster(chunked(rows), 6, 1).centroids)
    own = nearest(torch.from_numpy(rows.astype(np.float32)), one.centroids)
    assert torch.equal(own.bincount(), one.counts)
    means = torch.stack([torch.from_numpy(rows)[own == c].mean(0) for c in range(6)])
    torch.testing.assert_close(one.centroids, means.float(), rtol=0, atol=1e-6)  # where Lloyd's iterations end


def test_of_many_rows_a_part_is_fitted_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = blobs([500, 300, 100])
    monkeypatch.setattr(kmeans, "MOST", 200 * 3)
    found = cluster(chunked(rows, 450, 1, 449), 3, 0)
    assert found.counts.tolist() == [500, 300, 100]
    assert found.inertia == pytest.approx(3 * 900, rel=0.1)  # three numbers of variance 1 in each row
    assert torch.equal(found.centroids, cluster(chunked(rows), 3, 0).centroids)


def test_more_clusters_than_different_rows() -> None:
    rows = np.repeat(np.eye(3), 5, axis=0)
    assert cluster(chunked(rows), 3, 0).counts.tolist() == [5, 5, 5]
    with pytest.raises(UserError, match=r"4 clusters cannot be fitted to 3 different embeddings \(15 in all\)"):
        cluster(chunked(rows), 4, 0)


# ------------------------------------------------------------ as an encoder


def variables(kind: str, shape: int, k: int = 5, **encoder) -> dict[str, VariableSpec]:
    clip = {"kind": "open_clip", "of": "image", "model": "clip_emoji", "reduce": {"kind": "kmeans", "k": k}, **encoder}
    return {
        "image": VariableSpec(kind="image", shape=[3, 64, 64]),
        "clusters": VariableSpec(kind=kind, shape=[shape], encoder=clip),
    }


def test_a_label_is_the_nearest_centroid_and_a_vector_the_centroid_itself() -> None:
    rows, which = blobs([50, 40, 30, 20, 10], width=128)
    features = torch.from_numpy(rows)
    fitted, share = Statistics.fit_clusters(lambda: [features], 5, 0)
    exact = rows.astype(np.float64)
    within = sum(spread(exact[which == blob]) for blob in range(5))
    assert share == pytest.approx(1 - within / spread(exact), rel=1e-6)

    label = build_encoder("clusters", variables("label", 5))
    label.statistics = fitted
    assert torch.equal(label.scale(features), torch.from_numpy(which))

    vector = build_encoder("clusters", variables("vector", 128))
    vector.statistics = fitted
    values = vector.scale(features)
    assert len(values.unique(dim=0)) == 5
    moves = values.std(0, correction=0) > 0
    torch.testing.assert_close(values.std(0, correction=0)[moves], torch.full((int(moves.sum()),), 0.5))
    torch.testing.assert_close(values.mean(0), torch.zeros(128), rtol=0, atol=1e-5)
    unscaled = values * (fitted.std / 0.5) + fitted.mean
    torch.testing.assert_close(unscaled, fitted.centroids[torch.from_numpy(which)], rtol=1e-5, atol=1e-3)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"shape \[6\], but its embeddings have 5 clusters"):
        fitting = variables("label", 5)
        unfit = fitting["clusters"].model_copy(update={"shape": [6]})  # unchecked
        build_encoder("clusters", {**fitting, "clusters": unfit})
    with pytest.raises(UserError, match=r"shape \[5\], but the embedding of the model has 128 numbers"):
        build_encoder("clusters", variables("vector", 5))


# ------------------------------------------------------------ in a recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("clusters.shape=[7]", "clusters.encoder.reduce.k: 64 clusters do not fit a label of 7 classes"),
        (
            "clusters.encoder.reduce=null",
            "encoder.reduce: a label is the nearest cluster of an embedding: use {kind: kmeans, k: 64}",
        ),
        ("clusters.encoder.reduce.kind=pca", "clusters.encoder.reduce: a label is the nearest cluster"),
        ("clusters.encoder.reduce.kind=kmean", "unknown kind 'kmean'; did you mean 'kmeans'?"),
        ("clusters.encoder.scaling=raw", "clusters.encoder.scaling: is never used"),
        ("clusters.of=group", "clusters.of: is never used: this variable is computed by its encoder"),
    ],
)
def test_what_does_not_fit_is_explained(change: str, message: str) -> None:
    changes = [f"variables.{change}"]
    if change.endswith("pca"):
        changes.append("variables.clusters.encoder.reduce.k=64")
    with pytest.raises(UserError) as error:
        load_recipe("kmeans_emoji16", changes=changes)
    assert message in str(error.value)


def test_a_recipe_of_clusters_trains_observes_and_samples(tmp_path: Path) -> None:
    """Sources draw as often as the training data has each class; a class is given by number, or by a picture of it."""
    from chaindiff.commands import run as commands
    from chaindiff.commands.smoke import smoke_version
    from chaindiff.io import tensorfile
    from chaindiff.recipe.assembly import Assembly
    from chaindiff.recipe.given import check_given, read_given
    from chaindiff.show.images import save_png, to_image

    changes = ["variables.clusters.shape=[8]", "variables.clusters.encoder.reduce.k=8"]
    loaded = load_recipe("kmeans_emoji16", changes=changes)
    commands.run(loaded, out=tmp_path, smoke=True)
    assembly = Assembly(smoke_version(loaded), tmp_path)
    chain = assembly.chain()
    encoder, rows = assembly.encoders["clusters"].build(), range(len(assembly.data))

    # The source against the classes of the data itself (in smoke runs one augmented variant of each stands for it).
    counts = assembly.columns["clusters"].counts
    assert list(chain.sources["clusters"].frequencies) == counts.tolist() and counts.sum() == len(rows)
    assert tensorfile.metadata(assembly.encoders["clusters"].path)["rows"] == str(len(rows))
    drawn = chain.sources["clusters"].sample(range(4000), 0).bincount(minlength=8) / 4000
    share = counts / counts.sum()
    assert ((drawn - share).abs() < 4 * (share * (1 - share) / 4000).sqrt()).all()

    sampled = tensorfile.load(tmp_path / "samples/clusters/000000.safetensors")[0]["clusters"]
    assert sampled.dtype == torch.int64 and sampled.shape == (4,)

    images = assembly.data.images(list(rows)[:6], 64)
    for number, image in enumerate(images):
        save_png(to_image(image.float() / 127.5 - 1), tmp_path / f"{number}.png")
    with torch.no_grad():
        own = encoder(images.float() / 127.5 - 1)
    for number in range(6):
        given = read_given(assembly, {"clusters": str(tmp_path / f"{number}.png")})["clusters"]
        assert torch.equal(given, own[number : number + 1])
    assert read_given(assembly, {"clusters": 5})["clusters"].tolist() == [5]
    again = read_given(assembly, {"clusters": str(tmp_path / "samples/clusters/000000.safetensors")})["clusters"]
    assert torch.equal(again, sampled)
    plan = chain.resolve(["image16"], ["clusters"])
    assert [step.producer.kind for step in plan.steps] == ["stage"]
    assert chain.sample(2, given={"clusters": own[:1]}, want=["image16"])["image16"].shape == (2, 3, 16, 16)

    # A run that takes these weights takes the clusters that they were trained with, too.
    named = smoke_version(loaded).override({"stages": {name: {"weights": str(tmp_path)} for name in assembly.stages}})
    beside = Assembly(named, tmp_path.with_name(f"{tmp_path.name}-beside"))
    assert beside.encoders["clusters"].path == assembly.encoders["clusters"].path != Path()
    assert beside.chain().sources["clusters"].frequencies == counts.tolist()

    with pytest.raises(UserError, match=r"'8' is not a class of clusters"):
        check_given(assembly, {"clusters": 8})
    with pytest.raises(UserError, match=r"there is no file or folder nowhere.png\n.*as a class, an image"):
        check_given(assembly, {"clusters": "nowhere.png"})
