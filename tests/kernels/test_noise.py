"""Counter-based noise: Philox against the Random123 library's vectors, normals against float64, sameness, Triton."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from chaindiff.edm.random import Draws
from chaindiff.kernels import noise

ONES = 0xFFFFFFFF
# Counter, key and words of philox4x32-10: kat_vectors of Random123 1.14 (Salmon et al. 2011).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SAMPLES = [0, 1, 5, 10**7, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1]
KEY = 0xFEDCBA9876543210


def numbers(samples) -> torch.Tensor:
    return torch.tensor(list(samples), dtype=torch.int64)


def whole_words(counter: tuple[int, ...], key: int) -> list[int]:
    """Philox4x32-10 in Python's whole numbers, as in figure 2 of the paper."""
    (r0, l0, r1, l1), k0, k1 = counter, key & ONES, key >> 32
    for _ in range(10):
        (high0, low0), (high1, low1) = (divmod(m * r, 2**32) for m, r in ((0xD2511F53, r0), (0xCD9E8D57, r1)))
        r0, l0, r1, l1 = high1 ^ k0 ^ l0, low1, high0 ^ k1 ^ l1, low0
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return [r0, l0, r1, l1]


@pytest.fixture(params=["torch's own Philox", "numpy"])
def philox(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(noise, "native", lambda: None)
    elif noise.native() is None:
        pytest.skip("this torch has no Philox of its own")


# ------------------------------------------------------------ words


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected) -> None:
    arrays = [np.array([word], np.uint64) for word in counter]
    whole = key[1] << 32 | key[0]
    assert tuple(int(word[0]) for word in noise.philox(*arrays, whole)) == expected
    assert tuple(whole_words(counter, whole)) == expected


def test_words_are_those_of_the_documented_counters(philox) -> None:
    found = noise.words(KEY, numbers(SAMPLES), 11)
    assert found.shape == (len(SAMPLES), 11)
    for row, sample in enumerate(SAMPLES):
        expected = [w for block in range(3) for w in whole_words((block, sample & ONES, sample >> 32, 0), KEY)]
        assert found[row].tolist() == expected[:11]


def test_long_rows_are_made_in_parts(philox, monkeypatch) -> None:
    monkeypatch.setattr(noise, "COUNTERS", 5)
    found = noise.words(KEY, numbers([3, 2**33]), 50)
    for row, sample in enumerate([3, 2**33]):
        expected = [w for block in range(13) for w in whole_words((block, sample & ONES, sample >> 32, 0), KEY)]
        assert found[row].tolist() == expected[:50]


def test_a_torch_whose_own_philox_differs_is_not_used(monkeypatch) -> None:
    class Other:
        @staticmethod
        def _philox_randint_(out, key, low, high) -> None:
            out.fill_(1)

    monkeypatch.setattr(torch.ops, "aten", Other)
    assert noise.native.__wrapped__() is None
    monkeypatch.setattr(torch.ops, "aten", object())
    assert noise.native.__wrapped__() is None


# ------------------------------------------------------------ normals, uniforms, whole numbers


def expected_normals(words: np.ndarray) -> np.ndarray:
    """Box-Muller in float64."""
    u, angle = (words[:, 0::2] + 0.5) / 2**32, 2 * math.pi * words[:, 1::2] / 2**32
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(len(words), -1)


def test_normals_follow_the_formula(philox) -> None:
    found = noise.normal(KEY, numbers(SAMPLES), 4000)
    expected = expected_normals(noise.words(KEY, numbers(SAMPLES), 4000).double().numpy())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize(("word", "radius"), [(0, math.sqrt(66 * math.log(2))), (ONES, 0.0)])
def test_the_tails_reach_6_76(monkeypatch, word, radius) -> None:
    pair = word << 32  # with angle 0
    monkeypatch.setattr(noise, "native", lambda: lambda key, rows, first, blocks: np.full((1, 2), pair, np.uint64))
    assert noise.normal(0, numbers([0]), 4).tolist()[0] == pytest.approx([radius, 0, radius, 0], abs=1e-6)


def test_normals_are_normal_and_independent_across_rows_keys_and_roles() -> None:
    count, draws = 400, Draws(range(500), 3, "stage")
    x = draws.normal("noise", shape=(count,))
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96, 6: 10170}[power] / x.numel())
        assert float(x.double().pow(power).mean()) == pytest.approx(moment, abs=5 * spread)
    others = {
        "the next sample": x.roll(1, 0),
        "the next element": x.roll(1, 1),
        "the other of a pair": x.unflatten(1, (-1, 2)).flip(2).flatten(1),
        "another role": draws.normal("other", shape=(count,)),
        "another number": draws.normal("noise", 1, shape=(count,)),
        "another variable": draws.of("b").normal("noise", shape=(count,)),
        "another seed": Draws(range(500), 4, "stage").normal("noise", shape=(count,)),
        "far samples": Draws(range(10**9, 10**9 + 500), 3, "stage").normal("noise", shape=(count,)),
    }
    for name, other in others.items():
        for a, b in ((x, other), (x.square() - 1, other.square() - 1)):  # a pair shares its radius
            scale = math.sqrt(x.numel()) * float(a.std() * b.std())
            assert abs(float((a * b).sum())) < 5 * scale, name


def test_uniform_numbers() -> None:
    x = Draws(range(20_000), 0, "u").uniform("role")
    assert x.dtype == torch.float32
    assert stats.kstest(x.numpy(), "uniform").pvalue > 1e-3
    assert noise.uniform(torch.tensor([0, 255, 256, ONES])).tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]


@pytest.mark.parametrize("below", [1, 2, 6, 1000, 2**31])
def test_whole_numbers_are_the_upper_half_of_the_product(below) -> None:
    words = noise.words(KEY, numbers(range(200)), 2)
    expected = [((a << 32 | b) * below) >> 64 for a, b in words.tolist()]
    assert noise.integers(words, below).tolist() == expected
    assert noise.integers(torch.tensor([[ONES, ONES], [0, 0]]), below).tolist() == [below - 1, 0]


def test_whole_numbers_are_equally_likely() -> None:
    counts = Draws(range(30_000), 0, "i").integers("role", below=7).bincount(minlength=7)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    with pytest.raises(ValueError, match=r"below should be from 1 to 2\^31, not 0"):
        Draws(range(2), 0).integers("role", below=0)


# ------------------------------------------------------------ sameness


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (3, 70, 333)])
def test_a_row_is_the_same_bits_in_every_batch_order_and_number_of_threads(philox, shape) -> None:
    from exact import normal_batch  # not where Triton is interpreted

    samples = [4, 0, 17, 10**7, 2**35, 9, 1]
    whole = normal_batch(shape, samples, 0, "image")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for row, sample in enumerate(samples):
            assert torch.equal(normal_batch(shape, [sample], 0, "image")[0], whole[row])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(normal_batch(shape, samples[::-1], 0, "image").flip(0), whole)
    longer = normal_batch((2, *shape), samples, 0, "image")  # which begins with the shorter
    assert torch.equal(longer[:, 0], whole)


def test_both_ways_on_the_host_agree_to_the_bit(monkeypatch) -> None:
    if noise.native() is None:
        pytest.skip("this torch has no Philox of its own")
    found = noise.normal(KEY, numbers(range(40)), 5001)
    monkeypatch.setattr(noise, "native", lambda: None)
    assert torch.equal(found, noise.normal(KEY, numbers(range(40)), 5001))


def test_float64_is_float32_widened() -> None:
    from exact import normal  # not where Triton is interpreted

    wide = Draws(range(5), 0, "v", dtype=torch.float64).normal("noise", shape=(9,))
    assert wide.dtype == torch.float64
    assert torch.equal(wide.float(), Draws(range(5), 0, "v").normal("noise", shape=(9,)))
    assert normal((2,), "a", 1).dtype == torch.float64


def test_empty_batches_and_shapes() -> None:
    from exact import normal_batch  # not where Triton is interpreted

    assert normal_batch((3, 2), [], 0).shape == (0, 3, 2)
    assert normal_batch((0,), [1, 2], 0).shape == (2, 0)


# ------------------------------------------------------------ Triton

IN_INTERPRETER = Path(__file__).parent / "noise_interpreted.py"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], np.ndarray]:
    """What the kernel makes in Triton's interpreter, in a process of its own: it is chosen when triton is imported."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    path = tmp_path_factory.mktemp("triton") / "found.npz"
    ran = subprocess.run(
        [sys.executable, IN_INTERPRETER, path],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return np.load(path).__getitem__


def test_triton_knows_the_known_answers(interpreted) -> None:
    np.testing.assert_array_equal(interpreted("known"), np.array([expected for _, _, expected in KNOWN]))


@pytest.mark.parametrize("count", [1, 3, 1027])
@pytest.mark.parametrize("key", [1, KEY])
def test_triton_makes_the_numbers_of_the_host(interpreted, key, count) -> None:
    name, samples = f"{key}-{count}", numbers(SAMPLES)
    np.testing.assert_array_equal(interpreted(f"words-{name}"), noise.words(key, samples, count).numpy())
    normals = noise.normal(key, samples, count).numpy()
    np.testing.assert_allclose(interpreted(f"normal-{name}"), normals, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_cuda_makes_the_numbers_of_the_host_and_does_not_wait_for_it() -> None:
    device = torch.device("cuda")
    for samples in (range(100, 164), [5, 3, 2**40]):
        host = Draws(samples, 0, "stage")
        host.on(device).normal("noise", shape=(3, 64, 64))  # compiles the kernel
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = host.on(device)
            normals = made.normal("noise", shape=(3, 64, 64))
            found = made.uniform("u"), made.integers("i", below=1000)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(normals.cpu(), host.normal("noise", shape=(3, 64, 64)), rtol=0, atol=1e-6)
        for mine, theirs in zip(found, (host.uniform("u"), host.integers("i", below=1000)), strict=True):
            assert torch.equal(mine.cpu(), theirs)
