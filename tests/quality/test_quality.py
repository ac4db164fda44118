"""Distances between sets of features: against closed forms, scipy and torch-fidelity, and independent of the split."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import linalg
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from fastmem import InputFileError, UsageError
from fastmem.quality import frechet, kernel
from fastmem.quality.frechet import FeatureMoments, Gaussian, frechet_distance
from fastmem.quality.kernel import kernel_distance, kernel_subsets
from fastmem.quality.npz import read_statistics


def rotation(dimensions: int, seed: int) -> np.ndarray:
    return linalg.qr(np.random.default_rng(seed).standard_normal((dimensions, dimensions)))[0]


def commuting(dimensions: int, seed: int, rotated: bool) -> tuple[Gaussian, Gaussian, float]:
    """Two Gaussians whose covariances share their axes, and their distance in closed form."""
    random = np.random.default_rng(seed)
    mus, roots = random.standard_normal((2, dimensions)), random.uniform(0, 3, (2, dimensions))
    axes = rotation(dimensions, seed) if rotated else np.eye(dimensions)
    first, second = (Gaussian(mu, (axes * root**2) @ axes.T) for mu, root in zip(mus, roots, strict=True))
    return first, second, float(((mus[0] - mus[1]) ** 2).sum() + ((roots[0] - roots[1]) ** 2).sum())


@pytest.mark.parametrize(
    ("dimensions", "rotated", "tolerance"),
    [(1, False, 1e-8), (63, False, 1e-8), (5, True, 1e-8), (257, True, 1e-8)],
    ids=["one dimension", "diagonal", "commuting", "many dimensions"],
)
def test_frechet_distance_is_the_closed_form(dimensions, rotated, tolerance):
    first, second, expected = commuting(dimensions, 3, rotated)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert frechet_distance(first, first) == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize(("dimensions", "tolerance"), [(2, 1e-8), (63, 1e-8)], ids=["two", "odd"])
def test_frechet_distance_is_that_of_scipys_matrix_root(dimensions, tolerance):
    random = np.random.default_rng(dimensions)
    samples = random.standard_normal((2, 500, dimensions)) @ random.standard_normal((2, dimensions, dimensions))
    first, second = (FeatureMoments.zero(dimensions).update(s + i).finish() for i, s in enumerate(samples))
    root = linalg.sqrtm(first.sigma @ second.sigma).real
    step = first.mu - second.mu
    expected = step @ step + np.trace(first.sigma + second.sigma - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=tolerance)


def test_frechet_distance_of_singular_covariances_is_real():
    # the matrix root of a singular product is not unique, the distance is
    first = Gaussian(np.zeros(3), np.diag([4.0, 0, 0]))
    second = Gaussian(np.zeros(3), np.diag([0, 9.0, 0]))
    assert frechet_distance(first, second) == pytest.approx(13, abs=1e-8)


def test_frechet_distance_refuses_gaussians_of_other_features():
    with pytest.raises(UsageError, match="equal dimensions, got 2 and 3"):
        frechet_distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("sizes", [(500,), (1,) * 500, (63, 0, 437), (7,) * 71 + (3,)], ids=["all", "ones", "two", "7"])
def test_moments_do_not_depend_on_batches(sizes):
    # a large mean is where plain sums of squares lose their digits
    vectors = np.random.default_rng(0).standard_normal((500, 9)).astype(np.float32) + 1000
    moments = FeatureMoments.zero(9)
    for part in np.split(vectors, np.cumsum(sizes)[:-1]):
        moments = moments.update(part)
    _check_moments(moments, vectors)


@pytest.mark.parametrize("sizes", [(1,) * 99 + (402,), (64,) * 7 + (53,), (100, 0, 401)], ids=["ones", "64", "few"])
def test_the_same_vectors_give_the_same_bits_for_any_split(monkeypatch, sizes):
    monkeypatch.setattr(frechet, "BLOCK", 100)
    vectors = np.random.default_rng(0).standard_normal((501, 9)).astype(np.float32)
    whole, parts = FeatureMoments.zero(9).update(vectors).finish(), FeatureMoments.zero(9)
    for part in np.split(vectors, np.cumsum(sizes)[:-1]):
        # as of a caller who uses one array for all batches
        batch = part.copy()
        parts = parts.update(batch)
        batch[:] = np.nan
    np.testing.assert_array_equal(parts.finish().mu, whole.mu)
    np.testing.assert_array_equal(parts.finish().sigma, whole.sigma)


@pytest.mark.parametrize("drift", [0.0, 1e4], ids=["steady", "drifting"])
def test_moments_are_those_of_exact_arithmetic(monkeypatch, drift):
    monkeypatch.setattr(frechet, "BLOCK", 50)
    vectors = np.random.default_rng(0).standard_normal((260, 3)).astype(np.float32) + 1000
    # sets are read class after class, so later blocks may lie elsewhere
    vectors[130:] += np.float32(drift)
    exact = [[Fraction(float(value)) for value in column] for column in vectors.T]
    means = [sum(column) / 260 for column in exact]
    sigma = [
        [
            float(sum((a - m) * (b - n) for a, b in zip(x, y, strict=True)) / 259)
            for y, n in zip(exact, means, strict=True)
        ]
        for x, m in zip(exact, means, strict=True)
    ]
    found = FeatureMoments.zero(3).update(vectors).finish()
    np.testing.assert_allclose(found.mu, [float(m) for m in means], rtol=1e-15)
    np.testing.assert_allclose(found.sigma, sigma, rtol=0, atol=1e-13 * np.abs(sigma).max())


def test_moments_and_distance_are_torch_fidelitys():
    sides = [np.abs(two_sets(900, 900, 64, 0.3, seed)[1]).astype(np.float32) for seed in (0, 1)]
    ours = [FeatureMoments.zero(64).update(side).finish() for side in sides]
    theirs = [fid_features_to_statistics(torch.from_numpy(side.astype(np.float64))) for side in sides]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.mu, other["mu"], rtol=1e-13)
        np.testing.assert_allclose(mine.sigma, other["sigma"], rtol=0, atol=1e-13 * other["sigma"].max())
    (expected,) = fid_statistics_to_metric(*theirs, verbose=False).values()
    assert frechet_distance(*ours) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("decades", [2, 8, 12])
def test_the_distance_keeps_its_digits_where_covariances_are_nearly_singular(decades):
    dimensions, random = 200, np.random.default_rng(0)
    first = np.sqrt(10 * 10 ** (-decades * np.arange(dimensions) / dimensions))
    second = first * random.uniform(0.9, 1.1, dimensions)
    axes = rotation(dimensions, 0)
    sides = [Gaussian(np.zeros(dimensions), (axes * root**2) @ axes.T) for root in (first, second)]
    assert frechet_distance(*sides) == pytest.approx(((first - second) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)], ids=["in order", "out of order"])
def test_moments_of_shards_merge_to_those_of_the_whole(order):
    vectors = np.random.default_rng(0).standard_normal((500, 9)).astype(np.float32) + 1000
    shards = [FeatureMoments.zero(9).update(part) for part in np.split(vectors, [1, 1, 300])]
    moments = FeatureMoments.zero(9)
    for i in order:
        moments = moments.merge(shards[i])
    _check_moments(moments, vectors)


def _check_moments(moments: FeatureMoments, vectors: np.ndarray) -> None:
    found, wide = moments.finish(), vectors.astype(np.float64)
    assert found.count == len(vectors)
    np.testing.assert_allclose(found.mu, wide.mean(0), rtol=1e-10)
    expected = np.cov(wide, rowvar=False)
    np.testing.assert_allclose(found.sigma, expected, rtol=1e-10, atol=1e-10 * expected.max())


def test_too_few_images_for_a_covariance_are_sent_to_the_kernel_distance():
    vectors = np.random.default_rng(0).standard_normal((9, 9))
    with pytest.raises(UsageError, match="at least 10 images.*got 9: use a kernel distance"):
        FeatureMoments.zero(9).update(vectors).finish()


def test_statistics_are_read_and_other_arrays_ignored(tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3, dtype=np.float32)
    # an array of objects could run code when it is read
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma, mu_s=np.zeros(7), arr_0=np.array([{}], dtype=object))
    found = read_statistics(tmp_path / "s.npz", 3)
    np.testing.assert_array_equal(found.mu, mu)
    np.testing.assert_array_equal(found.sigma, sigma)
    assert (found.sigma.dtype, found.count) == (np.float64, None)


BAD_STATISTICS = {
    "missing": (None, "no such file"),
    "text": (b"mu", "cannot be used"),
    "one array": ("npy", "cannot be used"),
    "without sigma": ({"mu": np.zeros(3)}, "sigma"),
    "objects": ({"mu": np.array([{}] * 3, dtype=object), "sigma": np.eye(3)}, "cannot be used"),
    "other dimensions": ({"mu": np.zeros(4), "sigma": np.eye(4)}, r"mu \[4\]"),
    "not square": ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, r"sigma \[3, 2\]"),
    "not finite": ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
}


@pytest.mark.parametrize(("content", "text"), BAD_STATISTICS.values(), ids=BAD_STATISTICS)
def test_damaged_statistics_are_refused(tmp_path, content, text):
    path = tmp_path / "s.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(InputFileError, match=text):
        read_statistics(path, 3)


def two_sets(n: int, m: int, dimensions: int, shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((n, dimensions)), random.standard_normal((m, dimensions)) + shift


def literal_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased distance, one pair at a time."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / len(x) + 1) ** 3

    own = [
        np.mean([k(side[i], side[j]) for i in range(len(side)) for j in range(len(side)) if i != j])
        for side in (first, second)
    ]
    return sum(own) - 2 * np.mean([k(x, y) for x in first for y in second])


@pytest.mark.parametrize(
    ("n", "m", "block", "tolerance"),
    [(3, 3, 2048, 1e-10), (63, 50, 7, 1e-10), (50, 63, 1, 1e-10)],
    ids=["smallest", "blocks", "blocks of one"],
)
def test_kernel_distance_is_that_of_all_pairs(monkeypatch, n, m, block, tolerance):
    monkeypatch.setattr(kernel, "BLOCK", block)
    first, second = two_sets(n, m, 5, shift=0.5)
    assert kernel_distance(first, second).value == pytest.approx(literal_distance(first, second), rel=tolerance)


@pytest.mark.parametrize("shift", [0.0, 0.7], ids=["alike", "apart"])
def test_interval_of_the_kernel_distance_covers_as_often_as_it_says(shift):
    found = [kernel_distance(*two_sets(60, 90, 8, shift, seed)) for seed in range(300)]
    values = np.array([f.value for f in found])
    # of two equal normal distributions the distance is 0, of the others the mean over draws is the best that is known
    truth = values.mean() if shift else 0.0
    assert values.mean() == pytest.approx(truth, abs=4 * values.std() / np.sqrt(len(values)))
    # a jackknife errs to the safe side where sets are alike
    assert 0.9 <= np.mean([f.low <= truth <= f.high for f in found]) <= 1
    assert 0.9 <= np.mean([f.error for f in found]) / values.std() <= 1.7


@pytest.mark.parametrize("size", [63, 100], ids=["part", "all"])
def test_subset_protocol_is_torch_fidelitys(size):
    first, second = two_sets(100, 120, 33, shift=0.3)
    expected = kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second), kid_subsets=20, kid_subset_size=size, verbose=False
    )
    mean, deviation = kernel_subsets(first, second, 20, size)
    assert mean == pytest.approx(expected[KEY_METRIC_KID_MEAN], rel=1e-10)
    # where every subset is the whole, all that is left is the order of sums
    assert deviation == pytest.approx(expected[KEY_METRIC_KID_STD], rel=1e-8, abs=1e-14)


def test_products_of_float32_move_the_subsets_by_less_than_a_millionth_of_the_kernel():
    # as features are: not negative, of which some are repeated, where rounding does not average out
    sides = [np.abs(side).astype(np.float32) for side in two_sets(300, 300, 512, shift=0.05)]
    sides[0][100:200] = sides[0][:1]
    narrow = kernel_subsets(*sides, 20, 200)
    exact = kernel_subsets(*(side.astype(np.float64) for side in sides), 20, 200)
    level = float(kernel.kernel(*sides).mean())
    np.testing.assert_allclose(narrow, exact, rtol=0, atol=1e-7 * level)
    found = kid_features_to_metric(*map(torch.from_numpy, sides), kid_subsets=20, kid_subset_size=200, verbose=False)
    np.testing.assert_allclose(narrow, list(found.values()), rtol=0, atol=1e-5 * level)


def test_kernel_distances_refuse_too_few_images_and_other_features():
    few, many = two_sets(2, 9, 4)
    with pytest.raises(UsageError, match="at least 3 images.*got 2 and 9"):
        kernel_distance(few, many)
    with pytest.raises(UsageError, match="at least 10 images.*got 9 and 9"):
        kernel_subsets(many, many, 5, 10)
    with pytest.raises(UsageError, match="equal dimensions, got 4 and 3"):
        kernel_distance(many, many[:, :3])
