"""Chains of diffusion generative models: declare, train, sample and measure them.

The public names are loaded when they are first used, so that `chaindiff --help` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chaindiff.chain import Chain, load
    from chaindiff.data.items import Items
    from chaindiff.edm.denoiser import Denoiser
    from chaindiff.specs.errors import UserError
    from chaindiff.stage import Stage
    from chaindiff.variables import Variable

    __version__: str

__all__ = ["Chain", "Denoiser", "Items", "Stage", "UserError", "Variable", "__version__", "load"]

_HOMES = {
    "Chain": "chaindiff.chain",
    "Denoiser": "chaindiff.edm.denoiser",
    "Items": "chaindiff.data.items",
    "Stage": "chaindiff.stage",
    "UserError": "chaindiff.specs.errors",
    "Variable": "chaindiff.variables",
    "load": "chaindiff.chain",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("chain-diffusion-models")
    if name not in _HOMES:
        raise AttributeError(f"module 'chaindiff' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
