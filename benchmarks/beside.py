"""Peers' sides of the suite's cases: the same work by EDM as published, diffusers and others.

A peer that is not installed is a side that says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers
from benchmarks.works import FEW, HEUN
from chaindiff.bench.timing import Side
from chaindiff.bench.works import AUGMENT, BATCH, FFHQ, SMALL, quietly, stage
from chaindiff.data import augment, open_data
from chaindiff.edm.levels import karras_sigmas
from chaindiff.specs.network import UNetSpec

SIGMA_DATA = 0.5
LEVELS = karras_sigmas(HEUN, 0.002, 80.0, 7.0).tolist()
Denoise = Callable[[Tensor, Tensor], Tensor]
INSTALL = {
    "diffusers": 'pip install -e ".[peers]"',
    "denoising-diffusion-pytorch": 'pip install -e ".[peers]"',
    "k-diffusion": "pip install --no-deps k-diffusion torchdiffeq torchsde trampoline",
}


def sides(case: str, edm: Path | None = None) -> dict[str, Side]:
    """The peers' sides of a case. `edm`: EDM's own code, which is executed."""
    make = {
        "evaluate-32": evaluate_32,
        "evaluate-ffhq64": evaluate_ffhq64,
        "train-32": train_32,
        "sample-32": sample_32,
    }
    return make[case](edm) if case in make else {}


def facts(network: nn.Module, size: int) -> dict[str, float]:
    """Parameters, and FLOPs of one evaluation of one image, counted on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        copy.deepcopy(network).to("meta")(torch.empty(1, 3, size, size), torch.empty(1))
    return {"parameters": sum(p.numel() for p in network.parameters()), "flops": counter.get_total_flops()}


def others(size: int, spec: UNetSpec, edm: Path | None, **more: Any) -> Iterator[tuple[str, nn.Module | str]]:
    """Every peer's network, or why it is not there."""
    unet: Any = stage(spec, size, **more).network
    yield "EDM as published", peers.Published(unet)
    if edm is not None:
        yield "EDM, its authors' file", peers.authors(edm, unet, size, spec)
    for name, make in {"diffusers": peers.diffusers, "denoising-diffusion-pytorch": peers.denoising}.items():
        try:
            yield name, make(size)
        except ImportError:
            yield name, f"not installed: {INSTALL[name]}"


def denoiser(network: Callable[..., Tensor], *told: Tensor) -> Denoise:
    """EDM's preconditioning (eq. 7) of a network F(x, noise label), as its authors compute it."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.float().reshape(-1, 1, 1, 1)
        total = (s**2 + SIGMA_DATA**2).sqrt()
        raw = network((x / total).float(), s.flatten().log() / 4, *told)
        return SIGMA_DATA**2 / total**2 * x + s * SIGMA_DATA / total * raw

    return denoise


# ---------------------------------------------------------------- evaluations


def _evaluations(spec: UNetSpec, size: int, batch: int, edm: Path | None) -> dict[str, Side]:
    x, sigma, found = torch.randn(batch, 3, size, size), torch.rand(batch) + 0.1, dict[str, Side]()
    for name, network in others(size, spec, edm):
        if isinstance(network, str):
            found[name] = Side(missing=network)
            continue
        run = quietly(partial(denoiser(network.eval()), x, sigma))
        found[name] = Side(run, batch, facts(network, size), warm=1 if size == 64 else 2)
    return found


def evaluate_32(edm: Path | None) -> dict[str, Side]:
    return _evaluations(SMALL, 32, BATCH, edm)


def evaluate_ffhq64(edm: Path | None) -> dict[str, Side]:
    return _evaluations(FFHQ, 64, 4, edm)


# ---------------------------------------------------------------- training


def train_32(edm: Path | None) -> dict[str, Side]:
    """A plain loop as EDM's: Adam, EMA, augmentation (by our own fast functions), all eager in float32."""
    data, found = open_data("emoji64"), {}
    for name, network in others(32, SMALL, edm, augment_dim=augment.GEOMETRIC):
        if isinstance(network, str):
            found[name] = Side(missing=network)
        else:
            found[name] = Side(_step(network.train(), data, told=name.startswith("EDM")), BATCH, warm=1)
    return found


def _step(network: nn.Module, data: Any, told: bool) -> Callable[[], None]:
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    seen = [0]

    def step() -> None:
        rows = torch.randint(len(data), (BATCH,)).tolist()
        drawn = augment.draw(AUGMENT, [("bench", seen[0] + n) for n in range(BATCH)])
        seen[0] += BATCH
        clean = augment.apply(data.pixels(rows, 32), drawn)
        sigma = (torch.randn(BATCH) * 1.2 - 1.2).exp()
        noisy = clean + torch.randn_like(clean) * sigma[:, None, None, None]
        denoised = denoiser(network, *([drawn.label] if told else []))(noisy, sigma)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        (weight[:, None, None, None] * (denoised - clean) ** 2).sum().div(BATCH).backward()
        for parameter in network.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for held, new in zip(average.parameters(), network.parameters(), strict=True):
            held.copy_(new.detach().lerp(held, 0.999))

    return step


# ---------------------------------------------------------------- sampling


def sample_32(edm: Path | None) -> dict[str, Side]:
    """Everyone's own sampling loop, with as many evaluations of its own network."""
    loops = {"diffusers": _diffusers_loop, "denoising-diffusion-pytorch": _denoising_loop}
    found: dict[str, Side] = {}
    for name, network in others(32, SMALL, edm):
        if isinstance(network, str):
            found[name] = Side(missing=network)
        else:
            found[name] = Side(quietly(loops.get(name, _heun_loop)(network.eval())), FEW, warm=1)
            if isinstance(network, peers.Published):
                found["k-diffusion, EDM's network"] = _k_diffusion(network)
    return found


def _k_diffusion(network: nn.Module) -> Side:
    try:
        sampling: Any = peers.k_diffusion()
    except ImportError:
        return Side(missing=f"not installed: {INSTALL['k-diffusion']}")

    def run() -> Tensor:
        x = torch.randn(FEW, 3, 32, 32) * LEVELS[0]
        return sampling.sample_heun(denoiser(network), x, torch.tensor(LEVELS), disable=True)

    return Side(quietly(run), FEW, warm=1)


def _heun_loop(network: nn.Module) -> Callable[[], Tensor]:
    """EDM's sampler (algorithm 1), its state in float64."""
    denoise = denoiser(network)

    def run() -> Tensor:
        x = torch.randn(FEW, 3, 32, 32).double() * LEVELS[0]
        for now, after in pairwise(LEVELS):
            slope = (x - denoise(x, torch.full((1,), now)).double()) / now
            ahead = x + (after - now) * slope
            if after:
                second = (ahead - denoise(ahead, torch.full((1,), after)).double()) / after
                ahead = x + (after - now) * (slope + second) / 2
            x = ahead
        return x

    return run


def _diffusers_loop(network: nn.Module) -> Callable[[], Tensor]:
    from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler

    scheduler: Any = EDMDPMSolverMultistepScheduler()

    def run() -> Tensor:
        scheduler.set_timesteps(2 * HEUN - 1)
        x = torch.randn(FEW, 3, 32, 32) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        return x

    return run


def _denoising_loop(_: nn.Module) -> Callable[[], Tensor]:
    """`ElucidatedDiffusion` wants a network that embeds levels by learned sinusoids."""
    import denoising_diffusion_pytorch.elucidated_diffusion as home

    home.tqdm = lambda steps, **_: steps  # no bar
    network = peers.denoising(32, learned_sinusoidal_cond=True).eval()
    model: Any = home.ElucidatedDiffusion(network, image_size=32, num_sample_steps=HEUN)
    return lambda: model.sample(batch_size=FEW)
