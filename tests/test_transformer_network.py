"""The transformer as a whole: patches, streams, what its outputs depend on, and how it runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_parts import GRIDS, largest, state, transformer

from chaindiff.chain.cost import count
from chaindiff.networks.interface import Condition, Interface
from chaindiff.networks.transformer import Transformer

# ------------------------------------------------------------ the network


def test_patches_are_a_strided_convolution() -> None:
    network = transformer({"image": (3, 8, 8)}, patch=2)
    x = torch.randn(2, 3, 8, 8)
    layer = network.embed[0]
    expected = F.conv2d(x, layer.weight.reshape(16, 3, 2, 2), layer.bias, stride=2).flatten(2).mT
    torch.testing.assert_close(network._tokens({"image": x}, Condition())[0], expected, rtol=0, atol=1e-5)


def test_outputs_are_unpatched_as_inputs_are_patched() -> None:
    """A network of no blocks whose layers are identities and whose norm is undone returns patches to their places."""
    network = Transformer(Interface({"z": (2, 4, 6)}), width=8, depth=1, heads=2, patch=2, positions="rotary")
    network.embed[0].weight.data, network.out[0].weight.data = torch.eye(8), torch.eye(8)
    x = torch.randn(1, 2, 4, 6)
    out = network({"z": x}, {"z": torch.zeros(1)}, Condition())["z"]
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # [1, c, h, w, p, q]
    mean, spread = (f(patches, dim=(1, 4, 5), keepdim=True) for f in (torch.mean, torch.var))
    expected = (patches - mean) / (spread * 7 / 8 + 1e-6).sqrt()
    torch.testing.assert_close(out.unfold(2, 2, 2).unfold(3, 2, 2), expected, rtol=0, atol=1e-5)


def test_merged_streams_embed_concatenated_channels() -> None:
    shapes = {"texture": (4, 4, 4), "meaning": (2, 4, 4)}
    network = transformer(shapes, patch=1, streams="merged")
    x, _ = state(shapes)
    whole = torch.cat([layer.weight for layer in network.embed], dim=1)
    bias = network.embed[0].bias + network.embed[1].bias
    expected = F.linear(torch.cat([*x.values()], dim=1).flatten(2).mT, whole, bias)
    torch.testing.assert_close(network._tokens(x, Condition())[0], expected, rtol=0, atol=1e-5)
    assert network.segments == [[(4, 4)]] and len(network.blocks[0].parts) == 1


def test_streams_and_their_weights() -> None:
    sizes = {}
    for streams, parts, rows in (("own", 4, 4), ("shared", 1, 4)):
        network = transformer(streams=streams)
        assert (len(network.blocks[0].parts), len(network.segments)) == (parts, rows)
        sizes[streams] = sum(parameter.numel() for parameter in network.blocks.parameters())
    assert sizes["own"] == 4 * sizes["shared"]
    merged = transformer({"vector": (5,), **GRIDS, "words": (3, 6)}, streams="merged")
    assert merged.segments == [[(1,), (4, 4), (3,)]] and merged.places == [(0, 0), (0, 1), (0, 1), (0, 2)]


@pytest.mark.parametrize("positions", ["sincos", "rotary", "both"])
@pytest.mark.parametrize("streams", ["own", "shared", "merged"])
def test_every_output_depends_on_every_input_level_and_condition(streams: str, positions: str) -> None:
    said = {"label_dim": 3, "image_channels": 2, "context": (4, 6), "augment_dim": 9}
    network = transformer(streams=streams, positions=positions, qk_norm=True, **said)
    x, noise = state()
    parts = {
        "labels": torch.randn(2, 3),
        "images": torch.randn(2, 2, 8, 8),
        "context": torch.randn(2, 4, 6),
        "augment": torch.randn(2, 9),
    }
    with torch.no_grad():
        before = network(x, noise, Condition(**parts))
        assert {name: out.shape for name, out in before.items()} == {name: value.shape for name, value in x.items()}
        for changed in x:
            other = {name: value + (name == changed) * torch.randn(value.shape) for name, value in x.items()}
            louder = {name: level + 0.4 * (name == changed) for name, level in noise.items()}
            for after in (network(other, noise, Condition(**parts)), network(x, louder, Condition(**parts))):
                assert min(largest(after[name], before[name]) for name in x) > 1e-6
        for changed in parts:
            after = network(
                x, noise, Condition(**{**parts, changed: parts[changed] + torch.randn(parts[changed].shape)})
            )
            assert min(largest(after[name], before[name]) for name in x) > 1e-6, changed


@pytest.mark.parametrize("streams", ["own", "shared", "merged"])
def test_a_level_acts_through_its_own_modulation_alone(streams: str) -> None:
    """Where no stream hears of the others, a variable's level changes nothing but its own output."""
    network = transformer(GRIDS, streams=streams)
    for block in network.blocks:
        for part in block.parts:
            nn.init.zeros_(part.proj.weight)
    x, noise = state(GRIDS)
    with torch.no_grad():
        before = network(x, noise, Condition())
        for changed in x:
            after = network(x, {name: level + 0.4 * (name == changed) for name, level in noise.items()}, Condition())
            apart = {name: largest(after[name], before[name]) for name in x}
            assert apart.pop(changed) > 1e-6
            assert all((value > 1e-6) == (streams == "merged") for value in apart.values())


@pytest.mark.parametrize("streams", ["own", "shared", "merged"])
def test_gradients_reach_every_parameter(streams: str) -> None:
    said = {"label_dim": 3, "image_channels": 2, "context": (4, 6), "augment_dim": 9}
    network = transformer(streams=streams, qk_norm=True, mlp="swiglu", norm="rms", positions="both", **said)
    x, noise = state()
    given = Condition(torch.randn(2, 3), torch.randn(2, 2, 8, 8), torch.randn(2, 4, 6), torch.randn(2, 9))
    sum((out * torch.randn(out.shape)).sum() for out in network(x, noise, given).values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_absent_labels_count_as_zeros() -> None:
    network = transformer(label_dim=3, augment_dim=9)
    x, noise = state()
    with torch.no_grad():
        absent = network(x, noise, Condition())
        zeros = network(x, noise, Condition(labels=torch.zeros(2, 3), augment=torch.zeros(2, 9)))
    assert all(torch.equal(absent[name], zeros[name]) for name in x)


def test_given_images_are_channels_of_the_largest_grid() -> None:
    shapes = {"map": (4, 4, 4), "image": (3, 8, 8), "other": (3, 8, 8)}
    network = transformer(shapes, image_channels=2, patch=2)
    assert network.pictured == "image" and [layer.in_features for layer in network.embed] == [16, 20, 12]


# ------------------------------------------------------------ how it runs


@pytest.mark.parametrize("streams", ["own", "merged"])
def test_bf16_is_near(streams: str) -> None:
    network = transformer(GRIDS, streams=streams, positions="both", qk_norm=True, label_dim=3, width=32)
    x, noise = state(GRIDS)
    given = Condition(labels=torch.randn(2, 3))
    with torch.no_grad():
        exact = network(x, noise, given)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x, noise, given)
    for name in x:
        assert largest(rough[name].float(), exact[name]) < 0.03 * float(exact[name].abs().max())


COMPILED = """
import torch
from chaindiff.networks import Condition, Interface, Transformer
shapes = {"image": (3, 8, 8), "map": (4, 4, 4), "vector": (5,)}
for streams in ("own", "merged"):
    said = {"streams": streams, "positions": "both", "qk_norm": True, "mlp": "swiglu", "norm": "rms"}
    network = Transformer(
        Interface(shapes, label_dim=3, context=(2, 6)), width=16, depth=2, heads=2, patch={"image": 2, "map": 1}, **said
    ).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    x = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
    noise, given = {name: torch.randn(2) for name in shapes}, Condition(torch.randn(2, 3), None, torch.randn(2, 2, 6))
    with torch.no_grad():
        whole = torch.compile(network, backend="aot_eager", fullgraph=True)(x, noise, given)
        for name, out in network(x, noise, given).items():
            torch.testing.assert_close(whole[name], out, rtol=0, atol=1e-5)
"""


@pytest.mark.slow
def test_it_compiles_as_one_graph() -> None:
    """In a process of its own: here signatures are checked as they are called, which is not compiled."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=120)


class Plain(nn.Module):
    """Tensors in and out, as exported programs have them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: dict[str, Tensor], noise: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        return self.network(x, noise, Condition(labels=labels))


def test_it_exports_with_any_batch_size() -> None:
    network = transformer(GRIDS, positions="both", label_dim=3, depth=1)
    (x, noise), labels, batch = state(GRIDS, rows=4), torch.randn(4, 3), torch.export.Dim("batch", min=2)
    shapes = {"x": {name: {0: batch} for name in x}, "noise": {name: {0: batch} for name in x}, "labels": {0: batch}}
    program = torch.export.export(Plain(network), (x, noise, labels), dynamic_shapes=shapes)
    few = [{name: value[:3] for name, value in group.items()} for group in (x, noise)]
    found, expected = program.module()(*few, labels[:3]), network(*few, Condition(labels=labels[:3]))
    assert all(largest(found[name], expected[name].detach()) < 1e-5 for name in x)


def test_flops_on_the_meta_device() -> None:
    """Of one block of DiT with n tokens: 2 n (4 d^2 + 8 d^2) + 4 n^2 d, and the modulation's 2 (6 d^2)."""
    d, depth, tokens, values = 64, 3, 16, 16
    interface = Interface({"z": (4, 8, 8)}, label_dim=10)
    network = Transformer(interface, width=d, depth=depth, heads=4)
    blocks = depth * (2 * tokens * 12 * d * d + 4 * tokens**2 * d + 2 * 6 * d * d)
    ends = 2 * (2 * tokens * values * d) + 2 * (256 * d + d * d) + 2 * 10 * d + 2 * 2 * d * d
    with torch.device("meta"):
        empty = Transformer(interface, width=d, depth=depth, heads=4)
    # A plan evaluates with every condition present; attention is counted as its two products.
    assert count(empty, interface).flops == count(network, interface).flops == blocks + ends
