"""Loading: the same batches with and without workers, damage reported, and workers that die or are interrupted."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastmem.data import loading
from fastmem.data.decoding import Skipped
from fastmem.data.loading import Batch, load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ArraySource, ImageSource, ZipSource
from fastmem.data.views import CenterCrop, RandomCrops, TenCrop
from fastmem.errors import FastmemError, InputFileError, UsageError

both_ways = pytest.mark.parametrize("workers", [0, 2])


def array_source(count: int = 13) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(count) % 3)


def zip_source(path: Path, damaged: tuple[int, ...] = ()) -> ZipSource:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(8):
            buffer = io.BytesIO()
            Image.new("RGB", (20, 24), (number, 0, 0)).save(buffer, "PNG")
            content = buffer.getvalue()
            archive.writestr(f"cat/{number}.png", content[:-40] if number in damaged else content)
    return ZipSource(path)


def in_name_order(source: ImageSource) -> tuple[Manifest, dict[str, int]]:
    manifest = Manifest.build(source)
    return manifest, {str(name): position for position, name in enumerate(manifest.names)}


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert np.array_equal(left.positions, right.positions)
        assert torch.equal(left.views, right.views)
        assert left.skipped == right.skipped


@pytest.mark.parametrize("recipe", [TenCrop(16), RandomCrops(16, 3), CenterCrop(16)], ids=lambda recipe: recipe.name)
def test_batches_come_in_order_and_equal_the_recipe(recipe) -> None:
    source = array_source()
    manifest = Manifest.build(source)
    cut = [np.array([5, 2]), [], [12, 0, 1], np.arange(13)]
    batches = list(load_views(source, manifest, cut, recipe, workers=0))
    assert len(batches) == len(cut)
    for batch, positions in zip(batches, cut, strict=True):
        assert batch.positions.dtype == np.int64
        assert batch.positions.tolist() == list(positions)
        assert batch.views.dtype == torch.uint8
        assert batch.views.shape == (len(positions), recipe.count, 16, 16, 3)
        assert batch.skipped == []
        for position, views in zip(positions, batch.views, strict=True):
            image = source.read(manifest.index[position])
            assert np.array_equal(views, recipe(image, manifest.ids[position].item()))


def test_workers_change_nothing(tmp_path: Path) -> None:
    source = zip_source(tmp_path / "a.zip", damaged=(3,))
    source.read(0)
    manifest = Manifest.build(source)
    cut = [[0], [], [3, 2, 1], [7], [4, 5, 6], [1, 2], [0, 7]]
    state = torch.get_rng_state()
    none, two = (list(load_views(source, manifest, cut, RandomCrops(16, 2), workers)) for workers in (0, 2))
    assert_same(none, two)
    assert torch.equal(torch.get_rng_state(), state)


@both_ways
def test_damaged_images_are_dropped_and_named(workers: int, tmp_path: Path) -> None:
    source = zip_source(tmp_path / "a.zip", damaged=(2, 5))
    manifest, at = in_name_order(source)
    position = [at[f"cat/{number}.png"] for number in range(8)]
    cut = [[position[number] for number in numbers] for numbers in ((1, 2, 3), (5, 2), (5, 0))]
    batches = list(load_views(source, manifest, cut, TenCrop(16), workers))
    assert [batch.positions.tolist() for batch in batches] == [[position[1], position[3]], [], [position[0]]]
    assert [batch.views.shape for batch in batches] == [(count, 10, 16, 16, 3) for count in (2, 0, 1)]
    assert batches[0].views[:, 0, 0, 0, 0].tolist() == [1, 3]
    assert [[skip.name for skip in batch.skipped] for batch in batches] == [
        ["cat/2.png"],
        ["cat/5.png", "cat/2.png"],
        ["cat/5.png"],
    ]
    assert "truncated" in batches[0].skipped[0].reason


def test_a_picture_that_the_recipe_refuses_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (90_000, 1)).save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/long.png", buffer.getvalue())
    source = ZipSource(tmp_path / "a.zip")
    (batch,) = load_views(source, Manifest.build(source), [[0]], CenterCrop(64))
    assert batch.skipped == [Skipped("cat/long.png", "huge: 5760000x64 pixels, the limit is 100000000")]
    assert batch.views.shape == (0, 1, 64, 64, 3)


@both_ways
def test_a_zip_that_went_away_is_an_input_error(workers: int, tmp_path: Path) -> None:
    source = zip_source(tmp_path / "a.zip")
    (tmp_path / "a.zip").unlink()
    batches = load_views(source, Manifest.build(source), [[0]], CenterCrop(16), workers)
    with pytest.raises(InputFileError, match="got nothing there") as refusal:
        next(batches)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([13], id="too large"),
        pytest.param([-1], id="negative"),
        pytest.param([0.5], id="not whole"),
        pytest.param([[0, 1]], id="two axes"),
        pytest.param(3, id="no axis"),
    ],
)
def test_positions_outside_the_manifest_are_refused(batch) -> None:
    source = array_source()
    with pytest.raises(UsageError, match="in a manifest of 13 images"):
        load_views(source, Manifest.build(source), [[0], batch], CenterCrop(16))


def test_a_manifest_of_other_images_is_refused(tmp_path: Path) -> None:
    source = array_source()
    manifest = Manifest.build(source)
    manifest.save(tmp_path / "manifest.parquet")
    for other in (
        Manifest.build(array_source(14)),
        Manifest.build(ArraySource(np.zeros((13, 4, 4, 3), np.uint8), np.zeros(13, np.int64))),
        Manifest.load(tmp_path / "manifest.parquet"),
    ):
        with pytest.raises(UsageError, match="expected a manifest of array of 13 images"):
            load_views(source, other, [[0]], CenterCrop(16))


def test_a_negative_number_of_workers_is_refused() -> None:
    source = array_source()
    with pytest.raises(UsageError, match="got -1"):
        load_views(source, Manifest.build(source), [[0]], CenterCrop(16), workers=-1)


@pytest.mark.parametrize(
    ("images", "batch", "cores", "free_bytes", "workers"),
    [
        pytest.param(255, 51, 8, 2**40, 0, id="few images"),
        pytest.param(256, 64, 8, 2**40, 4, id="many cores"),
        pytest.param(256, 64, 3, 2**40, 2, id="three cores"),
        pytest.param(256, 64, 1, 2**40, 0, id="one core"),
        # a batch of 64 images, one view of 16 x 16 x 3 bytes, is 48 KiB, and three of them are held per worker
        pytest.param(256, 64, 8, 2 * 3 * 48 * 1024, 2, id="shared memory for two"),
        pytest.param(256, 64, 8, 64 * 1024, 0, id="hardly any shared memory"),
    ],
)
def test_workers_are_chosen_by_work_cores_and_shared_memory(
    images: int, batch: int, cores: int, free_bytes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    real = loading.DataLoader

    def recording(*args, num_workers: int, **rest):
        chosen.append(num_workers)
        return real(*args, num_workers=0, collate_fn=rest["collate_fn"], sampler=rest["sampler"], batch_size=None)

    @dataclass
    class Space:
        f_bavail: int
        f_frsize: int = 1

    monkeypatch.setattr(loading, "DataLoader", recording)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "statvfs", lambda path: Space(free_bytes))
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    source = array_source(images)
    cut = np.arange(images).reshape(-1, batch)
    list(load_views(source, Manifest.build(source), cut, CenterCrop(16)))
    assert chosen == [workers]


@dataclass(frozen=True)
class Killer(CenterCrop):
    """A recipe whose third image kills the process that cuts it, as the kernel does when memory is out."""

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        if image.getpixel((0, 0))[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(image, image_id)


def test_a_worker_that_dies_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch asks every five seconds whether its workers live
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    source = zip_source(tmp_path / "a.zip")
    manifest, at = in_name_order(source)
    cut = [[at[f"cat/{number}.png"]] for number in (0, 1, 2, 3)]
    with pytest.raises(FastmemError, match=r"got one that died .*use fewer workers \(0 for none\)") as refusal:
        list(load_views(source, manifest, cut, Killer(16), workers=2))
    assert "\n" not in str(refusal.value)


@dataclass(frozen=True)
class Faulty(CenterCrop):
    """A recipe with a mistake in it."""

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        raise RuntimeError("a mistake")


@both_ways
def test_a_mistake_in_a_recipe_is_not_taken_for_a_dead_worker(workers: int) -> None:
    source = array_source()
    with pytest.raises(RuntimeError, match="a mistake"):
        list(load_views(source, Manifest.build(source), [[0]], Faulty(16), workers))


def test_a_death_does_not_reach_the_code_between_batches() -> None:
    source = array_source()
    handler = signal.getsignal(signal.SIGCHLD)
    batches = load_views(source, Manifest.build(source), [[0]] * 9, CenterCrop(16), workers=2)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_stop_when_the_caller_stops_early() -> None:
    source = array_source()
    before = children()
    batches = load_views(source, Manifest.build(source), [[0]] * 50, CenterCrop(16), workers=2)
    next(batches)
    assert len(children() - before) == 2
    batches.close()
    assert children() == before


INTERRUPTED = """
    import os, signal, sys
    import numpy as np
    from fastmem.data.loading import load_views
    from fastmem.data.manifest import Manifest
    from fastmem.data.sources import ArraySource
    from fastmem.data.views import TenCrop

    source = ArraySource(np.zeros((4, 64, 64, 3), np.uint8), [0] * 4)
    try:
        for number, batch in enumerate(load_views(source, Manifest.build(source), [[0, 1]] * 10**4, TenCrop(64), 2)):
            if number == 20:
                print("started", flush=True)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        sys.exit(130)
"""


def test_an_interrupt_stops_the_workers_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "started\n"
    # to the whole group, as a terminal does it
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (out, err, process.returncode) == ("stopped\n", "", 130)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_listing_and_reading_need_no_torch() -> None:
    code = "import sys, fastmem.data.sources, fastmem.data.manifest; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "False\n"
