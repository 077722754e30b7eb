"""The wheel: it holds the package, its data and nothing else; installed elsewhere, it runs from an empty directory."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import chaindiff

ROOT = Path(__file__).parents[1]
PLACES = {
    "chaindiff": "chaindiff",
    "recipes": "chaindiff/recipes",
    "stages": "chaindiff/stages",
}  # in the tree -> there


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_recipes_and_cards_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = {
        f"{there}/{path.relative_to(ROOT / here).as_posix()}"
        for here, there in PLACES.items()
        for path in (ROOT / here).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    known = {"py.typed", "show/page.html.jinja", "assets/emoji64.zip", "assets/clip_emoji/open_clip_model.safetensors"}
    known |= {"recipes/vcdm_emoji.yaml", "stages/clip_prior.yaml", "specs/recipe.py"}
    assert {f"chaindiff/{name}" for name in known} <= names
    assert any(name.startswith("chaindiff/assets/weights/image16-") for name in names)


def test_what_the_wheel_says_of_itself(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        texts = {name.split("/", 1)[1]: file.read(name).decode() for name in file.namelist() if ".dist-info/" in name}
    assert "chaindiff = chaindiff.cli:main" in texts["entry_points.txt"].splitlines()
    lines = texts["METADATA"].splitlines()
    assert {"Name: chain-diffusion-models", f"Version: {chaindiff.__version__}", "Requires-Python: >=3.11"} <= set(
        lines
    )
    assert "licenses/LICENSE" in texts
    assert wheel.stat().st_size < 100e6, "what package indexes accept"


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment: the wheel, and what it depends on lent by this environment."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched last, and .pth files there are not read: this project itself is not lent.
    (packages / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder / "bin"


def command(program: Path, *arguments: str, cwd: Path) -> str:
    """What a program prints, started in `cwd`; it must end well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run([program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_an_installed_wheel_runs_the_main_job_from_an_empty_directory(elsewhere: Path, tmp_path: Path) -> None:
    package = Path(
        command(elsewhere / "python", "-c", "import chaindiff; print(chaindiff.__path__[0])", cwd=tmp_path).strip()
    )
    assert package.is_relative_to(elsewhere.parent)
    assert list(tmp_path.iterdir()) == []

    said = command(elsewhere / "chaindiff", "list", cwd=tmp_path)
    names = {line.split()[0] for line in said.splitlines() if line.startswith("  ")}
    assert names >= {path.stem for folder in ("recipes", "stages") for path in (ROOT / folder).glob("*.yaml")}
    assert list(tmp_path.iterdir()) == []

    said = command(elsewhere / "chaindiff", "run", "vcdm_emoji", cwd=tmp_path)
    for stage in ("clip", "image16", "image"):
        assert f"stage {stage}: weights {package}/assets/weights/{stage}-" in said
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    run = tmp_path / "runs/vcdm_emoji"
    for name, size in (("image", 32), ("image16", 16)):
        pictures = sorted((run / "samples" / name).glob("0*.png"))
        assert [path.name for path in pictures] == [f"{number:06d}.png" for number in range(64)]
        with Image.open(pictures[63]) as image:
            assert image.size == (size, size)
    for name in ("samples/image/grid.png", "report.html", "chain.svg", "recipe.lock.yaml"):
        assert (run / name).stat().st_size > 0
    assert not (run / "stages").exists(), "nothing was trained"
    assert "nothing to do" in command(elsewhere / "chaindiff", "run", "vcdm_emoji", cwd=tmp_path)
