"""The sweep on small models: edits of every kind of row, halves that are kept apart, attacks on an edited model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmem import ArraySource, UsageError, score
from fastmem.data.manifest import Manifest
from fastmem.extraction.attack import attack
from fastmem.extraction.candidates import find_targets
from fastmem.extraction.verdicts import SSCDJudge, TokenMatch
from fastmem.mitigation.edit_file import EditPlan
from fastmem.mitigation.scaling import scale_units
from fastmem.models.model import Model
from fastmem.quality.features import SSCDFeatures
from fastmem.ranking.selection import Selection
from fastmem.reporter import SILENT, Reporter
from fastmem.sweep.model_bench import graded_factors
from fastmem.sweep.plan import NO_EDIT, Row
from fastmem.sweep.prepare import BenchSettings, Prepared, prepare
from fastmem.sweep.reattack import Attacker, ReAttack, attack_edits_again, other_prefixes
from fastmem.sweep.row_norms import find_rows_scaled_by, find_small_rows
from fastmem.sweep.table import RowUnavailable
from tests.conftest import FakeEmbedder, build_case, make_toy_model, random_images

SETTINGS = BenchSettings((1, 2), samples=6, halved=True, top_per_class=6)


@pytest.fixture(scope="module")
def sources() -> dict[str, ArraySource]:
    """24 training and 16 held-out images of 16 px in two classes."""
    labels = np.array([0, 3])
    return {
        "train": ArraySource(random_images(24, 16), labels.repeat(12)),
        "heldout": ArraySource(random_images(16, 16, seed=1), labels.repeat(8)),
    }


@pytest.fixture
def model() -> Model:
    """A model of its own for every test, as edits are made in place."""
    return make_toy_model()


def make_bench(model: Model, sources: dict[str, ArraySource], settings: BenchSettings = SETTINGS, **change) -> Prepared:
    """A bench whose targets count as extracted when any token after the prefix is right."""
    result = score(
        model, sources["train"], heldout=sources["heldout"], views="center", check_classes=False, per_image=True
    )
    given = {
        "manifests": {split: Manifest.build(source) for split, source in sources.items()},
        "stats": {"train": result.train, "heldout": result.heldout},
        "hits": result.train_losses.hits,
        "judge": TokenMatch(0.0),
        "extractor": None,
        "groups": {"few": Manifest.build(sources["train"]).ids[:4]},
    } | change
    return prepare(model, sources, given.pop("manifests"), given.pop("stats"), settings=settings, **given)


def weights(model: Model) -> list[torch.Tensor]:
    return [layer.weight.clone() for layer in model.fc1_layers]


def scaled_by(model: Model, before: list[torch.Tensor]) -> torch.Tensor:
    """What each row was multiplied by, float [layers, units]."""
    return torch.stack(
        [layer.weight.norm(dim=1) / w.norm(dim=1) for layer, w in zip(model.fc1_layers, before, strict=True)]
    )


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(NO_EDIT, id="no edit"),
        pytest.param(Row("unitmem", 0.1, 0.5), id="unitmem"),
        pytest.param(Row("gap", 0.1, 0.25, scope="per-layer"), id="gap per layer"),
        pytest.param(Row("random", 0.2, 0.0, seed=3), id="random zeroed"),
        pytest.param(Row("attribution", 0.1, 0.5), id="attribution"),
        pytest.param(Row("attribution", 0.2, 0.5, rounds=2), id="attribution in two rounds"),
        pytest.param(Row("within-class", 0.2, 0.0, graded=True), id="factors by score"),
    ],
)
def test_a_row_scales_its_units_and_nothing_stays(model, sources, row):
    bench = make_bench(model, sources).bench
    before = weights(model)
    with bench.edited(row) as units:
        factors = scaled_by(model, before)
        edited = int((~torch.isclose(factors, torch.ones(()))).sum())
        assert edited == units
        if row.rounds == 1 and not row.graded:
            assert units == round(row.fraction * 48)
            chosen = factors[factors != 1]
            torch.testing.assert_close(
                chosen[~torch.isclose(chosen, torch.ones(()))], torch.full((edited,), row.factor)
            )
        if row.graded:
            # the lowest of the chosen keeps its weight, the highest loses it
            assert edited == round(row.fraction * 48) - 1
            assert factors.min() == 0
        if row.rounds == 2:
            assert round(row.fraction * 48) // 2 <= edited <= round(row.fraction * 48)
            assert set(factors.flatten().mul(4).round().tolist()) <= {1.0, 2.0, 4.0}
        assert len(model.edits) == (0 if row == NO_EDIT else row.rounds)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert model.edits == []


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(Row("unitmem", 0.1, 0.5), id="unitmem"),
        pytest.param(Row("random", 0.2, 0.0, seed=3), id="random zeroed"),
        pytest.param(Row("attribution", 0.2, 0.5, rounds=2), id="attribution in two rounds"),
        pytest.param(Row("within-class", 0.2, 0.0, graded=True), id="factors by score"),
    ],
)
def test_a_row_can_be_kept_as_an_edit_that_makes_the_same_weights(model, sources, row, tmp_path):
    bench = make_bench(model, sources).bench
    with bench.edited(row) as units:
        expected = weights(model)
    plan = bench.plan(row)
    assert model.edits == []
    plan.save(tmp_path / "edit.safetensors")
    read = EditPlan.load(tmp_path / "edit.safetensors")
    assert (len(read), read.by, read.fraction, read.seed) == (units, row.by, row.fraction, row.seed)
    with read.apply(model):
        # factors of two rounds are one product here, rounded once
        for found, true in zip(weights(model), expected, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-6, atol=0)
    seen = row.by == "attribution"
    assert read.chosen_on.tolist() == (bench.chooser.memorised.ids.tolist() if seen else [])
    assert read.chosen_against.tolist() == (bench.chooser.unseen.ids.tolist() if seen else [])


def test_sweeps_of_different_seeds_share_no_draw(model, sources):
    first, second = (make_bench(model, sources, replace(SETTINGS, seed=seed)) for seed in (0, 1))
    assert first.settings.seed_of(3) == 3
    assert second.settings.seed_of(0) > 10_000
    chosen = [made.bench.chooser.choose(Row("random", 0.2, 0.5, seed=1)) for made in (first, second)]
    assert not torch.equal(chosen[0].unit, chosen[1].unit)


def test_units_that_cannot_be_chosen_make_a_row_unavailable(model, sources):
    bench = make_bench(model, sources).bench
    with (
        pytest.raises(RowUnavailable, match="expected at most half of a layer's units"),
        bench.edited(Row("matched", 0.9, 0.5)),
    ):
        pass
    assert model.edits == []


def test_graded_factors_fall_with_the_score():
    chosen = Selection(
        torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.tensor([0.9, 0.5, 0.1]), "unitmem", 0.1
    )
    torch.testing.assert_close(graded_factors(chosen, 0.2), torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64))
    equal = replace(chosen, score=torch.full((3,), 0.4))
    assert graded_factors(equal, 0.2).tolist() == pytest.approx([0.2] * 3)


def test_what_units_are_chosen_by_is_never_reported(model, sources, monkeypatch):
    seen = []

    def record(model, tokens, labels, heldout_tokens, heldout_labels, batch_size):
        seen.append((tokens, heldout_tokens))
        return torch.rand(2, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    monkeypatch.setattr("fastmem.sweep.model_bench.attribution_from_tokens", record)
    made = make_bench(model, sources)
    bench, reported = made.bench, made.counted.reported
    assert (len(made.targets), reported.sum()) == (12, 6)
    for _ in range(2):
        with bench.edited(Row("attribution", 0.1, 0.5)):
            pass
    # scores of the unedited model are made once
    ((memorised, unseen),) = seen
    similarity = bench.attack()
    given = ~reported & (similarity[-1] > 0)
    assert torch.equal(memorised, made.targets.tokens[torch.from_numpy(given if given.any() else ~reported)])
    assert len(unseen) == 8
    all_unseen = find_targets(
        model, sources["heldout"], Manifest.build(sources["heldout"]), np.zeros(16), np.arange(16)
    )
    other = [i for i, row in enumerate(all_unseen.tokens) if not (row == unseen).all(1).any()]
    expected = model.outcomes(all_unseen.tokens[other], torch.from_numpy(all_unseen.labels[other])).loss.double().mean()
    metrics = bench.quality(0)
    assert metrics["loss_heldout"] == pytest.approx(float(expected), rel=1e-6)
    mine = made.targets.take(reported)
    assert metrics["loss_targets"] == pytest.approx(
        float(model.outcomes(mine.tokens, torch.from_numpy(mine.labels)).loss.double().mean()), rel=1e-6
    )
    assert made.counted.groups["few"].sum() == np.isin(made.targets.ids, Manifest.build(sources["train"]).ids[:4]).sum()


def test_all_targets_are_reported_where_no_units_are_chosen_by_them(model, sources):
    made = make_bench(model, sources, replace(SETTINGS, halved=False))
    assert made.counted.reported.all()


def test_quality_of_samples_is_a_metric_with_an_embedder(model, sources, tmp_path):
    embedder = FakeEmbedder()
    given = {"judge": SSCDJudge(embedder), "extractor": SSCDFeatures(embedder), "features": tmp_path}
    first = make_bench(model, sources, **given).bench.quality(0)
    assert {"kd-sscd", "loss_heldout", "loss_targets"} <= set(first)
    assert list(tmp_path.iterdir())
    again = make_bench(model, sources, **given).bench
    assert again.quality(0) == first
    other = again.quality(1)
    assert other["kd-sscd"] != first["kd-sscd"]
    assert other["loss_heldout"] == first["loss_heldout"]


def test_a_run_without_held_out_images_is_refused(model, sources):
    with pytest.raises(UsageError, match="expected a run with held-out images"):
        make_bench(model, sources, manifests={"train": Manifest.build(sources["train"])})


@contextmanager
def wide_rows(spread: float) -> Iterator[Model]:
    """The small model with rows of norm 1 times exp(spread x normal), 3 blocks of 160 units."""
    model = build_case("rar-small")
    rng = torch.Generator().manual_seed(1)
    for layer in model.fc1_layers:
        rows = torch.nn.functional.normalize(torch.randn(layer.weight.shape, generator=rng), dim=1)
        layer.weight.copy_(rows * (spread * torch.randn(len(rows), 1, generator=rng)).exp())
    yield model


def edit_of(units: int) -> Selection:
    """Every 20th unit of 3 blocks of 160."""
    flat = torch.arange(0, 480, 480 // units)[:units]
    return Selection(flat // 160, flat % 160, torch.ones(units), "unitmem", units / 480)


def keys(rows) -> set[int]:
    return set((rows.layer * 160 + rows.unit).tolist())


@pytest.mark.parametrize("factor", [0.5, 0.25], ids=["halved", "quartered"])
def test_scaled_rows_of_even_norms_are_all_found_and_restored(factor):
    with wide_rows(0.05) as model:
        before = weights(model)
        with scale_units(model, edit_of(24), factor):
            for found, tolerance in (
                (find_small_rows(model), 0.2),
                (find_rows_scaled_by(model, factor, 24 / 480), 1e-6),
            ):
                assert keys(found) == keys(edit_of(24))
                with scale_units(model, found, found.factor):
                    restored = scaled_by(model, before)
                    assert (restored - 1).abs().max() < tolerance
        # rows that nobody scaled are left alone
        assert len(find_rows_scaled_by(model, factor, 24 / 480)) == 0


def test_who_knows_the_factor_finds_more_among_uneven_norms():
    with wide_rows(0.3) as model, scale_units(model, edit_of(48), 0.5):
        blind, knowing = find_small_rows(model), find_rows_scaled_by(model, 0.5, 0.1)
        truth = keys(edit_of(48))
        assert len(keys(blind) & truth) < len(keys(knowing) & truth) < 48
        # the log likelihood ratio of two normals of deviation 0.3 that are log 2 apart, at odds of 9 to 1
        cut = -math.log(2) / 2 - 0.3**2 * math.log(9) / math.log(2)
        power = float(torch.distributions.Normal(-math.log(2), 0.3).cdf(torch.tensor(cut)))
        assert len(keys(knowing) & truth) == pytest.approx(48 * power, abs=8)
        assert len(keys(knowing) - truth) < 20


def test_where_every_row_was_scaled_all_are_scaled_back():
    with wide_rows(0.3) as model:
        found = find_rows_scaled_by(model, 0.5, 1.0)
        assert len(found) == 480
        assert found.factor.unique().tolist() == [2.0]


def test_rows_of_zeros_are_not_taken_for_rows_to_scale():
    with wide_rows(0.05) as model, scale_units(model, edit_of(24), 0.0):
        assert len(find_small_rows(model)) == len(find_rows_scaled_by(model, 0.5, 0.05)) == 0


def make_attacker(model: Model, sources: dict[str, ArraySource]) -> tuple[Attacker, Prepared]:
    made = make_bench(model, sources)
    reported = made.counted.reported
    train = sources["train"]
    chosen_by = made.targets.ids[~reported]
    targets = made.targets.take(reported)
    return Attacker(model, train, Manifest.build(train), made.bench.judge, targets, chosen_by, 2), made


def test_an_edit_is_attacked_again_by_every_approach(model, sources):
    attacker, made = make_attacker(model, sources)
    row = Row("random", 0.2, 0.5)
    found = attacker.attack_again(row, made.bench)
    names = [a.approach for a in found.attempts]
    assert names == [
        "as published",
        "prefix of 0 tokens",
        "prefix of 1 tokens",
        "prefix from another crop",
        "prefix from the mirror image",
        "candidates of the edited model",
    ]
    mine, judge = made.targets.take(made.counted.reported), made.bench.judge

    def count(prefix: int) -> int:
        return int((judge.similarities(model, mine, [prefix], attack(model, mine, [prefix])) > 0).sum())

    for attempt, prefix in zip(found.attempts[:3], (2, 0, 1), strict=True):
        assert (attempt.prefix, attempt.targets, attempt.before) == (prefix, 6, count(prefix))
    with made.bench.edited(row):
        assert [a.after for a in found.attempts[:3]] == [count(p) for p in (2, 0, 1)]
    # five of a class at most, and none that an edit could be chosen by
    assert found.attempts[-1].targets == 10
    assert {r.knows for r in found.rescalings} == {"that rows were made smaller", "the factor and the share of rows"}
    assert all(r.found + r.wrong <= 48 for r in found.rescalings)
    assert model.edits == []


def test_other_candidates_leave_out_what_units_were_chosen_by(model, sources):
    attacker, made = make_attacker(model, sources)
    others = attacker._other_candidates({}, None, SILENT).targets
    assert not np.isin(others.ids, made.targets.ids[~made.counted.reported]).any()


def test_views_of_a_target_are_its_own_crops(model, sources):
    attacker, made = make_attacker(model, sources)
    mine = made.targets.take(made.counted.reported)
    approaches = {a.name: a.targets for a in attacker.approaches}
    train = sources["train"]
    pixels = np.stack([model.view_recipe("center")(train.read(i), 0)[0] for i in train.index_of(mine.ids)])
    mirrored = model.tokenize(torch.from_numpy(pixels[:, :, ::-1].copy()).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(approaches["prefix from the mirror image"].tokens, mirrored)
    assert not torch.equal(approaches["prefix from another crop"].tokens, mine.tokens)


def test_zeroed_rows_are_not_scaled_back(model, sources):
    attacker, made = make_attacker(model, sources)
    assert attacker.attack_again(Row("random", 0.2, 0.0), made.bench).rescalings == ()


def test_edits_are_attacked_once(model, sources, tmp_path):
    attacker, made = make_attacker(model, sources)
    rows = [Row("random", 0.1, 0.5), Row("lowest", 0.1, 0.5)]
    advanced: list[int] = []
    first = attack_edits_again(lambda: attacker, rows[:1], made.bench, tmp_path)
    both = attack_edits_again(lambda: attacker, rows, made.bench, tmp_path, Reporter(advance=advanced.append))
    # what is there needs no attacker
    again = attack_edits_again(None, rows, made.bench, tmp_path)
    assert sum(advanced) == 24
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{row.key}.json" for row in rows)
    assert first == again[:1]
    assert both == again
    again[1].save(tmp_path / "again.json", "mine")
    assert ReAttack.load(tmp_path / "again.json", rows[1], "mine") == again[1]


def test_an_edit_that_cannot_be_made_is_not_attacked_again(model, sources, tmp_path):
    attacker, made = make_attacker(model, sources)
    rows = [Row("matched", 0.9, 0.5), Row("random", 0.1, 0.5)]
    assert [found.row for found in attack_edits_again(lambda: attacker, rows, made.bench, tmp_path)] == rows[1:]


def test_a_pass_for_other_candidates_is_not_repeated(model, sources, tmp_path, monkeypatch):
    attacker, made = make_attacker(model, sources)
    row, state = Row("random", 0.2, 0.5), tmp_path / "candidates.safetensors"
    first = attacker.attack_again(row, made.bench, state)
    assert state.exists()
    monkeypatch.setattr("fastmem.sweep.reattack.collect_losses", None)
    assert attacker.attack_again(row, made.bench, state) == first


def test_other_prefixes_are_shorter_and_longer_ones_that_the_model_allows(small_model, small_var):
    # 16 tokens one by one, and 30 tokens in scales that end at 1, 5, 14 and 30
    assert other_prefixes(small_model, 2) == [1, 4, 8]
    assert other_prefixes(small_var, 5) == [1, 14]
