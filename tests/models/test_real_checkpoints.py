"""Checkpoints of the embedded model as trainers save them, and entries that are no plain finite numbers."""

from __future__ import annotations

import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastmem import FastmemError, InputFileError, UsageError, load_model
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
    found = load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")
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


def change_members(path: Path, change: Callable[[zipfile.ZipInfo, bytes], bytes | None], out: Path) -> None:
    """Write an archive with other contents of its members, without checksums where they are left as they were."""
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as after:
        for member in before.infolist():
            content = before.read(member)
            changed = change(member, content)
            after.writestr(member.filename, content if changed is None else changed)


def largest_member(path: Path) -> str:
    """Name of an archive's largest member, which is a weight."""
    with zipfile.ZipFile(path) as archive:
        return max(archive.infolist(), key=lambda member: member.file_size).filename


def test_a_tensor_that_is_larger_than_its_data_is_refused(tmp_path):
    torch.save(tiny_state(), tmp_path / "whole.pth")
    name = largest_member(tmp_path / "whole.pth")
    change_members(
        tmp_path / "whole.pth",
        lambda member, content: content[: len(content) // 2] if member.filename == name else None,
        tmp_path / "it.pth",
    )
    with pytest.raises(InputFileError, match="a tensor is larger than its data"):
        load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")


def test_a_flipped_byte_in_a_weight_is_noticed_by_its_checksum(tmp_path):
    torch.save(tiny_state(), tmp_path / "whole.pth")
    change_members(tmp_path / "whole.pth", lambda member, content: None, tmp_path / "it.pth")
    with zipfile.ZipFile(tmp_path / "it.pth") as archive:
        at = archive.getinfo(largest_member(tmp_path / "it.pth")).header_offset + 4096
    content = bytearray((tmp_path / "it.pth").read_bytes())
    content[at] ^= 1
    (tmp_path / "it.pth").write_bytes(content)
    with pytest.raises(InputFileError, match="Bad CRC-32"):
        load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")


def test_an_archive_that_would_unpack_to_far_more_is_not_read(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "it.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("it/data.pkl", b"")
        with archive.open("it/data/0", "w", force_zip64=True) as member:
            for _ in range(1100):
                member.write(bytes(2**20))
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it was read"))
    with pytest.raises(InputFileError, match="more than 64 times its size"):
        load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("class_emb.weight", lambda value: torch.tensor(1.0), "misshaped"),
        ("class_emb.weight", lambda value: value[:1].expand(10**12, -1), "with all of its numbers"),
        ("lvl_1L", lambda value: value + 100, "follows from the network's sizes"),
        ("attn_bias_for_masking", torch.zeros_like, "follows from the network's sizes"),
        ("blocks.0.attn.zero_k_bias", lambda value: value - torch.inf, "NaN or infinity in blocks.0.attn.zero_k_bias"),
        ("word_embed.weight", lambda value: value.to(torch.float8_e4m3fn), "plain floating-point"),
    ],
    ids=["no dimension", "repeated", "levels", "mask", "infinite buffer", "8 bits"],
)
def test_an_entry_that_the_network_cannot_take_is_refused(tmp_path, name, change, text):
    state = tiny_state()
    torch.save(state | {name: change(state[name])}, tmp_path / "it.pth")
    with pytest.raises(FastmemError, match=text):
        load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")


@pytest.mark.parametrize(
    ("value", "named"),
    [(Namespace(lr=1e-4), "argparse.Namespace"), (np.float64(3.5), "scalar")],
    ids=["class", "numpy"],
)
def test_a_refused_object_is_named_and_no_unsafe_way_is_advised(tmp_path, value, named):
    torch.save({"model": tiny_state(), "more": value}, tmp_path / "it.pth")
    with pytest.raises(InputFileError, match=named) as refusal:
        load_model("var-tiny", checkpoint=tmp_path / "it.pth", device="cpu")
    assert "fetch it again" not in str(refusal.value)
    assert "weights_only" not in str(refusal.value)
