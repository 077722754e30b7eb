"""The fields of a stage card: network, links, preconditioning, training, sampling. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from chaindiff.io.errors import did_you_mean
from chaindiff.specs.base import (
    PROBLEM,
    Name,
    NonNegative,
    Positive,
    Probability,
    Problems,
    Spec,
    UpToMillion,
    UpToThousand,
)
from chaindiff.specs.code import CODE, OURS_OR_CODE, CodeSpec, Ours, Theirs, is_code
from chaindiff.specs.path import (
    CascadedLevels,
    IndependentLevels,
    MixtureLevels,
    SamplePath,
    TablePath,
    TrainPath,
    hidden,
)

# ---------------------------------------------------------------- networks


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


# ---------------------------------------------------------------- stages


def largest_grid(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The name of the image or map, [channels, height, width], with the most pixels, the first of equal ones.

    What a stage is given in the form of channels is concatenated with this one of the variables that it generates.
    """
    grids = {name: shape[1] * shape[2] for name, shape in shapes.items() if len(shape) == 3}
    return max(grids, key=grids.__getitem__, default=None)


def no_channels(name: str, shape: Sequence[int], target: str, size: Sequence[int]) -> str | None:
    """Why a given map cannot be channels of the generated variable, if it cannot; an image is resized."""
    if [*shape[1:]] == [*size[1:]]:
        return None
    (_, height, width), grid = shape, " x ".join(map(str, size[1:])) or "no grid at all"
    return (
        f"the map '{name}' has a grid of {height} x {width}, and '{target}' {grid}: a given map becomes channels of "
        "what is generated, which needs the same size; maps are not resized"
    )


def _by_default(kind: str) -> BeforeValidator:
    """The default kind of a mapping."""
    return BeforeValidator(lambda said: {"kind": kind, **said} if isinstance(said, dict) else said)


class LinkSpec(Spec):
    """How a stage receives one given variable, and what training does to it."""

    variable: Name
    dropout: Probability = Field(default=0.0, description="probability of absence in training")
    null: Literal["zeros", "learned"] = Field(default="zeros", description="what replaces an absent value")
    presence: bool = Field(
        default=True, description="give the network an indicator of absence where needed; false: as in EDM's format"
    )
    noise: NonNegative = Field(
        default=0.0,
        description="largest level of noise-conditioning augmentation in training (0: none), given to the network",
    )
    keep: list[NonNegativeInt] = Field(
        default=[],
        description="train on the first k entries, k drawn from this list and given to the network; none: all",
    )

    @property
    def can_be_absent(self) -> bool:
        """Whether training includes samples without the value."""
        return self.dropout > 0 or 0 in self.keep

    def problems(self) -> Problems:
        if self.keep and not max(self.keep):
            yield "keep", "with 0 alone the value is never given; leave the link out"


Link = Annotated[
    LinkSpec,
    BeforeValidator(
        lambda said: {"variable": said} if isinstance(said, str) else said, json_schema_input_type=Name | LinkSpec
    ),
]  # a bare name is short for {variable: name}


class VpSpec(Spec):
    """The variance-preserving formulation (Song et al. 2021b; EDM, table 1): its network, or its training noise."""

    kind: Literal["vp"]
    beta_d: Positive = 19.9
    beta_min: Positive = 0.1
    eps: Annotated[float, Field(gt=0, lt=1)] = Field(default=1e-5, description="smallest time of training")


class VeSpec(Spec):
    """The variance-exploding formulation (Song et al. 2021b; EDM, table 1): its network, or its training noise."""

    kind: Literal["ve"]
    sigma_min: Positive = 0.02
    sigma_max: Positive = 100.0

    def problems(self) -> Problems:
        if self.sigma_min >= self.sigma_max:
            yield "sigma_min", f"{self.sigma_min:g} should be below sigma_max, {self.sigma_max:g}"


class IddpmSpec(Spec):
    """iDDPM's discrete formulation (Nichol & Dhariwal 2021; EDM, table 1): its network, or its training noise."""

    kind: Literal["iddpm"]
    levels: Annotated[int, Field(ge=2)] = 1000


class PreconditionSpec(Spec):
    """What the network predicts, for parametrisations that accept every noise level."""

    kind: Literal["edm", "x0", "v", "flow"] = Field(
        default="edm",
        description="x0: the network predicts the clean value (VCDM's prior); v: Salimans & Ho's velocity; "
        "flow: the velocity of flow matching",
    )
    loss: Literal["own", "velocity"] = Field(
        default="own",
        description="own: as published with what the network predicts; velocity: that of flow matching, 1 - t at least "
        "0.05 (x0 alone: JiT, Latent Forcing)",
    )

    def problems(self) -> Problems:
        if self.loss != "own" and self.kind != "x0":
            yield "loss", f"'{self.loss}' is for networks that predict x0, not {self.kind}"


Precondition = Annotated[
    PreconditionSpec | VpSpec | VeSpec | IddpmSpec,
    Field(discriminator="kind"),
    _by_default("edm"),
]


class _Shiftable(Spec):
    shift: Positive = Field(
        default=1.0, description="multiplies the levels: the time shift of flow matching (SD3; RAE: 6.93), 1: none"
    )


class NoiseSpec(_Shiftable):
    """Training noise: ln sigma ~ N(mean, std^2) (EDM, table 1)."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = -1.2
    std: Positive = 1.2


class LogitNormalSpec(_Shiftable):
    """Training noise of flow matching: logit t ~ N(mean, std^2), which is ln sigma (Esser et al. 2024)."""

    kind: Literal["logit_normal"]
    mean: float = 0.0
    std: Positive = 1.0


class UniformTimeSpec(_Shiftable):
    """Training noise of flow matching: t ~ U(min, max), sigma = t / (1 - t) (Liu et al. 2022)."""

    kind: Literal["uniform_time"]
    min: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    max: Annotated[float, Field(gt=0, lt=1)] = 1 - 1e-3

    def problems(self) -> Problems:
        if self.min >= self.max:
            yield "min", f"{self.min:g} should be below max, {self.max:g}"


class CosineNoiseSpec(_Shiftable):
    """Training noise: uniform time of the cosine schedule, log-SNR within 20 of 0 (Salimans & Ho 2022)."""

    kind: Literal["cosine"]


NoiseLevels = Annotated[
    NoiseSpec | LogitNormalSpec | UniformTimeSpec | CosineNoiseSpec | VpSpec | VeSpec | IddpmSpec,
    Field(discriminator="kind"),
    _by_default("lognormal"),
]


def published_noise(precondition: Precondition) -> NoiseLevels:
    """The training noise that a parametrisation was published with."""
    if not isinstance(precondition, PreconditionSpec):
        return precondition
    published = {"v": CosineNoiseSpec(kind="cosine"), "flow": LogitNormalSpec(kind="logit_normal")}
    return published.get(precondition.kind, NoiseSpec())


class AugmentSpec(Spec):
    """EDM's geometric augmentation with its 9-d label, and colour jitter; the same draw for every stage of a chain."""

    probability: Probability = 0.0
    flip: bool = True
    colour: NonNegative = Field(default=0.0, description="strength of the colour jitter; 0: none")
    variants: NonNegativeInt = Field(
        default=0, description="augmented variants per image that embeddings are cached for; 0: embed at every step"
    )
    seed: NonNegativeInt = 0


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Spec):
    kind: Literal["adam", "adamw"] = "adam"
    lr: Positive = 1e-4
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    warmup: NonNegativeInt = Field(default=0, description="images over which the learning rate rises linearly")
    decay: NonNegativeInt = Field(
        default=0, description="images at the end over which the learning rate falls to 0 as a cosine"
    )
    clip: NonNegative = Field(default=1.0, description="largest gradient norm; 0: none")


class EmaSpec(Spec):
    """Exponential moving average of the weights, with EDM's half-life and warm-up."""

    kind: Literal["exponential"] = "exponential"
    half_life: NonNegative = Field(default=500_000, description="in images")
    rampup: NonNegative | None = Field(default=0.05, description="half-life is at most this share of the images so far")


RelativeStd = Annotated[float, Field(gt=0, lt=12**-0.5)]  # the bound is that of the plain average


class PowerEmaSpec(Spec):
    """EDM2's power-function EMA; other lengths are reconstructed from its snapshots."""

    kind: Literal["power"]
    tracks: Annotated[list[RelativeStd], Field(min_length=1)] = Field(
        default=[0.05, 0.10],
        description="sigma_rel of every EMA that is tracked, its width as a share of the training so far; "
        "the stage's weights are those of the first",
    )
    snapshot_every: PositiveInt = Field(default=100_000, description="images between snapshots of all tracks")

    def problems(self) -> Problems:
        if len(set(self.tracks)) < len(self.tracks):
            yield "tracks", f"the same EMA is tracked twice: {self.tracks}"


Ema = Annotated[
    EmaSpec | PowerEmaSpec,
    Field(discriminator="kind"),
    _by_default("exponential"),
]


class TrainSpec(Spec):
    images: NonNegativeInt = Field(description="training images seen in all")
    batch: UpToMillion = 256
    accumulate: PositiveInt = Field(default=1, description="micro-batches per step; batch is their total")
    optimizer: OptimizerSpec = OptimizerSpec()
    ema: Ema = EmaSpec()
    precision: Literal["float32", "bf16"] = "float32"
    execution: Literal["auto", "eager", "compile"] = Field(default="auto", description="auto: compile where it pays")
    checkpoint_every: PositiveInt = Field(default=100_000, description="images between checkpoints")
    preview_every: NonNegativeInt = Field(default=0, description="images between preview grids; 0: none")
    log_every: PositiveInt = Field(default=50, description="steps between lines of metrics.jsonl")
    seed: NonNegativeInt = 0

    def problems(self) -> Problems:
        if self.batch % self.accumulate:
            yield "accumulate", f"{self.accumulate} micro-batches do not divide a batch of {self.batch}"


class ChurnSpec(Spec):
    """EDM's stochastic sampler (algorithm 2)."""

    amount: NonNegative = Field(default=0.0, description="S_churn")
    min: NonNegative = Field(default=0.0, description="S_min")
    max: Positive | None = Field(default=None, description="S_max; none: no limit")
    noise: Positive = Field(default=1.0, description="S_noise")

    def problems(self) -> Problems:
        if self.max is not None and self.min > self.max:
            yield "min", f"{self.min:g} should not be above churn.max, {self.max:g}"


_RANGE = 700  # of logarithms of numbers
# sigma_min and sigma_max of EDM's sampler by discretisation (its published defaults); vp: times from 0.001 to 1
_LEVELS = {
    "edm": (0.002, 80.0),
    "vp": (math.expm1(19.9 / 2 * 1e-6 + 0.1 * 1e-3) ** 0.5, math.expm1(19.9 / 2 + 0.1) ** 0.5),
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
    "time": (0.002, 80.0),
}


class LinkSampling(Spec):
    """What sampling does to one given variable."""

    noise: NonNegative = Field(default=0.0, description="noise level of its conditioning augmentation")
    keep: NonNegativeInt | None = Field(
        default=None, description="entries of the vector that are given; none: the most used in training"
    )
    absent: bool = Field(default=False, description="sample as if the value were not known")

    @property
    def sampled(self) -> bool:
        """Whether sampling uses the value at all."""
        return not self.absent and self.keep != 0


class VariableSampling(Spec):
    """What sampling does for one of several variables that are generated together; none: as for all."""

    steps: Annotated[int, Field(gt=0, le=100_000)] | None = None
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None
    rho: Positive | None = None
    shift: Positive | None = None
    guidance: Positive | dict[Name, Positive] | None = None
    guidance_interval: tuple[NonNegative, Positive] | None = None


class SamplerSpec(Spec):
    """How to sample: EDM's independent choices of solver, steps, schedule and noise (section 3), and guidance."""

    solver: Literal["euler", "heun", "dpmpp_2m", "ddim"] = "heun"
    steps: Annotated[int, Field(gt=0, le=100_000)] = 18
    discretisation: Literal["edm", "vp", "ve", "iddpm", "time"] = Field(
        default="edm",
        description="where the steps lie: as published with one formulation, or evenly in the schedule's time",
    )
    schedule: Literal["linear", "vp", "ve", "iddpm", "cosine", "logsnr", "flow"] = Field(
        default="linear", description="sigma(t) and s(t) of the equation that is solved; linear: sigma = t, s = 1"
    )
    sigma_min: Positive | None = Field(
        default=None,
        description="last level above 0; none: as published with the discretisation (edm: 0.002), or what the "
        "parametrisation allows",
    )
    sigma_max: Positive | None = Field(default=None, description="first level; none: likewise (edm: 80)")
    rho: Positive = Field(default=7.0, description="concentration of the edm discretisation at low levels")
    churn: ChurnSpec = ChurnSpec()
    eta: Probability = Field(
        default=0.0,
        description="noise added by ddim (1: ancestral sampling) and dpmpp_2m (1: DPM-Solver++ SDE); 0: none",
    )
    guidance: Positive | dict[Name, Positive] = Field(
        default=1.0,
        description="classifier-free guidance scale, or one for each given variable that can be absent; 1: off",
    )
    guidance_interval: tuple[NonNegative, Positive] | None = Field(
        default=None, description="guide only where the level is above the first and at most the second; none: always"
    )
    links: dict[Name, LinkSampling] = Field(default={}, description="what sampling does to given variables, by name")
    shift: Positive = Field(
        default=1.0, description="multiplies the levels of the steps, between the same ends: the time shift, 1: none"
    )
    path: SamplePath | None = Field(
        default=None,
        description="of several variables: how their levels go down together; none: as training drew them, independent "
        "levels together",
    )
    variables: dict[Name, VariableSampling] = Field(
        default={}, description="of several variables: settings of one of them, by name"
    )

    def of(self, name: str) -> SamplerSpec:
        """The settings for one of several variables."""
        own = self.variables.get(name)
        return self if own is None else self.model_copy(update=own.model_dump(exclude_none=True))

    @property
    def levels(self) -> tuple[float, float]:
        """(sigma_min, sigma_max), as set or as published with the discretisation."""
        low, high = _LEVELS[self.discretisation]
        return self.sigma_min or low, self.sigma_max or high

    def link(self, name: str) -> LinkSampling:
        """What sampling does to a given variable."""
        return self.links.get(name, LinkSampling())

    def problems(self) -> Problems:
        low, high = self.levels
        if low >= high and self.sigma_min:
            yield "sigma_min", f"{low:g} should be below sigma_max, {high:g}"
        elif low >= high:
            yield "sigma_max", f"{high:g} should be above sigma_min, {low:g}"
        if max(abs(math.log(low)), abs(math.log(high))) > _RANGE * self.rho:
            yield "rho", f"{self.rho:g} is too small: the levels to its inverse power are beyond every number"
        if self.rho != type(self).model_fields["rho"].default and self.discretisation != "edm":
            yield "rho", f"shapes the steps of discretisation edm alone, not of {self.discretisation}"
        if self.eta and self.solver not in ("ddim", "dpmpp_2m"):
            yield "eta", f"is for ddim and dpmpp_2m; {self.solver} takes its noise from `churn`"
        elif self.eta and self.churn.amount:
            yield "eta", "and churn both add noise to every step; set one of them to 0"
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            yield "guidance_interval", "should rise: the level is above the first number and at most the second"

    def untrained(self, links: Mapping[str, LinkSpec], hidden: Collection[str] = ()) -> Problems:
        """What this asks that training did not cover, of given variables and of those that it could `hidden`."""
        for name, said in self.links.items():
            field, link = f"links.{name}", links.get(name)
            if link is None:
                yield field, f"the stage is not given '{name}'{did_you_mean(name, links)}"
                continue
            if said.noise > link.noise:
                problem = f"{said.noise:g} is above {link.noise:g}, the largest level in training (`noise`)"
                yield f"{field}.noise", problem
            if said.keep is not None and said.keep not in link.keep:
                known = f"one of {link.keep}" if link.keep else "which this link does not set"
                yield f"{field}.keep", f"{said.keep} was not trained: it should be in the link's `keep`, {known}"
            if said.absent and not link.can_be_absent:
                problem = "the value is never absent in training: the link has no `dropout`, and no 0 in `keep`"
                yield f"{field}.absent", problem
        droppable = [name for name, link in links.items() if link.can_be_absent and self.link(name).sampled]
        said = {"guidance": self.guidance} | {
            f"variables.{name}.guidance": own.guidance for name, own in self.variables.items() if own.guidance
        }
        for field, guidance in said.items():
            if not isinstance(guidance, dict):
                if guidance != 1 and not droppable:
                    problem = f"{guidance:g} needs unconditional predictions, but no link of this stage has `dropout`"
                    yield field, problem
                continue
            for name in guidance:
                if name not in (*droppable, *hidden):
                    tail = "has no `dropout`, so it is never absent" if name in links else "is not given to this stage"
                    yield f"{field}.{name}", f"needs a prediction without '{name}', which {tail}"


class Generated(Spec):
    """One of the variables that a stage generates; none: as the stage says."""

    precondition: Precondition | None = None
    noise: NoiseLevels | None = None
    weight: Annotated[float, Field(gt=0, le=1e6)] = Field(default=1.0, description="of its loss among all variables'")


def _named(said: Any) -> Any:
    """A list of names is short for a mapping without settings."""
    if isinstance(said, str):
        raise PydanticCustomError(PROBLEM, "expected a list or a mapping of names, not '{name}'", {"name": said})
    if isinstance(said, list) and all(isinstance(name, str) for name in said):
        if twice := next((name for name in said if said.count(name) > 1), None):
            raise PydanticCustomError(PROBLEM, "'{name}' is named twice", {"name": twice})
        return {name: {} for name in said}
    return said


class StageSpec(Spec):
    """One stage: generates a variable given others, or several together."""

    # Editors require a network where the loader does: not of user-defined stages.
    model_config = ConfigDict(
        json_schema_extra={"if": {"properties": {"kind": {"const": "diffusion"}}}, "then": {"required": ["network"]}}
    )

    description: str = ""
    kind: Annotated[str, Field(pattern=f"^(diffusion|{CODE})$")] = Field(
        default="diffusion", description="`diffusion`, or a user-defined class: `MODULE:NAME`, with `--allow-code`"
    )
    settings: dict[str, Any] = Field(default={}, description="keyword arguments of a user-defined class")
    generates: (
        Annotated[
            dict[Name, Generated],
            Field(min_length=1),
            BeforeValidator(_named, json_schema_input_type=list[Name] | dict[Name, Generated]),
        ]
        | None
    ) = Field(
        default=None,
        description="a list of names, or a mapping of names to settings of their own; none: the variable of the "
        "stage's name; of several, the first leads (`path`)",
    )
    path: TrainPath = Field(
        default=IndependentLevels(), description="of several variables: how training draws their levels together"
    )
    given: list[Link] = []
    network: Network | None = Field(default=None, description="required unless the kind is a user-defined class")
    precondition: Precondition = PreconditionSpec()
    noise: NoiseLevels = Field(default=NoiseSpec(), description="none: what the parametrisation was published with")
    augment: AugmentSpec = AugmentSpec()
    train: TrainSpec
    sample: SamplerSpec = SamplerSpec()
    weights: str | None = Field(
        default=None,
        description="a weights file, or the directory of a run that trained this stage; none: the run's own or the "
        "shipped file",
    )
    init: str | None = Field(default=None, description="a weights file that training starts from")

    @field_validator("network")
    @classmethod
    def _network(cls, said: Network | None, info: ValidationInfo) -> Network | None:
        if said is None and info.data.get("kind") == "diffusion":
            raise PydanticCustomError("missing", "Field required")
        return said

    def model_post_init(self, context: Any) -> None:
        if "noise" not in self.model_fields_set:  # a frozen model is filled in as pydantic itself does it
            object.__setattr__(self, "noise", published_noise(self.precondition))

    def problems(self) -> Problems:
        yield from self._of_code()
        yield from self._of_given()
        yield from self._of_levels()
        yield from self._of_several()

    def _of_code(self) -> Problems:
        """Fields of diffusion stages do not apply to user-defined stages, nor the other way round."""
        if not is_code(self.kind):
            if self.settings:
                yield "settings", "are for user-defined stages, whose kind is MODULE:NAME"
            return
        diffusion = {"network", "precondition", "noise", "path", "sample", "init"}
        said = [*self.model_dump(include=diffusion & self.model_fields_set, exclude_defaults=True)]
        for index, link in enumerate(self.given):
            said += [f"given.{index}.{f}" for f in link.model_dump(exclude={"variable"}, exclude_defaults=True)]
        for field in sorted(said):
            yield field, "is for diffusion stages; arguments of this stage's code go into its `settings`"

    def _of_given(self) -> Problems:
        names = [link.variable for link in self.given]
        for index, link in enumerate(self.given):
            if link.variable in names[:index]:
                yield f"given.{index}", f"'{link.variable}' is given twice"
            if link.null == "learned" and not link.can_be_absent:
                problem = "is never used: the link has no `dropout`, so its value is never absent in training"
                yield f"given.{index}.null", problem

    def _of_levels(self) -> Problems:
        """Whether network, preconditioning and training noise are compatible."""
        kind = self.precondition.kind
        if not isinstance(self.precondition, PreconditionSpec) and self.noise != self.precondition:
            tail = f"leave `noise` out, or use precondition: {{kind: edm}}, which takes noise of kind {self.noise.kind}"
            problem = f"a network of kind {kind} needs training noise of kind {kind} with the same numbers; {tail}"
            yield "noise", problem
        network, place = self.network, "network.arch"
        if isinstance(network, JointNetworkSpec):
            network, place = network.image, "network.image.arch"
        if isinstance(network, UNetSpec) and network.arch == "ncsnpp" and kind not in ("edm", "x0", "ve"):
            tail = f"but {kind} uses times up to 1000; use ddpmpp"
            problem = f"ncsnpp embeds the logarithm of a level (edm, x0, ve), {tail}"
            yield place, problem

    def _of_several(self) -> Problems:
        """Whether options for several variables are used with several variables."""
        names = [*(self.generates or ())]
        if len(names) < 2:
            single = {"path": self.path != IndependentLevels(), "sample.path": self.sample.path is not None}
            for field, unused in (*single.items(), ("sample.variables", bool(self.sample.variables))):
                if unused:
                    yield field, "is for stages that generate several variables together; this one generates one"
            if isinstance(self.network, JointNetworkSpec):
                alone = f"'{names[0]}' alone" if names else "one variable"
                yield "generates", f"a joint network generates one image or map and one or more vectors, not {alone}"
            return
        for own in (self.precondition, *(said.precondition for said in (self.generates or {}).values())):
            if own is not None and not isinstance(own, PreconditionSpec):
                reason = "at which one of several variables is known exactly; use edm, x0, v or flow"
                yield "precondition", f"a network of kind {own.kind} does not accept level 0, {reason}"
        yield from self._of_paths(names)
        if self.init is not None:
            yield "init", "initialises one network with another's weights; a joint network consists of several"

    @property
    def hideable(self) -> list[str]:
        """The variables that it generates and can do without, as guidance by them needs."""
        several = [*(self.generates or ())]
        return several if len(several) > 1 and hidden(self.path) else []

    def _of_paths(self, names: list[str]) -> Problems:
        """Whether paths name the variables that the stage generates."""
        whole = {"path": self.path, "sample.path": self.sample.path}
        if isinstance(self.path, MixtureLevels):
            whole |= {f"path.parts.{place}.levels": part.levels for place, part in enumerate(self.path.parts)}
        named = {"sample.variables": [*self.sample.variables]}
        for field, path in whole.items():
            if isinstance(path, TablePath):
                named[f"{field}.points"] = [*path.points]
                if missing := [name for name in names if name not in path.points]:
                    yield f"{field}.points", f"has no curve for '{missing[0]}'"
            elif isinstance(path, CascadedLevels):
                named[f"{field}.shares"] = [*path.shares]
        for field, said in named.items():
            for name in said:
                if name not in names:
                    yield f"{field}.{name}", f"the stage does not generate '{name}'{did_you_mean(name, names)}"
