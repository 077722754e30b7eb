"""The training loop of one stage: a generator that yields progress; logging, previews and bars live outside.

Everything random is a pure function of (seed, image number), so a run that was killed and restarted ends with the same
weights as one that was not (bit for bit in eager float32 on a CPU). Several processes split every batch and end with
the same weights as one, up to rounding; but a network's dropout is drawn per micro-batch, keyed by its first image.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.formulation import averages
from chaindiff.chain.saving import changed, refuse_changed
from chaindiff.edm.ema import Average
from chaindiff.edm.random import Draws, seed
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.metadata import DAMAGED, about
from chaindiff.specs.stage import OptimizerSpec, PowerEmaSpec, TrainSpec
from chaindiff.training import snapshots

Batches = Callable[[list[int]], dict[str, Tensor]]  # sample numbers -> variables and augment_labels
MOMENTS = ("exp_avg", "exp_avg_sq")  # of every parameter, kept by Adam and AdamW
COMPILE_PAYS = 50_000  # images; a cold compilation takes as long as some thousands of them


@dataclass(frozen=True)
class Progress:
    """The progress of a training run. `loss` is the mean since the last report, or None."""

    images: int
    total: int
    images_per_second: float
    loss: float | None = None
    preview: nn.Module | None = None  # the averaged stage, when a preview is due


def learning_rate(spec: OptimizerSpec, images: int, total: int) -> float:
    """Linear warm-up, then constant, then a cosine down to 0 over the last `decay` images."""
    rate = spec.lr * min(1.0, images / spec.warmup) if spec.warmup else spec.lr
    if spec.decay and images > total - spec.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * (images - total + spec.decay) / spec.decay))
    return rate


def build_optimizer(spec: OptimizerSpec, module: nn.Module) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.kind]
    return kind(module.parameters(), spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)


def state_tensors(stage: nn.Module, emas: Mapping[str, Average], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a run needs to resume, as flat named tensors."""
    tensors = {f"model.{k}": v for k, v in stage.state_dict().items()}
    for name, ema in emas.items():
        tensors |= {f"{name}.{k}": v for k, v in ema.model.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in entry.items()}
    return tensors


def restore(
    tensors: dict[str, Tensor],
    stage: nn.Module,
    emas: Mapping[str, Average],
    optimizer: torch.optim.Optimizer,
    where: str,
) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    tensorfile.fill(stage, part("model."), where)
    for name, ema in emas.items():
        tensorfile.fill(ema.model, part(f"{name}."), where)
    state, kept, names = {}, part("optimizer."), ("step", *MOMENTS)
    for index, like in enumerate(stage.parameters()):
        own = {name: kept.pop(f"{index}.{name}") for name in names if f"{index}.{name}" in kept}
        if not own:
            continue  # a parameter that no loss has reached yet
        fits = len(own) == len(names) and own["step"].numel() == 1 and 1 <= float(own["step"]) < math.inf
        if not fits or any(own[name].shape != like.shape for name in MOMENTS):
            raise UserError(f"{where}: the optimizer's state of parameter {index} does not fit it", hint=DAMAGED)
        # Moments in the parameter's memory format are many times faster.
        moments = {name: torch.empty_like(like).copy_(own[name]) for name in MOMENTS}
        state[index] = {"step": own["step"].float().reshape(()), **moments}
    if kept:
        raise UserError(f"{where}: the optimizer's state holds the unknown '{min(kept)}'", hint=DAMAGED)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Loss(nn.Module):
    """The loss of a stage as a module's call, which is what wrappers for distributed training expect."""

    stage: Any

    def __init__(self, stage: nn.Module, precision: torch.dtype | None):
        super().__init__()
        self.stage, self.precision = stage, precision

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        device = next(iter(batch.values())).device.type
        with torch.autocast(device, self.precision, enabled=self.precision is not None):
            return self.stage.loss(batch, draws)


def prepare(stage: nn.Module, spec: TrainSpec, images: int) -> Loss:
    """A stage's loss, compiled and in the precision that the settings ask for. Raises UserError for what it cannot do.

    A diffusion stage compiles its network and keeps everything else in float32; another is taken as a whole.
    """
    bf16 = torch.bfloat16 if spec.precision == "bf16" else None
    if not isinstance(stage, Diffusion):
        if spec.execution == "compile":
            raise UserError("train.execution: only diffusion stages are compiled", hint="leave `execution` out")
        return Loss(stage, bf16)
    stage.autocast = bf16
    if compiles(spec, images):
        stage.network.compile()
    return Loss(stage, None)


def train(
    stage: nn.Module,
    batches: Batches,
    spec: TrainSpec,
    folder: Path,
    *,
    total: int,
    metadata: dict[str, Any],
    begin: int = 0,
    accelerator: Accelerator | None = None,
) -> Iterator[Progress]:
    """Train until `total` images have been seen, continuing from `folder/state.safetensors` if it is there.

    `begin`: training images that the stage's present weights have already seen.

    Writes state.safetensors, metrics.jsonl, snapshots of power-function averages and, at the end, weights.safetensors
    (the first average, with its configuration).
    Raises UserError if the batch cannot be divided, the state belongs to another stage, or the loss is not finite.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    ranks, rank = accelerator.num_processes, accelerator.process_index
    micro, rest = divmod(spec.batch, spec.accumulate * ranks)
    if rest:
        raise UserError(
            f"train.batch {spec.batch} cannot be shared by {ranks} processes x {spec.accumulate} micro-batches"
        )
    state_path = folder / "state.safetensors"
    stage.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    emas = averages(spec.ema, stage)
    ema = next(iter(emas.values()))  # the stage's weights
    snapshot_every = spec.ema.snapshot_every if isinstance(spec.ema, PowerEmaSpec) else 0
    optimizer = build_optimizer(spec.optimizer, stage)
    images = begin
    if state_path.exists():
        tensors, kept = tensorfile.load(state_path)
        if kept.get("identity") != metadata["identity"]:
            raise UserError(
                f"{state_path} is the state of another stage or of other training settings",
                hint=f"choose another --out, or delete {folder} to start again",
            )
        refuse_changed(state_path, changed(kept, metadata.get("content", {})))
        restore(tensors, stage, emas, optimizer, str(state_path))
        images = about(kept, state_path).images
        del tensors
    name = str(stage.name)
    model, optimizer = accelerator.prepare(prepare(stage, spec, total - images), optimizer)
    metrics = None
    if accelerator.is_main_process:
        from chaindiff.training.metrics import Metrics  # imports TensorBoard, which only training needs

        metrics = Metrics(folder, images)
        tensorfile.remove_leftovers(folder)
        snapshots.remove_after(folder, images if state_path.exists() else 0)
    parameters = list(stage.parameters())

    def save_state() -> None:
        if accelerator.is_main_process:
            everything = {**metadata, "images": str(images)}
            tensorfile.save(state_path, state_tensors(stage, emas, optimizer.optimizer), everything)
        accelerator.wait_for_everyone()

    model.train()
    running, steps = torch.zeros((), device=accelerator.device), 0
    began, last, speed = time.perf_counter(), images, 0.0
    while images < total:
        rate = learning_rate(spec.optimizer, images + spec.batch, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for part in range(spec.accumulate):
            first = images + (part * ranks + rank) * micro
            samples = list(range(first, first + micro))
            torch.manual_seed(seed(spec.seed, name, "dropout", first))
            batch = {k: v.to(accelerator.device) for k, v in batches(samples).items()}
            last_part = part == spec.accumulate - 1
            with nullcontext() if last_part else accelerator.no_sync(model):  # gradients are averaged once a step
                loss = model(batch, Draws(samples, spec.seed, name)).mean() / spec.accumulate
                accelerator.backward(loss)
            running += loss.detach()
        if spec.optimizer.clip:
            torch.nn.utils.clip_grad_norm_(parameters, spec.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        before, images, steps = images, images + spec.batch, steps + 1
        for average in emas.values():
            average.update(stage, spec.batch, images)
        crossed = [n and images // n > before // n for n in (spec.checkpoint_every, spec.preview_every, snapshot_every)]
        logs, saves = steps % spec.log_every == 0 or images >= total, crossed[0] or images >= total
        snaps = bool(snapshot_every) and (crossed[2] or images >= total)
        if logs or saves or snaps:
            everywhere = float(cast(Tensor, accelerator.reduce(running, "mean")))  # all processes raise, or none
            refuse_divergence(stage, name, everywhere, images)
        mean = None
        if logs:
            mean = everywhere / (steps % spec.log_every or spec.log_every)
            running.zero_()
            speed = (images - last) / (time.perf_counter() - began)
            began, last = time.perf_counter(), images
            if metrics:
                metrics.write(images, loss=mean, lr=rate, images_per_second=speed)
        if snaps and accelerator.is_main_process:  # before the state, so that none is missing on resuming
            snapshots.write(folder, emas.values(), images, metadata)
        if saves:
            save_state()
        yield Progress(images, total, speed, mean, ema.model if crossed[1] else None)
    if accelerator.is_main_process:
        tensorfile.save(folder / "weights.safetensors", ema.model.state_dict(), {**metadata, "images": str(images)})
    accelerator.wait_for_everyone()


def refuse_divergence(stage: nn.Module, name: str, loss: float, images: int) -> None:
    """Raises UserError if the loss is not finite, or the weights are not (infinite gradients of a finite loss)."""
    found = f"loss of stage '{name}' is {loss}"
    if math.isfinite(loss):
        if all(bool(parameter.isfinite().all()) for parameter in stage.parameters()):
            return
        found = f"weights of stage '{name}' are not finite"
    raise UserError(
        f"the {found} after {images} images",
        hint="lower train.optimizer.lr or lengthen its warmup; the last checkpoint is kept",
    )


def compiles(spec: TrainSpec, images: int) -> bool:
    """Whether to compile: when asked to, or when enough images follow and a C++ compiler or a GPU is there."""
    if spec.execution != "auto":
        return spec.execution == "compile"
    able = torch.cuda.is_available() or shutil.which("g++") is not None or shutil.which("clang++") is not None
    return able and images >= COMPILE_PAYS
