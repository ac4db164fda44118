"""What the demo says of every dose: counts against a literal loop, a table, a picture, and the command's last part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmem import embedded_source
from fastmem.data.manifest import Manifest
from fastmem.demo.controls import dose_groups
from fastmem.demo.extraction import ALL_IMAGES, ALONE, EVERY, EVERY_GROUP, extraction_by_dose, format_extraction, totals
from fastmem.extraction.candidates import Targets
from fastmem.extraction.extract import Extraction, Verdicts
from fastmem.extraction.verdicts import Count
from fastmem.report.extraction_pictures import draw_dose_response
from fastmem.stages.demo import extract_everything
from fastmem.stages.opened_run import open_run
from fastmem.stages.options import AttackOptions
from tests.conftest import run

PREFIXES = (0, 8)


def verdicts(manifest: Manifest, seed: int, twin: float) -> Verdicts:
    """Verdicts on all images of a manifest with random similarities; groups of two neighbours each."""
    n, generator = len(manifest), np.random.default_rng(seed)
    targets = Targets(
        manifest.ids, manifest.labels, tuple(manifest.names.tolist()), np.zeros(n, "f4"), torch.zeros(n, 4).long()
    )
    every, rows = np.ones(n, dtype=bool), (len(PREFIXES), n)
    similarity = generator.random(rows).astype("f4")
    twins = np.where(np.arange(n) % 3 == 0, 0.9, twin).astype("f4")
    tokens = torch.zeros(*rows, 4).long()
    nearest = np.full(rows, -1)
    numbers = (similarity.astype(float), similarity, similarity, similarity[0], nearest, similarity, twins)
    return Verdicts(targets, every, every, PREFIXES, 0.75, tokens, *numbers, np.arange(n) // 2)


@pytest.fixture(scope="module")
def manifests() -> dict[str, Manifest]:
    return {split: Manifest.build(embedded_source(split)) for split in ("train", "heldout")}


def extraction(manifests: dict[str, Manifest], twin: float) -> Extraction:
    sets = {split: verdicts(m, seed, twin) for seed, (split, m) in enumerate(manifests.items())}
    return Extraction(sets, PREFIXES, 0.75, "fake", None, 0.0)


@pytest.mark.parametrize("twin", [0.5, float("nan")], ids=["with an index", "without"])
def test_every_image_is_counted_in_its_group(manifests, twin):
    found = extraction(manifests, twin)
    rows = extraction_by_dose(found, manifests["train"])
    train, heldout = found.sets["train"], found.sets["heldout"]
    expected: dict[str, list[int]] = {}
    for i, group in enumerate(dose_groups(manifests["train"]).tolist()):
        for p in range(len(PREFIXES)):
            counts = expected.setdefault(group, [0, 0, 0])
            counts[p] += bool(train.similarity[p, i] > 0.75)
        expected[group][2] += 1
    assert list(rows)[:6] == ["1", "2", "4", "8", "16", "twins"]
    for group, (none, eight, images) in expected.items():
        assert rows[group] == [Count(none, images), Count(eight, images)]
    assert rows["held-out"] == [Count(int((s > 0.75).sum()), 192) for s in heldout.similarity]
    # every third held-out image has a near-duplicate
    assert (ALONE in rows) == (twin == 0.5)
    if twin == 0.5:
        alone = np.arange(192) % 3 != 0
        assert rows[ALONE] == [Count(int((s > 0.75)[alone].sum()), 128) for s in heldout.similarity]


def test_near_duplicates_are_counted_once_in_the_totals(manifests):
    found = totals(extraction(manifests, 0.5))
    similarity = extraction(manifests, 0.5).sets["train"].similarity > 0.75
    assert found[EVERY] == [Count(int(row.sum()), 823) for row in similarity]
    pairs = [len({i // 2 for i in np.flatnonzero(row).tolist()}) for row in similarity]
    assert found[EVERY_GROUP] == [Count(k, 412) for k in pairs]


def test_the_table_and_the_picture_have_every_group(manifests, tmp_path):
    rows = extraction_by_dose(extraction(manifests, 0.5), manifests["train"])
    table = format_extraction(rows, PREFIXES)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(rows)
    assert str(rows["16"][1]) in table
    draw_dose_response(tmp_path / "doses.png", rows, PREFIXES, "doses")
    with Image.open(tmp_path / "doses.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_the_demo_tries_every_image_of_its_run(capsys, tmp_path):
    arguments = ("score", "--model", "rar-tiny", "--views", "center", "--per-class", 1, "--no-class-check")
    assert run(capsys, *arguments, "--out", tmp_path / "run")[0] == 0
    found = extract_everything(open_run(tmp_path / "run"), AttackOptions(ALL_IMAGES, "tokens"))
    assert (found.judge, found.threshold) == ("token-match", 0.9)
    assert found.picture == tmp_path / "run" / "dose-response.png"
    assert found.picture.exists()
    assert {count.n for count in found.counts[EVERY]} == {41}
    assert {count.n for count in found.counts["held-out"]} == {41}
    assert not list(Path(tmp_path / "run").glob("extractions/*"))
