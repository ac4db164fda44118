"""The table of units and the ranking, against the statistics they are made from."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from fastmem import ArraySource, score
from fastmem.data.manifest import Manifest
from fastmem.ranking.selection import ranked_segments
from fastmem.report.heatmap import draw_unitmem_heatmap, unitmem_cells
from fastmem.report.unit_table import names_by_id, top_units, write_unit_table
from tests.conftest import random_images


@pytest.fixture(scope="module")
def scored(toy_model, toy_source, tmp_path_factory):
    heldout = ArraySource(random_images(6, 16, seed=3), np.array([0, 0, 1, 1, 3, 3]))
    stats = score(
        toy_model, toy_source, heldout=heldout, segments=["last", "last-trained", "class"], check_classes=False
    )
    path = tmp_path_factory.mktemp("table") / "units.parquet"
    write_unit_table(path, stats.train, stats.heldout, names_by_id(Manifest.build(toy_source)))
    return stats.train, stats.heldout, parquet.read_table(path).to_pydict()


def test_the_table_has_a_row_for_every_block_segment_and_unit(scored):
    stats, heldout, table = scored
    layers, segments, units = stats.shape
    keys = list(zip(table["layer"], table["segment"], table["unit"], strict=True))
    assert keys == [(i, s, u) for i in range(layers) for s in stats.segments for u in range(units)]
    for name, values in (
        ("unitmem", stats.unitmem()),
        ("class_selectivity", stats.class_selectivity()),
        ("within_class_unitmem", stats.within_class_unitmem()),
        ("mean", stats.mean),
        ("variance", stats.var),
        ("view_variance", stats.view_var),
        ("heldout_unitmem", heldout.unitmem()),
    ):
        assert table[name] == values.flatten().tolist(), name


def test_top_images_are_named(scored, toy_source):
    stats, _, table = scored
    assert table["top_images"] == stats.top_image.reshape(-1, stats.k).tolist()
    names = names_by_id(Manifest.build(toy_source))
    assert table["top_names"][5] == [names[i] for i in table["top_images"][5]]


def test_the_ranking_takes_each_units_best_segment_and_leaves_class_only_ones_out(scored):
    stats, _, _ = scored
    assert ranked_segments(stats) == [0, 1]
    scores = stats.unitmem()[:, :2].numpy()
    found = top_units(stats, 1000)
    assert len(found) == stats.shape[0] * stats.shape[2]
    expected = sorted(
        ((-scores[layer, :, unit].max(), layer, unit) for layer, unit in np.ndindex(stats.shape[0], stats.shape[2]))
    )
    assert [(-unit.unitmem, unit.layer, unit.unit) for unit in found] == expected
    first = found[0]
    segment = stats.segments.index(first.segment)
    assert scores[first.layer, segment, first.unit] == first.unitmem
    assert first.image_ids == tuple(stats.top_image[first.layer, segment, first.unit].tolist())


def test_the_heat_map_shows_every_ranked_segment_and_block(scored, tmp_path):
    stats, heldout, _ = scored
    mean, top = unitmem_cells(stats)
    scores = stats.unitmem().numpy()
    assert mean.shape == top.shape == (2, stats.shape[0])
    for segment, layer in np.ndindex(mean.shape):
        assert mean[segment, layer] == pytest.approx(scores[layer, segment].mean())
        # of 24 units the top 1 % is one
        assert top[segment, layer] == scores[layer, segment].max()
    for name, control in (("with", heldout), ("without", None)):
        draw_unitmem_heatmap(tmp_path / f"{name}.png", stats, control, "toy")
    with Image.open(tmp_path / "with.png") as both, Image.open(tmp_path / "without.png") as alone:
        assert both.height > 1.5 * alone.height
        assert np.asarray(alone.convert("L")).std() > 5
