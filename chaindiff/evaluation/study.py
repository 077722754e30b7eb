"""Measuring rows: features of every row and of the data by every judge, kept on disk, and the figures made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chaindiff.chain.variable import digest
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
from chaindiff.evaluation.rows import Row
from chaindiff.evaluation.store import AsTheyAre, Embedder, FeatureStore
from chaindiff.evaluation.stored import Stored
from chaindiff.evaluation.vectors import alignment
from chaindiff.io.errors import UserError
from chaindiff.io.files import write_whole
from chaindiff.io.progress import Bar
from chaindiff.recipe.assembly import Assembly
from chaindiff.show.images import to_uint8

PATCHES = "patches"  # stands for a judge where a metric needs none
MOST = 2048  # images of each set, of whose patches pyramids are compared in memory
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

    def features(self, images: Row | DataImages, judge: str, title: str = "") -> Stored:
        """Features of a row's or the data's images, computed once and kept on disk."""
        chunks, items = images.chunks(images.of), f"{images.of} {images.key}"
        return self._stored(self.judge(judge), items, chunks, images.count, f"{judge} {title}".strip())

    def vectors(self, row: Row, name: str) -> Stored:
        """A row's samples of a vector, in one file."""
        itself = AsTheyAre(name, row.assembly.variables[name].shape[0])
        return self._stored(itself, f"{name} {row.key}", row.chunks(name), row.count, name)

    def texts(self, judge: str, texts: Sequence[str]) -> Stored:
        """Texts by the tower that belongs to a judge."""
        chunks = (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))
        return self._stored(TextTower(judge), f"texts {digest(texts)}", chunks, len(texts), f"{judge} captions")

    def _stored(self, maker: Embedder, items: str, chunks: Iterable[Any], count: int, title: str) -> Stored:
        store = FeatureStore(self.folder / "features", maker, items)
        if len(store) < count:
            with Bar(title, count, len(store)) as bar:
                for done in store.fill(chunks):
                    bar.update(done)
        return store.first(count)

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
        """Fréchet distance, KID, precision, recall, density, coverage of a row by every judge; and by those that read
        texts, how far samples agree with the captions of the images that they were made for."""
        against = reference or self.data(row, self.reference)
        found: list[Figure] = []
        for judge in [*self.judges, PATCHES]:
            encoder = "" if judge == PATCHES else self.judge(judge).identity
            texts = self._captions(row, judge)  # a data set's digest does not cover them
            depends = [row.key, row.count, against.key, judge, encoder, *([digest(texts)] if texts else [])]
            path = self.folder / "figures" / f"{digest(depends)}.json"
            if not path.exists():
                measured = self._patches(row, against) if judge == PATCHES else self._measure(row, against, judge)
                measured += self._alignment(row, judge, texts) if texts else []
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps([figure.model_dump() for figure in measured]).encode())
            found += [Figure(**plain) for plain in json.loads(path.read_text())]
        return found

    def _measure(self, row: Row, against: DataImages, judge: str) -> list[Figure]:
        real, fake = self.features(against, judge, "data"), self.features(row, judge, row.label)
        return self._told(distances(real, fake, judge, row.seed), row, against, judge)

    def _captions(self, row: Row, judge: str) -> list[str] | None:
        """Of the images that samples are made for: where values come from the data, and the judge reads texts."""
        if not judge.startswith("open_clip") or not row.from_data:
            return None
        return captions(row.assembly, self.data(row, row.split).data)

    def _alignment(self, row: Row, judge: str, texts: list[str]) -> list[Figure]:
        """Mean cosine of each sample and the caption of the image that it was made for, and that of those images."""
        source = self.data(row, row.split)
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

    def _patches(self, row: Row, against: DataImages) -> list[Figure]:
        """Sliced Wasserstein distance of patches, mean over the levels of the pyramid; it needs no network."""
        count = min(row.count, against.count, MOST)
        real, fake = (_only(x.chunks(row.of), _chosen(x.count, count, row.seed)) for x in (against, row))
        levels = sliced_wasserstein_laplacian(real, fake, seed=row.seed, **EACH)
        return self._told({"swd": fmean(levels.values())}, row, against, PATCHES)

    def _told(self, values: Mapping[str, Any], row: Row, against: DataImages, judge: str) -> list[Figure]:
        """Values with all that they depend on."""
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
        train = DataValues(row.assembly, self.data(row, None).data, Path())
        rows = []
        for sample, nearest, _ in found.closest[:most]:
            image = _only(row.chunks(row.of), np.array([sample]))[0]
            rows += [image.float() / 127.5 - 1, train.of(row.of, [nearest])[0]]
        return torch.stack(rows)


def _chosen(total: int, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` rows of `total`, in rising order."""
    if count == total:
        return np.arange(total)
    return np.sort(generator(seed, "images").choice(total, count, replace=False))


def _only(chunks: Iterable[Tensor], rows: np.ndarray) -> Tensor:
    """These rows, in rising order, of a set that is read a chunk at a time."""
    parts, first = [], 0
    for chunk in chunks:
        here = rows[(rows >= first) & (rows < first + len(chunk))] - first
        parts.append(chunk[torch.from_numpy(here)])
        first += len(chunk)
    return torch.cat(parts)
