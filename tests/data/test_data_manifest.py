"""The manifest: order, draws, folds, work units, and what is saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from fastmem.data.manifest import FOLDS, Manifest, WorkUnit
from fastmem.data.sources import ArraySource, image_ids
from fastmem.errors import InputFileError, UsageError


def source_of(counts: dict[int, int], shuffle: int = 0, classes: list[str] | None = None) -> ArraySource:
    """Images whose ids depend on (label, number in the class) alone, in a shuffled order."""
    pairs = [(label, number) for label, count in counts.items() for number in range(count)]
    order = np.random.default_rng(shuffle).permutation(len(pairs))
    ids = image_ids([f"{label}/{number}" for label, number in pairs])[order]
    labels = np.array([label for label, _ in pairs])[order]
    return ArraySource(np.zeros((len(pairs), 1, 1, 3), np.uint8), labels, ids, classes)


UNEVEN = {0: 63, 2: 1, 3: 500, 4: 2, 7: 5, 8: 130}


def test_images_are_ordered_by_label_and_id() -> None:
    source = source_of(UNEVEN)
    manifest = Manifest.build(source)
    assert len(manifest) == len(source)
    assert manifest.labels.tolist() == sorted(source.labels.tolist())
    for label in UNEVEN:
        assert np.all(np.diff(manifest.ids[manifest.labels == label]) > 0)
    assert np.array_equal(source.ids[manifest.index], manifest.ids)
    assert np.array_equal(source.labels[manifest.index], manifest.labels)
    assert list(source.names[manifest.index]) == list(manifest.names)
    dtypes = (manifest.ids.dtype, manifest.labels.dtype, manifest.index.dtype, manifest.fold.dtype)
    assert dtypes == (np.int64, np.int64, np.int64, np.int8)


def test_the_manifest_does_not_depend_on_the_order_of_the_source() -> None:
    one, other = (Manifest.build(source_of(UNEVEN, shuffle), per_class=50, seed=3) for shuffle in (1, 2))
    assert one.hash == other.hash
    assert np.array_equal(one.ids, other.ids)


@pytest.mark.parametrize("per_class", [None, 1, 3, 63, 500])
@pytest.mark.parametrize("seed", [0, 1, -5, 2**64 + 7])
def test_folds_are_even_in_total_and_in_every_class(per_class: int | None, seed: int) -> None:
    manifest = Manifest.build(source_of(UNEVEN), per_class, seed)
    assert np.ptp(np.bincount(manifest.fold, minlength=FOLDS)) <= 1
    for label in UNEVEN:
        sizes = np.bincount(manifest.fold[manifest.labels == label], minlength=FOLDS)
        assert len(sizes) == FOLDS
        assert np.ptp(sizes) <= 1


@pytest.mark.parametrize("per_class", [1, 2, 63, 64])
def test_a_draw_takes_as_many_of_each_class_as_there_are(per_class: int) -> None:
    manifest = Manifest.build(source_of(UNEVEN), per_class)
    counts = np.bincount(manifest.labels)
    assert {label: counts[label] for label in UNEVEN} == {label: min(n, per_class) for label, n in UNEVEN.items()}


def test_a_draw_depends_on_the_class_alone() -> None:
    whole = Manifest.build(source_of(UNEVEN), per_class=20)
    alone = Manifest.build(source_of({3: 500}), per_class=20)
    assert np.array_equal(whole.ids[whole.labels == 3], alone.ids)


def test_a_larger_draw_holds_the_smaller_one() -> None:
    small, large = (Manifest.build(source_of(UNEVEN), per_class=count) for count in (10, 20))
    assert set(small.ids.tolist()) < set(large.ids.tolist())


def test_seeds_change_draw_and_folds() -> None:
    source = source_of({0: 400})
    one, other = (Manifest.build(source, seed=seed) for seed in (0, 1))
    assert np.array_equal(one.ids, other.ids)
    assert abs(np.mean(one.fold == other.fold) - 0.25) < 0.1
    drawn = [set(Manifest.build(source, 100, seed).ids.tolist()) for seed in (0, 1)]
    assert 5 < len(drawn[0] & drawn[1]) < 50


def test_draw_and_folds_never_change() -> None:
    manifest = Manifest.build(source_of(UNEVEN), per_class=9, seed=1)
    assert manifest.hash == "b5f2093f9c832fe85cbbd1fda1c8ce4fb05f50864553a4be4485b6e990f89dae"


@pytest.mark.parametrize("part", ["ids", "labels", "fold"])
def test_the_hash_covers_ids_labels_and_folds(part: str) -> None:
    manifest = Manifest.build(source_of(UNEVEN))
    before = manifest.hash
    columns = {name: getattr(manifest, name) for name in ("ids", "labels", "index", "fold", "names", "classes")}
    columns[part] = columns[part].copy()
    columns[part][5] += 1
    assert Manifest(**columns).hash != before


@pytest.mark.parametrize("max_images", [None, 1, 63, 64, 10_000])
def test_work_units_hold_one_class_each_and_cover_everything(max_images: int | None) -> None:
    manifest = Manifest.build(source_of(UNEVEN))
    units = manifest.work_units(max_images)
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == len(manifest)
    for unit in units:
        assert set(manifest.labels[unit.start : unit.stop].tolist()) == {unit.label}
        assert 0 < unit.stop - unit.start <= (max_images or len(manifest))


def test_work_units_are_full_but_for_the_last_of_a_class() -> None:
    units = Manifest.build(source_of({0: 5, 1: 2})).work_units(max_images=2)
    assert units == [WorkUnit(0, 0, 2), WorkUnit(0, 2, 4), WorkUnit(0, 4, 5), WorkUnit(1, 5, 7)]


def test_counts_below_one_are_refused() -> None:
    source = source_of({0: 1})
    with pytest.raises(UsageError, match="at least 1 image per class, got 0"):
        Manifest.build(source, per_class=0)
    with pytest.raises(UsageError, match="at least 1 image in a work unit, got 0"):
        Manifest.build(source).work_units(max_images=0)


def test_a_saved_manifest_comes_back(tmp_path: Path) -> None:
    source = source_of(UNEVEN)
    manifest = Manifest.build(source, per_class=7)
    manifest.save(tmp_path / "manifest.parquet")
    loaded = Manifest.load(tmp_path / "manifest.parquet", source)
    for name in ("ids", "labels", "index", "fold", "names"):
        assert np.array_equal(getattr(loaded, name), getattr(manifest, name)), name
        assert getattr(loaded, name).dtype == getattr(manifest, name).dtype, name
    assert (loaded.classes, loaded.hash) == (manifest.classes, manifest.hash)
    assert Manifest.load(tmp_path / "manifest.parquet").index.tolist() == [-1] * len(manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.parquet"]


def test_a_saved_manifest_is_a_plain_table(tmp_path: Path) -> None:
    Manifest.build(source_of({0: 2, 2: 1}, classes=["ant", "bee", "cat"])).save(tmp_path / "manifest.parquet")
    table = parquet.read_table(tmp_path / "manifest.parquet")
    assert table.column_names == ["id", "class", "label", "name", "fold"]
    assert table["class"].to_pylist() == ["ant", "ant", "cat"]
    assert table["label"].to_pylist() == [0, 0, 2]


def test_images_are_found_again_wherever_they_are_listed(tmp_path: Path) -> None:
    manifest = Manifest.build(source_of(UNEVEN, shuffle=1), per_class=7)
    manifest.save(tmp_path / "manifest.parquet")
    other = source_of(UNEVEN | {9: 40}, shuffle=2)
    loaded = Manifest.load(tmp_path / "manifest.parquet", other)
    assert np.array_equal(other.ids[loaded.index], manifest.ids)


@pytest.mark.parametrize(
    ("counts", "move", "message"),
    [
        pytest.param({0: 2}, 0, "got 1 that are not there", id="image missing"),
        pytest.param({0: 3}, 1, "expected label 0 for 0/.* got 1 in array", id="label moved"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(counts: dict, move: int, message: str, tmp_path: Path) -> None:
    Manifest.build(source_of({0: 3})).save(tmp_path / "manifest.parquet")
    source = source_of(counts)
    source.labels = source.labels + move
    with pytest.raises(UsageError, match=message):
        Manifest.load(tmp_path / "manifest.parquet", source)


def change_a_label(path: Path) -> None:
    table = parquet.read_table(path)
    labels = table["label"].to_numpy().copy()
    labels[0] += 1
    parquet.write_table(table.set_column(2, "label", pyarrow.array(labels)), path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-100]), id="cut off"),
        pytest.param(lambda path: path.write_text("id,label"), id="another format"),
        pytest.param(lambda path: parquet.write_table(pyarrow.table({"id": [1]}), path), id="another table"),
        pytest.param(change_a_label, id="changed"),
    ],
)
def test_a_file_that_is_no_manifest_is_an_input_error(damage, tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    Manifest.build(source_of({0: 3})).save(path)
    damage(path)
    with pytest.raises(InputFileError, match="expected a manifest"):
        Manifest.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.parquet"
    Manifest.build(source_of({0: 3})).save(path)
    before = path.read_bytes()

    def full(table: pyarrow.Table, place: Path, **options: bool) -> None:
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(UsageError, match="No space"):
        Manifest.build(source_of({0: 4})).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
