"""What a recipe and a stage card may say: pydantic models that refuse unknown fields. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class Spec(BaseModel):
    """Base of every config object: frozen, unknown fields refused, defaults validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


# ---------------------------------------------------------------- data


class DataSpec(Spec):
    """Where the training data lies: a folder, a zip (EDM or imagefolder convention), or an embedded set's name."""

    path: str = Field(description="a folder or zip of images, or `emoji64` (embedded)")
    split: str | None = Field(default=None, description="keep the rows of metadata.jsonl whose `split` is this")
    where: dict[str, str | list[str]] = Field(
        default={}, description="keep the rows whose field has this value (or one of)"
    )


# ---------------------------------------------------------------- encoders


class PcaSpec(Spec):
    """The first k principal components of an encoder's output, fitted once on the training data."""

    kind: Literal["pca"]
    k: PositiveInt


class ResizeSpec(Spec):
    """image -> smaller image, antialiased."""

    kind: Literal["resize"]
    of: Name
    filter: Literal["box", "bilinear", "bicubic"] = "box"


class OpenClipSpec(Spec):
    """image or text -> embedding, by an open_clip tower."""

    kind: Literal["open_clip"]
    of: Name
    model: str = Field(
        description="an open_clip model name, `clip_emoji` (embedded), or a folder with open_clip_config.json"
    )
    pretrained: str | None = Field(
        default=None, description="an open_clip tag, or a weights file; none for a local folder"
    )
    interpolation: Literal["bilinear", "bicubic"] | None = Field(
        default=None, description="antialiased resize to the model's own resolution; none: the model's own filter"
    )
    reduce: PcaSpec | None = None
    scaling: Literal["standardise", "raw"] = Field(
        default="standardise", description="raw: as published, where RMS is 0.5"
    )


Encoder = Annotated[ResizeSpec | OpenClipSpec, Field(discriminator="kind")]


# ---------------------------------------------------------------- variables


class VariableSpec(Spec):
    """A named random quantity of the chain."""

    kind: Literal["image", "vector", "tokens", "label", "text"]
    shape: list[PositiveInt] = []
    encoder: Encoder | None = None
    source: Literal["empirical", "uniform", "given"] | None = Field(
        default=None, description="where the value comes from when nothing produces it"
    )
    of: str | None = Field(
        default=None, description="for a label or text: the field of metadata.jsonl; none: the variable's name"
    )
    sigma_data: PositiveFloat = Field(default=0.5, description="standard deviation of the clean values, per element")


# ---------------------------------------------------------------- networks


class UNetSpec(Spec):
    """A U-Net of EDM's family: DDPM++ by default, NCSN++ and ADM as options of the same blocks."""

    kind: Literal["unet"]
    arch: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    channels: PositiveInt = 128
    mult: list[PositiveInt] = [1, 2, 2, 2]
    blocks: PositiveInt = 4
    attention: list[PositiveInt] = Field(default=[16], description="resolutions with self-attention")
    dropout: Probability = 0.1


class PriorSpec(Spec):
    """A DALL-E 2 style decoder-only transformer for vectors."""

    kind: Literal["prior"]
    width: PositiveInt = 512
    depth: PositiveInt = 6
    heads: PositiveInt = 8
    dropout: Probability = 0.0


Network = Annotated[UNetSpec | PriorSpec, Field(discriminator="kind")]


# ---------------------------------------------------------------- stages


class LinkSpec(Spec):
    """How a stage receives one given variable."""

    variable: Name
    dropout: Probability = Field(default=0.0, description="probability of absence in training")
    null: Literal["zeros", "learned"] = Field(default="zeros", description="what stands for an absent value")
    presence: bool = Field(
        default=True, description="tell the network when the value can be absent; false as in EDM's format"
    )
    noise: NonNegativeFloat = Field(
        default=0.0,
        description="largest level of noise-conditioning augmentation in training (0: none); the level is told",
    )
    keep: list[NonNegativeInt] = Field(
        default=[],
        description="train on the first k entries of a vector, k drawn from this list and told; none: always on all",
    )
    sample_noise: NonNegativeFloat = Field(default=0.0, description="level of the noise on this link when sampling")
    sample_keep: NonNegativeInt | None = Field(
        default=None, description="entries of the vector that sampling gives; none: the most of `keep`"
    )
    sample_absent: bool = Field(default=False, description="sample as if the value were not known")

    @property
    def can_be_absent(self) -> bool:
        """Whether training teaches the stage to go without the value."""
        return self.dropout > 0 or 0 in self.keep

    @property
    def sampled(self) -> bool:
        """Whether sampling looks at the value at all."""
        return not self.sample_absent and self.sample_keep != 0


Link = Annotated[
    LinkSpec,
    BeforeValidator(
        lambda said: {"variable": said} if isinstance(said, str) else said, json_schema_input_type=Name | LinkSpec
    ),
]  # a bare name is short for {variable: name}


class PreconditionSpec(Spec):
    kind: Literal["edm", "x0"] = Field(
        default="edm", description="x0: the network predicts the clean value (VCDM's prior)"
    )


class NoiseSpec(Spec):
    """Training noise: ln sigma ~ N(mean, std^2) (EDM, table 1)."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = -1.2
    std: PositiveFloat = 1.2


class AugmentSpec(Spec):
    """EDM's geometric augmentation with its 9-d label, and colour jitter; the same draw for every stage of a chain."""

    probability: Probability = 0.0
    flip: bool = True
    colour: NonNegativeFloat = Field(default=0.0, description="strength of the colour jitter; 0: none")
    variants: NonNegativeInt = Field(
        default=0, description="augmented variants per image that embeddings are cached for; 0: embed at every step"
    )
    seed: NonNegativeInt = 0


class OptimizerSpec(Spec):
    kind: Literal["adam", "adamw"] = "adam"
    lr: PositiveFloat = 1e-4
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup: NonNegativeInt = Field(default=0, description="images over which the learning rate rises linearly")
    decay: NonNegativeInt = Field(
        default=0, description="images at the end over which the learning rate falls to 0 as a cosine"
    )
    clip: NonNegativeFloat = Field(default=1.0, description="largest gradient norm; 0: none")


class EmaSpec(Spec):
    """Exponential moving average of the weights, with EDM's half-life and warm-up."""

    half_life: NonNegativeFloat = Field(default=500_000, description="in images")
    rampup: NonNegativeFloat | None = Field(
        default=0.05, description="half-life is at most this share of the images so far"
    )


class TrainSpec(Spec):
    images: NonNegativeInt = Field(description="training images seen in all")
    batch: PositiveInt = 256
    accumulate: PositiveInt = Field(default=1, description="micro-batches a step; batch is the whole")
    optimizer: OptimizerSpec = OptimizerSpec()
    ema: EmaSpec = EmaSpec()
    precision: Literal["float32", "bf16"] = "float32"
    execution: Literal["auto", "eager", "compile"] = Field(default="auto", description="auto: compile where it pays")
    checkpoint_every: PositiveInt = Field(default=100_000, description="images between checkpoints")
    preview_every: NonNegativeInt = Field(default=0, description="images between preview grids; 0: none")
    log_every: PositiveInt = Field(default=50, description="steps between lines of metrics.jsonl")
    seed: NonNegativeInt = 0


class ChurnSpec(Spec):
    """EDM's stochastic sampler (algorithm 2)."""

    amount: NonNegativeFloat = Field(default=0.0, description="S_churn")
    min: NonNegativeFloat = Field(default=0.0, description="S_min")
    max: PositiveFloat | None = Field(default=None, description="S_max; none: no limit")
    noise: PositiveFloat = Field(default=1.0, description="S_noise")


class SamplerSpec(Spec):
    solver: Literal["euler", "heun", "dpmpp_2m"] = "heun"
    steps: PositiveInt = 18
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0
    churn: ChurnSpec = ChurnSpec()
    guidance: PositiveFloat = Field(default=1.0, description="classifier-free guidance scale; 1 is off")


class StageSpec(Spec):
    """One stage: generates a variable given others."""

    description: str = ""
    generates: Annotated[list[Name], Field(min_length=1, max_length=1)] | None = None
    given: list[Link] = []
    network: Network
    precondition: PreconditionSpec = PreconditionSpec()
    noise: NoiseSpec = NoiseSpec()
    augment: AugmentSpec = AugmentSpec()
    train: TrainSpec
    sample: SamplerSpec = SamplerSpec()
    weights: str | None = Field(default=None, description="a weights file; none: the shipped file or the run's own")
    init: str | None = Field(default=None, description="begin training from the weights of this file")


class SampleSpec(Spec):
    want: list[Name] = []
    given: dict[Name, Any] = {}
    count: PositiveInt = 64
    seed: NonNegativeInt = 0
    batch: PositiveInt = 64
    exact: bool = Field(default=False, description="pad every call to one tile: bit-identical for any batch size")
    execution: Literal["auto", "eager", "compile"] = "auto"


class Recipe(Spec):
    """A chain: data, variables, stages, sampling."""

    name: Name
    description: str = ""
    data: DataSpec
    variables: dict[Name, VariableSpec]
    stages: dict[Name, StageSpec]
    sample: SampleSpec = SampleSpec()
