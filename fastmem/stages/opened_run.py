"""Opening a scored run for the stages after it: its model, its images and its statistics, checked against the run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.data.sources import EMBEDDED, IN_MEMORY, ImageSource, embedded_source, open_source
from fastmem.errors import InputFileError, UsageError
from fastmem.files import STALE_SECONDS, check_owner, read_json, remove_leftovers
from fastmem.mitigation.edit_file import EditPlan, load_edit
from fastmem.models.checkpoints import load_model
from fastmem.models.model import Model
from fastmem.models.registry import entries, find_entry
from fastmem.reporter import SILENT, Reporter
from fastmem.runs.folder import RUN_SCHEMA, IdentityShape, RunFolder, RunInputs, run_id
from fastmem.scoring.image_losses import ImageLosses
from fastmem.stats import UnitStats
from fastmem.tokens.cache import TokenCache

# true of every edit, and said wherever a result of one is shown
CAUTION = (
    "weakened rows protect a model that others only sample from, not released weights: whoever holds the weights can "
    "look for rows of unusual norm and rescale them"
)
EMBEDDED_SPLITS = ("train", "heldout")
# images as a caller names them: a path, or an opened source
Images = str | os.PathLike[str] | ImageSource


@dataclass(frozen=True, eq=False)
class OpenedRun:
    """A scored run with everything that made it.

    Attributes:
        folder: the run folder.
        identity: what run.json says.
        model: the model, without an edit.
        sources: images by set, "train" and, where there is one, "heldout".
        manifests: the order of the images, by set.
        cache: tokens of images that were encoded before; None where none are kept.
    """

    folder: RunFolder
    identity: dict[str, Any]
    model: Model
    sources: dict[str, ImageSource]
    manifests: dict[str, Manifest]
    cache: TokenCache | None

    @property
    def path(self) -> Path:
        """The run folder's path."""
        return self.folder.path

    @property
    def id(self) -> str:
        """What tells the run from others, by all of its inputs."""
        return run_id(self.identity)

    @cached_property
    def train(self) -> UnitStats:
        """Statistics of the training images. Raises: InputFileError where the file is missing or damaged."""
        return UnitStats.load(self.folder.stats_file("train"), self.owner("train"))

    @cached_property
    def heldout(self) -> UnitStats | None:
        """Statistics of the held-out images; None without such a set. Raises: as ``train``."""
        if "heldout" not in self.manifests:
            return None
        return UnitStats.load(self.folder.stats_file("heldout"), self.owner("heldout"))

    def stats(self) -> dict[str, UnitStats]:
        """Statistics by set."""
        return {"train": self.train} | ({} if self.heldout is None else {"heldout": self.heldout})

    def losses(self, split: str = "train") -> ImageLosses | None:
        """Losses and hits of a set's images; None where the pass kept none."""
        file = self.folder.losses_file(split)
        return ImageLosses.load(file, self.manifests[split].hash, self.owner(split)) if file.exists() else None

    def owner(self, split: str) -> dict[str, str]:
        """Entries that the files of a set carry, by which those of another run are told."""
        return {"run": self.id, "set": split}

    def weights(self) -> dict[str, str]:
        """What tells the model's weights, as they are now, from others'; JSON values."""
        return {**self.model.fingerprint(), "dtype": dtype_name(self.model), "device": self.model.device.type}


@dataclass(frozen=True, eq=False)
class EditInForce:
    """The edit that a stage works with.

    Attributes:
        name: the edit's, as the caller gave it; None for the unedited model.
        label: a word for names of files.
        chosen_on: ids of the training images that the choice has seen, int64 [m]; they are not judged.
        chosen_against: ids of the held-out images that it has seen, int64 [k]; likewise.
    """

    name: str | None = None
    label: str = "unedited"
    chosen_on: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    chosen_against: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def caution(self) -> dict[str, str]:
        """What is to be said of an edit, for a document; empty for the unedited model."""
        return {} if self.name is None else {"caution": CAUTION}

    def title(self, model: Model) -> str:
        """The model and its edit, for a picture."""
        return model.name if self.name is None else f"{model.name}, edit {self.label}"


@contextmanager
def edited(run: OpenedRun, edit: str | EditPlan | None, reporter: Reporter = SILENT) -> Iterator[EditInForce]:
    """The run's model with an edit while entered; the very bits come back on leaving.

    Args:
        run: the run.
        edit: the name of an edit of the run, the path of an edit file, or a plan; None for no edit.
        reporter: is told what an edit does not protect.

    Raises: UsageError for an edit that the run does not have, or of other weights; InputFileError for a damaged file.
    """
    if edit is None:
        yield EditInForce()
        return
    plan = edit if isinstance(edit, EditPlan) else load_edit(run.folder, edit, run.id)
    label = plan.name or "edit"
    with plan.apply(run.model):
        reporter.note(CAUTION)
        name = edit if isinstance(edit, str) else label
        yield EditInForce(name, label, plan.chosen_on.numpy(), plan.chosen_against.numpy())


def open_run(
    path: str | os.PathLike[str],
    *,
    data: Images | None = None,
    heldout: Images | None = None,
    classes: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    model: Model | None = None,
    reporter: Reporter = SILENT,
) -> OpenedRun:
    """Open a scored run, for the stages that follow scoring; what is None is as it was scored.

    Args:
        path: the run folder.
        data: the training images, where they have moved: a path or an opened source.
        heldout: the held-out images, where they have moved.
        classes: file with the class order, where the images' own order is another one now.
        checkpoint: the generator's weights, where they have moved.
        tokenizer: the tokenizer's weights, where they have moved.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: the generator's, "float32", "bfloat16" or "float16".
        model: the model itself, where it is loaded already; then no weights are read.
        reporter: is told what a person should know.

    Raises: InputFileError where the run or a file of it is missing, unfinished or damaged; UsageError where weights or
    images are not the run's, or were in memory alone and are not given.
    """
    folder = RunFolder(Path(path))
    if not folder.identity_file.exists():
        raise InputFileError(f"expected the folder of a scored run at {path}, got no run.json there: check --run")
    identity = read_json(folder.identity_file, RUN_SCHEMA, IdentityShape)
    splits = list(identity["manifests"])
    unfinished = [split for split in splits if not folder.stats_file(split).exists()]
    if unfinished or not folder.inputs_file.exists():
        raise InputFileError(
            f"expected a finished run in {path}, got one without {unfinished[0] if unfinished else 'inputs'}: finish "
            "it with `fastmem score` and --resume"
        )
    inputs = RunInputs.load(folder, run_id(identity))
    if model is None:
        if inputs.model not in entries():
            raise UsageError(
                f"expected a model of the registry in {path}, got {inputs.model}, which was put together in memory: "
                "give it with model="
            )
        model = load_model(
            inputs.model,
            _path(checkpoint, inputs.checkpoint),
            _path(tokenizer, inputs.tokenizer),
            device,
            dtype or identity["dtype"],
        )
    _check_weights(folder.path, identity, model, reporter)
    manifests = {split: Manifest.load(folder.manifest_file(split)) for split in splits}
    for split, manifest in manifests.items():
        check_owner(
            {"manifest": manifest.hash}, folder.manifest_file(split), {"manifest": identity["manifests"][split]}
        )
    given = {"train": data, "heldout": heldout}
    sources = {
        split: _open_again(inputs, split, given[split], classes or inputs.classes or manifest.classes)
        for split, manifest in manifests.items()
    }
    manifests = {split: manifest.found_in(sources[split]) for split, manifest in manifests.items()}
    cache = TokenCache.open(inputs.token_cache, model, reporter.note)
    # several processes may write there, so that only what nobody has touched for long is known to be left over
    for place in (folder.path, *([] if cache is None else [cache.folder])):
        remove_leftovers(place, STALE_SECONDS)
    return OpenedRun(folder, identity, model, sources, manifests, cache)


def _path(given: str | os.PathLike[str] | None, before: str | None) -> Path | None:
    path = before if given is None else given
    return None if path is None else Path(path)


def dtype_name(model: Model) -> str:
    """The generator's floating type in a word, such as "float32"."""
    return str(model.dtype).removeprefix("torch.")


def _check_weights(path: Path, identity: Mapping[str, Any], model: Model, reporter: Reporter) -> None:
    if dtype_name(model) != identity["dtype"]:
        reporter.note(
            f"weights as {model.dtype}, scored as {identity['dtype']}: whether they are the run's is not checked"
        )
        return
    found = model.fingerprint()
    for part in ("checkpoint", "tokenizer"):
        if found[part] != identity[part]:
            raise UsageError(
                f"expected the {part} that {path} was scored with ({identity[part][:12]}), got {found[part][:12]}: "
                f"name that file with --{part}, or score this one"
            )


def _open_again(
    inputs: RunInputs, split: str, given: Images | None, classes: str | os.PathLike[str] | tuple[str, ...]
) -> ImageSource:
    """The images of one set, from where the caller says or from where they were."""
    if given is not None:
        return given if isinstance(given, ImageSource) else open_source(given, classes=classes)
    before, below = (inputs.data, inputs.data_split) if split == "train" else (inputs.heldout, inputs.heldout_split)
    if before is None:
        return embedded_source(split)
    if before == EMBEDDED:
        return embedded_source(below or split)
    if before == IN_MEMORY:
        name = "data" if split == "train" else "heldout"
        raise UsageError(f"expected the images that were scored, which were in memory: give them with {name}=")
    return open_source(before, below, classes)


def open_sources(
    model: str, data: str | None, heldout: str | None = None, classes: str | None = None
) -> dict[str, ImageSource]:
    """The image sets "train" and, where there is one, "heldout" that a command names.

    Without ``data`` a model that has embedded images takes those, and any other the folder that ``FASTMEM_DATA`` names.

    Args:
        model: name in the registry.
        data: path of the training images.
        heldout: path of the held-out images.
        classes: file with the class order.

    Raises: UsageError where no images are named for a model that has none embedded; see ``open_source`` for the rest.
    """
    if find_entry(model).embedded and data is None:
        if classes is not None:
            raise UsageError("expected --classes together with --data, got the embedded images: leave it out")
        sources: dict[str, ImageSource] = {split: embedded_source(split) for split in EMBEDDED_SPLITS}
    else:
        path = data or os.environ.get("FASTMEM_DATA")
        if not path:
            raise UsageError(
                f"expected training images for {model}, got none: name a folder with one folder per class with --data "
                "PATH, or in the environment variable FASTMEM_DATA"
            )
        sources = {"train": open_source(path, classes=classes)}
    if heldout is not None:
        order = classes if classes is not None else sources["train"].classes
        sources["heldout"] = open_source(heldout, classes=order)
    return sources
