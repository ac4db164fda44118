"""The Inception network of the published FID, as torch-fidelity ported it from TensorFlow, with weights from a file."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from fastmem.errors import InputFileError, UsageError
from fastmem.home import home
from fastmem.models.checkpoints import read_state, resolve_device
from fastmem.quality.features import Comparison, Features, Reference, compare_by_kernel, thinned
from fastmem.quality.frechet import FeatureMoments, Gaussian, frechet_distance
from fastmem.quality.kernel import SUBSET_SIZE, kernel_subsets

OFFICIAL_FILE = "weights-inception-2015-12-05-6726825d.pth"
OFFICIAL_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{OFFICIAL_FILE}"
# the file's SHA-256 starts with it
OFFICIAL_DIGEST = "6726825d"
NAME = "inception-v3-compat"
VECTORS, LOGITS = "2048", "logits_unbiased"
CPU_BATCH, GPU_BATCH = 16, 128
SCORE_SPLITS = 10
NEIGHBOURS = 3
# distances that are held at once are this many times the images
DISTANCE_ROWS = 2000


def find_inception(path: str | Path | None = None, device: str = "auto") -> tuple[InceptionFeatures | None, str]:
    """The Inception network of this machine, or None, with a sentence that says which or why there is none.

    path: its weights; by default those in FASTMEM_HOME.

    Raises: InputFileError where a named file is missing or damaged; UsageError where it is another network's.
    """
    file, reason = (Path(path), "") if path is not None else locate_inception()
    if file is None:
        return None, reason
    extractor = InceptionFeatures(file, resolve_device(device))
    return extractor, f"Inception weights from {file}, as {extractor.name}"


def locate_inception() -> tuple[Path | None, str]:
    """The official weights in FASTMEM_HOME, or None, with a sentence that says what to do without them."""
    official = home() / "weights" / OFFICIAL_FILE
    if official.is_file():
        return official, f"Inception weights from {official}"
    return None, (
        f"no Inception weights, so no FID: put {OFFICIAL_FILE} at {official}, name it with --inception FILE, or "
        "have it downloaded with --fetch-inception"
    )


def fetch_inception(url: str = OFFICIAL_URL) -> Path:
    """Download the official weights into FASTMEM_HOME where they are missing.

    Raises: InputFileError where they cannot be had, or are not those.
    """
    official = home() / "weights" / OFFICIAL_FILE
    if official.is_file():
        return official
    try:
        official.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(official), OFFICIAL_DIGEST, progress=False)
    # urllib's errors are OSErrors, and a wrong hash is a RuntimeError
    except (OSError, RuntimeError) as error:
        raise InputFileError(
            f"expected to download {OFFICIAL_FILE} from {url}, got no such file ({' '.join(str(error).split())[:120]}):"
            f" download it elsewhere and put it at {official}"
        ) from error
    return official


class InceptionFeatures:
    """The 2048 pooled features and the logits of TensorFlow's Inception network of 2015, float32, without TF32.

    Raises: InputFileError where the file is missing or damaged; UsageError where it is another network's.

    Source: toshas/torch-fidelity feature_extractor_inceptionv3.py.
    """

    dimensions = 2048

    def __init__(self, path: Path, device: torch.device) -> None:
        # torch-fidelity would unpickle whatever the file holds; what it gets instead has been read as plain tensors
        state = read_state(path)
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.name = NAME if self.digest.startswith(OFFICIAL_DIGEST) else f"{NAME}-{self.digest[:8]}"
        self._device = device
        self._batch = GPU_BATCH if device.type == "cuda" else CPU_BATCH
        # heavy, and only needed here
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
        """Features of RGB pictures, uint8 [N,S,S,3] -> float32 [N,2048] and logits [N,1008]."""
        vectors, logits = [np.empty((0, self.dimensions), np.float32)], [np.empty((0, 1008), np.float32)]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for part in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(self._batch):
                found = self._network(part.to(self._device))
                vectors.append(found[0].cpu().numpy())
                logits.append(found[1].cpu().numpy())
        return Features(np.concatenate(vectors), np.concatenate(logits))

    def compare(self, samples: Features, reference: Reference) -> Comparison:
        """fid, kid with its interval and by subsets, is, precision and recall: those there are images enough for."""
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
    moments = FeatureMoments.zero(features.vectors.shape[1])
    # a part at a time, because it is widened to float64
    for start in range(0, len(features), DISTANCE_ROWS):
        moments = moments.update(features.vectors[start : start + DISTANCE_ROWS])
    return moments.finish()


def _frechet(samples: Features, reference: Reference) -> Comparison:
    try:
        own = _gaussian(samples)
        other = reference.gaussian or _gaussian(reference.features)
    except UsageError as error:
        return Comparison({}, (f"no fid: {error}",))
    return Comparison({"fid": frechet_distance(own, other)})


def _subsets(samples: Features, reference: Reference) -> Comparison:
    if reference.features is None or min(len(samples), len(reference.features)) < SUBSET_SIZE:
        return Comparison({}, (f"no kid by subsets: that takes features of {SUBSET_SIZE:,} images on either side",))
    mean, deviation = kernel_subsets(samples.vectors, reference.features.vectors)
    return Comparison({"kid-subsets": mean, "kid-subsets-std": deviation})


def _inception_score(samples: Features) -> Comparison:
    if len(samples) < SCORE_SPLITS:
        return Comparison({}, (f"no is: that takes at least {SCORE_SPLITS} images",))
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(torch.from_numpy(samples.logits), splits=SCORE_SPLITS)
    return Comparison({"is": found[KEY_METRIC_ISC_MEAN], "is-std": found[KEY_METRIC_ISC_STD]})


def _precision_and_recall(samples: Features, reference: Reference) -> Comparison:
    if reference.features is None or min(len(samples), len(reference.features)) <= NEIGHBOURS:
        return Comparison(
            {}, (f"no precision and recall: that takes features of {NEIGHBOURS + 1} images on either side",)
        )
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    sides, notes = thinned("precision and recall", samples, reference.features)
    precision, recall = calculate_precision_recall_part(*map(torch.from_numpy, sides), NEIGHBOURS, DISTANCE_ROWS)
    return Comparison({"precision": precision, "recall": recall}, notes)
