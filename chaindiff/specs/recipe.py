"""The fields of a recipe: pydantic models that refuse unknown fields. Imports no torch."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt

from chaindiff.specs.base import Memory, Name, Positive, Problems, Spec, UpToMillion, UpToTenMillion
from chaindiff.specs.clip_models import plain
from chaindiff.specs.code import OURS_OR_CODE, CodeDataSpec, CodeEncoderSpec, Ours, Theirs
from chaindiff.specs.stage import StageSpec

# ---------------------------------------------------------------- data


class DataSpec(Spec):
    """The training data: a folder, a zip (EDM or imagefolder convention), or the name of an embedded set."""

    kind: Literal["images"] = "images"
    path: str = Field(description="a folder or zip of images, or `emoji64` (embedded)")
    split: str | None = Field(default=None, description="use only the images whose metadata or folder say this `split`")
    where: dict[str, str | list[str]] = Field(
        default={}, description="use only rows whose field has this value (or one of); an override of `{}` clears it"
    )


Data = Annotated[Annotated[DataSpec, Ours] | Annotated[CodeDataSpec, Theirs], OURS_OR_CODE]


# ---------------------------------------------------------------- encoders


class PcaSpec(Spec):
    """The first k principal components of an encoder's output (a map's channels), fitted once on the training data."""

    kind: Literal["pca"]
    k: UpToMillion


class KMeansSpec(Spec):
    """The nearest of k centroids, fitted once on the training data: its index for a label, itself for a vector."""

    kind: Literal["kmeans"]
    k: UpToMillion
    seed: NonNegativeInt = 0


Reducer = Annotated[PcaSpec | KMeansSpec, Field(discriminator="kind")]


class ResizeSpec(Spec):
    """image -> smaller image, antialiased."""

    kind: Literal["resize"]
    of: Name
    filter: Literal["box", "bilinear", "bicubic"] = "box"


class OpenClipSpec(Spec):
    """image or text -> embedding, by an open_clip tower; for a label, its K-means cluster.

    A map is the last patch tokens of an image tower, or the last features of a convolutional one, resized to its grid.
    """

    kind: Literal["open_clip"]
    of: Name
    model: Annotated[str, AfterValidator(plain)] = Field(
        description="an open_clip model name, `clip_emoji` (embedded), a folder with open_clip_config.json, also as "
        "`local-dir:FOLDER`, or such a repository of the hub: `hf-hub:ORG/NAME`, or `hf-hub:ORG/NAME@REVISION` to pin "
        "a branch, tag or commit"
    )
    pretrained: str | None = Field(
        default=None, description="an open_clip tag, or a weights file; none for a folder and for `hf-hub:`"
    )
    interpolation: Literal["bilinear", "bicubic"] | None = Field(
        default=None, description="antialiased resize to the model's own resolution; none: the model's own filter"
    )
    reduce: Reducer | None = None
    scaling: Literal["standardise", "raw"] = Field(
        default="standardise", description="raw: unscaled, as published with an RMS of 0.5"
    )


class FileSpec(Spec):
    """Precomputed vectors or maps, one for every image of the data; no other image can be encoded.

    A safetensors file with a tensor [rows, *shape] (`features`, or of the variable's name) and optionally the images'
    file names as a JSON list under `names` in its metadata, or a .npy file. Without names, rows follow the order of the
    data's file names, which are sorted.
    """

    kind: Literal["file"]
    path: str
    identity: str | None = Field(
        default=None, description="what the vectors are, such as the encoder's name and version; none: the file's name"
    )
    reduce: Reducer | None = None
    scaling: Literal["standardise", "raw"] = Field(default="standardise", description="raw: unscaled, as in the file")

    @property
    def called(self) -> str:
        """What the vectors are, independent of the path."""
        return self.identity or PurePath(self.path).name

    def problems(self) -> Problems:
        if PurePath(self.path).suffix not in (".safetensors", ".npy"):
            yield "path", f"expected a .safetensors or .npy file, not '{self.path}'"


Encoder = Annotated[
    Annotated[ResizeSpec | OpenClipSpec | FileSpec, Field(discriminator="kind"), Ours]
    | Annotated[CodeEncoderSpec, Theirs],
    OURS_OR_CODE,
]


# ---------------------------------------------------------------- decoders


class EnlargeSpec(Spec):
    """image -> larger image."""

    kind: Literal["resize"]
    of: Name
    filter: Literal["box", "bilinear", "bicubic"] = "bilinear"


Decoder = Annotated[Annotated[EnlargeSpec, Ours] | Annotated[CodeEncoderSpec, Theirs], OURS_OR_CODE]


# ---------------------------------------------------------------- variables

SHAPES = {
    "image": "[channels, height, width]", "map": "[channels, height, width]", "vector": "[elements]",
    "tokens": "[length, width]", "label": "[number of classes]", "text": "[]",
}  # fmt: skip
A = {name: f"a {name}" for name in SHAPES} | {"image": "an image", "tokens": "tokens"}


class VariableSpec(Spec):
    """A named random quantity of the chain."""

    kind: Literal["image", "map", "vector", "tokens", "label", "text"] = Field(
        description="map: a grid of features that is no image, such as a tower's patch tokens or a latent; no range"
    )
    shape: list[UpToMillion] = []
    encoder: Encoder | None = None
    decoder: Decoder | None = Field(default=None, description="computes it from a generated variable, such as a latent")
    source: Literal["empirical", "uniform", "given"] | None = Field(
        default=None, description="where the value comes from when nothing produces it"
    )
    of: str | None = Field(
        default=None,
        description="the metadata's field of a label or text, by default of its own name, or of a vector",
    )
    sigma_data: Positive = Field(default=0.5, description="standard deviation of the clean values, per element")

    @property
    def reads(self) -> str | None:
        """The variable that the encoder reads, if there is one."""
        return None if self.encoder is None or isinstance(self.encoder, FileSpec) else self.encoder.of

    def problems(self) -> Problems:
        kind, shape, encoder = self.kind, self.shape, self.encoder
        if len(shape) != (0 if kind == "text" else SHAPES[kind].count(",") + 1):
            yield "shape", f"expected {SHAPES[kind]} for kind {kind}, not {shape}"
            return
        if kind == "image" and shape[1] != shape[2]:
            yield "shape", f"images are square, not {shape[1]} x {shape[2]}"
        if isinstance(encoder, FileSpec) and kind not in ("vector", "map", "label"):
            yield "encoder.kind", f"a file provides vectors, maps, or labels by clustering vectors, not {A[kind]}"
        elif isinstance(encoder, OpenClipSpec | FileSpec) and kind in ("vector", "map", "label"):
            yield from self._of_reducer(encoder)
        if self.of is not None and kind not in ("label", "text", "vector"):
            yield (
                "of",
                f"only a label, a text or a vector is read from a field of the data, not a variable of kind {kind}",
            )
        elif self.of is not None and encoder is not None:
            yield "of", "is never used: this variable is computed by its encoder, not read from a field of the data"
        if self.source in ("uniform", "empirical") and kind != "label":
            how = "uniformly" if self.source == "uniform" else "from the data"
            yield "source", f"only a label can be drawn {how}, not {A[kind]}"
        elif self.source == "empirical" and isinstance(encoder, CodeEncoderSpec):
            yield "source", "the class frequencies of a user-defined encoder are not known; use uniform"

    def _of_reducer(self, encoder: OpenClipSpec | FileSpec) -> Problems:
        """What is wrong with the reduction of an embedding to the variable's shape."""
        reduce, size = encoder.reduce, self.shape[0]
        if self.kind == "map" and isinstance(reduce, KMeansSpec):
            yield "encoder.reduce", "clusters whole vectors; the channels of a map are reduced by {kind: pca, k: ...}"
        elif self.kind in ("vector", "map"):
            if isinstance(reduce, PcaSpec) and reduce.k != size:
                yield "encoder.reduce.k", f"{reduce.k} components do not fit {A[self.kind]} of shape {self.shape}"
        elif not isinstance(reduce, KMeansSpec):
            problem = f"a label is the nearest cluster of an embedding: use {{kind: kmeans, k: {size}}}"
            yield "encoder.reduce", problem
        elif reduce.k != size:
            yield "encoder.reduce.k", f"{reduce.k} clusters do not fit a label of {size} classes"
        elif encoder.scaling == "raw":
            yield "encoder.scaling", "is never used: a cluster's index is not scaled"


class SampleSpec(Spec):
    want: list[Name] = []
    given: dict[Name, Any] = Field(
        default={},
        description="known values: a class's name or number for a label, the text for a text, or a list of these, one "
        "per sample; else a file or folder. `--set sample.given={}` clears them, `--given NAME=null` removes one",
    )
    count: UpToTenMillion = 64
    seed: NonNegativeInt = 0
    batch: UpToMillion = 64
    exact: bool = Field(default=False, description="pad every call to one tile: bit-identical for any batch size")
    execution: Literal["auto", "eager", "compile"] = Field(
        default="auto",
        description="compile: with code for this machine, built once and kept; auto: where that saves time",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        default="auto",
        description="of the networks only; auto: bf16 for stages where it is faster and its measured error is small",
    )
    max_memory: Memory | None = Field(
        default=None,
        description="for weights and activations, such as 4GB: beyond it, samples are made a part of the batch at a "
        "time, with only the running stage's weights; none: no limit",
    )

    def problems(self) -> Problems:
        if self.max_memory is not None and self.execution == "compile":
            yield "max_memory", "does not bound compiled networks, which keep their own weights: set execution to eager"


class EvaluateSpec(Spec):
    """What `chaindiff evaluate` measures, and against what."""

    count: UpToTenMillion = Field(default=1000, description="samples per row")
    judges: Annotated[list[str], Field(min_length=1)] = Field(
        default=["judge_conv", "judge_vit"], description="feature extractors; `chaindiff list judges` shows all"
    )
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        default=[0], description="sampling seeds; metrics are reported for each and averaged"
    )
    reference: str | None = Field(default=None, description="the split to compare with; none: the recipe's own data")
    held_out: str | None = Field(
        default="test", description="the held-out split, for floors and memorisation; none: not available"
    )


class Recipe(Spec):
    """A chain: data, variables, stages, sampling."""

    name: Name
    description: str = ""
    data: Data
    variables: dict[Name, VariableSpec]
    stages: dict[Name, StageSpec]
    sample: SampleSpec = SampleSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
