"""The token cache: the same bits with and without it, no work twice, and nothing believed that is stale or damaged."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmem import ArraySource, FolderSource, UsageError, ZipSource, score
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Joined, TenCrop
from fastmem.reporter import Reporter
from fastmem.scoring.plan import ScorePlan
from fastmem.tokens import cache as token_cache
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.encoding import TokenBatch, tokens_of
from tests.conftest import random_images, write_folder

BATCHES = [np.arange(0, 5), np.arange(5, 9), np.arange(9, 13)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """13 pictures of 20 px in 2 classes."""
    return write_folder(tmp_path / "data", random_images(13, 20))


@pytest.fixture
def cache(tmp_path, toy_model) -> TokenCache:
    return TokenCache.open(tmp_path / "tokens", toy_model)


class Counting:
    """Counts what a model encodes and a source decodes while it is in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model, source: ImageSource) -> None:
        self.views = self.pictures = 0
        tokenize, read = model.tokenize, source.read

        def counted_tokenize(images):
            self.views += len(images)
            return tokenize(images)

        def counted_read(index):
            self.pictures += 1
            return read(index)

        monkeypatch.setattr(model, "tokenize", counted_tokenize)
        monkeypatch.setattr(source, "read", counted_read)


def run(model, source, cache, recipe=None, batches=BATCHES, **more) -> list[TokenBatch]:
    recipe = recipe or TenCrop(16, 3)
    return list(tokens_of(model, source, Manifest.build(source), batches, recipe, cache, workers=0, **more))


def assert_same(found: list[TokenBatch], expected: list[TokenBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.positions, other.positions)
        assert one.tokens.dtype == other.tokens.dtype == torch.int64
        assert torch.equal(one.tokens, other.tokens)
        assert one.skipped == other.skipped


def as_zip(folder: Path) -> ZipSource:
    with zipfile.ZipFile(folder.parent / "data.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return ZipSource(folder.parent / "data.zip")


def as_array(folder: Path) -> ArraySource:
    return ArraySource(random_images(13, 20), np.arange(13) % 2)


@pytest.mark.parametrize("open_images", [FolderSource, as_zip, as_array], ids=["folder", "zip", "array"])
def test_a_second_pass_encodes_and_decodes_nothing_and_gives_the_same_tokens(
    folder, toy_model, cache, monkeypatch, open_images: Callable[[Path], ImageSource]
):
    source = open_images(folder)
    plain = run(toy_model, source, None)
    assert_same(run(toy_model, source, cache), plain)
    counted = Counting(monkeypatch, toy_model, source)
    assert_same(run(toy_model, source, cache), plain)
    # an array's content is its pixels, so they are looked at
    assert (counted.views, counted.pictures) == (0, 13 if isinstance(source, ArraySource) else 0)


def test_worker_processes_read_the_cache(folder, toy_model, cache, monkeypatch):
    source = FolderSource(folder)
    manifest = Manifest.build(source)
    plain = run(toy_model, source, None)
    for round_number in range(2):
        found = list(tokens_of(toy_model, source, manifest, BATCHES, TenCrop(16, 3), cache, workers=2))
        assert_same(found, plain)
        if round_number == 0:
            monkeypatch.setattr(toy_model, "tokenize", None)


def test_only_a_picture_that_changed_is_encoded_again_with_its_batch(folder, toy_model, cache, monkeypatch):
    run(toy_model, FolderSource(folder), cache)
    file = folder / "class-0" / "04.png"
    before = file.stat()
    Image.fromarray(random_images(1, 20, seed=9)[0]).save(file)
    # neither size nor time tells of it
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    source = FolderSource(folder)
    plain = run(toy_model, source, None)
    counted = Counting(monkeypatch, toy_model, source)
    assert_same(run(toy_model, source, cache), plain)
    assert counted.views == 3 * 5
    assert_same(run(toy_model, source, cache), plain)
    assert counted.views == 3 * 5


def test_damaged_pictures_are_skipped_the_same_way_and_spoil_nothing(folder, toy_model, cache, monkeypatch):
    (folder / "class-0" / "02.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    source = FolderSource(folder)
    # it goes after it was listed
    (folder / "class-1" / "03.png").unlink()
    plain = run(toy_model, source, None)
    assert sorted(skipped.name for b in plain for skipped in b.skipped) == ["class-0/02.png", "class-1/03.png"]
    assert_same(run(toy_model, source, cache), plain)
    monkeypatch.setattr(toy_model, "tokenize", None)
    assert_same(run(toy_model, source, cache), plain)


def test_a_batch_without_one_readable_picture_is_empty(folder, toy_model, cache):
    for name in ("00", "02"):
        (folder / "class-0" / f"{name}.png").write_bytes(b"no picture")
    source = FolderSource(folder)
    for _ in range(2):
        (batch,) = run(toy_model, source, cache, batches=[_broken(source)])
        assert batch.tokens.shape == (0, 3, 4)
        assert len(batch.skipped) == 2


def _broken(source: ImageSource) -> list[int]:
    names = Manifest.build(source).names.tolist()
    return [names.index(f"class-0/{name}.png") for name in ("00", "02")]


def shards(cache: TokenCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.safetensors"))


def flip_a_token(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def exchange(file: Path) -> None:
    other = next(f for f in file.parents[1].rglob("*.safetensors") if f != file)
    shutil.copy(other, file)


@pytest.mark.parametrize("damage", [flip_a_token, empty, cut, exchange], ids=lambda damage: damage.__name__)
def test_a_damaged_shard_is_named_and_made_again(folder, toy_model, cache, monkeypatch, damage):
    source = FolderSource(folder)
    plain = run(toy_model, source, cache)
    file = shards(cache)[0]
    whole = file.read_bytes()
    damage(file)
    said = []
    assert_same(run(toy_model, source, cache, note=said.append), plain)
    assert len(said) == 1
    assert str(file) in said[0]
    assert said[0].endswith("these images are encoded again")
    assert file.read_bytes() == whole
    monkeypatch.setattr(toy_model, "tokenize", None)
    assert_same(run(toy_model, source, cache), plain)


def test_each_recipe_of_a_joined_one_serves_alone(folder, toy_model, cache, monkeypatch):
    source, centre = FolderSource(folder), toy_model.view_recipe("center")
    joined = run(toy_model, source, cache, Joined(TenCrop(16, 3), centre))
    assert len(shards(cache)) == 4
    monkeypatch.setattr(toy_model, "tokenize", None)
    assert_same(run(toy_model, source, cache), [TokenBatch(b.positions, b.tokens[:, :3], b.skipped) for b in joined])
    alone = run(toy_model, source, cache, centre)
    assert_same(alone, [TokenBatch(b.positions, b.tokens[:, 3:], b.skipped) for b in joined])
    # whatever the batches are
    (scattered,) = run(toy_model, source, cache, centre, batches=[[11, 2, 7]])
    whole = torch.cat([b.tokens for b in alone])
    assert torch.equal(scattered.tokens, whole[[11, 2, 7]])


@pytest.mark.parametrize("change", ["tokenizer", "device", "libraries"])
def test_what_makes_a_token_is_part_of_its_key(toy_model, cache, monkeypatch, tmp_path, change):
    if change == "tokenizer":
        monkeypatch.setattr(toy_model, "_tokenizer_hash", "b")
    elif change == "device":
        monkeypatch.setattr(type(toy_model), "device", torch.device("meta"))
    else:
        monkeypatch.setattr(token_cache, "version", lambda name: "0.0")
    other = TokenCache.open(tmp_path / "tokens", toy_model)
    ids = np.arange(3)
    assert other.shard_file(TenCrop(16), ids) != cache.shard_file(TenCrop(16), ids)
    assert cache.shard_file(TenCrop(16), ids) != cache.shard_file(TenCrop(16, 9), ids)
    assert cache.shard_file(TenCrop(16), ids) != cache.shard_file(TenCrop(16), ids + 1)


def test_many_writers_leave_whole_shards(folder, toy_model, cache):
    source = FolderSource(folder)
    plain = run(toy_model, source, None)
    said = []
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run(toy_model, source, cache, note=said.append), range(8)):
            assert_same(found, plain)
    assert_same(run(toy_model, source, cache, note=said.append), plain)
    assert not said
    assert not [file for file in cache.folder.rglob("*") if file.is_file() and file not in shards(cache)]


def test_a_cache_that_cannot_be_written_is_said_once_and_changes_nothing(folder, toy_model, tmp_path):
    cache = TokenCache.open(tmp_path / "tokens", toy_model)
    (tmp_path / "tokens").write_text("in the way")
    source, said = FolderSource(folder), []
    assert_same(run(toy_model, source, cache, note=said.append), run(toy_model, source, None))
    assert len(said) == 1
    assert "tokens are no longer kept" in said[0]


def test_a_file_in_the_place_of_the_cache_is_refused(tmp_path, toy_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected a folder for cached tokens"):
        TokenCache.open(tmp_path / "file", toy_model)


@pytest.mark.parametrize("where", [None, "off"])
def test_there_may_be_no_cache(where, toy_model):
    assert TokenCache.open(where, toy_model) is None


def test_the_default_place_is_in_fastmem_home(monkeypatch, tmp_path, toy_model):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path))
    assert TokenCache.open("auto", toy_model).folder == tmp_path / "tokens"


@pytest.mark.parametrize("per_image", [False, True], ids=["views", "views and centre"])
def test_scores_are_the_same_bits_with_and_without_a_cache(folder, toy_model, tmp_path, monkeypatch, per_image):
    source = FolderSource(folder)
    options = {"views": 4, "batch_size": 20, "check_classes": False, "per_image": per_image}
    plans: list[ScorePlan] = []
    plain = score(toy_model, source, **options)
    filled = score(toy_model, source, token_cache=tmp_path / "t", reporter=Reporter(planned=plans.append), **options)
    monkeypatch.setattr(toy_model, "tokenize", None)
    again = score(toy_model, source, token_cache=tmp_path / "t", reporter=Reporter(planned=plans.append), **options)
    for found in (filled, again):
        for name in ("mean", "var", "view_var", "top_value", "top_image", "class_mean"):
            assert torch.equal(getattr(found.train, name), getattr(plain.train, name)), name
        if per_image:
            assert np.array_equal(found.train_losses.loss, plain.train_losses.loss)
    assert [plan.tokens.stored for plan in plans] == [0.0, 1.0]
    assert f"of tokens in {tmp_path / 't'} (100% of them there)" in str(plans[1])
    stored = sum(file.stat().st_size for file in (tmp_path / "t").rglob("*.safetensors"))
    # beside the rows, each shard has a header
    assert plans[0].tokens.total_bytes < stored < plans[0].tokens.total_bytes + 1000 * len(plans[0].tokens.folder.parts)


def test_a_cache_that_would_fill_the_disk_is_left_out_aloud(folder, toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(TokenCache, "free_bytes", lambda self: 10)
    said = []
    source = FolderSource(folder)
    score(
        toy_model, source, views=2, check_classes=False, token_cache=tmp_path / "t", reporter=Reporter(note=said.append)
    )
    assert any("tokens are not kept for the next pass" in sentence for sentence in said)
    assert not (tmp_path / "t").exists()
