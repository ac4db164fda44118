"""The same images as folder, zip, tar and parquet give the same run, which later stages open again."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastmem import open_run, open_source, score
from fastmem.demo.doses import IMAGES
from tests.data.archives import write_folder, write_parquet, write_tar, write_zip

CLASSES, EACH = 4, 4


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pattern for each layout of some embedded images."""
    place = tmp_path_factory.mktemp("layouts")
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(IMAGES) as archive:
        names = [name for name in archive.namelist() if name.startswith("train/") and name.endswith(".png")]
        for owner in sorted({name.split("/")[1] for name in names})[:CLASSES]:
            for name in [name for name in names if name.split("/")[1] == owner][:EACH]:
                files[name.removeprefix("train/")] = archive.read(name)
    # shards mix the classes
    order = np.random.default_rng(0).permutation(len(files))
    mixed = {list(files)[i]: list(files.values())[i] for i in order}
    classes = sorted({name.split("/")[0] for name in files})
    for number in range(3):
        part = {name: content for i, (name, content) in enumerate(mixed.items()) if i % 3 == number}
        write_tar(place / f"train-{number}.tar", part)
        write_parquet(place / f"train-{number}.parquet", part, classes)
    return {
        "folder": str(write_folder(place / "folder", files)),
        "zip": str(write_zip(place / "images.zip", files)),
        "tar": f"{place}/train-{{0..2}}.tar",
        "tar by fsspec": f"file://{place}/train-*.tar",
        "parquet": f"{place}/train-*.parquet",
    }


def test_every_layout_gives_the_same_statistics_and_opens_again(layouts, toy_model, tmp_path: Path) -> None:
    found = {}
    for number, (layout, place) in enumerate(layouts.items()):
        out = tmp_path / str(number)
        score(toy_model, open_source(place), views=2, out=out, check_classes=False, pictures=False, per_image=True)
        run = open_run(out, model=toy_model)
        source = run.sources["train"]
        assert source.name(int(source.ids[0])) == str(source.names[0])
        stats = run.train
        found[layout] = (
            run.manifests["train"].hash,
            run.id,
            [t.numpy().tobytes() for t in (stats.mean, stats.var, stats.view_var, stats.top_value, stats.top_image)],
            [source.digest(i) for i in range(len(source))],
        )
    assert len(found["folder"][3]) == CLASSES * EACH
    for layout, everything in found.items():
        assert everything == found["folder"], layout
