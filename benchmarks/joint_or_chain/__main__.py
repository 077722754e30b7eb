"""The comparison: EDM, a chain, and one model of both, along every path. One command, which resumes.

    python -m benchmarks.joint_or_chain                          # samples and figures of what is trained
    python -m benchmarks.joint_or_chain --train --minutes 25     # trains what is missing first, for so long

EDM, VCDM and the joint model with training seed 0 are the shipped weights. All else is under runs/joint_or_chain.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.joint_or_chain.plan import ARMS, BUDGET, comparison
from benchmarks.joint_or_chain.write import write_page
from chaindiff.commands.tune import tune
from chaindiff.evaluation.evaluate import draw_all


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/joint_or_chain"))
    parser.add_argument("--page", type=Path, default=Path("docs/joint-or-chain.md"))
    parser.add_argument("--count", type=int, default=1000, help="samples of a row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", action="store_true", help="train the arms that have no weights, in their order")
    parser.add_argument("--side", type=int, choices=(16, 64), default=16, help="64 is for a GPU")
    parser.add_argument("--images", type=int, default=None, help="of training, for every network; the recipes' own")
    parser.add_argument("--minutes", type=float, default=None, help="stop training after so long")
    asked = parser.parse_args()
    began = time.monotonic()
    arms = [replace(arm, side=asked.side, images=asked.images) for arm in ARMS]
    for arm in arms if asked.train else ():
        left = None if asked.minutes is None else 60 * asked.minutes - (time.monotonic() - began)
        if (left is not None and left <= 0) or not arm.train(asked.out, left):
            print(f"{arm}: not trained to its end; the same command goes on with it", flush=True)
            break
    learned = asked.out / "learned.yaml"
    if not learned.exists():
        tune(arms[2].base(), steps=BUDGET, out=learned)
    group, missing = comparison(arms, asked.out, asked.count, asked.seeds)
    draw_all([row for rows in group.rows for row in rows])
    print(f"wrote {write_page(group, missing, asked.out, asked.page)}")


if __name__ == "__main__":
    main()
