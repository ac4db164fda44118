"""Checkpoints that are damaged, rearranged or made up: the same weights, or one sentence, and never other numbers."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from fastmem import InputFileError, UsageError
from fastmem.models.checkpoints import read_weights
from tests.models.test_checkpoints import SMALL, WIDE, make_states

modestly = settings(derandomize=True, max_examples=30, deadline=None, database=None)
# for tests whose every example writes and reads several files
rarely = settings(modestly, max_examples=8)
FORMATS = ("zip", "legacy", "safetensors")
MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"{", b"\x40" + bytes(7) + b"{")
MAGICS += (b"GGUF", b"\x93NUMPY", b"<html", b"version https://git-lfs", b"")
# keys of wrappers, with some that mean something to torch or to the reader
KEYS = st.sampled_from(["model", "ema", "module", "_orig_mod", "net", "state_dict", "a.b", "ä", "", ".", "#", "0"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(autouse=True, scope="module")
def known_models() -> Iterator[None]:
    """Two small models in the registry."""
    rows = {entry.name: entry for entry in (SMALL, WIDE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmem.models.checkpoints.entries", lambda: rows)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that every example overwrites."""
    return tmp_path_factory.mktemp("hostile") / "it.pth"


@cache
def whole() -> dict[str, Tensor]:
    return make_states(SMALL)[0]


@cache
def contents(form: str) -> bytes:
    """The small generator in a format."""
    if form == "safetensors":
        return save(whole())
    buffer = BytesIO()
    torch.save(whole(), buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


def read(path: Path | str) -> dict[str, Tensor] | None:
    """The entries of a file; None where it is refused in one sentence."""
    try:
        return read_weights(SMALL, "generator", Path(path))
    except (InputFileError, UsageError):
        return None


def write(path: Path, content: bytes) -> None:
    # a file that is still mapped must not change
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def is_whole(found: dict[str, Tensor]) -> bool:
    return found.keys() == whole().keys() and all(torch.equal(found[name], value) for name, value in whole().items())


@modestly
@given(form=st.sampled_from(FORMATS), share=st.floats(0, 1), short=st.integers(1, 40))
def test_a_file_that_was_cut_off_is_refused(place, form, share, short):
    content = contents(form)
    for length in (int(share * (len(content) - 1)), len(content) - short):
        write(place, content[:length])
        assert read(place) is None


@modestly
@given(data=st.data())
def test_changed_bytes_of_an_archive_change_no_number(place, data):
    content = bytearray(contents("zip"))
    # half of the changes are in the directory at its end
    places = st.integers(0, len(content) - 1) | st.integers(len(content) - 4000, len(content) - 1)
    for at in data.draw(st.lists(places, min_size=1, max_size=3)):
        content[at] ^= data.draw(st.integers(1, 255))
    write(place, bytes(content))
    found = read(place)
    assert found is None or is_whole(found)


@modestly
@given(at=st.floats(0, 1), change=st.integers(1, 255))
def test_a_changed_byte_of_a_safetensors_header_changes_no_number(place, at, change):
    content = bytearray(contents("safetensors"))
    length = int.from_bytes(content[:8], "little")
    content[int(at * (length + 7))] ^= change
    write(place, bytes(content))
    found = read(place)
    assert found is None or is_whole(found)


@modestly
@given(
    name=st.sampled_from(["embeddings.weight", "blocks.0.mlp.fc1.weight", "new", "__metadata__"]),
    dtype=st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "BOOL", "F4", "C64", "X", ""]) | JSON_VALUES,
    shape=st.lists(st.integers(-1, 2**66), max_size=4) | JSON_VALUES,
    offsets=st.lists(st.integers(-1, 2**66), max_size=3) | JSON_VALUES,
)
def test_a_safetensors_header_that_is_made_up_is_refused(place, name, dtype, shape, offsets):
    content = contents("safetensors")
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    made_up = json.dumps(header).encode()
    write(place, len(made_up).to_bytes(8, "little") + made_up + content[8 + length :])
    found = read(place)
    assert found is None or is_whole(found)


@modestly
@given(data=st.data())
def test_a_pickle_that_is_made_up_is_loaded_or_refused(place, data):
    with zipfile.ZipFile(BytesIO(contents("zip"))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    pickled = bytearray(members[name])
    for at in data.draw(st.lists(st.integers(0, len(pickled) - 1), min_size=1, max_size=3)):
        pickled[at] = data.draw(st.integers(0, 255))
    place.unlink(missing_ok=True)
    with zipfile.ZipFile(place, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, bytes(pickled) if member == name else content)
    # the checksum is right, so what was changed is what was saved
    read(place)


@modestly
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=600))
def test_made_up_files_are_refused(place, magic, rest):
    write(place, magic + rest)
    assert read(place) is None


def junk() -> st.SearchStrategy[Any]:
    """What trainers keep beside weights."""
    plain = st.none() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8)
    tensors = st.sampled_from([torch.zeros(3), torch.tensor(1), torch.zeros(2, 2).to_sparse(), torch.zeros(0)])
    named = st.dictionaries(st.text(max_size=8) | st.integers(0, 9), plain | tensors, max_size=3)
    return st.recursive(plain | named, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner), max_leaves=4)


@modestly
@given(
    keys=st.lists(KEYS, max_size=4),
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "generator.", "a.b."]), max_size=3),
    beside=st.dictionaries(st.text("xyz", min_size=1), junk(), max_size=3),
    circular=st.booleans(),
)
def test_weights_are_found_however_they_are_wrapped(place, keys, prefixes, beside, circular):
    content: dict[str, Any] = {"".join(prefixes) + name: value for name, value in whole().items()}
    for key in keys:
        content = {**beside, key: content}
    if circular and keys:
        content["itself"] = content
    torch.save(content, place)
    found = read(place)
    assert found is not None
    assert is_whole(found)


@rarely
@given(keys=st.lists(KEYS.filter(lambda key: key.strip(".#")), min_size=2, max_size=3, unique=True), data=st.data())
def test_of_several_sets_that_fit_none_is_taken_unasked(place, keys, data):
    states = {key: {name: value + i for name, value in whole().items()} for i, key in enumerate(keys)}
    inner = data.draw(st.sampled_from(["", "module.", "x."]))
    torch.save({key: {inner + n: v for n, v in state.items()} for key, state in states.items()}, place)
    with pytest.raises(UsageError, match=f"got {len(keys)} that differ"):
        read_weights(SMALL, "generator", place)
    for key, state in states.items():
        found = read(f"{place}#{key}")
        assert found is not None
        assert all(torch.equal(found[name], value) for name, value in state.items())


@modestly
@given(data=st.data())
def test_entries_that_were_renamed_or_lost_are_refused(place, data):
    state: dict[Any, Any] = dict(whole())
    name = data.draw(st.sampled_from(sorted(state)))
    value = state.pop(name)
    kind = data.draw(st.sampled_from(["lost", "renamed", "no tensor", "reshaped"]))
    if kind == "renamed":
        state[data.draw(st.text(max_size=10) | st.integers() | st.just(f"module.{name}.weight"))] = value
    elif kind == "no tensor":
        state[name] = data.draw(junk())
    elif kind == "reshaped":
        state[name] = value[None]
    torch.save(state, place)
    assert read(place) is None


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An index that every example overwrites, beside two parts, and what it has to hold."""
    folder = tmp_path_factory.mktemp("parts")
    for i in range(2):
        (folder / f"p{i}.safetensors").write_bytes(save(dict(list(whole().items())[i::2])))
    return folder / "it.index.json", {name: f"p{i % 2}.safetensors" for i, name in enumerate(whole())}


@modestly
@given(document=JSON_VALUES | st.fixed_dictionaries({"weight_map": JSON_VALUES}))
def test_an_index_that_is_made_up_is_refused(index, document):
    index[0].write_text(json.dumps(document))
    assert read(index[0]) is None


@modestly
@given(data=st.data())
def test_an_index_with_changed_entries_changes_no_number(index, data):
    path, weight_map = index
    changed: dict[str, Any] = dict(weight_map)
    names = st.sampled_from(["p0.safetensors", "p1.safetensors", "../p0.safetensors", "it.index.json", "", "..", "/"])
    for name in data.draw(st.lists(st.sampled_from(sorted(weight_map)) | st.text(max_size=5), min_size=1, max_size=3)):
        changed[name] = data.draw(names | JSON_VALUES)
    path.write_text(json.dumps({"weight_map": changed}))
    found = read(path)
    assert (found is not None and is_whole(found)) if changed == weight_map else found is None
