"""Reference samples by k-diffusion: `pip install --no-deps k-diffusion torchdiffeq torchsde trampoline`, then run this.

Writes tests/fixtures/k_diffusion.safetensors: what its samplers make of the exact denoiser of a mixture, in float64,
with the start and the noise that they were given. Only its samplers are loaded: the package imports training code.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from exact import two_modes
from safetensors.torch import save_file
from torch import Tensor

STEPS = 12


def sampling() -> ModuleType:
    """k_diffusion.sampling without k_diffusion/__init__.py."""
    found = find_spec("k_diffusion")
    assert found is not None and found.submodule_search_locations, __doc__
    package = ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    from k_diffusion import sampling

    return sampling


def main() -> None:
    k, mixture = sampling(), two_modes()
    start, noise = (torch.randn(n, 9, 1, generator=torch.Generator().manual_seed(n)).double() for n in (1, STEPS))
    sigmas = k.get_sigmas_karras(STEPS, 0.002, 80.0, 7.0).double()

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture({"x": x}, {"x": float(sigma[0])}).x0["x"]

    def drawn(sigma: Tensor, after: Tensor) -> Tensor:
        return noise[int((sigmas == sigma).nonzero()[0])]

    def randn_like(x: Tensor) -> Tensor:  # what churn draws by itself, in the order of the steps
        return next(fresh)

    x, quiet = start[0] * sigmas[0], {"disable": True}
    found = {
        "euler": k.sample_euler(model, x, sigmas, **quiet),
        "heun": k.sample_heun(model, x, sigmas, **quiet),
        "dpmpp_2m": k.sample_dpmpp_2m(model, x, sigmas, **quiet),
        "ancestral": k.sample_euler_ancestral(model, x, sigmas, eta=1.0, noise_sampler=drawn, **quiet),
        "ancestral_half": k.sample_euler_ancestral(model, x, sigmas, eta=0.5, noise_sampler=drawn, **quiet),
        "sde": k.sample_dpmpp_2m_sde(model, x, sigmas, eta=1.0, noise_sampler=drawn, **quiet),
    }
    torch.randn_like, fresh = randn_like, iter(noise)
    found["churn"] = k.sample_heun(model, x, sigmas, s_churn=4.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003, **quiet)
    tensors = {"start": start[0], "noise": noise, "sigmas": sigmas, **{f"out.{n}": v for n, v in found.items()}}
    path = Path(__file__).parent / "fixtures" / "k_diffusion.safetensors"
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, path, {"k-diffusion": version("k-diffusion")}
    )


if __name__ == "__main__":
    main()
