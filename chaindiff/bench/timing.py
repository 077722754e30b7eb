"""Timing: the sides of a case take turns, each repeat beside a reference workload that never changes."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from chaindiff.bench.suite import SideResult

LEAST = 3  # repeats, however long they take
ENOUGH = 0.02  # seconds: shorter calls are timed several at a time


@dataclass
class Side:
    """One way to do a case's work: `run` does it once, and returns the seconds if it measures them itself.

    A call makes `count`; `warm` calls are not timed; `missing` says why it cannot run; `keeps` lives as long as it.
    """

    run: Callable[[], Any] = bool
    count: float = 1.0
    facts: dict[str, float] = field(default_factory=dict)
    missing: str = ""
    warm: int = 2
    keeps: Any = None

    def time(self, calls: int = 1) -> float:
        """Seconds of one call, the mean of several in a row."""
        began = time.perf_counter()
        for _ in range(calls):
            said = self.run()
        elapsed = time.perf_counter() - began
        return said if isinstance(said, float) else elapsed / calls


def measure(sides: Mapping[str, Side], beside: str, repeats: int, turn: float = 2.0) -> dict[str, SideResult]:
    """Time every side `repeats` times in turns; fewer, but at least 3, where a turn takes over `turn` seconds."""
    reference, able = REFERENCES[beside], {name: side for name, side in sides.items() if not side.missing}
    calls = {}
    for name, side in able.items():  # compilation, caches and first allocations are not timed
        calls[name] = math.ceil(ENOUGH / min([ENOUGH, *[side.time() for _ in range(side.warm)][-1:]]))
    seconds: dict[str, list[float]] = {name: [] for name in able}
    around: dict[str, list[float]] = {name: [] for name in able}
    names, end = [*able], time.perf_counter() + repeats * turn
    for number in range(repeats):
        if number >= LEAST and time.perf_counter() > end:
            break
        before = reference()
        for name in names:
            seconds[name].append(able[name].time(calls[name]))
            after = reference()
            around[name].append((before + after) / 2)
            before = after
        names = [*names[1:], *names[:1]]
    return {
        name: SideResult(
            seconds=seconds.get(name, []), beside=around.get(name, []), count=s.count, facts=s.facts, missing=s.missing
        )
        for name, s in sides.items()
    }


def _compute() -> None:
    """Convolutions in float32 on all threads."""
    x, weight = torch.ones(16, 64, 32, 32), torch.ones(64, 64, 3, 3)
    for _ in range(4):
        F.silu(F.conv2d(x, weight, padding=1))


def _host() -> None:
    """Python on one thread."""
    table: dict[str, int] = {}
    for n in range(50_000):
        table[str(n % 997)] = table.get(str(n % 991), 0) + 1


def _process() -> None:
    """Starting Python and loading a library."""
    subprocess.run([sys.executable, "-c", "import numpy, email.message, unittest"], check=True)


REFERENCES = {"compute": partial(Side(_compute).time, 4), "host": Side(_host).time, "process": Side(_process).time}


def machine() -> dict[str, str]:
    """What figures depend on, besides versions."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": cpu, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads()), "gpu": gpu}
