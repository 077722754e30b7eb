"""Augmentation: exact maps against numpy, labels against their definition, draws as functions of their keys."""

import math

import numpy as np
import pytest
import torch

from chaindiff.data.augment import Draw, active, apply, augment_dim, draw
from chaindiff.specs.training import AugmentSpec

GEOMETRIC = AugmentSpec(probability=0.5)
COLOUR = AugmentSpec(probability=0.5, colour=0.7)


def keys(n: int) -> list[tuple[int | str, ...]]:
    return [(7, index, "v") for index in range(n)]


def images(n: int, side: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def by(matrix: list[list[float]], n: int = 2, colour: np.ndarray | None = None) -> Draw:
    """The same 2 x 3 map for n images."""
    rows = torch.tensor([*matrix, [0.0, 0.0, 1.0]]).expand(n, 3, 3)
    colours = torch.eye(4) if colour is None else torch.from_numpy(colour).float()
    return Draw(torch.zeros(n, 0), rows, colours.expand(n, 4, 4))


# -- pixels


def test_identity():
    x = images(4)
    out = apply(x, draw(AugmentSpec(probability=0, flip=False), keys(4)))
    assert torch.equal(out, x) and out is not x
    nearly = by([[1, 1e-7, 0], [0, 1, 0]], 4)  # not recognised as exact, so interpolated
    torch.testing.assert_close(apply(x, nearly), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "matrix, expected",
    [
        ([[-1, 0, 0], [0, 1, 0]], lambda x: x[..., ::-1]),
        ([[1, 0, 0], [0, -1, 0]], lambda x: x[..., ::-1, :]),
        ([[-1, 0, 0], [0, -1, 0]], lambda x: x[..., ::-1, ::-1]),
        ([[0, -1, 0], [1, 0, 0]], lambda x: np.rot90(x, -1, (2, 3))),  # x to y: clockwise, as y points down
        ([[0, 1, 0], [-1, 0, 0]], lambda x: np.rot90(x, 1, (2, 3))),
    ],
)
def test_flips_and_quarter_turns(matrix, expected):
    x = images(2)
    np.testing.assert_allclose(apply(x, by(matrix)).numpy(), expected(x.numpy()), atol=1e-5)


def test_shift_by_whole_pixels_reflects_the_edge():
    x = images(2)
    out = apply(x, by([[1, 0, 3 / 16], [0, 1, -2 / 16]])).numpy()  # 3 to the right, 2 up
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (0, 2), (3, 0)], mode="symmetric")[:, :, 2:, :16]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_sides_may_differ():
    x = torch.rand(2, 3, 8, 16)
    out = apply(x, by([[1, 0, 2 / 16], [0, 1, 0]])).numpy()
    np.testing.assert_allclose(out[..., 2:], x.numpy()[..., :-2], atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 0.75, 0.95, 1.3])
def test_maps_move_a_smooth_picture_to_where_they_say(scale):
    """A blob at p in the image is at matrix @ p in the result, and has grown by the scale."""
    side, turn = 64, 0.4
    centre = (torch.arange(side) + 0.5) / side - 0.5
    blob = lambda x, y, width: torch.exp(-((centre - x) ** 2 + (centre[:, None] - y) ** 2) / (2 * width**2))  # noqa: E731
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    matrix = [[cos, -sin, 0.05], [sin, cos, -0.1]]
    x, y = 0.15, 0.05
    out = apply(blob(x, y, 0.08).expand(1, 3, side, side), by(matrix, 1))[0, 0]
    expected = blob(cos * x - sin * y + 0.05, sin * x + cos * y - 0.1, 0.08 * scale)
    to_input = torch.linalg.inv(torch.tensor([*matrix, [0.0, 0.0, 1.0]]))
    places = torch.stack([*torch.meshgrid(centre, centre, indexing="xy"), torch.ones(side, side)], -1)
    inside = ((places @ to_input.T)[..., :2].abs() < 0.5).all(-1)  # beyond lie reflections of the blob
    assert inside.float().mean() > 0.2
    assert (out - expected)[inside].abs().max() < 0.02  # a mean over a pixel lowers the narrowest peak by 0.013


def test_shrinking_does_not_alias():
    stripes = torch.tensor([-1.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    out = apply(stripes, by([[0.5, 0, 0], [0, 0.5, 0]], 1))
    assert out[..., 18:46, 18:46].abs().max() < 0.3


def test_colour_map():
    x = images(2)
    colour = np.eye(4)
    colour[:3] = np.random.default_rng(0).normal(size=(3, 4))
    out = apply(x, by([[1, 0, 0], [0, 1, 0]], colour=colour)).numpy()
    expected = np.einsum("dc,nchw->ndhw", colour[:3, :3], x.numpy()) + colour[:3, 3][:, None, None]
    np.testing.assert_allclose(out, expected, atol=1e-5)


# -- draws


def matrix_of(label: np.ndarray) -> np.ndarray:
    """The map that a geometric label describes, written out: flips, scale, turn, anisotropic scale, shift."""
    flip_x, flip_y, scale, cos, sin, aniso_cos, aniso_sin, shift_x, shift_y = label
    turn = math.atan2(sin, cos + 1)
    aniso, along = math.hypot(aniso_cos, aniso_sin), math.atan2(aniso_sin, aniso_cos)
    rotate = lambda a: np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])  # noqa: E731
    linear = np.diag([1 - 2 * flip_x, 1 - 2 * flip_y])
    linear = rotate(-turn) @ (2 ** (0.2 * scale) * linear)
    # A negative stretch along an axis is a positive one along that axis turned by half a turn, with factors swapped,
    # so the sign of `aniso` is lost in the label's angle; both signs are tried.
    options = [
        rotate(-along) @ np.diag([2 ** (0.2 * aniso), 2 ** (-0.2 * aniso)]) @ rotate(along) @ linear,
        rotate(-along) @ np.diag([2 ** (-0.2 * aniso), 2 ** (0.2 * aniso)]) @ rotate(along) @ linear,
    ]
    out = np.zeros((2, 3, 3))
    out[:, :2, :2], out[:, :2, 2], out[:, 2, 2] = options, [shift_x / 8, shift_y / 8], 1
    return out


def test_the_label_describes_the_matrix():
    drawn = draw(GEOMETRIC, keys(200))
    for label, matrix in zip(drawn.label.double().numpy(), drawn.matrix.numpy(), strict=True):
        assert min(np.abs(option - matrix).max() for option in matrix_of(label)) < 1e-5


def test_the_label_is_zero_only_for_the_identity():
    drawn = draw(AugmentSpec(probability=0.15, colour=0.5), keys(500))
    zero = (drawn.label == 0).all(1)
    same = (drawn.matrix == torch.eye(3)).flatten(1).all(1) & (drawn.colour == torch.eye(4)).flatten(1).all(1)
    assert torch.equal(zero, same) and 0 < zero.sum() < 500


@pytest.mark.parametrize(
    "spec, share",
    [
        (AugmentSpec(probability=0.15), 0.5 * (1 - 0.15 / 2) * 0.85**4),
        (AugmentSpec(probability=0.15, flip=False), (1 - 0.15 / 2) * 0.85**4),
        (AugmentSpec(probability=0.15, flip=False, colour=1), (1 - 0.15 / 2) * 0.85**8),
    ],
)
def test_share_of_zero_labels(spec, share):
    n = 4000
    count = (draw(spec, keys(n)).label == 0).all(1).sum().item()
    assert abs(count - n * share) < 4 * math.sqrt(n * share * (1 - share))


def test_distribution_of_the_label():
    """Each entry's first two moments, at probability 1, against their closed forms."""
    label = draw(AugmentSpec(probability=1, colour=1), keys(4000)).label.double()
    mean = torch.tensor([0.5, 0.5, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, -1, 0], dtype=torch.float64)
    var = torch.tensor([0.25, 0.25, 1, 0.5, 0.5, 0.75, 0.25, 1, 1, 1, 1, 1, 0.5, 0.5], dtype=torch.float64)
    assert ((label.mean(0) - mean).abs() < 4.5 * (var / 4000).sqrt()).all()
    assert ((label.var(0) / var - 1).abs() < 0.12).all()


@pytest.mark.parametrize("probability, n", [(0.3, 4000), pytest.param(0.15, 100_000, marks=pytest.mark.slow)])
def test_half_of_the_anisotropic_scales_lie_along_the_axes(probability, n):
    """As published (`aniso_rotate_prob` 0.5); the others turn evenly, by up to half a turn either way."""
    cos, sin = draw(AugmentSpec(probability=probability, flip=False), keys(n)).label[:, 5:7].double().unbind(1)
    scaled = (cos != 0) | (sin != 0)
    for share, told in ((scaled, probability), (sin != 0, probability / 2)):
        assert abs(share.sum() - n * told) < 4 * math.sqrt(n * told * (1 - told))
    turned = torch.atan2(sin, cos)[sin != 0]  # even over the circle, whichever sign the scale has
    for moment in (turned.cos(), turned.sin(), (2 * turned).cos(), (2 * turned).sin()):
        assert abs(moment.mean()) < 4.5 * math.sqrt(0.5 / len(turned))


def test_a_draw_depends_on_its_key_alone():
    whole = draw(COLOUR, keys(20))
    for rows in ([3], [19, 3, 0], list(range(5, 20))):
        part = draw(COLOUR, [keys(20)[row] for row in rows])
        for name in ("label", "matrix", "colour"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    other = draw(COLOUR, [(8, index, "v") for index in range(20)])
    assert not torch.equal(other.label, whole.label)


def test_colour_leaves_the_geometry_as_it_was():
    plain, coloured = draw(GEOMETRIC, keys(50)), draw(COLOUR, keys(50))
    assert torch.equal(plain.matrix, coloured.matrix) and torch.equal(plain.label, coloured.label[:, :9])


def test_applying_depends_on_each_row_alone():
    x, drawn = images(12), draw(COLOUR, keys(12))
    whole = apply(x, drawn)
    for row in range(12):
        alone = apply(x[row : row + 1], draw(COLOUR, keys(12)[row : row + 1]))
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-5)


def test_grey_keeps_its_hue_and_strength_scales():
    drawn = draw(AugmentSpec(probability=1, colour=1), keys(50))
    grey = torch.full((50, 3, 4, 4), 0.3)
    still = Draw(drawn.label, torch.eye(3).expand(50, 3, 3), drawn.colour)
    out = apply(grey, still)
    expected = 0.3 * 2 ** (0.5 * drawn.label[:, 10]) + 0.2 * drawn.label[:, 9]
    torch.testing.assert_close(out, expected[:, None, None, None].expand_as(out), rtol=0, atol=1e-5)
    weak = draw(AugmentSpec(probability=1, colour=0.01), keys(50))
    assert (weak.colour - torch.eye(4)).abs().max() < 0.1 < (drawn.colour - torch.eye(4)).abs().max()


def test_dimensions():
    assert [augment_dim(spec) for spec in (AugmentSpec(), GEOMETRIC, COLOUR)] == [0, 9, 14]
    for spec in (AugmentSpec(), GEOMETRIC, COLOUR):
        assert draw(spec, keys(3)).label.shape == (3, augment_dim(spec))
    assert draw(COLOUR, []).matrix.shape == (0, 3, 3)
    assert active(AugmentSpec()) and active(GEOMETRIC) and not active(AugmentSpec(flip=False))
