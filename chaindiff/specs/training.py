"""The fields of training: optimizer, EMA, augmentation. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from chaindiff.specs.base import NonNegative, Positive, Probability, Problems, Spec, UpToMillion, by_default


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
    eps: Positive = Field(
        default=1e-8,
        description="for a loss that is a mean over elements; of one that is summed over N, as EDM's, it is eps / N",
    )
    weight_decay: NonNegative = 0.0
    warmup: NonNegativeInt = Field(default=0, description="images over which the learning rate rises linearly")
    decay: NonNegativeInt = Field(
        default=0, description="images at the end over which the learning rate falls to 0 as a cosine"
    )
    clip: NonNegative = Field(default=1.0, description="largest gradient norm; 0: none, as in EDM")


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


Ema = Annotated[EmaSpec | PowerEmaSpec, Field(discriminator="kind"), by_default("exponential")]


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
