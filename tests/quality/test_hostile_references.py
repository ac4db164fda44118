"""Reference files as people have them and as nobody should: .npz and files of features, whole, damaged and hostile."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from fastmem import InputFileError, UsageError
from fastmem.quality.features import SCHEMA, Features, SSCDFeatures
from fastmem.quality.npz import holds_arrays, image_header, read_statistics
from fastmem.quality.reference import file_reference, images_reference
from fastmem.quality.rows import write_rows
from tests.conftest import FakeEmbedder, random_images, run
from tests.quality.test_evaluate import Sized, some_features

HEADER = {"features": "fake-32", "digest": "a"}
quick = settings(derandomize=True, max_examples=40, deadline=None, database=None)


def npy(values: np.ndarray, header: bytes | None = None) -> bytes:
    """The bytes of a .npy file, with another header where one is given."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    if header is None:
        return buffer.getvalue()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + values.tobytes()


def archive(path: Path, members: dict[str, bytes], deflated: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def refuse(path: Path) -> str:
    """The sentence by which a .npz file is refused as statistics."""
    with pytest.raises(InputFileError) as error:
        read_statistics(path, 3)
    return str(error.value)


def refusal(read: Callable[[], object]) -> str:
    """The sentence by which something is refused; empty where it is not. Any other error is a test's failure."""
    try:
        read()
    except (InputFileError, UsageError) as error:
        return str(error)
    return ""


def skewed() -> np.ndarray:
    values = np.eye(3)
    values[0, 1] = 0.5
    return values


HUGE_SHAPE = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3, 99999999999999), }"
MEMBERS = {
    "complex": ({"mu": npy(np.zeros(3)), "sigma": npy(np.eye(3).astype(complex))}, "cannot be used"),
    "text": ({"mu": npy(np.array(["a", "b", "c"])), "sigma": npy(np.eye(3))}, "cannot be used"),
    "dates": ({"mu": npy(np.zeros(3, dtype="M8[s]")), "sigma": npy(np.eye(3))}, "cannot be used"),
    "records": ({"mu": npy(np.zeros(3, dtype=[("x", "f8")])), "sigma": npy(np.eye(3))}, "cannot be used"),
    "objects": ({"mu": npy(np.array([{}] * 3, dtype=object)), "sigma": npy(np.eye(3))}, "cannot be used"),
    "infinite": ({"mu": npy(np.full(3, np.inf)), "sigma": npy(np.eye(3))}, "not finite"),
    "enormous": ({"mu": npy(np.full(3, 1e200)), "sigma": npy(np.eye(3))}, "numbers of 1.0e"),
    "not symmetric": ({"mu": npy(np.zeros(3)), "sigma": npy(skewed())}, "not symmetric"),
    "negative": ({"mu": npy(np.zeros(3)), "sigma": npy(np.diag([3.0, 1, -1]))}, "negative variances"),
    "zero": ({"mu": npy(np.zeros(3)), "sigma": npy(np.zeros((3, 3)))}, "without any variance"),
    "mu of one row": ({"mu": npy(np.zeros((1, 3))), "sigma": npy(np.eye(3))}, r"mu [1, 3]"),
    "scalar": ({"mu": npy(np.float64(0)), "sigma": npy(np.eye(3))}, "mu []"),
    "huge shape": ({"mu": npy(np.zeros(3)), "sigma": npy(np.eye(3), HUGE_SHAPE)}, "sigma [3, 999"),
    "no header": ({"mu": b"", "sigma": npy(np.eye(3))}, "cannot be used"),
    "huge header": ({"mu": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 99, "sigma": npy(np.eye(3))}, "a header of"),
    "code in a header": ({"mu": npy(np.zeros(3), b"__import__('os').getcwd()"), "sigma": b""}, "cannot be used"),
    "cut": ({"mu": npy(np.zeros(3))[:-3], "sigma": npy(np.eye(3))}, "cannot be used"),
    "other arrays": ({"activations": npy(np.zeros((9, 3)))}, "neither"),
    "features": ({"arr_0": npy(np.zeros((9, 3)))}, "arr_0 float64"),
}


@pytest.mark.parametrize(("members", "text"), MEMBERS.values(), ids=MEMBERS)
def test_statistics_that_are_none_are_named(tmp_path, members, text):
    for deflated in (False, True):
        assert text in refuse(archive(tmp_path / "s.npz", members, deflated))


def test_a_small_file_of_many_zeros_is_refused_by_its_shape(tmp_path):
    # 200 MB of zeros in 200 kB: it must not be unpacked to be refused
    shape = b"{'descr': '|u1', 'fortran_order': False, 'shape': (200000000,), }"
    bomb = npy(np.zeros(200_000_000, np.uint8), shape)
    path = archive(tmp_path / "s.npz", {"mu": npy(np.zeros(3)), "sigma": bomb}, deflated=True)
    assert path.stat().st_size < 10**6
    assert "sigma [200000000]" in refuse(path)


def test_a_covariance_that_float32_has_rounded_is_taken(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((40, 3)) * [9, 1, 0.01]
    sigma = np.cov(vectors, rowvar=False).astype(np.float32)
    np.savez_compressed(tmp_path / "s.npz", mu=vectors.mean(0).astype(">f4"), sigma=np.asfortranarray(sigma))
    np.testing.assert_array_equal(read_statistics(tmp_path / "s.npz", 3).sigma, sigma.astype(np.float64))


def test_a_covariance_of_too_few_images_is_said_to_be_one(tmp_path):
    sigma = np.cov(np.random.default_rng(0).standard_normal((3, 4)), rowvar=False)
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=sigma)
    assert "of rank 2 of 4: of too few images" in file_reference(tmp_path / "s.npz", Sized()).description


@quick
@given(st.data())
def test_damaged_npz_files_give_one_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("npz") / "s.npz"
    buffer = io.BytesIO()
    save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    content = {"arr_0": random_images(2, 8)} if data.draw(st.booleans()) else {"mu": np.zeros(3), "sigma": np.eye(3)}
    save(buffer, **content)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    for read in (lambda: read_statistics(path, 3), lambda: images_reference(path, SSCDFeatures(FakeEmbedder()))):
        assert "\n" not in refusal(read)


@quick
@given(st.data())
def test_damaged_feature_files_give_one_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("features") / "f.safetensors"
    some_features(5, 0).save(path, HEADER)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        # more often in the header than in the numbers
        place = data.draw(st.integers(0, len(damaged) - 1) | st.integers(0, 299))
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)

    def read() -> None:
        found = Features.load(path, HEADER)
        found.vectors[:]
        if found.logits is not None:
            found.logits[:]

    assert "\n" not in refusal(read)


TENSORS = {
    "half": ({"vectors": torch.zeros(3, 4, dtype=torch.float16)}, "got float16 [3, 4]"),
    "one dimension": ({"vectors": torch.zeros(3)}, "got float32 [3]"),
    "no dimensions": ({"vectors": torch.zeros(3, 0)}, "at least 1 dimension"),
    "other name": ({"features": torch.zeros(3, 4)}, "got none"),
    "NaN": ({"vectors": torch.full((3, 4), torch.nan)}, "got NaN or infinity"),
    "infinite": ({"vectors": torch.tensor([[0.0, -torch.inf]])}, "got NaN or infinity"),
    "fewer logits": ({"vectors": torch.zeros(3, 4), "logits": torch.zeros(2, 5)}, "as many logits as vectors"),
    "sigma of another size": (
        {"vectors": torch.zeros(3, 4), "mu": torch.zeros(4).double(), "sigma": torch.eye(3).double()},
        "expected a tensor sigma of float64 [4,4]",
    ),
}


@pytest.mark.parametrize(("tensors", "text"), TENSORS.values(), ids=TENSORS)
def test_feature_files_of_another_type_are_named(tmp_path, tensors, text):
    path = tmp_path / "f.safetensors"
    save_file(tensors, path, {"fastmem": json.dumps({"schema": SCHEMA, **HEADER})})
    with pytest.raises(InputFileError) as error:
        Features.load(path, HEADER).vectors[:]
    assert text in str(error.value)
    assert str(path) in str(error.value)


def test_a_feature_file_that_shrinks_while_it_is_used_is_named(tmp_path):
    path = tmp_path / "f.safetensors"
    some_features(50, 0).save(path, HEADER)
    found = Features.load(path, HEADER)
    path.write_bytes(path.read_bytes()[:-2500])
    with pytest.raises(InputFileError, match="the file ends early"):
        found.vectors[40:]
    path.unlink()
    with pytest.raises(InputFileError, match="No such file"):
        found.vectors[:3]


def test_a_network_whose_features_are_not_finite_is_named():
    with pytest.raises(InputFileError, match="from the network"):
        Features(np.array([[0, np.nan]], np.float32))


def test_stored_rows_are_those_of_the_arrays_below_one_another(tmp_path):
    parts = [some_features(count, count) for count in (5, 1, 8)]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for part, file in zip(parts, files, strict=True):
        part.save(file, HEADER)
    whole, stored = Features.join(parts), Features.load(files, HEADER)
    write_rows(tmp_path / "all.safetensors", SCHEMA, HEADER, stored.vectors)
    random = np.random.default_rng(0)
    for rows in (stored.vectors, Features.load(tmp_path / "all.safetensors", HEADER).vectors):
        assert rows.shape == (14, 4)
        for at in (slice(None), slice(3, 9), slice(13, 99), slice(0, 0), random.permutation(14), np.array([6, 6, 0])):
            np.testing.assert_array_equal(rows[at], whole.vectors[at])
    np.testing.assert_array_equal(stored.logits[:], whole.logits)


IMAGES = {
    "float": (np.zeros((2, 8, 8, 3), np.float32), "got arr_0 float32 [2, 8, 8, 3]"),
    "grey": (np.zeros((2, 8, 8), np.uint8), "got arr_0 uint8 [2, 8, 8]"),
    "channels first": (np.zeros((2, 3, 8, 8), np.uint8), "got arr_0 uint8 [2, 3, 8, 8]"),
    "not square": (np.zeros((2, 8, 6, 3), np.uint8), "got arr_0 uint8 [2, 8, 6, 3]"),
    "none": (np.zeros((0, 8, 8, 3), np.uint8), "got arr_0 uint8 [0, 8, 8, 3]"),
    "features": (np.zeros((9, 2048), np.float32), "do not say of which network"),
    "transposed": (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "expected images as uint8 [N,S,S,3]"),
}


@pytest.mark.parametrize(("images", "text"), IMAGES.values(), ids=IMAGES)
def test_images_in_npz_files_are_typed(tmp_path, images, text):
    np.savez(tmp_path / "i.npz", images)
    with pytest.raises(InputFileError) as error:
        image_header(tmp_path / "i.npz")
    assert text in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_images_in_an_npz_file_have_the_features_of_these_images(tmp_path, monkeypatch, save):
    monkeypatch.setattr("fastmem.quality.reference.PART", 8)
    monkeypatch.setattr("fastmem.quality.reference.BATCH", 3)
    pixels = random_images(20, 32)
    save(tmp_path / "i.npz", pixels)
    embedder = FakeEmbedder()
    expected = SSCDFeatures(embedder)(pixels)
    embedder.seen = 0
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        found = images_reference(tmp_path / "i.npz", SSCDFeatures(embedder), cache=cache)
        np.testing.assert_allclose(found.features.vectors, expected.vectors, rtol=1e-6)
    # the third time they are read
    assert embedder.seen == 40
    assert found.class_counts == {}
    assert "20 images of 32 x 32" in found.description
    save(tmp_path / "i.npz", pixels[::-1])
    assert images_reference(tmp_path / "i.npz", SSCDFeatures(embedder)).content != found.content


def test_images_that_end_early_are_named(tmp_path):
    header = npy(random_images(2, 8))
    archive(tmp_path / "i.npz", {"arr_0": header[:-1]})
    with pytest.raises(InputFileError, match="expected 2 images.*ends early"):
        images_reference(tmp_path / "i.npz", SSCDFeatures(FakeEmbedder()))


def test_a_npz_is_told_by_its_content(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "s.npz").rename(tmp_path / "stats.zip")
    assert holds_arrays(tmp_path / "stats.zip")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, format="png")
        file.writestr("cat/1.png", picture.getvalue())
    assert not holds_arrays(tmp_path / "images.zip")
    assert not holds_arrays(tmp_path)


def test_a_run_is_compared_with_the_images_of_a_npz(capsys, tiny_run, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fastmem.stages.options.find_embedder", lambda *a, **k: (FakeEmbedder(), "a fake SSCD model"))
    np.savez(tmp_path / "i.npz", random_images(9, 32))
    arguments = ("evaluate", "--run", tiny_run, "--samples", 4, "--json", "--reference")
    code, out, err = run(capsys, *arguments, tmp_path / "i.npz")
    assert code == 0, err
    document = json.loads(out)
    assert "9 images of 32 x 32" in document["reference"]
    assert "kd-sscd" in document["metrics"]
    np.savez(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, _, err = run(capsys, *arguments, tmp_path / "s.npz")
    assert code == 2
    assert "expected Inception features with the statistics" in err
