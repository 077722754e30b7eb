"""Chains of diffusion generative models: declare, train, sample and measure them.

The public names are loaded when they are first used, so that `chaindiff --help` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chaindiff.chain.chain import Chain, Source
    from chaindiff.chain.diffusion import Diffusion
    from chaindiff.chain.request import Preview
    from chaindiff.chain.saving import load_stage, save_stage
    from chaindiff.chain.stage import Cost, Stage
    from chaindiff.chain.variable import Variable
    from chaindiff.commands.evaluate import evaluate
    from chaindiff.commands.run import run
    from chaindiff.data import open_data
    from chaindiff.data.items import Items
    from chaindiff.edm.denoiser import Denoiser, Prediction
    from chaindiff.edm.levels import Path, karras_sigmas, staggered, together
    from chaindiff.edm.random import Draws
    from chaindiff.edm.solvers import Churn, Row, Step, Update, evaluations, integrate, invert, solve, updates
    from chaindiff.evaluation.tensors import measure
    from chaindiff.guidance import Wrapper, classifier_free, guided, interval, known, thresholded
    from chaindiff.io.errors import UserError
    from chaindiff.networks.interface import Condition, Interface, Network
    from chaindiff.recipe.load import load
    from chaindiff.specs.link import LinkSpec as Link
    from chaindiff.specs.network import JointNetwork, Prior, Transformer, UNet
    from chaindiff.specs.sampling import LinkSampling
    from chaindiff.specs.sampling import SamplerSpec as Sampler
    from chaindiff.specs.stage import Generated
    from chaindiff.training.objects import train

    __version__: str

# Where each public name lives, by the name that it has there.
_HOMES = {
    "chaindiff.chain.chain": ["Chain", "Source"],
    "chaindiff.commands.evaluate": ["evaluate"],
    "chaindiff.commands.run": ["run"],
    "chaindiff.data": ["open_data"],
    "chaindiff.data.items": ["Items"],
    "chaindiff.chain.diffusion": ["Diffusion"],
    "chaindiff.edm.denoiser": ["Denoiser", "Prediction"],
    "chaindiff.edm.levels": ["Path", "karras_sigmas", "staggered", "together"],
    "chaindiff.edm.random": ["Draws"],
    "chaindiff.edm.solvers": [
        "Churn", "Row", "Step", "Update", "evaluations", "integrate", "invert", "solve", "updates",
    ],
    "chaindiff.evaluation.tensors": ["measure"],
    "chaindiff.guidance": ["Wrapper", "classifier_free", "guided", "interval", "known", "thresholded"],
    "chaindiff.networks.interface": ["Condition", "Interface", "Network"],
    "chaindiff.chain.request": ["Preview"],
    "chaindiff.chain.saving": ["load_stage", "save_stage"],
    "chaindiff.io.errors": ["UserError"],
    "chaindiff.recipe.load": ["load"],
    "chaindiff.specs.network": ["JointNetwork", "Prior", "Transformer", "UNet"],
    "chaindiff.specs.sampling": ["LinkSampling"],
    "chaindiff.specs.stage": ["Generated"],
    "chaindiff.chain.stage": ["Cost", "Stage"],
    "chaindiff.training.objects": ["train"],
    "chaindiff.chain.variable": ["Variable"],
}  # fmt: skip
_NAMES = {name: (home, name) for home, names in _HOMES.items() for name in names}
_NAMES |= {"Link": ("chaindiff.specs.link", "LinkSpec"), "Sampler": ("chaindiff.specs.sampling", "SamplerSpec")}

__all__ = sorted([*_NAMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("chain-diffusion-models")
    if name not in _NAMES:
        raise AttributeError(f"module 'chaindiff' has no attribute '{name}'")
    home, there = _NAMES[name]
    return getattr(import_module(home), there)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
