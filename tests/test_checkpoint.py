"""Files of weights and states: whole or as they were, what does not fit, and beginning from other weights."""

from __future__ import annotations

import resource

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from chaindiff.chain.conditioning import Given
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.random import Draws
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.network import UNetSpec
from chaindiff.training.begin import Begun, begin_from


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path) -> None:
    path = tmp_path / "state.safetensors"
    tensorfile.save(path, {"a": torch.arange(3)}, {"images": "1"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # writing beyond it fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError) as error:
            tensorfile.save(path, {"a": torch.zeros(100_000)}, {"images": "2"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"cannot write {path}: ")
    assert "File too large" in error.value.message
    assert error.value.hint == (
        "free some space or choose another folder with --out; the last complete file is untouched"
    )
    tensors, kept = tensorfile.load(path)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert kept == {"images": "1"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "empty"])
def test_files_that_are_not_whole(tmp_path, damage) -> None:
    path = tmp_path / "weights.safetensors"
    if damage == "truncated":
        save_file({"a": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-50])
    elif damage != "missing":
        path.write_text("these are no weights" if damage == "text" else "")
    expected = (
        f"there is no weights file {path}" if damage == "missing" else f"{path} is not a complete safetensors file: "
    )
    for read in (tensorfile.load, tensorfile.metadata):
        with pytest.raises(UserError) as error:
            read(path)
        assert error.value.message.startswith(expected)


def test_fill_names_what_does_not_fit() -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(UserError) as error:
        tensorfile.fill(module, {"weight": torch.zeros(2, 4), "bia": torch.zeros(2)}, "w.safetensors")
    assert str(error.value) == (
        "w.safetensors does not fit this stage: missing bias; unexpected bia; weight is [2, 4], expected [2, 3]\n"
        "  the file belongs to another network, or to other given variables"
    )
    many = {f"extra{i}": torch.zeros(1) for i in range(5)} | dict(module.state_dict())
    with pytest.raises(UserError, match="unexpected extra0; unexpected extra1; unexpected extra2; and 2 more"):
        tensorfile.fill(module, many, "w.safetensors")


# ------------------------------------------------------------ beginning from other weights

UNET = UNetSpec(kind="unet", channels=16, mult=[1, 2], blocks=1, attention=[], dropout=0.0)
IMAGE, VECTOR = Variable.image("image", 3, 16), Variable.vector("c", 5)


def image_stage(seed: int, **settings) -> Diffusion:
    """A stage whose weights are none of them 0 or tiny, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stage = Diffusion(IMAGE, network=UNET, **settings)
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return stage.eval()


@pytest.mark.parametrize("bare", [True, False])
def test_an_unconditional_network_begins_a_conditional_stage(tmp_path, bare) -> None:
    """VCDM, section 4: at first the output is the unconditional network's, whatever the condition."""
    path = tmp_path / "edm.safetensors"
    teacher = image_stage(1)
    save_file((teacher.network if bare else teacher).state_dict(), path)
    given = [(VECTOR, LinkSpec(variable="c", dropout=0.1, null="learned"))]
    stage = image_stage(2, given=given)
    x = torch.randn(4, 3, 16, 16)
    state, sigma = {"image": x}, {"image": torch.tensor([0.01, 0.3, 2.0, 50.0])}
    with torch.no_grad():
        expected = teacher.denoise(state, sigma, teacher.conditioner({}, 4, x)).x0["image"]

        def denoised() -> list[Tensor]:
            values = [Given(torch.randn(4, 5) * 10), Given(torch.randn(4, 5), torch.zeros(4, dtype=torch.bool))]
            return [stage.denoise(state, sigma, stage.conditioner({"c": value}, 4, x)).x0["image"] for value in values]

        assert not any(torch.allclose(output, expected, atol=1e-2) for output in denoised())
        begin_from(stage, path)
        assert all(torch.equal(output, expected) for output in denoised())
    assert not stage.network.map_label.weight.any()
    assert not stage.network.map_label.bias.any()
    stage({"image": x, "c": torch.randn(4, 5)}, Draws(range(4), 0, "image")).mean().backward()
    assert stage.network.map_label.weight.grad.any(), "what begins at zero must learn"


def test_weights_that_cannot_begin_a_stage(tmp_path) -> None:
    path = tmp_path / "edm.safetensors"
    tensors = image_stage(1).network.state_dict()
    save_file({k: v for k, v in tensors.items() if k != "map_layer0.bias"} | {"other": torch.zeros(1)}, path)
    given = [(Variable.tokens("words", 2, 4), LinkSpec(variable="words"))]
    with pytest.raises(UserError) as error:
        begin_from(image_stage(2, given=given), path)
    assert error.value.message == (
        f"{path} cannot initialise this stage: network.map_layer0.bias is missing; "
        "network.dec.8x8_in0.context_kv.weight is missing; network.dec.8x8_in0.context_kv.bias is missing; "
        "network.other is unexpected"
    )
    wider = Diffusion(IMAGE, network=UNET.model_copy(update={"channels": 32}))
    message = r"network\.map_layer0\.weight has shape \[64, 16\], expected \[128, 32\]; .* more"
    with pytest.raises(UserError, match=message):
        begin_from(wider, path)


@pytest.mark.parametrize("width", [16, 32])
def test_the_header_alone_tells_whether_a_file_can_begin_a_stage(tmp_path, width) -> None:
    """On the meta device: what begins at zero, and what does not fit, as with the tensors themselves."""
    path = tmp_path / "edm.safetensors"
    save_file(image_stage(1).network.state_dict(), path)

    def outcome() -> Begun | str:
        network = UNET.model_copy(update={"channels": width})
        try:
            return begin_from(Diffusion(IMAGE, network=network, given=[(VECTOR, LinkSpec(variable="c"))]), path)
        except UserError as error:
            return str(error)

    expected = outcome()
    assert isinstance(expected, Begun) == (width == 16)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    size = path.stat().st_size
    with path.open("r+b") as file:  # not a number is left, but as many bytes
        file.truncate(header)
        file.truncate(size)
    with torch.device("meta"):
        assert outcome() == expected
