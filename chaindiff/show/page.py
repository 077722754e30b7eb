"""The page of a run: one HTML file that holds everything it shows. No scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chaindiff.io.files import write_whole


@dataclass(frozen=True)
class Picture:
    """A grid of samples, as the bytes of a PNG file."""

    title: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class StageRow:
    """One stage of the plan. None: not known, shown as a dash."""

    name: str
    what: str = ""  # such as "image given clip, image16"
    network: str = ""
    parameters: int | None = None
    nfe: int | None = None  # network evaluations per sample
    gflops: float | None = None  # per sample, all evaluations
    seconds: float | None = None  # for all samples of the run


@dataclass(frozen=True)
class Section:
    """A part of the page: a note, a table whose first row has the titles, and pictures."""

    title: str
    note: str = ""
    table: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Page:
    """What the page of a run shows; every string but `chain_svg` is plain text.

    `provenance`: heading -> name -> value, such as {"Weights": {"stages/clip": "sha256 ..."}, "Versions": {...}}.
    `recipe`: the locked recipe. `banner`: a line on top, such as that a smoke run is not a result. `shows`: a
    fingerprint of its content.
    """

    title: str
    description: str = ""
    banner: str = ""
    chain_svg: str = ""
    pictures: Sequence[Picture] = ()
    stages: Sequence[StageRow] = ()
    sections: Sequence[Section] = ()
    provenance: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    recipe: str = ""
    shows: str = ""


def write_report(path: str | os.PathLike[str], page: Page) -> None:
    """Writes the page, whole or not at all."""
    write_whole(path, html(page))


def html(page: Page) -> str:
    """The page as one self-contained HTML document."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # which only pages need

    templates = Environment(loader=PackageLoader("chaindiff", "show"), autoescape=True, undefined=StrictUndefined)
    templates.keep_trailing_newline = True
    templates.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return templates.get_template("page.html.jinja").render(page=page, stages=_stage_table(page.stages))


def _stage_table(stages: Sequence[StageRow]) -> Sequence[Sequence[str]]:
    """Titles, costs per stage with their shares, and totals; a share or total needs every stage's number."""
    known = ([getattr(s, name) for s in stages] for name in ("parameters", "nfe", "gflops", "seconds"))
    total = StageRow("total", "", "", *(None if None in values else sum(values) for values in known))
    lines = [("stage", "generates", "network", "parameters", "NFE", "GFLOPs per sample", "share", "seconds")]
    for s in (*stages, total):
        share = f"{s.gflops / total.gflops:.0%}" if total.gflops and s.gflops is not None else "–"
        size = "–" if s.parameters is None else amount(s.parameters).strip()
        cells = (s.name, s.what, s.network, size, _digits(s.nfe), _digits(s.gflops), share)
        lines.append((*cells, _digits(s.seconds)))
    return lines


def amount(value: float) -> str:
    """A number with a unit prefix: 83.7 G."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:
            return f"{value / power:.3g} {prefix}"
    return f"{value:.3g} "


def _digits(number: float | None) -> str:
    """Three significant digits; all digits of integers and of numbers from 1,000."""
    if number is None:
        return "–"
    return f"{number:,.0f}" if isinstance(number, int) or number >= 1000 else f"{number:.3g}"
