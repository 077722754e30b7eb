"""The memory of an evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from chaindiff.evaluation.blocks import BLOCK
from chaindiff.evaluation.oracle import DataValues, split_of
from chaindiff.evaluation.rows import Row
from chaindiff.specs.load import load_recipe

NOISE = """
import json, resource, sys, torch
from pathlib import Path
from chaindiff.evaluation.evaluate import Group, measure_group
from chaindiff.evaluation.report import Report
from chaindiff.evaluation.rows import CHUNK, Row
from chaindiff.evaluation.study import Study
from chaindiff.specs.load import load_recipe

changes, folder, count = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
row = Row("noise", load_recipe("vcdm_emoji16").override(changes), "image16", folder, count)
for rows in row.store.missing():  # in place of samples
    first = rows.start
    draw = torch.Generator().manual_seed(first)
    image = torch.randint(0, 256, (CHUNK, 3, 16, 16), dtype=torch.uint8, generator=draw)
    clip = 0.5 * torch.randn(CHUNK, 32, generator=draw)
    row.store.write(first, {"image16": image, "clip": clip, "seconds": torch.ones(CHUNK)})
study, report = Study(folder, ["pixels:16"]), Report(folder)
report.add_group(measure_group(Group("noise", "main", [[row]]), study))
report.add_memorisation(study, row)
report.add_priors(study, row)
report.write()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_of_an_evaluation_does_not_grow_with_the_samples(tmp_path):
    """All that is measured, of 10,000 samples: their features as `pixels` alone would be 123 MB.

    Both counts are more than a block of rows. What is freed goes back at once: left to itself, the allocator keeps tens
    of megabytes of free blocks, more or fewer from run to run.
    """
    shipped = Row("shipped", load_recipe("vcdm_emoji16"), "image16", tmp_path).assembly
    weights = {name: {"weights": str(shipped.stages[name].weights())} for name in ("clip", "image16")}
    changes = {"data": {"where": {"style": "google"}}, "stages": weights}  # a quarter of the data
    assembly = Row("noise", load_recipe("vcdm_emoji16").override(changes), "image16", tmp_path).assembly
    for split in ("train", "test"):
        DataValues(assembly, split_of(assembly, split), tmp_path / "data").of("clip", [0])
    assert len(assembly.data) > 1000 > BLOCK
    peaks, environment = {}, {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    for count in (1000, 10_000):
        shutil.copytree(tmp_path / "data", tmp_path / str(count) / "data")
        command = [sys.executable, "-c", NOISE, json.dumps(changes), str(tmp_path / str(count)), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[count] = int(done.stdout.split()[-1]) / 1024
    assert peaks[10_000] - peaks[1000] < 40, peaks
