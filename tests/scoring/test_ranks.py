"""A scoring pass that several ranks share leaves the bytes of one process, whoever is slow, killed or told to stop."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmem import files
from fastmem.runs import ranks
from tests.conftest import folder_bytes, run_ranks

score = importlib.import_module("fastmem.stages.score")
SPEED = "result.json"


@pytest.fixture
def work(toy_model, toy_source, monkeypatch) -> Callable[..., object]:
    """A pass of ten work units over two sets."""
    monkeypatch.setattr("fastmem.scoring.score.UNIT_IMAGES", 6)

    def run(folder: Path, resume: bool = False, seed: int = 0) -> object:
        settings = {"views": 2, "batch_size": 6, "per_image": True, "seed": seed}
        return score.score(
            toy_model,
            toy_source,
            heldout=toy_source,
            out=folder,
            resume=resume,
            check_classes=False,
            pictures=False,
            workers=0,
            **settings,
        )

    return run


@pytest.fixture
def whole(work, tmp_path) -> dict[str, bytes]:
    """The files that one process leaves."""
    assert run_ranks(1, lambda rank: work(tmp_path / "whole")) == [0]
    return results(tmp_path / "whole")


def results(folder: Path) -> dict[str, bytes]:
    """The files of a run, without the document that tells its speed."""
    found = folder_bytes(folder)
    found.pop(SPEED, None)
    return found


def at_write(name: str, number: int, act: Callable[[], object]) -> None:
    """Do something at this process's write of a file of this name with this number, from 0."""
    met: list[str] = []

    def boundary(place: str) -> None:
        met.extend([place] * place.startswith(name))
        if len(met) == number + 1:
            act()

    files.at_boundary = boundary


def see_slowly(seconds: float, act: Callable[[], object] = lambda: None) -> None:
    """Make every batch of this process take longer, and do something with each."""
    module = importlib.import_module("fastmem.scoring.score")
    see = module._Scorer._see

    def seen(self, *arguments):
        time.sleep(seconds)
        act()
        return see(self, *arguments)

    module._Scorer._see = seen


def end_here() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("slow", [0, 1], ids=["slow leader", "slow helper"])
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_in_any_order_leaves_the_same_bytes(work, whole, tmp_path, size, slow):
    def run(rank: int) -> None:
        see_slowly(0.05 * (rank == slow))
        found = work(tmp_path / "shared")
        assert found.train.count == 23
        assert found.to_json()["images"] == 23

    assert run_ranks(size, run) == [0] * size
    assert results(tmp_path / "shared") == whole


def test_the_units_of_a_killed_rank_are_done_by_the_others(work, whole, tmp_path):
    def run(rank: int) -> None:
        # it has computed its first unit, which nobody gets
        if rank == 1:
            at_write("before unit-", 0, end_here)
        else:
            see_slowly(0.1)
        work(tmp_path / "shared")

    assert run_ranks(3, run) == [0, -signal.SIGKILL, 0]
    assert results(tmp_path / "shared") == whole


@pytest.mark.parametrize("again", [1, 2, 3])
def test_a_killed_job_goes_on_with_another_number_of_ranks(work, whole, tmp_path, monkeypatch, again):
    monkeypatch.setattr("fastmem.scoring.score.SAVE_SECONDS", 0)

    def run(rank: int) -> None:
        # the leading rank dies as it saves its progress for the third time
        at_write("after state", 2, end_here)
        work(tmp_path / "shared")

    assert run_ranks(2, run) == [-signal.SIGKILL, ranks.RankLost.exit_code]
    assert not (tmp_path / "shared" / SPEED).exists()
    assert run_ranks(again, lambda rank: work(tmp_path / "shared", resume=True)) == [0] * again
    assert results(tmp_path / "shared") == whole


def test_a_job_that_is_told_to_stop_goes_on(work, whole, tmp_path):
    def run(rank: int) -> None:
        see_slowly(0.05, lambda: os.kill(os.getpid(), signal.SIGINT) if rank == 0 else None)
        work(tmp_path / "shared")

    codes = run_ranks(2, run)
    assert codes[0] == 130
    # a rank that helps learns of it from the leading one
    assert codes[1] == 130
    assert run_ranks(2, lambda rank: work(tmp_path / "shared", resume=True)) == [0, 0]
    assert results(tmp_path / "shared") == whole


def test_a_damaged_result_of_an_earlier_attempt_is_computed_again(work, whole, tmp_path):
    folder = tmp_path / "shared" / "units"
    folder.mkdir(parents=True)
    (folder / "unit-0000002.safetensors").write_bytes(b"half a fi")
    assert run_ranks(2, lambda rank: work(tmp_path / "shared")) == [0, 0]
    assert results(tmp_path / "shared") == whole


def test_ranks_with_other_settings_are_refused(work, tmp_path, capfd):
    codes = run_ranks(2, lambda rank: work(tmp_path / "shared", seed=rank))
    assert codes[1] == 2
    assert "expected the same images, weights and settings in every rank" in capfd.readouterr().err


def test_an_error_of_the_leading_rank_ends_the_others(work, tmp_path, capfd):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "run.json").write_text("{}")
    assert run_ranks(2, lambda rank: work(tmp_path / "shared", resume=True)) == [3, 3]
    assert "expected the leading rank to finish, got its exit code 3" in capfd.readouterr().err
