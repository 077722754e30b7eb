"""A recipe's objects: variables, stages, encoders and sources, and the chain of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from chaindiff.chain.chain import Chain, Source
from chaindiff.chain.plan import ChainPlan
from chaindiff.chain.request import Value
from chaindiff.chain.saving import content
from chaindiff.chain.stage import Stage, Stages, learns
from chaindiff.chain.variable import Variable
from chaindiff.data import open_data
from chaindiff.data.items import Data
from chaindiff.io.errors import Lines, UserError
from chaindiff.io.files import folder_path
from chaindiff.recipe.column import Column
from chaindiff.recipe.encoder import LazyMap, RecipeEncoder, decoder_of
from chaindiff.recipe.stage import RecipeStage, check_fitted
from chaindiff.specs.code import CodeDataSpec
from chaindiff.specs.load import LOCK, Loaded, load_recipe
from chaindiff.specs.recipe import OpenClipSpec, VariableSpec
from chaindiff.specs.yaml import display


class Assembly:
    """The parts of one recipe by name. Weights are in a run that was named, and in `out`, the run's directory."""

    def __init__(self, loaded: Loaded, out: Path | None = None):
        loaded.refuse_code()
        self.loaded, self.recipe = loaded, loaded.recipe
        self.out = default_out(loaded) if out is None else folder_path(out)
        self.homes = list(dict.fromkeys([default_out(loaded), self.out] if loaded.path.name == LOCK else [self.out]))
        specs = self.recipe.variables
        self.variables = {name: Variable.from_specs(name, specs) for name in specs}
        self.stages = {name: RecipeStage(self, name) for name in self.recipe.stages}
        self.encoders = {name: RecipeEncoder(self, name) for name, spec in specs.items() if spec.encoder is not None}
        self.columns = {name: Column(self, name) for name in specs}

    @cached_property
    def coders(self) -> dict[str, VariableSpec]:
        """The variables to build encoders of: a model of the hub at the revision that the run's lock names."""
        specs = dict(self.recipe.variables)
        models = self.loaded.lock.get("models")
        for name, model in models.items() if isinstance(models, dict) else ():
            encoder = specs[name].encoder if name in specs else None
            if isinstance(encoder, OpenClipSpec) and str(model).partition("@")[0] == encoder.model:
                pinned = encoder.model_copy(update={"model": model})
                specs[name] = specs[name].model_copy(update={"encoder": pinned})
        return specs

    def held(self) -> Loaded | None:
        """The recipe that the run's directory was last used with, and what it resolved; None for a new run."""
        return load_recipe(self.out) if (self.out / LOCK).exists() else None

    def weights(self, names: Iterable[str]) -> dict[str, Path]:
        """The weights files of stages that have any to learn; raises what `RecipeStage.weights` raises."""
        outlines = self.chain().stages.outlines
        return {name: self.stages[name].weights() for name in names if learns(outlines[name])}

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
                raise UserError(Lines(f"{field}: {error.message}"), self.loaded.where(field), error.hint) from error
            raise

    @cached_property
    def data(self) -> Data:
        with self.located():
            if not isinstance(self.recipe.data, CodeDataSpec):
                return open_data(self.recipe.data)
            images = (n for n, spec in self.recipe.variables.items() if spec.kind == "image" and spec.encoder is None)
            return open_data(self.recipe.data, next(images, None))

    def versioned(self, name: str) -> Variable:
        """A variable with the version of its encoder."""
        encoder = self.encoders.get(name)
        return replace(self.variables[name], version=encoder.version if encoder else "")

    @property
    def content(self) -> dict[str, str]:
        """Digests of the data; none if they are missing, or are made by code, which only training runs."""
        if isinstance(self.recipe.data, CodeDataSpec) and "data" not in vars(self):
            return {}
        try:
            return content(self.data)
        except UserError:
            return {}

    @property
    def root(self) -> Variable:
        """The image variable that the data holds: the one that no encoder makes; it may have a decoder."""
        for name, spec in self.recipe.variables.items():
            if spec.kind == "image" and spec.encoder is None:
                return self.variables[name]
        raise UserError("no image variable of this recipe comes from its data: each has an encoder")

    def chain(self, needed: Iterable[str] = ()) -> Chain:
        """The chain. Until a stage is used it stays on the meta device, where a plan needs no weights, data or memory.

        Raises UserError for a `needed` stage without weights, and as `weights` does when another is first used.
        """
        weights: dict[str, Path] = {}

        def load(name: str) -> Stage:
            if not learns(chain.stages.outlines[name]):
                return self.stages[name].build()
            weights[name] = self.stages[name].weights()
            check_fitted(weights)
            return self.stages[name].load(weights[name])

        specs = self.recipe.variables
        decoders = [
            LazyMap(name, spec.decoder.of, lambda name=name: decoder_of(self, name))
            for name, spec in specs.items()
            if spec.decoder is not None
        ]
        drawn = [name for name, spec in specs.items() if spec.source in ("empirical", "uniform")]
        sources = [Source(self.variables[n], lambda n=n: self.columns[n].frequencies) for n in drawn]
        outlines = [stage.outline() for stage in self.stages.values()]
        stages = Stages(outlines, load, lambda name: self.stages[name].build())
        encoders = [
            LazyMap(name, spec.reads, self.encoders[name].build)
            for name, spec in specs.items()
            if spec.reads is not None
        ]
        chain = Chain(stages, encoders, sources, self.recipe.name, self.variables, decoders=decoders, read=self.read)
        chain.weights = weights
        for name in needed:
            _ = chain.stages.only(name) if self.recipe.sample.max_memory else chain.stages[name]
        return chain

    def read(self, given: Mapping[str, Any]) -> Mapping[str, Value]:
        """What a user gives, as values."""
        from chaindiff.recipe.given import read_given

        return read_given(self, given)

    @cached_property
    def request(self) -> ChainPlan:
        """The plan of the recipe's own request."""
        asked = self.recipe.sample
        with self.located():
            return self.chain().plan(asked.want or None, tuple(asked.given))


def default_out(loaded: Loaded) -> Path:
    """The directory of the run that was named, else the one with the recipe's name."""
    return loaded.path.parent if loaded.path.name == LOCK else Path("runs") / loaded.recipe.name
