"""Reading checkpoints in every form, and refusing everything else in one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmem import FastmemError, InputFileError, UsageError, assemble, load_model, model_names
from fastmem.models import registry
from fastmem.models.checkpoints import build_networks, read_state
from fastmem.models.fetch import fetch
from fastmem.models.registry import ModelEntry, OfficialFile, Preset, find_entry
from tests.conftest import recipe

CLASSES = 7
SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "image_seq_len": 4,
    "codebook_size": 16,
}
TOKENIZER = {
    "hidden_channels": 32,
    "channel_mult": (1, 1),
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 16,
    "resolution": 4,
}


def make_entry(name: str, **sizes: int) -> ModelEntry:
    return ModelEntry(
        name=name,
        module="fastmem.models.rar",
        generator=SIZES | sizes,
        tokenizer=TOKENIZER,
        generator_file=OfficialFile(f"{name}.bin", "someone/models"),
        tokenizer_file=OfficialFile("tokenizer.bin", "someone/models"),
        parameters="0 M",
        preset=Preset(),
    )


SMALL, WIDE = make_entry("small"), make_entry("wide", intermediate_size=64)


@pytest.fixture(autouse=True)
def known_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two small models in the registry, and a home without weights."""
    rows = {entry.name: entry for entry in (SMALL, WIDE)}
    monkeypatch.setattr("fastmem.models.registry.entries", lambda: rows)
    monkeypatch.setattr("fastmem.models.checkpoints.entries", lambda: rows)
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))


def make_states(entry: ModelEntry) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator, tokenizer = build_networks(entry, {"embeddings.weight": (SIZES["codebook_size"] + CLASSES + 2, 32)})
    return recipe.fill(generator.state_dict()), recipe.fill(tokenizer.state_dict())


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    generator, tokenizer = make_states(SMALL)
    torch.save(generator, tmp_path / "g.bin")
    torch.save(tokenizer, tmp_path / "t.bin")
    return tmp_path / "g.bin", tmp_path / "t.bin"


def save_legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


FORMS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], object]]] = {
    "bin": ("m.bin", torch.save),
    "pth before torch 1.6": ("m.pth", save_legacy),
    "safetensors": ("m.safetensors", save_file),
    "trainer": ("m.pth", lambda state, path: torch.save({"trainer": {"var_wo_ddp": state}, "epoch": 3}, path)),
    "state_dict": ("m.pth", lambda state, path: torch.save({"state_dict": state}, path)),
    "data parallel": ("m.pth", lambda s, path: torch.save({f"module.{k}": v for k, v in s.items()}, path)),
}


@pytest.mark.parametrize(("name", "save"), FORMS.values(), ids=FORMS)
def test_every_form_of_checkpoint_loads_the_same_weights(tmp_path, files, name, save):
    state, _ = make_states(SMALL)
    save(state, tmp_path / name)
    model = load_model("small", tmp_path / name, files[1], device="cpu")
    loaded = model.generator.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_the_number_of_classes_comes_from_the_checkpoint(files):
    model = load_model("small", *files, device="cpu")
    assert model.num_classes == CLASSES
    assert model.name == "small"
    assert (model.num_layers, model.num_units, model.num_tokens, model.image_size) == (2, 48, 4, 4)


def test_weights_of_another_precision_are_converted_and_the_tokenizer_stays_float32(tmp_path, files):
    state, tokenizer = make_states(SMALL)
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    save_file({k: v.half() for k, v in tokenizer.items()}, tmp_path / "t-half.safetensors")
    model = load_model("small", tmp_path / "half.safetensors", tmp_path / "t-half.safetensors", "cpu", "bfloat16")
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.tokenizer.parameters()} == {torch.float32}


def test_official_files_are_found_in_the_home_folder(files):
    home = SMALL.generator_file.path.parent
    home.mkdir(parents=True)
    os.replace(files[0], home / "small.bin")
    os.replace(files[1], home / "tokenizer.bin")
    assert load_model("small", device="cpu").num_classes == CLASSES


def test_a_model_knows_the_files_that_the_user_named(files, monkeypatch):
    home = SMALL.tokenizer_file.path.parent
    home.mkdir(parents=True)
    os.replace(files[1], home / "tokenizer.bin")
    monkeypatch.chdir(files[0].parent)
    model = load_model("small", files[0].name, device="cpu")
    assert (model.checkpoint_file, model.tokenizer_file) == (files[0].absolute(), None)
    again = load_model("small", files[0], home / "tokenizer.bin", device="cpu")
    assert again.tokenizer_file == home / "tokenizer.bin"
    together = assemble(model.generator, model.tokenizer)
    assert (together.checkpoint_file, together.tokenizer_file) == (None, None)


def test_edits_of_the_loaded_weights_do_not_reach_the_file(files):
    before = files[0].read_bytes()
    model = load_model("small", *files, device="cpu")
    model.fc1_layers[0].weight.mul_(0.5)
    assert files[0].read_bytes() == before


class Exploit:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo should not run",)


def spoil(path: Path, how: str) -> None:
    """Damage a checkpoint file in one of the ways that users meet."""
    # the tensors are mapped from the file that is about to change
    state = {name: tensor.clone() for name, tensor in read_state(path).items()}
    name = "blocks.0.mlp.fc1.weight"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>not found</html>")
    elif how == "pickle that runs code":
        torch.save({"state_dict": Exploit()}, path)
    elif how == "no state dict":
        torch.save({"weights": [1, 2, 3]}, path)
    elif how == "missing entry":
        torch.save({k: v for k, v in state.items() if k != name}, path)
    elif how == "unexpected entry":
        torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    elif how == "misshaped entry":
        torch.save({**state, name: torch.zeros(3, 3)}, path)
    elif how == "another size":
        torch.save(make_states(WIDE)[0], path)


BROKEN = {
    "truncated": (InputFileError, "fetch it again"),
    "empty": (InputFileError, "fetch it again"),
    "text": (InputFileError, "fetch it again"),
    "pickle that runs code": (InputFileError, "plain tensors"),
    "no state dict": (InputFileError, "is it a checkpoint"),
    "missing entry": (UsageError, r"1 missing \(blocks.0.mlp.fc1.weight\)"),
    "unexpected entry": (UsageError, r"1 unexpected \(extra.weight\)"),
    "misshaped entry": (UsageError, r"1 misshaped \(blocks.0.mlp.fc1.weight \[3, 3\] instead of \[48, 32\]\)"),
    "another size": (UsageError, "got the generator of wide: use --model wide"),
}


@pytest.mark.parametrize(("how", "error", "text"), [(k, *v) for k, v in BROKEN.items()], ids=BROKEN)
def test_files_that_do_not_fit_are_refused_in_one_sentence(files, how, error, text, capfd):
    spoil(files[0], how)
    with pytest.raises(error, match=text) as caught:
        load_model("small", *files, device="cpu")
    assert "\n" not in str(caught.value)
    assert "should not run" not in capfd.readouterr().out


REFUSED = {
    "model": ({"name": "rar-huge"}, UsageError, "expected a model out of small, wide, got 'rar-huge'"),
    "missing checkpoint": ({"checkpoint": "nowhere.bin"}, InputFileError, "nowhere.bin, got no such file"),
    "missing official file": ({"checkpoint": None}, InputFileError, "fastmem fetch --model small"),
    "device": ({"device": "tpu9"}, UsageError, "expected a device"),
    "gpu that is not there": ({"device": "cuda:99"}, UsageError, "CUDA devices"),
    "dtype": ({"dtype": "int8"}, UsageError, "expected a dtype"),
}


@pytest.mark.parametrize(("change", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_wrong_arguments_are_refused(files, change, error, text):
    arguments = {"name": "small", "checkpoint": files[0], "tokenizer": files[1], "device": "cpu"} | change
    with pytest.raises(error, match=text):
        load_model(**arguments)


def test_fetch_checks_the_files_that_are_there(files):
    home = SMALL.generator_file.path.parent
    home.mkdir(parents=True)
    os.replace(files[0], home / "small.bin")
    os.replace(files[1], home / "tokenizer.bin")
    notes: list[str] = []
    assert fetch(SMALL, notes.append) == [home / "small.bin", home / "tokenizer.bin"]
    assert all("all names and shapes fit small" in note for note in notes)
    spoil(home / "small.bin", "another size")
    with pytest.raises(UsageError, match="use --model wide"):
        fetch(SMALL, notes.append)


def test_fetch_downloads_into_the_home_folder(files, monkeypatch):
    generator, tokenizer = files
    asked = []

    def download(repository: str, name: str, local_dir: Path) -> str:
        asked.append((repository, name))
        target = Path(local_dir) / name
        target.write_bytes((generator if name == "small.bin" else tokenizer).read_bytes())
        return str(target)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    fetch(SMALL, lambda note: None)
    assert asked == [("someone/models", "small.bin"), ("someone/models", "tokenizer.bin")]
    assert load_model("small", device="cpu").num_classes == CLASSES


def test_fetch_without_a_connection_says_where_to_put_the_file(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputFileError, match="someone/models") as caught:
        fetch(SMALL, lambda note: None)
    assert str(SMALL.generator_file.path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def outside_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModelEntry]]:
    """Rows that an installed package adds to the registry."""
    rows: list[ModelEntry] = []

    class Point:
        value = "outside:rows"

        @staticmethod
        def load() -> Callable[[], list[ModelEntry]]:
            return lambda: rows

    monkeypatch.undo()
    registry.entries.cache_clear()
    monkeypatch.setattr("fastmem.models.registry.metadata.entry_points", lambda group: [Point])
    yield rows
    registry.entries.cache_clear()


def test_outside_packages_add_models_through_an_entry_point(outside_rows):
    outside_rows.append(SMALL)
    assert model_names()[-1] == "small"
    assert find_entry("small") is SMALL


def test_outside_packages_may_not_take_a_known_name(outside_rows):
    outside_rows.append(make_entry("rar-b"))
    with pytest.raises(UsageError, match="expected a new model name from outside:rows, got rar-b"):
        model_names()


def test_every_error_is_of_one_family_with_its_exit_code():
    assert (UsageError("").exit_code, InputFileError("").exit_code) == (2, 3)
    assert issubclass(UsageError, FastmemError)
    assert issubclass(InputFileError, FastmemError)
