"""The one reader of true images: tokens through the cache, evenly spread, whatever cannot be read left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmem import FolderSource
from fastmem.data.manifest import Manifest
from fastmem.data.views import Mirrored, to_unit_range
from fastmem.reporter import Reporter
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import read_true_images, spread
from tests.conftest import random_images, write_folder


@pytest.mark.parametrize(("count", "most"), [(10, 3), (3, 10), (1000, 256), (257, 256), (7, 7), (0, 5), (2, 1)])
def test_positions_are_spread_evenly_from_the_first_to_the_last(count, most):
    found = spread(count, most)
    assert found.dtype == np.int64
    assert len(found) == min(count, most)
    if count:
        assert found[0] == 0
        steps = np.diff(found)
        if len(found) > 1:
            assert found[-1] == count - 1
            assert steps.min() >= 1
            assert steps.max() - steps.min() <= 1


@pytest.fixture
def source(tmp_path) -> FolderSource:
    """Six pictures of 16 px in two classes, of which one is broken."""
    write_folder(tmp_path / "images", random_images(6, 16))
    sorted((tmp_path / "images").rglob("*.png"))[1].write_bytes(b"broken")
    return FolderSource(tmp_path / "images")


def centre_tokens(model, source, at, recipe=None) -> torch.Tensor:
    recipe = recipe or model.view_recipe("center")
    pixels = np.stack([recipe(source.read(i), 0)[0] for i in at])
    return model.tokenize(to_unit_range(torch.from_numpy(pixels)))


def test_what_cannot_be_read_is_left_out(toy_model, source):
    manifest, advanced = Manifest.build(source), []
    found = read_true_images(toy_model, source, manifest, reporter=Reporter(advance=advanced.append))
    broken = [i for i in range(6) if str(source.names[i]) not in {source.name(image) for image in found.ids.tolist()}]
    assert found.count == 5
    assert len(broken) == 1
    assert sum(advanced) == 6
    at = source.index_of(found.ids)
    assert torch.equal(found.tokens, centre_tokens(toy_model, source, at))
    assert found.labels.tolist() == source.labels[at].tolist()
    assert found.take(found.labels.numpy() == 1).labels.unique().tolist() == [1]


def test_chosen_positions_and_another_recipe(toy_model, source):
    manifest = Manifest.build(source)
    recipe = Mirrored(toy_model.view_recipe("center"))
    found = read_true_images(toy_model, source, manifest, np.array([0, 5]), recipe=recipe)
    at = source.index_of(found.ids)
    assert set(found.ids.tolist()) <= set(manifest.ids[[0, 5]].tolist())
    assert torch.equal(found.tokens, centre_tokens(toy_model, source, at, recipe))
    assert not torch.equal(found.tokens, centre_tokens(toy_model, source, at))


def test_tokens_of_a_whole_set_are_kept_and_of_a_part_only_looked_up(toy_model, source, tmp_path, monkeypatch):
    manifest, cache = Manifest.build(source), TokenCache.open(tmp_path / "tokens", toy_model)
    read_true_images(toy_model, source, manifest, np.array([0, 5]), cache=cache)
    assert not (tmp_path / "tokens").exists()
    whole = read_true_images(toy_model, source, manifest, cache=cache)
    monkeypatch.setattr(toy_model, "tokenize", None)
    again = read_true_images(toy_model, source, manifest, cache=cache)
    some = read_true_images(toy_model, source, manifest, np.arange(2, 6), cache=cache)
    assert torch.equal(again.tokens, whole.tokens)
    assert torch.equal(some.tokens, whole.tokens[np.isin(whole.ids, some.ids)])


def test_no_positions_are_no_images(toy_model, source):
    found = read_true_images(toy_model, source, Manifest.build(source), np.empty(0, np.int64))
    assert (found.count, found.tokens.shape) == (0, (0, toy_model.num_tokens))
