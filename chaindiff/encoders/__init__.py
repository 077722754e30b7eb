"""Encoders: deterministic maps from one variable of a chain to another, built from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from chaindiff.encoders.base import Encoder, OwnEncoder
from chaindiff.encoders.clip import OpenClipImage, OpenClipText
from chaindiff.encoders.embedding import Embedding
from chaindiff.encoders.file import FileVectors
from chaindiff.encoders.resize import Resize
from chaindiff.encoders.statistics import Statistics
from chaindiff.io.code import create
from chaindiff.io.errors import UserError
from chaindiff.specs.code import CodeEncoderSpec
from chaindiff.specs.recipe import FileSpec, ResizeSpec, VariableSpec

__all__ = [
    "Embedding", "Encoder", "FileVectors", "OpenClipImage", "OpenClipText", "Resize", "Statistics", "build_decoder",
    "build_encoder",
]  # fmt: skip


def build_encoder(name: str, specs: Mapping[str, VariableSpec], fitted: Path | None = None) -> Encoder:
    """The encoder that computes the variable `name`, with its statistics from the file `fitted` if it needs any.

    Without a file, an encoder that needs statistics is not `fitted`: its features can be computed, its values cannot.
    Raises UserError for a missing or mismatched file, for missing weights, and for shapes that do not fit.
    """
    spec = specs[name]
    encoder = spec.encoder
    if encoder is None:
        raise UserError(f"variable '{name}' has no encoder", f"variables.{name}")
    if isinstance(encoder, CodeEncoderSpec):
        return OwnEncoder(name, encoder, spec, create(encoder, where=f"variables.{name}.encoder", made=Callable))
    if isinstance(encoder, ResizeSpec):
        return Resize(name, encoder, specs[encoder.of].shape, spec.shape)
    if isinstance(encoder, FileSpec):
        built = FileVectors(name, encoder, spec.shape, spec.sigma_data, spec.kind)
    else:
        source = specs[encoder.of]
        tower = OpenClipText if source.kind == "text" else OpenClipImage
        built = tower(name, encoder, source.shape, spec.shape, spec.sigma_data, spec.kind)
    if fitted is not None and not built.fitted:
        built.statistics = Statistics.load(fitted, built)
    return built


def build_decoder(name: str, specs: Mapping[str, VariableSpec]) -> Encoder:
    """The map that computes the variable `name` in the generative direction."""
    decoder = specs[name].decoder
    if decoder is None:
        raise UserError(f"variable '{name}' has no decoder", f"variables.{name}")
    if isinstance(decoder, CodeEncoderSpec):
        return OwnEncoder(name, decoder, specs[name], create(decoder, where=f"variables.{name}.decoder", made=Callable))
    return Resize(name, decoder, specs[decoder.of].shape, specs[name].shape)
