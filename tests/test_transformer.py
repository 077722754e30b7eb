"""The transformer: published sizes, its parts against independent arithmetic, and stages of any mix of variables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_parts import GRIDS, PATCH, TINY, largest, moved, state

from chaindiff.networks.attention import JointBlock, angles, cells, rotate, sincos
from chaindiff.networks.interface import Condition, Interface
from chaindiff.networks.transformer import Transformer

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
