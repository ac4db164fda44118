"""``fastmem sweep``: its document and files, what it takes up again, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import FakeEmbedder
from PIL import Image
from test_cli import run

from fastmem import embedded_source, load_model, score
from fastmem.cli.opening import open_run
from fastmem.cli.sweep import image_groups
from fastmem.demo.doses import IMAGES
from fastmem.extraction.verdicts import SSCDJudge
from fastmem.runs import RunFolder, RunInputs
from fastmem.sweep.plan import Row


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of rar-tiny over two images of each class, without the pictures of ``fastmem score``."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    sources = [embedded_source(split) for split in ("train", "heldout")]
    settings = {"views": "center", "per_class": 2, "check_classes": False, "per_image": True}
    score(load_model("rar-tiny", device="cpu"), sources[0], heldout=sources[1], out=folder, **settings)
    RunInputs("rar-tiny").save(RunFolder(folder))
    return folder


@pytest.fixture
def folder(scored: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(scored, tmp_path / "run"))


# a single target of a class and one seed: rows of a second or two
SMALL = ("--judge", "tokens", "--top-per-class", 1, "--fractions", "5%", "--seeds", 1, "--declared-seeds", 2)


def test_one_json_document_a_table_and_a_picture(capsys, folder):
    arguments = ("sweep", "--run", folder, *SMALL, "--by", "unitmem,attribution,random", "--re-attack", "5%", "--json")
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert {"run", "rows", "pareto"} <= set(document)
    assert {"by", "fraction", "factor", "seed", "extracted", "metrics"} <= set(document["rows"][0])
    # no edit, two selections, two declared seeds of random, and three more factors of it for equal quality
    assert len(document["rows"]) == 8
    assert (document["targets"], document["reported_targets"], document["cost"]) == (41, 20, "loss_heldout")
    assert sum(document["groups"].values()) == 41
    assert all(sum(r["by_group"].values()) == r["extracted"] for r in document["rows"])
    assert {c["rival"] for c in document["comparisons"]} == {"random", "unitmem", "random at equal quality"}
    assert [r["row"]["by"] for r in document["re_attacks"]] == ["unitmem", "attribution", "random"]
    assert "8 rows with 41 generations" in err
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
    from fastmem.sweep.bench import ModelBench

    attack = ModelBench.attack
    monkeypatch.setattr(ModelBench, "attack", lambda bench: measured.append(len(bench.model.edits)) or attack(bench))
    code, out, err = run(capsys, "sweep", "--run", folder, *SMALL, "--by", "unitmem,lowest", "--resume")
    assert code == 0, err
    assert measured == [1]
    assert "3 rows (2 are done)" in err
    assert "lowest 5 % x0.5" in out
    # other targets make another table
    code, _, err = run(capsys, "sweep", "--run", folder, *SMALL[:2], "--by", "unitmem", "--resume")
    assert (code, "got bench" in err) == (2, True)


def test_the_search_prints_what_reached_the_reduction(capsys, folder, monkeypatch):
    from fastmem.cli import sweep

    monkeypatch.setattr(sweep, "recipes", lambda: [Row("unitmem", 0.0, 0.5), Row("random", 0.0, 0.0)])
    # every target with a right token counts, so that half of them can be taken away
    arguments = ("sweep", "--run", folder, *SMALL, "--threshold", "0.2", "--target-reduction", "0.3")
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["target_reduction"] == 0.3
    assert all(r["chosen_reduction"] >= 0.3 for r in document["reached"])
    assert len(document["rows"]) == 1 + len(document["reached"])
    code, out, _ = run(capsys, *arguments, "--resume")
    assert code == 0
    assert "reduction, chosen half" in out
    assert (folder / "sweep" / "search.json").exists()


def test_with_an_embedder_quality_is_of_samples_unless_asked_otherwise(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fastmem.cli.sweep.choose_judge", lambda *settings: SSCDJudge(FakeEmbedder()))
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
    assert set(image_groups(opened)) == {"1", "2", "4", "8", "16", "twins"}
    RunInputs("rar-tiny", data=str(IMAGES)).save(opened.folder)
    assert image_groups(opened) == {}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        pytest.param(("--fractions", "5%,x"), 2, "expected --fractions above 0", id="fraction"),
        pytest.param(("--factors", "half"), 2, "expected --factors as numbers", id="factor"),
        pytest.param(("--factors", "1"), 2, "expected factors of at least 0", id="factor of no edit"),
        pytest.param(("--by", "luck"), 2, "expected selections out of", id="selection"),
        pytest.param(("--re-attack", "7%"), 2, "expected --re-attack as one of --fractions, got 7 %", id="re-attack"),
        pytest.param(("--judge", "eyes"), 2, "expected a judge out of", id="judge"),
        pytest.param(("--cost", "beauty", *SMALL), 2, "expected --cost as one of loss_heldout", id="cost"),
        pytest.param(("--target-reduction", "2", *SMALL), 2, "expected a reduction above 0", id="reduction"),
        pytest.param(("--run", "nowhere"), 3, "expected the folder of a scored run", id="run"),
    ],
)
def test_wrong_input_ends_with_one_sentence(capsys, folder, arguments, code, text):
    found, out, err = run(capsys, "sweep", "--run", folder, *arguments)
    assert (found, out) == (code, "")
    assert text in err.strip().splitlines()[-1]
