"""Running statistics against a slow literal version, and the laws of merging."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch

from fastmem import InputFileError, UnitStats, UsageError
from fastmem.stats import StatsBuilder
from fastmem.stats.accumulators import Largest
from tests.stats.conftest import CASES, SEGMENTS, SHAPE, build, literal_contrast, make_data, take


@pytest.mark.parametrize("data", CASES.values(), ids=CASES)
def test_statistics_equal_the_literal_definition(data):
    stats = build(data)
    responses = data["responses"].astype(np.float64)
    image = responses.mean(1).astype(np.float32).astype(np.float64)
    assert stats.count == len(image)
    np.testing.assert_allclose(stats.mean, image.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.var, image.var(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(stats.view_var, responses.var(1).mean(0), rtol=1e-9, atol=1e-12)
    labels = np.unique(data["labels"])
    assert stats.class_ids.tolist() == labels.tolist()
    per_class = [image[data["labels"] == label] for label in labels]
    assert stats.class_count.tolist() == [len(values) for values in per_class]
    class_mean = np.stack([values.mean(0) for values in per_class])
    np.testing.assert_allclose(stats.class_mean, class_mean, rtol=1e-12)
    np.testing.assert_allclose(stats.class_var, [values.var(0) for values in per_class], rtol=1e-9, atol=1e-12)
    expected = {
        "unitmem": (stats.unitmem, literal_contrast(image), len(image)),
        "class-selectivity": (stats.class_selectivity, literal_contrast(class_mean), len(labels)),
        "within-class": (
            stats.within_class_unitmem,
            np.max([literal_contrast(values) for values in per_class], axis=0),
            max(map(len, per_class)),
        ),
    }
    assert stats.undefined.keys() == {name for name, (_, _, count) in expected.items() if count < 2}
    for name, (score, values, count) in expected.items():
        if count < 2:
            # the mean of all others does not exist
            with pytest.raises(UsageError, match=stats.undefined[name]):
                score()
        else:
            np.testing.assert_allclose(score(), values, atol=1e-12)


@pytest.mark.parametrize("data", CASES.values(), ids=CASES)
def test_largest_responses_are_ordered_by_value_then_by_id(data):
    stats = build(data)
    image = data["responses"].astype(np.float64).mean(1).astype(np.float32)
    for index in np.ndindex(*SHAPE):
        expected = sorted(zip(-image[(slice(None), *index)], data["ids"], strict=True))[: stats.k]
        padded = [(-value, i) for value, i in expected] + [(-np.inf, -1)] * (stats.k - len(expected))
        found = zip(stats.top_value[index].tolist(), stats.top_image[index].tolist(), strict=True)
        assert list(found) == [(float(value), int(i)) for value, i in padded]


def assert_same(found: UnitStats, expected: UnitStats, rtol: float) -> None:
    """Equal counts, maxima and ids; means and variances to ``rtol``."""
    assert found.count == expected.count
    assert found.class_counts == expected.class_counts
    assert torch.equal(found.top_value, expected.top_value)
    assert torch.equal(found.top_image, expected.top_image)
    for name in ("mean", "class_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=0)
    for name in ("var", "view_var", "class_var"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e3 * rtol, atol=rtol)
    for name in ("unitmem", "class_selectivity", "within_class_unitmem"):
        torch.testing.assert_close(getattr(found, name)(), getattr(expected, name)(), rtol=0, atol=1e3 * rtol)


SPLITS = {
    "by class": lambda data: data["labels"] % 2 == 0,
    "across classes": lambda data: np.arange(len(data["ids"])) % 3 == 0,
    "a part of one": lambda data: np.arange(len(data["ids"])) == 5,
}


@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_merging_any_split_in_any_order_equals_one_pass(kind, split):
    data = make_data(41, 4, kind=kind)
    mask = split(data)
    one, other = build(take(data, mask)), build(take(data, ~mask))
    whole = build(data)
    for merged in (one.merge(other), other.merge(one)):
        assert_same(merged, whole, 1e-12)
        for mine, theirs in zip(merged.folds, whole.folds, strict=True):
            assert_same(mine, theirs, 1e-12)


def test_merging_an_empty_part_changes_nothing():
    data = make_data(20, 3)
    whole, empty = build(data), StatsBuilder(SHAPE, SEGMENTS, ("class",)).finish({"model": "test"})
    for merged in (whole.merge(empty), empty.merge(whole)):
        assert_same(merged, whole, 0)
    assert empty.count == 0
    with pytest.raises(UsageError, match="at least two images for UnitMem, got 0"):
        empty.unitmem()


def test_folds_merge_to_the_whole_bit_for_bit():
    stats = build(make_data(53, 4))
    assert [fold.count for fold in stats.folds] == [14, 13, 13, 13]
    assert_same(reduce(UnitStats.merge, stats.folds), stats, 0)


def test_batches_and_work_units_do_not_change_the_statistics():
    data = make_data(37, 3)
    assert_same(build(data, batch=1), build(data, batch=37), 1e-12)


def of_run(stats: UnitStats, run: str) -> UnitStats:
    """The statistics as those of the training images of a run, fold by fold."""
    origin = {"model": "test", "run": run, "set": "train"}
    return replace(stats, origin=origin, parts=tuple(replace(fold, origin=origin) for fold in stats.parts))


def test_statistics_of_a_run_can_be_saved_elsewhere_with_their_class_rows(tmp_path):
    stats = of_run(build(make_data(30, 4)), "aaaa")
    stats.save(tmp_path / "one.safetensors")
    UnitStats.load(tmp_path / "one.safetensors").save(tmp_path / "two.safetensors")
    loaded = UnitStats.load(tmp_path / "two.safetensors", {"run": "aaaa", "set": "train"})
    assert torch.equal(loaded.class_mean, stats.class_mean)


def test_class_rows_of_another_run_are_refused(tmp_path):
    for run in ("aaaa", "bbbb"):
        of_run(build(make_data(30, 4)), run).save(tmp_path / f"{run}.safetensors")
    for row in (tmp_path / "bbbb.classes").iterdir():
        shutil.copy(row, tmp_path / "aaaa.classes")
    with pytest.raises(InputFileError, match="expected run aaaa .*got bbbb"):
        UnitStats.load(tmp_path / "aaaa.safetensors").class_mean  # noqa: B018 - the property raises


def test_statistics_of_two_runs_merge_to_those_of_none(tmp_path):
    one, two = (of_run(build(make_data(30, 4)), run) for run in ("aaaa", "bbbb"))
    assert one.merge(one).origin == one.origin
    merged = one.merge(two)
    assert merged.origin == {"model": "test"}
    merged.save(tmp_path / "merged.safetensors")
    assert len(UnitStats.load(tmp_path / "merged.safetensors").class_mean) == 4


@pytest.mark.parametrize("rows", ["memory", "files", "dropped"])
def test_saved_statistics_load_to_the_same_bits(tmp_path, rows):
    path = tmp_path / "train.safetensors"
    folder = tmp_path / "train.classes" if rows == "files" else None
    stats = build(make_data(30, 4), rows_in=folder, keep_rows=rows != "dropped")
    stats.save(path)
    loaded = UnitStats.load(path)
    assert loaded.origin == {"model": "test"}
    assert (loaded.segments, loaded.class_only) == (SEGMENTS, ("class",))
    for mine, theirs in zip((loaded, *loaded.folds), (stats, *stats.folds), strict=True):
        assert torch.equal(mine.mean, theirs.mean)
        assert torch.equal(mine.top_image, theirs.top_image)
        assert torch.equal(mine.within_class_unitmem(), theirs.within_class_unitmem())
        assert torch.equal(mine.class_selectivity(), theirs.class_selectivity())
        if rows != "dropped":
            assert torch.equal(mine.class_mean, theirs.class_mean)
    again = tmp_path / "again" / "train.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    for row in (tmp_path / "train.classes").glob("*"):
        assert (again.parent / "train.classes" / row.name).read_bytes() == row.read_bytes()


def test_without_class_rows_the_class_scores_are_the_same_and_the_rows_are_refused():
    data = make_data(30, 4)
    kept, dropped = build(data), build(data, keep_rows=False)
    torch.testing.assert_close(dropped.class_selectivity(), kept.class_selectivity(), rtol=0, atol=1e-12)
    torch.testing.assert_close(dropped.within_class_unitmem(), kept.within_class_unitmem(), rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="--class-rows keep"):
        dropped.class_mean  # noqa: B018 - the property raises
    mask = data["labels"] == 3
    merged = build(take(data, mask), keep_rows=False).merge(build(take(data, ~mask), keep_rows=False))
    torch.testing.assert_close(merged.class_selectivity(), kept.class_selectivity(), rtol=0, atol=1e-12)
    # a class on both sides cannot be put together without rows
    half = np.arange(30) % 2 == 0
    overlapping = build(take(data, half), keep_rows=False).merge(build(take(data, ~half), keep_rows=False))
    torch.testing.assert_close(overlapping.unitmem(), kept.unitmem(), rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="class rows"):
        overlapping.class_selectivity()


def test_a_builder_goes_on_from_its_saved_state(tmp_path):
    data = make_data(30, 3)
    expected = build(data, rows_in=tmp_path / "whole")
    order = np.arange(30)
    first = StatsBuilder(SHAPE, SEGMENTS, ("class",), True, tmp_path / "parts")

    def feed(builder: StatsBuilder, rows: np.ndarray) -> None:
        for row in rows:
            unit = builder.zero_unit()
            fold = data["folds"][row]
            found, ids = torch.from_numpy(data["responses"][[row]]), torch.from_numpy(data["ids"][[row]])
            unit[fold] = unit[fold].update(found, ids)
            builder.update(int(data["labels"][row]), unit)

    feed(first, order[:13])
    tensors, header = first.state()
    second = StatsBuilder(SHAPE, SEGMENTS, ("class",), True, tmp_path / "parts")
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, header)
    feed(second, order[13:])
    assert_same(second.finish({"model": "test"}), expected, 1e-12)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_any_number_of_largest_responses_is_kept(k):
    values = torch.tensor([3.0, 5.0, 5.0, 1.0])[:, None, None, None]
    ids = torch.tensor([4, 9, 2, 7])
    kept = Largest.zero((1, 1, 1), k).update(values, ids)
    expected = [(5.0, 2), (5.0, 9), (3.0, 4), (1.0, 7)][:k] + [(-torch.inf, -1)] * max(0, k - 4)
    assert list(zip(kept.value[0, 0, 0].tolist(), kept.image[0, 0, 0].tolist(), strict=True)) == expected


def test_statistics_of_other_settings_do_not_merge():
    data = make_data(10, 2)
    stats = build(data)
    other_model = StatsBuilder(SHAPE, SEGMENTS, ("class",)).finish({"model": "another"})
    other_shape = StatsBuilder((1, 2, 3), SEGMENTS, ("class",)).finish({"model": "test"})
    other_segments = StatsBuilder(SHAPE, ("last", "image"), ()).finish({"model": "test"})
    for other, what in ((other_model, "model"), (other_shape, "shape"), (other_segments, "segments")):
        with pytest.raises(UsageError, match=f"statistics of equal {what}"):
            stats.merge(other)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "train.safetensors"
    with pytest.raises(InputFileError, match="got none"):
        UnitStats.load(path)
    build(make_data(10, 2)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputFileError, match="damaged"):
        UnitStats.load(path)
    path.write_bytes(next((tmp_path / "train.classes").iterdir()).read_bytes())
    with pytest.raises(InputFileError, match=r"expected a fastmem.unit-stats/2 document"):
        UnitStats.load(path)


def test_renamed_class_rows_are_noticed(tmp_path):
    path = tmp_path / "train.safetensors"
    build(make_data(20, 3)).save(path)
    first, second, *_ = sorted((tmp_path / "train.classes").iterdir())
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputFileError, match="were the files renamed"):
        UnitStats.load(path).class_mean  # noqa: B018 - the property raises
