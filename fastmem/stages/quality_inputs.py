"""What samples are measured by: the networks that this machine has, and the reference that a command names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastmem.cli.options import say
from fastmem.cli.progress import image_progress
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource, open_source
from fastmem.errors import UsageError
from fastmem.index.embedding import find_embedder
from fastmem.quality.features import FeatureExtractor, Reference, SSCDFeatures
from fastmem.quality.inception import InceptionFeatures, find_inception
from fastmem.quality.reference import file_reference, read_reference
from fastmem.stages.opened_run import OpenedRun

FEATURES = ("auto", "inception", "sscd", "both", "none")
SETS = {"heldout": "held-out images of the run", "train": "training images of the run"}


def choose_extractors(
    features: str, inception: str | None, sscd: str | None, trust_sscd: bool, device: str
) -> list[FeatureExtractor]:
    """The networks asked for; by default Inception where its weights are, else SSCD, else none, said aloud.

    Raises: UsageError for an unknown choice, a file that it has no use for, or a network that is asked for and missing.
    """
    if features not in FEATURES:
        raise UsageError(f"expected features out of {', '.join(FEATURES)}, got {features!r}")
    for file, option, unused in ((inception, "--inception", ("sscd", "none")), (sscd, "--sscd", ("inception", "none"))):
        if file is not None and features in unused:
            raise UsageError(f"expected no {option} with --features {features}, got {file}: leave one of them out")
    chosen: list[FeatureExtractor] = []
    if features in ("auto", "inception", "both"):
        network, reason = find_inception(inception, device)
        chosen += _found(network, reason, "Inception weights", features)
    if features in ("sscd", "both") or (features == "auto" and (sscd is not None or not chosen)):
        embedder, reason = find_embedder(sscd, trust=trust_sscd, device=device)
        chosen += _found(embedder and SSCDFeatures(embedder), reason, "an SSCD model", features)
    if not chosen:
        say("no features: nothing is sampled, only losses are taken")
    return chosen


def _found(network: FeatureExtractor | None, reason: str, what: str, features: str) -> list[FeatureExtractor]:
    if network is None and features != "auto":
        raise UsageError(f"expected {what} for --features {features}, got none: {reason}")
    say(reason)
    return [] if network is None else [network]


def find_references(
    opened: OpenedRun, reference: str | None, extractors: Sequence[FeatureExtractor], workers: int | None
) -> list[Reference]:
    """What --reference names for each extractor, by default the held-out set.

    Statistics in a file are Inception's: beside them SSCD takes the held-out set.

    Raises: UsageError for a run without the set, or statistics without Inception; see ``read_reference`` for the rest.
    """
    if reference is None or not reference.endswith(".npz"):
        return [_read(opened, reference or "heldout", e, workers) for e in extractors]
    if not any(isinstance(e, InceptionFeatures) for e in extractors):
        raise UsageError(
            f"expected Inception features with the statistics {reference}, got "
            f"{', '.join(e.name for e in extractors) or 'none'}: give the weights with --inception, or a reference of "
            "images"
        )
    return [
        file_reference(Path(reference), e) if isinstance(e, InceptionFeatures) else _read(opened, "heldout", e, workers)
        for e in extractors
    ]


def _read(opened: OpenedRun, reference: str, extractor: FeatureExtractor, workers: int | None) -> Reference:
    source, manifest, name = _reference_images(opened, reference)
    with image_progress() as (start, advance):
        start(len(manifest))
        return read_reference(
            source,
            manifest,
            opened.model.view_recipe("center"),
            extractor,
            description=name,
            cache=opened.folder.references_folder,
            train=source.description == opened.sources["train"].description,
            workers=workers,
            advance=advance,
        )


def _reference_images(opened: OpenedRun, reference: str) -> tuple[ImageSource, Manifest, str]:
    if reference not in SETS:
        source = open_source(Path(reference).resolve(), classes=opened.sources["train"].classes)
        return source, Manifest.build(source), source.description
    if reference not in opened.manifests:
        raise UsageError(
            f"expected held-out images in the run {opened.folder.path}, got none: score it with --heldout, or name "
            "images that were not trained on with --reference FOLDER"
        )
    return opened.sources[reference], opened.manifests[reference], SETS[reference]
