"""Our own side of every case, by pytest-benchmark: `pytest benchmarks`. `python -m benchmarks` has peers beside it."""

from __future__ import annotations

from importlib import import_module

import pytest

from benchmarks.suite import CASES


@pytest.mark.parametrize("name", CASES)
def test_speed(benchmark, name: str) -> None:
    sides = getattr(import_module(CASES[name].home), name.replace("-", "_"))()
    ours = next(side for label, side in sides.items() if label.startswith("chaindiff"))
    benchmark.extra_info.update(ours.facts, about=CASES[name].about)
    benchmark.pedantic(ours.run, rounds=5, warmup_rounds=1)
    assert benchmark.stats.stats.min > 0
