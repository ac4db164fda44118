"""``fastmem sweep``: its document and files, what it takes up again, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from fastmem import FolderSource, embedded_source, load_model, score
from fastmem.data.manifest import Manifest
from fastmem.demo.controls import dose_groups
from fastmem.extraction.verdicts import SSCDJudge
from fastmem.mitigation.edit_file import EditPlan
from fastmem.runs.folder import RunFolder, RunInputs, run_id
from fastmem.stages.evaluate import image_doses
from fastmem.stages.opened_run import open_run
from fastmem.stages.options import AttackOptions
from fastmem.sweep.plan import Row
from tests.conftest import FakeEmbedder, run


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of rar-tiny over 16 embedded pictures, half of which it knows by heart, with 16 held out."""
    place = tmp_path_factory.mktemp("scored")
    train, heldout = (embedded_source(split) for split in ("train", "heldout"))
    group = dose_groups(Manifest.build(train))
    names = {
        "train": [name for dose in ("16", "1") for name in Manifest.build(train).names[group == dose][:8].tolist()]
    }
    names["heldout"] = heldout.names[:16].tolist()
    for split, source in (("train", train), ("heldout", heldout)):
        for name in names[split]:
            file = place / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            source.read(source.names.tolist().index(name)).save(file, format="png")
    sources = [FolderSource(place / split, classes=train.classes) for split in names]
    settings = {"views": "center", "check_classes": False, "per_image": True}
    score(load_model("rar-tiny", device="cpu"), sources[0], heldout=sources[1], out=place / "run", **settings)
    run = RunFolder(place / "run")
    RunInputs("rar-tiny").save(run, run_id(run.identity()))
    return place / "run"


@pytest.fixture
def folder(scored: Path, tmp_path: Path) -> Path:
    """A copy of the run and its pictures, to write into."""
    return Path(shutil.copytree(scored.parent, tmp_path / "scored")) / "run"


SMALL = ("--judge", "tokens", "--fractions", "5%", "--seeds", 1, "--declared-seeds", 2)


def test_one_json_document_a_table_and_a_picture(capsys, folder):
    arguments = ("sweep", "--run", folder, *SMALL, "--by", "attribution,random", "--re-attack", "5%", "--json")
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert {"run", "rows", "pareto"} <= set(document)
    assert {"by", "fraction", "factor", "seed", "extracted", "metrics"} <= set(document["rows"][0])
    # two seeds of no edit, a selection, two declared seeds of random, three more factors of it for equal quality
    assert len(document["rows"]) == 8
    assert (document["targets"], document["reported_targets"], document["cost"]) == (16, 8, "loss_heldout_tempered")
    assert document["groups"] == {"dose-1": 8, "dose-16": 8}
    assert document["rows"][0]["by_group"]["dose-16"] == document["rows"][0]["extracted"] == 8
    assert all(sum(r["by_group"].values()) == r["extracted"] for r in document["rows"])
    assert {c["rival"] for c in document["comparisons"]} == {"random", "random at equal quality"}
    assert [r["row"]["by"] for r in document["re_attacks"]] == ["attribution", "random"]
    assert "8 rows with 16 generations" in err
    assert "not released weights" in err
    saved = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert {key: saved[key] for key in document} == document
    assert len(pyarrow.parquet.read_table(folder / "sweep" / "sweep.parquet")) == 8
    with Image.open(folder / "sweep" / "sweep.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_a_sweep_goes_on_with_more_rows_and_measures_only_those(capsys, folder, monkeypatch):
    first = ("sweep", "--run", folder, *SMALL, "--by", "unitmem")
    assert run(capsys, *first)[0] == 0
    code, _, err = run(capsys, *first)
    assert (code, "continue it with --resume" in err) == (2, True)
    measured = []
    from fastmem.sweep.model_bench import ModelBench

    attack = ModelBench.attack
    monkeypatch.setattr(ModelBench, "attack", lambda bench: measured.append(len(bench.model.edits)) or attack(bench))
    code, out, err = run(capsys, "sweep", "--run", folder, *SMALL, "--by", "unitmem,lowest", "--resume")
    assert code == 0, err
    assert measured == [1]
    assert "4 rows (3 are done)" in err
    assert "lowest 5 % x0.5" in out
    # other targets make another table
    code, _, err = run(capsys, "sweep", "--run", folder, *SMALL, "--top-per-class", 1, "--by", "unitmem", "--resume")
    assert (code, "got bench" in err) == (2, True)


def test_the_search_prints_what_reached_the_reduction(capsys, folder, monkeypatch):
    monkeypatch.setattr("fastmem.sweep.search.FRESH_SEEDS", 2)
    searched = [Row("unitmem", 0.0, 0.0), Row("random", 0.0, 0.0)]
    monkeypatch.setattr("fastmem.stages.sweep.recipes", lambda by: searched)
    arguments = ("sweep", "--run", folder, "--judge", "tokens", "--target-reduction", "0.3")
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["target_reduction"] == 0.3
    # random units are searched with one seed, and stated as a mean over three
    assert all(r["reduction"] >= 0.3 for r in document["reached"] if r["by"] == "unitmem")
    assert {r["by"] for r in document["reached"]} == {"unitmem", "random"}
    assert not any(r["beats_plain"] for r in document["reached"])
    assert all(r["confirmation"]["seeds"] == 2 for r in document["reached"])
    assert len(document["rows"]) == 3 + 3 * len(document["reached"])
    # what was confirmed is an edit of the run
    for found in document["reached"]:
        with EditPlan.load(folder / "edits" / f"{found['edit']}.safetensors").apply(
            open_run(str(folder)).model
        ) as edit:
            assert len(edit) == found["units"]
    code, out, _ = run(capsys, *arguments, "--resume")
    assert code == 0
    assert "of the half that attribution saw" in out
    assert "by fresh samples (95 %)" in out
    assert (folder / "sweep" / "search.json").exists()


def test_with_an_embedder_quality_is_of_samples_unless_asked_otherwise(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(AttackOptions, "choose_judge", lambda *settings: SSCDJudge(FakeEmbedder()))
    small = (*SMALL[2:], "--by", "lowest", "--samples", 4)
    code, out, err = run(capsys, "sweep", "--run", folder, *small, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["cost"], document["judge"]) == ("kd-sscd", "fake-32")
    assert "kd-sscd" in document["rows"][1]["metrics"]
    assert "4 samples each" in err
    code, out, err = run(capsys, "sweep", "--run", folder, *small, "--cost", "loss_heldout", "--resume", "--json")
    assert (code, json.loads(out)["cost"]) == (0, "loss_heldout")


def test_other_images_have_no_doses(folder):
    opened = open_run(str(folder), device="cpu")
    doses = image_doses(opened)
    assert {name: len(ids) for name, ids in doses.items()} == {"dose-1": 8, "dose-16": 8}
    own = replace(
        opened, sources={"train": FolderSource(folder.parent / "train", classes=opened.sources["train"].classes)}
    )
    assert image_doses(own) == {}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        pytest.param(("--fractions", "5%,x"), 2, "expected --fractions above 0", id="fraction"),
        pytest.param(("--factors", "half"), 2, "expected --factors as numbers", id="factor"),
        pytest.param(("--factors", "1"), 2, "expected factors of at least 0", id="factor of no edit"),
        pytest.param(("--by", "luck"), 2, "expected selections out of", id="selection"),
        pytest.param(("--re-attack", "7%"), 2, "expected --re-attack as one of --fractions, got 7 %", id="re-attack"),
        pytest.param(("--judge", "eyes"), 2, "expected a judge out of", id="judge"),
        pytest.param(("--cost", "beauty", *SMALL), 2, "one of loss_heldout_tempered, loss_heldout,", id="cost"),
        pytest.param(("--cost", "kd-sscd", *SMALL), 2, "one of loss_heldout_tempered, loss_heldout,", id="no samples"),
        pytest.param(
            ("--equal-quality", "3%"), 2, "expected equal quality at one of the fractions", id="equal quality"
        ),
        pytest.param(("--scope", "perlayer"), 2, "expected scope as one of", id="scope"),
        pytest.param(
            ("--target-reduction", "2", "--judge", "tokens"), 2, "expected a reduction above 0", id="reduction"
        ),
        pytest.param(
            ("--target-reduction", "0.5", "--factors", "0"), 2, "without --factors, which the search decides", id="both"
        ),
        pytest.param(("--run", "nowhere"), 3, "expected the folder of a scored run", id="run"),
    ],
)
def test_wrong_input_ends_with_one_sentence(capsys, folder, arguments, code, text):
    found, out, err = run(capsys, "sweep", "--run", folder, *arguments)
    assert (found, out) == (code, "")
    assert text in err.strip().splitlines()[-1]
