"""The scoring pass: equal to the literal definition, whatever the batches, and whole after any interruption."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmem import ArraySource, FolderSource, InputFileError, UnitStats, UsageError, responses, score
from fastmem.data.manifest import Manifest
from fastmem.models.model import to_unit_range
from fastmem.reporter import Reporter
from fastmem.scoring.class_order import check_class_order
from tests.conftest import folder_bytes, random_images, run_ranks, write_folder

STATS = ("mean", "var", "view_var", "top_value", "top_image", "class_mean", "class_var")


def assert_same_bits(found: UnitStats, expected: UnitStats) -> None:
    assert found.count == expected.count
    for name in STATS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def literal_responses(model, source, views: int | str) -> dict[int, np.ndarray]:
    """Response [layers,segments,units] of every image by id: one image at a time, mean over views in float64."""
    recipe = model.view_recipe(views)
    found = {}
    for i in range(len(source)):
        cut = torch.from_numpy(recipe(source.read(i), int(source.ids[i])))
        tokens = model.tokenize(to_unit_range(cut))
        labels = torch.full((len(cut),), int(source.labels[i]))
        found[int(source.ids[i])] = responses(model, tokens, labels, backend="torch").double().mean(0).numpy()
    return found


@pytest.mark.parametrize("views", [10, 3, "center"])
def test_a_pass_equals_the_literal_definition(toy_model, toy_source, views):
    result = score(toy_model, toy_source, views=views, check_classes=False)
    stats = result.train
    expected = literal_responses(toy_model, toy_source, views)
    values = np.stack([expected[int(i)] for i in toy_source.ids])
    assert stats.count == 23
    assert result.heldout is None
    np.testing.assert_allclose(stats.mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, values.var(0), rtol=1e-3, atol=1e-9)
    largest = values.max(0)
    rest = (values.sum(0) - largest) / 22
    np.testing.assert_allclose(stats.unitmem(), (largest - rest) / (largest + rest), atol=1e-5)
    np.testing.assert_allclose(stats.top_value[..., 0], largest, rtol=1e-5)
    clear = np.partition(values, -2, axis=0)[-2] < largest * (1 - 1e-5)
    owner = toy_source.ids[values.argmax(0)]
    assert (stats.top_image[..., 0].numpy() == owner)[clear].all()
    assert stats.class_ids.tolist() == [0, 1, 3]
    assert stats.class_count.tolist() == [11, 1, 11]
    if views == "center":
        assert not stats.view_var.any()


def test_batch_sizes_agree_to_rounding(toy_model, toy_source):
    one = score(toy_model, toy_source, batch_size=1, check_classes=False).train
    many = score(toy_model, toy_source, batch_size=200, check_classes=False).train
    assert torch.allclose(one.unitmem(), many.unitmem(), rtol=0, atol=1e-5)
    assert torch.allclose(one.class_selectivity(), many.class_selectivity(), rtol=0, atol=1e-5)


def test_the_same_call_gives_the_same_bits(toy_model, toy_source):
    assert_same_bits(
        score(toy_model, toy_source, check_classes=False, workers=0).train,
        score(toy_model, toy_source, check_classes=False, workers=2).train,
    )


def test_runs_over_different_classes_merge_to_one_run(toy_model, toy_source):
    pixels = random_images(23, 16)
    parts = []
    for rows in (toy_source.labels < 3, toy_source.labels >= 3):
        source = ArraySource(pixels[rows], toy_source.labels[rows], ids=toy_source.ids[rows])
        parts.append(score(toy_model, source, check_classes=False).train)
    merged = parts[0].merge(parts[1])
    whole = score(toy_model, toy_source, check_classes=False).train
    assert torch.equal(merged.top_image, whole.top_image)
    assert torch.equal(merged.top_value, whole.top_value)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.class_mean, whole.class_mean, rtol=1e-12, atol=0)


def test_segments_activation_and_per_class_are_followed(toy_model, toy_source):
    result = score(
        toy_model,
        toy_source,
        segments=["image", "class"],
        per_class=4,
        activation="pre",
        check_classes=False,
        views="center",
    )
    stats = result.train
    assert (stats.segments, stats.class_only) == (("image", "class"), ("class",))
    assert stats.count == 9
    # the class positions see no image: within a class every image responds alike
    assert float(stats.class_var[:, :, 1].max()) < 1e-9
    post = score(toy_model, toy_source, per_class=4, views="center", check_classes=False, segments=["image"]).train
    assert float(stats.mean[:, 0].sum()) > float(post.mean.sum())


def test_backends_agree(toy_model, toy_source):
    from fastmem.backends import native

    if not native.status().cpu:
        pytest.skip(native.status().reason)
    found = [
        score(toy_model, toy_source, backend=b, segments=["image", "last"], check_classes=False)
        for b in ("torch", "cpp")
    ]
    assert [result.backend for result in found] == ["torch", "cpp"]
    assert torch.allclose(found[0].train.unitmem(), found[1].train.unitmem(), rtol=0, atol=1e-5)


def test_a_run_folder_holds_what_the_result_holds(toy_model, toy_source, tmp_path):
    heldout = ArraySource(random_images(5, 16, seed=9), np.array([0, 0, 1, 3, 3]))
    result = score(toy_model, toy_source, heldout=heldout, out=tmp_path / "run", check_classes=False)
    assert result.run == tmp_path / "run"
    assert_same_bits(UnitStats.load(tmp_path / "run" / "train.safetensors"), result.train)
    assert_same_bits(UnitStats.load(tmp_path / "run" / "heldout.safetensors"), result.heldout)
    assert result.heldout.count == 5
    origin = result.train.origin
    assert (origin["set"], origin["views"]) == ("train", "ten-crop-16x10")
    assert origin["manifest"] == Manifest.load(tmp_path / "run" / "manifest-train.parquet").hash
    in_memory = score(toy_model, toy_source, check_classes=False)
    assert_same_bits(in_memory.train, result.train)
    assert not (tmp_path / "run" / "state.safetensors").exists()


def write_good_and_bad_files(path: Path) -> None:
    """An image folder of 3 classes with good pictures and every kind of bad file."""
    write_folder(path, random_images(9, 16), classes=3)
    whole = (path / "class-0" / "00.png").read_bytes()
    (path / "class-0" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (path / "class-1" / "empty.png").write_bytes(b"")
    (path / "class-1" / "notes.txt").write_text("not an image")
    (path / "class-2" / "text.jpg").write_text("not an image either")


def test_broken_files_are_counted_named_and_skipped(toy_model, tmp_path):
    write_good_and_bad_files(tmp_path / "data")
    result = score(toy_model, FolderSource(tmp_path / "data"), check_classes=False, out=tmp_path / "run")
    assert result.train.count == 9
    names = {"class-0/truncated.png", "class-1/empty.png", "class-1/notes.txt", "class-2/text.jpg"}
    assert {s.name for s in result.skipped} == names
    assert all(s.reason for s in result.skipped)
    again = score(toy_model, FolderSource(tmp_path / "data"), check_classes=False, out=tmp_path / "run", resume=True)
    assert again.skipped == result.skipped


def test_nothing_but_broken_files_gives_empty_statistics(toy_model, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"")
    result = score(toy_model, FolderSource(tmp_path / "data"))
    assert (result.train.count, len(result.skipped)) == (0, 1)
    assert result.train.undefined.keys() == {"unitmem", "within-class", "class-selectivity"}


def score_until(model, folder: Path, advances: int | None = None, number: int = 0, **settings: object) -> int:
    """Exit code of a process that scores toy images, saves after every work unit, and sends itself a signal.

    The signal with this number comes when this many steps have been told; without a number of steps, none comes.
    """

    def work(rank: int) -> None:
        module = importlib.import_module("fastmem.scoring.score")
        module.SAVE_SECONDS, module.UNIT_IMAGES = 0, 2
        told: list[int] = []

        def advance(images: int) -> None:
            told.append(images)
            if len(told) == advances:
                os.kill(os.getpid(), number)

        source = ArraySource(random_images(40, 16), np.repeat([0, 1, 2, 4], 10))
        options = {"views": 3, "batch_size": 3, "check_classes": False, "workers": 0, **settings}
        score(model, source, heldout=source, out=folder, reporter=Reporter(advance=advance), **options)

    (code,) = run_ranks(1, work)
    return code


@pytest.fixture(scope="module")
def undisturbed(toy_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert score_until(toy_model, folder) == 0
    return folder


@pytest.mark.parametrize("cache", ["off", "tokens"])
def test_a_killed_run_resumes_to_the_same_bytes(toy_model, tmp_path, undisturbed, cache):
    parts = tmp_path / "parts"
    where = "off" if cache == "off" else tmp_path / cache
    for resume, advances in ((False, 7), (True, 12), (True, 30)):
        code = score_until(toy_model, parts, advances, signal.SIGKILL, resume=resume, token_cache=where)
        assert code == -signal.SIGKILL
        assert (parts / "state.safetensors").exists()
    assert score_until(toy_model, parts, resume=True, token_cache=where) == 0
    # how long it took, and where tokens are kept
    other = {"result.json", "inputs.json"}
    found, expected = ({k: v for k, v in folder_bytes(f).items() if k not in other} for f in (parts, undisturbed))
    assert found == expected


def test_ctrl_c_keeps_what_was_finished(toy_model, tmp_path):
    from fastmem.files import read_tensors
    from fastmem.scoring.score import STATE_SCHEMA

    assert score_until(toy_model, tmp_path / "run", 10, signal.SIGINT) == 130
    _, header = read_tensors(tmp_path / "run" / "state.safetensors", STATE_SCHEMA)
    assert header["set"] == "train"
    assert header["units"] >= 4
    assert score_until(toy_model, tmp_path / "run", resume=True) == 0


def test_a_folder_with_a_run_is_not_overwritten(toy_model, toy_source, tmp_path):
    score(toy_model, toy_source, out=tmp_path, views="center", check_classes=False)
    before = folder_bytes(tmp_path)
    with pytest.raises(UsageError, match="--resume"):
        score(toy_model, toy_source, out=tmp_path, views="center", check_classes=False)
    with pytest.raises(UsageError, match="got recipe"):
        score(toy_model, toy_source, out=tmp_path, views=2, check_classes=False, resume=True)
    other = ArraySource(random_images(4, 16, seed=5), np.array([0, 0, 1, 1]), ids=np.arange(4))
    with pytest.raises(UsageError, match="got manifests"):
        score(toy_model, other, out=tmp_path, views="center", check_classes=False, resume=True)
    assert folder_bytes(tmp_path) == before
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputFileError, match="damaged"):
        score(toy_model, toy_source, out=tmp_path, views="center", check_classes=False, resume=True)


BAD_SETTINGS = {
    "views": ({"views": 0}, "expected views"),
    "too many views": ({"views": 11}, "1 to 10 views"),
    "segment": ({"segments": ["first"]}, "expected segments out of last"),
    "batch size": ({"batch_size": -1}, "batch size"),
    "activation": ({"activation": "raw"}, "expected activation"),
    "class rows": ({"class_rows": "some"}, "expected class_rows"),
    "per class": ({"per_class": 0}, "at least 1 image per class"),
    "out below a file": ({"out": f"{__file__}/run"}, "expected a folder that can be written"),
}


@pytest.mark.parametrize(("change", "text"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_wrong_settings_are_refused(toy_model, toy_source, change, text):
    with pytest.raises(UsageError, match=text):
        score(toy_model, toy_source, check_classes=False, **change)


def test_more_classes_than_the_checkpoint_has_are_refused(toy_model):
    source = ArraySource(random_images(2, 16), np.array([0, 5]))
    with pytest.raises(UsageError, match="below the checkpoint's 5 classes, got label 5"):
        score(toy_model, source)


def test_the_class_order_is_checked_against_the_model(toy_model):
    """A model that was taught two classes accepts their order and refuses the opposite one."""
    from copy import deepcopy

    from torch.nn import functional

    model = deepcopy(toy_model)
    source = ArraySource(random_images(40, 16), np.repeat([0, 3], 20))
    manifest = Manifest.build(source)
    network = model.generator.train().requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    recipe = model.view_recipe("center")
    views = torch.from_numpy(np.concatenate([recipe(source.read(i), 0) for i in range(40)]))
    tokens, labels = model.tokenize(to_unit_range(views)).clone(), torch.from_numpy(source.labels)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(network(tokens, labels).transpose(1, 2), tokens).backward()
        optimizer.step()
    network.eval().requires_grad_(False)
    own, shuffled = check_class_order(model, source, manifest)
    assert own < shuffled
    swapped = ArraySource(random_images(40, 16), np.repeat([3, 0], 20))
    with pytest.raises(UsageError, match="class order .* does not fit .* --no-class-check"):
        score(model, swapped)
    notes = []
    one_class = ArraySource(random_images(4, 16), np.zeros(4, dtype=np.int64))
    score(model, one_class, reporter=Reporter(note=notes.append))
    assert "the images name 1 classes and the checkpoint has 5" in notes[0]
    assert notes[1:] == ["the class order is not checked: the images are all of one class"]
