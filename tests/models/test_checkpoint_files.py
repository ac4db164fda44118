"""Checkpoints as people have them: under any key, in parts, under a wrong suffix, or another file altogether."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmem import InputFileError, UsageError, load_model, open_run
from fastmem.models.checkpoints import read_state, read_weights
from fastmem.models.registry import find_entry
from tests.conftest import ROOT, exit_code, random_images, write_folder

State = dict[str, Tensor]
DEMO = ROOT / "fastmem" / "demo"
FILES = {
    "generator": "var_tiny.safetensors",
    "tokenizer": "vqvae_tiny.safetensors",
    "rar generator": "rar_tiny.safetensors",
    "rar tokenizer": "maskgit_vqgan_tiny.safetensors",
}


def weights(name: str = "generator") -> State:
    return load_file(DEMO / FILES[name])


def changed(state: State) -> State:
    """A state dict of the same names and shapes and other numbers, as an EMA is."""
    return {name: -value if name.endswith("fc1.weight") else value for name, value in state.items()}


def fc1(path: str | Path) -> Tensor:
    """The first weights of the units that a checkpoint of var-tiny gives."""
    return read_weights(find_entry("var-tiny"), "generator", Path(path))["blocks.0.ffn.fc1.weight"]


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return weights()["blocks.0.ffn.fc1.weight"]


WRAPPED: dict[str, Callable[[State], object]] = {
    "any key": lambda s: {"whatever": s, "epoch": 3, "args": {"lr": 0.1, "tags": ["a"]}},
    "beside an optimizer": lambda s: {"net": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "exp": s}},
    "beside plain values": lambda s: {**s, "epoch": 3, "args": {"lr": 0.1}},
    "key within key": lambda s: {"a": {"b": {"module": s}}},
    "twice the same": lambda s: {"model": s, "ema": {name: value.clone() for name, value in s.items()}},
    "compiled block by block": lambda s: {n.replace("blocks.1.", "blocks.1._orig_mod."): v for n, v in s.items()},
    "mixed wrappers": lambda s: {("module.", "_orig_mod.module.")[i % 2] + n: v for i, (n, v) in enumerate(s.items())},
    "prefix": lambda s: {f"generator.{name}": value for name, value in s.items()},
    "prefix beside others": lambda s: {**{f"net.{n}": v for n, v in s.items()}, "loss.weight": torch.zeros(3)},
    "prefix under a key": lambda s: {"state_dict": {f"module.model.{n}": v for n, v in s.items()}},
    "parameters": lambda s: {"ema": {n: torch.nn.Parameter(v, v.is_floating_point()) for n, v in s.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_under_any_key_and_prefix(tmp_path, expected, wrap):
    torch.save(wrap(weights()), tmp_path / "it.pth")
    assert torch.equal(fc1(tmp_path / "it.pth"), expected)


TWO_FIT: dict[str, tuple[Callable[[State, State], object], str, str]] = {
    "keys": (lambda one, two: {"model": one, "ema": two}, "model", "ema"),
    "keys within a key": (lambda one, two: {"a": {"model": one, "ema": two}}, "a.model", "a.ema"),
    "bare and a key": (lambda one, two: {**one, "ema": two}, ".", "ema"),
    "bare and a prefix": (lambda one, two: one | {f"ema.{n}": v for n, v in two.items()}, ".", "ema"),
    "bare and a wrapper": (lambda one, two: one | {f"module.{n}": v for n, v in two.items()}, ".", "module"),
    "prefixes": (
        lambda one, two: {"s": {f"{p}.{n}": v for p, s in (("m", one), ("e", two)) for n, v in s.items()}},
        "s.m",
        "s.e",
    ),
}


@pytest.mark.parametrize(("wrap", "first", "second"), TWO_FIT.values(), ids=TWO_FIT)
def test_where_two_fit_and_differ_the_user_chooses(tmp_path, expected, wrap, first, second):
    path = tmp_path / "it.pth"
    torch.save(wrap(weights(), changed(weights())), path)
    with pytest.raises(UsageError) as caught:
        load_model("var-tiny", path, device="cpu")
    assert f"--checkpoint {path}#{first} or {path}#{second}" in str(caught.value)
    assert torch.equal(fc1(f"{path}#{first}"), expected)
    assert torch.equal(fc1(f"{path}#{second}"), -expected)
    with pytest.raises(UsageError, match="after #, got 'modle'"):
        load_model("var-tiny", f"{path}#modle", device="cpu")


def test_a_file_may_have_the_sign_of_a_key_in_its_name(tmp_path, expected):
    torch.save({"model": changed(weights()), "ema": weights()}, tmp_path / "a#b.pth")
    torch.save(weights(), tmp_path / "a#b.pth#model")
    assert torch.equal(fc1(tmp_path / "a#b.pth#model"), expected)
    assert torch.equal(fc1(tmp_path / "a#b.pth#ema"), expected)


def test_a_run_remembers_the_key_of_its_weights(tmp_path, expected):
    torch.save({"model": changed(weights()), "ema": weights()}, tmp_path / "it.pth")
    images = write_folder(tmp_path / "train", random_images(2, 64), 2)
    options = ("--model", "var-tiny", "--views", "center", "--no-class-check", "--segments", "scale2", "--data", images)
    assert exit_code("score", *options, "--checkpoint", f"{tmp_path / 'it.pth'}#ema", "--out", tmp_path / "run") == 0
    assert torch.equal(open_run(tmp_path / "run", device="cpu").model.fc1_layers[0].weight, expected)


def test_both_networks_are_found_in_a_trainers_file(tmp_path):
    content = {"trainer": {"var_wo_ddp": weights(), "vae_local": weights("tokenizer")}, "epoch": 1}
    torch.save(content, tmp_path / "it.pth")
    found = load_model("var-tiny", tmp_path / "it.pth", tmp_path / "it.pth", device="cpu")
    assert found.fingerprint() == load_model("var-tiny", device="cpu").fingerprint()


def test_what_an_optimizer_keeps_is_not_taken_for_weights(tmp_path):
    torch.save({"optimizer": {"exp_avg": weights()}, "exp_avg_sq": weights()}, tmp_path / "it.pth")
    with pytest.raises(InputFileError, match=r"entries without tensors \(optimizer, exp_avg_sq\)"):
        load_model("var-tiny", tmp_path / "it.pth", device="cpu")


def test_entries_that_share_memory_are_taken_apart(tmp_path):
    state = weights()
    one, two = "blocks.0.ffn.fc1.weight", "blocks.1.ffn.fc1.weight"
    torch.save(state | {one: state[two]}, tmp_path / "it.pth")
    first, second, *_ = load_model("var-tiny", tmp_path / "it.pth", device="cpu").fc1_layers
    assert torch.equal(first.weight, second.weight)
    first.weight.zero_()
    assert torch.equal(second.weight, state[two])


SUFFIXES: dict[str, tuple[str, Callable[[State, Path], object]]] = {
    "safetensors as bin": ("it.bin", save_file),
    "safetensors as anything": ("it.v2", save_file),
    "torch as safetensors": ("it.safetensors", torch.save),
    "old torch as safetensors": (
        "it.safetensors",
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    ),
}


@pytest.mark.parametrize(("name", "save"), SUFFIXES.values(), ids=SUFFIXES)
def test_the_format_is_told_by_the_content(tmp_path, expected, name, save):
    save(weights(), tmp_path / name)
    assert torch.equal(fc1(tmp_path / name), expected)


def archive_of(**members: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return buffer.getvalue()


def tar_of(content: bytes) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("model.pth")
        member.size = len(content)
        archive.addfile(member, BytesIO(content))
    return buffer.getvalue()


def array_bytes() -> bytes:
    buffer = BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


FOREIGN = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer.*git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html></html>", "web page.*fetch it again"),
    "xml": (b"<?xml version='1.0'?><Error>denied</Error>", "XML document"),
    "text": ("Zugriff verweigert: höflich".encode(), "text file that begins with 'Zugriff"),
    "empty": (b"", "empty file: fetch it again"),
    "zeros": (bytes(4096), "zeros alone"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a", "ONNX"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\x00\x00", "HDF5"),
    "msgpack": (b"\x82\xa6params\x83\xa1b\xc0", "msgpack"),
    "numpy": (array_bytes(), "array of numpy"),
    "numpy archive": (archive_of(a_npy=array_bytes()), "archive of numpy's arrays"),
    "gzip": (gzip.compress(b"model"), "gzip archive: unpack it"),
    "tar": (tar_of(b"model"), "tar archive: unpack it"),
    "torchscript": (archive_of(m__data_pkl=b"", m__constants_pkl=b""), "TorchScript"),
    "export": (archive_of(m__archive_format=b"pt2").replace(b"archive.format", b"archive_format"), "torch.export"),
    "zip of images": (archive_of(a__1_png=b"", a__2_JPG=b""), "zip of images: give it with --data"),
    "zip": (archive_of(a__readme_txt=b""), "zip archive, which begins with a/readme.txt"),
    "empty zip": (b"PK\x03\x04", "damaged or incomplete archive"),
    "plain pickle": (pickle.dumps({"a": 1}), "pickle that torch.save did not write"),
    "json": (b'{"model_type": "var"}', "JSON document without weight_map"),
    "image": (b"\x89PNG\r\n\x1a\n", "PNG image"),
    "unknown": (bytes(range(200, 256)), "bytes c8 c9"),
    "one byte": (b"\x08", "bytes 08"),
}


@pytest.mark.parametrize(("content", "text"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("name", ["it.pth", "it.safetensors"])
def test_another_kind_of_file_is_named(tmp_path, content, text, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputFileError, match=text) as caught:
        load_model("var-tiny", tmp_path / name, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/dev/zero", "a\0b", "a" * 5000, "pipe", "empty"])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("empty")
    with pytest.raises(InputFileError, match="check the path|name the file"):
        load_model("var-tiny", path, device="cpu")


OTHERS = {
    "the tokenizer as generator": ("checkpoint", "tokenizer", "tokenizer of var-tiny: give it with --tokenizer"),
    "the generator as tokenizer": ("tokenizer", "generator", "generator of var-tiny: give it with --checkpoint"),
    "another family's generator": ("checkpoint", "rar generator", "generator of rar-tiny: use --model rar-tiny"),
    "another family's tokenizer": ("tokenizer", "rar tokenizer", "tokenizer of rar-tiny: give the tokenizer of var"),
    "another family's tokenizer as generator": ("checkpoint", "rar tokenizer", "tokenizer of rar-tiny: give the gener"),
    "another family's generator as tokenizer": ("tokenizer", "rar generator", "generator of rar-tiny: give the token"),
}


@pytest.mark.parametrize(("option", "file", "text"), OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_network_is_named(tmp_path, option, file, text):
    torch.save({"ema": weights(file), "epoch": 1}, tmp_path / "it.pth")
    with pytest.raises(UsageError, match=f"got the {text}"):
        load_model("var-tiny", device="cpu", **{option: tmp_path / "it.pth"})


@pytest.mark.parametrize(
    ("name", "text"),
    [("Mixed_7c.branch_pool.conv.weight", "--inception"), ("backbone.layer4.2.conv3.weight", "--sscd")],
    ids=["inception", "sscd"],
)
def test_networks_of_other_options_are_named(tmp_path, name, text):
    torch.save({name: torch.zeros(3)}, tmp_path / "it.pth")
    with pytest.raises(UsageError, match=text):
        load_model("var-tiny", tmp_path / "it.pth", device="cpu")


def write_parts(folder: Path, state: State, suffix: str = ".safetensors") -> Path:
    """Write a checkpoint in three parts, and return its index."""
    folder.mkdir(exist_ok=True)
    save: Callable[[State, Path], object] = save_file if suffix == ".safetensors" else torch.save
    parts = {i: f"model-0000{i + 1}-of-00003{suffix}" for i in range(3)}
    for i, part in parts.items():
        save(dict(list(state.items())[i::3]), folder / part)
    weight_map = {name: parts[i % 3] for i, name in enumerate(state)}
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_a_checkpoint_in_parts_is_read_by_its_index_or_its_folder(tmp_path, expected, suffix, prefix):
    index = write_parts(tmp_path / "it", {prefix + name: value for name, value in weights().items()}, suffix)
    assert torch.equal(fc1(index), expected)
    assert torch.equal(fc1(index.parent), expected)
    with pytest.raises(UsageError, match=r"one part of a checkpoint: give its .index.json"):
        load_model("var-tiny", next(index.parent.glob(f"*-00001-*{suffix}")), device="cpu")


def test_a_folder_with_one_checkpoint_stands_for_it(tmp_path, expected):
    torch.save(weights(), tmp_path / "it.pth")
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(fc1(tmp_path), expected)
    torch.save(weights("tokenizer"), tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"got 2 \(it.pth, other.pth\): name the one to take"):
        load_model("var-tiny", tmp_path, device="cpu")


def repoint(index: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads(index.read_text())
    document["weight_map"] = change(document["weight_map"])
    index.write_text(json.dumps(document))


FIRST = "model-00001-of-00003.safetensors"
BROKEN_PARTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a part is missing": (lambda index: (index.parent / FIRST).unlink(), f"got no {FIRST}: fetch what is missing"),
    "a part is damaged": (lambda index: (index.parent / FIRST).write_bytes(b"PK\x03\x04"), "incomplete archive"),
    "a part is another": (lambda index: save_file({"a": torch.zeros(1)}, index.parent / FIRST), "1 unlisted .a."),
    "an entry is unlisted": (lambda index: repoint(index, lambda m: dict(list(m.items())[1:])), "1 unlisted"),
    "all in one part": (lambda index: repoint(index, lambda m: dict.fromkeys(m, FIRST)), "missing"),
    "a way out": (lambda index: repoint(index, lambda m: m | {"a": "../it.pth"}), "lie beside the index"),
    "an absolute path": (lambda index: repoint(index, lambda m: m | {"a": "/etc/passwd"}), "lie beside the index"),
    "a long name": (lambda index: repoint(index, lambda m: m | {"a": "a" * 5000}), "got no aaaa"),
    "itself": (lambda index: repoint(index, lambda m: m | {"a": index.name}), "got a JSON document"),
    "no entries": (lambda index: repoint(index, lambda m: {}), "without entries"),
    "wrong types": (lambda index: repoint(index, lambda m: m | {"a": 3}), "Expected `str`"),
    "a list": (lambda index: repoint(index, list), "Expected `object`"),
    "listed twice": (lambda index: index.write_text('{"weight_map": {"a": "b", "a": "c"}}'), "a name stands twice"),
    "nested deep": (lambda index: index.write_text('{"weight_map": ' * 10**5), "damaged one"),
}


@pytest.mark.parametrize(("damage", "text"), BROKEN_PARTS.values(), ids=BROKEN_PARTS)
def test_a_checkpoint_in_parts_that_is_not_whole_is_refused(tmp_path, damage, text):
    index = write_parts(tmp_path / "it", weights())
    damage(index)
    with pytest.raises(InputFileError, match=text):
        load_model("var-tiny", index, device="cpu")


def test_a_reader_without_a_network_takes_no_choice_by_itself(tmp_path):
    torch.save({"model": weights(), "ema": weights()}, tmp_path / "it.pth")
    with pytest.raises(UsageError, match=r"got 2 \(model, ema\)"):
        read_state(tmp_path / "it.pth")
    with pytest.raises(InputFileError, match="got a JSON document"):
        read_state(write_parts(tmp_path / "parts", weights()))
    with pytest.raises(InputFileError, match="a directory"):
        read_state(tmp_path)
