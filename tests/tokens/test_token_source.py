"""Tokens that were encoded before, in place of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmem import ArraySource, TokenSource, open_source, score
from fastmem.data.manifest import Manifest
from fastmem.data.token_source import NoPixels
from fastmem.errors import FastmemError, InputFileError, UsageError
from fastmem.tokens.encoding import tokens_of

CLASSES = [2, 0, 2, 1]


def tokens_for(model, images: int = 4, views: int = 10) -> np.ndarray:
    shape = (images, views, model.num_tokens)
    return np.random.default_rng(0).integers(0, model.vocabulary, shape)


def write_jsonl(path: Path, tokens: np.ndarray, classes: list[int] = CLASSES) -> Path:
    rows = [(label, row) for label, views in zip(classes, tokens, strict=True) for row in views]
    path.write_text("".join(json.dumps({"class_id": label, "tokens": row.tolist()}) + "\n" for label, row in rows))
    return path


def write_codes(path: Path, tokens: np.ndarray, classes: list[int] = CLASSES) -> Path:
    for kind in ("codes", "labels"):
        (path / f"imagenet256_{kind}").mkdir(parents=True)
    for number, (label, views) in enumerate(zip(classes, tokens, strict=True)):
        np.save(path / "imagenet256_codes" / f"{number}.npy", views[None])
        np.save(path / "imagenet256_labels" / f"{number}.npy", np.array([label]))
    return path


WRITERS = {"jsonl": write_jsonl, "codes": write_codes}


@pytest.mark.parametrize("kind", WRITERS)
def test_stored_tokens_are_those_that_a_pass_gets(kind: str, toy_model, tmp_path: Path) -> None:
    stored = tokens_for(toy_model)
    source = open_source(WRITERS[kind](tmp_path / "tokens.jsonl", stored))
    assert isinstance(source, TokenSource)
    assert list(source.names) == ["0/00000001", "1/00000003", "2/00000000", "2/00000002"]
    assert (source.classes, source.views) == (("0", "1", "2"), 10)
    assert np.array_equal(source.tokens(2), stored[0])
    assert TokenSource(tmp_path / "tokens.jsonl", classes=["a", "b", "c"]).names[0] == "a/00000001"
    manifest = Manifest.build(source)
    batches = [np.array([0, 1]), np.array([2, 3])]
    numbers = [int(name[-8:]) for name in manifest.names]
    for recipe, views in ((toy_model.view_recipe(3), [0, 1, 2]), (toy_model.view_recipe("center"), [4])):
        notes: list[str] = []
        found = list(tokens_of(toy_model, source, manifest, batches, recipe, note=notes.append))
        assert np.array_equal(torch.cat([b.tokens for b in found]).cpu(), stored[numbers][:, views])
        assert len(notes) == (views == [4])
    with pytest.raises(NoPixels, match="this step needs pixels"):
        source.read(0)


def test_a_pass_over_tokens_is_that_over_their_images(toy_model, toy_source, tmp_path: Path) -> None:
    chosen = np.flatnonzero(toy_source.labels < 3)[:8]
    images = ArraySource(np.stack([np.asarray(toy_source.read(i)) for i in chosen]), toy_source.labels[chosen])
    recipe, manifest = toy_model.view_recipe(10), Manifest.build(images)
    (batch,) = tokens_of(toy_model, images, manifest, [np.arange(len(manifest))], recipe)
    path = write_jsonl(tmp_path / "a.jsonl", batch.tokens.cpu().numpy(), manifest.labels.tolist())
    found = score(toy_model, images, views=2, check_classes=False).train
    out = tmp_path / "run"
    again = score(toy_model, open_source(path), views=2, check_classes=False, out=out, per_image=True).train
    assert again.count == found.count
    for name in ("mean", "var", "view_var"):
        torch.testing.assert_close(getattr(again, name), getattr(found, name), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again.top_value[..., 0], found.top_value[..., 0])


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        pytest.param('{"class_id": 1, "tokens": [1]}\n' * 11, InputFileError, "got 1 for the last one", id="11 lines"),
        pytest.param(
            '{"class_id": 1, "tokens": [1]}\n{"class_id": 2, "tokens": [1]}\n',
            UsageError,
            "got classes 1 and 2 up to line 2",
            id="lines of one view",
        ),
        pytest.param("hello\n", InputFileError, "in line 1 of", id="no JSON"),
        pytest.param('{"class_id": -1, "tokens": [1]}\n', InputFileError, "got -1", id="a negative class"),
        pytest.param("\n", UsageError, "got none", id="nothing"),
    ],
)
def test_text_that_holds_no_tokens_is_refused(text: str, error: type[FastmemError], match: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(error, match=match):
        open_source(tmp_path / "a.jsonl")


def test_tokens_of_another_tokenizer_and_damaged_ones(toy_model, tmp_path: Path) -> None:
    stored = tokens_for(toy_model)

    def read(tokens: np.ndarray, views: int = 2, change=lambda text: text):
        path = write_jsonl(tmp_path / "a.jsonl", tokens)
        path.write_text(change(path.read_text()))
        source = TokenSource(path, views=tokens.shape[1])
        manifest = Manifest.build(source)
        return list(tokens_of(toy_model, source, manifest, [np.arange(4)], toy_model.view_recipe(views)))

    for wrong in (stored + toy_model.vocabulary, stored[:, :, 1:]):
        with pytest.raises(UsageError, match="give those of its tokenizer"):
            read(wrong)
    with pytest.raises(UsageError, match="got those of 2 crops"):
        read(stored[:, :2])
    # the last line holds text in place of a number
    (batch,) = read(stored, change=lambda text: text[: text.rindex("[")] + '["x"]}\n')
    assert len(batch.positions) == 3
    assert "damaged tokens" in batch.skipped[0].reason
    one_changed = stored.copy()
    one_changed[2, 0, 0] = toy_model.vocabulary
    (batch,) = read(one_changed)
    assert [s.name for s in batch.skipped] == ["2/00000002"]


@pytest.mark.parametrize("change", ["label", "codes", "alone", "pickle"])
def test_damaged_codes_are_named(change: str, toy_model, tmp_path: Path) -> None:
    write_codes(tmp_path, tokens_for(toy_model))
    codes, labels = tmp_path / "imagenet256_codes", tmp_path / "imagenet256_labels"
    if change == "label":
        np.save(labels / "2.npy", np.array([1.5]))
    elif change == "codes":
        (codes / "2.npy").write_bytes(b"\x93NUMPY")
    elif change == "alone":
        (labels / "2.npy").unlink()
    else:
        np.save(codes / "2.npy", np.array([{}]), allow_pickle=True)
    if change in ("label", "alone"):
        with pytest.raises(InputFileError, match=r"2\.npy"):
            open_source(tmp_path)
    else:
        with pytest.raises(InputFileError, match="2/00000002: damaged tokens"):
            open_source(codes).tokens(3)
