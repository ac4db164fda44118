"""FID and related metrics, with torch-fidelity's port of the original Inception network and its weights from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from fastmem.errors import InputFileError, UsageError
from fastmem.home import find_weights, home
from fastmem.models.checkpoints import read_state, resolve_device
from fastmem.quality.features import Comparison, Features, Reference, compare_by_kernel, thinned
from fastmem.quality.frechet import FeatureMoments, Gaussian, frechet_distance
from fastmem.quality.kernel import SUBSET_SIZE, kernel_subsets
from fastmem.quality.rows import Rows, blocks

OFFICIAL_FILE = "weights-inception-2015-12-05-6726825d.pth"
OFFICIAL_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{OFFICIAL_FILE}"
# first digits of the SHA-256 of the official file
OFFICIAL_DIGEST = "6726825d"
# names of the network and of its outputs in torch-fidelity
NAME = "inception-v3-compat"
VECTORS, LOGITS = "2048", "logits_unbiased"
CPU_BATCH, GPU_BATCH = 16, 128
# parts of the samples over which the inception score is averaged
SCORE_SPLITS = 10
# torch-fidelity's seed for the parts
SCORE_SEED = 2020
# neighbours whose distance sets the radius of an image in precision and recall
NEIGHBOURS = 3
# images whose distances to as many others are in memory at once
DISTANCE_ROWS = 2000


def find_inception(path: str | Path | None = None, device: str = "auto") -> tuple[InceptionFeatures | None, str]:
    """Return the Inception network, or None without weights, and a sentence on where these are or how to get them.

    ``path`` is the file of the weights; None looks for the official file in FASTMEM_HOME. ``device`` is where the
    network runs.

    Raises: InputFileError where the file is missing or damaged; UsageError where its weights are of another network, or
    there is no such device.
    """
    file, reason = (Path(path), "") if path is not None else locate_inception()
    if file is None:
        return None, reason
    extractor = InceptionFeatures(file, resolve_device(device))
    return extractor, f"Inception weights from {file}, as {extractor.name}"


def locate_inception() -> tuple[Path | None, str]:
    """Return the file of the official weights, or None where FASTMEM_HOME lacks it, and a sentence on how to get it."""
    official, place = find_weights(OFFICIAL_FILE)
    if official is not None:
        return official, f"Inception weights from {place}"
    return None, (
        f"no Inception weights, so no FID ({place}): put {OFFICIAL_FILE} there, name it with --inception FILE, or "
        "have it downloaded with --fetch-inception"
    )


def fetch_inception(url: str = OFFICIAL_URL) -> Path:
    """Return the file of the official weights in FASTMEM_HOME; download it from ``url`` where it is missing.

    Raises: InputFileError where the download fails, or gives another file.
    """
    official = home() / "weights" / OFFICIAL_FILE
    if official.is_file():
        return official
    try:
        official.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(official), OFFICIAL_DIGEST, progress=False)
    # a failed download raises an OSError, and a file with another hash a RuntimeError
    except (OSError, RuntimeError) as error:
        raise InputFileError(
            f"expected to download {OFFICIAL_FILE} from {url}, got no such file ({' '.join(str(error).split())[:120]}):"
            f" download it elsewhere and put it at {official}"
        ) from error
    return official


class InceptionFeatures:
    """TensorFlow's Inception network of 2015 as a feature extractor: 2048 pooled features and 1008 logits, in float32.

    ``path`` is the file of its weights, and ``device`` is where it runs.

    Raises: InputFileError where the file is missing or damaged; UsageError where its weights are of another network.

    Source: toshas/torch-fidelity feature_extractor_inceptionv3.py.
    """

    dimensions = 2048

    def __init__(self, path: Path, device: torch.device) -> None:
        # torch-fidelity would unpickle any object in the file, which is unsafe: it is given the plain tensors instead
        state = read_state(path)
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.name = NAME if self.digest.startswith(OFFICIAL_DIGEST) else f"{NAME}-{self.digest[:8]}"
        self._device = device
        self._batch = GPU_BATCH if device.type == "cuda" else CPU_BATCH
        # imported here, because it is slow to import and rarely needed
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        plain = BytesIO()
        torch.save(state, plain)
        plain.seek(0)
        try:
            network = FeatureExtractorInceptionV3(NAME, [VECTORS, LOGITS], feature_extractor_weights_path=plain)
        except RuntimeError as error:
            raise UsageError(
                f"expected torch-fidelity's Inception weights in {path}, got another network's: give {OFFICIAL_FILE}"
            ) from error
        self._network = network.to(device)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> Features:
        """Return the features, float32 [N,2048], and logits, float32 [N,1008], of RGB pictures, uint8 [N,S,S,3]."""
        vectors, logits = [np.empty((0, self.dimensions), np.float32)], [np.empty((0, 1008), np.float32)]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for part in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(self._batch):
                found = self._network(part.to(self._device))
                vectors.append(found[0].cpu().numpy())
                logits.append(found[1].cpu().numpy())
        return Features(np.concatenate(vectors), np.concatenate(logits))

    def compare(self, samples: Features, reference: Reference) -> Comparison:
        """Return FID, KID (with its interval and over subsets), inception score, precision and recall of samples.

        A metric that needs more images, or features of single images, is left out, and a note says so.
        """
        parts = [
            _frechet(samples, reference),
            compare_by_kernel("kid", samples, reference),
            _subsets(samples, reference),
            _inception_score(samples),
            _precision_and_recall(samples, reference),
        ]
        metrics = {name: value for part in parts for name, value in part.metrics.items()}
        return Comparison(metrics, tuple(note for part in parts for note in part.notes))


def _gaussian(features: Features) -> Gaussian:
    if features.gaussian is not None:
        return features.gaussian
    moments = FeatureMoments.zero(features.vectors.shape[1])
    for part in blocks(features.vectors):
        moments = moments.update(part)
    return moments.finish()


def _frechet(samples: Features, reference: Reference) -> Comparison:
    try:
        own = _gaussian(samples)
        if reference.gaussian is not None:
            other = reference.gaussian
        elif reference.features is not None:
            other = _gaussian(reference.features)
        else:
            return Comparison({}, (f"no fid: {reference.description} holds neither features nor statistics",))
    except UsageError as error:
        return Comparison({}, (f"no fid: {error}",))
    return Comparison({"fid": frechet_distance(own, other)})


def _subsets(samples: Features, reference: Reference) -> Comparison:
    if reference.features is None or min(len(samples), len(reference.features)) < SUBSET_SIZE:
        return Comparison({}, (f"no kid by subsets: that takes features of {SUBSET_SIZE:,} images on either side",))
    mean, deviation = kernel_subsets(samples.vectors, reference.features.vectors)
    return Comparison({"kid-subsets": mean, "kid-subsets-std": deviation})


def _inception_score(samples: Features) -> Comparison:
    """Return the inception score, as torch-fidelity computes it, from logits that are read in blocks.

    The score of a part of the samples is the exponential of the mean entropy's distance: mean of the sum of p log p,
    minus the sum of q log q, q being the mean of the probabilities p.

    Source: toshas/torch-fidelity metric_isc.py.
    """
    if samples.logits is None or len(samples) < SCORE_SPLITS:
        return Comparison({}, (f"no is: that takes logits of at least {SCORE_SPLITS} images",))
    count = len(samples)
    bounds = [i * count // SCORE_SPLITS for i in range(SCORE_SPLITS + 1)]
    split_of = np.empty(count, dtype=np.int64)
    # torch-fidelity's order of the samples
    split_of[np.random.RandomState(SCORE_SEED).permutation(count)] = np.repeat(range(SCORE_SPLITS), np.diff(bounds))
    classes = samples.logits.shape[1]
    probabilities = torch.zeros(SCORE_SPLITS, classes, dtype=torch.float64)
    entropies = torch.zeros(SCORE_SPLITS, dtype=torch.float64)
    for start in range(0, count, DISTANCE_ROWS):
        logits = torch.from_numpy(samples.logits[start : start + DISTANCE_ROWS]).double()
        own, at = logits.softmax(1), torch.from_numpy(split_of[start : start + DISTANCE_ROWS])
        probabilities.index_add_(0, at, own)
        entropies.index_add_(0, at, (own * logits.log_softmax(1)).sum(1))
    sizes = torch.from_numpy(np.diff(bounds)).double()
    mean = probabilities / sizes[:, None]
    scores = (entropies / sizes - torch.special.xlogy(mean, mean).sum(1)).exp()
    return Comparison({"is": float(scores.mean()), "is-std": float(scores.std(correction=0))})


def _precision_and_recall(samples: Features, reference: Reference) -> Comparison:
    """Return how many samples lie among the reference's images, and the other way round, from blocks of distances.

    Source: toshas/torch-fidelity metric_prc.py.
    """
    if reference.features is None or min(len(samples), len(reference.features)) <= NEIGHBOURS:
        return Comparison(
            {}, (f"no precision and recall: that takes features of {NEIGHBOURS + 1} images on either side",)
        )
    (mine, theirs), notes = thinned("precision and recall", samples, reference.features)
    precision, recall = _share_within(mine, theirs), _share_within(theirs, mine)
    return Comparison({"precision": precision, "recall": recall}, notes)


def _share_within(points: Rows, centres: Rows) -> float:
    """Return the share of points that are no further from some centre than its third-nearest other centre is."""
    radii = torch.cat([_radii(block, centres) for block in _tensors(centres)])
    inside = []
    for block in _tensors(points):
        found = torch.zeros(len(block), dtype=torch.bool)
        for start, others in zip(range(0, len(centres), DISTANCE_ROWS), _tensors(centres), strict=True):
            found |= (torch.cdist(block, others) <= radii[start : start + len(others)]).any(1)
        inside.append(found)
    return float(torch.cat(inside).float().mean())


def _radii(block: torch.Tensor, centres: Rows) -> torch.Tensor:
    """Return the distance of each centre of a block to its third-nearest other centre, float32 [n]."""
    nearest = torch.empty(len(block), 0)
    for others in _tensors(centres):
        together = torch.cat([nearest, torch.cdist(block, others)], dim=1)
        # one more, because a centre is nearest to itself
        nearest = together.topk(min(NEIGHBOURS + 1, together.shape[1]), largest=False).values
    return nearest.max(1).values


def _tensors(rows: Rows) -> Iterator[torch.Tensor]:
    return map(torch.from_numpy, blocks(rows, DISTANCE_ROWS))
