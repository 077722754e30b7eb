"""The smoke version of a recipe: every part of it once, at tiny sizes, on the embedded images."""

from __future__ import annotations

from typing import Any

from chaindiff.specs.code import CodeSpec, is_code
from chaindiff.specs.load import Loaded
from chaindiff.specs.network import JointNetworkSpec, Network, UNetSpec
from chaindiff.specs.recipe import DataSpec, FileSpec, OpenClipSpec, PcaSpec

CLIP_WIDTH, MAP_WIDTH = 128, 320  # of the embedded image-text model and its last features
CLASSES = 7  # groups of the embedded images
TRAIN = {"images": 24, "batch": 8, "accumulate": 1, "precision": "float32", "execution": "eager", "log_every": 1}


def smoke_version(loaded: Loaded) -> Loaded:
    """A recipe of the same shape with tiny networks, some training steps and four samples; named NAME_smoke.

    Code that the recipe names is left as it is.
    """
    recipe = loaded.recipe
    ours_data = isinstance(recipe.data, DataSpec)
    variables: dict[str, Any] = {}
    root = next((n for n, v in recipe.variables.items() if v.kind == "image" and v.encoder is None), None)
    for name, spec in recipe.variables.items():
        if isinstance(spec.encoder, OpenClipSpec | FileSpec):
            kept = spec.kind == "label" or isinstance(spec.encoder.reduce, PcaSpec)
            encoder: dict[str, Any] = {"model": "clip_emoji", "pretrained": None}
            if isinstance(spec.encoder, FileSpec):  # whose vectors are of other images
                encoder |= {"kind": "open_clip", "of": root, **spec.encoder.model_dump(include={"reduce", "scaling"})}
            width = spec.shape[0] if kept else MAP_WIDTH if spec.kind == "map" else CLIP_WIDTH
            variables[name] = {"shape": [width, *spec.shape[1:]], "encoder": encoder}
        elif spec.kind == "label" and spec.encoder is None and ours_data:
            variables[name] = {"shape": [CLASSES], "of": "group"}
    stages: dict[str, Any] = {}
    for name, stage in recipe.stages.items():
        stages[name] = {
            "network": stage.network and _network(stage.network),
            "augment": {"variants": min(stage.augment.variants, 1)},
            "train": dict(TRAIN),
            "sample": {} if is_code(stage.kind) else {"steps": 3},
            "weights": None,
            "init": None,
        }
    return loaded.override(
        {
            "name": f"{recipe.name}_smoke",
            "data": {"path": "emoji64", "split": "test", "where": {"style": "google"}} if ours_data else {},
            "variables": variables,
            "stages": stages,
            "sample": {"count": 4, "batch": 4},
        }
    )


def _network(spec: Network) -> dict[str, Any]:
    """A tiny network of the same kind."""
    if isinstance(spec, CodeSpec):
        return {}
    if isinstance(spec, JointNetworkSpec):
        return {"image": _network(spec.image), "vector": _network(spec.vector), "seen": 8}
    if isinstance(spec, UNetSpec):
        return {"channels": 64 if spec.arch == "adm" else 16, "mult": [1] * len(spec.mult), "blocks": 1}
    return {"width": 32, "depth": 1, "heads": 2}  # of priors and transformers
