"""The hub's cache, its offline mode, and downloads from a server of this machine."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from fastmem import FastmemError, InputFileError
from fastmem.models.fetch import fetch
from fastmem.models.hub import find_in_hub_cache, hub_cache
from fastmem.models.registry import OfficialFile, find_entry
from tests.models.test_checkpoints import SMALL, make_states

COMMIT = "1" * 40
REPOSITORY = "someone/models"


def put_into_cache(cache: Path, name: str, content: bytes) -> Path:
    """Put a file where the hub's package keeps it: a link in the snapshot of the newest commit."""
    folder = cache / "models--someone--models"
    snapshot = folder / "snapshots" / COMMIT
    for place in (folder / "blobs", folder / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs" / name).write_bytes(content)
    (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot / name


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, bytes]:
    """The small model's two files, by name."""
    files = {}
    for state, file in zip(make_states(SMALL), (SMALL.generator_file, SMALL.tokenizer_file), strict=True):
        torch.save(state, tmp_path / file.name)
        files[file.name] = (tmp_path / file.name).read_bytes()
    return files


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No variable of the hub is set, and homes are in the test's folder; returns it."""
    for variable in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return tmp_path


PLACES = {
    "usual": ({}, ".cache/huggingface/hub"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "x"}, "x/huggingface/hub"),
    "HF_HOME": ({"HF_HOME": "h", "XDG_CACHE_HOME": "x"}, "h/hub"),
    "HF_HUB_CACHE": ({"HF_HUB_CACHE": "c", "HF_HOME": "h"}, "c"),
}


@pytest.mark.parametrize(("variables", "place"), PLACES.values(), ids=PLACES)
def test_a_file_in_the_hubs_cache_is_an_official_files_place(surroundings, monkeypatch, variables, place):
    for variable, folder in variables.items():
        monkeypatch.setenv(variable, str(surroundings / folder))
    file = OfficialFile("m.bin", REPOSITORY)
    own = surroundings / "home" / "weights" / "m.bin"
    assert file.path == own
    cached = put_into_cache(surroundings / place, "m.bin", b"weights")
    assert file.path == cached
    own.parent.mkdir(parents=True)
    own.write_bytes(b"weights")
    assert file.path == own


def test_a_damaged_cache_is_passed_over(surroundings):
    cached = put_into_cache(surroundings / ".cache/huggingface/hub", "m.bin", b"weights")
    assert find_in_hub_cache(REPOSITORY, "m.bin") == cached
    assert find_in_hub_cache(REPOSITORY, "other.bin") is None
    assert find_in_hub_cache("someone/else", "m.bin") is None
    cached.resolve().unlink()
    assert find_in_hub_cache(REPOSITORY, "m.bin") is None


def test_the_cache_needs_no_home_folder(surroundings, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda name: name)
    assert hub_cache() is None
    assert find_in_hub_cache(REPOSITORY, "m.bin") is None
    monkeypatch.setenv("HF_HOME", str(surroundings))
    assert hub_cache() == surroundings / "hub"


@pytest.fixture
def offline(surroundings: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's variables forbid the network; returns its cache."""
    monkeypatch.setenv("HF_HOME", str(surroundings / "hf"))
    # the package reads this variable once, when it is imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return surroundings / "hf" / "hub"


def test_offline_what_the_cache_holds_is_used(offline, contents):
    places = [put_into_cache(offline, *item) for item in contents.items()]
    assert fetch(SMALL, lambda note: None) == places


def test_offline_what_the_cache_lacks_is_named(offline, surroundings, contents):
    put_into_cache(offline, "small.bin", contents["small.bin"])
    with pytest.raises(InputFileError, match="tokenizer.bin.*HF_HUB_OFFLINE is set") as caught:
        fetch(SMALL, lambda note: None)
    assert str(surroundings / "home" / "weights" / "tokenizer.bin") in str(caught.value)
    assert str(offline) in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """Serves a repository's files as the hub does; of a file in ``cut`` it sends half."""

    def __init__(self, files: dict[str, bytes], cut: list[str], *arguments: object) -> None:
        self.files, self.cut = files, cut
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        content = self.answer()
        name = self.path.rpartition("/")[2]
        self.wfile.write(content[: len(content) // 2] if name in self.cut else content)

    def answer(self) -> bytes:
        content = self.files.get(self.path.removeprefix(f"/{REPOSITORY}/resolve/main/"))
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        return content or b""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(
    contents: dict[str, bytes], surroundings: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[dict[str, bytes], list[str]]]:
    """The files that a server of this machine serves in place of the hub, and the names of those that it cuts off."""
    cut: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, contents, cut)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "".join(template[1:]))
        yield contents, cut
        server.shutdown()
        thread.join()


def test_files_are_downloaded_from_a_server_and_then_kept(surroundings, hub):
    contents, _ = hub
    weights = surroundings / "home" / "weights"
    paths = [weights / name for name in contents]
    assert fetch(SMALL, lambda note: None) == paths
    assert {path.name: path.read_bytes() for path in paths} == contents
    # nothing is asked for again
    contents.clear()
    assert fetch(SMALL, lambda note: None) == paths


@pytest.mark.parametrize("how", ["absent", "cut off", "another network's"])
def test_a_download_that_fails_ends_with_a_sentence(surroundings, hub, how):
    contents, cut = hub
    if how == "absent":
        del contents["small.bin"]
    elif how == "cut off":
        cut.append("small.bin")
    else:
        contents["small.bin"] = contents["tokenizer.bin"]
    with pytest.raises(FastmemError, match="small.bin") as caught:
        fetch(SMALL, lambda note: None)
    assert "\n" not in str(caught.value)
    # what is there is whole
    assert (surroundings / "home" / "weights" / "small.bin").exists() == (how == "another network's")


def test_official_models_are_looked_up_in_the_cache(surroundings):
    file = find_entry("rar-b").generator_file
    assert file.path == file.own_path == surroundings / "home" / "weights" / "rar_b.bin"
