"""Samples, their features and references: functions of weights and seed, resumable, and ``fastmem evaluate``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from fastmem import ArraySource, InputFileError, UsageError
from fastmem.data.decoding import DamagedImage
from fastmem.data.manifest import Manifest
from fastmem.data.views import CenterCrop
from fastmem.quality.evaluate import compare, evaluate, measure
from fastmem.quality.features import Comparison, Features, Reference, SSCDFeatures, compare_by_kernel, to_bytes
from fastmem.quality.frechet import FeatureMoments, Gaussian, frechet_distance
from fastmem.quality.inception import InceptionFeatures, fetch_inception, find_inception
from fastmem.quality.kernel import kernel_distance
from fastmem.quality.losses import TEMPERATURES, mean_losses, read_loss_images
from fastmem.quality.reference import file_reference, read_reference
from fastmem.quality.samples import even_classes, sample_labels, sample_shard
from fastmem.quality.sampling import EvaluationSettings
from fastmem.reporter import Reporter
from fastmem.stages.evaluate import _loss_groups
from fastmem.stages.opened_run import EditInForce, open_run
from fastmem.tokens.true_images import spread
from tests.conftest import FakeEmbedder, folder_bytes, make_toy_model, random_images, run

RECIPE = CenterCrop(16)


@pytest.fixture
def sscd() -> SSCDFeatures:
    return SSCDFeatures(FakeEmbedder())


@pytest.fixture
def reference(toy_source, sscd) -> Reference:
    return read_reference(toy_source, Manifest.build(toy_source), RECIPE, sscd, description="toys")


LABELS = {
    "even": ({0: 1, 1: 1, 2: 1}, 7, [0, 1, 2, 0, 1, 2, 0]),
    "uneven": ({0: 3, 4: 1}, 8, [0, 0, 4, 0, 0, 0, 4, 0]),
    "one class": ({3: 9}, 2, [3, 3]),
}


@pytest.mark.parametrize(("counts", "count", "expected"), LABELS.values(), ids=LABELS)
def test_labels_keep_the_proportions(counts, count, expected):
    assert sample_labels(counts, count).tolist() == expected


def test_fifty_thousand_samples_are_fifty_of_each_of_a_thousand_classes():
    assert np.bincount(sample_labels(dict.fromkeys(range(1000), 1), 50_000)).tolist() == [50] * 1000


@pytest.mark.parametrize(("counts", "count"), [({0: 1}, 0), ({}, 5), ({0: 0, 1: 3}, 5)], ids=["none", "no class", "0"])
def test_labels_refuse_nothing_to_sample(counts, count):
    with pytest.raises(UsageError, match="at least 1 sample"):
        sample_labels(counts, count)


def test_a_shard_depends_on_its_seed_and_number_alone(toy_model):
    labels = np.arange(20) % 5
    first = sample_shard(toy_model, labels, 0, 3)
    torch.manual_seed(123)
    torch.testing.assert_close(sample_shard(toy_model, labels, 0, 3), first, rtol=0, atol=0)
    assert not torch.equal(sample_shard(toy_model, labels, 0, 4), first)
    assert not torch.equal(sample_shard(toy_model, labels, 1, 3), first)


def toy_evaluation(
    folder: Path, extractor, reference, *, samples: int = 23, resume: bool = False, pictures=False, **more
):
    settings = EvaluationSettings(samples, seed=5, batch_size=7, pictures=pictures)
    return evaluate(
        make_toy_model(), folder, "toy", {"weights": "toy"}, settings, [extractor], [reference], resume=resume, **more
    )


LOST = {
    "tokens": ["tokens/000001.safetensors", "fake-32/000001.safetensors"],
    "features": ["fake-32/000000.safetensors", "fake-32/000003.safetensors"],
    "pictures": ["png/000008-*"],
    "everything of a shard": ["tokens/000003.safetensors", "fake-32/000003.safetensors", "png/000022-*"],
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_what_a_killed_run_lacks_is_made_again_to_the_byte(tmp_path, sscd, reference, lost):
    before = toy_evaluation(tmp_path, sscd, reference, pictures=True)
    files = folder_bytes(tmp_path)
    for name in lost:
        (file,) = before.samples.path.glob(name)
        file.unlink()
    after = toy_evaluation(tmp_path, sscd, reference, pictures=True, resume=True)
    assert folder_bytes(tmp_path) == files
    assert after.metrics == before.metrics


def test_an_interrupted_run_keeps_its_shards_and_goes_on(tmp_path, sscd, reference):
    whole = toy_evaluation(tmp_path / "whole", sscd, reference)

    def stop(samples: int) -> None:
        if samples == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_evaluation(tmp_path / "cut", sscd, reference, reporter=Reporter(advance=stop))
    kept = folder_bytes(tmp_path / "cut")
    assert sum("tokens" in name for name in kept) == 1
    plans = []
    after = toy_evaluation(tmp_path / "cut", sscd, reference, resume=True, reporter=Reporter(planned=plans.append))
    assert (plans[0].samples, plans[0].done) == (23, 7)
    assert after.metrics == whole.metrics
    assert folder_bytes(tmp_path / "cut") == folder_bytes(tmp_path / "whole")


def test_samples_in_memory_give_the_numbers_of_a_folder(tmp_path, sscd, reference, toy_source):
    model = make_toy_model()
    losses = {"train": read_loss_images(model, toy_source, Manifest.build(toy_source))}
    groups = {"few": toy_source.ids[:3]}
    kept = toy_evaluation(tmp_path, sscd, reference, losses=losses, groups=groups)
    assert measure(model, sscd, reference, 23, 5, 7, losses, groups) == kept.metrics
    assert set(kept.metrics) == {"kd-sscd", "kd-sscd-low", "kd-sscd-high", "loss_train", "loss_few"}
    # the reference's 3 of the model's 5 classes, in its proportions
    assert np.bincount(kept.samples.labels).tolist() == [11, 1, 0, 11]


def test_stored_samples_are_what_the_model_decodes(tmp_path, sscd, reference):
    found = toy_evaluation(tmp_path, sscd, reference, pictures=True).samples
    pixels = to_bytes(make_toy_model().decode(found.tokens(1)))
    np.testing.assert_array_equal(np.asarray(Image.open(found.picture_file(8))), pixels[1])
    np.testing.assert_array_equal(found.features(sscd).vectors[7:14], sscd(pixels).vectors)


def test_unfinished_samples_are_only_gone_on_with_when_asked(tmp_path, sscd, reference):
    found = toy_evaluation(tmp_path, sscd, reference)
    # whole ones serve for every reference
    assert toy_evaluation(tmp_path, sscd, reference).metrics == found.metrics
    (found.samples.path / "tokens" / "000001.safetensors").unlink()
    with pytest.raises(UsageError, match="go on with --resume"):
        toy_evaluation(tmp_path, sscd, reference)
    with pytest.raises(UsageError, match="expected samples with seed 6"):
        found.samples.start({"seed": 6}, resume=True)
    # another number of samples is another folder
    assert toy_evaluation(tmp_path, sscd, reference, samples=8).samples.path != found.samples.path


def test_a_reference_that_was_cut_off_goes_on_with_the_parts_it_has(tmp_path, toy_source, sscd, monkeypatch):
    monkeypatch.setattr("fastmem.quality.reference.PART", 8)
    manifest = Manifest.build(toy_source)
    whole = read_reference(toy_source, manifest, RECIPE, sscd, description="toys")
    advanced: list[int] = []

    def stop(images: int) -> None:
        advanced.append(images)
        if sum(advanced) >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_reference(
            toy_source, manifest, RECIPE, sscd, description="toys", cache=tmp_path, reporter=Reporter(advance=stop)
        )
    embedder = FakeEmbedder()
    found = read_reference(toy_source, manifest, RECIPE, SSCDFeatures(embedder), description="toys", cache=tmp_path)
    np.testing.assert_array_equal(found.features.vectors, whole.features.vectors)
    # the first of three parts was whole
    assert embedder.seen == 23 - 8
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(("samples", "batch"), [(0, 5), (5, 0)], ids=["no samples", "no batch"])
def test_settings_refuse_nothing(samples, batch):
    with pytest.raises(UsageError, match="at least 1 sample in batches of at least 1"):
        EvaluationSettings(samples, batch_size=batch)


def test_features_of_another_network_are_refused(tmp_path, sscd):
    sscd(random_images(3, 16)).save(tmp_path / "f.safetensors", {"features": "fake-32", "digest": "a"})
    with pytest.raises(UsageError, match="expected features with digest b"):
        Features.load(tmp_path / "f.safetensors", {"features": "fake-32", "digest": "b"})


def test_a_reference_is_kept_by_its_content(tmp_path, toy_source, sscd):
    manifest = Manifest.build(toy_source)
    first = read_reference(toy_source, manifest, RECIPE, sscd, description="toys", cache=tmp_path)
    assert (first.class_counts, first.description) == ({0: 11, 1: 1, 3: 11}, "toys, 23 images")
    embedder = FakeEmbedder()
    again = read_reference(toy_source, manifest, RECIPE, SSCDFeatures(embedder), description="toys", cache=tmp_path)
    np.testing.assert_array_equal(again.features.vectors, first.features.vectors)
    assert embedder.seen == 0
    # other pixels under the same names
    changed = ArraySource(random_images(23, 16, seed=9), toy_source.labels)
    other = read_reference(changed, Manifest.build(changed), RECIPE, sscd, description="toys", cache=tmp_path)
    assert not np.array_equal(other.features.vectors, first.features.vectors)
    assert len(list(tmp_path.iterdir())) == 2


class Unreadable(ArraySource):
    def read(self, index: int) -> Image.Image:
        raise DamagedImage("cut short", str(index))


def test_images_that_cannot_be_read_are_no_reference_and_have_no_loss(toy_model, sscd):
    source = Unreadable(random_images(3, 16), np.zeros(3, dtype=np.int64))
    manifest = Manifest.build(source)
    with pytest.raises(InputFileError, match="got 3 that cannot"):
        read_reference(source, manifest, RECIPE, sscd, description="broken")
    with pytest.raises(InputFileError, match="got 3 that cannot"):
        read_loss_images(toy_model, source, manifest)


def test_losses_are_means_over_images_and_over_groups(toy_model, toy_source):
    manifest = Manifest.build(toy_source)
    images = read_loss_images(toy_model, toy_source, manifest)
    logits = toy_model.logits(images.tokens, images.labels).double().log_softmax(-1)
    by_image = -logits.gather(-1, images.tokens[..., None])[..., 0].mean(1).numpy()
    chosen = np.array([1, 5, 22])
    groups = {"some": images.ids[chosen], "absent": np.array([7], dtype=np.int64)}
    found = mean_losses(toy_model, {"train": images}, groups)
    assert set(found) == {"loss_train", "loss_some"}
    assert found["loss_train"] == pytest.approx(by_image.mean(), rel=1e-5)
    assert found["loss_some"] == pytest.approx(by_image[chosen].mean(), rel=1e-5)


def test_unseen_images_have_a_loss_at_their_best_temperature(toy_model, toy_source):
    images = read_loss_images(toy_model, toy_source, Manifest.build(toy_source))
    logits = toy_model.logits(images.tokens, images.labels).double()

    class Surer:
        """The toy model, ``by`` times as sure of everything."""

        rows_of_logits = 2

        def __init__(self, by):
            self.by = by

        def logits(self, tokens, labels):
            return self.by * toy_model.logits(tokens, labels)

        def loss(self, temperature):
            by_token = -(logits * self.by / temperature).log_softmax(-1).gather(-1, images.tokens[..., None])
            return float(by_token.mean())

    # the toy model is so unsure that its own best temperature lies below the ladder
    sure, surest = Surer(16), Surer(32)
    found = mean_losses(sure, {"heldout": images})
    assert set(found) == OF_HELDOUT
    assert found["loss_heldout"] == pytest.approx(sure.loss(1.0), rel=1e-5)
    best = min(TEMPERATURES, key=sure.loss)
    assert min(TEMPERATURES) < best < max(TEMPERATURES) / 2
    assert found["temperature_heldout"] == best
    assert found["loss_heldout_tempered"] == pytest.approx(sure.loss(best), rel=1e-5)
    # the temperature takes back what is mere certainty
    other = mean_losses(surest, {"heldout": images})
    assert other["loss_heldout"] > found["loss_heldout"]
    assert other["temperature_heldout"] == pytest.approx(2 * best)
    assert other["loss_heldout_tempered"] == pytest.approx(found["loss_heldout_tempered"], rel=1e-5)


def test_a_capped_loss_takes_images_evenly(toy_model, toy_source):
    images = read_loss_images(toy_model, toy_source, Manifest.build(toy_source), most=5)
    assert images.count == 5
    assert images.labels.tolist() == [0, 0, 1, 3, 3]


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights in the format of the official ones."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.manual_seed(0)
    # torch-fidelity's class always loads: its loading is passed over to learn the entries
    network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network.__init__("random", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_are_torch_fidelitys(inception_file):
    extractor, reason = find_inception(inception_file, "cpu")
    assert extractor.name.startswith("inception-v3-compat-")
    assert str(inception_file) in reason
    pixels = random_images(3, 64)
    expected = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))(
        torch.from_numpy(pixels).permute(0, 3, 1, 2)
    )
    found = extractor(pixels)
    np.testing.assert_allclose(found.vectors, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logits, expected[1], rtol=1e-5, atol=1e-6)


def test_features_are_joined_with_their_logits():
    rng = np.random.default_rng(0)
    whole = Features(rng.random((5, 3), np.float32), rng.random((5, 4), np.float32))
    parts = [Features(whole.vectors[at], whole.logits[at]) for at in (slice(0, 2), slice(2, 5))]
    for given in (parts, [whole]):
        joined = Features.join(given)
        np.testing.assert_array_equal(joined.vectors, whole.vectors)
        np.testing.assert_array_equal(joined.logits, whole.logits)
    assert Features.join([Features(whole.vectors)] * 2).logits is None


def test_a_kernel_distance_of_many_images_takes_them_evenly(monkeypatch):
    rng = np.random.default_rng(0)
    samples, real = (Features(rng.standard_normal((n, 4)).astype(np.float32)) for n in (6, 20))
    monkeypatch.setattr("fastmem.quality.features.MOST_PAIRED", 8)
    found = compare_by_kernel("kid", samples, Reference("many images", "", real))
    assert found.notes == ("kid over 8 of 20 images of the reference, evenly spread",)
    assert found.metrics["kid"] == kernel_distance(samples.vectors, real.vectors[spread(20, 8)]).value
    assert compare_by_kernel("kid", samples, Reference("few", "", Features(real.vectors[:8]))).notes == ()


def test_losses_leave_out_what_an_edit_has_seen(tiny_run):
    opened = open_run(str(tiny_run))
    groups = _loss_groups(opened, EditInForce())
    assert not any(name.endswith("not-chosen-on") for name in groups)
    ids = {split: manifest.ids for split, manifest in opened.manifests.items()}
    groups = _loss_groups(opened, EditInForce("mine", "mine", ids["train"][:3], ids["heldout"][:2]))
    assert groups["train-not-chosen-on"].tolist() == ids["train"][3:].tolist()
    assert groups["heldout-not-chosen-on"].tolist() == ids["heldout"][2:].tolist()


def test_inception_weights_are_never_unpickled(tmp_path, inception_file):
    class Code:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"weights": Code()}, tmp_path / "code.pth")
    with pytest.raises(InputFileError, match="plain tensors"):
        find_inception(tmp_path / "code.pth", "cpu")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputFileError, match="no such file"):
        find_inception(tmp_path / "none.pth", "cpu")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="another network's"):
        find_inception(tmp_path / "other.pth", "cpu")


def test_inception_weights_are_downloaded_only_when_asked(tmp_path, monkeypatch, inception_file):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    network, reason = find_inception(None, "cpu")
    assert network is None
    assert "--fetch-inception" in reason
    with pytest.raises(InputFileError, match="put it at .*6726825d.pth"):
        fetch_inception(inception_file.as_uri())
    assert not list((tmp_path / "home" / "weights").glob("*.pth"))
    monkeypatch.setattr("fastmem.quality.inception.OFFICIAL_DIGEST", "")
    path = fetch_inception(inception_file.as_uri())
    assert path.read_bytes() == inception_file.read_bytes()
    assert fetch_inception("file:///nowhere") == path


@dataclass
class Sized:
    """Stands for the network where only its metrics are asked for."""

    dimensions: int = 4


def some_features(count: int, seed: int, shift: float = 0.0) -> Features:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, 4)).astype(np.float32) + np.float32(shift)
    return Features(vectors, random.standard_normal((count, 10)).astype(np.float32))


def test_inception_metrics_are_those_of_their_definitions():
    samples, real = some_features(1100, 0), some_features(1200, 1, 0.5)
    found = InceptionFeatures.compare(Sized(), samples, Reference("real", "", real))
    assert found.notes == ()
    first, second = (FeatureMoments.zero(4).update(f.vectors).finish() for f in (samples, real))
    assert found.metrics["fid"] == pytest.approx(frechet_distance(first, second), rel=1e-10)
    assert found.metrics["kid"] == kernel_distance(samples.vectors, real.vectors).value
    assert found.metrics["kid-low"] < found.metrics["kid-subsets"] < found.metrics["kid-high"]
    expected = isc_features_to_metric(torch.from_numpy(samples.logits))
    assert found.metrics["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert found.metrics["is-std"] == pytest.approx(expected["inception_score_std"], rel=1e-9)
    precision, recall = calculate_precision_recall_full(*(torch.from_numpy(f.vectors) for f in (samples, real)))
    assert (found.metrics["precision"], found.metrics["recall"]) == (precision, recall)


def test_precision_and_recall_of_many_images_take_them_evenly(monkeypatch):
    samples, real = some_features(40, 0), some_features(100, 1, 0.5)
    monkeypatch.setattr("fastmem.quality.features.MOST_PAIRED", 50)
    found = InceptionFeatures.compare(Sized(), samples, Reference("real", "", real))
    assert "precision and recall over 50 of 100 images of the reference, evenly spread" in found.notes
    sides = (torch.from_numpy(vectors) for vectors in (samples.vectors, real.vectors[spread(100, 50)]))
    assert (found.metrics["precision"], found.metrics["recall"]) == calculate_precision_recall_full(*sides)


def test_metrics_without_images_enough_are_left_out_and_named():
    few = InceptionFeatures.compare(Sized(), some_features(3, 0), Reference("real", "", some_features(50, 1)))
    assert set(few.metrics) == {"kid", "kid-low", "kid-high"}
    assert [note.split(":")[0] for note in few.notes] == [
        "no fid",
        "no kid by subsets",
        "no is",
        "no precision and recall",
    ]
    assert "use a kernel distance" in few.notes[0]
    statistics = Reference("statistics", "", gaussian=Gaussian(np.zeros(4), np.eye(4)))
    by_file = InceptionFeatures.compare(Sized(), some_features(50, 0), statistics)
    assert set(by_file.metrics) == {"fid", "is", "is-std"}
    assert "no kid: statistics holds no features of single images" in by_file.notes
    assert SSCDFeatures(FakeEmbedder()).compare(some_features(2, 0), Reference("real", "", some_features(9, 1))).notes


def test_precision_recall_and_score_in_blocks_are_torch_fidelitys(monkeypatch):
    monkeypatch.setattr("fastmem.quality.inception.DISTANCE_ROWS", 7)
    samples, real = some_features(61, 0), some_features(80, 1, 0.5)
    found = InceptionFeatures.compare(Sized(), samples, Reference("real", "", real)).metrics
    sides = (torch.from_numpy(features.vectors) for features in (samples, real))
    assert (found["precision"], found["recall"]) == pytest.approx(calculate_precision_recall_full(*sides))
    expected = isc_features_to_metric(torch.from_numpy(samples.logits))
    assert (found["is"], found["is-std"]) == pytest.approx(tuple(expected.values()), rel=1e-9)


def test_a_metric_that_is_no_number_is_left_out_and_named():
    class Undefined(SSCDFeatures):
        def compare(self, samples, reference):
            return Comparison({"a": float("nan"), "b": 1.0}, ("noted",))

    found = compare([Undefined(FakeEmbedder())], [some_features(3, 0)], [Reference("real", "")])
    assert (found.metrics, found.notes) == ({"b": 1.0}, ("noted", "no a: it is not a finite number"))


def test_a_saved_reference_keeps_its_moments(tmp_path, toy_source, monkeypatch):
    class Few(SSCDFeatures):
        dimensions = 4

        def __call__(self, pixels):
            return Features(super().__call__(pixels).vectors[:, :4])

    monkeypatch.setattr("fastmem.quality.reference.PART", 8)
    few, manifest = Few(FakeEmbedder()), Manifest.build(toy_source)
    for _ in range(2):
        found = read_reference(toy_source, manifest, RECIPE, few, description="toys", cache=tmp_path).features
        expected = FeatureMoments.zero(4).update(found.vectors[:]).finish()
        np.testing.assert_array_equal(found.gaussian.mu, expected.mu)
        np.testing.assert_array_equal(found.gaussian.sigma, expected.sigma)
        assert found.gaussian.count == 23


def test_kd_sscd_has_the_third_power_of_cosine_plus_one_as_its_kernel():
    samples, real = (SSCDFeatures(FakeEmbedder())(random_images(n, 32, n)) for n in (9, 11))
    found = SSCDFeatures(FakeEmbedder()).compare(samples, Reference("real", "", real)).metrics["kd-sscd"]
    own, other, cross = (
        (a.vectors.astype(np.float64) @ b.vectors.T.astype(np.float64) + 1) ** 3
        for a, b in ((samples, samples), (real, real), (samples, real))
    )
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (own, other))
    assert found == pytest.approx(within - 2 * cross.mean(), rel=1e-5)


def test_a_file_reference_is_known_by_its_numbers(tmp_path):
    for name, scale in (("a", 1.0), ("b", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(4), sigma=np.eye(4) * scale)
    first, second = (file_reference(tmp_path / f"{name}.npz", Sized()) for name in "ab")
    assert first.content != second.content
    assert first.class_counts == {}


def test_without_classes_of_a_reference_every_class_is_sampled(toy_model):
    assert sample_labels(even_classes(toy_model), 10).tolist() == [0, 1, 2, 3, 4] * 2


@pytest.fixture
def fake_sscd(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "fastmem.stages.options.find_embedder", lambda *args, **kwargs: (FakeEmbedder(), "a fake SSCD model")
    )


OF_HELDOUT = {"loss_heldout", "loss_heldout_tempered", "temperature_heldout"}
KEYS = {"run", "edit", "samples", "metrics", "features", "reference"}


def test_evaluate_writes_one_document_and_a_picture(capsys, tiny_run, fake_sscd):
    arguments = ("evaluate", "--run", tiny_run, "--samples", 9, "--batch-size", 4, "--png", "--json")
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert set(document) >= KEYS
    assert (document["samples"], document["edit"], document["features"]) == (9, None, ["fake-32"])
    assert document["reference"] == "held-out images of the run, 8 images"
    expected = {"kd-sscd", "kd-sscd-low", "kd-sscd-high", "loss_train", *OF_HELDOUT}
    assert set(document["metrics"]) == expected
    assert "sampling 9 images" in err
    assert "at the measured speed" in err
    assert "no Inception weights, so no FID" in err
    assert "copy" not in err
    assert len(list(Path(document["sample_folder"]).glob("png/*.png"))) == 9
    with Image.open(document["pictures"][0]) as image:
        assert min(image.size) > 200
    # asked again, it is read, not made
    shutil.rmtree(document["sample_folder"])
    code, out, err = run(capsys, *arguments)
    assert (code, json.loads(out)) == (0, document)
    assert "has this evaluation already" in err


def test_evaluate_with_inception_weights(capsys, tiny_run, inception_file):
    arguments = ("evaluate", "--run", tiny_run, "--samples", 11, "--batch-size", 6, "--inception", inception_file)
    code, out, err = run(capsys, *arguments, "--features", "inception", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["features"][0].startswith("inception-v3-compat-")
    assert {"kid", "kid-low", "kid-high", "is", "is-std", "precision", "recall"} <= set(document["metrics"])
    # 11 samples and 8 images have singular covariances
    assert "fid" not in document["metrics"]
    assert any(note.startswith("no fid: expected at least 2049 images") for note in document["notes"])
    # the samples are there: only the reference is another
    statistics = tiny_run / "statistics.npz"
    np.savez(statistics, mu=np.zeros(2048), sigma=np.eye(2048))
    code, out, err = run(capsys, *arguments, "--features", "inception", "--reference", statistics, "--json")
    assert code == 0, err
    assert {"is", "is-std"} <= set(json.loads(out)["metrics"])


def test_training_images_as_a_reference_are_said_to_reward_copying(capsys, tiny_run, fake_sscd):
    for i, reference in enumerate(("train", tiny_run.parent / "train")):
        options = ("--samples", 4, "--seed", i, "--reference", reference)
        code, out, err = run(capsys, "evaluate", "--run", tiny_run, *options)
        assert code == 0, err
        assert "samples that copy them score better" in err
        assert "kd-sscd" in out


def test_an_edit_is_evaluated_beside_the_unedited_model(capsys, tiny_run, fake_sscd):
    code, _, err = run(capsys, "mitigate", "--run", tiny_run, "--top", "20%", "--factor", "0", "--name", "half")
    assert code == 0, err
    documents = []
    for edit in ((), ("--edit", "half")):
        code, out, err = run(capsys, "evaluate", "--run", tiny_run, "--samples", 4, *edit, "--json")
        assert code == 0, err
        documents.append(json.loads(out))
    assert [d["edit"] for d in documents] == [None, "half"]
    # what an edit does not protect is said with every result of one, and with no other
    assert ["not released weights" in d.get("caution", "") for d in documents] == [False, True]
    assert "not released weights" in err
    code, _, err = run(capsys, "evaluate", "--run", tiny_run, "--samples", 4, "--loss-images", 3)
    assert code == 0, err
    assert "all 4 samples are there already" in err
    assert documents[0]["metrics"]["loss_train"] != documents[1]["metrics"]["loss_train"]
    assert documents[0]["sample_folder"] != documents[1]["sample_folder"]


def test_without_a_network_only_losses_are_taken(capsys, tiny_run, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fastmem.stages.options.find_embedder", lambda *args, **kwargs: (None, "no SSCD model"))
    code, out, err = run(capsys, "evaluate", "--run", tiny_run, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["samples"], document["features"], document["reference"]) == (0, [], None)
    assert set(document["metrics"]) == {"loss_train", *OF_HELDOUT}
    assert "only losses are taken" in err


ROWS = {
    "no run": (("--run", "{tmp}"), 3, "expected the folder of a scored run"),
    "features": (("--features", "vgg"), 2, "expected features out of auto"),
    "no inception": (("--features", "inception"), 2, "expected Inception weights for --features inception"),
    "inception file that is missing": (("--inception", "{tmp}/no.pth"), 3, "no.pth, got no such file"),
    "inception file without a use": (("--features", "sscd", "--inception", "x"), 2, "expected no --inception"),
    "sscd file without a use": (("--features", "none", "--sscd", "x"), 2, "expected no --sscd"),
    "npz that is missing": (("--reference", "{tmp}/s.npz"), 3, "s.npz, got no such file"),
    "reference that is missing": (("--reference", "{tmp}/nowhere"), 3, "nowhere"),
    "edit that is not there": (("--edit", "none"), 2, "none"),
}


@pytest.mark.parametrize(("arguments", "code", "text"), ROWS.values(), ids=ROWS)
def test_wrong_input_ends_with_one_sentence(capsys, tiny_run, fake_sscd, tmp_path, arguments, code, text):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    given = () if "--run" in arguments else ("--run", tiny_run)
    found, out, err = run(capsys, "evaluate", *given, *arguments, "--samples", 4)
    assert (found, out) == (code, "")
    assert text in err.strip().splitlines()[-1]


def test_an_sscd_model_that_is_asked_for_and_missing_is_an_error(capsys, tiny_run, monkeypatch):
    monkeypatch.setattr("fastmem.stages.options.find_embedder", lambda *args, **kwargs: (None, "no SSCD model"))
    code, _, err = run(capsys, "evaluate", "--run", tiny_run, "--features", "sscd")
    assert code == 2
    assert "expected an SSCD model for --features sscd" in err


def test_a_run_without_heldout_images_needs_a_reference(capsys, tiny_run, fake_sscd, tmp_path):
    arguments = ("score", "--model", "rar-tiny", "--views", "center", "--no-class-check", "--out", tmp_path / "run")
    code, _, err = run(capsys, *arguments, "--data", tiny_run.parent / "train")
    assert code == 0, err
    code, _, err = run(capsys, "evaluate", "--run", tmp_path / "run", "--samples", 4)
    assert code == 2
    assert "expected held-out images in the run" in err
