"""docs/performance.md and its plots, from results of the suite."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from statistics import quantiles
from typing import Any

from chaindiff.bench.suite import CaseResult, Results
from chaindiff.commands.bench import ratio, table
from chaindiff.evaluation.tables import Table, markdown
from chaindiff.io.errors import UserError
from chaindiff.io.files import read_whole, write_whole
from chaindiff.show.plots import bars

PICTURES = "pictures/performance"
PLOTTED = ("evaluate-32", "evaluate-ffhq64", "train-32", "sample-32")

HEAD = """# Performance

Generated: do not edit. To measure again, on your own machine:

```
pip install -e ".[peers]"                       # diffusers, denoising-diffusion-pytorch
pip install --no-deps k-diffusion torchdiffeq torchsde trampoline   # its own dependencies hold numpy below 2
python -m benchmarks --json speed.json          # takes minutes; --edm FOLDER adds a checkout of NVlabs/edm
python -m benchmarks --write speed.json         # this page
python -m benchmarks --compare speed.json       # later: names what is slower than then, beyond noise
```

`chaindiff bench` measures the first few of these anywhere, without a checkout and without peers.

{machine}
{versions}
Measured {date}. Peers do the same work in the same run, in turns with chaindiff; the times are medians, the spread is
(largest - smallest) / median, and ratios are medians over turns. FLOPs are counted by `torch.utils.flop_counter`, and
"EDM as published" is EDM's network with its authors' operations: eager float32, contiguous, resampling by depthwise
convolutions. It gives the output of chaindiff's network from the same weights, which a test checks. Peers' networks
have {flops} of chaindiff's FLOPs. Weights are random, but for the emoji recipes, which have trained ones.
Ratios within one run count; absolute times are this machine's, and other work on it slows some rows more than others.
"""


def write_page(results: Results, docs: Path, quality: Path | None = None, note: str = "") -> Path:
    """Write the page. `quality`: the output of `benchmarks.equal_quality`; raises UserError if it is something else."""
    parts = [_head(results), *([f"**{note}**\n"] if note else []), "## Against peers\n", markdown(versus(results)), ""]
    for name in PLOTTED:
        if name in results.cases and (png := plot(results.cases[name])):
            write_whole(docs / PICTURES / f"{name}.png", png)
            parts.append(f"![{results.cases[name].about}]({PICTURES}/{name}.png)")
    if quality is not None:
        parts += ["\n## At equal quality\n", *_quality(quality)]
    for group, cases in groupby(results.cases.items(), key=lambda item: item[1].group):
        parts.append(f"\n## {group.capitalize()}")
        for name, case in cases:
            parts += [f"\n`{name}`: {case.about}.\n", markdown(table(case))]
    write_whole(docs / "performance.md", "\n".join(parts) + "\n")
    return docs / "performance.md"


def _head(results: Results) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in results.versions.items())
    work = [case.sides for name, case in results.cases.items() if name.startswith("evaluate")]
    ours = [(sides["chaindiff"].facts["flops"], other.facts) for sides in work for other in sides.values()]
    shares = [facts["flops"] / own for own, facts in ours if "flops" in facts]
    flops = f"{min(shares, default=1):.0%} to {max(shares, default=1):.0%}"
    said = {"machine": f"Machine: {machine}.", "versions": f"Versions: {versions}.", "date": results.date}
    return HEAD.format(**said, flops=flops)


def versus(results: Results) -> Table:
    """How many times as fast as every peer chaindiff does the same work, by case."""
    rows = {name: case for name, case in results.cases.items() if "EDM as published" in case.sides}
    peers = list(dict.fromkeys(side for case in rows.values() for side in case.sides if side != "chaindiff"))
    return [
        ["chaindiff is this many times as fast as", *peers],
        *([case.about, *(_times(case, peer) for peer in peers)] for case in rows.values()),
    ]


def _times(case: CaseResult, peer: str) -> str:
    side = case.sides.get(peer)
    return f"{ratio(side, case.sides['chaindiff']):.2f}" if side and side.seconds else side.missing if side else ""


def plot(case: CaseResult) -> bytes | None:
    """What every side makes a second, with its quartiles."""
    shown: dict[str, tuple[float, float, float]] = {}
    for name, side in case.sides.items():
        if len(side.seconds) > 1:
            high, middle, low = (side.count / q for q in quantiles(side.seconds, n=4, method="inclusive"))
            shown[name] = (middle, low, high)
    return bars(shown, case.about, f"{case.unit} a second") if shown else None


def _quality(path: Path) -> Iterable[str]:
    try:
        rows: list[Mapping[str, Any]] = json.loads(read_whole(path))["rows"]
        judges = [*rows[0]["fd"]]
        cells = [
            [
                *map(str, (row["recipe"], row["side"], row["evaluations"])),
                *(f"{value:.3g}" for value in (row["images_per_second"], row["faster"], *row["fd"].values())),
            ]
            for row in rows
        ]
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError("is no output of `python -m benchmarks.equal_quality`", str(path)) from None
    yield f"{rows[0]['count']:,} samples a row, against the training images; Fréchet distances (FD) by two judges.\n"
    head = ["recipe", "", "evaluations", "images a second", "times as fast", *(f"FD {judge}" for judge in judges)]
    yield markdown([head, *cells])
