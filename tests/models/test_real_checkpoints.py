"""Checkpoints of the embedded model as trainers save them, and entries that are no plain finite numbers."""

from __future__ import annotations

import re
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from fastmem import InputFileError, UsageError, load_model
from tests.conftest import ROOT


def tiny_state() -> dict[str, torch.Tensor]:
    """The entries of the embedded VAR's file."""
    return load_file(ROOT / "fastmem" / "demo" / "var_tiny.safetensors")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."])
def test_names_that_compiled_and_parallel_models_have_are_taken(tmp_path, prefix):
    torch.save({prefix + name: value for name, value in tiny_state().items()}, tmp_path / "it.pth")
    found = load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")
    assert found.fingerprint() == load_model("var-tiny", device="cpu").fingerprint()


def test_a_checkpoint_whose_members_are_compressed_is_read_as_it_is(tmp_path):
    torch.save(tiny_state(), tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "it.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    try:
        found = load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")
    except InputFileError:
        # some releases of torch refuse such a file, which is as good
        return
    assert found.fingerprint() == load_model("var-tiny", device="cpu").fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.index_fill(0, torch.tensor([0]), float("nan")),
        lambda value: value.index_fill(0, torch.tensor([0]), -float("inf")),
        lambda value: value.to(torch.complex64),
        lambda value: value.to(torch.int64),
        lambda value: value.to_sparse(),
        lambda value: value.to("meta"),
    ],
    ids=["nan", "infinite", "complex", "whole", "sparse", "meta"],
)
def test_an_entry_that_is_no_plain_finite_number_is_refused_by_name(tmp_path, change):
    state = tiny_state()
    name = next(name for name in state if name.endswith("mlp.fc1.weight") or name.endswith("ffn.fc1.weight"))
    torch.save(state | {name: change(state[name])}, tmp_path / "it.pth")
    with pytest.raises(InputFileError, match=re.escape(name)):
        load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path):
    state = tiny_state()
    name = next(name for name in state if name.endswith("fc1.weight"))
    torch.save(state | {name: state[name].float() * 1e7}, tmp_path / "it.pth")
    with pytest.raises(UsageError, match="use --dtype float32 or bfloat16"):
        load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu", dtype="float16")


def test_a_wrapper_that_holds_itself_ends(tmp_path):
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, tmp_path / "it.pth")
    with pytest.raises(InputFileError, match="is it a checkpoint"):
        load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")
