"""Noise made by the Triton kernel in Triton's interpreter, saved as numpy arrays: run by test_noise.py."""

from __future__ import annotations

import sys

import numpy as np
import torch
import triton
import triton.language as tl
from test_noise import KEY, KNOWN, SAMPLES, numbers

from chaindiff.kernels.noise_triton import generate


@triton.jit
def _known(out, counter, key):
    c0, c1, c2, c3 = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    zero = tl.zeros([1], tl.uint32)
    words = tl.philox(
        key,
        zero + c0.to(tl.uint32),
        zero + c1.to(tl.uint32),
        zero + c2.to(tl.uint32),
        zero + c3.to(tl.uint32),
    )
    one = tl.arange(0, 1)
    for place in tl.static_range(4):
        tl.store(out + place + one, words[place].to(tl.int64))


def known(counter: tuple[int, ...], key: tuple[int, int]) -> np.ndarray:
    out, whole = torch.empty(4, dtype=torch.int64), key[1] << 32 | key[0]
    _known[(1,)](out, torch.tensor(counter), whole - 2**64 if whole >= 2**63 else whole)
    return out.numpy()


found = {"known": np.array([known(counter, key) for counter, key, _ in KNOWN])}
for key in (1, KEY):
    for count in (1, 3, 1027):
        found[f"words-{key}-{count}"] = generate(key, numbers(SAMPLES), count, torch.int64).numpy()
        found[f"normal-{key}-{count}"] = generate(key, numbers(SAMPLES), count, torch.float32).numpy()
np.savez(sys.argv[1], **found)
