"""Train one stage of a recipe: its encoders are fitted, its embeddings cached, then its network trains."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.saving import content as content_of
from chaindiff.chain.saving import refuse_changed
from chaindiff.data.augment import active
from chaindiff.edm.random import Draws
from chaindiff.encoders import Embedding, Encoder, FileVectors, build_encoder
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.files import cache_folder, user_path
from chaindiff.io.memory import noted
from chaindiff.io.metadata import about
from chaindiff.io.processes import processes, share
from chaindiff.io.progress import Bar, shown
from chaindiff.recipe.assembly import Assembly
from chaindiff.show.images import grid, save_png
from chaindiff.specs.lock import write_lock
from chaindiff.training import states
from chaindiff.training.batches import Batches, Features
from chaindiff.training.begin import begin_from
from chaindiff.training.cache import EmbeddingCache
from chaindiff.training.fit import fit
from chaindiff.training.loop import train

EMBEDDING_BATCH = 128
PREVIEWS = 16


def train_stage(assembly: Assembly, name: str, start: Path | None = None, more: int = 0) -> Path:
    """Train a stage to the images of its recipe, or `more` beyond `start`; returns its weights file.

    An unfinished run resumes where it stopped. Raises UserError for data, weights or settings that do not fit.
    """
    held = assembly.held()
    if processes().is_main_process and (held is None or held.recipe != assembly.recipe):  # it can be named from now on
        write_lock(assembly.out, assembly.recipe, held.lock if held else {})
    part = assembly.stages[name]
    spec, folder, stage = part.spec, part.folder, part.build()
    images, total, content = 0, spec.train.images, {**part.content, **content_of(assembly.data)}
    tensors: dict[str, Tensor] | None = None
    if (state := states.last(folder)) is not None:
        refuse_changed(state.path, part.changed(state.metadata))
        images, total = state.images, state.total or total
        if more and not part.unfinished:
            total = images + more
    elif more and start is not None:
        tensors, kept = tensorfile.load(start)
        refuse_changed(start, part.changed(kept))
        images = about(kept, start).images
        total = images + more
    elif spec.init is not None:
        with assembly.located(f"stages.{name}.init"):
            begin_from(stage, user_path(spec.init))
    if tensors is not None:
        tensorfile.fill(stage, tensors, str(start))
    batches = prepare(assembly, name)
    part.unlock()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    steps = train(
        stage,
        batches,
        spec.train,
        folder,
        total=total,
        begin=images if tensors is not None else 0,
        metadata={**part.metadata(), "content": content, "total": str(total)},
        accelerator=accelerator,
    )
    less = (
        f"while training stage '{name}'",
        f"raise stages.{name}.train.accumulate, now {spec.train.accumulate}: the same training in smaller parts",
        f"or lower stages.{name}.train.batch, now {spec.train.batch}",
    )
    with noted(*less), Bar(f"train {name}", total, images) as bar:
        for progress in steps:
            bar.update(min(progress.images, total), str(progress) or None)
            if progress.preview is not None and accelerator.is_main_process:
                preview(progress.preview, batches, folder / "previews" / f"{progress.images:09d}.png")
    return folder / "weights.safetensors"


def preview(stage: nn.Module, batches: Batches, path: Path) -> None:
    """A grid of samples with the averaged weights and ground-truth conditioning."""
    made = stage.generates.values() if isinstance(stage, Diffusion) else ()
    if (name := next((variable.name for variable in made if variable.kind == "image"), None)) is None:
        return
    assert isinstance(stage, Diffusion)
    batch = batches(list(range(PREVIEWS)))
    draws = Draws(range(PREVIEWS), 0, 0, stage.name, dtype=torch.float64)
    *_, last = stage.sample({v.name: batch[v.name] for v in stage.given}, draws)
    images = last[name].float().cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(images, columns=math.isqrt(PREVIEWS)), path)


# ------------------------------------------------------------ encoders and caches


def prepare(assembly: Assembly, name: str) -> Batches:
    """The training batches of a stage: encoders fitted, expensive ones cached; processes divide the work."""
    spec, recipe, state = assembly.recipe.stages[name], assembly.recipe, processes()
    wanted = assembly.stages[name].variables
    encoders: dict[str, Encoder] = {}
    caches: dict[str, Features] = {}
    queue = [v.name for v in wanted]
    while queue:
        variable = queue.pop()
        encoder_spec = recipe.variables[variable].encoder
        if encoder_spec is None or variable in encoders:
            continue
        if (source := recipe.variables[variable].reads) is not None:
            queue.append(source)
        path = assembly.encoders[variable].path
        with assembly.located():
            encoder = build_encoder(variable, assembly.coders, path if path.exists() else None)
        if isinstance(encoder, Embedding):
            caches[variable] = embed(assembly, encoder, name)
            state.wait_for_everyone()  # every shard is there, and all have seen whether there were statistics
            if not encoder.fitted:
                if state.is_main_process:
                    fit(encoder, caches[variable], path)
                state.wait_for_everyone()
                encoder = build_encoder(variable, assembly.coders, path)
        encoders[variable] = encoder
    labels = {
        v.name: assembly.columns[v.name].field
        for v in wanted
        if v.kind in ("label", "vector") and v.name not in encoders
    }
    for label in (name for name in labels if assembly.variables[name].kind == "label"):
        _ = assembly.columns[label].classes  # raises, if they are not those of the data
    texts = {n: assembly.columns[n].field for n, s in recipe.variables.items() if s.kind == "text"}
    root = assembly.root if any(variable.kind == "image" for variable in recipe.variables.values()) else None
    direct = {n: assembly.variables[encoder.of] for n, encoder in encoders.items() if n not in caches}
    read, seed = [*direct.values()], spec.train.seed
    batches = Batches(assembly.data, root, wanted, encoders, caches, labels | texts, spec.augment, seed, read)
    batches.keep(n for n, source in direct.items() if source.kind == "text")
    return batches


def embed(assembly: Assembly, encoder: Embedding, name: str) -> Features:
    """Features of an encoder over the training data; images' are cached on disk: this process embeds its own share of
    what is missing.

    Raises UserError if the encoder reads neither the data's own image nor a text, nothing could be cached, or a file of
    vectors does not fit.
    """
    data, augment = assembly.data, assembly.recipe.stages[name].augment
    if isinstance(encoder, FileVectors):
        with assembly.located():
            return encoder.rows_of(data.names)
    if assembly.recipe.variables[encoder.of].kind == "text":
        return encoder.features(data.field(assembly.columns[encoder.of].field))
    root = assembly.root
    if encoder.of != root.name:
        raise UserError(
            f"variable '{encoder.name}' embeds '{encoder.of}', which is not the data's own image '{root.name}'",
            assembly.loaded.where(f"variables.{encoder.name}.encoder.of"),
            f"set of: {root.name}",
        )
    if active(augment) and not augment.variants:
        raise UserError(
            f"stage '{name}' augments its images without end, so the embedding '{encoder.name}' cannot be cached",
            assembly.loaded.where(f"stages.{name}.augment"),
            "set augment.variants, say to 8: that many augmented versions of every image are embedded once",
        )
    cache = EmbeddingCache(cache_folder(), encoder, data, augment, root.shape[-1])
    shown(f"embed {encoder.name}", cache.build(EMBEDDING_BATCH, share(cache.missing())))
    return cache["features"]
