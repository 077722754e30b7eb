"""The transformer: published sizes, its parts against independent arithmetic, and stages of any mix of variables."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from recipe_text import message, write
from torch import Tensor, nn
from torch.nn import functional as F

import chaindiff as cd
from chaindiff.chain.cost import count
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.random import Draws
from chaindiff.io.errors import UserError
from chaindiff.networks import build
from chaindiff.networks.attention import JointBlock, angles, cells, rotate, sincos
from chaindiff.networks.interface import Condition, Interface
from chaindiff.networks.transformer import Transformer
from chaindiff.specs.network import TransformerSpec

MIX = {"image": (3, 8, 8), "map": (4, 4, 4), "vector": (5,), "words": (3, 6)}
GRIDS = {"image": (3, 8, 8), "map": (4, 4, 4), "vector": (5,)}
TINY = {"width": 16, "depth": 2, "heads": 2}
PATCH = {"image": 2, "map": 1}


def moved(network: nn.Module, scale: float = 0.1) -> nn.Module:
    """Away from the zeros that it begins with."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return network.eval()


def transformer(shapes: Mapping[str, tuple[int, ...]] = MIX, scale: float = 0.1, **said) -> nn.Module:
    torch.manual_seed(0)
    known = {name: said.pop(name) for name in ("label_dim", "image_channels", "context", "augment_dim") if name in said}
    grids = [name for name, shape in shapes.items() if len(shape) == 3]
    patch = said.pop("patch", {name: PATCH.get(name, 2) for name in grids})
    return moved(Transformer(Interface(shapes, **known), **{**TINY, "patch": patch, **said}), scale)


def state(shapes: Mapping[str, tuple[int, ...]] = MIX, rows: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()}
    return x, {name: torch.randn(rows, generator=generator) / 4 for name in shapes}


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


# ------------------------------------------------------------ published sizes

# Peebles & Xie 2023, table 4 of the appendix and the checkpoints' logs (33.0, 130.5, 458.1 and 675.1 million; SiT, Ma
# et al. 2024, table 1, has the same networks), with a learned variance and fixed position embeddings that are counted.
DIT = {"S": (384, 12, 6, 33.0), "B": (768, 12, 12, 130.5), "L": (1024, 24, 16, 458.1), "XL": (1152, 28, 16, 675.1)}


def parameters(**said) -> int:
    with torch.device("meta"):
        network = Transformer(Interface({"z": said.pop("shape", (4, 32, 32))}, label_dim=1001), **said)
    return sum(parameter.numel() for parameter in network.parameters())


def formula(d: int, depth: int, patch: int, channels: int, hidden: float) -> int:
    """Blocks: attention 4 d^2 + 4 d, MLP 2 d h + h + d (gated 3 d h + 2 h + d), modulation 6 d^2 + 6 d."""
    block = 10 * d * d + 10 * d + hidden
    outside = 256 * d + d + d * d + d + 1001 * d + 2 * d * d + 2 * d  # levels, classes and absence, last modulation
    ends = patch**2 * channels * d + d + d * patch**2 * channels + patch**2 * channels
    return int(depth * block + outside + ends)


@pytest.mark.parametrize("name", DIT)
def test_sizes_of_dit(name: str) -> None:
    d, depth, heads, published = DIT[name]
    found = parameters(width=d, depth=depth, heads=heads)
    assert found == formula(d, depth, 2, 4, 8 * d * d + 5 * d)
    learned_variance, fixed_positions = (d + 1) * 4 * 4, 256 * d
    assert round((found + learned_variance + fixed_positions) / 1e6, 1) == published


def test_size_of_lightningdit() -> None:
    """LightningDiT-XL/1 (Yao et al. 2025): 675 million, of which weights of RMS norms and positions are not ours."""
    d, depth, hidden = 1152, 28, 3072
    said = {"mlp": "swiglu", "norm": "rms", "positions": "both", "patch": 1, "shape": (32, 16, 16)}
    found = parameters(width=d, depth=depth, heads=16, **said)
    assert found == formula(d, depth, 1, 32, 3 * d * hidden + 2 * hidden + d)
    assert (found + (2 * depth + 1) * d + 256 * d) // 10**6 == 675


# ------------------------------------------------------------ the start


@pytest.mark.parametrize("streams", ["own", "shared", "merged"])
def test_it_begins_as_zero_and_its_blocks_as_the_identity(streams: str) -> None:
    torch.manual_seed(0)
    network = Transformer(Interface(GRIDS, label_dim=3), patch=PATCH, streams=streams, **TINY)
    x, noise = state(GRIDS)
    out = network(x, noise, Condition(labels=torch.randn(2, 3)))
    assert all(torch.equal(out[name], torch.zeros_like(x[name])) for name in x)
    tokens, told = [torch.randn(2, 7, 16)], [torch.randn(2, 16)]
    assert torch.equal(network.blocks[0](tokens, told)[0], tokens[0])


# ------------------------------------------------------------ positions


def test_absolute_positions_are_those_of_dit() -> None:
    """Sine and cosine of i / 10000^(k / n) for row and column, entry by entry."""
    found, width = sincos(cells(3, 4, (3, 4), torch.zeros((), dtype=torch.float64)), 16), 16
    n = width // 4
    for row in range(3):
        for column in range(4):
            turned = [place / 10_000 ** (k / n) for place in (row, column) for k in range(n)]
            expected = [math.sin(a) for a in turned] + [math.cos(a) for a in turned]
            assert found[row * 4 + column].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_coarse_grid_lies_on_a_fine_one() -> None:
    """A cell of 2 x 2 has its centre amid the four that it covers."""
    like = torch.zeros((), dtype=torch.float64)
    fine, coarse = cells(4, 6, (4, 6), like).unflatten(0, (4, 6)), cells(2, 3, (4, 6), like).unflatten(0, (2, 3))
    mean = F.avg_pool2d(fine.permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0)
    torch.testing.assert_close(coarse, mean, rtol=0, atol=1e-12)


def test_rotary_scores_depend_on_differences_of_places() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(at: tuple[float, float], other: tuple[float, float]) -> float:
        places = torch.tensor([at, other], dtype=torch.float64)
        one, two = angles(places, 8).split(1)
        return float((rotate(q, one) * rotate(k, two)).sum())

    # The closed form: a pair (a, b) of features is the complex number a + bi, turned by its angle.
    pairs = torch.complex(q[..., :8], q[..., 8:]) * torch.complex(k[..., :8], -k[..., 8:])
    frequency = torch.tensor([10_000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    turned = torch.cat([(2.0 - 5.0) * frequency, (7.0 - 3.0) * frequency])
    expected = float((pairs * torch.exp(1j * turned)).real.sum())
    assert score((2, 7), (5, 3)) == pytest.approx(expected, abs=1e-10)
    assert score((2 + 11, 7 - 4), (5 + 11, 3 - 4)) == pytest.approx(expected, abs=1e-10)
    assert abs(score((2, 7), (5, 4)) - expected) > 1e-3
    assert score((4, 4), (4, 4)) == pytest.approx(float((q * k).sum()), abs=1e-10)


def test_without_positions_a_block_does_not_see_the_order_of_tokens() -> None:
    block, generator = moved(JointBlock(16, 2, parts=2)).double(), torch.Generator().manual_seed(0)
    one, two = (torch.randn(2, n, 16, generator=generator, dtype=torch.float64) for n in (5, 3))
    told, order = [torch.randn(2, 16, dtype=torch.float64) for _ in range(2)], torch.tensor([3, 0, 4, 1, 2])
    before, after = block([one, two], told), block([one[:, order], two], told)
    torch.testing.assert_close(after[0], before[0][:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
    angle = angles(torch.arange(8, dtype=torch.float64)[:, None], 4)
    turned = [block([x, two], told, angle)[0] for x in (one, one[:, order])]
    assert largest(turned[1], turned[0][:, order]) > 1e-4


# ------------------------------------------------------------ a block by hand


def by_hand(block: JointBlock, streams, told, angle, context) -> list[np.ndarray]:
    """A block of two streams in numpy, sample by sample and head by head: RMS norms, SwiGLU, rotary positions."""

    def of(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
        return np.einsum("oi,ni->no", layer.weight.detach().numpy(), x) + layer.bias.detach().numpy()

    def rms(x: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight

    def turn(x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        whole = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([whole.real, whole.imag], axis=-1)

    rows, width, heads = len(streams[0]), streams[0].shape[-1], block.heads
    size, lengths = width // heads, [x.shape[1] for x in streams]
    out = [np.empty_like(x) for x in streams]
    for row in range(rows):
        queries, keys, values, changes = [], [], [], []
        for part, x, c in zip(block.parts, streams, told, strict=True):
            change = np.split(of(part.modulation, c[row][None])[0], 6)
            q, k, v = np.split(of(part.qkv, rms(x[row]) * (1 + change[1]) + change[0]), 3, axis=-1)
            weights = [norm.weight.detach().numpy() for norm in (part.q_norm, part.k_norm)]
            heads_of = [
                [m[:, h * size : (h + 1) * size] for h in range(heads)] for m in (q, k, v)
            ]  # fmt: skip
            queries.append([rms(m, weights[0]) for m in heads_of[0]])
            keys.append([rms(m, weights[1]) for m in heads_of[1]])
            values.append(heads_of[2])
            changes.append(change)
        more = np.split(of(block.context_kv, context[row]), 2, axis=-1)
        attended = []
        for h in range(heads):
            q = turn(np.concatenate([each[h] for each in queries]))
            k = turn(np.concatenate([each[h] for each in keys]))
            k = np.concatenate([k, rms(more[0][:, h * size : (h + 1) * size])])
            v = np.concatenate([*(each[h] for each in values), more[1][:, h * size : (h + 1) * size]])
            score = np.exp(np.einsum("qc,kc->qk", q, k) / math.sqrt(size))
            attended.append(np.einsum("qk,kc->qc", score / score.sum(1, keepdims=True), v))
        whole = np.split(np.concatenate(attended, axis=-1), np.cumsum(lengths)[:-1])
        for number, (part, own, change) in enumerate(zip(block.parts, whole, changes, strict=True)):
            x = streams[number][row] + change[2] * of(part.proj, own)
            gate, value = np.split(of(part.mlp.up, rms(x) * (1 + change[4]) + change[3]), 2, axis=-1)
            out[number][row] = x + change[5] * of(part.mlp.down, gate / (1 + np.exp(-gate)) * value)
    return out


def test_a_block_against_numpy() -> None:
    said = {"parts": 2, "gated": True, "norm": "rms", "qk_norm": True, "context": True}
    block, generator = moved(JointBlock(16, 2, **said), 0.3).double(), torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    streams, told, context = [numbers(2, 4, 16), numbers(2, 3, 16)], [numbers(2, 16), numbers(2, 16)], numbers(2, 5, 16)
    angle = angles(numbers(7, 2), 4)
    found = block(streams, told, angle, block.project(context))
    expected = by_hand(
        block, *([t.numpy() for t in group] for group in (streams, told)), angle.numpy(), context.numpy()
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other, rtol=0, atol=1e-11)


def test_the_plain_norm_and_mlp() -> None:
    """Without gates and extras a part is pre-norm attention and MLP, as torch's own layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0, activation=lambda x: F.gelu(x, approximate="tanh"), norm_first=True, batch_first=True
    ).double().eval()  # fmt: skip
    layer.norm1.eps = layer.norm2.eps = 1e-6
    block = JointBlock(16, 2).double().eval()
    part = block.parts[0]
    part.qkv.weight.data, part.qkv.bias.data = layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data
    part.proj.load_state_dict(layer.self_attn.out_proj.state_dict())
    part.mlp.up.load_state_dict(layer.linear1.state_dict())
    part.mlp.down.load_state_dict(layer.linear2.state_dict())
    nn.init.zeros_(part.modulation.weight)
    part.modulation.bias.data = torch.tensor([0.0, 0, 1, 0, 0, 1], dtype=torch.float64).repeat_interleave(16)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    found = block([x], [torch.randn(2, 16, dtype=torch.float64)])[0]
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-12)


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


# ------------------------------------------------------------ stages


@pytest.mark.slow
def test_it_learns_the_denoiser_of_a_gaussian() -> None:
    """Correlated pixels, whose denoiser is C (C + sigma^2)^-1 x: the error of the rest is small."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(4)))[0]
    spread = torch.tensor([1.2, 1.0, 0.8, 0.5] + [0.1] * 12)
    covariance = basis @ torch.diag(spread**2) @ basis.T
    network = {"kind": "transformer", "width": 32, "depth": 2, "heads": 2, "patch": 2}
    stage = Diffusion(Variable.image("x", 1, 4), network=network, noise={"mean": -0.5, "std": 1.0})
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3, betas=(0.9, 0.99))
    steps = 600
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        clean = ((torch.randn(128, 16, generator=generator) * spread) @ basis.T).reshape(-1, 1, 4, 4)
        sigma = (torch.randn(128, generator=generator) - 0.5).exp()
        noisy = clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=generator)
        error = stage.denoise({"x": noisy}, {"x": sigma}, Condition()).x0["x"] - clean
        loss = (stage.precondition.weight(sigma) * error.square().flatten(1).mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    clean = (torch.randn(2000, 16, generator=generator) * spread) @ basis.T
    for level in (0.3, 1.0):
        noisy = clean + level * torch.randn(clean.shape, generator=generator)
        best = noisy @ torch.linalg.solve(covariance + level**2 * torch.eye(16), covariance)
        with torch.no_grad():
            x, sigma = {"x": noisy.reshape(-1, 1, 4, 4)}, {"x": torch.full((2000,), level)}
            found = stage.denoise(x, sigma, Condition()).x0["x"].flatten(1)
        errors = [float((guess - clean).square().mean()) for guess in (found, best, noisy * 0.3 / (0.3 + level**2))]
        assert errors[0] < 1.08 * errors[1] and errors[2] > 1.4 * errors[1], "the best for every pixel alone is worse"


@pytest.mark.parametrize("streams", ["own", "shared", "merged"])
def test_an_image_a_vector_and_a_map_together(streams: str) -> None:
    """Trained a little and sampled through the public interface: together, and any given the others."""
    variables = [cd.Variable.vector("clip", 3), cd.Variable.map("latent", 4, 4, 4), cd.Variable.image("image", 3, 8)]
    kind = cd.Variable.label("kind", 2)
    network = cd.Transformer(width=16, depth=1, heads=2, patch={"latent": 1, "image": 2}, streams=streams)
    stage = cd.Diffusion(
        variables, given=[(kind, {"dropout": 0.2})], network=network, sampler=cd.Sampler(steps=3), name="all"
    )
    data = {
        "clip": torch.randn(8, 3) / 2,
        "latent": 3 * torch.randn(8, 4, 4, 4),
        "image": torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8),
        "kind": torch.arange(8) % 2,
    }
    cd.train(stage, data, images=16, batch=8)
    chain = cd.Chain([stage], sources=[cd.Source(kind, [1, 1])])
    shapes = {"clip": (3, 3), "latent": (3, 4, 4, 4), "image": (3, 3, 8, 8)}
    assert {name: out.shape for name, out in chain.sample(3, want=[*shapes]).items()} == shapes
    for known in shapes:
        value = torch.rand(3, *shapes[known][1:])
        out = chain.sample(
            3, given={known: value, "kind": torch.tensor([0, 1, 1])}, want=[name for name in shapes if name != known]
        )
        assert all(out[name].isfinite().all() and out[name].shape == shapes[name] for name in out)
    assert stage.cost(["image"]).flops > 0


def test_labels_of_several_preconditionings_have_one_span() -> None:
    """Flow counts times up to 1000, EDM quarters of logarithms: a network of both is built for one of them."""
    seen: list[Mapping[str, Tensor]] = []

    class Watched(nn.Module):
        def forward(self, x, noise, condition):
            seen.append(noise)
            return x

    a, b = Variable.vector("a", 2), Variable.vector("b", 2)
    x, level = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, {"a": torch.ones(1), "b": torch.ones(1)}
    for own, expected in (({}, 0.5), ({"precondition": {"kind": "flow"}}, 0.5), ({"precondition": {"kind": "v"}}, 0.5)):
        for whole in ("edm", "flow"):
            stage = Diffusion([(a, own), b], network=Watched(), precondition=whole)
            stage.denoise(x, level, Condition())
            other = 1000 * expected if whole == "flow" else 0.0
            mine = other if not own else expected * (1000 if whole == "flow" else 1)
            assert float(seen[-1]["b"]) == pytest.approx(other) and float(seen[-1]["a"]) == pytest.approx(mine)


# ------------------------------------------------------------ recipes

RECIPE = """\
name: both
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 32, 32]}
  small: {kind: image, shape: [3, 16, 16], encoder: {kind: resize, of: image}}
  clip: {kind: vector, shape: [8], encoder: {kind: open_clip, model: clip_emoji, of: image, reduce: {kind: pca, k: 8}}}
stages:
  both:
    generates: [clip, small]
    network: {kind: transformer, width: 16, depth: 1, heads: 2, patch: 4, positions: rotary, mlp: swiglu}
    augment: {flip: false}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2, path: {kind: offset, offset: 0.3}}
sample: {want: [clip, small], count: 3, batch: 2, execution: eager}
"""
MISTAKES = [
    ("heads: 2", "heads: 3", "both.network.width: should be a multiple of 4 and of heads (3), not 16"),
    ("heads: 2", "heads: 8", "both.network.heads: rotary positions need a multiple of 4 features per head, not 2"),
    ("patch: 4", "patch: 5", "both.network.patch: patches of 5 do not divide 'small', which is 16 x 16"),
    ("patch: 4", "patch: {smal: 4}", "both.network.patch.smal: 'smal' is no image or map of this stage; did you"),
    ("patch: 4", "patch: {}", "both.network.patch: does not name 'small', which needs one too"),
    ("patch: 4", "size: 4", "both.network: unknown field 'size'"),
    ("mlp: swiglu", "mlp: swigl", "both.network.mlp: 'swigl' is not one of gelu, swiglu"),
    ("[clip, small]\n    network", "[clip, image]\n    given: [small]\n    network", None),
    ("[clip, small]\n    network", "[clip]\n    given: [small]\n    network", "given images and maps are channels of"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES)
def test_mistakes_are_explained(old: str, new: str, expected: str | None, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert old in RECIPE
    text = RECIPE.replace(", path: {kind: offset, offset: 0.3}", "").replace(old, new)
    write(tmp_path, text if "[clip]" not in new else text.replace("want: [clip, small]", "want: [clip]"))
    if expected is None:
        cd.load("r.yaml")
    else:
        assert expected in message("r.yaml")


def test_merged_grids_must_be_equal() -> None:
    spec = TransformerSpec(kind="transformer", width=16, depth=1, heads=2, patch=2, streams="merged")
    with pytest.raises(UserError, match=r"merged needs as many patches .* 'image' has 4 x 4, 'map' has 2 x 2"):
        build(spec, Interface({"image": (3, 8, 8), "map": (4, 4, 4)}))


def test_a_recipe_trains_samples_and_saves(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, RECIPE)
    chain = cd.load("r.yaml")
    cd.train(chain)
    out = chain.sample(2)
    assert out["clip"].shape == (2, 8) and out["small"].shape == (2, 3, 16, 16)
    cd.save_stage(chain.stages["both"], "stage.safetensors")
    again = cd.load_stage("stage.safetensors")
    x, noise = {"clip": torch.randn(2, 8), "small": torch.randn(2, 3, 16, 16)}, {"clip": 1.0, "small": 2.0}
    one, other = (stage.bind({})(x, noise).x0 for stage in (chain.stages["both"], again))
    assert all(torch.equal(one[name], other[name]) for name in x)


def test_draws_of_one_variable_do_not_depend_on_the_network() -> None:
    """The same start for the same seed, whatever network denoises it."""
    x = Variable.vector("x", 4)
    starts = []
    for network in ({"kind": "transformer", **TINY}, {"kind": "prior", **TINY}):
        stage = Diffusion(x, network=network, sampler={"steps": 1, "sigma_max": 1e4}).eval()
        starts.append(next(iter(stage.sample({}, Draws([0, 1], 0, "x"), sampler={"steps": 2}))).x0["x"])
    assert starts[0].shape == starts[1].shape
