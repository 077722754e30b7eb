"""The page of a run: one HTML file that holds everything it shows. No scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template
from typing import TypeVar

from chaindiff.io.files import write_whole

Number = TypeVar("Number", int, float)


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
    """What the page of a run shows; every string is plain text, `chain_svg` excepted.

    `provenance`: heading -> name -> value, such as {"Weights": {"stages/clip": "sha256 ..."}, "Versions": {...}}.
    `recipe`: the locked recipe. `banner`: a line on top, such as that a smoke run is no result.
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


def write_report(path: str | os.PathLike[str], page: Page) -> None:
    """Writes the page, whole or not at all."""
    write_whole(path, html(page))


def html(page: Page) -> str:
    """The page as one self-contained HTML document."""
    body = "\n".join(part for part in _parts(page) if part)
    template = files("chaindiff").joinpath("report_template.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(page.title), body=body)


def _parts(page: Page) -> Iterable[str]:
    if page.banner:
        yield f'<p class="banner" role="note">{escape(page.banner)}</p>'
    yield f"<h1>{escape(page.title)}</h1>"
    if page.description:
        yield f'<p class="description">{escape(page.description)}</p>'
    if page.chain_svg:  # as an image: whatever it holds, nothing in it runs
        image = _image("image/svg+xml", page.chain_svg.encode(), "the chain, from left to right")
        yield f'<h2>Chain</h2>\n<div class="wide chain">{image}</div>'
    if page.pictures:
        yield f'<h2>Samples</h2>\n<div class="grids">{"".join(map(_figure, page.pictures))}</div>'
    if page.stages:
        yield f'<h2>Plan and cost</h2>\n<div class="wide">{_stage_table(page.stages)}</div>'
    for section in page.sections:
        yield from _section(section)
    for heading, entries in page.provenance.items():
        if entries:
            yield f"<h2>{escape(heading)}</h2>\n{_definitions(entries)}"
    if page.recipe:
        yield f"<details><summary>The locked recipe</summary>\n<pre>{escape(page.recipe)}</pre></details>"


def _section(section: Section) -> Iterable[str]:
    yield f"<h2>{escape(section.title)}</h2>"
    if section.note:
        yield f'<p class="description">{escape(section.note)}</p>'
    if section.table:
        head, *rows = (
            "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(("th", *["td"] * len(section.table)), section.table, strict=False)
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        yield f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if section.pictures:
        yield f'<div class="grids smooth">{"".join(map(_figure, section.pictures))}</div>'


def _image(kind: str, data: bytes, alt: str) -> str:
    return f'<img src="data:{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


def _figure(picture: Picture) -> str:
    caption = f" · {escape(picture.caption)}" if picture.caption else ""
    image = _image("image/png", picture.png, picture.title)
    return f"<figure><figcaption><b>{escape(picture.title)}</b>{caption}</figcaption>{image}</figure>"


def _definitions(entries: Mapping[str, object]) -> str:
    rows = (f'<dt>{escape(str(k))}</dt><dd class="mono">{escape(_plain(v))}</dd>' for k, v in entries.items())
    return f"<dl>{''.join(rows)}</dl>"


def _plain(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _stage_table(stages: Sequence[StageRow]) -> str:
    """Costs per stage with their shares; a share or a total needs every stage's number."""
    gflops, seconds = _total(s.gflops for s in stages), _total(s.seconds for s in stages)
    parameters, nfe = _total(s.parameters for s in stages), _total(s.nfe for s in stages)
    titles = ("stage", "generates", "network", "parameters", "NFE", "GFLOPs per sample", "share", "seconds")

    def row(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{escape(c)}</{tag}>' if i > 2 else f"<{tag}>{escape(c)}</{tag}>"
            for i, c in enumerate(cells)
        )

    lines = [f"<thead><tr>{row('th', titles)}</tr></thead><tbody>"]
    for s in stages:
        share = f"{s.gflops / gflops:.0%}" if gflops and s.gflops is not None else "–"
        cells = (s.name, s.what, s.network, count(s.parameters), _whole(s.nfe), _digits(s.gflops), share)
        lines.append(f"<tr>{row('td', (*cells, _digits(s.seconds)))}</tr>")
    whole = "100%" if gflops else "–"
    total = ("total", "", "", count(parameters), _whole(nfe), _digits(gflops), whole, _digits(seconds))
    lines.append(f"</tbody><tfoot><tr>{row('td', total)}</tr></tfoot>" if len(stages) > 1 else "</tbody>")
    return f"<table>{''.join(lines)}</table>"


def _total(values: Iterable[Number | None]) -> Number | None:
    known = list(values)
    return None if None in known else sum(v for v in known if v is not None)  # type: ignore[return-value]


def count(number: int | None) -> str:
    """A count for people: 1.83 M."""
    if number is None:
        return "–"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _whole(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _digits(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
