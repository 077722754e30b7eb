"""Python first: everything that a recipe can do, by public names alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from python_parts import POINT, SIDE, UNET, Broken, columns, small
from torch import nn

import chaindiff as cd

# ------------------------------------------------------------ names


def test_every_public_name_is_there_and_nothing_else() -> None:
    for name in cd.__all__:
        assert getattr(cd, name) is not None
    with pytest.raises(AttributeError, match="module 'chaindiff' has no attribute 'Chian'"):
        _ = cd.Chian


def test_no_page_of_the_docs_imports_from_a_private_home() -> None:
    docs = Path(__file__).parents[1] / "docs"
    for page in [*docs.rglob("*.md"), docs.parent / "README.md"]:
        private = [
            line for line in page.read_text().splitlines() if line.startswith(("from chaindiff.", "import chaindiff."))
        ]
        assert not private, f"{page.name}: {private}"


def test_configs_may_be_mappings_and_their_mistakes_name_the_field() -> None:
    network = {"kind": "prior", "width": 16, "depth": 1, "heads": 2}
    stage = cd.Diffusion(POINT, network=network, sampler={"steps": 3}, precondition="x0")
    assert stage.sampler == cd.Sampler(steps=3) and stage.network_spec == cd.Prior(width=16, depth=1, heads=2)
    for settings, expected in (
        ({"sampler": {"stps": 3}}, "point.sampler: unknown field 'stps'; did you mean 'steps'?"),
        ({"given": [(SIDE, {"dropout": 2})]}, "point.given.side: dropout: should be at most 1, not 2"),
    ):
        with pytest.raises(cd.UserError) as caught:
            cd.Diffusion(POINT, network=network, **settings)
        assert expected in str(caught.value)


# ------------------------------------------------------------ sampling


def test_sampling_puts_stages_in_eval_mode_and_restores_them() -> None:
    torch.manual_seed(0)
    stage = cd.Diffusion(cd.Variable.image("image", 3, 8), network=UNET, sampler={"steps": 3})
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.1)
    chain = cd.Chain([stage.train()])
    assert torch.equal(chain.sample(2)["image"], chain.sample(2)["image"]), "dropout is off"
    assert stage.training and stage.network.training


def test_settings_of_one_call_leave_the_stage_as_it_was() -> None:
    stage = small(sampler={"steps": 3})
    chain, given = cd.Chain([stage]), {"side": torch.ones(1, 1)}
    before = chain.sample(4, given=given)["point"]
    others = [
        chain.sample(4, given=given, **options)["point"]
        for options in ({"steps": 6}, {"solver": "ddim"}, {"dtype": torch.bfloat16}, {"noise": 0})
    ]
    assert all((other - before).abs().max() > 1e-6 for other in others)
    assert torch.equal(chain.sample(4, given=given, steps=3, solver="heun", guidance=1.0)["point"], before)
    assert torch.equal(chain.sample(4, given=given)["point"], before)
    assert stage.sampler == cd.Sampler(steps=3) and stage.autocast is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance": {"sid": 2.0}}, "guidance: no stage that runs can go without 'sid'; did you mean 'side'?"),
        (
            {"solver": "hern"},
            "point.sampler: solver: 'hern' is not one of euler, heun, dpmpp_2m, ddim; did you mean 'heun'?",
        ),
        (
            {"stages": {"point": {"sampler": {"eta": 1.0}}}},
            "point.sampler: eta: is for ddim and dpmpp_2m; heun takes",
        ),
        ({"stages": {"point": {"sampler": {"links": {"side": {"keep": 1}}}}}}, "links.side.keep: 1 was not trained"),
        (
            {"stages": {"point": {"sampler": {"links": {"sid": {}}}}}},
            "links.sid: the stage is not given 'sid'; did you mean",
        ),
        ({"stages": {"pont": {}}}, "there is no stage 'pont'; did you mean 'point'?"),
        (
            {"stages": {"point": {"sampler": {"stps": 3}}}},
            "point.sampler: unknown field 'stps'; did you mean",
        ),
    ],
)
def test_settings_that_nothing_takes_are_refused(options, expected) -> None:
    with pytest.raises(cd.UserError) as caught:
        cd.Chain([small()]).sample(2, given={"side": torch.ones(1, 1)}, **options)
    assert expected in str(caught.value)
    plain = cd.Chain([cd.Diffusion(SIDE, network=Nothing)])
    with pytest.raises(cd.UserError, match="guidance: no stage that runs was trained with dropout"):
        plain.sample(2, guidance=2.0)
    with pytest.raises(cd.UserError, match="steps: no diffusion stage runs here"):
        cd.Chain([Broken({"side": torch.zeros(2, 1)})]).sample(2, steps=3)


def test_scales_go_to_the_stages_that_have_them() -> None:
    first = cd.Diffusion(SIDE, network=cd.Prior(width=16, depth=1, heads=2), sampler={"steps": 3})
    chain, given = cd.Chain([first, small(sampler={"steps": 3})]), {"side": torch.ones(1, 1)}
    one, all_of_it = (chain.sample(2, given=given, guidance=g)["point"] for g in ({"side": 2.0}, 2.0))
    assert torch.equal(one, all_of_it) and not torch.equal(one, chain.sample(2, given=given)["point"])
    assert torch.equal(chain.sample(2, guidance=2.0)["side"], chain.sample(2)["side"]), "it has nothing to go without"


def test_one_number_shares_its_noise_between_rows() -> None:
    chain, given = cd.Chain([small(sampler={"steps": 3})]), {"side": torch.ones(1, 1)}
    whole = chain.sample(4, given=given)["point"]
    torch.testing.assert_close(chain.sample(3, given=given, noise=2)["point"], whole[2:3].expand(3, 2))
    torch.testing.assert_close(chain.sample(2, given=given, noise=[3, 1])["point"], whole[[3, 1]])
    with pytest.raises(cd.UserError, match="noise has 2 numbers for 3 samples"):
        chain.sample(3, given=given, noise=[0, 1])


def test_previews_end_in_the_samples() -> None:
    first = cd.Diffusion(SIDE, network=cd.Prior(width=16, depth=1, heads=2), sampler={"steps": 3})
    chain = cd.Chain([first, small(sampler={"steps": 2})])
    previews = list(chain.previews(5, batch=3))
    assert [(p.stage, p.step, p.steps) for p in previews[:5]] == [
        ("side", 1, 3), ("side", 2, 3), ("side", 3, 3), ("point", 1, 2), ("point", 2, 2),
    ]  # fmt: skip
    done = [p.done for p in previews]
    assert done == sorted(done) and done[-1] == pytest.approx(1) and done[4] == pytest.approx(0.6)
    assert previews[0].sigma["side"] < 80 and previews[4].sigma == {"point": 0.0}
    assert previews[0].x0["side"].shape == (3, 1) and list(previews[5].samples) == [3, 4]
    last = torch.cat([previews[4].x["point"], previews[9].x["point"]]).float()
    torch.testing.assert_close(last, chain.sample(5, batch=3)["point"])


def test_gradients_are_as_they_were_while_a_preview_is_in_hand() -> None:
    for _ in cd.Chain([small(sampler={"steps": 2})]).previews(2, given={"side": torch.ones(1, 1)}):
        assert torch.is_grad_enabled()


def test_labels_and_texts_by_name_need_no_tensors() -> None:
    chain = cd.load("deep_emoji", changes=["stages.*.sample.steps=2"])
    by_name, by_number = (chain.sample(2, given={"group": v}, want=["clip"]) for v in ("Objects", 3))
    names = chain.origin.assembly.columns["group"].classes
    assert torch.equal(chain.sample(2, given={"group": names.index("Objects")}, want=["clip"])["clip"], by_name["clip"])
    assert names[3] == "Objects" or not torch.equal(by_name["clip"], by_number["clip"])
    several = chain.sample(2, given={"group": ["Objects", 3]}, want=["clip"])["clip"]
    torch.testing.assert_close(several[1], by_number["clip"][1])
    with pytest.raises(cd.UserError, match=r"'Objcts' is not a class of group; did you mean 'Objects'\?"):
        chain.sample(1, given={"group": "Objcts"})


def test_a_caption_is_encoded_on_the_way() -> None:
    chain = cd.load("text_emoji", changes=["stages.*.sample.steps=2"])
    red, mixed = (
        chain.sample(2, given={"caption": c}, want=["clip"])["clip"] for c in ("red heart", ["red heart", "dog"])
    )
    torch.testing.assert_close(red[0], mixed[0])
    assert (red[1] - mixed[1]).abs().max() > 0.1
    assert [step.producer.name for step in chain.plan(["clip"], ["caption"]).plan.steps] == ["text", "clip"]


def test_a_stage_without_weights_says_so() -> None:
    with torch.device("meta"):
        stage = small()
    with pytest.raises(cd.UserError, match="stage 'point' has no weights: it was built for planning only"):
        cd.Chain([stage]).sample(1, given={"side": torch.ones(1, 1)})


def test_a_chain_says_what_it_is_in_a_line_and_a_picture() -> None:
    chain = cd.load("vcdm_ffhq")  # without weights or data
    assert repr(chain) == "Chain(vcdm_ffhq: clip; image given clip)"
    assert chain._repr_svg_().startswith("<svg") and "NFE 158" in str(chain.plan())
    assert repr(small()) == "Diffusion(point: point [2] given side; Prior, 4,002 parameters)"
    with pytest.raises(cd.UserError, match="stage 'clip' has no weights yet"):
        _ = chain.stages["clip"]
    with pytest.raises(KeyError, match=r"there is no stage 'clp'; did you mean 'clip'\?"):
        _ = chain.stages["clp"]


def test_what_differs_between_two_variables_is_said() -> None:
    for other, expected in (
        (cd.Variable.vector("side", 2), "its shape is [2], not [1]"),
        (cd.Variable("side", "vector", (1,), sigma_data=1.0), "its sigma_data is 1.0, not 0.5"),
    ):
        stages = [cd.Diffusion(SIDE, network=UNET_OF_NONE), cd.Diffusion(POINT, given=[other], network=UNET_OF_NONE)]
        with pytest.raises(cd.UserError, match="a different 'side' from the rest of the chain") as caught:
            cd.Chain(stages)
        assert expected in str(caught.value)
    recipe = cd.load("vcdm_emoji16").variables["clip"]
    with pytest.raises(cd.UserError, match=r"its encoder\.reduce\.k is 16, not 32"):
        other = cd.load("vcdm_emoji16", changes=["variables.clip.encoder.reduce.k=16", "variables.clip.shape=[16]"])
        twin = cd.Variable(recipe.name, "vector", (32,), meaning=other.variables["clip"].meaning)
        cd.Chain([cd.Diffusion(recipe, network=UNET_OF_NONE), cd.Diffusion(POINT, given=[twin], network=UNET_OF_NONE)])


class Nothing(nn.Module):
    def __init__(self, interface=None):
        super().__init__()

    def forward(self, x, noise, condition):
        return x


UNET_OF_NONE = Nothing


# ------------------------------------------------------------ stages that are not ours


@pytest.mark.parametrize(
    ("made", "found"),
    [({}, "nothing"), ({"side": torch.zeros(3, 1)}, r"shape \[3, 1\]"), ({"side": torch.zeros(2)}, r"shape \[2\]")],
)
def test_a_stage_that_gives_something_else_is_named(made, found) -> None:
    chain = cd.Chain([Broken(made)])
    with pytest.raises(
        cd.UserError, match=rf"stage 'side' should give 2 samples of side \[1\], but its `sample` gave {found}"
    ):
        chain.sample(2)


def test_a_stage_with_nothing_to_train_is_refused_by_train_and_left_out_of_a_chain() -> None:
    with pytest.raises(cd.UserError, match=r"stage 'side' has nothing to train"):
        cd.train(Broken({}), columns(), images=8, batch=8)
    chain = cd.Chain([Broken({"side": torch.zeros(4, 1)}), small()])
    cd.train(chain, columns(), images=8, batch=8)
    assert chain.sample(4, steps=2)["point"].shape == (4, 2)


# ------------------------------------------------------------ figures


def test_measure_finds_what_is_alike_and_what_is_not() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 400, 3)
    alike, apart = ({f.metric: f.value for f in cd.measure(x, b)} for x in (a, 3 * a + 2))
    assert alike["fd"] < 0.1 < 5 < apart["fd"] and alike["recall"] > 0.9
    images = torch.rand(200, 3, 16, 16) * 2 - 1
    figures = cd.measure(images, images.flip(3), judges=["judge_conv"])
    assert {f.encoder for f in figures} == {"judge_conv"} and {f.count for f in figures} == {200}
    with pytest.raises(cd.UserError, match=r"images or vectors of one shape, not \[400, 3\] and \[200, 3, 16, 16\]"):
        cd.measure(a, images)


# ------------------------------------------------------------ imports


HEAVY = ("open_clip", "transformers", "matplotlib", "tensorboard", "torch._dynamo", "sympy")


def imported(code: str, *arguments: str, cwd: Path) -> str:
    code += f"\nimport sys; print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=cwd)
    return said.stdout


def test_loading_a_recipe_imports_nothing_that_it_does_not_use(tmp_path) -> None:
    assert imported("import chaindiff as cd; cd.load('vcdm_emoji')", cwd=tmp_path) == "heavy: []\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "vcdm_emoji"], "in all: NFE"),
        (["run", "edm_emoji16", "--count=2", "--set=stages.image16.sample.steps=1"], "nothing to do"),
    ],
)
def test_a_second_time_a_command_imports_little_more_than_torch(arguments, said, tmp_path) -> None:
    """Networks were counted the first time, and what there is to do was done."""
    code = "from chaindiff.cli import main\ntry: main()\nexcept SystemExit: pass"
    imported(code, *arguments, cwd=tmp_path)
    again = imported(code, *arguments, cwd=tmp_path)
    assert said in again and again.endswith("heavy: []\n")
