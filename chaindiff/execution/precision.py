"""bf16 against float32: both are evaluated for a few samples of a request, timed and compared."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from chaindiff.edm.denoiser import Denoiser, Levels, Prediction, State
from chaindiff.io.errors import UserError

if TYPE_CHECKING:
    from chaindiff.chain.chain import Chain
    from chaindiff.chain.diffusion import Diffusion
    from chaindiff.chain.request import Request

DTYPES = {"float32": None, "bf16": torch.bfloat16}
ERROR = 0.02  # the largest error of samples, relative to the data's deviation, at which `auto` takes bf16
SAMPLES, LEVELS = 8, 4  # of a request's first samples, drawn in so many steps


class Probe:
    """Goes around a stage's denoiser: evaluates it in every precision, and follows float32."""

    def __init__(self, stage: Diffusion):
        self.stage = stage
        self.seconds = dict.fromkeys(DTYPES, math.inf)  # of one evaluation for one sample: the fastest of all levels
        self.levels: list[Mapping[str, float]] = []
        self.errors: list[dict[str, float]] = []  # root mean square, at every level

    def around(self, inner: Denoiser) -> Denoiser:
        self.inner = inner
        return self

    def evaluations(self, sigma: Levels) -> int:
        return self.inner.evaluations(sigma)

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        found = {}
        count = len(next(iter(x.values()))) * self.inner.evaluations(sigma)
        for name, dtype in DTYPES.items():
            self.stage.autocast, began = dtype, time.perf_counter()
            found[name] = self.inner(x, sigma)
            if self.stage.like.is_cuda:
                torch.cuda.synchronize()
            self.seconds[name] = min(self.seconds[name], (time.perf_counter() - began) / count)
        right, other = found["float32"], found["bf16"]
        self.levels.append({v: float(sigma[v]) for v in right.x0})
        self.errors.append({v: (other.x0[v] - x0).square().mean().sqrt().item() for v, x0 in right.x0.items()})
        return right

    @property
    def error(self) -> float:
        """The error of samples in bf16, relative to the data's deviation: the largest of the stage's variables'.

        A step from s to s' adds (1 - s'/s) of the denoised value's error to the state, of which a sample keeps
        sd / sqrt(s'^2 + sd^2): the flow of EDM's eq. 4 for Gaussian data of deviation sd, in closed form.
        """
        totals = dict.fromkeys(self.errors[0], 0.0)
        for before, after, errors in zip(self.levels, [*self.levels[1:], {}], self.errors, strict=True):
            for v, error in errors.items():
                spread, end = self.stage.generates[v].sigma_data, after.get(v, 0.0)
                if before[v]:
                    totals[v] += error * (1 - end / before[v]) / math.hypot(end, spread)
        return max(totals.values())


def compare(chain: Chain, request: Request, names: list[str]) -> dict[str, Probe]:
    """Measure these stages on the first samples of a request, each given what the stages before it make.

    Stages whose settings do not fit so few steps are left out.
    """
    stages = dict(chain.diffusions(request))
    probes = {name: Probe(stages[name]) for name in names if name in stages}
    short = {"solver": "euler", "steps": LEVELS, "eta": 0.0}
    settings: dict[str, Mapping[str, Any]] = {name: {"sampler": short} for name in stages}
    for name, probe in probes.items():
        settings[name] = {"sampler": short, "wrap": probe.around}
    kept = {name: stages[name].autocast for name in probes}
    try:
        chain.part(replace(request, batch=min(SAMPLES, request.count), settings=settings), 0)
    except UserError:
        probes = {name: probe for name, probe in probes.items() if len(probe.errors) == LEVELS}
    finally:
        for name, dtype in kept.items():
            stages[name].autocast = dtype
        chain.seconds.clear()
    return probes
