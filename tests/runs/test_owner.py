"""One process at a time works in a folder, and a dead one's folder can be taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastmem import UsageError
from fastmem.runs.folder import default_folder, out_folder
from fastmem.runs.owner import DEAD_SECONDS, living_owner, owned

HOLD = """
import sys
from pathlib import Path
from fastmem.runs.owner import owned
with owned(Path(sys.argv[1]), "hold"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds a folder until its input ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_a_folder_in_use_is_refused_with_its_owner_named(tmp_path):
    child = hold(tmp_path / "run")
    try:
        with pytest.raises(UsageError, match=f"process {child.pid} on .* since .*hold"), owned(tmp_path / "run", "two"):
            pass
    finally:
        child.communicate("")
    with owned(tmp_path / "run", "two"):
        assert living_owner(tmp_path / "run") is not None
    assert living_owner(tmp_path / "run") is None


def test_a_killed_owners_folder_is_taken_and_its_leftovers_go(tmp_path):
    folder = tmp_path / "run"
    child = hold(folder)
    (folder / ".table.abc.partial").write_text("half")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert [path.name for path in folder.glob(".owner-*")] == [".owner-1"]
    with owned(folder, "two"):
        assert sorted(path.name for path in folder.iterdir()) == [".owner-2"]


def test_an_owner_elsewhere_lives_as_long_as_its_file_is_touched(tmp_path):
    file = tmp_path / ".owner-1"
    document = {"host": "elsewhere", "process": 1, "started": 0, "since": "2026-01-01 00:00:00", "work": "score"}
    file.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="process 1 on elsewhere"), owned(tmp_path, "two"):
        pass
    before = time.time() - DEAD_SECONDS - 1
    os.utime(file, (before, before))
    with owned(tmp_path, "two"):
        assert not file.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 4000, '{"host": 3}', "x" * 10_000], ids=["empty", "half", "deep", "type", "long"]
)
def test_an_owners_file_that_is_damaged_holds_nobody_off(tmp_path, text):
    (tmp_path / ".owner-7").write_text(text)
    with owned(tmp_path, "two"):
        assert (tmp_path / ".owner-8").exists()


def test_a_number_that_another_process_has_now_is_not_taken_for_the_owner(tmp_path):
    with owned(tmp_path, "one"):
        document = json.loads((tmp_path / ".owner-1").read_text())
    # this very process number, but of a process that began at another time
    (tmp_path / ".owner-1").write_text(json.dumps(document | {"started": document["started"] + 1}))
    with owned(tmp_path, "two"):
        assert (tmp_path / ".owner-2").exists()


def test_default_folders_that_are_made_at_the_same_moment_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: default_folder("rar-b"), range(16)))
    assert len(set(made)) == 16


def test_a_default_folder_that_nothing_came_of_goes_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with out_folder("rar-b", None) as path:
        assert path.is_dir()
    assert not path.exists()
    with out_folder("rar-b", None) as path:
        (path / "run.json").write_text("{}")
    assert path.exists()
