"""Everything that a checkout measures: the package's cases, and those below."""

from __future__ import annotations

from chaindiff.bench import suite
from chaindiff.bench.suite import Case

WORKS, PROCESSES = "benchmarks.works", "benchmarks.processes"
CASES = suite.CASES | {
    "sample-32": Case("sampling", "16 images of 32x32 by a DDPM++, 11 evaluations", "images", WORKS),
    "overhead-image": Case(
        "overhead", "a step of sampling 64 images, in its network and outside", "evaluations", WORKS
    ),
    "overhead-prior": Case("overhead", "likewise of 64 embeddings", "evaluations", WORKS),
    "norm-silu": Case("kernels", "GroupNorm, then SiLU, of [64, 64, 32, 32] channels-last", "calls", WORKS),
    "affine-update": Case("kernels", "one row of a solver's table on [64, 3, 32, 32] in float64", "calls", WORKS),
    "precondition": Case("kernels", "the denoiser of 64 images around a network that costs nothing", "images", WORKS),
    "noise": Case("kernels", "noise of 64 samples of [3, 32, 32], each by its own key", "images", WORKS, "host"),
    "cache": Case("data", "filling an embedding cache with 256 images; reading 128 of its rows", "rows", WORKS),
    "batches": Case("data", "128 images of 64x64, read and augmented for training", "images", WORKS),
    "resolve-line": Case("planning", "a chain whose stages are given the one before", "plans", WORKS, "host"),
    "resolve-fan": Case("planning", "a chain whose stages are given the five before", "plans", WORKS, "host"),
    "resolve-middle": Case("planning", "the same, with five variables of its middle given", "plans", WORKS, "host"),
    "start": Case("commands", "starting, planning, finding nothing to do", "commands", PROCESSES, "process"),
    "run": Case("commands", "the process of `chaindiff run vcdm_emoji`", "images", PROCESSES, "process"),
}
