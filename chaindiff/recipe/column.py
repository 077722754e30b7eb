"""What a recipe takes from its data: the field that holds a variable, and the classes of a label."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chaindiff.encoders import Embedding
from chaindiff.io.errors import UserError

if TYPE_CHECKING:
    from chaindiff.recipe.assembly import Assembly


class Column:
    """A variable of a recipe as a column of its data; a label may be the cluster that an encoder finds."""

    def __init__(self, assembly: Assembly, name: str):
        self.assembly, self.name = assembly, name
        self.variable, self.spec = assembly.variables[name], assembly.recipe.variables[name]

    @property
    def field(self) -> str:
        """The field of the metadata."""
        return self.spec.of or self.name

    @property
    def classes(self) -> list[str]:
        """Names of a label's classes, numbers for clusters. Raises UserError if the data has another number of them."""
        if self.spec.encoder is not None:
            return [str(number) for number in range(*self.variable.shape)]
        (size,) = self.variable.shape
        names = self.assembly.data.categories(self.field, size)[0]
        if len(names) != size:
            raise UserError(
                f"label '{self.name}' has shape [{size}], but the field '{self.field}' has {len(names)} values",
                self.assembly.loaded.where(f"variables.{self.name}.shape"),
            )
        return names

    @property
    def frequencies(self) -> list[float]:
        """The weights of a label's classes where it is drawn: those of the data, or equal ones."""
        (size,) = self.variable.shape
        return self.counts.tolist() if self.spec.source == "empirical" else [1.0] * size

    @property
    def counts(self) -> Tensor:
        """Rows of the training data in each class of a label, [classes]; of clusters, as they were fitted."""
        if self.spec.encoder is not None:
            encoder = self.assembly.encoders[self.name].build()
            assert isinstance(encoder, Embedding) and encoder.statistics is not None
            assert encoder.statistics.counts is not None  # a label has clusters
            return encoder.statistics.counts
        size = len(self.classes)
        return torch.bincount(torch.tensor(self.assembly.data.categories(self.field, size)[1]), minlength=size)
