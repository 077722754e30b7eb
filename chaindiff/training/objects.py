"""Training in Python: a stage or a chain on any data set, or a recipe's chain with its own settings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from chaindiff.chain import saving
from chaindiff.chain.chain import Chain, Encoder
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.stage import Stage, learns
from chaindiff.chain.variable import Variable
from chaindiff.data.augment import active
from chaindiff.data.images import ImageData
from chaindiff.data.items import Data, Items
from chaindiff.execution.regional import release
from chaindiff.io import tensorfile
from chaindiff.io.digest import digest
from chaindiff.io.errors import UserError, did_you_mean
from chaindiff.io.files import folder_path
from chaindiff.io.processes import sole_writer
from chaindiff.io.progress import Bar
from chaindiff.specs.training import AugmentSpec, TrainSpec
from chaindiff.specs.validate import config
from chaindiff.training.batches import Batches, pictures
from chaindiff.training.loop import Progress
from chaindiff.training.loop import train as steps_of

What = TypeVar("What", bound=Stage | Chain)


def train(
    what: What,
    data: Any = None,
    *,
    folder: str | Path | None = None,
    only: str | None = None,
    augment: AugmentSpec | Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> What:
    """Train a stage, or every stage of a chain that learns (or the `only` one); afterwards it has averaged weights.

    `data`: a map-style dataset of items {name: value}, columns {name: [rows, ...]}, or a function that gives a batch
    for a list of sample numbers. A chain's encoders compute what the data does not hold, once per item unless images
    are augmented. A chain of a recipe trains on the recipe's data if `data` is left out. `augment` is that of a
    recipe's stage; by default images are not augmented. `settings` are those of a recipe's `train`, such as images
    (seen in all), batch, optimizer, ema, precision. With a `folder`, the state, figures and weights of every stage are
    saved in it, and the same call resumes from there.
    Raises UserError for data and settings that do not fit.
    """
    if isinstance(what, Chain) and what.origin is not None and data is None:
        for option, value in (("folder", folder), ("augment", augment), ("progress", progress)):
            if value is not None:
                raise UserError(f"train: a recipe's own training takes no {option}", hint="pass data, or leave it out")
        learning = [name for name, stage in what.stages.outlines.items() if learns(stage)]
        what.origin.train(what, [only] if only else learning, settings)
        return what
    if data is None:
        raise UserError("train needs data: a dataset of items, columns of tensors, or a function of sample numbers")
    spec = config(TrainSpec, settings, "train")
    stages = dict(what.stages.trainable()) if isinstance(what, Chain) else {what.name: what}
    if only is not None:
        if only not in stages:
            raise UserError(f"there is no stage '{only}' to train{did_you_mean(only, stages)}")
        stages = {only: stages[only]}
    how = config(AugmentSpec, {"flip": False} if augment is None else augment, "augment")
    for name, stage in stages.items():
        if not learns(stage):
            raise UserError(f"stage '{name}' has nothing to train: it is not a torch.nn.Module with parameters")
        batches: Any = data if callable(data) else batches_of(what, stage, data, how, spec.seed)
        home = None if folder is None else folder_path(folder)
        place = None if home is None else home / "stages" / name
        with nullcontext() if home is None else sole_writer(home):
            _train_stage(stage, batches, spec, place, progress)
        if isinstance(what, Chain):
            what.stages.loaded[name] = stage
            what.weights.pop(name, None)  # they come from no file now
    return what


def _train_stage(
    stage: nn.Module,
    batches: Callable[[list[int]], dict[str, Tensor]],
    spec: TrainSpec,
    folder: Path | None,
    progress: Callable[[Progress], None] | None,
) -> None:
    name = str(stage.name)
    stage.requires_grad_(True)
    about = saving.metadata(stage)  # type: ignore[arg-type]
    about["identity"] = digest([about["identity"], spec.model_dump(mode="json", exclude={"execution", "log_every"})])
    if isinstance(batches, Batches):
        about["content"] = saving.content(batches.data)
    with tempfile.TemporaryDirectory() as scratch, Bar(f"train {name}", spec.images) as bar:
        place = folder or Path(scratch)
        for step in steps_of(stage, batches, spec, place, total=spec.images, metadata=about):
            bar.update(min(step.images, step.total), str(step) or None)
            if progress is not None:
                progress(step)
        tensorfile.fill(stage, tensorfile.load(place / "weights.safetensors")[0], str(place))
    if isinstance(stage, Diffusion):
        stage.autocast = None  # precision and execution were those of training
        release(stage.network)
    stage.eval()


# ------------------------------------------------------------ batches


def batches_of(what: Stage | Chain, stage: Stage, data: Any, augment: AugmentSpec, seed: int) -> Batches:
    """Batches of a stage's variables, from the data and from encoders applied to it."""
    items: Data = data if isinstance(data, Items | ImageData) else Items(data, *_image_of(data, stage, what))
    variables = dict(what.variables) if isinstance(what, Chain) else {}
    variables |= {v.name: v for v in saving.trained_variables(stage)}
    known = what.encoders if isinstance(what, Chain) else {}
    wanted, encoders = saving.trained_variables(stage), dict[str, Encoder]()
    held = {*items.fields, *([items.image] if isinstance(items, Items) else [])}
    queue = [variable.name for variable in wanted]
    while queue:  # an encoder computes what the data does not hold
        name = queue.pop()
        if name not in held and name in known and name not in encoders:
            encoders[name] = known[name]
            queue.append(known[name].of)
    read = [variables.get(encoder.of, Variable(encoder.of, "text", ())) for encoder in encoders.values()]
    root = next((v for v in [*wanted, *read] if v.name not in encoders and pictures(v)), None)
    batches = Batches(items, root, wanted, encoders, {}, {}, augment, seed, read)
    if not active(augment):
        batches.keep(name for name in encoders if name not in variables or variables[name].kind != "image")
    return batches


def _image_of(data: Any, stage: Stage, what: Stage | Chain) -> tuple[str, ...]:
    """The entry that holds the image, if an image variable has its name."""
    entries = data if isinstance(data, Mapping) else data[0] if len(data) else {}
    variables = [*stage.generates.values(), *(what.variables.values() if isinstance(what, Chain) else ())]
    return tuple(v.name for v in variables if pictures(v) and v.name in entries)[:1]
