"""The page of a run, read back with the parser of the standard library."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chaindiff.show.drawing import Arrow, Box, chain_svg
from chaindiff.show.images import grid, png_bytes
from chaindiff.show.page import Page, Picture, Section, StageRow, amount, html, write_report

NASTY = "<script>alert('x')</script> & \"quoted\" $body ${title}"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Tags, attributes and text of a page; checks that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def sources(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


def page(**changes: object) -> Page:
    images = grid(torch.rand(4, 3, 8, 8) * 2 - 1)
    content: dict = {
        "title": "vcdm_emoji",
        "description": "clip, then image",
        "chain_svg": chain_svg([Box("clip"), Box("image")], [Arrow("clip", "image")]),
        "pictures": [Picture("image", png_bytes(images), "4 samples")],
        "stages": [
            StageRow("clip", "clip given label", "prior", 4_900_000, 35, 1.0, 3.25),
            StageRow("image", "image given clip", "unet", 1_830_000, 35, 3.0, 1234.5),
        ],
        "sections": [Section("Metrics", "KID of 1,000 samples")],
        "provenance": {"Weights": {"clip": "sha256 abc"}, "Seeds": {"samples": 0}, "Empty": {}},
        "recipe": "name: vcdm_emoji\n",
    }
    return Page(**{**content, **changes})


def test_the_page_holds_everything_and_loads_nothing() -> None:
    text = html(page())
    reader = Reader(text)
    everything = "".join(reader.text)
    for part in ("clip, then image", "4 samples", "KID of 1,000 samples", "sha256 abc", "name: vcdm_emoji", "Seeds"):
        assert part in everything
    assert "Empty" not in everything
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert {"details", "summary"} <= set(reader.tags)
    assert len(reader.sources()) == 2 and all(s.startswith("data:image/") for s in reader.sources())
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert ("meta", "content", "width=device-width, initial-scale=1") in reader.attributes
    assert all(value for tag, name, value in reader.attributes if (tag, name) == ("img", "alt"))


def test_pictures_come_back_bit_for_bit() -> None:
    content = page()
    svg, png = (base64.b64decode(source.split(",", 1)[1]) for source in Reader(html(content)).sources())
    assert svg.decode() == content.chain_svg and png == content.pictures[0].png
    assert np.asarray(Image.open(io.BytesIO(png))).shape[2] == 3


def test_everything_is_escaped() -> None:
    nasty = page(
        title=NASTY, description=NASTY, banner=NASTY, chain_svg=NASTY, recipe=NASTY,
        pictures=[Picture(NASTY, b"", NASTY)], stages=[StageRow(NASTY, NASTY, NASTY)],
        sections=[Section(NASTY, NASTY, [[NASTY], [NASTY]], [Picture(NASTY, b"", NASTY)])],
        provenance={NASTY: {NASTY: NASTY}},
    )  # fmt: skip
    text = html(nasty)
    reader = Reader(text)
    assert "<script>" not in text and "script" not in reader.tags
    assert "".join(reader.text).count(NASTY) == 19  # all but the chain, which is data
    assert reader.attributes.count(("img", "alt", NASTY)) == 2


def test_table_of_costs() -> None:
    cells = Reader(html(page())).cells
    rows = [cells[i : i + 8] for i in range(0, len(cells), 8)]
    assert rows == [
        ["stage", "generates", "network", "parameters", "NFE", "GFLOPs per sample", "share", "seconds"],
        ["clip", "clip given label", "prior", "4.9 M", "35", "1", "25%", "3.25"],
        ["image", "image given clip", "unet", "1.83 M", "35", "3", "75%", "1,234"],
        ["total", "", "", "6.73 M", "70", "4", "100%", "1,238"],
    ]


def test_a_section_has_a_table_with_a_head() -> None:
    table = [["row", "KID"], ["EDM", "0.02"]]
    reader = Reader(html(Page("run", sections=[Section("Links", table=table)])))
    assert reader.cells == ["row", "KID", "EDM", "0.02"] and reader.tags.count("th") == 2


def test_unknown_numbers_are_dashes_and_make_no_totals() -> None:
    stages = [StageRow("a", nfe=3, gflops=1.0, parameters=10), StageRow("b", nfe=4)]
    cells = Reader(html(page(stages=stages))).cells
    assert cells[8:16] == ["a", "", "", "10", "3", "1", "–", "–"]
    assert cells[16:24] == ["b", "", "", "–", "4", "–", "–", "–"]
    assert cells[24:] == ["total", "", "", "–", "7", "–", "–", "–"]


def test_one_stage_needs_no_total() -> None:
    reader = Reader(html(page(stages=[StageRow("a", nfe=3)])))
    assert len(reader.cells) == 2 * 8 and "tfoot" not in reader.tags


def test_an_empty_page_is_a_page() -> None:
    reader = Reader(html(Page("run")))
    assert "h1" in reader.tags and not {"table", "img", "details", "h2", "dl"} & set(reader.tags)


def test_banner_comes_first() -> None:
    assert "banner" not in Reader(html(page())).tags
    text = html(page(banner="Smoke run"))
    assert text.index("Smoke run") < text.index("<h1>")
    assert 'class="banner"' not in html(page())


def test_counts_for_people() -> None:
    numbers = {0: "0", 999: "999", 1000: "1 k", 62_345_678: "62.3 M", 999_999: "1 M", 10**12: "1 T"}
    assert {n: amount(n).strip() for n in numbers} == numbers


def test_write_report_replaces_the_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    for _ in range(2):
        write_report(tmp_path / "run" / "report.html", page())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["report.html"]
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
