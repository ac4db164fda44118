"""The held-out control, ownership by groups, and membership inference, against literal versions and on null data."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats as reference

from fastmem import ArraySource, UsageError, gap, membership, score
from fastmem.data.manifest import Manifest
from fastmem.demo.controls import format_membership, format_ownership
from fastmem.files import as_json_text
from fastmem.ranking.ownership import group_shares, pooled_owned
from fastmem.ranking.selection import matched_to
from tests.conftest import random_images
from tests.ranking.conftest import build_wide, literal_scores, wide
from tests.stats.conftest import build, make_data, take


def paired(seed: int, images: int = 48) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two sets of equal classes and folds whose responses come from one distribution."""
    sets = [wide(images, seed=s) for s in (seed, seed + 1000)]
    scale = np.random.default_rng(seed).gamma(2.0, 1.0, (1, 1, 3, 2, 40)).astype(np.float32)
    for i, data in enumerate(sets):
        rng = np.random.default_rng([seed, i])
        data["responses"] = rng.gamma(0.7, 1.0, (images, 2, 3, 2, 40)).astype(np.float32) * scale
        data["labels"], data["folds"] = np.arange(images) // (images // 3), np.arange(images) % 4
    return sets[0], sets[1]


def test_the_gap_equals_the_literal_t_test_over_folds():
    train, heldout = paired(0)
    found = gap(build_wide(train), build_wide(heldout))
    folds = [
        np.stack([literal_scores(take(data, data["folds"] == f))["unitmem"] for f in range(4)])
        for data in (train, heldout)
    ]
    test = reference.ttest_ind(*folds, alternative="greater")
    interval = reference.ttest_ind(*folds).confidence_interval(0.95)
    np.testing.assert_allclose(
        found.value, literal_scores(train)["unitmem"] - literal_scores(heldout)["unitmem"], atol=1e-9
    )
    np.testing.assert_allclose(found.fold_value, folds[0].mean(0) - folds[1].mean(0), atol=1e-9)
    np.testing.assert_allclose(found.low, interval.low, atol=1e-9)
    np.testing.assert_allclose(found.high, interval.high, atol=1e-9)
    np.testing.assert_allclose(found.p_value, test.pvalue, atol=1e-9)
    # benjamini-hochberg by hand: the smallest rate at which each would still be called
    p = found.p_value.numpy().ravel()
    order = np.argsort(p)
    literal = np.empty_like(p)
    literal[order] = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1].clip(max=1)
    np.testing.assert_allclose(found.q_value.numpy().ravel(), literal, atol=1e-12)
    means = [f.mean((1, 3)) for f in folds]
    interval = reference.ttest_ind(*means).confidence_interval(0.95)
    np.testing.assert_allclose(found.mean, means[0].mean(0) - means[1].mean(0), atol=1e-9)
    np.testing.assert_allclose(found.mean_low, interval.low, atol=1e-9)
    np.testing.assert_allclose(found.mean_high, interval.high, atol=1e-9)
    assert found.images == 48


def test_without_a_difference_few_units_are_called_and_the_interval_covers_zero():
    called, covered = [], []
    for seed in range(60):
        found = gap(*(build_wide(data) for data in paired(seed)))
        called.append(bool((found.q_value <= 0.05).any()))
        covered.append(bool((found.mean_low[0] <= 0) & (found.mean_high[0] >= 0)))
    # the rate bounds how often anything at all is called; 60 trials have a standard error of 3 %
    assert np.mean(called) < 0.15
    assert np.mean(covered) > 0.85


def test_units_that_hold_training_images_are_called():
    train, heldout = paired(3)
    # in every fold one training image drives ten units twenty times as hard
    for fold in range(4):
        train["responses"][np.flatnonzero(train["folds"] == fold)[0], :, 1, :, :10] = 60.0
    found = gap(build_wide(train), build_wide(heldout))
    hit = (found.q_value <= 0.05).any(1)
    assert hit[1, :10].float().mean() > 0.7
    assert hit.sum() - hit[1, :10].sum() <= 2


@pytest.mark.parametrize("kind", ["equal", "zero"])
def test_degenerate_responses_have_no_gap(kind):
    data = make_data(12, 3, kind=kind) | {"folds": np.arange(12) % 4}
    found = gap(build(data), build(data))
    assert not found.value.any()
    assert (found.q_value >= 0.5).all()


def test_class_only_segments_are_not_tested():
    train, heldout = paired(1)
    found = gap(*(build_wide(d, ("last", "class"), ("class",)) for d in (train, heldout)))
    assert (found.p_value[:, 1] == 1).all()
    alone = gap(*(build_wide(d | {"responses": d["responses"][:, :, :, :1]}, ("last",)) for d in (train, heldout)))
    torch.testing.assert_close(found.q_value[:, 0], alone.q_value[:, 0])


def test_an_interval_needs_folds():
    train = build_wide(paired(0)[0])
    with pytest.raises(UsageError, match="at least two folds"):
        gap(train.folds[0], train.folds[0])


def test_a_pass_keeps_the_training_images_that_match_the_heldout_ones(toy_model, toy_source, tmp_path):
    heldout = ArraySource(random_images(9, 16, seed=5), np.array([0] * 4 + [1] * 3 + [4] + [3]), ids=np.arange(9) + 1)
    result = score(toy_model, toy_source, heldout=heldout, views=2, check_classes=False, out=tmp_path / "run")
    mask, kept = Manifest.build(toy_source).match(Manifest.build(heldout))
    assert result.heldout.class_counts == {0: 4, 1: 1, 3: 1} == result.train.matched.class_counts
    assert [f.count for f in result.heldout.folds] == [f.count for f in result.train.matched.folds]
    manifest = Manifest.build(toy_source)
    rows = manifest.index[mask]
    part = ArraySource(random_images(23, 16)[rows], toy_source.labels[rows], ids=toy_source.ids[rows])
    alone = score(toy_model, part, views=2, check_classes=False).train
    torch.testing.assert_close(result.train.matched.unitmem(), alone.unitmem(), rtol=0, atol=1e-6)
    assert torch.equal(result.train.matched.top_image, alone.top_image)
    assert matched_to(result.train, result.heldout) is result.train.matched
    from fastmem import UnitStats

    loaded = UnitStats.load(tmp_path / "run" / "train.safetensors")
    assert torch.equal(loaded.matched.mean, result.train.matched.mean)
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == (tmp_path / "run" / "train.safetensors").read_bytes()
    assert len(kept) == 6


def test_sets_without_a_common_class_are_refused(toy_model, toy_source):
    heldout = ArraySource(random_images(2, 16), np.array([2, 4]))
    with pytest.raises(UsageError, match="got none in common"):
        score(toy_model, toy_source, heldout=heldout, check_classes=False)


def test_losses_and_hits_of_the_same_pass_are_those_of_the_model(toy_model, toy_source, tmp_path):
    from fastmem.models.model import to_unit_range

    recipe = toy_model.view_recipe("center")
    views = torch.from_numpy(np.concatenate([recipe(toy_source.read(i), 0) for i in range(len(toy_source))]))
    tokens = toy_model.tokenize(to_unit_range(views))
    labels = torch.from_numpy(toy_source.labels)
    logits = toy_model.logits(tokens, labels).double()
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(1)
    order = Manifest.build(toy_source).index
    for pass_views in (3, "center"):
        result = score(toy_model, toy_source, views=pass_views, per_image=True, unconditional=True, check_classes=False)
        kept = result.train_losses
        np.testing.assert_allclose(kept.loss, loss[order], atol=1e-5)
        np.testing.assert_allclose(kept.hits, toy_model.candidate_scores(tokens, labels)[order], atol=1e-6)
        np.testing.assert_allclose(kept.unconditional, toy_model.outcomes(tokens, None).loss.mean(1)[order], atol=1e-5)
        np.testing.assert_allclose(kept.guided, kept.unconditional - kept.loss)
        plain = score(toy_model, toy_source, views=pass_views, check_classes=False)
        assert plain.train_losses is None
        torch.testing.assert_close(plain.train.unitmem(), result.train.unitmem(), rtol=0, atol=1e-5)


def test_losses_without_images_are_asked_for_in_vain(toy_model, toy_source):
    with pytest.raises(UsageError, match="per_image=True with unconditional"):
        score(toy_model, toy_source, unconditional=True)


def literal_membership(members: np.ndarray, nonmembers: np.ndarray) -> tuple[float, float]:
    pairs = [(m > n) + 0.5 * (m == n) for m in members for n in nonmembers]
    allowed = int(0.01 * len(nonmembers))
    best = 0.0
    for threshold in np.concatenate([members, nonmembers]):
        if (nonmembers > threshold).sum() <= allowed:
            best = max(best, (members > threshold).mean())
    return float(np.mean(pairs)), float(best)


MEMBERS = {
    "apart": (np.arange(30) + 100.0, np.arange(20.0)),
    "same": (np.zeros(7), np.zeros(9)),
    "noise": (np.random.default_rng(0).normal(0.5, 1, 63), np.random.default_rng(1).normal(0, 1, 250)),
    "ties": (np.random.default_rng(0).integers(1, 5, 40) * 1.0, np.random.default_rng(1).integers(0, 4, 200) * 1.0),
    "two each": (np.array([1.0, 3.0]), np.array([2.0, 0.0])),
}


@pytest.mark.parametrize(("members", "nonmembers"), MEMBERS.values(), ids=MEMBERS)
def test_membership_equals_the_literal_rates(members, nonmembers):
    found = membership(members, nonmembers, resamples=200)
    auc, tpr = literal_membership(members, nonmembers)
    assert (found.members, found.nonmembers) == (len(members), len(nonmembers))
    assert found.auc == pytest.approx(auc, abs=1e-12)
    assert found.tpr == pytest.approx(tpr, abs=1e-12)
    assert found.auc_low <= found.auc <= found.auc_high
    with_gaps = membership(np.append(members, np.nan), nonmembers, resamples=200)
    assert with_gaps == found


def test_the_bootstrap_interval_is_that_of_resampled_images():
    members, nonmembers = MEMBERS["noise"]
    found = membership(members, nonmembers, seed=5)
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(300):
        sample = [side[generator.integers(0, len(side), len(side))] for side in (members, nonmembers)]
        drawn.append(reference.mannwhitneyu(*sample).statistic / (len(members) * len(nonmembers)))
    np.testing.assert_allclose((found.auc_low, found.auc_high), np.percentile(drawn, [2.5, 97.5]), atol=0.02)


def test_membership_needs_both_sides():
    with pytest.raises(UsageError, match="got 0 and 3 scores"):
        membership(np.array([np.nan]), np.zeros(3))


@pytest.mark.parametrize(("members", "others"), [(1, 1), (1, 5), (5, 1)])
def test_an_interval_over_one_image_is_undefined_and_says_so(members, others):
    found = membership(np.arange(members) + 0.5, np.arange(others) + 0.0)
    assert np.isnan([found.auc_low, found.auc_high, found.tpr_low, found.tpr_high]).all()
    assert str(found).count("(interval undefined)") == 2
    assert json.loads(as_json_text(found.document()))["auc_low"] is None
    assert "nan" not in format_membership({"1": {"loss": found}})


def test_the_shares_of_one_image_have_no_interval():
    (found,) = group_shares(np.array([3]), ["a"])
    assert (found.share, found.chance) == (1.0, 1.0)
    assert np.isnan([found.low, found.high, found.chance_low, found.chance_high]).all()
    assert "interval undefined" in format_ownership({"unitmem": [found]})


def test_group_shares_are_counted_and_chance_is_the_groups_share():
    owned = np.array([0, 5, 1, 0, 4, 0, 0, 0, 0, 0])
    found = {row.group: row for row in group_shares(owned, ["a"] * 2 + ["b"] * 8)}
    assert (found["a"].share, found["a"].owning, found["a"].images, found["a"].chance) == (0.5, 1, 2, 0.2)
    assert (found["b"].share, found["b"].owning) == (0.5, 2)
    assert found["a"].low <= 0.5 <= found["a"].high
    # the literal distribution over all ways to deal three of twelve images to the group
    owned = np.arange(12) ** 2
    found = group_shares(owned, ["a"] * 3 + ["b"] * 9)[0]
    dealt = [owned[list(chosen)].sum() / owned.sum() for chosen in combinations(range(12), 3)]
    np.testing.assert_allclose([found.chance_low, found.chance_high], np.percentile(dealt, [2.5, 97.5]), atol=0.04)
    with pytest.raises(UsageError, match="0 units owned"):
        group_shares(np.zeros(3), ["a"] * 3)
    with pytest.raises(UsageError, match="got 3 and 2"):
        group_shares(np.ones(3), ["a"] * 2)


def test_pooled_owners_come_from_both_sets():
    train, heldout = paired(7)
    # ids of both sets may be equal: each set names its own images
    heldout["ids"] = train["ids"]
    image = [d["responses"].astype(np.float64).mean(1).astype(np.float32) for d in (train, heldout)]
    mine, theirs = pooled_owned(build_wide(train), build_wide(heldout), train["ids"], heldout["ids"], 0.2)
    both = np.concatenate(image).astype(np.float64)
    scores = literal_scores({"responses": both[:, None], "labels": np.zeros(96)})["unitmem"]
    flat = scores.max(1).ravel()
    expected = np.zeros(96, dtype=int)
    for i in np.argsort(-flat, kind="stable")[:24]:
        layer, unit = divmod(int(i), 40)
        expected[both[:, layer, scores[layer, :, unit].argmax(), unit].argmax()] += 1
    assert mine.tolist() == expected[:48].tolist()
    assert theirs.tolist() == expected[48:].tolist()
