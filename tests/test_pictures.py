"""Grids against PIL and numpy; the picture of a chain by what its SVG says and what its PNG shows."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from chaindiff.io.errors import UserError
from chaindiff.show import drawing
from chaindiff.show.drawing import Arrow, Box, chain_png, chain_svg
from chaindiff.show.images import grid, png_bytes, save_png, to_image, to_uint8

SVG = "{http://www.w3.org/2000/svg}"


# ------------------------------------------------------------ images


def test_to_uint8_rounds_to_the_nearest_level() -> None:
    levels = torch.arange(256)
    exact = levels / 127.5 - 1
    assert torch.equal(to_uint8(exact), levels.to(torch.uint8))
    assert torch.equal(to_uint8(exact + 0.49 / 127.5), levels.to(torch.uint8))
    assert torch.equal(to_uint8(exact - 0.49 / 127.5), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        to_uint8(torch.tensor([0.0, bad]))


def test_to_image_keeps_channels_and_axes() -> None:
    x = torch.rand(3, 4, 6) * 2 - 1
    image = to_image(x)
    assert image.size == (6, 4) and image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[1, 5], to_uint8(x)[:, 1, 5].numpy())
    grey = to_image(x[:1])
    assert grey.mode == "L" and grey.getpixel((5, 1)) == to_uint8(x)[0, 1, 5]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_tile(channels: int) -> None:
    images = torch.rand(5, channels, 4, 6) * 2 - 1
    sheet = np.asarray(grid(images, columns=2, scale=3, pad=2))
    assert sheet.shape == (3 * (4 * 3 + 2) + 2, 2 * (6 * 3 + 2) + 2, 3)
    left = np.full_like(sheet, 255)
    for i in range(5):
        tile = to_uint8(images[i]).numpy().transpose(1, 2, 0).repeat(3, axis=0).repeat(3, axis=1)
        y, x = 2 + 14 * (i // 2), 2 + 20 * (i % 2)
        left[y : y + 12, x : x + 18] = tile
    np.testing.assert_array_equal(sheet, left)  # and white everywhere else


@pytest.mark.parametrize("size, scale", [(8, 8), (16, 4), (32, 2), (48, 2), (64, 1), (256, 1)])
def test_small_images_are_enlarged(size: int, scale: int) -> None:
    assert grid(torch.zeros(1, 3, size, size), pad=0).size == (size * scale, size * scale)


def test_columns_make_a_square_by_default() -> None:
    assert grid(torch.zeros(64, 3, 64, 64), pad=0).size == (512, 512)
    assert grid(torch.zeros(5, 3, 64, 64), pad=0).size == (192, 128)
    assert grid(torch.zeros(2, 3, 64, 64), columns=8, pad=0).size == (128, 64)


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(UserError, match="at least one image"):
        grid(torch.zeros(0, 3, 4, 4))


def test_save_png_is_lossless_and_leaves_nothing_else(tmp_path: Path) -> None:
    image = grid(torch.rand(4, 3, 8, 8) * 2 - 1)
    save_png(image, tmp_path / "deep" / "grid.png")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["grid.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "deep" / "grid.png")), np.asarray(image))
    assert png_bytes(image) == (tmp_path / "deep" / "grid.png").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match=r"cannot write .*grid\.png: disk full"):
        save_png(grid(torch.zeros(1, 3, 4, 4)), path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["grid.png"]


# ------------------------------------------------------------ chains

BOXES = [
    Box("label", ["label · 12", "empirical"], "source"),
    Box("stage clip", ["prior", "4.9 M parameters"], "stage", "clip stage"),
    Box("clip", ["vector · 128"], "given"),
    Box("stage image16", ["unet"], "stage"),
    Box("image16", ["image · 3 x 16 x 16"]),
    Box("stage image", ["unet", "1.8 M parameters", "60% of the cost"], "stage"),
    Box("image", ["image · 3 x 32 x 32"], "wanted"),
]
ARROWS = [
    Arrow("label", "stage clip"),
    Arrow("stage clip", "clip"),
    Arrow("clip", "stage image16"),
    Arrow("stage image16", "image16"),
    Arrow("image16", "stage image", "σ ≤ 0.5", "noisy"),
    Arrow("clip", "stage image"),
    Arrow("stage image", "image"),
    Arrow("image", "clip", "CLIP", "encoder"),
    Arrow("image", "image16", "resize", "encoder"),
]


def sample_bezier(points: list[drawing.Point]) -> np.ndarray:
    t = np.linspace(0, 1, 60)[:, None]
    pieces = []
    for i in range(0, len(points) - 1, 3):
        a, b, c, d = (np.array(p) for p in points[i : i + 4])
        pieces.append((1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d)
    return np.concatenate(pieces)


def chains() -> list[tuple[list[Box], list[Arrow]]]:
    fork = [
        Box(n, ["line"], "stage" if n.startswith("s") else "variable") for n in ("a", "s1", "b", "s2", "c", "s3", "d")
    ]
    arrows = ["a s1", "s1 b", "a s2", "b s2", "s2 c", "b s3", "a s3", "c s3", "s3 d"]
    return [
        (BOXES, ARROWS),
        (fork, [Arrow(*a.split()) for a in arrows] + [Arrow("d", n, "e", "encoder") for n in "abc"]),
    ]


@pytest.mark.parametrize("boxes, arrows", chains())
def test_layout_has_no_overlaps_and_runs_from_left_to_right(boxes: list[Box], arrows: list[Arrow]) -> None:
    at, curves = drawing._layout(boxes, arrows)
    assert set(at) == {box.name for box in boxes}
    for a, b in itertools.combinations(at.values(), 2):
        apart_x = abs(a.x - b.x) >= (a.width + b.width) / 2
        assert apart_x or abs(a.y - b.y) >= (a.height + b.height) / 2
    for arrow in arrows:
        if arrow.style != "encoder":
            assert at[arrow.src].x + at[arrow.src].width / 2 < at[arrow.dst].x - at[arrow.dst].width / 2
    assert len(curves) == len(arrows)
    for arrow, (points, _) in curves:
        path = sample_bezier(points)
        for end, name in ((path[0], arrow.src), (path[-1], arrow.dst)):
            rect = at[name]  # the ends lie on the outlines of their boxes
            reach = np.abs((end - [rect.x, rect.y]) / [rect.width / 2, rect.height / 2])
            assert reach.max() == pytest.approx(1)
        for name, rect in at.items():  # and an arrow goes through no other box
            if name not in (arrow.src, arrow.dst):
                inside = np.abs(path - [rect.x, rect.y]) < [rect.width / 2 - 1, rect.height / 2 - 1]
                assert not inside.all(axis=1).any(), (arrow, name)


def test_arrows_do_not_cross_where_they_need_not() -> None:
    _, curves = drawing._layout(*chains()[1])
    paths = [sample_bezier(points) for arrow, (points, _) in curves if arrow.style != "encoder"]
    for a, b in itertools.combinations(paths, 2):
        both = np.linspace(max(a[0, 0], b[0, 0]), min(a[-1, 0], b[-1, 0]), 200)
        above = np.interp(both, *a.T) - np.interp(both, *b.T)
        assert len(both) and not ((above > 1).any() and (above < -1).any())


def test_svg_says_everything_once() -> None:
    tree = ElementTree.fromstring(chain_svg(BOXES, ARROWS))
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    words = [t for box in BOXES for t in (box.title or box.name, *box.lines)]
    assert sorted(filter(None, texts)) == sorted([*words, "σ ≤ 0.5", "CLIP", "resize"])
    styles = [path.get("style", "") for path in tree.iter(f"{SVG}path")]
    lines = [style for style in styles if "stroke-width: 1.2" in style]
    assert len(lines) == len(ARROWS)
    assert sum("stroke-dasharray" in style for style in lines) == 2  # encoders
    assert sum(f"stroke: {drawing.LINES['noisy']}" in style for style in lines) == 1
    fills = [style.split(";")[0] for style in styles]
    assert fills.count(f"fill: {drawing.FILLS['given'][0]}") == 1
    assert fills.count(f"fill: {drawing.FILLS['stage'][0]}") == 3
    width, height = (float(tree.attrib[side].removesuffix("pt")) for side in ("width", "height"))
    at, _ = drawing._layout(BOXES, ARROWS)
    assert width > sum(rect.width for rect in at.values()) and height > max(rect.height for rect in at.values())


def test_svg_escapes_names() -> None:
    name = '<script>alert("x")</script> & co'
    svg = chain_svg([Box(name, [name]), Box("b")], [Arrow(name, "b", name)])
    assert "<script>" not in svg
    assert [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")].count(name) == 3


def test_pictures_of_little_and_of_mistakes() -> None:
    assert ElementTree.fromstring(chain_svg([], [])) is not None
    assert ElementTree.fromstring(chain_svg([Box("image")], [])) is not None
    with pytest.raises(ValueError, match="arrow a -> b: no box 'b'"):
        chain_svg([Box("a")], [Arrow("a", "b")])


def test_text_fits_its_box() -> None:
    font = ImageFont.truetype(Path(__import__("matplotlib").get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 100)
    bold = ImageFont.truetype(Path(__import__("matplotlib").get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf", 100)
    box = Box(
        "image_MWM", ["ddpm++ · width 256, depth 6", "1234.5 M parameters", "WWWWWWWWWW mmmmm @@@@", "σ ≤ 0.5 → %%"]
    )
    width, _ = drawing._size(box)
    needed = [bold.getlength(box.name) / 100 * drawing.TITLE]
    needed += [font.getlength(line) / 100 * drawing.SMALL for line in box.lines]
    assert max(needed) + 8 < width < max(needed) * 1.25 + 30


def test_png_shows_the_layout(tmp_path: Path) -> None:
    arrows = [Arrow(arrow.src, arrow.dst, "", arrow.style) for arrow in ARROWS]  # labels may stick out of the layout
    chain_png(BOXES, arrows, tmp_path / "chain.png", scale=2)
    picture = Image.open(tmp_path / "chain.png").convert("RGB")
    at, curves = drawing._layout(BOXES, arrows)
    corners = [
        (r.x + sx * r.width / 2, r.y + sy * r.height / 2) for r in at.values() for sx in (-1, 1) for sy in (-1, 1)
    ]
    points = np.array([*corners, *(point for _, (points, _) in curves for point in points)])
    low, high, pixels = points.min(0) - drawing.MARGIN, points.max(0) + drawing.MARGIN, 2 * 96 / 72
    assert picture.size == pytest.approx(tuple((high - low) * pixels), abs=6)
    for box in BOXES:
        rect = at[box.name]
        spot = (np.array([rect.x, rect.y - rect.height / 2 + 4.5]) - low) * pixels  # inside, above the text
        assert "#{:02x}{:02x}{:02x}".format(*picture.getpixel(tuple(map(int, spot)))) == drawing.FILLS[box.style][0]
    dark = np.asarray(picture.convert("L")) < 90  # letters and links
    assert 0.005 < dark.mean() < 0.2
    chain_png(BOXES, arrows, tmp_path / "again.png", scale=2)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "chain.png").read_bytes()


def test_drawing_imports_no_torch() -> None:
    code = "import sys, chaindiff.show.drawing; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False False"
