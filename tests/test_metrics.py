"""Metrics against closed forms, scipy, torch-fidelity and brute force; planted failures of models are seen."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import mmd2

from chaindiff.edm.random import generator
from chaindiff.evaluation import kernels, neighbours, vectors
from chaindiff.evaluation.interval import resamples
from chaindiff.evaluation.metrics import (
    Moments,
    alignment,
    cmmd,
    density_coverage,
    frechet_distance,
    gaussian_mmd,
    kid,
    laplacian_pyramid,
    memorisation,
    nearest,
    precision_recall,
    sliced_wasserstein,
    sliced_wasserstein_laplacian,
    vector_report,
)
from chaindiff.evaluation.provenance import Figure, compare
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Shards


def normal(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width)))


def mixed(rows: int, width: int, seed: int) -> torch.Tensor:
    """Correlated features, of unlike scales."""
    scales = torch.logspace(-1, 1, width, dtype=torch.float64)
    return normal(rows, width, seed) * scales @ normal(width, width, seed + 1000) + normal(1, width, seed + 2000)


def exactly(mean: torch.Tensor, cov: torch.Tensor, count: int = 10_000) -> Moments:
    moments = Moments(len(mean))
    moments.count, moments.mean, moments.scatter = count, mean.double(), cov.double() * (count - 1)
    return moments


# -- Frechet distance


def test_moments_of_chunks_are_those_of_the_whole(tmp_path):
    rows = mixed(503, 6, 0).float() + 1000  # far from 0, where sums of squares would lose digits
    one, other = Moments.over(rows[:300].split(7)), Moments.over(rows[300:].split(64))
    one.merge(other)
    one.save(tmp_path / "moments.safetensors", extractor="e")
    again = Moments.load(tmp_path / "moments.safetensors", extractor="e")
    for moments in (one, again):
        assert moments.count == 503
        np.testing.assert_allclose(moments.mean, rows.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.cov, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="extractor is 'e', expected 'f'"):
        Moments.load(tmp_path / "moments.safetensors", extractor="f")
    with pytest.raises(UserError, match="not finite"):
        one.update(torch.full((1, 6), math.nan))


def test_frechet_distance_of_gaussians_in_closed_form():
    """Covariances that commute: |difference of means|^2 + sum of squared differences of the deviations."""
    turn = torch.linalg.qr(normal(5, 5))[0]
    a, b = torch.tensor([1.0, 4, 9, 0.25, 1e-8]).double(), torch.tensor([4.0, 1, 9, 1, 1e-4]).double()
    mean = torch.arange(5).double()
    found = frechet_distance(exactly(mean, turn * a @ turn.T), exactly(mean + 2, turn * b @ turn.T))
    assert found == pytest.approx(5 * 4 + (a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("width", [2, 20, 96])
def test_frechet_distance_against_matrix_roots(width):
    a, b = mixed(400, width, 1), mixed(500, width, 2)
    found = frechet_distance(Moments.over([a]), Moments.over([b]))
    mean = [x.numpy().mean(0) for x in (a, b)]
    cov = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(cov[0] @ cov[1])
    expected = ((mean[0] - mean[1]) ** 2).sum() + np.trace(cov[0] + cov[1] - 2 * root.real)
    assert found == pytest.approx(expected, rel=1e-6)
    statistics = [{"mu": m, "sigma": s} for m, s in zip(mean, cov, strict=True)]
    peer = fid_statistics_to_metric(*statistics, verbose=False)
    assert found == pytest.approx(next(iter(peer.values())), rel=1e-6)


def test_frechet_distance_of_equal_sets_with_singular_covariances():
    """Dimensions that never vary: the root of their rounding errors must not add up."""
    rows = torch.cat([100 * normal(300, 40), torch.zeros(300, 200).double()], 1)
    assert frechet_distance(Moments.over([rows]), Moments.over([rows])) < 1e-6  # of a trace of 800,000


def test_frechet_distance_refuses_fewer_samples_than_dimensions():
    enough, few = Moments.over([normal(200, 64)]), Moments.over([normal(64, 64)])
    with pytest.raises(UserError, match=r"64-dimensional features needs more than 64 samples; there are 64") as error:
        frechet_distance(enough, few)
    assert "KID" in str(error.value)
    with pytest.raises(UserError, match="of 64 and of 3 numbers"):
        frechet_distance(enough, Moments.over([normal(200, 3)]))


# -- kernel distances


def polynomial(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def test_kid_of_whole_sets_against_a_double_loop_and_torch_fidelity(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 7)  # many blocks, the last of them small
    a, b = normal(30, 4).numpy(), normal(23, 4, 1).numpy() + 0.5
    expected = 0.0
    for x in (a, b):
        pairs = [(x[i] @ x[j] / 4 + 1) ** 3 for i in range(len(x)) for j in range(len(x)) if i != j]
        expected += sum(pairs) / len(pairs)
    expected -= 2 * np.mean([(x @ y / 4 + 1) ** 3 for x in a for y in b])
    assert kid(torch.from_numpy(a), torch.from_numpy(b), subsets=0).value == pytest.approx(expected, rel=1e-10)
    c = a[:23]
    peer = mmd2(polynomial(c, c), polynomial(c, b), polynomial(b, b))
    assert kid(torch.from_numpy(c), torch.from_numpy(b)).value == pytest.approx(peer, rel=1e-10)


def test_kid_of_subsets_estimates_kid_of_all_pairs():
    a, b = normal(400, 8), normal(300, 8, 1) * 1.2
    whole, subsets = kid(a, b, subsets=0), kid(a, b, subsets=100, size=100)
    assert whole.low < whole.value < whole.high and subsets.low < subsets.value < subsets.high
    assert abs(whole.value - subsets.value) < 3 * subsets.standard_error
    assert subsets.standard_error == pytest.approx(whole.standard_error, rel=0.35)
    assert kid(a, b, subsets=100, size=100) == subsets  # the seed alone decides
    assert kid(a, b, subsets=100, size=100, seed=1) != subsets


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"subsets": 0}, {"subsets": 100, "size": 50}])
def test_standard_error_of_kid_is_the_scatter_over_data_sets(options):
    found = [kid(normal(200, 6, 2 * s), 0.3 + 1.2 * normal(200, 6, 2 * s + 1), **options) for s in range(150)]
    values = np.array([f.value for f in found])
    assert np.mean([f.standard_error for f in found]) == pytest.approx(values.std(), rel=0.25)
    covered = np.mean([f.low < values.mean() < f.high for f in found])
    assert covered > 0.85


def test_gaussian_mmd_of_gaussians_in_closed_form():
    """For N(0, I) and N(m, I): 2 (s / (s + 2))^(d/2) (1 - exp(-|m|^2 / 2 (s + 2))), s = sigma^2."""
    d, n, sigma, shift = 3, 2000, 1.5, 2.0
    a, b = normal(n, d), normal(n, d, 1)
    b[:, 0] += shift
    s = sigma**2
    level = (s / (s + 2)) ** (d / 2)
    expected = 2 * level * (1 - math.exp(-(shift**2) / (2 * (s + 2))))
    bias = (1 - level) * 2 / n
    assert gaussian_mmd(a, b, sigma) - bias == pytest.approx(expected, rel=0.1)


def test_cmmd_of_points_on_the_sphere_in_closed_form():
    east, north = torch.tensor([[3.0, 0, 0]]).repeat(4, 1), torch.tensor([[0, 0.5, 0]]).repeat(5, 1)
    assert cmmd(east, north) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)), rel=1e-9)
    assert cmmd(east, 7 * east) == pytest.approx(0, abs=1e-9)  # norms do not enter
    half = torch.cat([east, torch.tensor([[0, 1.0, 0]]).repeat(4, 1)])
    k = math.exp(-2 / 200)
    assert cmmd(half, east) == pytest.approx(1000 * ((1 + k) / 2 + 1 - (1 + k)), rel=1e-9)


# -- nearest neighbours


def brute_distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return np.sqrt(((a.numpy()[:, None].astype(np.float64) - b.numpy()[None]) ** 2).sum(-1))


@pytest.mark.parametrize("block", [5, 2048])
def test_neighbourhood_metrics_against_brute_force(monkeypatch, block):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    real, fake = normal(41, 3), 0.6 * normal(33, 3, 1) + 0.4
    across = brute_distances(real, fake)
    radius = {
        k: np.sort(brute_distances(x, x), 1)[:, n] for k, x, n in (("r3", real, 3), ("f3", fake, 3), ("r5", real, 5))
    }
    precision = (across <= radius["r3"][:, None]).any(0).mean()
    recall = (across <= radius["f3"][None]).any(1).mean()
    assert precision_recall(real, fake) == pytest.approx((precision, recall), abs=1e-12)
    inside = across <= radius["r5"][:, None]
    density, coverage = inside.sum(0).mean() / 5, inside.any(1).mean()
    assert density_coverage(real, fake) == pytest.approx((density, coverage), abs=1e-12)
    assert 0.2 < recall < 0.95 and 0.2 < coverage < 0.95  # the case says something
    distances, indices = nearest(fake, real, 4, chunk=block)
    assert np.array_equal(indices, np.argsort(across.T, 1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(across.T, 1)[:, :4], rtol=1e-9)


def test_copies_are_at_distance_zero_and_inside():
    rows = (normal(50, 300) + 100).float()
    distances, indices = nearest(rows[10:20], rows)
    assert (distances == 0).all() and indices[:, 0].tolist() == list(range(10, 20))
    assert precision_recall(rows, rows) == (1, 1)
    ten = rows[:10].repeat(9, 1)  # every point nine times: balls of radius 0
    assert precision_recall(ten, rows[:10].repeat(5, 1)) == (1, 1)
    with pytest.raises(UserError, match="more than 3 samples; there are 3"):
        precision_recall(rows[:3], rows)


def modes(count: int, kinds: int, seed: int) -> torch.Tensor:
    """A mixture of `kinds` of ten Gaussians, far apart."""
    centres = 10 * torch.eye(10).double()
    return centres[torch.arange(count) % kinds] + normal(count, 10, seed)


def test_dropped_modes_lower_recall_and_not_precision():
    real, good, poor = modes(500, 10, 0), modes(500, 10, 1), modes(500, 3, 2)
    floor, found = precision_recall(real, good), precision_recall(real, poor)
    assert floor[0] > 0.75 and floor[1] > 0.75
    assert found[0] > floor[0] - 0.1 and found[1] < 0.45
    assert density_coverage(real, poor)[1] < 0.45 < density_coverage(real, good)[1]


def test_a_model_that_memorises_is_caught():
    train, held_out, fresh = (modes(n, 10, seed) for n, seed in ((600, 0), (300, 1), (300, 2)))
    copies = torch.cat([train[100:250] + 0.01 * normal(150, 10, 3), fresh[:150]])
    honest, caught = memorisation(fresh, train, held_out), memorisation(copies, train, held_out)
    assert honest.share == pytest.approx(0.05, abs=0.035) and honest.ratio == pytest.approx(1, abs=0.1)
    assert caught.share == pytest.approx(0.5, abs=0.05) and caught.ratio < 0.9
    closest = caught.closest[:150]
    assert {(sample, row) for sample, row, _ in closest} == {(i, 100 + i) for i in range(150)}
    assert [d for *_, d in closest] == sorted(d for *_, d in closest)
    edges, samples, held = caught.histograms()
    assert len(edges) == len(samples) + 1 and sum(samples) == pytest.approx(1) and sum(held) == pytest.approx(1)
    assert samples[0] == pytest.approx(0.5) and held[0] == 0
    all_copied = memorisation(train[:100], train, held_out)
    assert all_copied.share == 1 and all_copied.ratio == 0


# -- patches


def test_sliced_wasserstein_distance_of_a_shift_in_closed_form():
    """Projections move by |direction . shift|, whose mean is |shift| G(d/2) / (sqrt(pi) G((d+1)/2))."""
    d, rows = 12, normal(100, 12).float()
    shift = torch.zeros(d)
    shift[3] = 2.5
    expected = 2.5 * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    assert sliced_wasserstein(rows, rows + shift, directions=8192) == pytest.approx(expected, rel=0.03)
    assert sliced_wasserstein(rows, rows.flip(0)) == 0  # sets have no order


def test_laplacian_pyramid_against_scipy():
    image = normal(64, 64).float()
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    fine, middle, coarse = (x[0, 0].numpy() for x in laplacian_pyramid(image[None, None]))
    levels = [image.numpy()]
    for _ in range(2):
        levels.append(scipy.ndimage.convolve(levels[-1], kernel, mode="mirror")[::2, ::2])
    np.testing.assert_allclose(coarse, levels[2], atol=1e-6)
    for found, level, below in ((fine, levels[0], levels[1]), (middle, levels[1], levels[2])):
        spread = np.zeros_like(level)
        spread[::2, ::2] = below
        np.testing.assert_allclose(found, level - scipy.ndimage.convolve(spread, 4 * kernel, mode="mirror"), atol=1e-5)


def test_sliced_wasserstein_of_pyramids_tells_the_scale():
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(60, 190, (48, 3, 8, 8))).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = blocks.to(torch.uint8)
    noisy = (blocks + torch.from_numpy(rng.integers(-50, 51, blocks.shape))).clamp(0, 255).to(torch.uint8)
    assert sliced_wasserstein_laplacian(images, images, patches=16, directions=64) == {32: 0, 16: 0}
    found = sliced_wasserstein_laplacian(images, noisy, seed=1, patches=32, directions=128)
    assert found[32] > 2 * found[16] > 0
    assert set(sliced_wasserstein_laplacian(images[:30, :, :16, :16], images[:20, :, 16:, 16:], patches=16)) == {16}
    with pytest.raises(UserError, match="cannot be compared"):
        sliced_wasserstein_laplacian(images, images[:, :, :16, :16])


# -- vectors


def test_alignment_is_the_mean_cosine():
    a, b = normal(200, 5), normal(200, 5, 1) + 1
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    found = alignment(a.float(), b.float())
    assert found.value == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert found.standard_error == pytest.approx(cosine.std().item() / 200**0.5, rel=0.2)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error, rel=0.2)
    assert alignment(a, 3 * a).value == pytest.approx(1)


def test_alignment_of_pairs_by_number():
    """Images of a direction each, told of in another order, one of them twice and one never."""
    images, texts = torch.eye(4)[[0, 1, 1, 2]] + torch.tensor([0, 0, 0, 1.0]), torch.eye(4)
    pairs = torch.tensor([[0, 0], [1, 1], [2, 3], [3, 0]])
    assert alignment(images, texts, pairs).value == pytest.approx((3 * 0.5**0.5 + 0) / 4, abs=1e-7)
    with pytest.raises(UserError, match="in pairs into one space"):
        alignment(images[:3], texts)
    with pytest.raises(UserError, match="in pairs into one space"):
        alignment(images, torch.eye(3), pairs)


def plain(value) -> list[float]:
    """All numbers of a report, in order."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in plain(part)]
    return [value] if isinstance(value, int | float) else []


def test_figures_of_vectors_in_a_file_are_those_of_vectors_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK", 100)  # in parts; the tensors are whole
    sets, stored = [normal(n, 6, n).float() for n in (700, 150, 400)], []
    for rows in sets:
        store = Shards(tmp_path / str(len(rows)), "", len(rows), 128)
        list(store.fill(lambda some, rows=rows: {"clip": rows[list(some)]}, 128))
        stored.append(store["clip"])
    found = plain(vector_report(*stored))
    monkeypatch.setattr(vectors, "BLOCK", 10_000)
    expected = plain(vector_report(*sets))
    assert len(found) > 30
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    whole, subsets = {"subsets": 0}, {"subsets": 5, "size": 50}
    for options in (whole, subsets):
        assert kid(stored[0], stored[2], **options) == kid(sets[0], sets[2], **options)
    assert cmmd(stored[0], stored[2]) == cmmd(sets[0], sets[2])
    pairs = torch.stack([torch.arange(150), torch.arange(150).flip(0)], 1)
    assert alignment(stored[1], stored[2], pairs) == alignment(sets[1], sets[2], pairs)


def test_a_bootstrap_draws_as_numpy_does():
    found = resamples(300, 20, 3, "a")
    expected = generator(3, "bootstrap", "a").multinomial(300, np.full(300, 1 / 300), size=20)
    assert found.element_size() == 2 and np.array_equal(found, expected)


def test_vector_report_stands_beside_its_floor():
    shape = normal(8, 8, 9)
    train, held_out, good = (normal(n, 8, seed) @ shape for n, seed in ((800, 0), (150, 1), (400, 2)))
    narrow = 0.5 * good  # a prior that was sampled with too much guidance
    honest, poor = vector_report(good, held_out, train), vector_report(narrow, held_out, train)
    assert honest["count"] == 150 and honest["train"] == 800
    assert honest["frechet"]["floor"] == poor["frechet"]["floor"] > 0  # finite sets differ
    assert honest["frechet"]["sampled"] < 2 * honest["frechet"]["floor"] < poor["frechet"]["sampled"]
    assert poor["precision"]["sampled"] >= poor["precision"]["floor"] - 0.05
    assert poor["recall"]["sampled"] < poor["recall"]["floor"]
    assert poor["norm"]["sampled"]["mean"] == pytest.approx(honest["norm"]["sampled"]["mean"] / 2)
    u = good.numpy() / np.linalg.norm(good.numpy(), axis=1, keepdims=True)
    cosines = (u @ u.T)[~np.eye(len(u), dtype=bool)]
    assert honest["cosine"]["sampled"] == pytest.approx({"mean": cosines.mean(), "std": cosines.std()})
    assert honest["novelty"]["share"] == pytest.approx(0.05, abs=0.06)
    assert vector_report(train[:300], held_out, train)["novelty"]["share"] == 1
    few = vector_report(good[:8], held_out, train)
    assert few["frechet"] is None and "more than 8 samples" in few["frechet_refused"]


# -- figures


def figure(**changes) -> Figure:
    about = {"reference": "emoji64", "split": "train", "count": 1000, "encoder": "judge_conv", "seed": 0}
    return Figure(**{"metric": "kid", "value": 2.0, "low": 1.5, "high": 2.5, "resize": "PIL", **about, **changes})


@pytest.mark.parametrize(
    "field, value",
    [
        ("metric", "cmmd"),
        ("reference", "ffhq"),
        ("split", "test"),
        ("count", 5000),
        ("encoder", "judge_vit"),
        ("encoder_identity", "0" * 64),
        ("resize", "bilinear"),
    ],
)
def test_unlike_figures_are_not_compared(field, value):
    with pytest.raises(UserError, match=f"cannot be compared: {field} is .*{value}"):
        compare(figure(), figure(**{field: value}))


def test_like_figures_are_compared():
    found = compare(figure(), figure(value=3.0, low=2.6, high=3.5, seed=4))
    assert found.value == 1 and found.apart and found.flattered is None
    assert not compare(figure(), figure(low=2.4, high=3.5)).apart
    assert compare(figure(), figure(low=None)).apart is None
    assert compare(figure(), figure(in_chain=True)).flattered == "b"
    with pytest.raises(ValueError, match="unknown"):
        figure(unknown=1)
