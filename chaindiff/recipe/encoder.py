"""Encoders of a recipe: where their fitted statistics are, and the encoders themselves on first use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chaindiff.assets import registry
from chaindiff.encoders import Embedding, Encoder, FileVectors, build_decoder, build_encoder
from chaindiff.encoders.clip_files import placed
from chaindiff.io import tensorfile
from chaindiff.io.digest import digest, file_digest
from chaindiff.io.files import user_path
from chaindiff.specs.recipe import FileSpec, OpenClipSpec

if TYPE_CHECKING:
    from chaindiff.recipe.assembly import Assembly


@dataclass
class LazyMap:
    """An encoder or decoder of a chain that loads when it is first used: most requests need none."""

    name: str
    of: str
    build: Callable[[], Encoder]

    @cached_property
    def built(self) -> Encoder:
        return self.build()

    def __call__(self, value: Tensor) -> Tensor:
        with torch.no_grad():
            return self.built(value)


def decoder_of(assembly: Assembly, name: str) -> Encoder:
    """The decoder of a variable; one that reads a map is given the features that the map's encoder computes.

    A network that decodes latents or features knows nothing of the components and the scaling fitted to them here.
    """
    specs, decoder = assembly.recipe.variables, build_decoder(name, assembly.recipe.variables)
    source = specs[decoder.of]
    if source.kind == "map" and isinstance(source.encoder, OpenClipSpec | FileSpec):
        encoder, decode = assembly.encoders[decoder.of].build(), decoder.features
        assert isinstance(encoder, Embedding)
        decoder.features = lambda x: decode(encoder.features_of(x))
    return decoder


class RecipeEncoder:
    """The encoder of one variable of a recipe, with its fitted statistics."""

    def __init__(self, assembly: Assembly, name: str):
        self.assembly, self.name = assembly, name

    def build(self) -> Encoder:
        """The encoder as it is now. Raises UserError if its statistics were not fitted yet."""
        with self.assembly.located():
            return build_encoder(self.name, self.assembly.coders, self.path)

    @property
    def file_name(self) -> str:
        return registry.file_name(self.name, self.assembly.variables[self.name].identity)

    @property
    def path(self) -> Path:
        """Where the fitted statistics lie: shipped, in the run, or in one whose weights the recipe names."""
        own = self.assembly.out / "encoders" / self.file_name
        if (found := registry.shipped(self.assembly.variables[self.name].identity)) is not None:
            return found
        for home in self.assembly.homes:
            if (path := home / "encoders" / own.name).exists():
                return path
        named = [stage for stage in self.assembly.stages.values() if stage.spec.weights is not None]
        weights = [stage.find_weights() for stage in named if self.name in {v.name for v in stage.variables}]
        runs = [path.parents[2] for path in weights if path is not None and path.match("stages/*/weights.safetensors")]
        files = [run / "encoders" / own.name for run in runs]
        return next((file for file in files if file.exists()), own)

    @property
    def files(self) -> dict[str, str]:
        """Digests of the existing files that the recipe gives by path, keyed by what they are, in words."""
        variables = self.assembly.recipe.variables
        encoder = variables[self.name].encoder
        if isinstance(encoder, OpenClipSpec):
            found = placed(encoder, variables[encoder.of].kind == "text")
            return {f"the {what} of the encoder of '{self.name}'": digest for what, digest in found.items()}
        if isinstance(encoder, FileSpec) and (path := user_path(encoder.path)).is_file():
            return {f"the vectors of '{self.name}'": file_digest(path)}
        return {}

    @property
    def version(self) -> str:
        """A digest of the files and statistics behind the values; empty if there are none or some are missing."""
        known = [self.digest, *self.files.values()]
        return digest(known) if any(known) and self.complete else ""

    @property
    def complete(self) -> bool:
        """Whether nothing needs fitting, or it has been fitted."""
        encoder = self.assembly.recipe.variables[self.name].encoder
        needed = isinstance(encoder, OpenClipSpec | FileSpec) and (encoder.reduce or encoder.scaling != "raw")
        return not needed or self.path.exists()

    @property
    def digest(self) -> str:
        """A digest of the statistics and, if a file holds the vectors, of its content; empty if that is unknown."""
        fitted = tensorfile.metadata(self.path).get("digest", "") if self.path.exists() else ""
        variables = self.assembly.recipe.variables
        if not isinstance(variables[self.name].encoder, FileSpec):
            return fitted
        encoder = build_encoder(self.name, variables)
        assert isinstance(encoder, FileVectors)
        return digest([encoder.content, fitted]) if encoder.content else ""
