"""`chaindiff bench`: how fast this is here, and whether it has become slower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from chaindiff.bench.regressions import Comparison, compare
from chaindiff.bench.suite import CASES, Case, CaseResult, Results, SideResult, chosen, read
from chaindiff.bench.timing import Side, machine, measure
from chaindiff.evaluation.tables import Table, plain
from chaindiff.io.progress import say, silenced
from chaindiff.show.page import amount

PACKAGES = ("chain-diffusion-models", "torch", "numpy", "diffusers", "denoising-diffusion-pytorch", "k-diffusion")
HEAD = ["", "a second", "time", "spread", "FLOP/s", "parameters", "FLOP", "memory", "of the first's time"]


def bench(
    names: Sequence[str] = (),
    repeats: int = 10,
    quick: bool = False,
    json: Path | None = None,
    against: Path | None = None,
    cases: Mapping[str, Case] = CASES,
    peers: Callable[[str], Mapping[str, Side]] = lambda case: {},
) -> tuple[Results, Comparison | None]:
    """Measure the cases of these names or groups, print tables, write JSON, and compare with the file `against`.

    `cases` is what there is to choose from; `peers` adds others' ways to do a case's work.
    Raises UserError for unknown names, and a file of something else.
    """
    asked, before = chosen(names, cases), None if against is None else read(against)
    versions = dict[str, str]()
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    found = Results(date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", machine=machine(), versions=versions, cases={})
    for name in asked:
        case = cases[name]
        own = getattr(import_module(case.home), name.replace("-", "_"))()
        with silenced():  # training and commands tell how far they are
            sides = measure({**own, **peers(name)}, case.beside, *((3, 0.5) if quick else (repeats, 2.0)))
        found.cases[name] = CaseResult(group=case.group, about=case.about, unit=case.unit, sides=sides)
        say("", f"{name}: {case.about}", *plain(table(found.cases[name])).splitlines())
        if json is not None:  # after each, in case the next is interrupted
            found.write(json)
    if before is None:
        return found, None
    same = {name: result for name, result in before.cases.items() if name in asked}
    compared = compare(before.model_copy(update={"cases": same}), found)
    unlike = [w for w in ("machine", "versions") if getattr(before, w) != getattr(found, w)]
    say(*(f"note: {what} differ from those of {against}" for what in unlike), *str(compared).splitlines())
    return found, compared


def table(case: CaseResult) -> Table:
    """A row for each side, without the columns that are empty for all."""
    first = next((side for side in case.sides.values() if side.seconds), SideResult())
    rows = [HEAD, *([name, *_cells(side, case.unit, first)] for name, side in case.sides.items())]
    return [[*cells] for cells in zip(*(c for c in zip(*rows, strict=True) if c[0] == "" or any(c[1:])), strict=True)]


def _cells(side: SideResult, unit: str, first: SideResult) -> list[str]:
    if not side.seconds:
        return [side.missing, *[""] * (len(HEAD) - 2)]
    time, flops = median(side.seconds), side.facts.get("flops", 0)
    rate = side.count / time
    return [
        f"{rate:.3g} {unit}",
        f"{time:.3g} s" if time >= 1 else f"{time * 1e3:.3g} ms",
        f"{(max(side.seconds) - min(side.seconds)) / time:.0%}",
        f"{amount(rate * flops)}FLOP/s" if flops else "",
        amount(side.facts["parameters"]).strip() if "parameters" in side.facts else "",
        f"{amount(flops)}FLOP" if flops else "",
        f"{amount(side.facts['peak_bytes'])}B" if "peak_bytes" in side.facts else "",
        f"{ratio(side, first):.2f}",
    ]


def ratio(side: SideResult, first: SideResult) -> float:
    """A side's time relative to another's, the median over turns."""
    return median(own / other for own, other in zip(side.seconds, first.seconds, strict=True))
