"""docs/joint-or-chain.md: what the comparison found, with the command, counts and machine, whatever it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from torch import Tensor

from benchmarks.joint_or_chain.plan import BUDGET
from benchmarks.quality.write import processor
from chaindiff.evaluation.evaluate import Group, draw_all, measure_group
from chaindiff.evaluation.oracle import DataValues, split_of
from chaindiff.evaluation.report import vector_table
from chaindiff.evaluation.rows import Row
from chaindiff.evaluation.study import Study
from chaindiff.evaluation.tables import Measured, Results, cell, figures_table, judges_of, markdown, number
from chaindiff.evaluation.vectors import vector_report
from chaindiff.io.files import write_whole
from chaindiff.show.images import grid, png_bytes

JUDGES = ("efficientnet_lite2", "judge_conv", "judge_vit")
SHOWN = 8  # pictures of a row


def write_page(group: Group, missing: Sequence[str], out: Path, page: Path) -> Path:
    """Measure what is missing, and write the page and its pictures."""
    study, pictures = Study(out, JUDGES, held_out="test"), page.parent / "pictures" / "joint"
    results = measure_group(group, study)
    parts = [head(results.rows), "## All rows", markdown(figures_table(results, ("fd", "kid", "swd")))]
    parts += ["## What wins", against(results), markdown(ranking(results))]
    if missing:
        parts += ["Not trained here, and so without a row: " + ", ".join(missing) + "."]
    parts += ["## Each variable given the other", conditionals(group, study, pictures)]
    write_whole(page, ("\n\n".join(part.strip("\n") for part in parts) + "\n").encode())
    return page


def head(rows: Sequence[Measured]) -> str:
    one = rows[0].about[0]
    seeds = ", ".join(str(about["seed"]) for about in rows[0].about)
    return f"""# Joint model or chain

Two ways to use an embedding: a chain samples it first and the image given it (VCDM); a joint model denoises both in one
network, each with a noise level of its own. Both have the same parts here, a U-Net for the image and a prior for the
embedding, and {one["training images"][one["of"]]:,} training images for each network of images; one training of each.
The joint model was trained on independent levels (a fifth of the samples with one variable known, a fifth with one pure
noise), so that one model can be sampled along any path: together, the embedding ahead by an offset, the embedding first
(the chain's order), the image first, or the path that `chaindiff tune` fits to it. Everything here is written by

```sh title="not run in the tests: it takes half an hour"
python -m benchmarks.joint_or_chain
```

on {torch.get_num_threads()} threads of {processor()}, torch {torch.__version__.split("+")[0]}; networks in bf16,
DPM-Solver++(2M), {BUDGET} evaluations of every network (two more where the kinks of a path lie between its steps);
{one["count"]:,} samples a row for each of the sampling seeds
{seeds}, against the 4,521 training images. Lower is better; ± are 95% intervals over sampling seeds, which do not
cover the spread between trainings. `efficientnet_lite2` is an ImageNet classifier: neither it nor its labels saw these
images, but the chain's emoji CLIP began as its smaller sibling (`*`). The other two judges were trained on tags of the
training images. Speeds were taken while other programs used the machine. `--train` trains the arms that are missing."""


def against(results: Results) -> str:
    """VCDM and the best joint row by every judge and metric, beside EDM; over sampling seeds."""
    rows = {row.label: row for row in results.rows}
    joint = [row for label, row in rows.items() if label.startswith("joint")]
    lines = [["judge", "metric", "VCDM against EDM", "best joint row", "against EDM", "against VCDM"]]
    for judge in judges_of(results.rows):
        for metric in ("fd", "kid"):
            known = [row for row in joint if row.of(metric, judge)]
            if known:
                best = min(known, key=lambda row: row.mean(metric, judge) or 0.0)
                pairs = (("EDM", rows["VCDM"]), ("EDM", best), ("VCDM", best))
                chain, edm, vcdm = (change(rows[base], row, metric, judge) for base, row in pairs)
                lines.append([judge, metric.upper(), chain, best.label, edm, vcdm])
    wins = ranking(results)
    first = f"By mean rank in KID over the judges, **{wins[1][0]}** is best, then {wins[2][0]} and {wins[3][0]}."
    return "\n\n".join([first, "Changes by sampling seed, lowest to highest; negative is better:", markdown(lines)])


def change(base: Measured, row: Measured, metric: str, judge: str) -> str:
    pairs = zip(base.of(metric, judge), row.of(metric, judge), strict=True)
    found = [b.value / a.value - 1 for a, b in pairs]
    low, high = f"{min(found):+.0%}", f"{max(found):+.0%}"
    return low if low == high else f"{low} to {high}"


def ranking(results: Results) -> list[list[str]]:
    """Rows from best to worst by their mean rank in KID over the judges."""
    judges = [judge for judge in judges_of(results.rows) if results.rows[0].of("kid", judge)]
    ranks = {row.label: 0.0 for row in results.rows}
    for judge in judges:
        order = sorted(results.rows, key=lambda row: row.mean("kid", judge) or 0.0)
        for place, row in enumerate(order, 1):
            ranks[row.label] += place / len(judges)
    lines = [["row", "mean rank", *(f"KID x1000 {judge}" for judge in judges)]]
    for row in sorted(results.rows, key=lambda row: ranks[row.label]):
        lines.append([row.label, number(ranks[row.label]), *(cell(row, "kid", judge) for judge in judges)])
    return lines


# ------------------------------------------------------------ conditionals


def conditionals(group: Group, study: Study, pictures: Path) -> str:
    """Either variable given the other, and the embedding alone, each beside a floor or the chain's."""
    first = {rows[0].label: rows[0] for rows in group.rows}
    vcdm, joint = first["VCDM"], first["joint: offset 0.3"]
    told = [
        Row(f"{row.label.partition(':')[0]}, given the data's embeddings", row.loaded, row.of, row.folder, row.count,
            row.seed, ("clip",), out=row.out)
        for row in (vcdm, joint)
    ]  # fmt: skip
    draw_all(told)
    known = measure_group(Group("", "main", [[row] for row in told]), study)
    said = ["The image given the data's embeddings, one seed:", markdown(figures_table(known, ("fd", "kid")))]
    first_embedding = first["joint: embedding first"]
    for row in (vcdm, first_embedding):
        if (held := study.held(row)) is not None:
            sets = [data.values.of("clip", range(data.count)) for data in (held, study.data(row, None))]
            found = vector_report(row.samples("clip"), *sets)
            said += [f"The embedding alone, by {row.label}:", markdown(vector_table(found))]
    return "\n\n".join([*said, read_off(joint, pictures), drawn(joint, pictures)])


def read_off(row: Row, pictures: Path) -> str:
    """The embedding given a held-out image, beside ridge regression from pixels, by cosine and retrieval."""
    assembly = row.assembly
    values = {s: DataValues(assembly, split_of(assembly, s), row.folder / "data") for s in ("train", "test")}
    count = {s: len(split_of(assembly, s)) for s in values}
    x = {s: v.of(row.of, range(count[s])) for s, v in values.items()}
    z = {s: v.of("clip", range(count[s])) for s, v in values.items()}
    read = assembly.chain(["both"]).sample(count["test"], given={row.of: x["test"]}, want=["clip"], seed=0)
    ridge = RidgeCV([1.0, 10.0, 100.0, 1000.0, 10000.0]).fit(x["train"].flatten(1).numpy(), z["train"].numpy())
    guesses = {
        "the joint model, one sample": read["clip"].float(),
        "ridge regression from pixels": torch.from_numpy(ridge.predict(x["test"].flatten(1).numpy())).float(),
        "another image's embedding": z["test"].roll(1, 0),
    }
    lines = [["embedding of a held-out image, by", "cosine", "top 1", "top 5"]]
    for name, guess in guesses.items():
        close = F.normalize(guess, dim=1) @ F.normalize(z["test"], dim=1).T
        order = (close > close.diagonal()[:, None]).sum(1)
        lines.append([name, f"{close.diagonal().mean():.3f}", f"{(order < 1).double().mean():.1%}",
                      f"{(order < 5).double().mean():.1%}"])  # fmt: skip
    near = (
        (F.normalize(guesses["the joint model, one sample"], dim=1) @ F.normalize(z["train"], dim=1).T).topk(3).indices
    )
    rows = range(0, count["test"], count["test"] // SHOWN)[:SHOWN]
    shown = torch.stack([torch.cat([x["test"][at : at + 1], x["train"][near[at]]]) for at in rows], 1)
    keep(pictures / "read.png", shown.flatten(0, 1), SHOWN)
    return "\n\n".join([
        "The embedding read off a picture without CLIP: the joint model's sample given a held-out image. Retrieval is "
        f"among the {count['test']} held-out images.",
        markdown(lines),
        "![held-out images and their neighbours](pictures/joint/read.png)",
        "Held-out images (top) and the training images whose embeddings are nearest to the one that was read.",
    ])  # fmt: skip


def drawn(row: Row, pictures: Path) -> str:
    """Grids: both, and images given the embeddings of held-out images."""
    model, data = row.assembly.chain(["both"]), split_of(row.assembly, "test")
    values = DataValues(row.assembly, data, row.folder / "data")
    rows = [*range(3, len(data), len(data) // SHOWN)][:SHOWN]
    keep(pictures / "both.png", model.sample(4 * SHOWN, want=[row.of], seed=1)[row.of], 2 * SHOWN)
    given = {"clip": values.of("clip", rows).repeat(2, 1)}
    told = model.sample(2 * SHOWN, want=[row.of], seed=1, given=given)[row.of]
    keep(pictures / "given-clip.png", torch.cat([values.of(row.of, rows), told]), SHOWN)
    return "\n\n".join([
        "![samples of the joint model](pictures/joint/both.png)",
        "Samples of the joint model, both variables generated.",
        "![images given embeddings](pictures/joint/given-clip.png)",
        "Held-out images (top), and two samples each given their embeddings.",
    ])  # fmt: skip


def keep(path: Path, images: Tensor, columns: int) -> None:
    write_whole(path, png_bytes(grid(images, columns=columns)))
