"""From a recipe to objects: variables, stages with their weights, encoders, sources, and the chain of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chaindiff.assets import registry
from chaindiff.chain import Chain, Source
from chaindiff.code import create
from chaindiff.data import open_data
from chaindiff.data.augment import augment_dim
from chaindiff.data.items import Data
from chaindiff.diffusion import Diffusion
from chaindiff.edm.random import seed
from chaindiff.encoders import Embedding, Encoder, build_decoder, build_encoder
from chaindiff.planning import ChainPlan
from chaindiff.request import Value
from chaindiff.specs.code import CodeDataSpec, CodeSpec
from chaindiff.specs.errors import UserError
from chaindiff.specs.load import LOCK, Loaded
from chaindiff.specs.recipe import FileSpec
from chaindiff.specs.stage import LinkSpec, StageSpec, TrainSpec
from chaindiff.specs.yaml import display
from chaindiff.stage import Outline, Stage, Stages, learns, subsets
from chaindiff.training import checkpoint
from chaindiff.training.begin import other_preconditioning
from chaindiff.variables import Variable, digest, variable_entry

# What changes how a run is observed, not what it learns, is no part of a stage's identity.
# Defaults are left out, so that a new field changes the identity of nothing that does not use it.
TRAINED = {"kind", "settings", "network", "precondition", "noise", "joint", "augment", "init"}
NOT_TRAINED = {"variable"}
UNLEARNED: dict[str, Any] = dict.fromkeys(
    ("checkpoint_every", "preview_every", "log_every", "execution", "accumulate"), True
)
UNLEARNED["ema"] = {"snapshot_every"}
assert set(TrainSpec.model_fields) >= set(UNLEARNED)


@dataclass
class LazyEncoder:
    """An encoder or decoder that loads when it is first used: most requests need none."""

    name: str
    of: str
    build: Callable[[], Encoder]
    _built: Encoder | None = field(default=None, repr=False)

    def __call__(self, value: Tensor) -> Tensor:
        if self._built is None:
            self._built = self.build()
        with torch.no_grad():
            return self._built(value)


class Assembly:
    """The objects of one recipe. `out` is the run's directory, where it looks for weights after the shipped ones."""

    def __init__(self, loaded: Loaded, out: Path | None = None):
        loaded.refuse_code()
        self.loaded, self.recipe, self.out = loaded, loaded.recipe, out or default_out(loaded)
        specs = self.recipe.variables
        self.variables = {name: Variable.from_specs(name, specs) for name in specs}

    # ------------------------------------------------------------ data

    @cached_property
    def data(self) -> Data:
        with self.located():
            if not isinstance(self.recipe.data, CodeDataSpec):
                return open_data(self.recipe.data)
            images = (n for n, spec in self.recipe.variables.items() if spec.kind == "image" and spec.encoder is None)
            return open_data(self.recipe.data, next(images, None))

    @contextmanager
    def located(self, place: str | None = None) -> Iterator[None]:
        """Errors that name a field of the recipe get its file and line, those without a place `place` or the file."""
        try:
            yield
        except UserError as error:
            field = error.where or place
            if field is None:
                raise UserError(error.message, display(self.loaded.path), error.hint) from error
            if field.split(".")[0] in type(self.recipe).model_fields:
                raise UserError(f"{field}: {error.message}", self.loaded.where(field), error.hint) from error
            raise

    @property
    def root(self) -> Variable:
        """The image variable that the data holds: the one that no encoder makes; it may have a decoder."""
        for name, spec in self.recipe.variables.items():
            if spec.kind == "image" and spec.encoder is None:
                return self.variables[name]
        raise UserError("no image variable of this recipe comes from its data: each has an encoder")

    def column(self, name: str) -> str:
        """The metadata field of a label or text variable."""
        return self.recipe.variables[name].of or name

    def classes(self, name: str) -> list[str]:
        """Names of a label's classes, numbers for clusters. Raises UserError if the data has another number of them."""
        if self.recipe.variables[name].encoder is not None:
            return [str(number) for number in range(*self.variables[name].shape)]
        names = self.data.categories(self.column(name))[0]
        (size,) = self.variables[name].shape
        if len(names) != size:
            raise UserError(
                f"label '{name}' has shape [{size}], but the field '{self.column(name)}' has {len(names)} values",
                self.loaded.where(f"variables.{name}.shape"),
            )
        return names

    # ------------------------------------------------------------ stages

    def links(self, name: str) -> list[tuple[Variable, LinkSpec]]:
        return [(self.variables[spec.variable], spec) for spec in self.recipe.stages[name].given]

    def generates(self, name: str) -> list[Variable]:
        return [self.variables[output] for output in self.recipe.stages[name].generates or [name]]

    def variables_of(self, name: str) -> list[Variable]:
        """All that a stage has to do with: what it generates, then what it is given."""
        return [*self.generates(name), *(variable for variable, _ in self.links(name))]

    def identity(self, name: str) -> str:
        """Equal for stages that are trained alike on the same data, in whatever recipe they stand."""
        spec = self.recipe.stages[name]
        plain = spec.model_dump(include=TRAINED, exclude_defaults=True)
        identities = [variable.identity for variable in self.generates(name)]
        return digest(
            {
                **plain,
                "train": spec.train.model_dump(exclude=UNLEARNED, exclude_defaults=True),
                "generates": identities if len(identities) > 1 else identities[0],
                "given": [
                    [variable.identity, link.model_dump(exclude=NOT_TRAINED, exclude_defaults=True)]
                    for variable, link in self.links(name)
                ],
                "data": self.recipe.data.model_dump(exclude_defaults=True),
            }
        )

    def build(self, name: str) -> Any:
        """A stage (ours, or code of somebody's) with its initial weights, a function of its training seed."""
        spec: StageSpec = self.recipe.stages[name]
        variables = self.generates(name)
        place = f"stages.{name}.network" if isinstance(spec.network, CodeSpec) else None
        with self.located(place), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed(spec.train.seed, *(variable.name for variable in variables), "init"))
            if spec.network is None:
                given = [variable for variable, _ in self.links(name)]
                return create(spec, variables, given, name=name, where=f"stages.{name}", made=Stage)
            return Diffusion(
                variables,
                given=self.links(name),
                network=spec.network,
                precondition=spec.precondition,
                noise=spec.noise,
                sampler=spec.sample,
                joint=spec.joint,
                augment_dim=augment_dim(spec.augment),
                name=name,
            )

    def outline(self, name: str) -> Outline:
        """A stage to plan with; its network, where it is ours, is built on the meta device when costs are asked for."""
        spec, variables = self.recipe.stages[name], self.generates(name)

        def build() -> Stage:
            with torch.device("meta"):
                return self.build(name)

        return Outline(
            build() if spec.network is None else None,
            build,
            name=name,
            generates={variable.name: variable for variable in variables},
            given=[variable for variable, _ in self.links(name) if spec.sample.link(variable.name).sampled],
            conditionals=subsets([v.name for v in variables]) if spec.joint.exact else frozenset(),
        )

    def metadata(self, name: str) -> dict[str, Any]:
        """What a stage's weights file says of itself."""
        spec = self.recipe.stages[name]
        return {
            "format": "chaindiff-stage/1",
            "identity": self.identity(name),
            "stage": spec.model_dump(mode="json"),
            "data": self.recipe.data.model_dump(mode="json"),
            "name": name,
            "variables": {v.name: variable_entry(v, self.fitted_digest(v.name)) for v in self.variables_of(name)},
        }

    def altered(self, changes: Mapping[str, Any]) -> Assembly:
        """The same run with other settings."""
        return Assembly(self.loaded.override(changes), self.out)

    def folder(self, name: str) -> Path:
        return self.out / "stages" / name

    def find_weights(self, name: str) -> Path | None:
        """The recipe's own file, this run's, the shipped file, or that of a run beside this one."""
        spec = self.recipe.stages[name]
        if spec.weights is not None:
            return Path(spec.weights).expanduser()
        own = self.folder(name) / "weights.safetensors"
        identity = self.identity(name)
        if own.exists() and checkpoint.metadata(own).get("identity") == identity:
            return own
        beside = sorted(self.out.parent.glob("*/stages/*/weights.safetensors"))
        found = (path for path in beside if identity_of(path) == identity)
        return registry.shipped(identity) or next(found, None)

    def weights(self, name: str) -> Path:
        """The weights of a stage. Raises UserError if there are none, or those of another stage or other variables."""
        path = self.find_weights(name)
        if path is None:
            raise UserError(
                f"stage '{name}' has no weights yet",
                self.loaded.where(f"stages.{name}"),
                f"train it: chaindiff train {self.loaded.spoken} --stage {name}",
            )
        if not path.exists():
            raise UserError(
                f"stage '{name}': there is no weights file {path}",
                self.loaded.where(f"stages.{name}.weights"),
                "correct the path, or leave it out: the stage's own weights are found, or trained",
            )
        self.check_links(name, path, checkpoint.metadata(path))
        return path

    def unfinished(self, name: str) -> bool:
        """Whether this run has begun to train the stage, and was stopped before it wrote the weights."""
        state, weights = (self.folder(name) / f"{what}.safetensors" for what in ("state", "weights"))
        if not state.exists():
            return False
        kept = checkpoint.metadata(state)
        written = checkpoint.metadata(weights).get("images") if weights.exists() else None
        return int(kept.get("images", 0)) < int(kept.get("total", 0)) or written != kept.get("images")

    def load(self, name: str, path: Path) -> Any:
        """A stage with these weights. Raises UserError if their names or shapes are others."""
        with torch.device("meta"):
            stage = self.build(name)
        assert isinstance(stage, nn.Module)
        stage.to_empty(device="cpu")
        tensors, kept = checkpoint.load(path)
        if isinstance(stage, Diffusion) and (wrong := other_preconditioning(stage, kept)):
            raise UserError(f"stage '{name}': {path} is of another network: {wrong[0]}")
        checkpoint.fill(stage, tensors, str(path))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return stage.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]

    def check_links(self, name: str, path: Path, kept: dict[str, str]) -> None:
        """Compare the meaning of every variable with the one that the weights were trained on, before they load."""
        trained = trained_on(path, kept)
        for variable in self.variables_of(name):
            if variable.name not in trained or trained[variable.name]["identity"] != variable.identity:
                raise UserError(
                    f"stage '{name}': the weights in {path} were not trained on this '{variable.name}'",
                    self.loaded.where(f"variables.{variable.name}"),
                    "its kind, shape, encoder or scaling differs; give the variable that the weights were trained on, "
                    "or train the stage anew",
                )

    # ------------------------------------------------------------ encoders and sources

    def fitted_name(self, name: str) -> str:
        return registry.file_name(name, self.variables[name].identity)

    def fitted_path(self, name: str) -> Path:
        """Where the fitted statistics of an encoder lie: shipped, in the run, or in one whose weights it uses."""
        identity = self.variables[name].identity
        own = self.out / "encoders" / self.fitted_name(name)
        if (found := registry.shipped(identity)) is not None:
            return found
        if own.exists():
            return own
        using = [s for s in self.recipe.stages if name in {v.name for v in self.variables_of(s)}]
        weights = [path for stage in using if (path := self.find_weights(stage)) is not None and len(path.parents) > 2]
        files = [path.parents[2] / "encoders" / own.name for path in weights]
        return next((file for file in files if file.exists()), own)

    def fitted_digest(self, name: str) -> str:
        """What the statistics are, and where a file holds the vectors, what it holds."""
        path, spec = self.fitted_path(name), self.recipe.variables[name]
        fitted = checkpoint.metadata(path).get("digest", "") if path.exists() else ""
        if not isinstance(spec.encoder, FileSpec):
            return fitted
        encoder = build_encoder(name, self.recipe.variables)
        return digest([encoder.features_identity["content"], fitted])

    def encoder(self, name: str) -> Encoder:
        """An encoder, ready to use. Raises UserError if its statistics were not fitted yet."""
        with self.located():
            return build_encoder(name, self.recipe.variables, self.fitted_path(name))

    @property
    def encoded(self) -> list[str]:
        """The variables that an encoder computes from others."""
        return [name for name, spec in self.recipe.variables.items() if spec.reads is not None]

    def frequencies(self, name: str) -> list[float]:
        """The weights of a label's classes where it is drawn: those of the data, or equal ones."""
        (size,) = self.variables[name].shape
        return self.counts(name).tolist() if self.recipe.variables[name].source == "empirical" else [1.0] * size

    def counts(self, name: str) -> Tensor:
        """Rows of the training data in each class of a label, [classes]; of clusters, as they were fitted."""
        if self.recipe.variables[name].encoder is not None:
            encoder = self.encoder(name)
            assert isinstance(encoder, Embedding) and encoder.statistics is not None
            assert encoder.statistics.counts is not None  # a label has clusters
            return encoder.statistics.counts
        size = len(self.classes(name))
        return torch.bincount(torch.tensor(self.data.categories(self.column(name))[1]), minlength=size)

    # ------------------------------------------------------------ chains

    def chain(self, needed: Iterable[str] = ()) -> Chain:
        """The chain. Until a stage is used it lies on the meta device, where a plan needs no weights, data or memory.

        Raises UserError for a `needed` stage without weights, and as `weights` does when another is first used.
        """
        outlines = [self.outline(name) for name in self.recipe.stages]
        weights: dict[str, Path] = {}

        def load(name: str) -> Stage:
            if not learns(chain.stages.outlines[name]):
                return self.build(name)
            weights[name] = self.weights(name)
            self.check_fitted(weights)
            return self.load(name, weights[name])

        encoders = [
            LazyEncoder(name, spec.reads, lambda name=name: self.encoder(name))
            for name, spec in self.recipe.variables.items()
            if spec.reads is not None
        ]
        decoders = [
            LazyEncoder(name, spec.decoder.of, lambda name=name: build_decoder(name, self.recipe.variables))
            for name, spec in self.recipe.variables.items()
            if spec.decoder is not None
        ]
        drawn = [n for n, spec in self.recipe.variables.items() if spec.source in ("empirical", "uniform")]
        sources = [Source(self.variables[name], lambda name=name: self.frequencies(name)) for name in drawn]
        stages = Stages(outlines, load, self.build)
        chain = Chain(stages, encoders, sources, self.recipe.name, self.variables, decoders=decoders, read=self.read)
        chain.weights, chain.origin = weights, self
        for name in needed:
            _ = chain.stages[name]
        return chain

    def read(self, given: Mapping[str, Any]) -> Mapping[str, Value]:
        """What a person gives, as values."""
        from chaindiff.given import read_given

        return read_given(self, given)

    @cached_property
    def request(self) -> ChainPlan:
        """The plan of what the recipe itself asks to sample."""
        asked = self.recipe.sample
        with self.located():
            return self.chain().plan(asked.want or None, tuple(asked.given))

    def check_fitted(self, weights: dict[str, Path]) -> None:
        """Two stages on one link must have been trained with the same fitted statistics."""
        seen: dict[str, tuple[str, str]] = {}
        for stage, path in weights.items():
            for variable, entry in trained_on(path, checkpoint.metadata(path)).items():
                other, fitted = seen.setdefault(variable, (stage, entry["fitted"]))
                if fitted != entry["fitted"]:
                    raise UserError(
                        f"stages '{other}' and '{stage}' were trained on different fits of '{variable}'",
                        hint="their reducer or standardisation differs; train one of them again",
                    )


def trained_on(path: Path, kept: dict[str, str]) -> dict[str, dict[str, str]]:
    """The variables that a stage was trained on, by its file's metadata. Raises UserError if it names none."""
    try:
        found = json.loads(kept.get("variables", "{}"))
        named = bool(found) and all({"identity", "fitted"} <= entry.keys() for entry in found.values())
    except (ValueError, AttributeError):
        named = False
    if not named:
        raise UserError(f"{path} is not the weights file of a stage", hint="its metadata names no variables")
    return found


def identity_of(path: Path) -> str | None:
    """The identity of the stage in a file of another run; a damaged one is nobody's, and no error of this run."""
    try:
        return checkpoint.metadata(path).get("identity")
    except UserError:
        return None


def default_out(loaded: Loaded) -> Path:
    """The directory of a run that was named, else that of the recipe's name."""
    return loaded.path.parent if loaded.path.name == LOCK else Path("runs") / loaded.recipe.name
