"""Files of another run in a run's folder: every reader says so, and names both sides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fastmem
from fastmem import InputFileError, UsageError, open_run
from fastmem.data.manifest import Manifest
from fastmem.extraction.verdicts import SSCDJudge
from fastmem.index.build import build_index
from fastmem.stages.extract import find_index
from fastmem.stages.opened_run import edited
from fastmem.sweep.plan import Row
from fastmem.sweep.reattack import ReAttack
from tests.conftest import FakeEmbedder, exit_code


@pytest.fixture(scope="module")
def other_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the same images that differs by one setting, with losses; so has the first one."""
    folder = tmp_path_factory.mktemp("other") / "run"
    data = tiny_run.parent
    options = ("--model", "rar-tiny", "--views", "center", "--no-class-check", "--activation", "pre", "--out", folder)
    assert exit_code("score", *options, "--data", data / "train", "--heldout", data / "heldout", "--per-image") == 0
    for run in (tiny_run, folder):
        fastmem.extract(open_run(run, device="cpu"), prefixes=[0], top_per_class=1, judge="tokens")
        fastmem.mitigate(open_run(run, device="cpu"), name="mine")
    return folder


def read_everything(folder: Path) -> None:
    """Open a run and read all that it keeps."""
    run = open_run(folder, device="cpu")
    for split, stats in run.stats().items():
        stats.class_mean.sum()
        run.losses(split)
    fastmem.extract(run, prefixes=[0], top_per_class=1, judge="tokens")


STATISTICS = ("train.safetensors", "heldout.safetensors", "train.classes", "losses-train.safetensors")


@pytest.mark.parametrize("name", ["run.json", "inputs.json", *STATISTICS])
def test_a_file_of_another_run_is_refused(tiny_run, other_run, tmp_path, name):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    read_everything(folder)
    source, target = other_run / name, folder / name
    if source.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    with pytest.raises(InputFileError, match=r"expected run \w+ in .* got \w+"):
        read_everything(folder)


def test_the_held_out_statistics_are_not_taken_for_those_of_training(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(folder / "heldout.safetensors", folder / "train.safetensors")
    with pytest.raises(InputFileError, match="expected set train in .* got heldout"):
        open_run(folder, device="cpu").train  # noqa: B018 - the property raises


def test_the_manifest_of_other_images_is_refused(tiny_run, toy_source, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    Manifest.build(toy_source).save(folder / "manifest-train.parquet")
    with pytest.raises(InputFileError, match=r"expected manifest \w+ in .*manifest-train"):
        open_run(folder, device="cpu")


def test_the_result_of_another_runs_extraction_is_refused(tiny_run, other_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (mine,) = (folder / "extractions").iterdir()
    shutil.copy(other_run / "extractions" / mine.name / "result.json", mine / "result.json")
    with pytest.raises(InputFileError, match=r"expected run_id \w+"):
        read_everything(folder)


def test_an_edit_of_another_run_is_refused_by_name_and_taken_as_a_file(tiny_run, other_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(other_run / "edits" / "mine.safetensors", folder / "edits" / "mine.safetensors")
    run, model = open_run(folder, device="cpu"), "mine"
    for use in (lambda: edited(run, model).__enter__(), lambda: fastmem.mitigate(run, name=model)):
        with pytest.raises(InputFileError, match=r"expected run \w+ in .*mine.* got \w+"):
            use()
    # over the same weights the edit itself is one that can be made, where it is asked for by its file
    with edited(run, str(other_run / "edits" / "mine.safetensors")) as found:
        assert found.label == "mine"


def test_the_verdicts_of_another_extraction_are_refused(tiny_run, other_run, tmp_path):
    found = {}
    for name, source in (("mine", tiny_run), ("other", other_run)):
        folder = shutil.copytree(source, tmp_path / name)
        found[name] = fastmem.extract(open_run(folder, device="cpu"), prefixes=[0], top_per_class=1, judge="tokens")
        assert len(found[name].verdicts) == found[name].document["candidates"] * 2
    shutil.copy(found["other"].path / "verdicts.parquet", found["mine"].path / "verdicts.parquet")
    with pytest.raises(InputFileError, match=r"expected fastmem.run \w+ in .*verdicts.parquet, got \w+"):
        found["mine"].verdicts  # noqa: B018 - the property raises


def test_an_index_of_other_images_is_refused(tiny_run, toy_source, tmp_path):
    embedder = FakeEmbedder()
    build_index(toy_source, embedder, tmp_path / "index", workers=0)
    with pytest.raises(UsageError, match=r"an index of the training set, got .*index, which has none of its images"):
        find_index(open_run(tiny_run, device="cpu"), tmp_path / "index", SSCDJudge(embedder))


def test_a_re_attack_of_another_sweep_or_edit_is_refused(tmp_path):
    row = Row("unitmem", 0.05, 0.5)
    ReAttack(row, 7, (), ()).save(tmp_path / "file.json", "mine")
    with pytest.raises(InputFileError, match=r"expected sweep other in .*file.json, got mine"):
        ReAttack.load(tmp_path / "file.json", row, "other")
    with pytest.raises(InputFileError, match="expected row"):
        ReAttack.load(tmp_path / "file.json", Row("gap", 0.05, 0.5), "mine")


def test_a_run_without_its_identity_is_not_taken_for_a_new_folder(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "run.json").unlink()
    data = tiny_run.parent / "train"
    options = ("--model", "rar-tiny", "--views", "2", "--no-class-check", "--data", data, "--out", folder)
    assert exit_code("score", *options) == InputFileError.exit_code
    assert exit_code("score", *options, "--resume") == InputFileError.exit_code


@pytest.mark.parametrize("key", ["model", "settings", "manifests", "checkpoint", "dtype"])
@pytest.mark.parametrize("value", [None, 3, "", [], {}, {"a": {}}, {"a": "b"}], ids=json.dumps)
def test_an_odd_identity_is_one_sentence(tiny_run, tmp_path, key, value):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    document = json.loads((folder / "run.json").read_text()) | {key: value}
    (folder / "run.json").write_text(json.dumps(document))
    with pytest.raises(InputFileError):
        open_run(folder, device="cpu")
