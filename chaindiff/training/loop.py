"""The training loop of one stage: a generator that yields progress; logging, previews and bars live outside.

Everything random is a pure function of (seed, image number), so a run that was killed and restarted ends with the same
weights as one that was not (bit for bit in eager float32 on a CPU). Several processes split every batch and end with
the same weights as one, up to rounding; but a network's dropout is drawn per micro-batch, keyed by its first image.

Batches are made by a thread while the steps before them run, and nothing waits for a GPU but what is logged or saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.formulation import averages
from chaindiff.chain.saving import changed, refuse_changed
from chaindiff.edm.random import Draws, seed
from chaindiff.execution.machine import SETTINGS, compiler, settle
from chaindiff.execution.regional import compile_network
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.io.files import remove_leftovers
from chaindiff.specs.training import OptimizerSpec, PowerEmaSpec, TrainSpec
from chaindiff.training import snapshots, states
from chaindiff.training.ahead import ahead

Batches = Callable[[list[int]], dict[str, Tensor]]  # sample numbers -> variables and augment_labels
WARM, TIMED = 2, 5  # steps after which timing begins and ends
COMPILING, SAVED = 60.0, 0.13  # seconds that it takes cold, and share of a step that it saves: a small U-Net, two cores


@dataclass(frozen=True)
class Progress:
    """The progress of a training run. `loss` is the mean since the last report, or None."""

    images: int
    total: int
    images_per_second: float
    loss: float | None = None
    preview: nn.Module | None = None  # the averaged stage, when a preview is due

    def __str__(self) -> str:
        return "" if self.loss is None else f"loss {self.loss:.4f}, {self.images_per_second:.0f} images/s"


def learning_rate(spec: OptimizerSpec, images: int, total: int) -> float:
    """Of the step after so many `images`: linear warm-up, then constant, then a cosine over the last `decay` images.

    EDM's code counts the images before a step: its first rate is 0.
    """
    rate = spec.lr * min(1.0, images / spec.warmup) if spec.warmup else spec.lr
    if spec.decay and images > total - spec.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * (images - total + spec.decay) / spec.decay))
    return rate


def build_optimizer(spec: OptimizerSpec, module: nn.Module) -> torch.optim.Optimizer:
    """Fused: one pass over all parameters, on CPU and CUDA."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.kind]
    known = {"betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
    return kind(module.parameters(), spec.lr, **known, fused=True)


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


def prepare(stage: nn.Module, spec: TrainSpec, execution: str) -> Loss:
    """A stage's loss, executed and in the precision that the settings ask for. Raises UserError for what it cannot do.

    A diffusion stage compiles its network and keeps everything else in float32; another is taken as a whole.
    """
    bf16 = torch.bfloat16 if spec.precision == "bf16" else None
    if not isinstance(stage, Diffusion):
        if spec.execution == "compile":
            raise UserError("train.execution: only diffusion stages are compiled", hint="leave `execution` out")
        return Loss(stage, bf16)
    stage.autocast = bf16
    if execution == "compile":
        compile_network(stage.network)
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
    """Train until `total` images have been seen, continuing from the last checkpoint in `folder` if there is one.

    `begin`: training images that the stage's present weights have already seen.

    Writes checkpoints (`states`), metrics.jsonl, snapshots of power-function averages and, at the end,
    weights.safetensors (the first average, with its configuration).
    Raises UserError if the batch cannot be divided, the state belongs to another stage, or the loss is not finite.
    """
    settle()
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device
    ranks, rank = accelerator.num_processes, accelerator.process_index
    micro, rest = divmod(spec.batch, spec.accumulate * ranks)
    if rest:
        raise UserError(
            f"train.batch {spec.batch} cannot be shared by {ranks} processes x {spec.accumulate} micro-batches"
        )
    stage.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    emas = averages(spec.ema, stage)
    ema = next(iter(emas.values()))  # the stage's weights
    snapshot_every = spec.ema.snapshot_every if isinstance(spec.ema, PowerEmaSpec) else 0
    optimizer = build_optimizer(spec.optimizer, stage)
    images, execution = begin, spec.execution if isinstance(stage, Diffusion) else "eager"
    state = states.last(folder)
    if state is not None:
        if state.metadata.get("identity") != metadata["identity"]:
            raise UserError(
                f"{state.path} is the state of another stage or of other training settings",
                hint=f"choose another --out, or delete {folder} to start again",
            )
        refuse_changed(state.path, changed(state.metadata, metadata.get("content", {})))
        states.restore(state.tensors, stage, emas, optimizer, str(state.path))
        images = state.images
        if execution == "auto" and state.total in (0, total):  # as this run decided
            execution = state.metadata.get("execution", execution)
    begun, damaged = state is not None, state is not None and state.path.name == states.PREVIOUS
    del state  # its tensors
    name = str(stage.name)
    model, optimizer = accelerator.prepare(prepare(stage, spec, execution), optimizer)
    metrics = None
    if accelerator.is_main_process:
        from chaindiff.training.metrics import Metrics  # imports TensorBoard, which only training needs

        metrics = Metrics(folder, images)
        remove_leftovers(folder)
        snapshots.remove_after(folder, images if begun else 0)
    parameters = list(stage.parameters())

    def executed() -> dict[str, Any]:
        return {"execution": execution, "device": device.type, "settings": SETTINGS}

    def save_state() -> None:
        nonlocal damaged
        if accelerator.is_main_process:
            everything = {**metadata, **executed(), "images": str(images), "batch": str(spec.batch)}
            states.write(folder, states.state_tensors(stage, emas, optimizer.optimizer), everything, damaged)
            damaged = False
        accelerator.wait_for_everyone()

    def parts() -> Iterator[list[int]]:
        """The samples of this process's micro-batches, one after the other."""
        for at in range(images, total, spec.batch):
            for part in range(spec.accumulate):
                first = at + (part * ranks + rank) * micro
                yield list(range(first, first + micro))

    def make(samples: list[int]) -> tuple[list[int], dict[str, Tensor]]:
        batch = batches(samples)
        return samples, {k: v.pin_memory() for k, v in batch.items()} if device.type == "cuda" else batch

    model.train()
    running, steps, since = torch.zeros((), device=device), 0, 0.0
    began, last, speed = time.perf_counter(), images, 0.0
    with closing(ahead(make, parts())) as coming:
        while images < total:
            rate = learning_rate(spec.optimizer, images, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for part in range(spec.accumulate):
                samples, batch = next(coming)
                torch.manual_seed(seed(spec.seed, name, "dropout", samples[0]))
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
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
            every = (spec.checkpoint_every, spec.preview_every, snapshot_every)
            crossed = [n and images // n > before // n for n in every]
            logs, saves = steps % spec.log_every == 0 or images >= total, crossed[0] or images >= total
            snaps = bool(snapshot_every) and (crossed[2] or images >= total)
            if logs or saves or snaps:
                everywhere = float(cast(Tensor, accelerator.reduce(running, "mean")))  # all processes raise, or none
                refuse_divergence(stage, name, everywhere, images)
            if execution == "auto" and steps in (WARM, TIMED):
                float(running)  # waits until the device has done what it was told
                now = time.perf_counter()
                if steps == TIMED:
                    left = torch.tensor((now - since) / (TIMED - WARM) * (total - images) / spec.batch, device=device)
                    execution = "compile" if pays(float(cast(Tensor, accelerator.reduce(left, "mean")))) else "eager"
                    if execution == "compile":
                        compile_network(cast(Diffusion, stage).network)
                since = now
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
        tensorfile.save(
            folder / "weights.safetensors", ema.model.state_dict(), {**metadata, **executed(), "images": str(images)}
        )
    accelerator.wait_for_everyone()


def refuse_divergence(stage: nn.Module, name: str, loss: float, images: int) -> None:
    """Raises UserError if the loss is not finite, or the weights are not (infinite gradients of a finite loss)."""
    found = f"loss of stage '{name}' is {loss}"
    if math.isfinite(loss):
        if bool(torch.stack([parameter.isfinite().all() for parameter in stage.parameters()]).all()):
            return
        found = f"weights of stage '{name}' are not finite"
    raise UserError(
        f"the {found} after {images} images",
        hint="lower train.optimizer.lr or lengthen its warmup; the last checkpoint is kept",
    )


def pays(seconds: float) -> bool:
    """Whether to compile the network of a run that would go on eagerly for so many seconds."""
    return (torch.cuda.is_available() or compiler() is not None) and seconds * SAVED > COMPILING
