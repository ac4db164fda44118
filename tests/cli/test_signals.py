"""A signal ends the program with its own exit code, with what was finished kept, and without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# shells that start a program in the background have it ignore ctrl-c
PROGRAM = """
import signal, sys
signal.signal(1, signal.SIG_DFL); signal.signal(15, signal.SIG_DFL)
signal.signal(2, signal.default_int_handler)
sys.argv = ["fastmem", *sys.argv[1:]]
from fastmem.__main__ import main
main()
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the program."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["int", "term", "hup"]
)
def test_a_signal_during_a_pass_saves_it_and_is_the_exit_code(tmp_path, number, code):
    child = start("score", "--model", "rar-tiny", "--out", tmp_path / "run", "--views", 2, "--token-cache", "off")
    deadline = time.monotonic() + 25
    while not (tmp_path / "run" / "manifest-heldout.parquet").exists():
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(number)
    _, words = child.communicate(timeout=25)
    assert child.returncode == code
    assert "continue with --resume" in words
    assert "Traceback" not in words
    assert not list((tmp_path / "run").glob(".owner-*"))


@pytest.mark.parametrize("delay", [0.2, 0.5], ids=["early", "loading"])
def test_ctrl_c_many_times_in_a_row_brings_no_traceback(tmp_path, delay):
    child = start("score", "--model", "rar-tiny", "--out", tmp_path / "run", "--token-cache", "off")
    time.sleep(delay)
    for _ in range(5):
        child.send_signal(signal.SIGINT)
        time.sleep(0.005)
    _, words = child.communicate(timeout=25)
    assert child.returncode == 130
    assert "Traceback" not in words
