"""What `chaindiff import` does: a published snapshot becomes a weights file of ours, safetensors with its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chaindiff.interop.snapshots import Snapshot, kind_of, read_snapshot
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import user_path
from chaindiff.io.progress import say
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import Loaded
from chaindiff.specs.yaml import dump
from chaindiff.training.begin import AUGMENT, Begun, begin

FORMAT = "chaindiff-network/1"


def import_snapshot(
    path: Path, out: Path | None = None, loaded: Loaded | None = None, stage: str | None = None
) -> None:
    """Write a snapshot of EDM or VCDM as safetensors, and say what it holds and how to use it.

    With a recipe, the file is the weights of its stage, to sample with; else a network, to begin a stage from.
    Raises UserError if the snapshot cannot be read safely, or is not what the stage is.
    """
    path = user_path(path)
    snapshot = read_snapshot(path)
    out = out or Path(f"{path.stem}.safetensors")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: weights are written as .safetensors")
    say(f"{path.name}: {kind_of(snapshot)}")
    if loaded is None:
        tensorfile.save(out, snapshot.network.state_dict(), {"format": FORMAT, **metadata(snapshot, path)})
        begin = snippet(snapshot, out).split("\n")
        say(f"wrote {out}", "", "to begin a stage of a recipe from it:", "", *begin)
        say(f"to sample it as it is: chaindiff import {path} --recipe RECIPE --stage STAGE")
    else:
        name = stage_name(loaded, stage)
        begun = save_stage(snapshot, path, out, Assembly(loaded), name)
        if AUGMENT in begun.left:
            say("the augmentation label is left out: the stage has none, and sampling sets it to zero")
        say(f"wrote {out}, weights of stage '{name}'")
        say(f"to sample: chaindiff sample {loaded.spoken} --set stages.{name}.weights={out}")


def metadata(snapshot: Snapshot, path: Path) -> dict[str, Any]:
    """The metadata of a network's file."""
    found = snapshot.published
    return {
        "source": path.name,
        "class": snapshot.class_name,
        "kwargs": json.dumps(found.settings),
        "network": found.network.model_dump(mode="json"),
        "precondition": found.precondition.model_dump(mode="json") if found.precondition else None,
        "sigma_data": found.sigma_data,
        "label_dim": found.label_dim,
        "label_dropout": found.label_dropout,
        "augment_dim": found.augment_dim,
        "noise": snapshot.noise,
        "augment": snapshot.augment,
    }


def snippet(snapshot: Snapshot, out: Path) -> str:
    """The stage of a recipe that this network can begin."""
    found = snapshot.published
    fields: dict[str, Any] = {"network": found.network.model_dump(mode="json", exclude_defaults=True)}
    fields["network"] = {"kind": "unet", **fields["network"]}
    if found.precondition and found.precondition.kind != "edm":
        fields["precondition"] = found.precondition.model_dump(mode="json", exclude_defaults=True)
    if snapshot.noise:
        fields["noise"] = dict(zip(("mean", "std"), snapshot.noise, strict=True))
    if snapshot.augment.get("p"):
        fields["augment"] = {"probability": snapshot.augment["p"]}
    if found.label_dim:
        told = {"dropout": found.label_dropout, "presence": False} if found.label_dropout else {}
        fields["given"] = [{"variable": f"NAME_OF_{found.label_dim}_ENTRIES", **told}]
    return dump({"stages": {"image": {**fields, "init": str(out)}}})


# ------------------------------------------------------------ as the weights of a stage


def stage_name(loaded: Loaded, stage: str | None) -> str:
    stages = list(loaded.recipe.stages)
    if stage is None and len(stages) == 1:
        return stages[0]
    if stage is None:
        raise UserError(f"{loaded.recipe.name} has {len(stages)} stages: say --stage {' or --stage '.join(stages)}")
    if stage not in stages:
        raise UserError(f"there is no stage '{stage}'{did_you_mean(stage, stages)}", f"--stage {stage}")
    return stage


def save_stage(snapshot: Snapshot, path: Path, out: Path, assembly: Assembly, name: str) -> Begun:
    """Write the snapshot as this stage's weights. Raises UserError if they differ in what sampling depends on.

    The file has no identity, since it was not trained here: a recipe finds it by `weights` alone.
    """
    loaded, found = assembly.loaded, snapshot.published
    where = f"stages.{name}.network"
    spec, theirs = loaded.recipe.stages[name], found.network.model_dump()
    said = (spec.network or spec).model_dump()
    wrong = [f"{k} is {said.get(k)}, but {v} in the snapshot" for k, v in theirs.items() if said.get(k) != v]
    wrong = [problem for problem in wrong if not problem.startswith(("dropout ", "label_init "))]  # of training alone
    size = assembly.stages[name].generates[0].shape
    if size[1:] != (found.resolution, found.resolution):
        wrong.append(f"it generates {' x '.join(map(str, size))}, but the snapshot {found.resolution} pixels")
    if wrong:
        raise UserError(f"{where}: this is not the network of {path}: {'; '.join(wrong)}", loaded.where(where))
    stage = assembly.stages[name].build()
    about = metadata(snapshot, path)
    kept = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    begun = begin(stage, snapshot.network.state_dict(), kept, str(path))
    untrained = [part for part in begun.new if part != AUGMENT]
    if untrained:
        raise UserError(
            f"stage '{name}' is conditioned on what the network of {path} was not trained with: {', '.join(untrained)}",
            loaded.where(f"stages.{name}.given"),
            "train it from this network: import without --recipe, and set the stage's `init` to the file",
        )
    entry = {k: v for k, v in assembly.stages[name].metadata().items() if k != "identity"}
    tensorfile.save(out, stage.state_dict(), {**entry, "images": "0", "imported": about})
    return begun
