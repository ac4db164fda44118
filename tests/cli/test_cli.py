"""The command line: exit codes, one sentence per error, one JSON document, and what is imported when."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmem.cli import COMMANDS
from fastmem.demo.doses import IMAGES
from tests.conftest import random_images, run, write_folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An image folder of 2 classes with 3 pictures each."""
    return write_folder(tmp_path / "data", random_images(6, 64))


@pytest.mark.parametrize("statement", ["import fastmem", "from fastmem.cli import main; main(['--help'])"])
def test_import_and_help_load_neither_torch_nor_triton(statement):
    check = (
        "import sys\ntry:\n    " + statement + "\nexcept SystemExit as e:\n    assert not e.code\n"
        "print({'torch', 'triton', 'numpy', 'matplotlib', 'pyarrow', 'rich', 'faiss'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.splitlines()[-1] == "set()"


def test_every_command_explains_itself(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0
        assert "Usage: fastmem" in text


SCORE = ("score", "--model", "rar-tiny", "--views", "center", "--no-class-check")
ROWS = {
    "no command": (("scor",), 2, "No such command 'scor'"),
    "unknown option": ((*SCORE, "--vews", "10"), 2, "No such option"),
    "wrong model": (("score", "--model", "rar-big"), 2, "expected a model out of rar-b"),
    "no data": (("score", "--model", "rar-b"), 2, "FASTMEM_DATA"),
    "missing data": ((*SCORE, "--data", "{tmp}/nowhere"), 3, "nowhere"),
    "folder without images": ((*SCORE, "--data", "{tmp}/none"), 2, "none"),
    "nothing but broken images": ((*SCORE, "--data", "{tmp}/broken"), 3, "the first class/a.png"),
    "missing checkpoint": ((*SCORE, "--checkpoint", "{tmp}/no.bin"), 3, "no.bin, got no such file"),
    "missing official files": (("score", "--model", "rar-b", "--data", "{tmp}/data"), 3, "fastmem fetch --model rar-b"),
    "truncated checkpoint": ((*SCORE, "--checkpoint", "{tmp}/cut.safetensors"), 3, "fetch it again"),
    "damaged zip": ((*SCORE, "--data", "{tmp}/cut.zip"), 3, "cut.zip"),
    "checkpoint of another network": ((*SCORE, "--checkpoint", "{tokenizer}"), 2, "got the tokenizer of rar-tiny"),
    "views": (("score", "--model", "rar-tiny", "--views", "many"), 2, "a number of at least 1 or center"),
    "segments": ((*SCORE, "--segments", "scale3"), 2, "expected segments out of last"),
    "backend": ((*SCORE, "--backend", "fast"), 2, "expected a backend out of auto"),
    "device": ((*SCORE, "--device", "cuda:77"), 2, "CUDA devices"),
    "unwritable output": ((*SCORE, "--out", "{tmp}/file/run"), 2, "expected a folder that can be written"),
    "token cache in a file's place": (
        (*SCORE, "--token-cache", "{tmp}/file"),
        2,
        "expected a folder for cached tokens",
    ),
    "resume without a folder": ((*SCORE, "--resume"), 2, "expected --out RUN"),
    "class file that is missing": ((*SCORE, "--data", "{tmp}/data", "--classes", "{tmp}/no.txt"), 3, "no.txt"),
    "class file without a class": ((*SCORE, "--data", "{tmp}/data", "--classes", "{tmp}/names"), 2, "class-1"),
    "classes of the embedded images": ((*SCORE, "--classes", "{tmp}/names"), 2, "leave it out"),
    "shuffled class order": ((*SCORE[:3], "--data", "{zip}", "--classes", "{tmp}/order"), 2, "class order"),
    "demo of a model that is not embedded": (("demo", "--model", "rar-b"), 2, "expected an embedded model out of"),
    "fetch of an unknown model": (("fetch", "--model", "dall-e"), 2, "expected a model out of"),
}


@pytest.mark.parametrize(("arguments", "code", "text"), ROWS.values(), ids=ROWS)
def test_wrong_input_ends_with_one_sentence(capsys, tmp_path, data, monkeypatch, arguments, code, text):
    from fastmem.models.registry import find_entry

    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTMEM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    weights = find_entry("rar-tiny").generator_file.path.read_bytes()
    (tmp_path / "none" / "class").mkdir(parents=True)
    (tmp_path / "broken" / "class").mkdir(parents=True)
    (tmp_path / "broken" / "class" / "a.png").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "cut.zip").write_bytes(IMAGES.read_bytes()[:10_000])
    (tmp_path / "file").write_text("")
    (tmp_path / "names").write_text("class-0\nclass-7\n")
    (tmp_path / "order").write_text("\n".join(reversed(embedded_classes())))
    names = {"tmp": tmp_path, "zip": IMAGES, "tokenizer": find_entry("rar-tiny").tokenizer_file.path}
    found, out, err = run(capsys, *(a.format(**names) for a in arguments))
    assert (found, out) == (code, "")
    last = err.strip().splitlines()[-1]
    assert text in last
    assert last.startswith(("fastmem: expected", "Error:"))
    assert "Traceback" not in err
    # a default folder without a run in it is removed again
    assert not (tmp_path / "runs").exists()


def test_tokens_are_kept_in_fastmem_home_unless_told_otherwise(capsys, tmp_path, data, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    ways = {"off": ("--token-cache", "off"), "own": ("--token-cache", tmp_path / "kept"), "auto": (), "again": ()}
    planned = {}
    for way, option in ways.items():
        code, _, err = run(capsys, *SCORE, "--data", data, "--out", tmp_path / way, "--json", *option)
        assert code == 0, err
        planned[way] = next(line for line in err.splitlines() if line.startswith("scoring"))
        assert (tmp_path / "home" / "tokens").exists() == (way in ("auto", "again"))
        assert (tmp_path / "kept").exists() == (way != "off")
    assert "tokens" not in planned["off"]
    assert f"of tokens in {tmp_path / 'kept'}" in planned["own"]
    assert "(100% of them there)" not in planned["auto"]
    assert "(100% of them there)" in planned["again"]


def embedded_classes() -> tuple[str, ...]:
    from fastmem import embedded_source

    return embedded_source("train").classes


def test_score_writes_a_run_and_one_json_document(capsys, tmp_path, data):
    arguments = (*SCORE, "--data", data, "--heldout", data, "--out", tmp_path / "run", "--per-class", 2, "--json")
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    document = json.loads(out)
    keys = (
        "run model backend device images heldout_images views layers segments units seconds images_per_second skipped"
    )
    assert set(keys.split()) <= set(document)
    assert (document["images"], document["heldout_images"], document["views"]) == (4, 4, "center")
    assert (document["layers"], document["units"], document["segments"]) == (8, 768, ["last", "last-trained"])
    assert "4 images + 4 held-out with 1 view each" in err
    folder = Path(document["run"])
    for name in ("train.safetensors", "heldout.safetensors", "units.parquet", "unitmem-by-block.png", "top-images.png"):
        assert (folder / name).stat().st_size > 0
    for picture in document["pictures"]:
        with Image.open(picture) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5
    code, out, _ = run(capsys, *arguments)
    assert (code, out) == (2, "")
    code, out, err = run(capsys, *arguments, "--resume")
    assert code == 0, err
    assert json.loads(out)["images"] == 4


def test_the_run_folder_is_made_and_named(capsys, tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTMEM_DATA", str(data))
    for number in ("", "-2"):
        code, out, err = run(capsys, *SCORE, "--data", data)
        assert code == 0, err
        folders = sorted(Path("runs").iterdir(), key=lambda path: len(path.name))
        assert len(folders) == (2 if number else 1)
        assert folders[-1].name.startswith("rar-tiny-20")
        assert folders[-1].name.endswith(number)
        assert str(folders[-1] / "units.parquet") in out
        assert "UnitMem" in out


def test_models_lists_files_and_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path))
    code, out, _ = run(capsys, "models", "--json")
    rows = {row["name"]: row for row in json.loads(out)["models"]}
    assert code == 0
    assert {"rar-b", "rar-l", "rar-xl", "rar-xxl", "rar-tiny"} <= set(rows)
    assert rows["rar-tiny"]["missing"] == []
    assert rows["rar-xxl"]["missing"][0] == str(tmp_path / "weights" / "rar_xxl.bin")
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert "fastmem fetch --model rar-xxl" in out


def test_doctor_says_what_this_machine_offers(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    document = json.loads(out)
    assert code == 0
    keys = "torch triton native cuda gpus faiss sscd inception backend problems"
    assert set(keys.split()) <= set(document)
    import torch

    assert document["torch"] == torch.__version__
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert document["backend"] in out


def test_python_m_fastmem_is_the_same_command():
    command = [sys.executable, "-m", "fastmem", "score", "--model", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fastmem: expected a model out of")
