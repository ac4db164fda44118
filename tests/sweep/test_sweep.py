"""The sweep's plan, its resumable table, and the statistics of its comparisons, on a bench that measures nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from scipy.stats import ttest_1samp

from fastmem import UsageError
from fastmem.errors import InputFileError
from fastmem.files import as_json_text
from fastmem.report.sweep_pictures import draw_sweep
from fastmem.report.sweep_tables import comparison_table
from fastmem.reporter import Reporter
from fastmem.sweep.bootstrap import Outcomes, equal_quality, equal_quality_bootstrap, holm, paired_bootstrap
from fastmem.sweep.comparisons import EQUAL_QUALITY, Side, compare_all
from fastmem.sweep.findings import Findings, find, pareto_front, write_sweep_table
from fastmem.sweep.plan import NO_EDIT, Row, SweepSettings, plan_hash, plan_rows
from fastmem.sweep.search import (
    CONFIRMED,
    FRESH_SEEDS,
    LADDER,
    Estimate,
    beats,
    most_work,
    plain_halving,
    recipes,
    search,
)
from fastmem.sweep.table import Measured, RowUnavailable, SweepPlan, Table, TargetSet, measure_rows

TARGETS = 40
# extracted targets of an edit fall with fraction x strength, its cost rises with fraction x price
STRENGTH = {"unitmem": 2.0, "attribution": 4.0, "lowest": 0.1, "random": 1.0, "matched": 1.2}
PRICE = {"unitmem": 1.0, "attribution": 0.5, "lowest": 0.1, "random": 2.0, "matched": 2.0}


class FakeBench:
    """A model whose targets are lost in order, in proportion to the edit; counts what it is asked.

    later_price: by which the price of an edit is multiplied in samples of the fourth seed and later.
    """

    def __init__(self, missing: str = "", stop_after: int | None = None, later_price: float = 1.0) -> None:
        self.missing, self.stop_after, self.later_price = missing, stop_after, later_price
        self.attacked: list[Row] = []
        self.sampled: list[Row] = []
        self.row = NO_EDIT

    @contextmanager
    def edited(self, row: Row) -> Iterator[int]:
        if row.by == self.missing:
            raise RowUnavailable("expected fewer units, got too many: select less")
        self.row = row
        yield round(1000 * row.fraction)
        self.row = NO_EDIT

    def _size(self, rates: dict[str, float]) -> float:
        row = self.row
        return rates.get(row.by, 0.0) * row.fraction * (1 - row.factor) * (1 + 0.02 * row.seed * row.drawn)

    def attack(self) -> np.ndarray:
        if self.stop_after is not None and len(self.attacked) == self.stop_after:
            raise KeyboardInterrupt
        self.attacked.append(self.row)
        left = round(TARGETS * max(0.0, 1 - 4 * self._size(STRENGTH)))
        similarity = np.full((2, TARGETS), 0.5, np.float32)
        # from even to odd places and back, so that both halves lose the same share
        similarity[1, np.arange(left) * 23 % TARGETS] = 0.9
        return similarity

    def quality(self, seed: int) -> dict[str, float]:
        # seeds of drawn units have samples of their own, too: one draw of samples would be an error common to all
        assert seed == self.row.seed
        self.sampled.append(self.row)
        # samples differ by their seed: the first three are 0.01 above and below the mean
        noise = (0.0, 0.01, -0.01)[seed] if seed < 3 else 0.0
        price = self._size(PRICE) * (self.later_price if seed >= 3 else 1.0)
        return {"kd-sscd": 0.1 + price + noise, "loss_heldout": 5.0}


def target_set() -> TargetSet:
    """Targets of 10 classes, of which every other one is reported, with a dose group of 10."""
    place = np.arange(TARGETS)
    return TargetSet(place // 4, place % 2 == 0, (4, 8), 0.75, {"16": place < 10})


SMALL = SweepSettings(0.05, (0.01, 0.05), (0.5,), ("unitmem", "attribution", "random", "matched"), 3, 5)


def sweep_small(tmp_path, settings: SweepSettings = SMALL, bench: FakeBench | None = None) -> Findings:
    table = Table(tmp_path / "rows", bench or FakeBench())
    return find(measure_rows(table, plan_rows(settings), Reporter()), target_set(), "kd-sscd")


def test_the_plan_is_every_row_once_in_a_fixed_order():
    rows = plan_rows(SMALL)
    # no edit with 5 seeds; 2 + 2 x 3 seeds at 1 %; 2 x 3 + 2 x 5 at the declared 5 %; random at three more factors
    assert len(rows) == len(set(rows)) == 5 + 8 + 16 + 9
    assert rows[0] == NO_EDIT
    assert sum(r.by == "random" and (r.fraction, r.factor) == (0.05, 0.5) for r in rows) == 5
    assert {r.factor for r in rows if r.by == "random" and r.fraction == 0.05} == {0.75, 0.5, 0.25, 0.0}
    assert {r.factor for r in rows if r.fraction == 0.01} == {0.5}
    assert plan_rows(SMALL) == rows
    assert plan_hash(rows) != plan_hash(rows[:-1])
    assert len({r.key for r in rows}) == len(rows)


def test_the_default_plan_fits_the_declared_seeds():
    rows = plan_rows(SweepSettings(0.05))
    assert len(rows) == 20 + 4 * 6 + 6 * 3 + 2 * (4 * 3 + 20) + 3 * 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"by": ("unitmem", "luck")}, "expected selections out of unitmem", id="unknown selection"),
        pytest.param({"by": ("scores",)}, "got 'scores'", id="scores need an argument"),
        pytest.param({"fractions": (0.0,)}, "expected fractions", id="no units"),
        pytest.param({"fractions": (1.5,)}, "expected fractions", id="more than all units"),
        pytest.param({"equal_quality": (0.03,)}, "equal quality at one of the fractions 1 %, 2 %", id="no such edits"),
        pytest.param({"scope": "perlayer"}, "expected scope as one of global, per-layer", id="scope"),
        pytest.param({"merge": "median"}, "expected merge as one of max", id="merge"),
        pytest.param({"factors": (1.0,)}, "expected factors", id="a factor that edits nothing"),
        pytest.param({"seeds": 0}, "at least 1 seed", id="no seeds"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change, text):
    with pytest.raises(UsageError, match=text):
        SweepSettings(**{"declared": 0.05} | change)


def test_an_interrupted_sweep_goes_on_and_repeats_no_finished_row(tmp_path):
    rows = plan_rows(SMALL)
    first = FakeBench(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        measure_rows(Table(tmp_path / "rows", first), rows, Reporter())
    # five seeds of no edit need one attack
    assert first.attacked == [rows[0], *rows[5:7]]
    assert first.sampled == list(rows[:7])
    second, plans, advanced = FakeBench(), [], []
    again = measure_rows(
        Table(tmp_path / "rows", second), rows, Reporter(planned=plans.append, advance=advanced.append)
    )
    assert second.sampled == list(rows[7:])
    assert second.attacked == [row for row in rows[7:] if row.drawn or not row.seed]
    assert (plans[0].rows, plans[0].done, sum(advanced)) == (len(rows), 7, len(rows))
    third = FakeBench()
    assert [m.row for m in measure_rows(Table(tmp_path / "rows", third), rows, Reporter())] == list(rows)
    assert third.attacked == third.sampled == []
    whole = measure_rows(Table(tmp_path / "whole", FakeBench()), rows, Reporter())
    for resumed, undisturbed in zip(again, whole, strict=True):
        np.testing.assert_array_equal(resumed.similarity, undisturbed.similarity)
        assert resumed.metrics == undisturbed.metrics


def test_quality_that_was_left_out_is_added_without_a_second_attack(tmp_path):
    bench = FakeBench()
    table, row = Table(tmp_path, bench), Row("unitmem", 0.05, 0.5)
    assert table.measure(row, with_quality=False).metrics is None
    measured = table.measure(row)
    assert measured.metrics == {"kd-sscd": pytest.approx(0.125), "loss_heldout": 5.0}
    assert bench.attacked == bench.sampled == [row]
    assert table.measure(row, with_quality=False).metrics == measured.metrics


def test_a_damaged_row_is_refused(tmp_path):
    table = Table(tmp_path, FakeBench())
    table.measure(NO_EDIT)
    table.file(NO_EDIT).write_bytes(b"")
    with pytest.raises(InputFileError, match="expected a whole safetensors file"):
        table.measure(NO_EDIT)


def test_a_selection_that_cannot_be_made_is_a_row_with_its_reason(tmp_path):
    found = sweep_small(tmp_path, bench=FakeBench(missing="matched"))
    records = [r for r in found.rows() if r["by"] == "matched"]
    assert len(records) == 8
    assert all(r["missing"].startswith("expected fewer units") and r["extracted"] is None for r in records)
    assert not any(c.rival == "matched" for c in found.comparisons)
    write_sweep_table(tmp_path / "sweep.parquet", found)
    table = pyarrow.parquet.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert sum(row["kd-sscd"] is None for row in table) == 8


def test_findings_count_reported_targets_and_compare_with_means_over_seeds(tmp_path):
    found = sweep_small(tmp_path)
    counts = {(r["by"], r["fraction"], r["factor"], r["seed"]): r for r in found.rows()}
    base = counts["none", 0.0, 1.0, 0]
    assert (base["extracted"], base["reported"], base["by_prefix"]) == (40, 20, {"4": 0, "8": 40})
    assert base["by_group"] == {"16": 10}
    edit = counts["unitmem", 0.05, 0.5, 0]
    assert edit["extracted"] == round(40 * (1 - 4 * 2.0 * 0.05 * 0.5))
    rivals = {c.rival: c for c in found.comparisons if c.by == "unitmem" and c.fraction == 0.05}
    assert set(rivals) == {"random", "matched", EQUAL_QUALITY}
    # matched units are matched with UnitMem's
    assert {c.by for c in found.comparisons if c.rival == "matched"} == {"unitmem"}
    random = [counts["random", 0.05, 0.5, seed]["reported"] for seed in range(5)]
    assert rivals["random"].rival_extracted == pytest.approx(np.mean(random))
    assert rivals["random"].seeds == 5
    assert rivals["random"].difference.value == pytest.approx(edit["reported"] - np.mean(random))
    # unitmem costs 0.025; random units cost about 0.1 x (1 - factor), so a factor near 0.75 costs as much
    assert rivals[EQUAL_QUALITY].rival_factor == pytest.approx(0.75, abs=0.01)
    assert rivals[EQUAL_QUALITY].rival_cost == pytest.approx(0.025)
    assert rivals[EQUAL_QUALITY].reached
    # attribution halves cost 0.0125 and extract least: together with no edit they are the front
    titles = {found.measured[i].row.by for i in found.pareto}
    assert titles == {"none", "attribution"}


def test_the_table_and_the_picture_hold_every_row(tmp_path):
    found = sweep_small(tmp_path)
    write_sweep_table(tmp_path / "sweep.parquet", found)
    table = pyarrow.parquet.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert len(table) == len(plan_rows(SMALL))
    assert [row["pareto"] for row in table] == [i in found.pareto for i in range(len(table))]
    assert table[0]["extracted_prefix_8"] == 40
    assert table[0]["extracted_group_16"] == 10
    assert table[0]["kd-sscd"] == pytest.approx(0.1)
    draw_sweep(tmp_path / "a.png", found, "toy")
    draw_sweep(tmp_path / "b.png", found, "toy")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_the_bootstrap_agrees_with_the_normal_law_over_class_sums():
    rng = np.random.default_rng(3)
    classes = np.repeat(np.arange(60), 5)
    # a class's targets fall together, which an unclustered bootstrap would take for five times the evidence
    lost = np.repeat(rng.random(60) < 0.4, 5)
    before = np.ones(300, dtype=bool)
    found = paired_bootstrap(before & ~lost, before, classes)
    sums = -lost.reshape(60, 5).sum(1)
    error = np.sqrt(60 * sums.var())
    assert found.value == sums.sum()
    assert found.low == pytest.approx(sums.sum() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(sums.sum() + 1.96 * error, abs=0.15 * error)
    assert found.p_value == pytest.approx(2 / 10_001)
    assert paired_bootstrap(before, before, classes).p_value == 1.0


def test_a_difference_over_one_class_has_no_interval_and_says_so():
    both, none = np.array([1.0, 1.0, 0.0]), np.zeros(3)
    sides = {
        ("none", 0.0, 1.0): Side(none[None], np.zeros(1), 1.0),
        ("unitmem", 0.05, 0.5): Side(none[None], np.zeros(1), 0.5),
        ("random", 0.05, 0.5): Side(both[None], np.zeros(1), 0.5),
    }
    (found,) = compare_all(sides, np.zeros(3, np.int64))
    assert found.difference.value == -2.0
    assert np.isnan([found.difference.low, found.difference.high, found.difference.p_value, found.holm]).all()
    table = comparison_table([asdict(found)])
    assert "-2.0 (undefined)" in table
    assert "nan" not in table


def test_the_bootstrap_covers_no_difference_at_its_level():
    inside = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        a, b = rng.random((2, 120)) < 0.5
        found = paired_bootstrap(a, b, np.arange(120) // 3, rounds=500, seed=seed)
        inside.append(found.low <= 0 <= found.high)
    # 200 trials at 95 % have a standard error of 1.5 %, and 40 clusters make the percentile interval a little short
    assert 0.89 < np.mean(inside) < 0.99


def test_means_over_seeds_are_compared_as_they_are():
    classes = np.arange(6)
    found = paired_bootstrap(np.array([1, 1, 0, 0, 1, 0]), np.array([0.5, 1, 0.25, 0, 1, 0.25]), classes, rounds=200)
    assert found.value == pytest.approx(0.0)


def test_seeds_are_drawn_anew_as_classes_are():
    rng = np.random.default_rng(1)
    classes = np.arange(50)
    # seeds that differ by whole tens of targets, which their mean alone would hide
    by_seed = rng.random((4, 50)) < np.array([0.2, 0.4, 0.6, 0.8])[:, None]
    none = np.zeros(50)
    found, as_exact = paired_bootstrap(by_seed, none, classes), paired_bootstrap(by_seed.mean(0), none, classes)
    assert found.value == pytest.approx(by_seed.mean(0).sum())
    assert found.value == pytest.approx(as_exact.value)
    # the mean over 4 seeds has a quarter of their variance, which comes to the variance over classes
    errors = [(d.high - d.low) / (2 * 1.96) for d in (found, as_exact)]
    assert errors[0] ** 2 - errors[1] ** 2 == pytest.approx(by_seed.sum(1).var(ddof=1) / 4, rel=0.25)
    assert paired_bootstrap(by_seed[:1], none, classes) == paired_bootstrap(by_seed[0], none, classes)


@pytest.mark.parametrize(
    ("a", "b", "classes"),
    [
        pytest.param(np.ones(3), np.ones(4), np.arange(3), id="other targets"),
        pytest.param(np.ones(0), np.ones(0), np.arange(0), id="no targets"),
    ],
)
def test_outcomes_of_other_targets_are_refused(a, b, classes):
    with pytest.raises(UsageError, match="expected outcomes of the same targets"):
        paired_bootstrap(a, b, classes)


def literal_holm(p_values: list[float]) -> list[float]:
    """Holm's correction, one hypothesis after the other."""
    corrected, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = floor
    return corrected


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        # Holm 1979's procedure on the textbook example of four tests
        pytest.param([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02], id="four tests"),
        pytest.param([0.5], [0.5], id="one test"),
        pytest.param([0.9, 0.8], [1.0, 1.0], id="never above one"),
        pytest.param([], [], id="none"),
    ],
)
def test_holm_equals_the_known_results(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)
    assert holm(p_values) == pytest.approx(literal_holm(p_values))


FLAT = [np.full(4, share) for share in (1.0, 0.5, 0.25)]


@pytest.mark.parametrize(
    ("cost", "costs", "factor", "extracted", "reached"),
    [
        pytest.param(0.1, (0.0, 0.2, 0.4), 0.75, 0.75, True, id="between no edit and the first"),
        pytest.param(0.3, (0.0, 0.2, 0.4), 0.25, 0.375, True, id="between the first and the last"),
        pytest.param(0.2, (0.0, 0.2, 0.4), 0.5, 0.5, True, id="at a measured factor"),
        pytest.param(0.0, (0.0, 0.2, 0.4), 1.0, 1.0, True, id="an edit that costs nothing"),
        pytest.param(-0.1, (0.0, 0.2, 0.4), 1.0, 1.0, True, id="an edit that gains"),
        pytest.param(0.5, (0.0, 0.2, 0.4), 0.0, 0.25, False, id="more than random units can cost"),
        # noise lets the stronger edit look cheaper: both are taken for 0.3
        pytest.param(0.15, (0.0, 0.4, 0.2), 0.75, 0.75, True, id="costs that are made monotone"),
        pytest.param(0.1, (0.0, -0.2, 0.4), 0.375, 0.4375, True, id="an edit that seems to gain costs nothing"),
    ],
)
def test_random_units_are_tuned_to_an_equal_cost(cost, costs, factor, extracted, reached):
    found = equal_quality(cost, [1.0, 0.5, 0.0], costs, FLAT)
    assert found.factor == pytest.approx(factor)
    np.testing.assert_allclose(found.extracted, np.full(4, extracted))
    assert found.reached == reached
    assert found.cost == pytest.approx(min(max(cost, 0.0), max(costs) if not reached else cost if cost > 0 else 0.0))


def outcomes(share: float, costs: list[float], targets: int = 60, rng_seed: int = 0) -> Outcomes:
    """As many seeds as costs, each of which extracts the same share of the targets."""
    rng = np.random.default_rng(rng_seed)
    found = np.stack([rng.permutation(targets) < round(share * targets) for _ in costs])
    return Outcomes(found, np.array(costs))


def test_what_is_extracted_at_equal_quality_is_as_uncertain_as_the_cost():
    classes, factors = np.arange(60), [1.0, 0.5, 0.0]
    edit = outcomes(0.25, [0.2])
    sure = [outcomes(1.0, [0.0] * 3), outcomes(0.5, [0.2] * 3, rng_seed=1), outcomes(0.0, [0.4] * 3)]
    found = equal_quality_bootstrap(edit, factors, sure, classes)
    # at the cost of the factor 0.5, where half of 60 are extracted for a quarter
    assert found.value == pytest.approx(-15)
    plain = paired_bootstrap(edit.extracted, sure[1].extracted, classes)
    assert (found.low, found.high) == (pytest.approx(plain.low, abs=1), pytest.approx(plain.high, abs=1))
    # where the unedited model's cost varies by 0.1 from seed to seed, so does that of an edit with one
    unsure = [outcomes(1.0, [-0.1, 0.0, 0.1]), *sure[1:]]
    wide = equal_quality_bootstrap(edit, factors, unsure, classes)
    assert wide.value == found.value
    # from all to none over costs of 0.4: 0.1 of cost are 15 targets
    assert (wide.high - wide.low) / (2 * 1.96) == pytest.approx(15, rel=0.25)


def test_the_interval_at_equal_quality_covers_no_difference_at_its_level():
    inside, factors = [], [1.0, 0.5, 0.0]
    for trial in range(60):
        rng = np.random.default_rng(trial)

        def noisy(share: float, cost: float, seeds: int, rng: np.random.Generator = rng) -> Outcomes:
            return Outcomes(rng.random((seeds, 90)) < share, cost + 0.05 * rng.standard_normal(seeds))

        # the edit is itself random units of the factor 0.5
        grid = [noisy(1.0, 0.0, 20), noisy(0.5, 0.2, 10), noisy(0.0, 0.4, 10)]
        found = equal_quality_bootstrap(noisy(0.5, 0.2, 3), factors, grid, np.arange(90) // 2, rounds=300, seed=trial)
        inside.append(found.low <= 0 <= found.high)
    assert np.mean(inside) > 0.85


def test_factors_that_do_not_fall_from_one_are_refused():
    with pytest.raises(UsageError, match=r"factors that fall from 1, got factors \[0.5, 0.0\]"):
        equal_quality(0.1, [0.5, 0.0], [0.1, 0.2], FLAT[:2])


def test_the_front_is_what_no_row_beats():
    rng = np.random.default_rng(0)
    extracted, costs = rng.integers(0, 20, 60), rng.integers(0, 20, 60) / 7
    front = pareto_front(extracted, costs)
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)

    def beaten(i: int) -> bool:
        better = (extracted <= extracted[i]) & (costs <= costs[i])
        return bool((better & ((extracted < extracted[i]) | (costs < costs[i]))).any())

    unbeaten = {(extracted[i], costs[i]) for i in range(60) if not beaten(i)}
    assert {(extracted[i], costs[i]) for i in front} == unbeaten
    assert len(front) == len(unbeaten)


def test_the_search_finds_the_smallest_fraction_and_measures_only_its_quality(tmp_path):
    bench = FakeBench()
    plain, best = Row("unitmem", 0.0, 0.5), Row("attribution", 0.0, 0.5)
    rows = [plain, best, Row("lowest", 0.0, 0.5)]
    advanced = []
    found = search(Table(tmp_path, bench), target_set(), 0.5, "kd-sscd", rows, Reporter(advance=advanced.append))
    # targets fall by 4 x strength x fraction x 0.5: half of them are gone at 1/8 and 1/16
    assert [(r.row.by, r.row.fraction) for r in found] == [("attribution", 0.07), ("unitmem", 0.15)]
    assert found[0].cost == pytest.approx(0.5 * 0.07 * 0.5)
    assert all(r.reduction >= 0.5 for r in found)
    assert found[0].seen_reduction == pytest.approx(1 - round(40 * (1 - 4 * 4 * 0.07 * 0.5)) / 40, abs=0.06)
    assert {row for row in bench.sampled if not row.seed} == {NO_EDIT, *(r.row for r in found)}
    # three seeds to search by and others to confirm by, of no edit and of two edits
    assert len(bench.sampled) == 3 * (3 + FRESH_SEEDS)
    attacks, qualities = most_work(rows)
    assert len(bench.attacked) <= 1 + 4 * len(rows) <= attacks
    assert len(bench.sampled) <= qualities
    assert sum(advanced) == len(rows) + CONFIRMED
    assert all(r.fraction in (0.0, *LADDER) for r in bench.attacked)
    assert plain_halving(found) is found[1]
    assert plain_halving(found[:1]) is None
    record = found[0].record()
    assert (record["by"], record["fraction"]) == ("attribution", 0.07)


def test_the_cheapest_edits_are_stated_by_samples_that_they_were_not_chosen_by(tmp_path):
    rows = [Row("unitmem", 0.0, 0.5), Row("random", 0.0, 0.5)]
    rows += [Row("attribution", 0.0, factor) for factor in (0.5, 0.25, 0.0)]
    # by later samples every edit costs twice what it cost while it was searched
    found = search(Table(tmp_path, FakeBench(later_price=2.0)), target_set(), 0.5, "kd-sscd", rows)
    plain = plain_halving(found)
    assert len(found) == 5
    assert all(r.confirmation.seeds == FRESH_SEEDS for r in found)
    for r in found:
        if not r.row.drawn:
            assert r.confirmation.cost.value == pytest.approx(2 * r.cost)
    assert plain.confirmation.beside_plain is plain.confirmation.beside_half is None
    cheap = next(r for r in found if r.row.factor == 0.5 and r.row.by == "attribution")
    # 0.07 of the units at half the price, beside 0.15 of them
    assert cheap.confirmation.beside_plain.value == pytest.approx(2 * (0.5 * 0.07 - 0.15) * 0.5)
    assert cheap.confirmation.beside_half.value == pytest.approx(2 * (0.5 * 0.07 - 0.15 / 2) * 0.5)
    assert {r.row.by for r in found if beats(r)} == {"attribution"}
    assert beats(cheap)
    assert not beats(plain)
    # what is not sure after the correction is not said
    assert not beats(replace(cheap, confirmation=replace(cheap.confirmation, holm=0.06)))
    assert not beats(replace(cheap, confirmation=None))
    assert cheap.record()["confirmation"]["cost"]["value"] == cheap.confirmation.cost.value


def test_edits_beside_no_halving_by_unitmem_are_confirmed_alone(tmp_path):
    found = search(Table(tmp_path, FakeBench()), target_set(), 0.5, "kd-sscd", [Row("attribution", 0.0, 0.5)])
    assert found[0].confirmation.cost.value == pytest.approx(found[0].cost)
    assert found[0].confirmation.beside_plain is None
    assert search(Table(tmp_path, FakeBench()), target_set(), 0.5, "kd-sscd", [Row("lowest", 0.0, 0.5)]) == []


def test_an_estimate_has_the_interval_of_students_t():
    found = Estimate.of([1.0, 2.0, 3.0, 6.0])
    assert found.p_value == pytest.approx(ttest_1samp([1.0, 2.0, 3.0, 6.0], 0.0).pvalue)
    assert (Estimate.of([2.0, 2.0]).p_value, Estimate.of([0.0, 0.0]).p_value) == (0.0, 1.0)
    assert json.loads(as_json_text(asdict(Estimate.of([2.0])))) == {
        "value": 2.0,
        "low": None,
        "high": None,
        "p_value": None,
    }
    # 2.160 standard deviations of 4 values; 3.182 is the 97.5 % point of t with 3 degrees of freedom
    assert found.value == 3.0
    assert found.high - found.value == pytest.approx(3.182446 * 2.160247 / 2, rel=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_the_search_goes_on_past_a_selection_that_cannot_be_made(tmp_path):
    rows = [Row("unitmem", 0.0, 0.5), Row("matched", 0.0, 0.5)]
    found = search(Table(tmp_path, FakeBench(missing="matched")), target_set(), 0.5, "kd-sscd", rows)
    assert [r.row.by for r in found] == ["unitmem"]


def test_a_search_for_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected a reduction above 0"):
        search(Table(tmp_path, FakeBench()), target_set(), 1.5, "kd-sscd", [])
    nothing = replace(target_set(), threshold=0.95)
    with pytest.raises(UsageError, match="got 0 and 0 of them"):
        search(Table(tmp_path, FakeBench()), nothing, 0.5, "kd-sscd", [])


def test_the_time_that_is_told_is_of_the_rows_that_are_left(tmp_path):
    plans: list[SweepPlan] = []
    rows = plan_rows(SMALL)
    table = Table(tmp_path, FakeBench())
    first = Measured(NO_EDIT, np.zeros((2, TARGETS), np.float32), {"kd-sscd": 0.0}, 0, 2.0)
    first.save(table.file(NO_EDIT))
    measure_rows(table, rows, Reporter(planned=plans.append))
    assert plans == [SweepPlan(len(rows), 1, 2.0 * (len(rows) - 1))]


def test_a_search_goes_through_the_selections_that_are_named():
    from fastmem.sweep.search import PLAIN, RANDOM

    assert recipes(["lowest"]) == [PLAIN, RANDOM]
    named = recipes(["attribution"])
    assert {row.by for row in named} == {"unitmem", "random", "attribution"}
    assert [row for row in recipes() if row in named] == named
    assert any(row.rounds == 2 for row in named)
    assert not any(row.rounds == 2 for row in recipes(["unitmem", "gap"]))
