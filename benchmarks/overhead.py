"""What sampling spends outside its networks: `python -m benchmarks.overhead [RECIPE]`.

A step's overhead is the same for every step: it is measured without the first, which prepares the others. Use one
thread and its own clock where other programs compete for the machine (`--alone`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import chaindiff as cd
from chaindiff.chain.diffusion import Diffusion


def overhead(
    stage: Diffusion,
    given: dict[str, torch.Tensor] | None = None,
    *,
    batch: int = 64,
    steps: int = 18,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of a sampling's steps but the first: `total`, `network` (inside it), and their `share` outside it.

    The medians of some repeats, after one that does not count.
    """
    given = {v.name: torch.randn(batch, *v.shape) for v in stage.given} if given is None else given
    network, inside = stage.network, [0.0]
    forward = network.forward

    def timed(*arguments: Any, **named: Any) -> Any:
        _finished(stage)
        began = clock()
        found = forward(*arguments, **named)
        _finished(stage)
        inside[0] += clock() - began
        return found

    network.forward = timed
    try:
        runs = []
        for _ in range(repeats + 1):
            states = stage.sample(given, cd.Draws(range(batch), 0, 0, stage.name), sampler={"steps": steps})
            next(states)
            inside[0], began = 0.0, clock()
            for _ in states:
                pass
            _finished(stage)
            runs.append((clock() - began, inside[0]))
    finally:
        network.forward = forward
    total, own = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    return {"total": total, "network": own, "share": total / own - 1}


def _finished(stage: Diffusion) -> None:
    if stage.like.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="vcdm_emoji")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="one thread, timed by its own clock")
    said = parser.parse_args()
    if said.alone:
        torch.set_num_threads(1)
    chain = cd.load(said.recipe)
    clock = time.thread_time if said.alone else time.perf_counter
    for name, stage in chain.stages.items():
        if isinstance(stage, Diffusion):
            found = overhead(stage, batch=said.batch, steps=said.steps, clock=clock)
            print(json.dumps({"stage": name, "batch": said.batch, **found}), flush=True)


if __name__ == "__main__":
    main()
