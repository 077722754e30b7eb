"""Whether the kernels pay, on a CUDA machine: `python -m benchmarks.kernels [--out kernels.json]`.

For every kernel its time and its share of the memory bandwidth beside the plain operations, eager and compiled, in both
memory formats. Then the verdict: an evaluation and a training step of the FFHQ-64 network, in bf16 and channels-last,
eager and compiled, with kernels and without. A kernel stays if it wins 5% end to end against the best without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import chaindiff as cd
from chaindiff.edm.solvers import Row
from chaindiff.kernels import dispatch
from chaindiff.kernels.group_norm import group_norm_silu
from chaindiff.kernels.sums import weighted_error, weighted_sum

WORTH = 0.05
SIDES = [(128, 64), (256, 32), (256, 16), (256, 8)]  # channels and side of the FFHQ-64 network's values


def milliseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """The median, after warming up."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a second of a copy of 1 GiB."""
    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) * 1e3


def ways(run: Callable[..., Any]) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """The ways to run an operation: name, function, whether kernels are used."""
    yield "kernel", run, True
    yield "eager", run, False
    yield "compiled", torch.compile(run, dynamic=False), False


def operations(batch: int) -> Iterator[tuple[str, str, Callable[..., Any], list[Tensor], int]]:
    """Name, memory format, operation, inputs, and the bytes that it must read and write."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for channels, side in SIDES:
            x = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.bfloat16)
            x = x.contiguous(memory_format=layout)
            added, weight = x.new_ones(batch, channels), torch.ones(channels, device="cuda")

            def norm(x: Tensor, added: Tensor, weight: Tensor) -> Tensor:
                return group_norm_silu(x, 32, weight, weight, 1e-6, added=added)

            def trained(x: Tensor, added: Tensor, weight: Tensor) -> Tensor:
                return torch.autograd.grad(norm(x, added, weight).sum(), x)[0]

            name = f"{channels}x{side}x{side}"
            yield f"group norm, silu {name}", str(layout), norm, [x, added, weight], 2 * x.nbytes
            # Forward: x, y. Backward: x, the gradient, its result.
            own = x.detach().requires_grad_()
            yield f"with gradient {name}", str(layout), trained, [own, added, weight], 5 * x.nbytes
    x, f = (torch.randn(batch, 3, 64, 64, device="cuda") for _ in range(2))
    half, sigma = f.bfloat16(), torch.rand(batch, device="cuda")
    row = Row(x=0.5, kept=0.5, clean=0.2, before=0.1)
    yield "c_skip x + c_out F", "", lambda x, f, s: weighted_sum((s, x), (s, f)), [x, half, sigma], int(2.5 * x.nbytes)
    yield "y + sigma n", "", lambda x, f, s: weighted_sum((1.0, x), (s, f)), [x, f, sigma], 3 * x.nbytes
    yield "weighted error", "", lambda x, f, s: weighted_error(x, f, s), [x, f, sigma], 2 * x.nbytes
    yield "row of Heun", "", lambda x, f: row(x, f, f, f, f), [x, f], 3 * x.nbytes


def each(batch: int, peak: float) -> Iterator[dict[str, Any]]:
    for name, layout, run, inputs, nbytes in operations(batch):
        times = {}
        for way, function, dispatch.enabled in ways(run):
            torch.compiler.reset()
            times[way] = milliseconds(lambda f=function, given=inputs: f(*given))
        best = min(time for way, time in times.items() if way != "kernel")
        share = nbytes / (times["kernel"] * 1e-3) / peak
        yield {"operation": name, "layout": layout, "ms": times, "bandwidth": share, "best_baseline_ms": best}


def whole(batch: int) -> Iterator[dict[str, Any]]:
    """An evaluation and a training step of the FFHQ-64 network."""
    spec = cd.UNet(channels=128, mult=[1, 2, 2, 2], blocks=4, attention=[16], dropout=0.0)
    torch.manual_seed(0)
    stage = cd.Diffusion(cd.Variable.image("image", 3, 64), network=spec).cuda()
    stage.to(memory_format=torch.channels_last)
    stage.autocast = torch.bfloat16
    x = torch.randn(batch, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    sigma, condition = torch.ones(batch, device="cuda"), stage.conditioner({}, batch, x)

    def evaluation() -> None:
        with torch.no_grad():
            stage.denoise({"image": x}, {"image": sigma}, condition)

    def step() -> None:
        stage.zero_grad()
        (stage.denoise({"image": x}, {"image": sigma}, condition).x0["image"] - x).square().mean().backward()

    eager = stage.network.forward
    for what, run in (("evaluation", evaluation), ("training step", step)):
        times = {}
        for way in ("eager", "compiled"):
            for dispatch.enabled in (False, True):
                torch.compiler.reset()
                stage.network.forward = torch.compile(eager, dynamic=False) if way == "compiled" else eager
                times[f"{way}{', kernels' if dispatch.enabled else ''}"] = milliseconds(run, 15)
        stage.network.forward = eager
        best = min(time for way, time in times.items() if "kernels" not in way)
        ours = min(time for way, time in times.items() if "kernels" in way)
        verdict = "keep" if ours * (1 + WORTH) <= best else "remove"
        yield {"FFHQ-64": what, "batch": batch, "ms": times, "gain": best / ours - 1, "verdict": verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    said = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels times kernels for CUDA, and torch finds no CUDA device here")
    if not dispatch.TRITON:
        sys.exit("benchmarks.kernels needs Triton: pip install triton")
    peak = bandwidth()
    rows: list[dict[str, Any]] = [
        {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_second": peak}
    ]
    print(json.dumps(rows[0]), flush=True)
    for part in (each(said.batch, peak), whole(said.batch)):
        for row in part:
            rows.append(row)
            print(json.dumps(row), flush=True)
    said.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
