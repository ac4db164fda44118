"""Files are written whole or not at all, and the run folder keeps its word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmem import InputFileError, UsageError
from fastmem.files import read_json, read_tensors, write_atomically, write_json, write_tensors
from fastmem.runs.folder import RunFolder, default_folder
from fastmem.runs.interruption import Interruption


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="got No space left on device"):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["table"]
    assert path.read_text() == "old"


def test_equal_tensors_are_equal_bytes_and_readable_by_others(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2)}
    write_tensors(tmp_path / "one", tensors, "test/1", {"z": 1, "a": [2]})
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())), "test/1", {"z": 1, "a": [2]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found, header = read_tensors(tmp_path / "one", "test/1")
    assert torch.equal(found["b"], tensors["b"])
    assert (header["z"], header["a"]) == (1, [2])
    assert (tmp_path / "one").stat().st_mode & 0o044


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "got none"), (b"{", "damaged"), (b"[1]", "something else"), (b'{"schema": "other/1"}', "got other/1")],
    ids=["missing", "damaged", "foreign", "another schema"],
)
def test_json_of_another_kind_is_refused(tmp_path, content, text):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputFileError, match=text):
        read_json(path, "test/1")
    write_json(path, {"schema": "test/1", "value": 3})
    assert read_json(path, "test/1")["value"] == 3


def test_run_folders_are_named_after_model_and_day_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_folder("rar-b")
    first.mkdir(parents=True)
    second = default_folder("rar-b")
    assert first.parts[0] == "runs"
    assert second.name == f"{first.name}-2"


def test_a_run_goes_on_only_with_the_inputs_it_was_started_with(tmp_path):
    folder = RunFolder(tmp_path / "run")
    identity = {"model": "rar-b", "settings": {"views": 10}}
    assert folder.check(identity, resume=True) is False
    folder.start(identity)
    assert folder.check(identity, resume=True) is True
    with pytest.raises(UsageError, match="--resume"):
        folder.check(identity, resume=False)
    with pytest.raises(UsageError, match="got model 'rar-l' instead of 'rar-b'"):
        folder.check(identity | {"model": "rar-l"}, resume=True)


def test_the_first_ctrl_c_is_a_request_and_the_second_stops():
    import signal

    with Interruption() as interruption:
        assert not interruption.requested
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
