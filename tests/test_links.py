"""Links that give part of a vector, or nothing: what the network sees, in training and in sampling."""

from __future__ import annotations

import pytest
import torch
from exact import OneVariable
from torch import nn

from chaindiff.chain.conditioning import LEVEL_WIDTH, Given, Link
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.random import Draws
from chaindiff.io.errors import UserError
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.load import load_recipe

SCALE = 0.5 * 8**0.5  # of a vector of eight entries, each of deviation 0.5
CLIP, GROUP, X = Variable.vector("clip", 8), Variable.label("group", 3), Variable.vector("x", 4)


class Recorder(OneVariable):
    """Keeps the labels that it is called with."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(())), []

    def one(self, x, noise_labels, class_labels):
        self.seen.append(class_labels)
        return x * self.weight


def stage(**sampling) -> Diffusion:
    links = [(CLIP, LinkSpec(variable="clip", keep=[0, 2, 8])), (GROUP, LinkSpec(variable="group"))]
    return Diffusion(X, given=links, network=Recorder(), sampler={"steps": 2, "links": {"clip": sampling}})


def test_only_the_first_entries_arrive_and_the_network_is_told_how_many():
    link = Link(CLIP, LinkSpec(variable="clip", keep=[0, 2, 8, 0]), X)
    value, told = link(Given(torch.full((3, 8), 5.0), keep=torch.tensor([0, 2, 8])), 3, torch.zeros(3, 4))
    expected = torch.tensor([[0.0] * 8, [1.0] * 2 + [0.0] * 6, [1.0] * 8])
    torch.testing.assert_close(value, 5 * expected / SCALE)
    assert told.tolist() == [[0, 0], [1, 0], [0, 1]]
    assert link.label_width == 10


def test_each_part_of_what_is_told_has_a_norm_of_about_one():
    """As a one-hot label has, for which networks scale (EDM, table 1): long vectors must not drown the noise level."""
    wide = Variable.vector("clip", 512)
    link = Link(wide, LinkSpec(variable="clip", keep=[0, 512], noise=0.3), X)
    values, noise = 0.5 * torch.randn(200, 512), torch.randn(200, 512)
    value, told = link(Given(values, None, torch.full((200,), 0.2), noise), 200, torch.zeros(200, 4))
    norms = [part.norm(dim=1).mean().item() for part in (value, told[:, :1], told[:, 1:])]
    assert norms == pytest.approx([1, 1, 1], rel=0.02)


def test_a_link_without_keep_is_as_wide_as_before():
    assert Link(CLIP, LinkSpec(variable="clip"), X).label_width == 8
    assert Link(CLIP, LinkSpec(variable="clip", dropout=0.1), X).label_width == 9
    assert Link(CLIP, LinkSpec(variable="clip", dropout=0.1, noise=1.0), X).label_width == 9 + LEVEL_WIDTH


def test_no_entries_is_absence_whatever_the_level_of_the_noise():
    link = Link(CLIP, LinkSpec(variable="clip", keep=[0, 8], noise=1.0), X)
    noise, like = torch.randn(2, 8), torch.zeros(2, 4)
    none = Given(torch.randn(2, 8), None, torch.tensor([0.1, 0.9]), noise, torch.tensor([0, 0]))
    absent = Given(None, None, torch.tensor([0.0, 0.5]), None, torch.tensor([0, 0]))
    for left, right in zip(link(none, 2, like), link(absent, 2, like), strict=True):
        assert torch.equal(left, right)


def test_training_draws_every_count_and_depends_on_the_sample_alone():
    model = stage()
    batch = {"x": torch.randn(600, 4), "clip": torch.ones(600, 8), "group": torch.zeros(600, dtype=torch.long)}
    model.loss(batch, Draws(range(600), 0, "x"))
    model.loss({name: value[100:] for name, value in batch.items()}, Draws(range(100, 600), 0, "x"))
    whole, part = model.network.seen
    counts = (whole[:, :8] != 0).sum(1)
    assert torch.equal(whole[:, 8:10].bool(), torch.stack([counts == 2, counts == 8], dim=1))
    assert torch.equal(whole[100:], part)
    for count in (0, 2, 8):
        assert abs((counts == count).float().mean() - 1 / 3) < 0.08  # four standard deviations


@pytest.mark.parametrize(("options", "count"), [({}, 8), ({"keep": 2}, 2), ({"keep": 0}, 0)])
def test_sampling_gives_what_it_is_told_to(options, count):
    model = stage(**options)
    given = {"clip": torch.ones(1, 8), "group": torch.zeros(1, dtype=torch.long)}
    model.bind({name: given[name] for name in (v.name for v in model.given)})({"x": torch.zeros(1, 4)}, {"x": 1.0})
    (seen,) = model.network.seen
    assert torch.equal(seen[0, :8], torch.tensor([1.0] * count + [0.0] * (8 - count)) / SCALE)
    assert seen[0, 8:10].tolist() == [count == 2, count == 8]


def test_what_sampling_does_not_look_at_need_not_be_made():
    assert [v.name for v in stage(keep=0).given] == ["group"]
    assert [v.name for v in stage(absent=True).given] == ["group"]
    recipe = load_recipe("vcdm_emoji_class", changes=["stages.image16.sample.links.clip.keep=0"])
    from chaindiff.recipe.assembly import Assembly

    assert Assembly(recipe).request.running == ["image16", "image"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "stages.image16.sample.links.clip.keep=5",
            "5 was not trained: it should be in the link's `keep`, one of",
        ),
        ("stages.image16.sample.links.clp.keep=4", "the stage is not given 'clp'; did you mean 'clip'?"),
        ("stages.image16.given.0.keep=[1]", "counts the entries of a vector, but 'group' is a label"),
        ("stages.image16.given.1.keep=[200]", "200 is more than the 128 entries of 'clip'"),
        ("stages.image16.given.1.keep=[0]", "with 0 alone the value is never given; leave the link out"),
        (
            "stages.image.sample.links.image16.absent=true",
            "the value is never absent in training: the link has no",
        ),
        ("stages.image.sample.links.image16.keep=4", "it should be in the link's `keep`, which this link does not set"),
    ],
)
def test_mistakes_are_explained(change, expected):
    with pytest.raises(UserError) as caught:
        load_recipe("vcdm_emoji_class", changes=[change])
    assert expected in str(caught.value)
