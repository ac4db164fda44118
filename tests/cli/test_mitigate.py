"""``fastmem mitigate``: what it writes and says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmem import EditPlan, UnitStats, UsageError, ZipSource, embedded_source, load_model, score, select
from fastmem.cli.options import parse_share
from fastmem.data.manifest import Manifest
from fastmem.demo.doses import IMAGES
from fastmem.mitigation.attribution import candidate_half, halves
from fastmem.mitigation.edited_checkpoint import save_checkpoint
from fastmem.runs.folder import RunFolder, RunInputs, run_id
from fastmem.scoring.image_losses import ImageLosses
from fastmem.stages.mitigate import CHOICES, default_name
from fastmem.stages.opened_run import edited, open_run
from tests.conftest import run

UNITS = 8 * 768


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of rar-tiny over two images of each class, without the pictures of ``fastmem score``."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    sources = [embedded_source(split) for split in ("train", "heldout")]
    settings = {"views": "center", "per_class": 2, "check_classes": False, "per_image": True}
    score(load_model("rar-tiny", device="cpu"), sources[0], heldout=sources[1], out=folder, **settings)
    run = RunFolder(folder)
    RunInputs("rar-tiny").save(run, run_id(run.identity()))
    return folder


@pytest.fixture
def folder(scored: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(scored, tmp_path / "run"))


@pytest.mark.parametrize("by", CHOICES)
def test_every_selection_becomes_an_edit_of_the_run(capsys, folder, by):
    code, out, err = run(capsys, "mitigate", "--run", folder, "--top", "2%", "--by", by, "--json")
    assert code == 0, err
    document = json.loads(out)
    keys = "run edit selection fraction factor units_edited layers_edited checkpoint"
    assert set(keys.split()) <= set(document)
    expected = (str(folder), f"{by}-2pct-x0.5", by, 0.02, 0.5, round(0.02 * UNITS), None)
    assert tuple(document[key] for key in keys.split() if key != "layers_edited") == expected
    assert "not released weights" in err
    plan = EditPlan.load(folder / "edits" / f"{by}-2pct-x0.5.safetensors")
    assert (plan.by, plan.fraction, plan.factor.unique().tolist()) == (by, 0.02, [0.5])
    per_layer = torch.bincount(plan.layer, minlength=8)
    assert document["units_per_layer"] == per_layer.tolist()
    assert document["layers_edited"] == int((per_layer > 0).sum())
    if by != "attribution":
        stats, heldout = (UnitStats.load(folder / f"{split}.safetensors") for split in ("train", "heldout"))
        chosen = select(stats, 0.02, by, heldout=heldout if by == "gap" else None)
        assert torch.equal(plan.layer, chosen.layer)
        assert torch.equal(plan.unit, chosen.unit)
        assert len(plan.chosen_on) == 0


def test_attribution_is_chosen_on_the_half_that_the_file_names(capsys, folder, monkeypatch):
    scores = torch.randn(8, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = []

    def record(model, source, ids, heldout, *, heldout_ids, batch_size, cache):
        given.append((source.description, ids.tolist(), heldout.description, heldout_ids.tolist(), batch_size))
        return scores

    monkeypatch.setattr("fastmem.stages.mitigate.attribution", record)
    arguments = ("mitigate", "--run", folder, "--by", "attribution", "--seed", 3, "--scope", "per-layer")
    code, out, err = run(capsys, *arguments, "--batch-size", 20)
    assert code == 0, err
    theirs = Manifest.load(folder / "manifest-heldout.parquet")
    half = (len(theirs) + 1) // 2
    assert f"41 candidates and {half} held-out images" in err
    assert "in 8 of 8 blocks" in out
    assert f"chosen on 41 candidates against {half} held-out images" in out
    plan = EditPlan.load(folder / "edits" / "attribution-5pct-per-layer-x0.5-seed3.safetensors")
    manifest = Manifest.load(folder / "manifest-train.parquet")
    hits = ImageLosses.load(folder / "losses-train.safetensors", manifest.hash).hits
    ids = candidate_half(manifest, hits, seed=3)
    # two images of a class: one of each is chosen on
    assert len(np.unique(manifest.labels[np.isin(manifest.ids, ids)])) == len(ids) == 41
    assert plan.chosen_on.tolist() == ids.tolist()
    splits = [embedded_source(split).description for split in ("train", "heldout")]
    # half of the held-out images is left to report on
    unseen = theirs.ids[halves(theirs.ids, theirs.labels, seed=3)]
    assert plan.chosen_against.tolist() == unseen.tolist()
    assert len(unseen) == half
    assert given == [(splits[0], ids.tolist(), splits[1], unseen.tolist(), 20)]
    chosen = select(UnitStats.load(folder / "train.safetensors"), 0.05, "scores", "per-layer", scores=scores)
    assert torch.equal(plan.layer, chosen.layer)
    assert torch.equal(plan.unit, chosen.unit)


def test_candidates_to_choose_on_are_readable_images(folder):
    manifest = Manifest.load(folder / "manifest-train.parquet")
    with pytest.raises(UsageError, match="expected extraction candidates"):
        candidate_half(manifest, np.full(len(manifest), np.nan))


def test_an_edited_checkpoint_and_an_opened_edit_are_the_same_weights(capsys, folder, tmp_path):
    weights = tmp_path / "edited.pth"
    arguments = ("mitigate", "--run", folder, "--top", "0.1", "--factor", 0.25, "--name", "mine")
    code, out, err = run(capsys, *arguments, "--save-checkpoint", weights, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["edit"], document["checkpoint"]) == ("mine", str(weights))
    opened = open_run(folder)
    written = load_model("rar-tiny", checkpoint=weights, device="cpu")
    unedited = opened.model.fingerprint()
    with edited(opened, "mine"):
        assert opened.model.fingerprint() == written.fingerprint() != unedited
    assert opened.model.fingerprint() == unedited
    rows = written.fc1_layers[0].weight / load_model("rar-tiny", device="cpu").fc1_layers[0].weight
    assert set(rows.unique().tolist()) == {0.25, 1.0}


def test_the_same_edit_may_be_made_again_and_another_of_its_name_not(capsys, folder):
    arguments = ("mitigate", "--run", folder, "--by", "random", "--name", "a")
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments)[0] == 0
    before = (folder / "edits" / "a.safetensors").read_bytes()
    code, out, err = run(capsys, *arguments, "--seed", 1)
    assert (code, out) == (2, "")
    assert "expected a new name for the edit, got a, which is another one" in err
    assert (folder / "edits" / "a.safetensors").read_bytes() == before


def test_the_edit_is_told_in_words(capsys, folder):
    code, out, err = run(capsys, "mitigate", "--run", folder)
    assert code == 0
    assert "rar-tiny: the fc1 rows of 307 of 6,144 units (5 %) by unitmem, in " in out
    counts = out.split("units by block: ")[1].splitlines()[0].split()
    assert sum(map(int, counts)) == 307
    assert str(folder / "edits" / "unitmem-5pct-x0.5.safetensors") in out
    assert "look for rows of unusual norm and rescale them" in err


ROWS = {
    "no run": (("--run", "{tmp}/none"), 3, "got no run.json there"),
    "share as a number of percents": (("--top", "5"), 2, "--top above 0 and up to 100 %"),
    "no share": (("--top", "0%"), 2, "such as 5% or 0.05, got '0%'"),
    "not a share": (("--top", "many"), 2, "got 'many'"),
    "selection": (("--by", "scores"), 2, f"one of {', '.join(CHOICES)}, got 'scores'"),
    "scope": (("--scope", "block"), 2, "scope global or per-layer"),
    "merge": (("--merge", "min"), 2, "merge as one of max"),
    "merge with attribution": (("--by", "attribution", "--merge", "sum"), 2, "no --merge with attribution"),
    "batch size without attribution": (("--batch-size", 3), 2, "--batch-size with --by attribution only"),
    "factor": (("--factor", "nan"), 2, "a finite factor for each of 307 units"),
    "name": (("--name", "a/b"), 2, "a name of letters, digits"),
    "checkpoint of an unknown kind": (("--save-checkpoint", "{tmp}/w.ckpt"), 2, "a .safetensors, .bin or .pth file"),
    "checkpoint that is there": (("--save-checkpoint", "{tmp}/there.bin"), 2, "a new file to write the checkpoint"),
    "gap without a held-out set": (("--run", "{tmp}/alone", "--by", "gap"), 2, "score with --heldout"),
    "attribution without held-out images": (
        ("--run", "{tmp}/alone", "--by", "attribution"),
        2,
        "held-out images with --by attribution",
    ),
}


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A run over the training images in a zip, without held-out ones."""
    settings = {"views": "center", "per_class": 1, "check_classes": False, "per_image": True}
    score(load_model("rar-tiny", device="cpu"), ZipSource(IMAGES, "train"), out=tmp_path / "alone", **settings)
    run = RunFolder(tmp_path / "alone")
    RunInputs("rar-tiny", data=str(IMAGES), data_split="train").save(run, run_id(run.identity()))
    return tmp_path / "alone"


@pytest.mark.parametrize(("arguments", "code", "text"), ROWS.values(), ids=ROWS)
def test_wrong_input_ends_with_one_sentence_and_no_file(capsys, request, folder, tmp_path, arguments, code, text):
    if "{tmp}/alone" in arguments:
        request.getfixturevalue("alone")
    (tmp_path / "there.bin").write_text("mine")
    given = [str(a).format(tmp=tmp_path) for a in arguments]
    found, out, err = run(capsys, "mitigate", *(() if "--run" in given else ("--run", folder)), *given)
    assert (found, out) == (code, "")
    last = err.strip().splitlines()[-1]
    assert text in last
    assert last.startswith("fastmem: expected")
    assert not (folder / "edits").exists()


def test_a_damaged_edit_file_is_not_overwritten(capsys, folder):
    (folder / "edits").mkdir()
    (folder / "edits" / "a.safetensors").write_bytes(b"damaged")
    code, _, err = run(capsys, "mitigate", "--run", folder, "--name", "a")
    assert code == 3
    assert "a.safetensors, got a damaged one" in err


def test_an_edit_of_a_run_is_refused_on_other_weights(capsys, folder, tmp_path):
    assert run(capsys, "mitigate", "--run", folder, "--name", "a")[0] == 0
    model = load_model("rar-tiny", device="cpu")
    model.fc1_layers[0].weight[0, 0] += 1
    save_checkpoint(model, tmp_path / "other.bin")
    code, _, err = run(capsys, "mitigate", "--run", folder, "--checkpoint", tmp_path / "other.bin")
    assert code == 2
    assert "expected the checkpoint that" in err
    assert RunFolder(folder).edits_folder.exists()


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), ("0.05", 0.05), (" 12.5 %", 0.125), (".1", 0.1), ("100%", 1.0), ("1", 1.0)]
)
def test_shares_are_percents_or_fractions(text, share):
    assert parse_share(text) == pytest.approx(share)


NAMES = {
    "unitmem-5pct-x0.5": ("unitmem", 0.05, "global", "max", 0.5, 0),
    "gap-12.5pct-per-layer-mean-x-1-seed4": ("gap", 0.125, "per-layer", "mean", -1.0, 4),
    "random-100pct-x1e06": ("random", 1.0, "global", "max", 1e6, 0),
    "lowest-0.1pct-x0": ("lowest", 0.001, "global", "max", 0.0, 0),
}


@pytest.mark.parametrize(("name", "settings"), NAMES.items(), ids=NAMES)
def test_default_names_say_what_differs_from_the_usual(name, settings):
    assert default_name(*settings) == name
