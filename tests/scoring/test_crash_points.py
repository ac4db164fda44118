"""A pass that ends at any boundary of any write goes on, and leaves the files of an undisturbed one.

The end is an exception that nothing catches. What a killed process leaves beside it, half-written files and the file of
the folder's owner, is in the tests of killed processes and of owners.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmem import files
from fastmem.index.build import build_index
from tests.conftest import FakeEmbedder, folder_bytes


class Crash(BaseException):
    """The end of the process."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """End at the boundary with this number, from 0; returns the boundaries that are passed."""
    passed: list[str] = []

    def count(place: str) -> None:
        passed.append(place)
        if len(passed) == number + 1:
            raise Crash

    monkeypatch.setattr(files, "at_boundary", count)
    return passed


def crash_everywhere(work: Callable[[Path, bool], object], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compare what every crash point and a resumption leave with undisturbed work; returns how many there are."""
    passed = crash_at(monkeypatch, -1)
    work(folder / "whole", False)
    whole = folder_bytes(folder / "whole")
    assert whole
    for number in range(len(passed)):
        again = folder / str(number)
        crash_at(monkeypatch, number)
        with pytest.raises(Crash):
            work(again, False)
        crash_at(monkeypatch, -1)
        work(again, True)
        found = folder_bytes(again)
        assert found.keys() == whole.keys(), passed[number]
        assert [name for name in whole if found[name] != whole[name]] == [], passed[number]
    return len(passed)


def test_a_scoring_pass_can_end_at_every_write(toy_model, toy_source, tmp_path, monkeypatch):
    module = importlib.import_module("fastmem.scoring.score")
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    monkeypatch.setattr(module, "UNIT_IMAGES", 6)
    # what a pass says of its own speed differs between any two
    ticks = itertools.repeat(0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(ticks))

    def work(folder: Path, resume: bool) -> None:
        module.score_images(
            toy_model,
            {"train": toy_source, "heldout": toy_source},
            module.ScoreSettings(views=2, batch_size=6, per_image=True),
            out=folder,
            resume=resume,
            check_classes=False,
            workers=0,
        )

    assert crash_everywhere(work, tmp_path, monkeypatch) > 20


def test_an_index_can_end_at_every_write(toy_source, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmem.index.pending.SAVE_IMAGES", 5)

    def work(folder: Path, resume: bool) -> None:
        build_index(toy_source, FakeEmbedder(), folder, resume=resume, batch_size=5, workers=0)

    assert crash_everywhere(work, tmp_path, monkeypatch) > 20
