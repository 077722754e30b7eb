"""Measuring rows: features of every row and of the data by every judge, kept on disk, and the figures made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chaindiff.assemble import Assembly
from chaindiff.data import ImageData
from chaindiff.evaluation.features import Extractor, encoder_family, extractor
from chaindiff.evaluation.memorisation import Memorisation, memorisation
from chaindiff.evaluation.metrics import (
    Interval,
    Moments,
    cmmd,
    density_coverage,
    frechet_distance,
    kid,
    precision_recall,
    sliced_wasserstein_laplacian,
)
from chaindiff.evaluation.oracle import BATCH, DataValues, split_of
from chaindiff.evaluation.patches import MOST, chosen
from chaindiff.evaluation.provenance import Figure
from chaindiff.evaluation.rows import CHUNK, Row
from chaindiff.evaluation.store import FeatureStore
from chaindiff.pictures import to_uint8
from chaindiff.progress import Bar
from chaindiff.specs.errors import UserError
from chaindiff.specs.files import write_whole
from chaindiff.variables import digest

PATCHES = "patches"  # stands for a judge where a metric needs none
EACH = {"patches": 16, "directions": 256}  # an eighth of the published counts: small images have few patches


def families(assembly: Assembly) -> set[str | None]:
    """Families of the encoders within a chain: a judge of one of these flatters the chain."""
    return {encoder_family(assembly.encoder(name).features_identity) for name in assembly.encoded}


@dataclass(frozen=True)
class DataImages:
    """The data's own images, as the variable `of` has them."""

    assembly: Assembly
    data: ImageData
    of: str
    split: str | None

    @cached_property
    def key(self) -> str:
        return digest([self.assembly.variables[self.of].identity, self.data.digest, len(self.data)])

    @property
    def count(self) -> int:
        return len(self.data)

    def chunks(self, name: str) -> Iterator[Tensor]:
        values = DataValues(self.assembly, self.data, Path())
        for first in range(0, self.count, BATCH):
            yield to_uint8(values.of(name, range(first, min(first + BATCH, self.count))))


@dataclass
class Study:
    """Rows that are compared: the same image variable, data, judges. Everything measured lies under `folder`."""

    folder: Path
    judges: Sequence[str]
    reference: str | None = None
    held_out: str | None = "test"
    _extractors: dict[str, Extractor] = field(default_factory=dict, repr=False)

    # ------------------------------------------------------------ features

    def judge(self, name: str) -> Extractor:
        if name not in self._extractors:
            self._extractors[name] = extractor(name)
        return self._extractors[name]

    def features(self, images: Row | DataImages, judge: str, title: str = "") -> Float[Tensor, "count width"]:
        """Features of a row's or the data's images, computed once and mapped into memory."""
        store = FeatureStore(self.folder / "features", self.judge(judge), f"{images.of} {images.key}")
        if len(store) < images.count:
            with Bar(f"{judge} {title}".strip(), images.count, len(store)) as bar:
                for done in store.fill(images.chunks(images.of)):
                    bar.update(done)
        return store.features[: images.count]

    def data(self, row: Row, split: str | None) -> DataImages:
        return DataImages(row.assembly, split_of(row.assembly, split), row.of, split)

    def held(self, row: Row) -> DataImages | None:
        """The images that training never saw; None if the data has no such split."""
        if self.held_out is None:
            return None
        try:
            return self.data(row, self.held_out)
        except UserError:
            return None

    # ------------------------------------------------------------ figures

    def figures(self, row: Row, reference: DataImages | None = None) -> list[Figure]:
        """Fréchet distance, KID, precision, recall, density, coverage of a row by every judge."""
        against = reference or self.data(row, self.reference)
        found: list[Figure] = []
        for judge in [*self.judges, PATCHES]:
            encoder = "" if judge == PATCHES else self.judge(judge).identity
            path = self.folder / "figures" / f"{digest([row.key, row.count, against.key, judge, encoder])}.json"
            if not path.exists():
                measured = self._patches(row, against) if judge == PATCHES else self._measure(row, against, judge)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps([figure.model_dump() for figure in measured]).encode())
            found += [Figure(**plain) for plain in json.loads(path.read_text())]
        return found

    def _measure(self, row: Row, against: DataImages, judge: str) -> list[Figure]:
        real, fake = self.features(against, judge, "data"), self.features(row, judge, row.label)
        network = self.judge(judge)
        about = {
            **self._about(row, against),
            "encoder": judge,
            "encoder_identity": network.identity,
            "resize": f"PIL bicubic, antialiased, to {network.size}",
            "in_chain": network.family in families(row.assembly),
        }
        values: dict[str, float | Interval] = {"kid": kid(real, fake, seed=row.seed)}
        if min(row.count, against.count) > network.width:  # else the covariance is singular, and the distance refused
            values["fd"] = frechet_distance(*(Moments.over(f.split(CHUNK)) for f in (real, fake)))
        if judge.startswith("open_clip"):
            values["cmmd"] = cmmd(real, fake)
        values["precision"], values["recall"] = precision_recall(real, fake)
        values["density"], values["coverage"] = density_coverage(real, fake)
        return [Figure.of(metric, value, **about) for metric, value in values.items()]

    def _patches(self, row: Row, against: DataImages) -> list[Figure]:
        """Sliced Wasserstein distance of patches, mean over the levels of the pyramid; it needs no network."""
        count = min(row.count, against.count, MOST)
        real, fake = (_only(x.chunks(row.of), chosen(x.count, count, row.seed)) for x in (against, row))
        levels = sliced_wasserstein_laplacian(real, fake, seed=row.seed, **EACH)
        return [Figure(metric="swd", value=fmean(levels.values()), encoder=PATCHES, **self._about(row, against))]

    def _about(self, row: Row, against: DataImages) -> dict[str, Any]:
        split = against.split or row.assembly.recipe.data.split or "all"
        return {"reference": against.data.description, "split": split, "count": row.count, "seed": row.seed}

    def memorisation(self, row: Row, judge: str) -> Memorisation | None:
        """Distances to the nearest training image, of samples and of held-out images; None without a held-out split."""
        held = self.held(row)
        if held is None:
            return None
        train = self.features(self.data(row, None), judge, "data")
        return memorisation(self.features(row, judge, row.label), train, self.features(held, judge, "held out"))

    def pairs(self, row: Row, found: Memorisation, most: int = 8) -> Tensor:
        """The samples that lie closest to a training image, each followed by that image, in [-1, 1]."""
        train = DataValues(row.assembly, self.data(row, None).data, Path())
        rows = []
        for sample, nearest, _ in found.closest[:most]:
            image = _only(row.chunks(row.of), np.array([sample]))[0]
            rows += [image.float() / 127.5 - 1, train.of(row.of, [nearest])[0]]
        return torch.stack(rows)


def _only(chunks: Iterable[Tensor], rows: np.ndarray) -> Tensor:
    """These rows, in rising order, of a set that is read a chunk at a time."""
    parts, first = [], 0
    for chunk in chunks:
        here = rows[(rows >= first) & (rows < first + len(chunk))] - first
        parts.append(chunk[torch.from_numpy(here)])
        first += len(chunk)
    return torch.cat(parts)
