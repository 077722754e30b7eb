"""Measuring rows: features of every row and of the data by every judge, cached on disk, and figures from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from chaindiff.data.items import Data
from chaindiff.edm.random import generator
from chaindiff.evaluation.captions import TextTower, captions
from chaindiff.evaluation.extractor import Extractor
from chaindiff.evaluation.features import encoder_family, extractor
from chaindiff.evaluation.memorisation import Memorisation, memorisation
from chaindiff.evaluation.metrics import distances
from chaindiff.evaluation.oracle import BATCH, DataValues, oracle_rows, split_of
from chaindiff.evaluation.patches import sliced_wasserstein_laplacian
from chaindiff.evaluation.provenance import Figure
from chaindiff.evaluation.rows import CHUNK, Row
from chaindiff.evaluation.vectors import alignment
from chaindiff.io.digest import digest, fingerprint
from chaindiff.io.errors import UserError
from chaindiff.io.files import read_whole, write_whole
from chaindiff.io.progress import shown
from chaindiff.io.shards import Shards, Stored
from chaindiff.recipe.assembly import Assembly
from chaindiff.show.images import to_uint8

PATCHES = "patches"  # stands for a judge where a metric needs none
MOST = 2048  # images of each set whose patches are compared in memory
SHARD = 4 * CHUNK  # features per file: the most that an interruption can lose
EACH = {"patches": 16, "directions": 256}  # an eighth of the published counts: small images have few patches


def families(assembly: Assembly) -> set[str | None]:
    """Families of the encoders within a chain: a judge of one of these flatters the chain."""
    return {
        encoder_family(assembly.encoders[name].build().features_identity)
        for name, spec in assembly.recipe.variables.items()
        if spec.reads
    }


@dataclass(frozen=True)
class DataImages:
    """The data's own images, as the variable `of` has them."""

    assembly: Assembly
    data: Data
    of: str
    split: str | None
    folder: Path  # where values are cached

    @cached_property
    def key(self) -> str:
        return digest([self.assembly.variables[self.of].identity, self.data.digest, len(self.data)])

    @property
    def count(self) -> int:
        return len(self.data)

    def images(self, rows: Sequence[int]) -> Tensor:
        """uint8 [n, 3, h, w]."""
        parts = (rows[first : first + BATCH] for first in range(0, len(rows), BATCH))
        return torch.cat([to_uint8(self.values.of(self.of, part)) for part in parts])

    @cached_property
    def values(self) -> DataValues:
        return DataValues(self.assembly, self.data, self.folder / "data")


@dataclass
class Study:
    """Rows that are compared: the same image variable, data, judges. Everything measured is stored under `folder`."""

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

    def features(self, images: Row | DataImages, judge: str, title: str = "") -> Stored:
        """Features of a row's or the data's images, computed once and cached on disk."""
        items, maker = f"{images.of} {images.key}", self.judge(judge)
        return self._kept(maker, items, images.count, images.images, f"{judge} {title}".strip())

    def texts(self, judge: str, texts: Sequence[str]) -> Stored:
        """Texts by the tower that belongs to a judge."""
        items, read = f"texts {digest(texts)}", lambda rows: [texts[row] for row in rows]
        return self._kept(TextTower(judge), items, len(texts), read, f"{judge} captions")

    def _kept(
        self, maker: Extractor | TextTower, items: str, count: int, read: Callable[[range], Any], title: str
    ) -> Stored:
        key, name = fingerprint([maker.identity, items]), re.sub(r"[^\w.-]+", "_", Path(maker.name).name)
        store = Shards(self.folder / "features" / f"{name}-{key[:16]}", key, count, SHARD)

        def make(rows: range) -> dict[str, Tensor]:
            features = maker(read(rows)).cpu()
            if not features.isfinite().all():
                raise UserError(f"the features of '{maker.name}' are not finite")
            return {"features": features}

        shown(title, store.fill(make, BATCH))
        return store["features"]

    def data(self, row: Row, split: str | None) -> DataImages:
        return DataImages(row.assembly, split_of(row.assembly, split), row.of, split, self.folder)

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
        """Fréchet distance, KID, precision, recall, density, coverage of a row by every judge; and by those that read
        texts, how far samples agree with the captions of the images that they were made for."""
        against = reference or self.data(row, self.reference)
        found, kept = list[Figure](), TypeAdapter(list[Figure])
        for judge in [*self.judges, PATCHES]:
            encoder = "" if judge == PATCHES else self.judge(judge).identity
            texts = self._captions(row, judge)  # a data set's digest does not cover them
            depends = [row.key, row.count, against.key, judge, encoder, *([digest(texts)] if texts else [])]
            path = self.folder / "figures" / f"{digest(depends)}.json"
            try:
                measured = kept.validate_json(read_whole(path))
            except (OSError, ValidationError):
                values = self._patches(row, against) if judge == PATCHES else self._distances(row, against, judge)
                measured = self._told(values, row, against, judge)
                measured += self._alignment(row, judge, texts) if texts else []
                write_whole(path, kept.dump_json(measured))
            found += measured
        return found

    def _distances(self, row: Row, against: DataImages, judge: str) -> Mapping[str, Any]:
        return distances(self.features(against, judge, "data"), self.features(row, judge, row.label), judge, row.seed)

    def _captions(self, row: Row, judge: str) -> list[str] | None:
        """Of the images that samples are made for: where values come from the data, and the judge reads texts."""
        if not judge.startswith("open_clip") or not row.from_data:
            return None
        return captions(row.assembly, self.data(row, None).data)

    def _alignment(self, row: Row, judge: str, texts: list[str]) -> list[Figure]:
        """Mean cosine of each sample and the caption of the image that it was made for, and that of those images."""
        source = self.data(row, None)
        images = oracle_rows(source.count, row.count, row.seed)
        told = torch.tensor([bool(text) for text in texts])[images].nonzero()[:, 0]  # samples with a caption
        if not len(told):
            return []
        embedded = self.texts(judge, texts)
        fake, real, images = self.features(row, judge, row.label), self.features(source, judge, "data"), images[told]
        values = {
            "alignment": alignment(fake, embedded, torch.stack([told, images], 1)),
            "alignment_data": alignment(real, embedded, torch.stack([images, images], 1)),
        }
        return self._told(values, row, source, judge)

    def _patches(self, row: Row, against: DataImages) -> Mapping[str, Any]:
        """Sliced Wasserstein distance of patches, mean over the levels of the pyramid; it needs no network."""
        count = min(row.count, against.count, MOST)
        real, fake = (x.images(_chosen(x.count, count, row.seed)) for x in (against, row))
        return {"swd": fmean(sliced_wasserstein_laplacian(real, fake, seed=row.seed, **EACH).values())}

    def _told(self, values: Mapping[str, Any], row: Row, against: DataImages, judge: str) -> list[Figure]:
        """Values with their provenance."""
        split = against.split or row.assembly.recipe.data.split or "all"
        about: dict[str, Any] = {"reference": against.data.description, "split": split, "encoder": judge}
        if judge != PATCHES:
            network = self.judge(judge)
            about["encoder_identity"] = network.identity
            about["resize"] = f"PIL bicubic, antialiased, to {network.size}"
            about["in_chain"] = network.family in families(row.assembly)
        return [Figure.of(name, value, count=row.count, seed=row.seed, **about) for name, value in values.items()]

    def memorisation(self, row: Row, judge: str) -> Memorisation | None:
        """Distances to the nearest training image, of samples and of held-out images; None without a held-out split."""
        held = self.held(row)
        if held is None:
            return None
        train = self.features(self.data(row, None), judge, "data")
        return memorisation(self.features(row, judge, row.label), train, self.features(held, judge, "held out"))

    def pairs(self, row: Row, found: Memorisation, most: int = 8) -> Tensor:
        """The samples that lie closest to a training image, each followed by that image, in [-1, 1]."""
        samples, nearest, _ = zip(*found.closest[:most], strict=True)
        fake, real = row.images(samples).float() / 127.5 - 1, self.data(row, None).values.of(row.of, nearest)
        return torch.stack([fake, real], 1).flatten(0, 1)


def _chosen(total: int, count: int, seed: int) -> list[int]:
    """Numbers of `count` rows of `total`, in rising order."""
    if count == total:
        return list(range(total))
    return sorted(generator(seed, "images").choice(total, count, replace=False).tolist())
