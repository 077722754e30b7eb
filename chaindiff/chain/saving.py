"""Stages and chains as files: a stage's weights with all that is needed to build it again, a chain as a folder of them.

Files hold no code: custom networks, stages and encoders are passed in again on loading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json
from torch import nn

from chaindiff.chain.chain import Chain, Encoder, Source
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.stage import Stage, learns
from chaindiff.chain.variable import Variable, variable_entry
from chaindiff.data.augment import augment_dim
from chaindiff.io import tensorfile
from chaindiff.io.digest import digest
from chaindiff.io.errors import UserError
from chaindiff.io.files import read_whole, write_whole
from chaindiff.specs.code import is_code
from chaindiff.specs.training import AugmentSpec

FORMAT, CHAIN = "chaindiff-stage/1", "chain.json"


# ------------------------------------------------------------ stages


def described(stage: Diffusion) -> dict[str, Any]:
    """A diffusion stage's settings as plain data, with a recipe's field names; None for custom code."""
    configs = {
        "network": stage.network_spec,
        "precondition": stage.precondition_spec,
        "noise": stage.noise_spec,
        "path": stage.trained_path,
        "sample": stage.sampler,
    }
    plain = {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else None for k, v in configs.items()}
    links = [link.spec.model_dump(mode="json") for link in stage.conditioner]
    own = {name: said.model_dump(mode="json") for name, said in stage.own.items()}
    return {"generates": own, "given": links, "augment_dim": stage.augment_dim, **plain}


def trained_variables(stage: Stage) -> list[Variable]:
    """The variables that a stage is trained on: those it generates, then those it is conditioned on."""
    given = [link.variable for link in stage.conditioner] if isinstance(stage, Diffusion) else stage.given
    return [*stage.generates.values(), *given]


def metadata(stage: Stage) -> dict[str, Any]:
    """The metadata of a weights file whose stage was not made by a recipe."""
    said = described(stage) if isinstance(stage, Diffusion) else {"generates": [*stage.generates]}
    variables = {v.name: variable_entry(v) for v in trained_variables(stage)}
    about = {"name": stage.name, "stage": said, "variables": variables}
    return {"format": FORMAT, "identity": digest(about), **about}


DATA = "the data"


def content(data: Any) -> dict[str, str]:
    """Digest and number of rows of the data, for the metadata of a stage trained on them."""
    return {DATA: data.content, "rows": str(len(data))}


def trained_content(kept: Mapping[str, str]) -> dict[str, str]:
    """Digests of what a stage was trained on, keyed by words; empty for files of earlier versions."""
    try:
        found = from_json(kept.get("content", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def changed(kept: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What has other content now, such as "the data (9 rows then, 8 now)"; what is unknown counts as unchanged."""
    then = trained_content(kept)
    other = [what for what in now if what in then and then[what] != now[what] and what != "rows"]
    rows = [then.get("rows"), now.get("rows")]
    said = "" if rows[0] == rows[1] else f" ({rows[0]} rows then, {rows[1]} now)"
    return [f"{what}{said}" if what == DATA else what for what in other]


def refuse_changed(path: Path, other: Sequence[str]) -> None:
    """Raises UserError if `other` names anything."""
    if other:
        raise UserError(
            f"{path} was trained on other content than is there now: {', '.join(other)}",
            hint="restore what it was trained on, or train again with another --out",
        )


def save_stage(stage: Stage, path: str | Path, **about: Any) -> None:
    """Write a stage's weights; `load_stage`, and a recipe's `weights`, read them. Raises UserError if it has none."""
    if not learns(stage):
        raise UserError(f"stage '{stage.name}' has no weights to save")
    tensorfile.save(Path(path), stage.state_dict(), {**metadata(stage), **about})


def load_stage(path: str | Path, *, allow_code: bool = False, **own: Any) -> Diffusion:
    """A diffusion stage from its weights file. `own`: arguments of `Diffusion` that are code, such as `network`.

    Raises UserError for a file that does not describe its stage or names code that is not allowed, and for tensors
    that do not fit.
    """
    path = Path(path)
    tensors, kept = tensorfile.load(path)
    try:
        said, known = from_json(kept["stage"]), from_json(kept["variables"])
        variables = {name: _variable(entry) for name, entry in known.items()}
        given = [(variables[link["variable"]], link) for link in said["given"]]
        made = said["generates"] or [name for name in variables if name not in {v.name for v, _ in given}]
        named = made if isinstance(made, Mapping) else {name: {} for name in made}
        generates = [(variables[name], each) for name, each in named.items()]
        width = said["augment_dim"] if "augment_dim" in said else augment_dim(AugmentSpec(**said["augment"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        hint = "load it through its recipe: chaindiff.load(RECIPE).stages[NAME]"
        raise UserError(f"{path} does not describe its stage fully enough to build it", hint=hint) from error
    settings = {key: said.get(key) for key in ("network", "precondition", "noise", "path")}
    settings = {**settings, "sampler": said.get("sample"), **own}
    named = settings["network"].get("kind") if isinstance(settings["network"], Mapping) else None
    if is_code(named) and not allow_code:
        hint = "load_stage(path, allow_code=True) if you trust the file and that code, or network=... takes the network"
        raise UserError(f"{path}: the network is code, '{named}', which runs only where you allow it", hint=hint)
    for part in ("network", "precondition", "noise"):
        if settings[part] is None:
            raise UserError(f"{path}: the {part} is custom code", hint=f"load_stage(path, {part}=...) takes it")
    stage = Diffusion(generates, given=given, augment_dim=width, name=kept.get("name"), **settings)
    tensorfile.fill(stage, tensors, str(path))
    return stage.eval()


def _variable(entry: Mapping[str, Any]) -> Variable:
    fields = {key: entry[key] for key in ("name", "kind", "shape", "sigma_data", "meaning")}
    return Variable(**{**fields, "shape": tuple(fields["shape"]), "version": entry.get("version", "")})


# ------------------------------------------------------------ chains


def save_chain(chain: Chain, folder: Path) -> None:
    """Write a chain with its weights into a folder, which `chaindiff.load` reads anywhere."""
    for stage in chain.stages.values():
        if learns(stage):
            save_stage(stage, folder / "stages" / stage.name / "weights.safetensors")
    about = {
        "format": "chaindiff-chain/1",
        "name": chain.name,
        "stages": [*chain.stages],
        "encoders": [*chain.encoders],
        "decoders": [*chain.decoders],
        "sources": {name: list(source.frequencies) for name, source in chain.sources.items()},
        "variables": [asdict(variable) for variable in chain.variables.values()],
    }
    write_whole(folder / CHAIN, json.dumps(about, indent=1))


def load_chain(folder: Path, objects: Sequence[Stage | Encoder] = ()) -> Chain:
    """A chain that `save_chain` wrote from Python. `objects` are its stages, encoders and decoders that are code.

    Raises UserError for one that is not passed in.
    """
    try:
        said = from_json(read_whole(folder / CHAIN))
        variables = {entry["name"]: _variable(entry) for entry in said["variables"]}
        sources = [Source(variables[name], list(weights)) for name, weights in said["sources"].items()]
        parts = {part: [str(name) for name in said[part]] for part in ("stages", "encoders", "decoders")}
        said = {"name": str(said["name"]), **parts}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        hint = "save the chain again, or copy the folder again"
        raise UserError(f"{folder / CHAIN} is not what saving a chain leaves", hint=hint) from error
    handed = {part.name: part for part in objects if isinstance(part, Stage)}
    stages = [_stage(name, folder, handed.get(name)) for name in said["stages"]]
    maps: dict[str, list[Any]] = {}
    for group in ("encoders", "decoders"):
        maps[group] = [part for part in objects if part.name in said[group] and not isinstance(part, Stage)]
        if missing := [name for name in said[group] if name not in {part.name for part in maps[group]}]:
            raise _not_handed(folder, f"the {group[:-1]} '{missing[0]}'")
    return Chain(stages, maps["encoders"], sources, said["name"], variables, decoders=maps["decoders"])


def _stage(name: str, folder: Path, handed: Any) -> Any:
    path = folder / "stages" / name / "weights.safetensors"
    if handed is None:
        if not path.exists():
            raise _not_handed(folder, f"the stage '{name}'")
        try:
            return load_stage(path)
        except UserError as error:
            raise UserError(
                error.message, hint="chaindiff.load(folder, objects=[...]) takes the stage itself"
            ) from error
    if path.exists():
        tensorfile.fill(handed, tensorfile.load(path)[0], str(path))
    return handed.eval() if isinstance(handed, nn.Module) else handed


def _not_handed(folder: Path, what: str) -> UserError:
    return UserError(f"{what} of {folder} is custom code", hint="chaindiff.load(folder, objects=[...]) takes it")
