"""Standard streams of any encoding, closed, full or without a reader, and users without a home folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmem.errors import UsageError
from fastmem.home import can_keep, find_weights, home, settle_matplotlib
from tests.conftest import ROOT, random_images, run

# names that a terminal, markup or an encoding would choke on
NAMES = ("a\x1b[31mred", "[red]b", "$x_1", "n\nl", "\u202ertl", "\u732b", "caf\u00e9")


def fastmem(words: str, redirection: str = "", **environment: str | None) -> tuple[int, str, str]:
    """Run a command by a shell and return its exit code, stdout and stderr."""
    values = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])} | environment
    values = {key: value for key, value in values.items() if value is not None}
    line = f"set -o pipefail; {sys.executable} -m fastmem {words} {redirection}"
    done = subprocess.run(["bash", "-c", line], env=values, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


ENDINGS = {
    "no reader": ("models", "| true", 141, ""),
    "a full disk": ("models --json", "> /dev/full", 2, "fastmem: expected to be able to print, got No space left"),
    "help to a full disk": ("--help", "> /dev/full", 2, "fastmem: expected to be able to print"),
    "closed stdout": ("models", ">&-", 0, ""),
    "all closed": ("score --model x", "<&- >&- 2>&-", 2, ""),
    "an error to a full disk": ("score --model x", "2> /dev/full", 2, ""),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it is Linux's own")
@pytest.mark.parametrize(("words", "redirection", "code", "told"), ENDINGS.values(), ids=ENDINGS)
def test_streams_that_cannot_be_written_end_the_run_in_order(words, redirection, code, told):
    found, _, err = fastmem(words, redirection)
    assert (found, err.startswith(told)) == (code, True), err
    assert len(err.splitlines()) == bool(told)


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1"])
def test_a_name_that_the_encoding_lacks_is_escaped(encoding, tmp_path):
    home_folder = tmp_path / "\u732b\x1b"
    code, out, err = fastmem("models", PYTHONIOENCODING=encoding, FASTMEM_HOME=str(home_folder), PYTHONUTF8="0")
    assert (code, err) == (0, "")
    assert r"\u732b\x1b/weights" in out


def test_json_is_ascii_and_keeps_the_true_name(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "\u732b\x1b\udcff"))
    code, out, _ = run(capsys, "models", "--json")
    assert (code, out.isascii()) == (0, True)
    assert json.loads(out)["models"][0]["files"][0].startswith(str(tmp_path / "\u732b\x1b\udcff"))


def test_names_that_would_act_on_a_terminal_are_escaped_in_all_that_is_printed(capsys, tmp_path):
    data = tmp_path / "data"
    folder = data / "one\x1b[2J"
    folder.mkdir(parents=True)
    for name, pixels in zip(NAMES, random_images(len(NAMES), 64), strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "bad\x1b[31m.png").write_bytes(b"")
    common = ("--model", "rar-tiny", "--data", data, "--views", "center", "--no-class-check")
    code, out, err = run(capsys, "score", *common, "--out", tmp_path / "run")
    assert code == 0, err
    assert not [c for c in out + err if not c.isprintable() and c != "\n"]
    assert "skipped one\\x1b[2J/bad\\x1b[31m.png" in err
    assert "Glyph" not in err
    # the data keep the true names
    skipped = json.loads((tmp_path / "run" / "result.json").read_text())["skipped_images"]
    assert "one\x1b[2J/bad\x1b[31m.png" in {image["name"] for image in skipped}


@pytest.mark.parametrize(
    "arguments", [("x\x1b[31m",), ("--x\x1b[31m",), ("models", "x\x1b[31m"), ("score", "--seed", "\u202e")]
)
def test_errors_of_usage_escape_what_was_typed(capsys, arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.isascii()
    assert "\x1b" not in err


def test_one_image_is_scored_and_its_undefined_numbers_are_said_so(capsys, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(random_images(1, 64)[0]).save(tmp_path / "data" / "a" / "1.png")
    common = ("--model", "rar-tiny", "--data", tmp_path / "data", "--views", "center", "--no-class-check")
    code, out, err = run(capsys, "score", *common, "--out", tmp_path / "run")
    assert code == 0, err
    assert "unitmem is undefined: it needs at least two images for UnitMem, got 1" in out
    document = json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=pytest.fail)
    assert document["undefined"].keys() == {"unitmem", "within-class", "class-selectivity"}
    for by in document["undefined"]:
        code, _, err = run(capsys, "mitigate", "--run", tmp_path / "run", "--by", by)
        assert (code, "fastmem: expected" in err) == (2, True)
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "run" / "units.parquet")
    assert table["unitmem"].null_count == len(table)
    assert np.isfinite(table["mean"].to_numpy()).all()


HOMES = {
    "no such user": ("~nobody-has-this-name", "got none for ~nobody-has-this-name"),
    "a file": ("{tmp}/file", "got a file"),
    "below a file": ("{tmp}/file/below", "got a file"),
    "too long": ("{tmp}/" + "x" * 300, "got none (File name too long)"),
}


@pytest.mark.parametrize(("named", "told"), HOMES.values(), ids=HOMES)
def test_a_home_that_is_none_is_one_sentence(tmp_path, monkeypatch, named, told):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTMEM_HOME", named.format(tmp=tmp_path))
    with pytest.raises(UsageError, match="set FASTMEM_HOME to a folder") as caught:
        home()
    assert told in str(caught.value)
    assert find_weights("x.bin") == (None, str(caught.value))


@pytest.fixture
def nobody(monkeypatch):
    """This process as a user without an entry and a home folder."""

    def raises() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", raises)
    monkeypatch.delenv("FASTMEM_HOME", raising=False)


def test_commands_that_need_no_home_go_on_without_one(capsys, tmp_path, nobody):
    code, out, _ = run(capsys, "models", "--json")
    assert (code, json.loads(out)["models"][0]["missing"]) == (0, ["rar_b.bin", "maskgit-vqgan-imagenet-f16-256.bin"])
    code, out, _ = run(capsys, "doctor", "--json")
    document = json.loads(out)
    assert (code, document["home"]) == (0, None)
    assert any("set FASTMEM_HOME" in problem for problem in document["problems"])
    data = tmp_path / "data" / "a"
    data.mkdir(parents=True)
    Image.fromarray(random_images(1, 64)[0]).save(data / "1.png")
    common = ("--model", "rar-tiny", "--data", data.parent, "--views", "center", "--no-class-check")
    code, _, err = run(capsys, "score", *common, "--out", tmp_path / "run")
    assert code == 0
    assert "tokens are not kept for the next pass: expected a home folder" in err
    code, _, err = run(capsys, "fetch", "--model", "rar-b")
    assert (code, "set FASTMEM_HOME" in err) == (2, True)


def test_an_empty_name_is_none(monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", "")
    assert home() == Path.home() / ".cache" / "fastmem"


def test_matplotlib_gets_a_folder_only_where_it_has_none(tmp_path, monkeypatch, nobody):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "kept"))
    monkeypatch.setenv("MPLCONFIGDIR", "/chosen")
    settle_matplotlib()
    assert os.environ["MPLCONFIGDIR"] == "/chosen"
    monkeypatch.delenv("MPLCONFIGDIR")
    settle_matplotlib()
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "kept" / "matplotlib")
    monkeypatch.delenv("MPLCONFIGDIR")
    for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    settle_matplotlib()
    assert "MPLCONFIGDIR" not in os.environ


def test_a_folder_below_a_file_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    assert can_keep(tmp_path / "new" / "folder")
    assert not can_keep(tmp_path / "file" / "folder")
