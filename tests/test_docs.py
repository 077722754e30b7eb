"""The documentation runs: every block of every page is executed, written to its file, or says why it cannot run here.

Python and shell blocks of a page run in order, in one directory that was empty. A text block after one of them shows
lines of its output. A YAML block with a title is a file of that name. A shell block titled "a mistake" is refused.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import rich
import yaml

import chaindiff as cd
from chaindiff import cli
from chaindiff.edm import solvers
from tools import reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Records of what was or is to be done teach nothing that could be run.
RECORDS = {"gpu_todo.md", "performance.md", "results.md", "results-details.md"}
PAGES = sorted({path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - RECORDS)
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"\n]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIP, MISTAKE = "not run in the tests: ", "a mistake"
# Blocks of each page that say why they are not run; a new one must be counted here.
NOT_RUN = {
    "architecture.md": 2,
    "first-chain.md": 1,
    "joint-or-chain.md": 1,
    "mathematics.md": 1,
    "how-to/edm-weights.md": 2,
    "how-to/joint.md": 1,
    "how-to/several-gpus.md": 3,
}


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text()
    found = [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]
    assert 2 * len(found) == text.count("\n```"), f"{page} has a fence that is not understood"
    return found


def shell(script: str) -> tuple[int, str]:
    """Status and output of a block. Plain calls of chaindiff run in this process, which has torch already."""
    lines = script.replace("\\\n", " ").splitlines()
    if not all(line.startswith("chaindiff ") and not set(line) & set("|&;<>$*`") for line in lines):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        return done.returncode, done.stdout + done.stderr
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for line in lines:
            with pytest.raises(SystemExit) as ended:
                cli.main(shlex.split(line)[1:])
            status = max(status, int(ended.value.code or 0))
    return status, said.getvalue()


def python(code: str, where: str, names: dict[str, Any]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, where, "exec"), names)
    return said.getvalue()


@pytest.fixture
def quiet_console():
    """Commands may silence or redirect the console of this process."""
    console, before = rich.get_console(), dict(rich.get_console().__dict__)
    yield
    console.__dict__ = before


@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_console: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    names: dict[str, Any] = {"__name__": "__main__"}
    output: str | None = None
    for block in blocks(page):
        where = f"docs/{page}:{block.line}"
        if block.title.startswith(SKIP):
            output = None
        elif block.language == "python":
            output = python(block.text, where, names)
        elif block.language == "sh":
            status, output = shell(block.text)
            assert status == (2 if block.title.startswith(MISTAKE) else 0), f"{where}\n{output}"
        elif block.language == "yaml" and block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), where
        else:
            assert block.language == "text", f"{where}: nobody runs or checks '{block.language}'"
            assert output is not None, f"{where}: output of nothing"
            for line in block.text.splitlines():
                assert line == "..." or line in output, f"{where}: not printed: {line}\n{output}"


def test_what_is_not_run_says_why_and_is_counted() -> None:
    skipped = {page: sum(block.title.startswith(SKIP) for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in skipped.items() if count} == NOT_RUN
    assert all(block.title[len(SKIP) :] for page in PAGES for block in blocks(page) if block.title.startswith(SKIP))


def test_the_reference_is_what_the_program_prints() -> None:
    """Regenerate it with: python -m tools.reference > docs/recipe-reference.md"""
    assert (DOCS / "recipe-reference.md").read_text() == reference.page()


def test_the_reference_names_every_field() -> None:
    from chaindiff.specs.recipe import Recipe

    schema = Recipe.model_json_schema()
    text = reference.page()
    for definition in [schema, *schema["$defs"].values()]:
        for name in definition["properties"]:
            assert f"| `{name}` |" in text


def test_the_custom_chain_is_short() -> None:
    """The page promises a chain of one's own, network and data included, in under 60 lines of Python."""
    code = "".join(block.text for block in blocks("custom-chain.md") if block.language == "python")
    assert len(code.splitlines()) < 60


LINK = re.compile(r"\]\(([^)#\s]+)(?:#([\w-]+))?\)")


PROSE = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
prose = pytest.mark.parametrize("page", sorted(PROSE), ids=lambda path: path.relative_to(ROOT).as_posix())


@prose
def test_links_lead_somewhere(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(item: Any) -> list[str]:
        if isinstance(item, str):
            return [item]
        return [page for below in (item.values() if isinstance(item, dict) else item) for page in pages(below)]

    assert sorted(set(pages(config["nav"])) - RECORDS) == PAGES


def test_the_mathematics_numbers_its_equations() -> None:
    text = (DOCS / "mathematics.md").read_text()
    numbers = re.findall(r"\\tag\{(\d+)\}", text)
    assert numbers == [str(n + 1) for n in range(len(numbers))] and len(numbers) == text.count("$$") // 2
    assert {int(n) for n in re.findall(r"\((\d+)\)", re.sub(r"\\tag\{\d+\}", "", text))} <= set(map(int, numbers))


def test_the_core_loop_in_the_docs_is_the_programs() -> None:
    (block,) = [block for block in blocks("mathematics.md") if block.language == "python"]
    assert textwrap.indent(block.text, "    ") in inspect.getsource(solvers)
    assert len(block.text.splitlines()) <= 15


def test_the_small_table_of_results_is_that_of_the_details() -> None:
    """The page of results is written by hand; every figure of its table stands in one row of the measured ones."""
    tables = [
        [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        for text in ((DOCS / name).read_text() for name in ("results.md", "results-details.md"))
    ]
    small, measured = tables
    rows = [row for row in small if row[0].startswith(("EDM", "VCDM:", "VCDM, ground-truth"))]
    assert len(rows) == 3
    for label, *figures in rows:
        assert len(figures) == 4 and any({*figures} <= {*row, *(c.split(" ±")[0] for c in row)} for row in measured), (
            label
        )


# ------------------------------------------------------------ what the pages say of the code


def test_the_api_page_has_every_public_name_by_its_home() -> None:
    """A home is the module that defines it: `::: chaindiff.chain.chain.Chain`, once."""
    shown = []
    for path in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE):
        home, _, name = path.rpartition(".")
        shown.append(getattr(importlib.import_module(home), name))
        if isinstance(shown[-1], type | FunctionType):
            assert shown[-1].__module__ == home, f"docs/api.md: {path} is defined in {shown[-1].__module__}"
    public = {name: getattr(cd, name) for name in cd.__all__ if name != "__version__"}
    times = {name: sum(there is found for found in shown) for name, there in public.items()}
    assert times == dict.fromkeys(public, 1) and len(shown) == len(public)


@prose
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    """Files by their paths; `Class.method` (`path`) and `function` (`path`) are defined in that file."""
    text = " ".join(page.read_text().split())
    for path in re.findall(r"`((?:chaindiff|tests|stages|recipes|benchmarks|docs|tools)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for name, path in re.findall(r"`([\w.]+)` \(`(chaindiff/[\w/]+\.py)`\)", text):
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", (ROOT / path).read_text(), re.MULTILINE), f"{name} in {path}"


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Needs the extra `docs`: no warnings, and every formula is MathML."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    done = subprocess.run([*command, "--site-dir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "mathematics" / "index.html").read_text()
    formulas = (DOCS / "mathematics.md").read_text().count("$") - 2 * (DOCS / "mathematics.md").read_text().count("$$")
    assert page.count("<math") == formulas // 2 + page.count('class="equation"')
    assert 'id="eq-5"' in page and "arithmatex" not in page.split("<article")[1].split("</article>")[0]
