"""`chaindiff.load`: the chain of a recipe, of a run's directory, or of a folder that `Chain.save` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from chaindiff.chain.chain import Chain, Encoder
from chaindiff.chain.saving import CHAIN, load_chain
from chaindiff.chain.stage import Stage, learns
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.processes import sole_writer
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe
from chaindiff.specs.lock import write_lock


def load(
    source: str | Path,
    changes: Sequence[str] = (),
    *,
    allow_code: bool = False,
    objects: Sequence[Stage | Encoder] = (),
    **overrides: Any,
) -> Chain:
    """The chain of a recipe (a path or a bare name), of a run's directory, or of a folder that `save` wrote.

    Weights are read when a stage is first used: a plan needs none. `changes` ("FIELD=VALUE") and keyword overrides are
    those of the command line's `--set`, and `allow_code` is its `--allow-code`. `objects` are a saved chain's custom
    stages and encoders. Raises UserError for mistakes in the recipe.
    """
    if (Path(source) / CHAIN).is_file():
        return load_chain(Path(source), objects)
    assembly = Assembly(load_recipe(source, changes, allow_code=allow_code, **overrides))
    chain = assembly.chain()
    chain.origin = FromRecipe(assembly)
    return chain


class FromRecipe:
    """The origin of a chain that a recipe describes: it trains and is saved as the recipe's run."""

    def __init__(self, assembly: Assembly):
        self.assembly = assembly

    def train(self, chain: Chain, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        """By the recipe's own settings and data, into its run's directory, as `chaindiff train` does."""
        from chaindiff.recipe.training import train_stage

        if settings:  # the chain's weights will be of these
            changes = {"stages": {name: {"train": dict(settings)} for name in names}}
            self.assembly = Assembly(self.assembly.loaded.override(changes), self.assembly.out)
        for name in names:
            with sole_writer(self.assembly.out):
                chain.weights[name] = train_stage(self.assembly, name)
            chain.stages.loaded[name] = self.assembly.stages[name].load(chain.weights[name])

    def save(self, chain: Chain, folder: Path) -> None:
        """As a run's directory: the locked recipe, weights, and what was fitted for its encoders."""
        for name, stage in self.assembly.stages.items():
            if not learns(chain.stages.outlines[name]):
                continue
            if name in chain.stages.loaded and name not in chain.weights:
                hint = "save_stage writes it alone, and the recipe's `weights` takes that file"
                message = f"stage '{name}' was trained on other data than {self.assembly.recipe.name}'s"
                raise UserError(message, hint=hint)
            weights = stage.find_weights()
            if name in chain.stages.loaded or weights is not None:
                loaded = chain.stages[name]
                assert isinstance(loaded, nn.Module)
                kept = tensorfile.metadata(weights) if weights is not None else {}
                about = {**kept, **stage.metadata(), "images": kept.get("images", "0")}
                tensorfile.save(folder / "stages" / name / "weights.safetensors", loaded.state_dict(), about)
        for encoder in self.assembly.encoders.values():
            if encoder.path.exists():
                tensorfile.save(folder / "encoders" / encoder.file_name, *tensorfile.load(encoder.path))
        folder.mkdir(parents=True, exist_ok=True)
        write_lock(folder, self.assembly.recipe, {})
