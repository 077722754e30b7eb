"""Training waits for nothing: batches are made ahead, with the same results; and nothing waits for the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from exact import normal_batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError
from chaindiff.kernels import noise
from chaindiff.specs.network import PriorSpec, UNetSpec
from chaindiff.specs.training import EmaSpec, TrainSpec
from chaindiff.training import loop
from chaindiff.training.ahead import ahead
from chaindiff.training.loop import train


def making() -> bool:
    """Whether a thread that makes batches is alive."""
    return any(thread.name.startswith("ahead") for thread in threading.enumerate())


# ------------------------------------------------------------ the iterator


@pytest.mark.parametrize("bound", [1, 2, 9])
def test_results_come_in_order(bound) -> None:
    assert list(ahead(str, range(5), bound)) == ["0", "1", "2", "3", "4"]
    assert list(ahead(str, [], bound)) == []
    assert not making()


def test_the_next_is_made_while_one_is_in_use() -> None:
    made = [threading.Event() for _ in range(4)]
    coming = ahead(lambda item: made[item].set(), range(4))
    next(coming)
    assert made[1].wait(10)
    assert made[2].wait(10)
    assert not made[3].wait(0.05), "more than the bound was made"
    coming.close()
    assert not made[3].is_set()
    assert not making()


def test_an_error_comes_in_its_turn() -> None:
    coming = ahead(lambda item: 1 / (item - 2), range(5))
    assert [next(coming), next(coming)] == [-0.5, -1.0]
    with pytest.raises(ZeroDivisionError):
        next(coming)
    assert not making()


# ------------------------------------------------------------ the loop


def vector_stage() -> Diffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = [(Variable.vector("c", 4), {"dropout": 0.5, "noise": 0.3, "keep": [0, 2, 4]})]
        return Diffusion(
            Variable.vector("v", 4), given=given, network=PriorSpec(kind="prior", width=16, depth=1, heads=2)
        )


def vectors(samples: list[int]) -> dict[str, Tensor]:
    return {name: normal_batch((4,), samples, name).float() / 2 for name in ("v", "c")}


def steps(folder: Path, batches=vectors, stage: Any = None, accelerator: Any = None, **changes) -> Iterator[Any]:
    said = {"images": 48, "batch": 8, "execution": "eager", "log_every": 1, "ema": EmaSpec(half_life=20)}
    spec = TrainSpec(**{**said, **changes})
    about = {"identity": "i"}
    return train(stage or vector_stage(), batches, spec, folder, total=48, metadata=about, accelerator=accelerator)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_are_the_same_bits_with_batches_made_ahead_and_in_turn(tmp_path, monkeypatch, accumulate) -> None:
    list(steps(tmp_path / "ahead", accumulate=accumulate))
    monkeypatch.setattr(loop, "ahead", lambda make, items: (make(item) for item in items))
    list(steps(tmp_path / "turn", accumulate=accumulate))
    for name in ("weights.safetensors", "state.safetensors"):
        one, other = (tensorfile.load(tmp_path / how / name)[0] for how in ("ahead", "turn"))
        assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_mistake_in_the_data_ends_the_step_that_it_belongs_to(tmp_path) -> None:
    def broken(samples: list[int]) -> dict[str, Tensor]:
        if 24 in samples:
            raise UserError("image 24 cannot be read")
        return vectors(samples)

    done = []
    with pytest.raises(UserError, match="image 24 cannot be read"):
        done.extend(step.images for step in steps(tmp_path, broken, checkpoint_every=8))
    assert done == [8, 16, 24]
    assert tensorfile.metadata(tmp_path / "state.safetensors")["images"] == "24"
    assert not making()


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_nothing_goes_on_when_training_ends_early(tmp_path, how) -> None:
    made = []
    going = steps(tmp_path, lambda samples: made.append(samples[0]) or vectors(samples))
    next(going)
    if how == "closed":
        going.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            going.throw(KeyboardInterrupt)
    assert not making()
    assert max(made) <= 24


# ------------------------------------------------------------ nothing waits for the device

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")


class Waiting(TorchDispatchMode):
    """Notes operations after which the host waits for the device, and copies between them that it waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        devices = {t.device.type for t in tree_iter((args, out)) if isinstance(t, Tensor) and t.dim()}
        copied = name in ("_to_copy", "copy_") and len(devices) > 1
        wants = (kwargs or {}).get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if name in WAITS or (copied and not wants):
            self.found.append(name)
        return out


class Pretended(Accelerator):
    """An accelerator of one GPU that is not there: autograd wants a real one, so that gradients are made up."""

    num_processes, process_index, is_main_process, device = 1, 0, False, torch.device("cuda", 0)

    def __init__(self) -> None:
        pass

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        self.parameters = list(model.parameters())
        return model, optimizer

    def backward(self, loss: Tensor) -> None:
        assert loss.grad_fn is not None
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


@contextmanager
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tensors have the device of a GPU that is not there, and no values."""

    def generate(key: int, samples: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(samples), count, dtype=dtype, device=samples.device)

    monkeypatch.setattr(noise, "_kernel", lambda samples: generate if samples.is_cuda else None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(nn.Module, "to", lambda module, *where, **how: module)  # the weights are there already
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield Pretended()


def unet_stage() -> Diffusion:
    network = UNetSpec(kind="unet", channels=16, mult=[1, 2], blocks=1, attention=[8])
    small = (Variable.image("small", 3, 8), {"noise": 0.3})
    return Diffusion(Variable.image("v", 3, 16), given=[small], network=network, augment_dim=9)


def images(samples: list[int]) -> dict[str, Tensor]:
    sizes = {"v": (3, 16, 16), "small": (3, 8, 8), "augment_labels": (9,)}
    return {name: torch.zeros(len(samples), *size) for name, size in sizes.items()}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("make", "batches"), [(vector_stage, vectors), (unet_stage, images)])
def test_between_what_is_logged_no_step_waits_for_the_device(tmp_path, monkeypatch, make, batches) -> None:
    with pretended_cuda(monkeypatch) as accelerator:
        with accelerator.device:
            stage = make()
        going = steps(tmp_path, batches, stage, accelerator, log_every=50)
        next(going)
        with Waiting() as waiting:
            next(going)
            next(going)
            assert waiting.found == []
            torch.zeros(2).to(accelerator.device)
            torch.zeros(2, device=accelerator.device).cpu()
            torch.tensor([1.0, 2.0], device=accelerator.device)
        going.close()
    assert waiting.found == ["_to_copy"] * 3, "the test would not have seen it"


@pytest.mark.gpu
def test_on_cuda_no_step_waits_between_what_is_logged(tmp_path) -> None:
    going = steps(tmp_path, images, unet_stage(), log_every=50, precision="bf16")
    next(going)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(going)
        next(going)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        going.close()
