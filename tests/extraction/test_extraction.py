"""Extraction: candidates, completions, verdicts, and what is counted, against literal versions of each definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmem import ArraySource, FolderSource, InputFileError, UsageError, score
from fastmem.data.manifest import Manifest
from fastmem.extraction.association import associate, find_associations
from fastmem.extraction.attack import attack, token_match
from fastmem.extraction.candidates import (
    STATE_SCHEMA,
    Targets,
    collect_losses,
    find_targets,
    highest_per_class,
    read_pictures,
)
from fastmem.extraction.extract import check_prefixes, extract
from fastmem.extraction.verdicts import (
    Count,
    SSCDJudge,
    TokenMatch,
    distinct,
    false_alarm_threshold,
    groups_by_cosine,
    groups_by_tokens,
)
from fastmem.files import read_tensors, write_tensors
from fastmem.index.build import build_index
from fastmem.index.embedding import embed
from fastmem.index.search import EmbeddingIndex
from fastmem.report.extraction_report import counts, describe, write_verdicts
from fastmem.reporter import Reporter
from fastmem.tokens.cache import TokenCache
from tests.conftest import FakeEmbedder, random_images, write_folder


def make_targets(model, count: int, seed: int = 0, labels: list[int] | None = None) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocabulary, (count, model.num_tokens), generator=generator)
    own = np.array(labels if labels is not None else [i % model.num_classes for i in range(count)])
    return Targets(np.arange(count), own, tuple(f"c/{i}" for i in range(count)), np.zeros(count, np.float32), tokens)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_the_highest_of_every_class_are_taken(toy_source, count):
    manifest = Manifest.build(toy_source)
    scores = np.random.default_rng(0).integers(0, 4, len(manifest)) / 4
    scores[[2, 11, 15]] = np.nan
    expected = []
    for label in sorted(set(manifest.labels.tolist())):
        rows = [(-scores[i], manifest.ids[i], i) for i in range(len(manifest)) if manifest.labels[i] == label]
        expected += sorted(i for _, _, i in sorted(row for row in rows if not np.isnan(row[0]))[:count])
    assert highest_per_class(manifest, scores, count).tolist() == expected


def test_scores_must_fit_the_images(toy_source):
    manifest = Manifest.build(toy_source)
    for scores, count in ((np.zeros(3), 5), (np.zeros(len(manifest)), 0)):
        with pytest.raises(UsageError, match="a score for each of 23 images"):
            highest_per_class(manifest, scores, count)


def test_a_pass_of_its_own_finds_the_scores_that_scoring_keeps(toy_model, toy_source, tmp_path):
    kept = score(toy_model, toy_source, views="center", per_image=True, check_classes=False).train_losses
    found = collect_losses(toy_model, toy_source, Manifest.build(toy_source), None, batch_size=4)
    np.testing.assert_allclose(found.loss, kept.loss, atol=1e-5)
    assert np.array_equal(found.hits, kept.hits)


def test_a_pass_over_cached_tokens_encodes_nothing(toy_model, toy_source, tmp_path, monkeypatch):
    cache, manifest = TokenCache.open(tmp_path, toy_model), Manifest.build(toy_source)
    first = collect_losses(toy_model, toy_source, manifest, None, batch_size=4, cache=cache)
    monkeypatch.setattr(toy_model, "tokenize", None)
    again = collect_losses(toy_model, toy_source, manifest, None, batch_size=9, cache=cache)
    np.testing.assert_allclose(again.loss, first.loss, atol=1e-5)
    assert np.array_equal(again.hits, first.hits)


def test_an_interrupted_pass_goes_on_where_it_was(toy_model, toy_source, tmp_path, monkeypatch):
    manifest, file = Manifest.build(toy_source), tmp_path / "losses.safetensors"
    whole = collect_losses(toy_model, toy_source, manifest, None, batch_size=4)
    monkeypatch.setattr("fastmem.extraction.candidates.SAVE_SECONDS", 0.0)
    seen = []

    def stop(images: int) -> None:
        seen.append(images)
        if len(seen) == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        collect_losses(toy_model, toy_source, manifest, file, batch_size=4, reporter=Reporter(advance=stop))
    assert not file.exists()
    again = []
    state = tmp_path / "losses-state.safetensors"
    before = state.read_bytes()
    tensors, header = read_tensors(state, STATE_SCHEMA)
    write_tensors(state, tensors, STATE_SCHEMA, header | {"done": 1000})
    with pytest.raises(InputFileError, match="at most 23 images .*got 1000"):
        collect_losses(toy_model, toy_source, manifest, file, batch_size=4)
    state.write_bytes(before)
    found = collect_losses(toy_model, toy_source, manifest, file, batch_size=4, reporter=Reporter(advance=again.append))
    # the third batch was done and not saved
    assert again == [8, 4, 4, 4, 3]
    assert np.array_equal(found.loss, whole.loss)
    assert file.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.safetensors"]


def test_images_that_cannot_be_read_are_no_targets(toy_model, tmp_path):
    write_folder(tmp_path, random_images(5, 16), classes=1)
    (tmp_path / "class-0" / "02.png").write_bytes(b"broken")
    source = FolderSource(tmp_path)
    manifest = Manifest.build(source)
    targets = find_targets(toy_model, source, manifest, np.arange(5.0), np.arange(5))
    pictures = read_pictures(toy_model, source, manifest, targets)
    assert sorted(targets.names) == [f"class-0/0{i}.png" for i in (0, 1, 3, 4)]
    assert pictures.shape == (4, 3, 16, 16)
    assert torch.equal(targets.tokens, toy_model.tokenize(pictures))
    kept = {name: s for name, s in zip(manifest.names.tolist(), np.arange(5.0), strict=True)}
    assert targets.scores.tolist() == [kept[name] for name in targets.names]


@pytest.mark.parametrize("batch_size", [1, 3, 80])
@pytest.mark.parametrize("family", ["small_model", "small_var"])
def test_the_attack_completes_every_prefix_greedily(request, family, batch_size):
    model = request.getfixturevalue(family)
    targets = make_targets(model, 5, labels=[0, 0, 1, 1, 2])
    prefixes = [length for length in model.prefix_lengths if length < model.num_tokens][:4]
    found = attack(model, targets, prefixes, batch_size=batch_size)
    assert found.shape == (len(prefixes), 5, model.num_tokens)
    for p, length in enumerate(prefixes):
        for i in range(5):
            alone = model.generate(torch.tensor([targets.labels[i]]), targets.tokens[i : i + 1, :length])
            assert torch.equal(found[p, i], alone[0])
            assert torch.equal(found[p, i, :length], targets.tokens[i, :length])


def test_equal_rows_are_completed_once(toy_model, monkeypatch):
    targets = make_targets(toy_model, 6, labels=[0, 0, 0, 1, 1, 1])
    targets.tokens[1, :2] = targets.tokens[0, :2]
    rows = []
    generate = toy_model._generate
    monkeypatch.setattr(
        toy_model, "_generate", lambda labels, *others: (rows.append(len(labels)), generate(labels, *others))[1]
    )
    attack(toy_model, targets, [0, 2])
    # nothing for each of two classes, and two tokens for six targets, of which two share them
    assert sum(rows) == 2 + 5


def test_without_prefixes_there_is_no_attack(toy_model):
    with pytest.raises(UsageError, match="at least one prefix length"):
        attack(toy_model, make_targets(toy_model, 2), [])


def test_token_match_counts_what_follows_the_prefix():
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    generated = torch.tensor([[[1, 2, 3, 4], [5, 0, 7, 0]], [[1, 2, 0, 4], [5, 6, 0, 0]]])
    assert token_match(tokens, [0, 2], generated).tolist() == [[1.0, 0.5], [0.5, 0.0]]


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 48), (7, 48), (48, 48), (75, 5000), (672, 5000)])
def test_the_interval_is_wilsons(k, n):
    from scipy.stats import binomtest

    expected = binomtest(k, n).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(Count(k, n).interval, (expected.low, expected.high), atol=1e-12)


def test_nothing_of_nothing_may_be_anything():
    assert Count(0, 0).interval == (0.0, 1.0)


@pytest.mark.parametrize("count", [1, 63, 99, 100, 149, 500])
def test_at_most_one_in_a_hundred_heldout_images_is_above_the_threshold(count):
    values = np.random.default_rng(count).random(count).astype(np.float32)
    found = false_alarm_threshold(values)
    assert (values > found).sum() == count // 100
    assert found in values
    assert false_alarm_threshold(values[:0]) is None


def test_groups_are_chained():
    angles = np.array([0.0, 0.5, 1.0, 2.5, 2.6, 4.5])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    groups = groups_by_cosine(vectors, float(np.cos(0.6)))
    assert [groups.tolist().index(g) for g in groups] == [0, 0, 0, 3, 3, 5]
    assert distinct(np.array([True, False, True, True, False, False]), groups) == 2
    assert distinct(np.zeros(6, dtype=bool), groups) == 0


def test_groups_by_tokens_need_more_than_the_share():
    tokens = torch.tensor([[1, 2, 3, 4]] * 130 + [[1, 2, 3, 0], [0, 0, 3, 0]])
    groups = groups_by_tokens(tokens, 0.7)
    assert len(set(groups[:131].tolist())) == 1
    assert groups[131] != groups[130]
    assert len(set(groups_by_tokens(tokens, 0.75).tolist())) == 3


def test_equal_tokens_are_embedded_once(toy_model):
    embedder = FakeEmbedder()
    judge, targets = SSCDJudge(embedder), make_targets(toy_model, 7)
    generated = torch.stack([targets.tokens, targets.tokens.roll(1, 0), make_targets(toy_model, 7, seed=1).tokens])
    found = judge.similarities(toy_model, targets, [0, 1, 2], generated)
    assert embedder.seen == 14
    np.testing.assert_allclose(found[0], 1, atol=1e-6)
    true, made = (embed(embedder, toy_model.decode(t)) for t in (targets.tokens, generated.flatten(0, 1)))
    expected = (made.reshape(3, 7, 512) * true).sum(2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    seen = embedder.seen
    judge.similarities(toy_model, targets, [0], generated[:1])
    assert embedder.seen == seen


def heldout_source() -> ArraySource:
    return ArraySource(random_images(9, 16, seed=5), np.array([0] * 4 + [1] * 2 + [3] * 3))


def run_toy(model, source, judge, **options):
    sources = {"train": source, "heldout": heldout_source()}
    manifests = {"train": Manifest.build(source)}
    mask, manifests["heldout"] = manifests["train"].match(Manifest.build(sources["heldout"]))
    scores = {split: collect_losses(model, sources[split], m, None).hits for split, m in manifests.items()}
    found = extract(model, sources, manifests, scores, judge, matched=mask, top_per_class=3, **options)
    return found, sources, manifests, scores, mask


def test_every_number_follows_its_definition(toy_model, toy_source, tmp_path):
    embedder = FakeEmbedder()
    path = build_index(toy_source, embedder, tmp_path / "index").path
    index = EmbeddingIndex(path, "cpu")
    judge = SSCDJudge(embedder, 0.5)
    found, sources, manifests, scores, mask = run_toy(toy_model, toy_source, judge, index=index, prefixes=(0, 2, 3))
    for split, verdicts in found.sets.items():
        targets, manifest = verdicts.targets, manifests[split]
        chosen = highest_per_class(manifest, scores[split], 3)
        assert targets.ids[verdicts.candidate].tolist() == manifest.ids[chosen].tolist()
        images = (
            torch.from_numpy(
                np.stack(
                    [
                        np.asarray(sources[split].read(int(manifest.index[i])))
                        for i in [np.flatnonzero(manifest.ids == t)[0] for t in targets.ids]
                    ]
                )
            )
            .permute(0, 3, 1, 2)
            .float()
            / 255
        )
        assert torch.equal(targets.tokens, toy_model.tokenize(images))
        own = embed(embedder, images)
        again = embed(embedder, toy_model.decode(targets.tokens))
        for p, length in enumerate((0, 2, 3)):
            made_tokens = toy_model.generate(torch.from_numpy(targets.labels), targets.tokens[:, :length])
            assert torch.equal(verdicts.tokens[p], made_tokens)
            made = embed(embedder, toy_model.decode(made_tokens))
            np.testing.assert_allclose(verdicts.similarity[p], (made * again).sum(1), atol=1e-5)
            np.testing.assert_allclose(verdicts.original[p], (made * own).sum(1), atol=1e-5)
            cosines = made @ index.vectors(index.ids).T
            np.testing.assert_allclose(verdicts.nearest_similarity[p], cosines.max(1), atol=1e-5)
            assert verdicts.nearest[p].tolist() == index.ids[cosines.argmax(1)].tolist()
            assert np.array_equal(verdicts.extracted[p], verdicts.similarity[p] > 0.5)
        np.testing.assert_allclose(verdicts.ceiling, (again * own).sum(1), atol=1e-5)
        others = np.where(index.ids[None] == targets.ids[:, None], -2, own @ index.vectors(index.ids).T).max(1)
        np.testing.assert_allclose(verdicts.twin_similarity, others, atol=1e-5)
        assert np.array_equal(verdicts.groups, groups_by_cosine(own, 0.5))
    train = found.sets["train"]
    at = np.array([np.flatnonzero(manifests["train"].ids == i)[0] for i in train.targets.ids[train.matched]])
    assert mask[at].all()
    assert at.tolist() == highest_per_class(manifests["train"], np.where(mask, scores["train"], np.nan), 3).tolist()


def test_finished_units_are_not_repeated(toy_model, toy_source, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmem.extraction.extract.UNIT_TARGETS", 2)
    whole, *_ = run_toy(toy_model, toy_source, TokenMatch(), prefixes=(1, 2))
    done = []

    def stop(targets: int) -> None:
        done.append(targets)
        if len(done) == 2:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        run_toy(
            toy_model,
            toy_source,
            TokenMatch(),
            prefixes=(1, 2),
            folder=tmp_path,
            reporter=Reporter(advance=stop),
        )
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert list(kept) == ["train-00000.safetensors", "train-00001.safetensors"] or len(kept) == 2
    found, *_ = run_toy(toy_model, toy_source, TokenMatch(), prefixes=(1, 2), folder=tmp_path)
    for name, changed in kept.items():
        assert (tmp_path / name).stat().st_mtime_ns == changed
    for split, verdicts in whole.sets.items():
        for name in ("tokens", "similarity", "match", "candidate", "matched", "groups"):
            assert np.array_equal(getattr(verdicts, name), getattr(found.sets[split], name), equal_nan=name != "tokens")
        assert np.array_equal(verdicts.targets.ids, found.sets[split].targets.ids)


@pytest.mark.parametrize(
    ("prefixes", "got"), [((4,), "got 4"), ((0, 0), "got 0, 0"), ((), "got none"), ((-1,), "got -1")]
)
def test_prefixes_must_be_allowed(toy_model, prefixes, got):
    with pytest.raises(UsageError, match=got):
        check_prefixes(toy_model, prefixes)


def test_verdicts_without_an_embedder_say_what_they_lack(toy_model, toy_source, tmp_path):
    from pyarrow import parquet

    found, _, manifests, *_ = run_toy(toy_model, toy_source, TokenMatch(), prefixes=(0, 2))
    document = describe(found, {})
    assert document["embedder"] == "token-match"
    assert document["extracted_original"] == {"0": None, "2": None}
    assert document["ceiling"] is None
    train = found.sets["train"]
    assert document["extracted"] == {
        str(p): int((row[train.candidate] > 0.9).sum()) for p, row in zip((0, 2), train.match, strict=True)
    }
    assert [c.n for c in counts(train, train.candidate)] == [document["candidates"]] * 2
    write_verdicts(tmp_path / "v.parquet", found, manifests)
    table = parquet.read_table(tmp_path / "v.parquet")
    assert len(table) == 2 * sum(len(v.targets) for v in found.sets.values())
    assert table["similarity_to_image"].null_count == table["nearest_id"].null_count == len(table)
    first = table.slice(0, len(train.targets)).to_pydict()
    assert first["id"] == train.targets.ids.tolist()
    assert first["token_match"] == train.match[0].tolist()


def test_owners_are_looked_up_among_the_candidates(toy_model, toy_source):
    result = score(toy_model, toy_source, heldout=heldout_source(), views="center", check_classes=False)
    found, *_ = run_toy(toy_model, toy_source, TokenMatch(0.2), prefixes=(2,))
    train = found.sets["train"]
    associations = find_associations(found, result.train, result.heldout)
    assert set(associations) == {"unitmem", "within-class", "gap"}
    for association in associations.values():
        assert association.owners + association.others == train.candidate.sum()
        assert association.owners_extracted + association.others_extracted == train.extracted[0][train.candidate].sum()


def test_the_odds_ratio_is_fishers():
    # the lady who tastes tea; the ends are where a result as far out has a chance of 2.5 %
    from scipy.stats import nchypergeom_fisher

    owns = np.array([True] * 4 + [False] * 4)
    extracted = np.array([True, True, True, False, True, False, False, False])
    found = associate(owns, extracted)
    assert (found.owners, found.owners_extracted, found.others, found.others_extracted) == (4, 3, 4, 1)
    np.testing.assert_allclose(nchypergeom_fisher(8, 4, 4, found.low).sf(2), 0.025, rtol=1e-4)
    np.testing.assert_allclose(nchypergeom_fisher(8, 4, 4, found.high).cdf(3), 0.025, rtol=1e-4)
    np.testing.assert_allclose(nchypergeom_fisher(8, 4, 4, found.odds_ratio).mean(), 3, rtol=1e-4)
    np.testing.assert_allclose(found.p_value, 34 / 70, rtol=1e-9)
    nothing = associate(owns, np.zeros(8, dtype=bool))
    assert (nothing.odds_ratio, nothing.p_value) == (None, 1.0)
    assert "no odds ratio" in str(nothing)
    with pytest.raises(UsageError, match="as many owners as verdicts"):
        associate(owns, extracted[:3])


def test_images_that_an_edit_was_chosen_on_are_left_out(toy_model, toy_source):
    whole, *_ = run_toy(toy_model, toy_source, TokenMatch(), prefixes=(2,))
    train = whole.sets["train"]
    without = train.targets.ids[train.candidate][::2]
    notes = []
    reporter = Reporter(note=notes.append)
    found, *_ = run_toy(toy_model, toy_source, TokenMatch(), prefixes=(2,), without=without, reporter=reporter)
    kept = found.sets["train"]
    assert kept.targets.ids[kept.candidate].tolist() == train.targets.ids[train.candidate][1::2].tolist()
    assert not np.isin(kept.targets.ids, without).any()
    assert notes == [
        f"{len(without)} of {train.candidate.sum()} candidates are left out, because the edit was chosen on them"
    ]
