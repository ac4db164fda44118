"""``fastmem extract`` and the stages' way into a run: documents, exit codes, and what a killed command leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastmem.errors import InputFileError, UsageError
from fastmem.reporter import Reporter
from fastmem.runs.folder import RunFolder, RunInputs, run_id
from fastmem.stages.opened_run import open_run
from tests.conftest import folder_bytes, random_images, run, write_folder

KEYS = (
    "run edit candidates threshold prefix_unit prefixes embedder extracted extracted_original extracted_distinct "
    "ceiling heldout_candidates heldout_extracted"
)


def test_one_json_document_a_table_and_two_pictures(capsys, tiny_run):
    options = ("--judge", "tokens", "--top-per-class", 2, "--prefix", "0,40,63", "--json")
    arguments = ("extract", "--run", tiny_run, *options)
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert set(KEYS.split()) <= set(document)
    assert (document["candidates"], document["heldout_candidates"], document["edit"]) == (4, 4, None)
    assert document["prefixes"] == [0, 40, 63]
    assert set(document["extracted"]) == set(document["heldout_extracted"]) == {"0", "40", "63"}
    assert "looking for candidates among 16 images" in err
    assert "8 candidates, 24 completions" in err
    for picture in document["pictures"]:
        with Image.open(picture) as image:
            assert min(image.size) > 200
    assert not (Path(document["pictures"][0]).parent / "units").exists()
    # asked again, it is read, not made
    code, out, err = run(capsys, *arguments)
    assert (code, json.loads(out)) == (0, document)
    assert "has this extraction already" in err


@pytest.mark.parametrize(("bound", "code"), [(0, 1), (4, 0)])
def test_a_broken_bound_exits_with_one(capsys, tiny_run, bound, code):
    # every completion is more alike than -1
    arguments = ("extract", "--run", tiny_run, "--judge", "tokens", "--top-per-class", 2, "--prefix", "63")
    found, _, err = run(capsys, *arguments, "--threshold", "-1", "--fail-above", bound)
    assert found == code, err
    assert ("4 images were extracted, more than the 0" in err) == (code == 1)


ROWS = {
    "no run": (("--run", "{tmp}"), 3, "expected the folder of a scored run"),
    "prefix that is no number": (("--run", "{run}", "--prefix", "all"), 2, "expected --prefix as numbers"),
    "prefix of everything": (
        ("--run", "{run}", "--prefix", "64"),
        2,
        "expected different prefix lengths out of 0 to 63",
    ),
    "judge": (("--run", "{run}", "--judge", "me"), 2, "expected a judge out of auto, sscd, tokens"),
    "threshold": (("--run", "{run}", "--judge", "tokens", "--threshold", "2"), 2, "expected a threshold from -1 to 1"),
    "index without an embedder": (("--run", "{run}", "--judge", "tokens", "--index", "x"), 2, "leave it out"),
    "data that moved": (("--run", "{run}", "--data", "{tmp}/nowhere"), 3, "nowhere"),
    "images of another set": (("--run", "{run}", "--data", "{tmp}/others"), 2, "got 8 that are not there"),
    "weights of another model": (
        ("--run", "{run}", "--checkpoint", "{tmp}/other.safetensors"),
        2,
        "expected the checkpoint that",
    ),
    "edit that is not there": (("--run", "{run}", "--edit", "none"), 2, "none"),
}


@pytest.mark.parametrize(("arguments", "code", "text"), ROWS.values(), ids=ROWS)
def test_wrong_input_ends_with_one_sentence(capsys, tiny_run, tmp_path, monkeypatch, arguments, code, text):
    from safetensors.torch import load_file, save_file

    from fastmem.models.registry import find_entry

    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    write_folder(tmp_path / "others", random_images(2, 64), first=50)
    if "other.safetensors" in str(arguments):
        state = load_file(find_entry("rar-tiny").generator_file.path)
        state["lm_head.bias"] += 1
        save_file(state, tmp_path / "other.safetensors")
    found, out, err = run(capsys, "extract", *(a.format(tmp=tmp_path, run=tiny_run) for a in arguments))
    assert (found, out) == (code, "")
    last = err.strip().splitlines()[-1]
    assert text in last
    assert last.startswith(("fastmem: expected", "Error:"))


def test_a_run_is_opened_where_it_lies(tiny_run, tmp_path):
    opened = open_run(tiny_run)
    assert opened.model.name == "rar-tiny"
    assert opened.model.fingerprint() == {part: opened.identity[part] for part in ("checkpoint", "tokenizer")}
    assert opened.train.count == opened.heldout.count == 8
    assert Path(RunInputs.load(RunFolder(tiny_run), run_id(RunFolder(tiny_run).identity())).data).is_absolute()
    moved = tmp_path / "run"
    moved.mkdir()
    for file in tiny_run.iterdir():
        if file.is_file() and file.name != "train.safetensors":
            (moved / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputFileError, match="one without train"):
        open_run(str(moved))


def test_another_precision_is_noted(tiny_run):
    notes = []
    open_run(tiny_run, dtype="bfloat16", reporter=Reporter(note=notes.append))
    assert len(notes) == 1
    assert "scored as float32" in notes[0]


def test_an_unfinished_extraction_is_not_started_over(capsys, tiny_run, monkeypatch):
    arguments = ("extract", "--run", tiny_run, "--judge", "tokens", "--top-per-class", 1, "--prefix", "60")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fastmem.stages.extract.attack_and_judge", stop)
        assert run(capsys, *arguments)[0] == 130
    code, _, err = run(capsys, *arguments)
    assert (code, "--resume" in err) == (2, True)
    assert run(capsys, *arguments, "--resume")[0] == 0


CHILD = """
import sys, time
from fastmem.extraction import extract as stage
stage.UNIT_TARGETS = 1
judge = stage._Stage._judge
def slow(self, *arguments):
    found = judge(self, *arguments)
    print("judged", flush=True)
    time.sleep(float(sys.argv[1]))
    return found
stage._Stage._judge = slow
from fastmem.cli import main
main(sys.argv[2:])
"""


def extraction_files(run_folder: Path) -> dict[str, bytes]:
    """Every file of the extraction but its result, which names the run's folder."""
    found = folder_bytes(run_folder / "extractions")
    return {name: content for name, content in found.items() if not name.endswith("result.json")}


def test_a_killed_extraction_resumes_to_the_same_bytes(tiny_run, tmp_path):
    import shutil

    runs = {name: tmp_path / name for name in ("whole", "parts")}
    for folder in runs.values():
        shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("extractions"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str, pause: float, *more: str) -> subprocess.Popen:
        options = ["extract", "--run", str(runs[name]), "--judge", "tokens", "--prefix", "0,60", *more]
        command = [sys.executable, "-c", CHILD, str(pause), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    whole, killed = start("whole", 0), start("parts", 5)
    assert killed.stdout.readline() == killed.stdout.readline() == "judged\n"
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    units = list((runs["parts"] / "extractions").rglob("*.safetensors"))
    assert len(units) == 1
    talk = whole.communicate(timeout=60)
    assert whole.returncode == 0, talk
    resumed = start("parts", 0, "--resume")
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert out.count("judged") == 3
    assert extraction_files(runs["parts"]) == extraction_files(runs["whole"])


def test_inputs_that_are_missing_are_named(tmp_path):
    with pytest.raises(InputFileError, match="inputs.json"):
        RunInputs.load(RunFolder(tmp_path), "a run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected to be able to write"):
        RunInputs("rar-tiny").save(RunFolder(tmp_path / "file"), "a run")
