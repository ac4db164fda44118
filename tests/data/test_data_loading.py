"""Loading: the same batches with and without workers, damage reported, and workers that die or are interrupted."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import traceback
import zipfile
from dataclasses import dataclass
from multiprocessing.popen_fork import Popen
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmem.data import loading
from fastmem.data.decoding import Skipped
from fastmem.data.loading import Batch, ViewReader, load, load_views
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
    ("images", "cores", "workers"),
    [
        pytest.param(255, 8, 0, id="few images"),
        pytest.param(256, 8, 4, id="many cores"),
        pytest.param(256, 3, 2, id="three cores"),
        pytest.param(256, 1, 0, id="one core"),
    ],
)
def test_workers_are_chosen_by_work_and_cores(
    images: int, cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    def recording(read, batches, count: int, batch_bytes: int):
        chosen.append(count)
        return map(read, batches)

    monkeypatch.setattr(loading, "read_in_workers", recording)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    source = array_source(images)
    list(load_views(source, Manifest.build(source), np.array_split(np.arange(images), 4), CenterCrop(16)))
    assert chosen == [workers] * (workers > 0)


def refuse_processes(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the system start ``after`` processes and no more."""
    real, started = Popen.__init__, []

    def limited(self, process) -> None:
        if len(started) == after:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(process)
        real(self, process)

    monkeypatch.setattr(Popen, "__init__", limited)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("after", [0, 1])
def test_workers_that_cannot_be_started_are_refused_or_done_without(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_processes(monkeypatch, after)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    source, before = array_source(260), children()
    manifest, cut = Manifest.build(source), [np.arange(260)]
    with pytest.raises(FastmemError, match=r"expected to start 2 worker .*Resource temporarily .*\(0 for none\)"):
        list(load_views(source, manifest, cut, CenterCrop(16), workers=2))
    assert children() == before
    refuse_processes(monkeypatch, after)
    assert_same(*(list(load_views(source, manifest, cut, CenterCrop(16), workers)) for workers in (None, 0)))


@dataclass(frozen=True)
class Numbered(ViewReader):
    """A reader whose results are tensors of another size than the views: smaller, as large, or far larger."""

    source: ImageSource
    manifest: Manifest
    recipe: CenterCrop
    size: int

    def read(self, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray, str]:
        tensor = torch.arange(self.size, dtype=torch.int64) + int(positions[0])
        return tensor[::2], np.full(self.size, positions[0]), "a word"


@pytest.mark.parametrize("size", [0, 1, 16 * 16 * 3 // 8, 100_000])
def test_results_of_any_size_come_back_and_can_be_kept(size: int) -> None:
    source = array_source()
    reader = Numbered(source, Manifest.build(source), CenterCrop(16), size)
    results = list(load(reader, [[number] for number in range(13)], workers=2))
    for number, (tensor, array, word) in enumerate(results):
        assert torch.equal(tensor, torch.arange(size)[::2] + number)
        assert np.array_equal(array, np.full(size, number))
        assert word == "a word"
        tensor += 1


NO_SHARED_MEMORY = """
    import numpy as np
    from fastmem.data.loading import load_views
    from fastmem.data.manifest import Manifest
    from fastmem.data.sources import ArraySource
    from fastmem.data.views import TenCrop

    source = ArraySource(np.zeros((16, 64, 64, 3), np.uint8), [0] * 16)
    cut = np.arange(16).reshape(8, 2)
    print(sum(len(batch.views) for batch in load_views(source, Manifest.build(source), cut, TenCrop(64), 2)))
"""


def test_workers_need_no_shared_memory_folder() -> None:
    mounted = (
        "mount -t tmpfs -o size=4k none /dev/shm && : > /dev/shm/full && head -c 8k /dev/zero > /dev/shm/full; exec"
    )
    command = ["unshare", "-m", "bash", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*command, "mount -t tmpfs none /dev/shm"], check=False).returncode
    ):
        pytest.skip("needs the right to mount")
    code = shlex.join([sys.executable, "-c", textwrap.dedent(NO_SHARED_MEMORY)])
    done = subprocess.run(
        [*command, f"{mounted} {code}"], capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2]
    )
    assert (done.stdout, done.returncode) == ("16\n", 0)


@dataclass(frozen=True)
class Killer(CenterCrop):
    """A recipe whose third image kills the process that cuts it, as the kernel does when memory is out."""

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        if image.getpixel((0, 0))[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(image, image_id)


def test_a_worker_that_dies_is_one_clear_error(tmp_path: Path) -> None:
    source = zip_source(tmp_path / "a.zip")
    manifest, at = in_name_order(source)
    cut = [[at[f"cat/{number}.png"]] for number in (0, 1, 2, 3)]
    with pytest.raises(
        FastmemError, match=r"got one that died \(killed by signal 9\).*use fewer workers \(0 for none\)"
    ) as refusal:
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
    with pytest.raises(RuntimeError, match="a mistake") as mistake:
        list(load_views(source, Manifest.build(source), [[0]], Faulty(16), workers))
    assert "in __call__" in "".join(traceback.format_exception(mistake.value))


class Odd(Exception):
    """An exception that can be pickled but not made again."""

    def __init__(self) -> None:
        super().__init__("one argument more than it takes")


@dataclass(frozen=True)
class OddlyFaulty(CenterCrop):
    """A recipe whose mistake cannot be passed from process to process, or that prints, or that ends its process."""

    how: str = "raise"

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        if self.how == "raise":
            raise Odd
        if self.how == "exit":
            raise SystemExit(7)
        print("a worker talks " * 1000, flush=True)
        return super().__call__(image, image_id)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        pytest.param("raise", RuntimeError, "a worker process failed:\n.*Odd", id="cannot be pickled"),
        pytest.param("exit", FastmemError, r"got one that died \(exit status 7\)", id="exits"),
    ],
)
def test_an_odd_end_of_a_worker_is_reported(how: str, kind: type[Exception], message: str) -> None:
    source = array_source()
    with pytest.raises(kind, match=f"(?s){message}"):
        list(load_views(source, Manifest.build(source), [[0], [1]], OddlyFaulty(16, how=how), 2))


def test_a_worker_may_print(capfd: pytest.CaptureFixture[str]) -> None:
    source = array_source()
    manifest = Manifest.build(source)
    talking, quiet = OddlyFaulty(16, how="print"), CenterCrop(16)
    assert_same(*(list(load_views(source, manifest, [[0], [1]], recipe, 2)) for recipe in (talking, quiet)))
    assert "a worker talks" in capfd.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_worker_ends_with_the_caller() -> None:
    source, before = array_source(), children()
    batches = load_views(source, Manifest.build(source), [[0]] * 50, CenterCrop(16), workers=2)
    next(batches)
    for worker in children() - before:
        os.kill(int(worker), signal.SIGSTOP)
    batches.close()
    assert children() == before


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
