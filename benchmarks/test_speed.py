"""Speed of the parts that sampling and training spend their time in; `pytest benchmarks`.

Ratios within one run are what counts; absolute times are this machine's.
"""

from __future__ import annotations

import pytest
import torch

from chaindiff.data import augment
from chaindiff.edm.random import normal_batch
from chaindiff.networks.unet import UNet
from chaindiff.specs.stage import AugmentSpec

BATCH = 64
MODES = ["eager", "eager-channels_last", "eager-channels_last-bf16", "compile-channels_last-bf16"]


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_of_the_16x16_network(benchmark, mode: str) -> None:
    """One denoiser evaluation of 64 images, without gradients."""
    torch.manual_seed(0)
    network = UNet(16, 3, 3, channels=48, mult=[1, 2], blocks=1, attention=[8], label_dim=32, augment_dim=9).eval()
    layout = torch.channels_last if "channels_last" in mode else torch.contiguous_format
    network = network.to(memory_format=layout)
    if "compile" in mode:
        network.compile()
    x = torch.randn(BATCH, 3, 16, 16).contiguous(memory_format=layout)
    labels, levels = torch.randn(BATCH, 32), torch.randn(BATCH)

    def evaluate() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in mode):
            return network(x, levels, labels)

    assert benchmark.pedantic(evaluate, rounds=15, warmup_rounds=3).isfinite().all()


def test_noise_for_a_batch(benchmark) -> None:
    """Start noise of 64 images of 32x32."""
    noise = benchmark(lambda: normal_batch((3, 32, 32), range(BATCH), 0, "image", "start"))
    assert noise.shape == (BATCH, 3, 32, 32)


def test_augmentation_of_a_batch(benchmark) -> None:
    """Drawing and applying EDM's augmentation to 128 images of 64x64."""
    spec = AugmentSpec(probability=0.12)
    images = torch.rand(128, 3, 64, 64) * 2 - 1
    out = benchmark(lambda: augment.apply(images, augment.draw(spec, [(0, i) for i in range(128)])))
    assert out.shape == images.shape
