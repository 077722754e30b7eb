"""The tables of an evaluation."""

from __future__ import annotations

import pytest

from chaindiff.evaluation.provenance import Figure
from chaindiff.evaluation.tables import (
    Measured,
    Results,
    difference,
    figures_table,
    link_costs,
    markdown,
    number,
    training,
)
from chaindiff.io.errors import UserError


def row(label: str, *values: float, judge: str = "j", count: int = 100) -> Measured:
    trained = {"training pflop": 12.3, "training images": {"clip": 300_000, "image": 600_000}}
    about = [
        {"count": count, "gflops": 1.0, "seconds per image": 0.5, "seed": s, **trained} for s in range(len(values))
    ]
    figures = [
        [Figure(metric="kid", value=v, low=v - 0.00196, high=v + 0.00196, reference="d", count=count, encoder=judge,
                seed=s)]
        for s, v in enumerate(values)
    ]  # fmt: skip
    return Measured(label, about, figures)


def test_links_costs_add_up_to_the_whole():
    rows = [row("the whole chain", 0.03), row("clip from the data", 0.02), row("clip, small from the data", 0.005)]
    table = link_costs(Results("links", "links", rows), ["clip", "small"])
    values = [float(line[1].split(" ")[0]) for line in table[1:]]
    assert values == [10.0, 15.0, 5.0, 30.0]
    assert table[1][1] == "10.0 ± 2.77"  # 1000 x 1.96 x sqrt(2) x 0.001


def test_errors_come_of_seeds_or_of_the_figures_own_intervals():
    # Intervals of half-width 1.96 x 0.001 on each: 0.001 / sqrt(4). Scatter 0, then large.
    assert row("a", 0.02, 0.02, 0.02, 0.02).error("kid", "j") == pytest.approx(0.001 / 2, rel=1e-3)
    assert row("a", 0.01, 0.03).error("kid", "j") == pytest.approx(0.01)


def test_unlike_figures_have_no_difference():
    with pytest.raises(UserError, match="count is 100 in one and 200 in the other"):
        difference(row("a", 0.02), row("b", 0.01, count=200), "kid", "j")


def test_numbers_have_three_digits_and_tables_are_markdown():
    assert [number(v) for v in (0.0123456, 1.5, 123.4, 98765.4, 0.0, -2.0)] == [
        "0.0123", "1.50", "123", "98765", "0", "-2.00",
    ]  # fmt: skip
    text = markdown(figures_table(Results("t", "main", [row("a", 0.02, 0.03)])))
    head = "| row | KID x1000 j | samples | GFLOP a sample | training PFLOP | training images | images/s |"
    assert text.splitlines()[0] == head
    assert "| a | 25.0 ± 9.80 | 2 x 100 | 1.00 | 12.3 | 300,000 + 600,000 | 2.00 |" in text


def test_training_that_is_not_known_is_not_guessed():
    images = {"clip": None, "image": 5}
    assert training({"training pflop": None, "training images": images}) == ("-", "- + 5")
