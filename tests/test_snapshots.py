"""Snapshots of VCDM and EDM2 in their layouts: imported, they denoise as published, and what was not is refused."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from exact import call
from fixture_files import fixture
from published import EasyDict, PersistentModule, auxiliary, fill, module, plain, published_modules, snapshot, vcdm
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff import cli
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.interop.snapshots import Snapshot, kind_of, read_snapshot
from chaindiff.io.errors import UserError
from chaindiff.networks import Interface, build
from chaindiff.networks.edm2 import MPBlock, MPConv, mp_cat, mp_silu, mp_sum
from chaindiff.networks.interface import Condition
from chaindiff.networks.prior import Prior
from chaindiff.networks.vcdm import RelativeBias
from chaindiff.specs.network import PriorSpec, UNetSpec


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def off(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def read(folder: Path, content: bytes) -> Snapshot:
    path = folder / "network-snapshot.pkl"
    path.write_bytes(content)
    return read_snapshot(path)


def vcdm_snapshot(name: str, protocol: int = 4, **attributes: object) -> tuple[bytes, dict[str, Tensor]]:
    """A snapshot of a fixture's network, and the reference numbers."""
    tensors, metadata = fixture(name)
    state = part(tensors, "state.model.")
    if "aux" in name:
        model, generated = auxiliary(state), 1
    else:
        model, generated = PersistentModule("WrappedOriginalSongUNet", **json.loads(metadata["kwargs"])), 0
        fill(model, state)
    return snapshot(vcdm(model, json.loads(metadata["shapes"]), generated, **attributes), protocol), tensors


def denoised(found: Snapshot, tensors: dict[str, Tensor], labels: Tensor | None) -> Tensor:
    """By a stage with the imported network and what the snapshot says of it."""
    shape = found.published.shape
    variable = Variable.vector("x", *shape) if len(shape) == 1 else Variable("x", "map", shape)
    stage = Diffusion(variable, network=found.network, precondition=found.published.precondition or "edm")
    with torch.no_grad():
        x = {"x": tensors["in.x"].double().reshape(-1, *shape)}
        sigma = {"x": tensors["in.sigma"].double().flatten()}
        return stage.double().eval().denoise(x, sigma, Condition(labels)).x0["x"]


# ------------------------------------------------------------ VCDM


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("name", "given"),
    [("vcdm_image", (32,)), ("vcdm_image_class", (32, 10)), ("vcdm_aux", ()), ("vcdm_aux_class", (10,))],
)
def test_networks_of_vcdm_denoise_as_published(tmp_path, name, given, protocol) -> None:
    content, tensors = vcdm_snapshot(name, protocol)
    found = read(tmp_path, content)
    assert (found.class_name, found.published.given) == ("EDMPrecond", given)
    assert found.published.precondition is not None
    assert found.published.precondition.kind == ("x0" if "aux" in name else "edm")
    labels = [tensors[f"in.y{i}"].double() for i in range(len(given))]
    out = denoised(found, tensors, torch.cat(labels, dim=1) if labels else None)
    assert off(out.flatten(1), tensors["out.denoised"]) < 1e-5
    if labels:
        assert off(denoised(found, tensors, torch.cat(labels, dim=1).flip(0)).flatten(1), out.flatten(1)) > 1e-4


def test_the_auxiliary_network_has_the_published_size() -> None:
    """24.79 million parameters; the augmentation's label adds a linear layer."""

    def count(augment: int) -> int:
        with torch.device("meta"):
            spec = PriorSpec(kind="prior", arch="vcdm")
            network = build(spec, Interface({"clip": (512,)}, augment_dim=augment))
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(0) == 24_786_432
    assert count(9) == 24_786_432 + 9 * 512 + 512


def test_relative_positions_are_those_of_t5() -> None:
    """Buckets of Raffel et al. 2020 by integers alone: b is reached where (d / 16)^16 >= 8^(b - 16)."""
    bias = RelativeBias(1)
    with torch.no_grad():
        bias.weight.copy_(torch.arange(32.0)[:, None])
    found = bias(200)[0]
    for query in (0, 1, 5, 40, 199):
        for key in range(201):
            d = max(query - key, 0)
            bucket = d if d < 16 else max(b for b in range(16, 32) if d**16 >= 16**16 * 8 ** (b - 16))
            assert found[query, key] == (bucket if key <= query + 1 else -torch.inf), (query, key)


def test_the_auxiliary_network_sees_every_input_and_trains() -> None:
    torch.manual_seed(0)
    sizes = {"label_dim": 3, "augment_dim": 9, "context_dim": 4, "context_length": 2}
    prior = Prior(24, arch="vcdm", **sizes, width=32, depth=2, heads=4)
    inputs = [torch.randn(2, 24), torch.randn(2), torch.randn(2, 3), torch.randn(2, 9), torch.randn(2, 2, 4)]
    for value in inputs:
        value.requires_grad_()
    call(prior, *inputs).square().sum().backward()
    gradients = [value.grad for value in inputs] + [parameter.grad for parameter in prior.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"noise_mult": 2.0}, "EDMPrecond: noise_mult is not supported but for 1"),
        ({"pred_x0": (1, 0)}, "EDMPrecond: pred_x0 is not supported but for 0 or 1"),
        ({"sigma_data": "much"}, "EDMPrecond: sigma_data should be a number"),
    ],
)
def test_what_vcdm_never_published_is_refused(tmp_path, attributes, message) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, vcdm_snapshot("vcdm_aux", **attributes)[0])
    assert message in str(error.value)


def test_tensors_that_are_not_the_networks_are_refused(tmp_path) -> None:
    tensors, _ = fixture("vcdm_aux")
    state = part(tensors, "state.model.")
    for name, value, message in [
        ("causal_transformer.extra.g", torch.ones(32), "unexpected model.causal_transformer.extra.g"),
        ("causal_transformer.norm.g", torch.ones(31), "norm.weight is [31], expected [32]"),
        ("learned_query", torch.ones(2, 16), "EDMPrecond: its tensors are not those of a network of EDM, EDM2 or VCDM"),
    ]:
        content = snapshot(vcdm(auxiliary({**state, name: value}), [[3, 8, 8], [32]], 1))
        with pytest.raises(UserError) as error:
            read(tmp_path, content)
        assert message in str(error.value)
    empty = vcdm(nn.Identity(), [[3, 8, 8], [32]], 1)
    empty._modules.clear()
    with pytest.raises(UserError, match="EDMPrecond: its tensors are not those of"):
        read(tmp_path, snapshot(empty))
    model = PersistentModule("WrappedOriginalSongUNet", softmax_onehot=True)
    fill(model, part(fixture("vcdm_image")[0], "state.model."))
    with pytest.raises(UserError, match="EDMPrecond: softmax_onehot is not supported but for False"):
        read(tmp_path, snapshot(vcdm(model, [[3, 16, 16], [32]], 0)))


RECIPE = """
name: tiny
data: {path: emoji64}
variables:
  image: {kind: image, shape: [3, 16, 16]}
  group: {kind: label, shape: [10], source: uniform}
  clip:
    kind: vector
    shape: [32]
    encoder: {kind: open_clip, model: clip_emoji, of: image, reduce: {kind: pca, k: 32}, scaling: raw}
stages:
  clip:
    network: {kind: prior, arch: vcdm, width: 32, depth: 2, heads: 4}
    precondition: {kind: x0}
    given: [group]
    augment: {probability: 0}
    train: {images: 16, batch: 8}
  image:
    network: {kind: unet, channels: 16, mult: [1, 2], blocks: 1, attention: [16]}
    given: [clip, group]
    train: {images: 16, batch: 8}
sample: {want: [image], count: 2, batch: 2}
"""


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_both_networks_of_vcdm_become_stages_that_sample(tmp_path, capsys) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    weights = []
    for stage, name, said in [
        ("clip", "vcdm_aux_class", "EDMPrecond (vcdm), 32 entries, "),
        ("image", "vcdm_image_class", "EDMPrecond (ddpmpp), 16 x 16, 3 channels, "),
    ]:
        path, out = tmp_path / f"{stage}.pkl", tmp_path / f"{stage}.safetensors"
        path.write_bytes(vcdm_snapshot(name)[0])
        status, text, error = command(capsys, "import", path, "--recipe", recipe, "--stage", stage, "--out", out)
        assert (status, error) == (0, "")
        assert said in text
        weights += ["--set", f"stages.{stage}.weights={out}"]
    wrong = command(capsys, "import", tmp_path / "clip.pkl", "--recipe", recipe, "--stage", "image")
    assert wrong[0] == 2
    assert "this is not the network of" in wrong[2]
    steps = ["--set", "stages.*.sample.steps=2"]
    status, _, error = command(capsys, "sample", recipe, *weights, *steps, "--out", tmp_path / "run")
    assert (status, error) == (0, "")
    assert len(list((tmp_path / "run/samples/image").glob("0*.png"))) == 2


def test_the_hint_names_what_the_network_was_given(tmp_path, capsys) -> None:
    path, out = tmp_path / "image.pkl", tmp_path / "image.safetensors"
    path.write_bytes(vcdm_snapshot("vcdm_image_class", sigma_data=0.25)[0])
    status, said, _ = command(capsys, "import", path, "--out", out)
    assert status == 0
    assert "label of 32 + 10" in said
    assert said.index("NAME_OF_32_ENTRIES") < said.index("NAME_OF_10_ENTRIES")
    assert "sigma_data: 0.25" in said
    path.write_bytes(vcdm_snapshot("vcdm_image_class")[0])
    assert "sigma_data" not in command(capsys, "import", path, "--out", out)[1]


def test_a_training_state_is_refused_by_its_name(tmp_path, capsys) -> None:
    path = tmp_path / "training-state-000100.pt"
    torch.save({"net": nn.Linear(2, 2).state_dict(), "optimizer_state": {}}, path)
    status, _, error = command(capsys, "import", path, "--out", tmp_path / "x.safetensors")
    assert status == 2
    assert "it is an archive of torch.save, as training states are (training-state-*.pt)" in error
    assert "network-snapshot-*.pkl beside it" in error


# ------------------------------------------------------------ EDM2


def edm2_snapshot(name: str, half: bool = False, protocol: int = 4, **settings: object) -> bytes:
    tensors, metadata = fixture(name)
    kwargs = {**json.loads(metadata["kwargs"]), "use_fp16": half, "sigma_data": 0.5, **settings}
    state = {k: v.half() if half else v for k, v in part(tensors, "state.").items()}
    ema = module("Precond", kwargs, state)
    ema.__dict__ |= {"img_resolution": kwargs["img_resolution"], "label_dim": kwargs["label_dim"], "sigma_data": 0.5}
    inner = ema.get_submodule("unet")
    inner.__dict__ |= {"_name": "UNet", "_init_kwargs": {**kwargs, "resample_filter": [1, 1]}}
    content = EasyDict(
        encoder=plain("StandardRGBEncoder"),
        dataset_kwargs=EasyDict(path="x.zip", use_labels=True),
        loss_fn=plain("EDM2Loss", P_mean=-0.4, P_std=1.0, sigma_data=0.5),
        ema=ema,
    )
    with published_modules():
        file = io.BytesIO()
        pickle.dump(content, file, protocol)
        return file.getvalue()


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", ["edm2_xs_cond", "edm2_rgb_uncond"])
def test_networks_of_edm2_denoise_as_published(tmp_path, name, protocol) -> None:
    tensors, _ = fixture(name)
    found = read(tmp_path, edm2_snapshot(name, protocol=protocol))
    assert (found.published.network.arch, found.noise) == ("edm2", (-0.4, 1.0))
    labels = tensors.get("in.class_labels")
    out = denoised(found, tensors, None if labels is None else labels.double())
    assert off(out, tensors["out.denoised"]) < 1e-5
    halved = read(tmp_path, edm2_snapshot(name, half=True))
    assert all(parameter.dtype == torch.float32 for parameter in halved.network.parameters())
    assert 0 < off(denoised(halved, tensors, None if labels is None else labels.double()), out) < 5e-3
    assert "Precond (edm2), " in kind_of(found)


def test_settings_of_edm2_that_shapes_do_not_show(tmp_path) -> None:
    with pytest.raises(UserError, match=r"Precond: concat_balance is not supported but for 0.5"):
        read(tmp_path, edm2_snapshot("edm2_xs_cond", concat_balance=0.3))


@pytest.mark.parametrize(
    ("channels", "millions"), [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)]
)
def test_sizes_of_edm2(channels, millions) -> None:
    """Karras et al. 2024, table 2."""
    spec = UNetSpec(kind="unet", arch="edm2", channels=channels, mult=[1, 2, 3, 4], blocks=3, attention=[16, 8])
    with torch.device("meta"):
        network = build(spec, Interface({"latent": (4, 64, 64)}, label_dim=1000))
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions


def test_a_block_with_attention_is_the_papers_equations() -> None:
    """Figure 21 of the paper in float64, with its attention written out."""
    torch.manual_seed(0)
    block = MPBlock(64, 128, 32, encoder=True, resample=None, attend=True, dropout=0.0).double().eval()
    nn.init.constant_(block.emb_gain, 0.7)
    x, emb = torch.randn(2, 64, 4, 4).double(), torch.randn(2, 32).double()

    def conv(layer: nn.Module, x: Tensor) -> Tensor:
        w = layer.weight
        w = w / (1e-4 * w[0].numel() ** 0.5 + w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)))
        return F.conv2d(x, w, padding=w.shape[-1] // 2)

    h = conv(block.conv_skip, x)
    h = h / (1e-4 + h.square().mean(1, keepdim=True).sqrt())
    gain = 1 + 0.7 * conv_linear(block.emb_linear, emb)[:, :, None, None]
    y = conv(block.conv_res1, F.silu(conv(block.conv_res0, F.silu(h) / 0.596) * gain) / 0.596)
    h = (0.7 * h + 0.3 * y) / 0.58**0.5
    qkv = conv(block.attn_qkv, h).reshape(2, 2, 64, 3, 16)
    q, k, v = (part / (1e-4 + part.square().mean(2, keepdim=True).sqrt()) for part in qkv.unbind(3))
    weight = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / 8, dim=3)
    y = conv(block.attn_proj, torch.einsum("bhqk,bhck->bhcq", weight, v).reshape(2, 128, 4, 4))
    assert torch.allclose(block(x, emb), (0.7 * h + 0.3 * y) / 0.58**0.5, atol=1e-10)


def conv_linear(layer: nn.Module, x: Tensor) -> Tensor:
    w = layer.weight
    return x @ (w / (1e-4 * w.shape[1] ** 0.5 + w.norm(dim=1, keepdim=True))).T


def test_magnitudes_are_preserved() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 96, 8, 8), torch.randn(64, 32, 8, 8)
    layer = MPConv(96, 64, 3, 3)
    with torch.no_grad():
        layer.weight.mul_(5.0)
    results = [layer(a), mp_silu(a), mp_sum(a, torch.randn_like(a), 0.3), mp_cat(a, b)[:, :96] * 0.75**0.5]
    for result in results[:3]:
        assert abs(float(result.detach()[:, :, 1:-1, 1:-1].square().mean().sqrt()) - 1) < 0.02
    joined = mp_cat(a, b)
    norms = joined[:, :96].norm(), joined[:, 96:].norm()
    assert abs(float(norms[0] / norms[1]) - 1) < 0.01, "both contribute equally"
    assert torch.allclose(layer.weight.square().mean((1, 2, 3)), torch.ones(64), atol=1e-3), "forced in training"


def test_a_stage_with_edm2s_network_trains_and_refuses_what_it_has_no_place_for() -> None:
    torch.manual_seed(0)
    spec = UNetSpec(kind="unet", arch="edm2", channels=64, mult=[1, 2], blocks=1, attention=[4])
    network = build(spec, Interface({"image": (3, 8, 8)}, label_dim=5, image_channels=2))
    nn.init.ones_(network.out_gain)
    inputs = torch.randn(2, 3, 8, 8), torch.randn(2), torch.randn(2, 5)
    out = call(network, *inputs, images=torch.randn(2, 2, 8, 8))
    out.square().sum().backward()
    assert out.shape == (2, 3, 8, 8)
    still = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert all("emb_" in name for name in still), "the gains of the embedding start at zero"
    for told in ({"augment_dim": 9}, {"context": (4, 8)}):
        with pytest.raises(UserError, match="takes no tokens and no augmentation label"):
            build(spec, Interface({"image": (3, 8, 8)}, **told))
