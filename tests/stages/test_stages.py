"""Every stage from Python, on an opened run: what it returns, what it keeps, and that the model stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fastmem
from fastmem import ArraySource, FolderSource, InputFileError, Reporter, UsageError, open_run
from fastmem.stages.opened_run import edited
from fastmem.stages.options import AttackOptions, SamplingOptions
from tests.conftest import FakeEmbedder, make_toy_model, random_images


@pytest.fixture
def fake_sscd(monkeypatch, tmp_path) -> None:
    """An embedder that costs nothing, and a home of its own for indexes and features."""
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fastmem.stages.options.find_embedder", lambda *a, **k: (FakeEmbedder(), "a fake SSCD model"))


def fingerprint(run: fastmem.OpenedRun) -> dict[str, str]:
    """The hashes of the model's weights, computed again."""
    run.model.exchange_fingerprint({})
    return dict(run.model.fingerprint())


def test_the_five_stages_work_on_one_run(tiny_run, fake_sscd):
    run = open_run(tiny_run, device="cpu")
    before = fingerprint(run)
    assert (run.path, run.train.count, run.heldout.count) == (tiny_run, 8, 8)
    index = fastmem.index(run.sources["train"])
    assert (index.count, index.to_json()["embedder"]) == (8, "fake-32")
    plan = fastmem.mitigate(run, top=0.02, by="random", factor=0.25, name="weak")
    assert plan.name == "weak"
    assert len(plan) == round(0.02 * 8 * 768)
    assert (tiny_run / "edits" / "weak.safetensors").exists()
    found = {edit: fastmem.extract(run, edit, index, [0, 63], top_per_class=2) for edit in (None, "weak")}
    for edit, extraction in found.items():
        assert extraction.to_json()["edit"] == edit
        assert set(extraction.extracted) == {0, 63}
        table = extraction.verdicts
        assert len(table) == 2 * (4 + 4)
        at = table.to_pydict()
        counted = sum(
            e and s == "train" and p == 63 for e, s, p in zip(at["extracted"], at["set"], at["prefix"], strict=True)
        )
        assert extraction.extracted[63] == counted
    assert found[None].path != found["weak"].path
    # the plan itself is as good as its name
    assert fastmem.extract(run, plan, index, [0, 63], top_per_class=2).path == found["weak"].path
    quality = fastmem.evaluate(run, plan, samples=4)
    assert quality.metrics["kd-sscd"] == quality.to_json()["metrics"]["kd-sscd"]
    assert json.loads(quality.path.read_text())["edit"] == "weak"
    table = fastmem.sweep(run, by=("lowest",), fractions=(0.05,), seeds=1, declared_seeds=1, samples=4, top_per_class=2)
    assert [row["by"] for row in table.rows] == ["none", "lowest"]
    assert set(table.pareto) <= {0, 1}
    assert (table.path / "sweep.parquet").exists()
    assert run.model.edits == []
    assert fingerprint(run) == before


def test_an_edit_is_undone_where_a_stage_fails(tiny_run):
    run = open_run(tiny_run, device="cpu")
    before = fingerprint(run)
    fastmem.mitigate(run, name="mine")
    notes = []
    with pytest.raises(UsageError, match="out of 0 to 63"):
        fastmem.extract(run, "mine", prefixes=[64])

    def fail() -> None:
        with edited(run, "mine", Reporter(note=notes.append)) as edit:
            assert (edit.name, edit.label, edit.title(run.model)) == ("mine", "mine", "rar-tiny, edit mine")
            assert fingerprint(run) != before
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert fingerprint(run) == before
    assert "not released weights" in notes[0]


def test_a_run_of_arrays_is_opened_with_the_same_arrays(toy_source, tmp_path):
    model = make_toy_model()
    heldout = ArraySource(random_images(6, 16, seed=3), np.array([0, 0, 1, 1, 3, 3]))
    result = fastmem.score(
        model, toy_source, heldout=heldout, views=2, check_classes=False, out=tmp_path / "run", pictures=False
    )
    assert result.to_json()["pictures"] == []
    assert not list((tmp_path / "run").glob("*.png"))
    with pytest.raises(UsageError, match="put together in memory"):
        open_run(tmp_path / "run", data=toy_source, heldout=heldout)
    for given in ({}, {"data": toy_source}):
        with pytest.raises(UsageError, match="were in memory"):
            open_run(tmp_path / "run", model=model, **given)
    run = open_run(tmp_path / "run", data=toy_source, heldout=heldout, model=model)
    assert run.train.unitmem().equal(result.train.unitmem())
    found = fastmem.extract(run, judge="tokens", top_per_class=2)
    assert found.extracted.keys() == set(model.prefixes)
    # another model is not the run's
    model.fc1_layers[0].weight[0, 0] += 1
    model.exchange_fingerprint({})
    with pytest.raises(UsageError, match="expected the checkpoint that"):
        open_run(tmp_path / "run", data=toy_source, heldout=heldout, model=model)


def test_a_run_finds_its_folder_and_class_order_again(tiny_run, tmp_path):
    train = FolderSource(tiny_run.parent / "train", classes=["class-1", "class-0", "class-2"])
    model = fastmem.load_model("rar-tiny", device="cpu")
    fastmem.score(model, train, views="center", check_classes=False, out=tmp_path / "run", pictures=False)
    run = open_run(tmp_path / "run", model=model)
    # nobody named the order again
    assert run.sources["train"].classes == ("class-1", "class-0", "class-2")
    assert run.heldout is None
    assert run.sources["train"].description == train.description
    # with images that moved, as an object or as a path
    for data in (train, tiny_run.parent / "train"):
        assert open_run(tmp_path / "run", model=model, data=data).manifests["train"].hash == run.manifests["train"].hash


def test_scoring_in_memory_leaves_no_file(toy_model, toy_source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fastmem.score(toy_model, toy_source, views=2, check_classes=False)
    assert result.run is None
    assert list(tmp_path.iterdir()) == []


def test_images_of_which_none_can_be_read_are_no_run(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "x.png").write_bytes(b"broken")
    model = make_toy_model()
    source = FolderSource(tmp_path / "data")
    with pytest.raises(InputFileError, match="the first a/x.png"):
        fastmem.score(model, source, views=2, check_classes=False, out=tmp_path / "run")


WRONG = {
    "judge": (AttackOptions, {"judge": "eyes"}, "a judge out of"),
    "threshold": (AttackOptions, {"threshold": 2.0}, "a threshold from -1 to 1"),
    "candidates": (AttackOptions, {"top_per_class": 0}, "at least 1 candidate"),
    "samples": (SamplingOptions, {"samples": 0}, "at least 1 sample"),
    "batch": (SamplingOptions, {"batch_size": 0}, "at least 1 sample"),
    "seed": (SamplingOptions, {"seed": -1}, "a seed from 0"),
}


@pytest.mark.parametrize(("kind", "settings", "text"), WRONG.values(), ids=WRONG)
def test_shared_options_refuse_what_makes_no_sense(kind, settings, text):
    with pytest.raises(UsageError, match=text):
        kind(**settings)


def test_stages_say_where_to_look_for_an_edit_that_is_not_there(tiny_run):
    run = open_run(tiny_run, device="cpu")
    for stage in (fastmem.extract, fastmem.evaluate):
        with pytest.raises(UsageError, match="got 'none'"):
            stage(run, edit="none")


def test_a_reporter_hears_plans_and_progress(tiny_run, tmp_path):
    plans, done, notes = [], [], []
    reporter = Reporter(note=notes.append, planned=plans.append, advance=done.append)
    run = open_run(tiny_run, device="cpu")
    fastmem.extract(run, judge="tokens", prefixes=[60], top_per_class=1, reporter=reporter)
    assert (plans[-1].total, plans[-1].things) == (4, "candidates")
    assert str(plans[-1]).startswith("4 candidates, 4 completions, judged by token-match")
    assert sum(done[-2:]) <= 4
    assert all(isinstance(note, str) and note for note in notes)
    assert Path(run.path, "extractions").exists()


def test_what_scoring_has_encoded_no_later_stage_encodes_again(toy_source, tmp_path, monkeypatch):
    model = make_toy_model()
    heldout = ArraySource(random_images(8, 16, seed=3), np.array([0, 0, 0, 1, 1, 3, 3, 3]))
    fastmem.score(
        model,
        toy_source,
        heldout=heldout,
        views=2,
        per_image=True,
        check_classes=False,
        token_cache=tmp_path / "tokens",
        out=tmp_path / "run",
        pictures=False,
    )
    run = open_run(tmp_path / "run", data=toy_source, heldout=heldout, model=model)
    monkeypatch.setattr(model, "tokenize", None)
    read, digest = [], ArraySource.digest
    monkeypatch.setattr(ArraySource, "digest", lambda self, index: read.append(index) or digest(self, index))
    fastmem.extract(run, judge="tokens", top_per_class=2)
    fastmem.mitigate(run, by="attribution", top=0.1)
    quality = fastmem.evaluate(run, features="none")
    assert {"loss_train", "loss_heldout"} <= set(quality.metrics)
    table = fastmem.sweep(run, judge="tokens", by=("lowest",), fractions=(0.1,), seeds=1, declared_seeds=1)
    assert len(table.rows) == 2
    # looking an image up needs its content alone
    assert read
