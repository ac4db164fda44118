"""The status of a run, from its folder alone: while the work runs, when it has ended, and when it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastmem
from fastmem import ArraySource, FolderSource, InputFileError, Reporter, UsageError, status
from fastmem.index.build import build_index
from fastmem.reporter import QUIET, SILENT, Work, heard_by, tell_skipped
from fastmem.runs import progress
from fastmem.runs.owner import owned
from fastmem.runs.progress import LOG_BYTES, LOG_NAME, last_line
from tests.conftest import FakeEmbedder, make_toy_model, random_images, run, start_python, write_folder

OPTIONS = {"views": 2, "check_classes": False, "pictures": False, "workers": 0}

# a process that works in a folder until its input ends
WORK = """
import sys
from pathlib import Path
from fastmem.reporter import Reporter, Work, tell_skipped
from fastmem.runs import progress
from fastmem.runs.owner import owned
progress.LOG_SECONDS = 0
with owned(Path(sys.argv[1]), "score"):
    reporter = Reporter()
    print("taken", flush=True)
    sys.stdin.readline()
    reporter.planned(Work(100, "images"))
    tell_skipped(2)
    reporter.advance(10)
    reporter.advance(30)
    print("worked", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def often(monkeypatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)


def test_the_status_of_work_in_another_process(tmp_path):
    child = start_python(WORK, tmp_path / "run", stdin=subprocess.PIPE)
    assert child.stdout.readline() == "taken\n"
    first = status(tmp_path / "run")
    assert (first.state, first.document["stage"], first.document["total"]) == ("running", "score", None)
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "worked\n"
    found = status(tmp_path / "run").to_json()
    expected = {
        "run": str(tmp_path / "run"),
        "stage": "score",
        "state": "running",
        "advice": None,
        "things": "images",
        "total": 100,
        "done": 40,
        "left": 60,
        "skipped": 2,
        "ranks": 1,
        "ranks_alive": 1,
        "reason": None,
        "stages": [],
    }
    assert {key: found[key] for key in expected} == expected
    assert found["owner"]["process"] == child.pid
    child.send_signal(signal.SIGKILL)
    child.communicate()
    found = status(tmp_path / "run").to_json()
    assert (found["state"], found["advice"]) == ("interrupted", "go on with --resume")
    assert (found["done"], found["left"], found["owner"], found["ranks_alive"]) == (40, 60, None, 0)


def test_a_pass_is_interrupted_and_then_finished(toy_model, tmp_path, often, monkeypatch):
    monkeypatch.setattr("fastmem.scoring.score.UNIT_IMAGES", 2)
    train = write_folder(tmp_path / "train", random_images(12, 16))
    (train / "class-0" / "broken.png").write_bytes(b"broken")
    out = tmp_path / "run"
    seen: list[str] = []

    def stop(images: int) -> None:
        seen.append(status(out).state)
        if len(seen) == 4:
            raise UsageError("expected a reason, got \x1b[31mnone: try\nagain")

    source = FolderSource(train)
    with pytest.raises(UsageError):
        fastmem.score(toy_model, source, out=out, reporter=Reporter(advance=stop), batch_size=2, **OPTIONS)
    assert set(seen) == {"running"}
    found = status(out).to_json()
    assert (found["state"], found["skipped"], found["total"]) == ("interrupted", 1, 13)
    assert found["reason"] == r"expected a reason, got \x1b[31mnone: try\nagain"
    fastmem.score(toy_model, source, out=out, resume=True, batch_size=2, **OPTIONS)
    found = status(out).to_json()
    assert (found["state"], found["done"], found["left"], found["skipped"]) == ("finished", 13, 0, 1)
    assert (found["owner"], found["seconds_left"], found["advice"]) == (None, None, None)
    # what is refused before it begins changes nothing
    with pytest.raises(UsageError):
        fastmem.score(toy_model, source, out=out, **OPTIONS)
    assert status(out).to_json() == found


def test_every_stage_says_how_far_it_is(toy_source, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fastmem.stages.options.find_embedder", lambda *a, **k: (FakeEmbedder(), "a fake SSCD model"))
    model, out = make_toy_model(), tmp_path / "run"
    heldout = ArraySource(random_images(8, 16, seed=3), np.array([0, 0, 0, 1, 1, 3, 3, 3]))
    fastmem.score(model, toy_source, heldout=heldout, per_image=True, out=out, **OPTIONS)
    opened = fastmem.open_run(out, data=toy_source, heldout=heldout, model=model)
    index = fastmem.index(toy_source, tmp_path / "index")
    fastmem.extract(opened, prefixes=[0], top_per_class=2)
    fastmem.evaluate(opened, samples=6)
    fastmem.sweep(opened, by=("lowest",), fractions=(0.1,), seeds=1, declared_seeds=1, samples=6, top_per_class=2)

    def found() -> dict[str, dict]:
        whole = status(out).to_json()
        return {entry["stage"]: entry for entry in (*whole["stages"], whole, status(index.path).to_json())}

    first = found()
    stages = ("extract", "evaluate", "sweep", "score", "index")
    assert {stage: entry["state"] for stage, entry in first.items()} == dict.fromkeys(stages, "finished")
    counted = {stage: (entry["done"], entry["total"]) for stage, entry in first.items()}
    assert all(done == total > 0 for done, total in counted.values())
    # with 7 of the held-out images, which the training set matches
    assert (counted["score"][0], counted["index"][0], counted["evaluate"][0], counted["sweep"][0]) == (30, 23, 6, 2)
    # without the log the files of a stage say whether it is finished
    for entry in first.values():
        Path(entry["run"], LOG_NAME).unlink()
    states = {stage: entry["state"] for stage, entry in found().items()}
    assert states == dict.fromkeys(stages, "finished") | {"evaluate": "not running"}
    (out / "result.json").unlink()
    assert status(out).state == "interrupted"


def test_an_index_that_was_stopped_is_interrupted(toy_source, tmp_path, often):
    def stop(images: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(toy_source, FakeEmbedder(), tmp_path / "i", workers=0, reporter=Reporter(advance=stop))
    assert status(tmp_path / "i").state == "interrupted"
    build_index(toy_source, FakeEmbedder(), tmp_path / "i", workers=0, resume=True)
    assert status(tmp_path / "i").state == "finished"
    assert last_line(tmp_path / "i").event == "finished"


WORDS = {
    "running": ({}, "score in RUN: running, 40 of 100 images, 60 left, 2 skipped, process "),
    "ranks": ({"ranks": (8, 7)}, "60 left, 7 of 8 ranks alive, 2 skipped, process "),
}


@pytest.mark.parametrize(("settings", "text"), WORDS.values(), ids=WORDS)
def test_the_command_prints_a_line(tmp_path, capsys, often, settings, text):
    ranks = settings.get("ranks", (1, 1))
    with owned(tmp_path / "run", "score", lambda: ranks):
        QUIET.planned(Work(100))
        tell_skipped(2)
        QUIET.advance(40)
        QUIET.advance(0)
        code, out, err = run(capsys, "status", "--run", tmp_path / "run")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert text.replace("RUN", str(tmp_path / "run")) in out
    code, out, _ = run(capsys, "status", "--run", tmp_path / "run", "--json")
    assert json.loads(out)["state"] == "finished"


def test_speed_and_rest_come_from_what_was_done_lately(tmp_path, often, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with owned(tmp_path, "score"):
        QUIET.planned(Work(100_000))
        now[0] += 60
        # what an interrupted pass has left arrives at once
        QUIET.advance(50_000)
        for _ in range(10):
            now[0] += 10
            QUIET.advance(20)
        line = last_line(tmp_path)
        assert (line.per_second, line.seconds_left, line.done) == (2.0, 24_900.0, 50_200)
        # it becomes slower
        for _ in range(100):
            now[0] += 10
            QUIET.advance(10)
        assert last_line(tmp_path).per_second == pytest.approx(1.0, rel=0.05)
        _, out, _ = run(capsys, "status", "--run", tmp_path)
        assert "1 images/s, about 13.6 h left" in out


def test_the_log_is_bounded_and_its_last_line_is_whole(tmp_path, often):
    with owned(tmp_path, "score"):
        QUIET.planned(Work(10**6))
        for _ in range(1500):
            QUIET.advance(1)
        assert (tmp_path / LOG_NAME).stat().st_size <= LOG_BYTES + 1000
        assert last_line(tmp_path).done == 1500
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    assert all(json.loads(line)["schema"] == "fastmem.progress/1" for line in lines)
    assert not list(tmp_path.glob(".*"))


def test_lines_are_written_every_few_seconds_at_most(tmp_path):
    with owned(tmp_path, "score"):
        QUIET.planned(Work(1000))
        for _ in range(1000):
            QUIET.advance(1)
    assert len((tmp_path / LOG_NAME).read_text().splitlines()) == 2


def test_a_log_that_cannot_be_written_does_not_end_the_work(toy_model, toy_source, tmp_path, often, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(progress, "_append", full)
    result = fastmem.score(toy_model, toy_source, out=tmp_path / "run", **OPTIONS)
    assert result.train.count == 23
    assert not (tmp_path / "run" / LOG_NAME).exists()
    assert status(tmp_path / "run").state == "finished"


ODD_PLACES = {
    "a link": lambda log, other: log.symlink_to(other),
    "a pipe": lambda log, other: os.mkfifo(log),
    "a folder": lambda log, other: log.mkdir(),
}


@pytest.mark.parametrize("make", ODD_PLACES.values(), ids=ODD_PLACES)
def test_something_else_in_the_place_of_the_log_is_left_alone(tmp_path, make, often):
    other = tmp_path / "other"
    other.write_text("mine\n")
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder / LOG_NAME, other)
    with owned(folder, "score"):
        QUIET.planned(Work(10))
        QUIET.advance(10)
        assert status(folder).state == "running"
    assert other.read_text() == "mine\n"


GOOD = {
    "time": "2026-01-01T00:00:00+00:00",
    "event": "working",
    "stage": "score",
    "host": "elsewhere",
    "process": 1,
    "since": "2026-01-01 00:00:00",
    "things": "images",
    "total": 100,
    "done": 40,
    "skipped": 0,
    "per_second": 1.5,
    "seconds_left": 40.0,
    "ranks": 1,
    "ranks_alive": 1,
    "reason": "",
    "schema": "fastmem.progress/1",
}
ODD_LINES = {
    "nothing": b"",
    "half a line": json.dumps(GOOD).encode()[:40],
    "no JSON": b"\x00\xff\x80",
    "deep": b"[" * 50_000,
    "another schema": json.dumps(GOOD | {"schema": "fastmem.progress/9"}).encode(),
    "a negative count": json.dumps(GOOD | {"done": -1}).encode(),
    "a huge count": json.dumps(GOOD | {"total": 10**400}).encode(),
    "text for a count": json.dumps(GOOD | {"total": "many"}).encode(),
    "an event of no name": json.dumps(GOOD | {"event": "paused"}).encode(),
    "a missing entry": json.dumps({k: v for k, v in GOOD.items() if k != "since"}).encode(),
    "very long": b"x" * 2_000_000,
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES)
def test_odd_lines_of_a_log_are_passed_over(tmp_path, line):
    (tmp_path / LOG_NAME).write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    found = last_line(tmp_path)
    # the line before is read, unless it is too far from the end
    assert found is None if len(line) > 10**6 else found.done == 40
    with owned(tmp_path, "score"):
        QUIET.planned(Work(7))
    assert last_line(tmp_path).total == 7
    (tmp_path / LOG_NAME).write_bytes(line)
    (tmp_path / "run.json").write_text("{}")
    assert status(tmp_path).state == "interrupted"


def test_words_of_a_log_cannot_act_on_a_terminal(tmp_path, capsys):
    line = GOOD | {"stage": "\x1b[2J", "things": "a\nb", "event": "stopped", "reason": "\u202e"}
    (tmp_path / LOG_NAME).write_text(json.dumps(line) + "\n")
    _, out, _ = run(capsys, "status", "--run", tmp_path)
    assert out.count("\n") == 1
    assert "\x1b" not in out
    assert "\u202e" not in out


@pytest.mark.parametrize("time", ["", "yesterday", "9" * 40, "2026-01-01T00:00:00"])
def test_an_odd_time_is_no_end(tmp_path, time):
    (tmp_path / LOG_NAME).write_text(json.dumps(GOOD | {"time": time}) + "\n")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "result.json").write_text("{}")
    assert status(tmp_path).state in ("interrupted", "finished")


def test_a_result_that_is_younger_than_the_log_is_the_end(tmp_path):
    # the last line was lost on a full disk
    (tmp_path / LOG_NAME).write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "result.json").write_text("{}")
    assert status(tmp_path).state == "finished"
    os.utime(tmp_path / "result.json", (0, 0))
    assert status(tmp_path).state == "interrupted"


def test_an_owner_that_has_no_plan_yet_is_running(tmp_path):
    (tmp_path / LOG_NAME).write_text(json.dumps(GOOD | {"event": "finished"}) + "\n")
    with owned(tmp_path, "index"):
        found = status(tmp_path).to_json()
    assert (found["state"], found["stage"], found["done"]) == ("running", "index", None)
    assert status(tmp_path).state == "finished"


WRONG = {
    "nothing there": lambda place: place / "none",
    "a file": lambda place: (place / "file").write_text("x") and place / "file",
    "an empty folder": lambda place: (place / "empty").mkdir() or place / "empty",
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_a_folder_of_no_run_is_one_sentence(tmp_path, capsys, make):
    place = make(tmp_path)
    with pytest.raises(InputFileError, match="expected the folder of a run"):
        status(place)
    code, out, err = run(capsys, "status", "--run", place)
    assert (code, out, len(err.splitlines())) == (3, "", 1)


def test_work_that_nothing_came_of_leaves_no_log(tmp_path):
    def fail() -> None:
        with owned(tmp_path / "run", "index"):
            QUIET.planned(Work(3))
            raise UsageError("expected more")

    with pytest.raises(UsageError):
        fail()
    assert not (tmp_path / "run").exists()


def test_a_reporter_that_is_made_of_another_is_heard_once(tmp_path, often):
    outer: list[int] = []
    first = Reporter(advance=outer.append)
    second = Reporter(planned=first.planned, advance=lambda done: first.advance(done))
    third = replace(second)
    with owned(tmp_path, "score"):
        third.planned(Work(5))
        third.advance(2)
        third.advance(3)
        assert last_line(tmp_path).done == 5
        with owned(tmp_path / "index", "index"):
            third.planned(Work(9))
            third.advance(9)
        # a part of the work is told of by its caller
        SILENT.planned(Work(1))
        SILENT.advance(1)
        # work in another folder is that folder's
        assert last_line(tmp_path).total == 5
        with heard_by(None):
            third.advance(100)
    assert last_line(tmp_path).done == 5
    assert last_line(tmp_path / "index").done == 9
    assert outer == [2, 3, 9, 100]
