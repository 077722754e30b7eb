"""What every process of the distributed tests does: the commands it is given, noting which files it changes.

python -m torch.distributed.run ... tests/ranks.py COMMANDS.json NOTES: a list of `chaindiff` command lines, and the
folder where each process writes, as RANK.json, what became of each: its exit status, and the paths.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from chaindiff import cli
from chaindiff.training import cache

SHARD = 8  # rows of a file of embeddings: a few files for a few images
CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "shutil.rmtree": 0}  # event -> which argument


def note_changes(paths: list[str]) -> None:
    """Append the path of every file that this process opens for writing, renames into place or removes."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[1] is not None and set("wax+") & set(str(arguments[1])):
            paths.append(str(arguments[0]))
        elif event in CHANGES and not (event == "os.mkdir" and os.path.isdir(str(arguments[0]))):
            paths.append(str(arguments[CHANGES[event]]))

    sys.addaudithook(hook)


def main(commands: list[list[str]], notes: Path) -> None:
    cache.SHARD = SHARD
    paths: list[str] = []
    note_changes(paths)
    found = []
    for command in commands:
        paths.clear()
        try:
            cli.main(command)
        except SystemExit as ended:
            found.append(
                {"status": ended.code, "changed": sorted(p for p in set(paths) if not p.endswith((".tmp", ".lock")))}
            )
    (notes / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
