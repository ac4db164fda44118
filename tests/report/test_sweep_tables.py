"""A sweep in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from fastmem.report.sweep_tables import row_table, search_sentence, told_comparisons
from fastmem.sweep.plan import NO_EDIT, Row


def record(row: Row, cost: float, reported: int = 5, missing: str = "") -> dict[str, Any]:
    """A row as ``sweep.json`` has it."""
    metrics = {} if missing else {"kd-sscd": cost}
    return asdict(row) | {
        "reported": None if missing else reported,
        "missing": missing,
        "metrics": metrics,
        "cost": cost,
    }


def confirmed(row: Row, cost: float, beats_plain: bool = False, beside_half: float = 0.0) -> dict[str, Any]:
    """A row that a search reached and confirmed; every interval reaches 0.01 to both sides."""
    estimates = {
        name: {"value": value, "low": value - 0.01, "high": value + 0.01}
        for name, value in {"cost": cost, "beside_half": beside_half}.items()
    }
    return record(row, cost) | {"confirmation": estimates, "beats_plain": beats_plain}


PLAIN = confirmed(Row("unitmem", 0.3, 0.5), 0.04)
BETTER = Row("attribution", 0.1, 0.5, rounds=2)
START = "halving by UnitMem takes 30 % of all units and costs +0.0400 (+0.0300 to +0.0500) of kd-sscd; "
LESS = "edits that surely cost less"
CHEAPEST = "the cheapest +0.0100 (+0.0000 to +0.0200)"


@pytest.mark.parametrize(
    ("others", "plain", "text"),
    [
        pytest.param(
            [confirmed(BETTER, 0.01, beats_plain=True, beside_half=-0.011)],
            PLAIN,
            f"{START}{LESS}: 1, {CHEAPEST}, surely at most half: attribution 10 % x0.5, 2 rounds",
            id="at most half",
        ),
        pytest.param(
            [
                confirmed(Row("unitmem", 0.2, 0.25), 0.02, beats_plain=True),
                confirmed(BETTER, 0.01, beats_plain=True, beside_half=0.011),
            ],
            PLAIN,
            f"{START}{LESS}: 2, {CHEAPEST}, surely more than half: attribution 10 % x0.5, 2 rounds",
            id="less, but more than half",
        ),
        pytest.param(
            [confirmed(BETTER, 0.01, beats_plain=True, beside_half=0.005)],
            PLAIN,
            f"{START}{LESS}: 1, {CHEAPEST}, about half: attribution 10 % x0.5, 2 rounds",
            id="about half",
        ),
        pytest.param(
            # cheaper, but not beyond doubt
            [confirmed(BETTER, 0.03)],
            PLAIN,
            f"{START}nothing that was searched surely costs less",
            id="nothing is better",
        ),
        pytest.param(
            [confirmed(BETTER, 0.01)],
            None,
            "halving by UnitMem does not reach a reduction of 80%; other edits that do: 1",
            id="halving falls short",
        ),
    ],
)
def test_a_search_says_whether_anything_beats_plain_halving(others, plain, text):
    reached = [*others, *([] if plain is None else [plain])]
    document = {"reached": reached, "plain_halving": plain, "cost": "kd-sscd", "target_reduction": 0.8}
    assert search_sentence(document) == text


def test_drawn_rows_are_one_line_and_missing_ones_have_their_reason():
    rows = [record(NO_EDIT, 0.1, 8), *(record(Row("random", 0.1, 0.5, seed), 0.2, 4 + seed) for seed in range(3))]
    rows.append(record(Row("matched", 0.1, 0.5), 0.0, missing="too many units"))
    table = row_table({"rows": rows, "cost": "kd-sscd", "reported_targets": 10, "pareto": [0]})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert lines == [
        ["no edit", "1", "8 of 10 (49.0% to 94.3%)", "0.1000", "*"],
        ["random 10 % x0.5", "3", "5.0, 4 to 6", "0.2000", ""],
        ["matched 10 % x0.5", "not available", "too many units", "", ""],
    ]


def test_comparisons_that_are_told_are_declared_ones_and_those_that_stand_out():
    def comparison(fraction: float, rival: str, holm: float) -> dict[str, Any]:
        return {"fraction": fraction, "rival": rival, "holm": holm}

    silent = [comparison(0.01, "random", 0.3), comparison(0.02, "matched", 0.051)]
    told = [
        comparison(0.02, "random", 0.05),
        comparison(0.1, "random", 0.9),
        comparison(0.1, "random at equal quality", 1),
    ]
    assert told_comparisons(silent + told) == told
    assert told_comparisons(silent) == silent
