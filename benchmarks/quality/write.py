"""docs/results-details.md: what the experiment found, with the command, counts and machine, whatever it says."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.quality.plan import JUDGES, Experiment
from chaindiff.evaluation.evaluate import Group, measure_group
from chaindiff.evaluation.report import Report, kid_bars, kid_curves, kid_of, provenance
from chaindiff.evaluation.study import Study
from chaindiff.evaluation.tables import Measured, Results, Table, figures_table, link_costs, markdown
from chaindiff.io.files import write_whole
from chaindiff.show import plots

KID_OF_SWEEPS = ("kid", "fd", "recall")


def write_results(experiment: Experiment, docs: Path) -> Path:
    """Measure what is missing and write the page and its plots."""
    study = Study(experiment.out, JUDGES, held_out="test")
    pictures = docs / "pictures" / "results"
    parts = [head(experiment)]

    def say(text: str) -> None:
        parts.append(text)

    def picture(name: str, png: bytes, alt: str) -> None:
        write_whole(pictures / f"{name}.png", png)
        say(f"![{alt}](pictures/results/{name}.png)")

    def measured(group: Group) -> Results:
        return measure_group(group, study)

    # -- headline
    results = measured(experiment.headline)
    say("## Does the chain pay?\n")
    say(gains(results.rows[0], results.rows[1]))
    say(markdown(figures_table(results)))
    say(provenance(results.rows).replace("\n", "  \n"))
    picture("headline", kid_bars(results), "KID of the headline rows")

    say("## On concepts that training never saw\n")
    held = [
        Measured(rows[0].label, [r.about() for r in rows], [study.figures(r, study.held(r)) for r in rows])
        for rows in experiment.headline.rows
    ]
    say("The same samples against the test split: whole concepts that no stage was trained on. KID alone, which does "
        "not depend on the reference's size in expectation.\n")  # fmt: skip
    say(markdown(figures_table(Results("held out", "main", held), ("kid",))))

    say("## At 32x32\n")
    results = measured(experiment.large)
    say(gains(results.rows[0], results.rows[1]))
    say(markdown(figures_table(results)))

    # -- links
    say("## What each link costs\n")
    results = measured(experiment.links)
    say("`vcdm_emoji` at 32x32, with ground-truth (oracle) values in place of stages.\n")
    say(markdown(figures_table(results)))
    say("KID of the whole chain, split into what each stage's own samples add:\n")
    say(markdown(link_costs(results, [v for v in experiment.links.rows[0][0].made if v != "image"])))

    # -- how much to condition on
    say("## How much to condition on\n")
    say("One image network, trained with random subsets of its conditioning: the class is dropped half of the time, "
        "and the embedding truncated to its first k principal components, with k as an input. Clip and class are "
        "sampled, or ground truth (oracle).\n")  # fmt: skip
    sampled, oracle = measured(experiment.subsets), measured(experiment.subsets_oracle)
    say(markdown(figures_table(sampled, KID_OF_SWEEPS)))
    say(markdown(figures_table(oracle, KID_OF_SWEEPS)))
    picture("components", subset_curves(sampled, oracle), "KID against the number of components")

    # -- evaluations, noise
    say("## Quality against evaluations\n")
    nfe = {name: measured(group) for name, group in experiment.nfe.items()}
    curves = [
        plots.Curve(f"{name}, {judge}", result.x, *kid_of(result.rows, judge))
        for name, result in nfe.items()
        for judge in JUDGES[:1]
    ]
    plot = plots.curves(curves, "KID against evaluations of the image network", "NFE", "KID x1000", log=True)
    picture("evaluations", plot, "KID against evaluations")
    for result in nfe.values():
        say(markdown(figures_table(result, KID_OF_SWEEPS)))
    say("## Noise on the link\n")
    noise = measured(experiment.noise)
    say(markdown(figures_table(noise, KID_OF_SWEEPS)))
    picture("noise", kid_curves(noise), "KID against the noise on the link")

    # -- memorisation, prior
    say("## Memorisation\n")
    say(markdown(memorisation_table(experiment.headline, study)))
    row = experiment.headline.rows[1][0]
    found = study.memorisation(row, JUDGES[0])
    if found is not None:
        distances = {"samples": found.samples.numpy(), "held-out images": found.held_out.numpy()}
        picture("memorisation", plots.histograms(distances, "VCDM: nearest training image", f"distance, {JUDGES[0]}"),
                "distances to the nearest training image")  # fmt: skip
    say("## The prior alone\n")
    say(prior(experiment, study))
    path = docs / "results-details.md"
    write_whole(path, ("\n\n".join(part.strip("\n") for part in parts) + "\n").encode())
    return path


def head(experiment: Experiment) -> str:
    kinds = f"{torch.get_num_threads()} cores of {processor()}, torch {version('torch')}"
    return f"""# Results in detail

VCDM against EDM on the embedded emoji: the same image network, the same 600,064 training images, the same sampler.
[Results](results.md) says what these figures mean. Everything on this page is written by

```
python -m benchmarks.quality
```

from the shipped weights, on {kinds}; networks in bf16. Sampling seeds are 0, 1, 2 where
a row has three, else 0. KID and FD are against the 4,521 training images; lower is better, as for SWD; precision and
recall: higher. "Oracle" rows are conditioned on ground-truth values from the data. The judges are feature extractors:
small networks of other families than the chain's emoji CLIP (an EfficientNet), trained on groups, subgroups and styles
of the same training images (`chaindiff/assets/judges/README.md`). They did not exist yet when the headline's chains
were made.

Speeds (images/s) were taken while other programs used the machine at times; rows of equal cost differ for no other
reason."""


def processor() -> str:
    """The processor's name, where the system reports it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gains(base: Measured, other: Measured) -> str:
    """How much lower the second row is than the first, on every seed, and what it costs more."""
    lines = [f"**{other.label}** against **{base.label}**, lower by:\n"]
    table: Table = [["judge", "metric", *(f"seed {a['seed']}" for a in base.about), "mean"]]
    for judge in dict.fromkeys(f.encoder for f in base.figures[0]):
        for metric in ("fd", "kid", "swd"):
            pairs = list(zip(base.of(metric, judge), other.of(metric, judge), strict=True))
            if pairs:
                cells = [f"{1 - b.value / a.value:.0%}" for a, b in pairs]
                mean = 1 - fmean(b.value for _, b in pairs) / fmean(a.value for a, _ in pairs)
                table.append([judge, metric.upper(), *cells, f"{mean:.0%}"])
    cost = other.about[0]["gflops"] / base.about[0]["gflops"] - 1
    return "\n".join([*lines, markdown(table), f"\nSampling costs {cost:+.1%} floating-point operations.\n"])


def memorisation_table(group: Group, study: Study) -> Table:
    lines = [["row", "judge", "nearer to training than 95% of held-out", "median distance / held-out's"]]
    for rows in group.rows:
        for judge in (*JUDGES, "pixels:16"):
            found = study.memorisation(rows[0], judge)
            if found is not None:
                lines.append([rows[0].label, judge, f"{found.share:.1%}", f"{found.ratio:.2f}"])
    return lines


def prior(experiment: Experiment, study: Study) -> str:
    report = Report(experiment.out)
    report.add_priors(study, experiment.headline.rows[1][0])
    return "\n\n".join(f"{part['note']}\n\n{markdown(part['table'])}" for part in report.parts)


def subset_curves(sampled: Results, oracle: Results) -> bytes:
    judge, found = JUDGES[0], []
    for label, result, classes in (
        ("sampled", sampled, False), ("sampled, with class", sampled, True), ("oracle", oracle, False),
    ):  # fmt: skip
        chosen = [
            (x, row) for x, row in zip(result.x, result.rows, strict=True) if row.label.startswith("class") == classes
        ]
        found.append(plots.Curve(label, [float(x) for x, _ in chosen], *kid_of([row for _, row in chosen], judge)))
    return plots.curves(found, "how many components to give", "components given (0: none)", "KID x1000")
