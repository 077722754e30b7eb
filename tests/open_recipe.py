"""A recipe whose network, encoder, data or stage is code of its own, and commands on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import rich
from recipe_text import write

from chaindiff import cli
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe

# A network of one's own; its `forward` is the signature that all networks have.
NETWORK = """
class MLP(torch.nn.Module):
    def __init__(self, interface, width, depth=1):
        super().__init__()
        (self.size,) = interface.variables["colour"]
        if width < 0:
            raise ValueError("a negative width")
        self.layers = torch.nn.Sequential(torch.nn.Linear(self.size + 1, width), torch.nn.Linear(width, self.size))

    def forward(self, x, noise, condition):
        ((name, value),) = x.items()
        return {name: self.layers(torch.cat([value, noise[name][:, None]], dim=1))}
"""
CODE = (
    """
from pathlib import Path

import torch

import chaindiff as cd
from chaindiff.data import ImageData

Path("imported").touch()
WIDTH = 3
"""
    + NETWORK
    + """
class Colour:
    def __init__(self, times=1.0, shout=False):
        self.times = times
        if shout:
            raise SystemExit(3)

    def __call__(self, image):
        return self.times * image.mean(dim=(2, 3))


class Flat(Colour):
    def __call__(self, image):
        return image.flatten(1)


class Bright:
    def __call__(self, image):
        return (image.mean(dim=(1, 2, 3)) > 0).long()


class Squares(ImageData):
    def __init__(self, count, split=None):
        self.names = [f"{split}{number}" for number in range(count)]
        self.digest = " ".join(self.names)

    def images(self, rows, size, channels=3):
        return torch.stack([torch.full((3, size, size), 10 * int(row), dtype=torch.uint8) for row in rows])


class Own:
    def __init__(self, generates, given, name, steps=3):
        self.told = (generates, given, name, steps)
        self.name, self.given, self.conditionals = name, given, frozenset()
        self.generates = {variable.name: variable for variable in generates}

    def sample(self, given, draws):
        yield {name: draws.normal("sample", shape=v.shape) for name, v in self.generates.items()}

    def loss(self, batch, draws):
        raise NotImplementedError

    def cost(self, moving):
        return cd.Cost(how="normal numbers")


def broken(**settings):
    return 3
"""
)
RECIPE = """\
name: open
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 8, 8]}
  colour:
    kind: vector
    shape: [3]
    encoder: {kind: "my_code:Colour", of: image}
stages:
  colour:
    network:
      kind: my_code:MLP
      settings: {width: 16}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
  image:
    given: [colour]
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
sample: {count: 4}
"""
OWN_STAGE = RECIPE.replace(
    """    network:
      kind: my_code:MLP
      settings: {width: 16}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
""",
    """    kind: my_code:Own
    settings: {steps: 5}
    train: {images: 16, batch: 8}
""",
)
PLAIN = """\
name: plain
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 8, 8]}
stages:
  image:
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}
    train: {images: 16, batch: 8, execution: eager}
"""
HINT = "add --allow-code if you trust this recipe and the code that it names (in Python, allow_code=True)"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with the recipe, and beside it one that is searched for modules."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write(tmp_path / "lib", CODE, "my_code.py")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    write(tmp_path / "work", RECIPE)
    yield tmp_path / "work"
    sys.modules.pop("my_code", None)


@pytest.fixture
def chaindiff(capsys):
    """Runs the command line: (status, stdout, stderr). The console is left as it was found."""
    console, before = rich.get_console(), dict(rich.get_console().__dict__)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main(arguments)
        finally:
            console.__dict__ = dict(before)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return call


def assembly(*changes: str, text: str | None = None) -> Assembly:
    if text is not None:
        write(Path(), text)
    return Assembly(load_recipe("r.yaml", changes=changes, allow_code=True))


def refused(*changes: str, text: str | None = None, of=lambda a: a.stages["colour"].build()) -> str:
    with pytest.raises(UserError) as caught:
        of(assembly(*changes, text=text))
    return str(caught.value)
