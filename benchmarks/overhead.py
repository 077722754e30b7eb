"""What sampling spends outside its networks: `python -m benchmarks.overhead [RECIPE]`.

Of every step but the first, which prepares the others, the seconds inside and outside the network are taken, and of
both the medians over all steps: what interrupts some steps changes neither. On a CPU torch has one thread meanwhile,
and the clock is that of the process, so that other programs hardly count.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch

import chaindiff as cd
from chaindiff.chain.diffusion import Diffusion


def overhead(
    stage: Diffusion,
    given: dict[str, torch.Tensor] | None = None,
    *,
    batch: int = 64,
    least: int = 20,
    **sampler: Any,
) -> dict[str, float]:
    """Of at least so many steps: the median seconds inside the `network` and `outside`, and their `share`."""
    given = {v.name: torch.randn(batch, *v.shape) for v in stage.given} if given is None else given
    network, threads, marks = stage.network, torch.get_num_threads(), [0.0]
    forward, clock = network.forward, _on_gpu if stage.like.is_cuda else time.process_time

    def timed(*arguments: Any, **named: Any) -> Any:
        marks.append(clock())
        found = forward(*arguments, **named)
        marks.append(clock())
        return found

    network.forward = timed
    torch.set_num_threads(threads if stage.like.is_cuda else 1)
    inside, outside = [], []
    try:
        while len(inside) < least:
            states = stage.sample(given, cd.Draws(range(batch), 0, 0, stage.name), sampler=sampler)
            next(states)
            marks[:] = [clock()]
            for _ in states:
                began, *pairs = marks
                marks[:] = [clock()]
                inside.append(sum(pairs[1::2]) - sum(pairs[0::2]))
                outside.append(marks[0] - began - inside[-1])
    finally:
        network.forward = forward
        torch.set_num_threads(threads)
    return {"network": median(inside), "outside": median(outside), "share": median(outside) / median(inside)}


def _on_gpu() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="vcdm_emoji")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="at least so many of every stage are measured")
    said = parser.parse_args()
    for name, stage in cd.load(said.recipe).stages.items():
        if isinstance(stage, Diffusion):
            found = overhead(stage, batch=said.batch, least=said.steps)
            print(json.dumps({"stage": name, "batch": said.batch, **found}), flush=True)


if __name__ == "__main__":
    main()
