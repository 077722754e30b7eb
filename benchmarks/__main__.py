"""The whole suite, beside every peer that is installed; `chaindiff bench` measures a part of it, alone.

python -m benchmarks                                   # everything, as tables
python -m benchmarks sampling kernels --quick          # some of it
python -m benchmarks --json speed.json                 # and every time, in a file
python -m benchmarks --write speed.json                # docs/performance.md and its plots, of that file
python -m benchmarks --compare speed.json              # what is slower than then
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks.page import write_page
from benchmarks.suite import CASES
from chaindiff.bench.suite import chosen, read
from chaindiff.io.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases or groups (default: all)")
    parser.add_argument("--list", action="store_true", help="list what can be measured")
    parser.add_argument("--repeats", type=int, default=10, help="fewer are made where each takes seconds")
    parser.add_argument("--quick", action="store_true", help="three repeats: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to it")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="name what is slower than in this --json")
    parser.add_argument("--edm", type=Path, metavar="FOLDER", help="a checkout of NVlabs/edm, whose code is executed")
    parser.add_argument("--write", type=Path, metavar="JSON", help="measure nothing: write docs/performance.md of this")
    parser.add_argument("--quality", type=Path, metavar="JSON", help="with --write: output of benchmarks.equal_quality")
    parser.add_argument("--note", default="", help="with --write: what else a reader should know, such as other load")
    parser.add_argument("--docs", type=Path, default=Path("docs"), metavar="FOLDER", help="where the page goes")
    asked = parser.parse_args(arguments)
    try:
        if asked.write is not None:
            print(f"wrote {write_page(read(asked.write), asked.docs, asked.quality, asked.note)}")
            return 0
        for name in (names := chosen(asked.names, CASES)):
            if asked.list:
                print(f"{name:16}  {CASES[name].group:10}  {CASES[name].about}")
        if asked.list:
            return 0
        from benchmarks.beside import sides
        from chaindiff.commands.bench import bench

        peers = partial(sides, edm=asked.edm)
        _, compared = bench(names, asked.repeats, asked.quick, asked.json, asked.compare, CASES, peers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(compared is not None and bool(compared.slower))


if __name__ == "__main__":
    sys.exit(main())
