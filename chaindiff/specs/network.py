"""The fields of a network: U-Nets, priors, transformers and joint networks. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from chaindiff.io.errors import did_you_mean
from chaindiff.specs.base import Name, Probability, Problems, Spec, UpToThousand
from chaindiff.specs.code import OURS_OR_CODE, CodeSpec, Ours, Theirs


class UNetSpec(Spec):
    """A U-Net of EDM's family: DDPM++ by default, NCSN++ and ADM as options of the same blocks."""

    kind: Literal["unet"]
    arch: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    channels: Annotated[int, Field(gt=0, le=16_384)] = 128
    mult: list[UpToThousand] = Field(default=[1, 2, 2, 2], min_length=1)
    blocks: UpToThousand = 4
    attention: list[PositiveInt] = Field(default=[16], description="resolutions with self-attention")
    dropout: Probability = 0.1
    label_init: Literal["published", "zeros"] = Field(
        default="published",
        description="initial weights of the conditioning in the noise embedding; zeros: training starts from an "
        "unconditional network, as VCDM's does",
    )

    def problems(self) -> Problems:
        if self.channels % 2:
            yield "channels", f"should be even, not {self.channels}"


class PriorSpec(Spec):
    """A DALL-E 2 style decoder-only transformer for vectors."""

    kind: Literal["prior"]
    width: Annotated[int, Field(gt=0, le=65_536)] = 512
    depth: UpToThousand = 6
    heads: Annotated[int, Field(gt=0, le=65_536)] = 8
    dropout: Probability = 0.0

    def problems(self) -> Problems:
        if self.width % self.heads or self.width % 2:
            yield "width", f"should be even and a multiple of heads ({self.heads}), not {self.width}"


class TransformerSpec(Spec):
    """A diffusion transformer (DiT) for one variable or several, each image, map, vector or tokens.

    The defaults are DiT-B/2; with 28 blocks of width 1152 and 16 heads it is DiT-XL/2. LightningDiT has mlp: swiglu,
    norm: rms, positions: both and patch: 1; ReDi and semantic-first diffusion are such networks with streams: merged.
    """

    kind: Literal["transformer"]
    width: Annotated[int, Field(gt=0, le=65_536)] = 768
    depth: UpToThousand = 12
    heads: Annotated[int, Field(gt=0, le=65_536)] = 12
    patch: PositiveInt | dict[Name, PositiveInt] = Field(
        default=2, description="side of the patches of images and maps: one number, or one for each by name"
    )
    mlp: Literal["gelu", "swiglu"] = "gelu"
    ratio: Annotated[float, Field(ge=0.25, le=64)] = Field(
        default=4.0, description="hidden features of the MLP per feature; swiglu has two thirds of them, twice"
    )
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["sincos", "rotary", "both"] = Field(
        default="sincos", description="of the patches: absolute, relative in the attention, or both"
    )
    qk_norm: bool = Field(default=False, description="normalise queries and keys")
    streams: Literal["own", "shared", "merged"] = Field(
        default="own",
        description="several variables have their own weights and attend to each other (MMDiT), share the weights, or "
        "are summed where their grids, which must be equal, have the same place",
    )

    def problems(self) -> Problems:
        if self.width % self.heads or self.width % 4:
            yield "width", f"should be a multiple of 4 and of heads ({self.heads}), not {self.width}"
        elif self.positions != "sincos" and self.width // self.heads % 4:
            problem = f"rotary positions need a multiple of 4 features per head, not {self.width // self.heads}"
            yield "heads", problem
        if int(self.width * self.ratio * 2 / 3) < 1:
            yield "ratio", f"{self.ratio:g} leaves no hidden features"

    def misfits(self, shapes: Mapping[str, Sequence[int]], pictured: bool) -> Problems:
        """Where the network does not fit the shapes that it generates; `pictured`: it is given images or maps."""
        grids = {name: shape for name, shape in shapes.items() if len(shape) == 3}
        known = dict.fromkeys(grids, self.patch) if isinstance(self.patch, int) else self.patch
        place = "patch" if isinstance(self.patch, int) else "patch.{}"
        for name in (name for name in known if name not in grids):
            yield place.format(name), f"'{name}' is no image or map of this stage{did_you_mean(name, grids)}"
        for name, (_, height, width) in grids.items():
            if name not in known:
                yield "patch", f"does not name '{name}', which needs one too"
            elif height % known[name] or width % known[name]:
                problem = f"patches of {known[name]} do not divide '{name}', which is {height} x {width}"
                yield place.format(name), problem
        sides = {
            name: (grid[1] // known[name], grid[2] // known[name]) for name, grid in grids.items() if name in known
        }
        if self.streams == "merged" and len(set(sides.values())) > 1:
            listed = ", ".join(f"'{name}' has {h} x {w}" for name, (h, w) in sides.items())
            yield "streams", f"merged needs as many patches of every image and map, but {listed}"
        if pictured and not grids:
            yield "kind", "given images and maps are channels of a generated one, which this stage does not have"


class JointNetworkSpec(Spec):
    """One network for an image and vectors: a U-Net and priors conditioned on each other's features."""

    kind: Literal["joint"]
    image: UNetSpec
    vector: PriorSpec
    seen: PositiveInt = Field(default=64, description="image features that the priors receive")


Network = Annotated[
    Annotated[UNetSpec | PriorSpec | TransformerSpec | JointNetworkSpec, Field(discriminator="kind"), Ours]
    | Annotated[CodeSpec, Theirs],
    OURS_OR_CODE,
]


# For Python, where the class implies the kind.
UNet = partial(UNetSpec, kind="unet")
Prior = partial(PriorSpec, kind="prior")
Transformer = partial(TransformerSpec, kind="transformer")
JointNetwork = partial(JointNetworkSpec, kind="joint")
