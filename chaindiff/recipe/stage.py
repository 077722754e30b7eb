"""Stages of a recipe: what a stage is, built or outlined, and where its weights lie."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chaindiff.assets import registry
from chaindiff.chain.cost import Counted
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.formulation import family
from chaindiff.chain.saving import DATA, changed, refuse_changed, trained_content
from chaindiff.chain.stage import Outline, Stage
from chaindiff.chain.variable import Variable, variable_entry
from chaindiff.data.augment import augment_dim
from chaindiff.edm.random import seed
from chaindiff.io import tensorfile
from chaindiff.io.code import create
from chaindiff.io.digest import digest, file_digest
from chaindiff.io.errors import UserError, in_lines
from chaindiff.io.files import user_path
from chaindiff.io.metadata import Trained, about
from chaindiff.io.processes import processes
from chaindiff.specs.code import CodeSpec
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.load import LOCK, load_recipe
from chaindiff.specs.lock import write_lock
from chaindiff.specs.stage import Generated, StageSpec
from chaindiff.specs.training import TrainSpec
from chaindiff.training import states
from chaindiff.training.begin import begin_from, other_preconditioning

if TYPE_CHECKING:
    from chaindiff.recipe.assembly import Assembly

# What changes how a run is observed, not what it learns, is not part of a stage's identity.
# Defaults are left out, so that a new field changes the identity of nothing that does not use it.
TRAINED = {"kind", "settings", "network", "precondition", "noise", "path", "augment", "init"}
NOT_TRAINED = {"variable"}
UNLEARNED: dict[str, Any] = dict.fromkeys(
    ("checkpoint_every", "preview_every", "log_every", "execution", "accumulate"), True
)
UNLEARNED["ema"] = {"snapshot_every"}
assert set(TrainSpec.model_fields) >= set(UNLEARNED)


class RecipeStage:
    """One stage of a recipe, in its run's directory."""

    def __init__(self, assembly: Assembly, name: str):
        self.assembly, self.name = assembly, name
        self.spec: StageSpec = assembly.recipe.stages[name]
        self.generates = [assembly.variables[output] for output in self.spec.generates or [name]]
        self.own = self.spec.generates or {name: Generated()}
        self.links: list[tuple[Variable, LinkSpec]] = [(assembly.variables[s.variable], s) for s in self.spec.given]

    @property
    def variables(self) -> list[Variable]:
        """The variables that the stage is trained on: those it generates, then those it is conditioned on."""
        return [*self.generates, *(variable for variable, _ in self.links)]

    @property
    def identity(self) -> str:
        """Equal for stages that are trained alike on the same data, in any recipe."""
        said = {name: own.model_dump(exclude_defaults=True) for name, own in self.own.items()}
        identities = [[v.identity, said[v.name]] if said[v.name] else v.identity for v in self.generates]
        return digest(
            {
                **self.spec.model_dump(include=TRAINED, exclude_defaults=True),
                "train": self.spec.train.model_dump(exclude=UNLEARNED, exclude_defaults=True),
                "generates": identities if len(identities) > 1 else identities[0],
                "given": [
                    [variable.identity, link.model_dump(exclude=NOT_TRAINED, exclude_defaults=True)]
                    for variable, link in self.links
                ],
                "data": self.assembly.recipe.data.model_dump(exclude_defaults=True),
            }
        )

    def metadata(self) -> dict[str, Any]:
        """The metadata of the stage's weights file."""
        encoders, names = self.assembly.encoders, [variable.name for variable in self.variables]
        fitted = {name: encoders[name].digest for name in names if name in encoders}
        return {
            "format": "chaindiff-stage/1",
            "identity": self.identity,
            "stage": self.spec.model_dump(mode="json"),
            "data": self.assembly.recipe.data.model_dump(mode="json"),
            "name": self.name,
            "variables": {n: variable_entry(self.assembly.versioned(n), fitted.get(n, "")) for n in names},
        }

    # ------------------------------------------------------------ objects

    def build(self, network: Any = None) -> Any:
        """The stage (built-in or custom code) with its initial weights, a function of its training seed.

        `network` takes the place of the recipe's.
        """
        spec = self.spec
        place = f"stages.{self.name}.network" if isinstance(spec.network, CodeSpec) else None
        with self.assembly.located(place), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed(spec.train.seed, *(variable.name for variable in self.generates), "init"))
            if spec.network is None:
                given, where = [variable for variable, _ in self.links], f"stages.{self.name}"
                return create(spec, self.generates, given, name=self.name, where=where, made=Stage)
            return Diffusion(
                [(variable, self.own[variable.name]) for variable in self.generates],
                given=self.links,
                network=network or spec.network,
                precondition=spec.precondition,
                noise=spec.noise,
                sampler=spec.sample,
                path=spec.path,
                augment_dim=augment_dim(spec.augment),
                name=self.name,
            )

    def on_meta(self, network: Any = None) -> Any:
        """The stage without memory for its weights."""
        with torch.device("meta"):
            return self.build(network)

    def outline(self) -> Outline:
        """The stage for planning; a built-in network is counted when costs are asked for."""
        network: Any = self.spec.network
        names = [variable.name for variable in self.generates]
        return Outline(
            self.on_meta() if self.spec.network is None else None,
            self.on_meta if isinstance(network, CodeSpec) else lambda: self.on_meta(partial(Counted, network)),
            name=self.name,
            generates={variable.name: variable for variable in self.generates},
            given=[variable for variable, _ in self.links if self.spec.sample.link(variable.name).sampled],
            conditionals=frozenset(family(self.spec.path, names).known(names)) if len(names) > 1 else frozenset(),
        )

    def load(self, path: Path) -> Any:
        """The stage with these weights. Raises UserError if their names or shapes differ."""
        stage = self.on_meta()
        assert isinstance(stage, nn.Module)
        stage.to_empty(device="cpu")
        tensors, kept = tensorfile.load(path)
        if isinstance(stage, Diffusion) and (wrong := other_preconditioning(stage, about(kept, path))):
            raise UserError(f"stage '{self.name}': {path} is of another network: {wrong[0]}")
        tensorfile.fill(stage, tensors, str(path))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return stage.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]

    # ------------------------------------------------------------ weights

    @property
    def folder(self) -> Path:
        return self.assembly.out / "stages" / self.name

    def known_weights(self) -> Iterator[Path]:
        """The file that the recipe names, or this stage's in the run that it names; else this run's, and the shipped.

        Raises UserError if the run that the recipe names has not trained this stage.
        """
        if self.spec.weights is not None:
            named = user_path(self.spec.weights, self.assembly.loaded.where(f"stages.{self.name}.weights"))
            yield self._of_run(named) if named.is_dir() else named
            return
        for own in (home / "stages" / self.name / "weights.safetensors" for home in self.assembly.homes):
            if own.exists() and tensorfile.metadata(own).get("identity") == self.identity:
                yield own
        if (shipped := registry.shipped(self.identity)) is not None:
            yield shipped

    def _of_run(self, run: Path) -> Path:
        for path in sorted(run.glob("stages/*/weights.safetensors")):
            if tensorfile.metadata(path).get("identity") == self.identity:
                return path
        raise UserError(
            f"stage '{self.name}': no stage of the run {run} was trained like this one, on the same data",
            self.assembly.loaded.where(f"stages.{self.name}.weights"),
            "name a weights file, RUN/stages/STAGE/weights.safetensors, to take one that was trained otherwise",
        )

    def find_weights(self) -> Path | None:
        """The first of the known files that was not trained on other content."""
        known = self.known_weights()
        return next((path for path in known if self.spec.weights or not self.changed(tensorfile.metadata(path))), None)

    @property
    def content(self) -> dict[str, str]:
        """Digests of the data and of the encoders' files that the stage is trained on, whatever their paths."""
        names = [variable.name for variable in self.variables]
        for name in names:  # an encoder may read what another makes
            if (source := self.assembly.recipe.variables[name].reads) is not None and source not in names:
                names.append(source)
        encoders = [self.assembly.encoders[name].files for name in names if name in self.assembly.encoders]
        data = {} if self.spec.weights else self.assembly.content  # weights that the recipe names may be of other data
        return dict(ChainMap(data, *encoders))

    def changed(self, kept: Mapping[str, str]) -> list[str]:
        """What has other content now than when the stage in a file was trained."""
        return changed(kept, self.content) if "content" in kept else []

    def refitted(self, trained: Mapping[str, Trained]) -> list[str]:
        """The variables whose statistics are not those that the weights were trained with."""
        encoders = {v.name: self.assembly.encoders[v.name] for v in self.variables if v.name in self.assembly.encoders}
        then = {name: trained[name].fitted for name, e in encoders.items() if name in trained and e.complete}
        return [f"the statistics of '{n}'" for n, old in then.items() if old and encoders[n].digest not in ("", old)]

    def weights(self) -> Path:
        """The weights file. Raises UserError if there is none, or one of another stage or other variables."""
        path, where = self.find_weights(), self.assembly.loaded.where
        if path is None and (path := next(self.known_weights(), None)) is None:
            raise UserError(
                f"stage '{self.name}' has no weights yet",
                where(f"stages.{self.name}"),
                in_lines(
                    f"train it: chaindiff train {self.assembly.loaded.spoken} --stage {self.name}",
                    f"  or take it from a run that has it: --set stages.{self.name}.weights=RUN",
                ),
            )
        if not path.exists():
            raise UserError(
                f"stage '{self.name}': there is no weights file {path}",
                where(f"stages.{self.name}.weights"),
                "correct the path, or leave it out: the stage's own weights are found, or trained",
            )
        locked = self.assembly.loaded.digests.get(self.name)
        if locked is not None and locked != (found := file_digest(path)):
            raise UserError(
                f"stage '{self.name}': {path} is not the file that this run was made with: its sha256 is "
                f"{found[:12]}..., not {str(locked)[:12]}...",
                where("lock.weights"),
                f"put that file back, or say that you want this one: --set stages.{self.name}.weights={path}",
            )
        kept = tensorfile.metadata(path)
        trained = trained_on(path)
        refuse_changed(path, [*self.changed(kept), *self.refitted(trained)])
        for variable in self.variables:
            if variable.name not in trained or trained[variable.name].identity != variable.identity:
                raise UserError(
                    f"stage '{self.name}': the weights in {path} were not trained on this '{variable.name}'",
                    where(f"variables.{variable.name}"),
                    "its kind, shape, encoder or scaling differs; give the variable that the weights were trained on, "
                    "or train the stage again",
                )
        return path

    def unlock(self) -> None:
        """The run's lock no longer names the stage's weights: they are being trained."""
        self.assembly.loaded.digests.pop(self.name, None)
        if (self.assembly.out / LOCK).exists() and processes().is_main_process:
            kept = load_recipe(self.assembly.out)
            if kept.digests.pop(self.name, None) is not None:
                write_lock(self.assembly.out, kept.recipe, kept.lock)

    @property
    def unfinished(self) -> bool:
        """Whether this run has begun to train the stage, and was stopped before it wrote the weights."""
        weights, state = self.folder / "weights.safetensors", states.last(self.folder)
        if state is None:
            return False
        written = about(tensorfile.metadata(weights), weights).images if weights.exists() else None
        return state.images < state.total or written != state.images

    def check_begin(self, fresh: bool = False) -> None:
        """Check that the stage, if yet to be trained, can start from its `init`, of which only the header is read.

        Raises UserError for a file that is not there, is not a safetensors file or does not fit the stage.
        """
        if self.spec.init is not None and not self.unfinished and (fresh or next(self.known_weights(), None) is None):
            stage = self.on_meta()
            with self.assembly.located(f"stages.{self.name}.init"):
                begin_from(stage, user_path(self.spec.init))


def check_fitted(weights: Mapping[str, Path]) -> None:
    """Two stages on one link must have been trained with the same encoder and its statistics, else raises UserError."""
    seen: dict[str, tuple[str, str]] = {}
    for stage, path in weights.items():
        kept = tensorfile.metadata(path)
        facts = {f"fits of '{variable}'": entry.fitted for variable, entry in trained_on(path).items()}
        facts |= {f"versions of {what}": d for what, d in trained_content(kept).items() if what not in (DATA, "rows")}
        for what, fact in facts.items():
            other, before = seen.setdefault(what, (stage, fact))
            if before != fact:
                raise UserError(
                    f"stages '{other}' and '{stage}' were trained on different {what}",
                    hint="their encoder, reducer or standardisation differs; train one of them again",
                )


def trained_on(path: Path) -> dict[str, Trained]:
    """The variables that a stage was trained on, by its file's metadata. Raises UserError if it names none."""
    if found := about(tensorfile.metadata(path), path).variables:
        return found
    raise UserError(f"{path} is not the weights file of a stage", hint="its metadata names no variables")
