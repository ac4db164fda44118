"""Files are written whole or not at all, and the run folder keeps its word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

import pytest
import torch

from fastmem import InputFileError, UsageError
from fastmem.files import check_tensors, read_json, read_tensors, write_atomically, write_json, write_tensors
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


def test_a_link_that_was_planted_is_replaced_and_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("kept")
    target = tmp_path / "out" / "table.json"
    target.parent.mkdir()
    # the final name, and the name that temporary files used to have
    target.symlink_to(secret)
    (target.parent / ".table.json.partial").symlink_to(secret)
    write_json(target, {"schema": "test/1"})
    assert secret.read_text() == "kept"
    assert not target.is_symlink()
    assert read_json(target, "test/1") == {"schema": "test/1"}


def test_a_folder_that_its_user_linked_elsewhere_is_written_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    write_json(tmp_path / "out" / "table.json", {"schema": "test/1"})
    assert (tmp_path / "disk" / "table.json").is_file()


def test_a_file_system_that_refuses_permissions_is_written_to(tmp_path, monkeypatch):
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    write_json(tmp_path / "table.json", {"schema": "test/1"})
    assert read_json(tmp_path / "table.json", "test/1")


class Shape(TypedDict):
    count: int
    names: list[str]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"schema": "test/1", "names": []}',
        '{"schema": "test/1", "count": "3", "names": []}',
        '{"schema": "test/1", "count": 3.5, "names": []}',
        '{"schema": "test/1", "count": 1e999, "names": []}',
        '{"schema": "test/1", "count": 3, "names": [1]}',
        '{"schema": "test/1", "count": NaN, "names": []}',
        '{"schema": ["test/1"], "count": 3, "names": []}',
        '{"schema": "test/1", "count": 3, "names": ' + "[" * 5000 + "]" * 5000 + "}",
    ],
    ids=["deep", "missing", "text", "fraction", "huge", "entry", "not a number", "schema", "deep entry"],
)
def test_a_document_with_a_wrong_entry_is_refused(tmp_path, text):
    (tmp_path / "document.json").write_text(text)
    with pytest.raises(InputFileError, match=r"document\.json"):
        read_json(tmp_path / "document.json", "test/1", Shape)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_regular_file_is_never_waited_for(tmp_path, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(InputFileError):
        read_json(path, "test/1")


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    write_json(tmp_path / "document.json", {"schema": "test/1", "found": [float("nan"), {"b": float("inf")}, 1.5]})
    assert read_json(tmp_path / "document.json", "test/1")["found"] == [None, {"b": None}, 1.5]


def test_a_file_of_another_run_is_refused_and_both_sides_are_named(tmp_path):
    write_tensors(tmp_path / "it", {"a": torch.ones(2)}, "test/1", {"run": "aaaa"})
    assert read_tensors(tmp_path / "it", "test/1", owner={"run": "aaaa"})[1]["run"] == "aaaa"
    with pytest.raises(InputFileError, match="expected run bbbb .* got aaaa"):
        read_tensors(tmp_path / "it", "test/1", owner={"run": "bbbb"})


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "tensor loss of float32"),
        ({"loss": torch.ones(3, dtype=torch.int64), "hits": torch.ones(3)}, r"got int64 \[3\]"),
        ({"loss": torch.ones(3), "hits": torch.ones(4)}, r"float32 \[3\] in .* got float32 \[4\]"),
        ({"loss": torch.ones(3, 1), "hits": torch.ones(3)}, r"got float32 \[3, 1\]"),
    ],
    ids=["missing", "dtype", "size", "dimensions"],
)
def test_tensors_of_another_kind_are_refused(tmp_path, tensors, text):
    with pytest.raises(InputFileError, match=text):
        check_tensors(tmp_path / "it", tensors, {"loss": ("float32", ("N",)), "hits": ("float32", ("N",))})


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
