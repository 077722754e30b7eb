"""The experiment: VCDM against EDM at equal cost, link by link. One command, which resumes where it was interrupted.

    python -m benchmarks.quality            # everything: samples, figures, docs/results-details.md and its plots
    python -m benchmarks.quality --sample   # the samples alone

Weights are the shipped ones. Samples, features and figures are stored under runs/quality.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.plan import Experiment
from benchmarks.quality.write import write_results
from chaindiff.evaluation.evaluate import draw_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--sample", action="store_true", help="sample, and stop")
    parser.add_argument("--quick", action="store_true", help="100 samples a row, one seed: to see that it works")
    options = parser.parse_args()
    experiment = Experiment(options.out, quick=options.quick)
    draw_all([row for group in experiment.groups for rows in group.rows for row in rows])
    if not options.sample:
        print(f"wrote {write_results(experiment, options.docs)}")


if __name__ == "__main__":
    main()
