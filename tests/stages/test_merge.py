"""Shards of a job, and runs over different images, make one run: as one that was scored in one piece."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmem
from fastmem import ArraySource, FolderSource, InputFileError, UnitStats, UsageError, open_run
from fastmem.data.manifest import Manifest
from fastmem.scoring.shard import Shard
from tests.conftest import exit_code, folder_bytes, make_toy_model, random_images, run, write_folder
from tests.scoring.test_crash_points import Crash, crash_at

LABELS = np.array([0] * 7 + [1] * 3 + [2] * 5 + [3] * 8)
HELDOUT = np.array([0] * 4 + [1] * 5 + [3] * 8)
OPTIONS = {"views": 2, "check_classes": False, "per_image": True, "pictures": False, "workers": 0}


def images(part: slice | np.ndarray = slice(None)) -> ArraySource:
    """Training images of 4 classes, or a part of them; the held-out set has none of class 2."""
    return ArraySource(random_images(23, 16)[part], LABELS[part], ids=np.arange(100, 123)[part])


def heldout(part: slice | np.ndarray = slice(None)) -> ArraySource:
    return ArraySource(random_images(17, 16, seed=5)[part], HELDOUT[part], ids=np.arange(17)[part])


@pytest.fixture(scope="module")
def model():
    return make_toy_model()


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> Path:
    """The runs of a job: whole, three shards of it, and the merged ones."""
    place = tmp_path_factory.mktemp("job")
    fastmem.score(model, images(), heldout=heldout(), out=place / "whole", **OPTIONS)
    for i in (1, 2, 3):
        fastmem.score(model, images(), heldout=heldout(), out=place / f"part-{i}", shard=(i, 3), **OPTIONS)
    fastmem.merge([place / f"part-{i}" for i in (2, 3, 1)], place / "merged", pictures=False)
    return place


def assert_same_statistics(found: UnitStats, expected: UnitStats) -> None:
    """Counts, maxima and ids are the same; sums are equal to rounding."""
    assert (found.count, found.class_counts, found.origin) == (expected.count, expected.class_counts, expected.origin)
    assert [fold.class_counts for fold in found.folds] == [fold.class_counts for fold in expected.folds]
    for mine, theirs in zip((found, *found.folds), (expected, *expected.folds), strict=True):
        for exact in ("top_value", "top_image"):
            assert torch.equal(getattr(mine, exact), getattr(theirs, exact)), exact
        for near in ("mean", "var", "view_var"):
            torch.testing.assert_close(getattr(mine, near), getattr(theirs, near), rtol=1e-12, atol=1e-12)
    assert (found.rows is None) == (expected.rows is None)
    if found.rows is not None:
        torch.testing.assert_close(found.class_mean, expected.class_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.class_var, expected.class_var, rtol=1e-12, atol=1e-12)
    for score in ("unitmem", "within_class_unitmem", "class_selectivity"):
        torch.testing.assert_close(getattr(found, score)(), getattr(expected, score)(), rtol=0, atol=1e-12)
    assert (found.matched is None) == (expected.matched is None)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_merged_shards_have_the_statistics_of_one_pass(made, split):
    found, expected = (UnitStats.load(made / name / f"{split}.safetensors") for name in ("merged", "whole"))
    assert_same_statistics(found, expected)
    if split == "train":
        assert found.matched.class_counts == {0: 4, 1: 3, 3: 8}
        assert_same_statistics(found.matched, expected.matched)


# sums in another order, and how long it took
ROUNDED = {"train.safetensors", "heldout.safetensors", "units.parquet", "result.json"}


def test_all_other_files_have_the_bytes_of_one_pass(made):
    found, expected = (folder_bytes(made / name) for name in ("merged", "whole"))
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= ROUNDED
    documents = [json.loads(files["result.json"]) for files in (found, expected)]
    own = {"run", "tables", "seconds", "images_per_second"}
    for document in documents:
        document["gap"] = {k: v for k, v in document["gap"].items() if k != "mean"}
    assert {k: v for k, v in documents[0].items() if k not in own} == {
        k: v for k, v in documents[1].items() if k not in own
    }
    assert documents[0]["tables"] == [str(made / "merged" / name) for name in ("units.parquet", "images.parquet")]


def test_the_order_of_runs_changes_no_byte(made, tmp_path):
    # the folder's path is in result.json
    for order in ((1, 2, 3), (3, 1, 2)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        fastmem.merge([made / f"part-{i}" for i in order], tmp_path / "out", pictures=False)
        shutil.copytree(tmp_path / "out", tmp_path / "-".join(map(str, order)))
    assert folder_bytes(tmp_path / "1-2-3") == folder_bytes(tmp_path / "3-1-2")


def test_later_stages_find_in_a_merged_run_what_they_find_in_a_whole_one(made, model, tmp_path):
    found = {}
    for name in ("whole", "merged"):
        folder = shutil.copytree(made / name, tmp_path / name)
        opened = open_run(folder, data=images(), heldout=heldout(), model=model)
        extraction = fastmem.extract(opened, judge="tokens", top_per_class=2)
        edit = fastmem.mitigate(opened, top=0.1, by="gap", name="mine")
        quality = fastmem.evaluate(opened, edit, features="none")
        table = fastmem.sweep(opened, judge="tokens", by=("lowest",), fractions=(0.1,), seeds=1, declared_seeds=1)
        found[name] = (
            extraction.verdicts.to_pydict(),
            list(zip(edit.layer.tolist(), edit.unit.tolist(), strict=True)),
            quality.metrics,
            [(row["by"], row["extracted"], row["metrics"]) for row in table.rows],
        )
    assert found["merged"] == found["whole"]


def test_slices_are_of_whole_classes_and_about_equal():
    manifest = Manifest.build(images())
    parts = [Shard(i, 3).cut({"train": manifest})["train"] for i in (1, 2, 3)]
    assert np.concatenate(parts).tolist() == list(range(23))
    assert [sorted(set(manifest.labels[part].tolist())) for part in parts] == [[0], [1, 2], [3]]
    # few images of many classes still give every slice a class
    uneven = ArraySource(random_images(12, 16), np.array([0] * 9 + [1, 2, 3]))
    parts = [Shard(i, 4).cut({"train": Manifest.build(uneven)})["train"] for i in (1, 2, 3, 4)]
    assert [len(part) for part in parts] == [9, 1, 1, 1]


def test_a_slice_without_held_out_images_of_its_classes_has_no_such_set(made):
    whole = json.loads((made / "part-2" / "run.json").read_text())
    assert whole["shard"]["of"] == 3
    assert whole["shard"]["manifests"].keys() == {"train", "heldout"}
    assert (made / "part-2" / "heldout.safetensors").exists()
    assert Manifest.load(made / "part-2" / "manifest-heldout.parquet").labels.tolist() == [1, 1, 1]


def test_a_class_without_held_out_images_may_be_a_slice_of_its_own(model, tmp_path):
    for i in range(1, 5):
        fastmem.score(model, images(), heldout=heldout(), out=tmp_path / str(i), shard=(i, 4), **OPTIONS)
    assert not (tmp_path / "3" / "heldout.safetensors").exists()
    merged = fastmem.merge([tmp_path / str(i) for i in range(1, 5)], tmp_path / "merged")
    assert merged.train.matched.class_counts == {0: 4, 1: 3, 3: 8} == merged.heldout.class_counts
    assert merged.train.class_mean.shape[0] == 4


@pytest.mark.parametrize("class_rows", ["keep", "drop"])
def test_statistics_of_classes_are_whole_without_class_rows_too(model, tmp_path, class_rows):
    options = {**OPTIONS, "class_rows": class_rows}
    fastmem.score(model, images(), out=tmp_path / "whole", **options)
    for i in (1, 2):
        fastmem.score(model, images(), out=tmp_path / str(i), shard=(i, 2), **options)
    merged = fastmem.merge([tmp_path / "2", tmp_path / "1"], tmp_path / "merged")
    assert_same_statistics(merged.train, UnitStats.load(tmp_path / "whole" / "train.safetensors"))


def part_of(place: Path, model, rows: np.ndarray, others: np.ndarray | None, **changed: object) -> Path:
    fastmem.score(
        model,
        images(rows),
        heldout=None if others is None else heldout(others),
        out=place,
        **{**OPTIONS, **changed},
    )
    return place


def test_runs_over_different_images_merge_although_they_share_classes(model, tmp_path):
    # of the first part all images are matched, of the second only some
    first = np.flatnonzero((np.arange(23) % 2 == 0) & (LABELS == 0))
    second = np.setdiff1d(np.arange(23), first)
    parts = [
        part_of(tmp_path / "a", model, first, np.arange(4)),
        part_of(tmp_path / "b", model, second, np.arange(4, 17)),
    ]
    assert UnitStats.load(tmp_path / "a" / "train.safetensors").matched is None
    merged = fastmem.merge(parts, tmp_path / "merged", pictures=False)
    whole = fastmem.score(model, images(), out=tmp_path / "whole", **OPTIONS).train
    assert merged.train.count == 23
    assert torch.equal(merged.train.top_image, whole.top_image)
    torch.testing.assert_close(merged.train.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.train.class_var, whole.class_var, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged.train.within_class_unitmem(), whole.within_class_unitmem(), rtol=0, atol=1e-12)
    assert merged.train.matched.class_counts == merged.heldout.class_counts
    assert np.isfinite(merged.train_losses.loss).all()
    # the losses stand at the images that they are of
    opened = open_run(tmp_path / "merged", data=images(), heldout=heldout(), model=model)
    alone = open_run(tmp_path / "whole", data=images(), model=model)
    np.testing.assert_allclose(opened.losses().loss, alone.losses().loss, rtol=1e-5)
    with pytest.raises(UsageError, match="expected one place with all images of a merged run, got several"):
        open_run(renamed_places(tmp_path / "merged"), model=model)
    # a merged run can be merged on
    more = ArraySource(random_images(4, 16, seed=9), np.array([0, 0, 4, 4]), ids=np.arange(900, 904))
    with_more = ArraySource(random_images(4, 16, seed=9), np.array([0, 0, 4, 4]), ids=np.arange(800, 804))
    fastmem.score(model, more, heldout=with_more, out=tmp_path / "c", **OPTIONS)
    assert fastmem.merge([tmp_path / "merged", tmp_path / "c"], tmp_path / "d", pictures=False).train.count == 27


def test_runs_of_other_class_orders_do_not_merge(model, tmp_path):
    train = write_folder(tmp_path / "train", random_images(8, 16))
    more = write_folder(tmp_path / "more", random_images(4, 16, seed=1), first=50)
    for name, source in (
        ("a", FolderSource(train)),
        ("b", FolderSource(more, classes=["class-1", "class-0"])),
    ):
        fastmem.score(model, source, out=tmp_path / name, **OPTIONS)
    with pytest.raises(UsageError, match=r"one class order, got class-\d as class 0 in .* and class-\d in"):
        fastmem.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")


def renamed_places(folder: Path) -> Path:
    document = json.loads((folder / "inputs.json").read_text())
    (folder / "inputs.json").write_text(json.dumps(document | {"data": "several"}))
    return folder


def test_runs_that_share_classes_need_class_rows(model, tmp_path):
    rows = np.arange(23) % 2 == 0
    parts = [
        part_of(tmp_path / name, model, np.flatnonzero(half), None, class_rows="drop")
        for name, half in (("a", rows), ("b", ~rows))
    ]
    with pytest.raises(UsageError, match=r"expected class rows .* in .* or .*: score both with --class-rows keep"):
        fastmem.merge(parts, tmp_path / "merged")
    assert not list(tmp_path.glob("*merg*"))


def copy(made: Path, place: Path, name: str) -> Path:
    return shutil.copytree(made / name, place / f"copy-of-{name}")


def change(folder: Path, **entries: object) -> Path:
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def other_shard(made: Path, place: Path, model, **changed: object) -> Sequence[Path]:
    settings = {**OPTIONS, "shard": (2, 3), "heldout": heldout(), **changed}
    source = settings.pop("source", images())
    fastmem.score(model, source, out=place / "other", **settings)
    return [made / "part-1", place / "other", made / "part-3"]


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


Wrong = Callable[[Path, Path, object], Sequence[Path]]
WRONG: dict[str, tuple[Wrong, type[Exception], str]] = {
    "a shard is missing": (
        lambda m, t, _: [m / "part-1", m / "part-3"],
        UsageError,
        r"all 3 shards of the job, got 1/3 in .*part-1 and none of 2",
    ),
    "a shard alone": (lambda m, t, _: [m / "part-2"], UsageError, r"got 2/3 in .*part-2 and none of 1, 3"),
    "a shard twice": (
        lambda m, t, _: [m / "part-1", m / "part-2", copy(m, t, "part-2"), m / "part-3"],
        UsageError,
        r"every shard once, got 2/3 in .*part-2 and .*copy-of-part-2",
    ),
    "a path twice": (
        lambda m, t, _: [m / "part-1", m / "part-1"],
        UsageError,
        r"every shard once, got 1/3 in .*part-1 and .*part-1",
    ),
    "a run twice": (
        lambda m, t, _: [m / "whole", copy(m, t, "whole")],
        UsageError,
        r"every run once, got the same run in .*whole and .*whole",
    ),
    "a shard beside a whole run": (
        lambda m, t, _: [m / "part-1", m / "whole"],
        UsageError,
        r"shards alone or none, got 1/3 in .*part-1 and a run that is no shard in .*whole",
    ),
    "shards of other numbers": (
        lambda m, t, model: other_shard(m, t, model, shard=(2, 2)),
        UsageError,
        r"shards of one job, got 2/2 in .*other and 1/3 in .*part-1",
    ),
    "other images": (
        lambda m, t, model: other_shard(m, t, model, source=images(np.arange(1, 23))),
        UsageError,
        r"shards of the same train images, got \w+ in .*part-1 and \w+ in .*other",
    ),
    "without held-out images": (
        lambda m, t, model: other_shard(m, t, model, heldout=None),
        UsageError,
        r"shards of the same heldout images, got \w+ in .*part-1 and none in .*other",
    ),
    "another setting": (
        lambda m, t, model: other_shard(m, t, model, seed=1),
        UsageError,
        r"runs of equal seed, got 0 in .*part-1 and 1 in .*other",
    ),
    "another view": (
        lambda m, t, model: other_shard(m, t, model, views=3),
        UsageError,
        r"runs of equal recipe, got .*x2 in .*part-1 and .*x3 in .*other",
    ),
    "other weights": (
        lambda m, t, _: [m / "part-1", change(copy(m, t, "part-2"), checkpoint="0" * 64), m / "part-3"],
        InputFileError,
        r"expected run \w+ in .*copy-of-part-2",
    ),
    "unfinished": (
        lambda m, t, _: [m / "part-1", without(copy(m, t, "part-2"), "result.json"), m / "part-3"],
        InputFileError,
        r"finished run in .*copy-of-part-2, got one without result.json",
    ),
    "without statistics": (
        lambda m, t, _: [m / "part-1", without(copy(m, t, "part-2"), "heldout.safetensors"), m / "part-3"],
        InputFileError,
        r"finished run in .*copy-of-part-2, got one without heldout.safetensors",
    ),
    "no run": (lambda m, t, _: [m / "part-1", t], InputFileError, "got no run.json there"),
    "not there": (lambda m, t, _: [m / "part-1", t / "nothing"], InputFileError, "got no run.json there"),
    "one whole run": (lambda m, t, _: [m / "whole"], UsageError, "at least two runs to merge, got 1"),
    "nothing": (lambda m, t, _: [], UsageError, "at least two runs to merge, got 0"),
    "a path in place of a list": (lambda m, t, _: str(m / "whole"), UsageError, "expected a list of runs"),
    "a shard that is text": (
        lambda m, t, _: [m / "part-1", change(copy(m, t, "part-2"), shard="2/3")],
        InputFileError,
        r"expected the number of a shard in .*run.json",
    ),
    "a shard of odd numbers": (
        lambda m, t, _: [m / "part-1", change(copy(m, t, "part-2"), shard={"number": 9, "of": 3, "manifests": {}})],
        InputFileError,
        r"expected the number of a shard in .*run.json",
    ),
    "a set of no name": (
        lambda m, t, _: [m / "whole", change(copy(m, t, "whole"), manifests={"heldout": "0"})],
        InputFileError,
        r"expected the sets train and heldout in .*run.json, got heldout",
    ),
    "the same images in two runs": (
        lambda m, t, model: [m / "whole", part_of(t / "more", model, np.arange(5), np.arange(3))],
        UsageError,
        r"without a train image in common, got .* in .* and ",
    ),
    "runs of other sets": (
        lambda m, t, model: [m / "whole", part_of(t / "more", model, np.arange(5), None)],
        UsageError,
        "expected runs of the same sets, got",
    ),
}


@pytest.mark.parametrize(("make", "kind", "text"), WRONG.values(), ids=WRONG)
def test_runs_that_make_no_run_are_named(made, model, tmp_path, make, kind, text):
    runs = make(made, tmp_path, model)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=text):
        fastmem.merge(runs, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_something_in_it_is_not_merged_into(made, tmp_path):
    runs = [made / f"part-{i}" for i in (1, 2, 3)]
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file", made / "part-1"):
        with pytest.raises(UsageError, match="expected a new folder for the merged run"):
            fastmem.merge(runs, out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert fastmem.merge(runs, tmp_path / "link").train.count == 23
    assert (tmp_path / "empty" / "run.json").exists()
    assert (tmp_path / "link").is_symlink()


def test_a_merge_that_ends_at_a_write_leaves_no_run_and_can_be_made_again(made, tmp_path, monkeypatch):
    parts = [made / f"part-{i}" for i in (1, 2, 3)]
    passed = crash_at(monkeypatch, -1)
    fastmem.merge(parts, tmp_path / "out", pictures=False)
    whole = folder_bytes(tmp_path / "out")
    for number in range(0, len(passed), 7):
        shutil.rmtree(tmp_path / "out")
        crash_at(monkeypatch, number)
        with pytest.raises(Crash):
            fastmem.merge(parts, tmp_path / "out", pictures=False)
        assert list(tmp_path.iterdir()) == []
        crash_at(monkeypatch, -1)
        fastmem.merge(parts, tmp_path / "out", pictures=False)
        assert folder_bytes(tmp_path / "out") == whole
    assert len(passed) > 40


def test_what_a_killed_merge_left_is_cleared(made, tmp_path):
    left = tmp_path / ".out.merging"
    (left / "train.classes").mkdir(parents=True)
    (left / "train.classes" / "class-00009.safetensors").write_text("half")
    (left / "run.json").write_text("{")
    fastmem.merge([made / f"part-{i}" for i in (1, 2, 3)], tmp_path / "out", pictures=False)
    assert folder_bytes(tmp_path / "out").keys() == folder_bytes(made / "merged").keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_merges_shards(made, tmp_path, capsys):
    merged = tmp_path / "merged"
    code, out, err = run(capsys, "merge", made / "part-2", made / "part-1", made / "part-3", "--out", merged, "--json")
    document, whole = json.loads(out), json.loads((made / "whole" / "result.json").read_text())
    assert code == 0
    assert "merging 3 runs of 38 images, about" in err
    assert "no picture of the images behind the highest units: expected the images that were scored" in err
    same = ("model", "images", "heldout_images", "skipped", "undefined", "segments", "views", "membership")
    assert {key: document[key] for key in same} == {key: whole[key] for key in same}
    assert all(Path(path).is_file() for path in (*document["pictures"], *document["tables"]))
    code, out, err = run(capsys, "merge", made / "part-2", "--out", tmp_path / "other")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    code, out, err = run(capsys, "merge", "--out", tmp_path / "other")
    assert code == 2


def test_the_command_scores_a_shard(tmp_path, capsys, monkeypatch):
    asked: list[object] = []

    def stop(*arguments: object, shard: object, **settings: object) -> None:
        asked.append(shard)
        raise UsageError("expected no more")

    monkeypatch.setattr("fastmem.cli.score.score", stop)
    for options in ((), ("--shard", "2/3")):
        assert exit_code("score", "--model", "rar-tiny", "--out", tmp_path / "run", *options) == 2
    assert asked == [None, (2, 3)]


def test_pictures_places_and_skipped_files_are_those_of_one_pass(model, tmp_path):
    train = write_folder(tmp_path / "train", random_images(8, 16))
    (train / "class-1" / "broken.png").write_bytes(b"broken")
    (train / "class-0" / "notes.txt").write_text("not an image")
    fastmem.score(model, FolderSource(train), out=tmp_path / "whole", **{**OPTIONS, "pictures": True})
    for i in (1, 2):
        fastmem.score(model, FolderSource(train), out=tmp_path / str(i), shard=(i, 2), **OPTIONS)
    fastmem.merge([tmp_path / "2", tmp_path / "1"], tmp_path / "merged")
    found, expected = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("merged", "whole"))
    assert found["skipped_images"] == expected["skipped_images"]
    assert len(found["skipped_images"]) == 2
    assert [Path(path).name for path in found["pictures"]] == [Path(path).name for path in expected["pictures"]]
    for name in ("top-images.png", "inputs.json", "run.json", "images.parquet"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_shard_is_resumed_as_what_it_is(model, tmp_path):
    for shard in ((1, 2), (1, 1)):
        out = tmp_path / str(shard[1])
        fastmem.score(model, images(), out=out, shard=shard, **OPTIONS)
        before = (out / "train.safetensors").read_bytes()
        fastmem.score(model, images(), out=out, shard=shard, resume=True, **OPTIONS)
        assert (out / "train.safetensors").read_bytes() == before
        for other in (None, (2, 2)):
            with pytest.raises(UsageError, match="expected the inputs that the run in"):
                fastmem.score(model, images(), out=out, shard=other, resume=True, **OPTIONS)
    # one slice of one is all
    assert fastmem.merge([tmp_path / "1"], tmp_path / "merged", pictures=False).train.count == 23


def test_images_that_have_gone_cost_a_merged_run_only_their_picture(model, tmp_path):
    train = write_folder(tmp_path / "train", random_images(8, 16))
    for i in (1, 2):
        fastmem.score(model, FolderSource(train), out=tmp_path / str(i), shard=(i, 2), **OPTIONS)
    shutil.rmtree(train)
    notes: list[str] = []
    merged = fastmem.merge(
        [tmp_path / "1", tmp_path / "2"], tmp_path / "merged", reporter=fastmem.Reporter(note=notes.append)
    )
    assert [Path(path).name for path in merged.document["pictures"]] == ["unitmem-by-block.png"]
    assert "no picture of the images" in notes[0]


def test_a_slice_of_which_no_image_can_be_read_is_a_slice_still(model, tmp_path):
    train = write_folder(tmp_path / "train", random_images(9, 16), classes=3)
    for file in (train / "class-1").iterdir():
        file.write_bytes(b"broken")
    source = FolderSource(train)
    whole = fastmem.score(model, source, out=tmp_path / "whole", **OPTIONS)
    for i in (1, 2, 3):
        fastmem.score(model, source, out=tmp_path / str(i), shard=(i, 3), **OPTIONS)
    merged = fastmem.merge([tmp_path / str(i) for i in (1, 2, 3)], tmp_path / "merged", pictures=False)
    assert_same_statistics(merged.train, UnitStats.load(tmp_path / "whole" / "train.safetensors"))
    assert (merged.train.count, merged.skipped) == (6, whole.skipped)
    with pytest.raises(UsageError, match="all 3 shards"):
        fastmem.merge([tmp_path / "2"], tmp_path / "none")


SHARDS = ["0/4", "5/4", "x", "", "/", "1/", "/4", "1/0", "-1/4", "1.0/2", "1/4/2", "²/4", "1/99999999999999999999"]


@pytest.mark.parametrize("text", SHARDS)
def test_a_shard_that_is_none_is_one_sentence(capsys, text):
    code, out, err = run(capsys, "score", "--model", "rar-tiny", f"--shard={text}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "expected a shard as I/N with I from 1 to N, such as 1/8, got" in err


@pytest.mark.parametrize("shard", [(0, 4), (5, 4), (1,), "1/2", (1, 2, 3), ("1", "2"), (True, 2), (1.0, 2), 3])
def test_a_shard_that_is_none_is_one_sentence_in_python(toy_model, toy_source, shard):
    with pytest.raises(UsageError, match="expected (a )?shard as"):
        fastmem.score(toy_model, toy_source, shard=shard)


def test_more_slices_than_classes_are_refused(toy_model, toy_source, tmp_path):
    with pytest.raises(UsageError, match="at most 3 slices, one for each class of the training images, got 4"):
        fastmem.score(toy_model, toy_source, shard=(1, 4), out=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()
