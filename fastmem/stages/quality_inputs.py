"""What samples are measured by: the networks that this machine has, and the reference that a caller names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmem.data.manifest import Manifest
from fastmem.data.shards import is_pattern
from fastmem.data.sources import ImageSource, open_source
from fastmem.errors import UsageError
from fastmem.quality.features import FeatureExtractor, Reference, SSCDFeatures
from fastmem.quality.inception import InceptionFeatures, find_inception
from fastmem.quality.reference import file_reference, read_reference
from fastmem.reporter import SILENT, Reporter
from fastmem.stages.opened_run import OpenedRun
from fastmem.stages.options import SSCDOptions

FEATURES = ("auto", "inception", "sscd", "both", "none")
SETS = {"heldout": "held-out images of the run", "train": "training images of the run"}


@dataclass(frozen=True)
class FeatureOptions:
    """By which networks' features samples are compared with real images.

    Attributes:
        features: "inception", "sscd", "both", "none" (losses alone), or "auto": Inception where its weights are, else
            SSCD, else none.
        inception: torch-fidelity's Inception weights; None for those in FASTMEM_HOME.
        sscd: which SSCD model.

    Raises: UsageError for an unknown word, or a file that the choice has no use for.
    """

    features: str = "auto"
    inception: str | None = None
    sscd: SSCDOptions = SSCDOptions()

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise UsageError(f"expected features out of {', '.join(FEATURES)}, got {self.features!r}")
        for file, option, unused in (
            (self.inception, "--inception", ("sscd", "none")),
            (self.sscd.sscd, "--sscd", ("inception", "none")),
        ):
            if file is not None and self.features in unused:
                raise UsageError(
                    f"expected no {option} with --features {self.features}, got {file}: leave one of them out"
                )

    def find(self, device: str, reporter: Reporter = SILENT) -> list[FeatureExtractor]:
        """The networks that were asked for; what "auto" finds and what it misses is noted.

        Raises: UsageError for a network that is asked for by name and missing.
        """
        chosen: list[FeatureExtractor] = []
        if self.features in ("auto", "inception", "both"):
            network, reason = find_inception(self.inception, device)
            chosen += self._found(network, reason, "Inception weights", reporter)
        if self.features in ("sscd", "both") or (
            self.features == "auto" and (self.sscd.sscd is not None or not chosen)
        ):
            embedder, reason = self.sscd.find(device)
            chosen += self._found(
                None if embedder is None else SSCDFeatures(embedder), reason, "an SSCD model", reporter
            )
        if not chosen:
            reporter.note("no features: nothing is sampled, only losses are taken")
        return chosen

    def _found(
        self, network: FeatureExtractor | None, reason: str, what: str, reporter: Reporter
    ) -> list[FeatureExtractor]:
        if network is None and self.features != "auto":
            raise UsageError(f"expected {what} for --features {self.features}, got none: {reason}")
        reporter.note(reason)
        return [] if network is None else [network]


def find_references(
    run: OpenedRun,
    reference: str | None,
    extractors: Sequence[FeatureExtractor],
    *,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> list[Reference]:
    """The reference for each extractor.

    Statistics in a file are Inception's: beside them SSCD takes the held-out set.

    Args:
        run: the run.
        reference: "heldout", "train", a folder or zip of images, or a .npz file of statistics; None for "heldout".
        extractors: the networks.
        workers: processes that decode images.
        reporter: is told of images that are read.

    Raises: UsageError for a run without the set, or statistics without Inception; see ``read_reference`` for the rest.
    """

    def read(name: str, extractor: FeatureExtractor) -> Reference:
        source, manifest, description = _reference_images(run, name)
        return read_reference(
            source,
            manifest,
            run.model.view_recipe("center"),
            extractor,
            description=description,
            cache=run.folder.references_folder,
            train=source.description == run.sources["train"].description,
            workers=workers,
            reporter=reporter,
        )

    if reference is None or not reference.endswith(".npz"):
        return [read(reference or "heldout", extractor) for extractor in extractors]
    if not any(isinstance(extractor, InceptionFeatures) for extractor in extractors):
        raise UsageError(
            f"expected Inception features with the statistics {reference}, got "
            f"{', '.join(e.name for e in extractors) or 'none'}: give the weights with --inception, or a reference of "
            "images"
        )
    return [
        file_reference(Path(reference), e) if isinstance(e, InceptionFeatures) else read("heldout", e)
        for e in extractors
    ]


def _reference_images(run: OpenedRun, reference: str) -> tuple[ImageSource, Manifest, str]:
    if reference not in SETS:
        place = reference if is_pattern(reference) else Path(reference).resolve()
        source = open_source(place, classes=run.sources["train"].classes)
        return source, Manifest.build(source), source.description
    if reference not in run.manifests:
        raise UsageError(
            f"expected held-out images in the run {run.path}, got none: score it with --heldout, or name images that "
            "were not trained on with --reference FOLDER"
        )
    return run.sources[reference], run.manifests[reference], SETS[reference]
