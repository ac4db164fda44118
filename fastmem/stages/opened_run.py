"""Opening a scored run for the stages after it: its model, its images and its statistics, checked against the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastmem.cli.options import Command, say
from fastmem.cli.score import open_sources
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_json
from fastmem.mitigation.edit_file import load_edit
from fastmem.models.checkpoints import load_model
from fastmem.models.model import Model
from fastmem.runs.folder import RUN_SCHEMA, RunFolder, RunInputs
from fastmem.scoring.image_losses import ImageLosses
from fastmem.stats import UnitStats

# true of every edit, and said wherever a result of one is shown
CAUTION = (
    "weakened rows protect a model that others only sample from, not released weights: whoever holds the weights can "
    "look for rows of unusual norm and rescale them"
)

_RUN_OPTIONS: tuple[Callable[[Command], Command], ...] = (
    click.option("--run", required=True, metavar="RUN", help="Folder of a scored run."),
    click.option("--data", metavar="PATH", help="Training images, where they have moved since they were scored."),
    click.option("--heldout", metavar="PATH", help="Held-out images, where they have moved."),
    click.option("--classes", metavar="FILE", help="Class order, where the file has moved."),
    click.option("--checkpoint", metavar="FILE", help="Generator weights, where they have moved."),
    click.option("--tokenizer", metavar="FILE", help="Tokenizer weights, where they have moved."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--dtype", help="float32, bfloat16 or float16 (generator).  [default: as scored]"),
)


def run_options(command: Command) -> Command:
    """--run --data --heldout --classes --checkpoint --tokenizer --device --dtype."""
    return reduce(lambda decorated, option: option(decorated), reversed(_RUN_OPTIONS), command)


@dataclass(frozen=True, eq=False)
class OpenedRun:
    """A scored run with everything that made it.

    model: edited where an edit was named; unedited: SHA-256 of its weights before that; chosen_on: ids of the images
    that the edit was chosen on, on which it is not judged, int64 [M]; chosen_against: held-out ones alike; sources,
    manifests: by set, "train" and, where there is one, "heldout".
    """

    folder: RunFolder
    identity: dict[str, Any]
    model: Model
    unedited: dict[str, str]
    edit: str | None
    chosen_on: np.ndarray
    chosen_against: np.ndarray
    sources: dict[str, ImageSource]
    manifests: dict[str, Manifest]

    def stats(self, split: str = "train") -> UnitStats:
        """The statistics of a set. Raises: InputFileError where the file is missing or damaged."""
        return UnitStats.load(self.folder.stats_file(split))

    def losses(self, split: str = "train") -> ImageLosses | None:
        """Losses and hits of a set's images; None where the pass kept none."""
        file = self.folder.losses_file(split)
        return ImageLosses.load(file, self.manifests[split].hash) if file.exists() else None


def open_run(
    run: str,
    *,
    data: str | None = None,
    heldout: str | None = None,
    classes: str | None = None,
    checkpoint: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    edit: str | None = None,
) -> OpenedRun:
    """Open a scored run; what is None is as it was scored. edit: name or file of an edit that is made at once.

    Raises: InputFileError where the run or a file of it is missing, unfinished or damaged; UsageError where weights or
    images are not the run's.
    """
    folder = RunFolder(Path(run))
    if not folder.identity_file.exists():
        raise InputFileError(f"expected the folder of a scored run at {run}, got no run.json there: check --run")
    identity = read_json(folder.identity_file, RUN_SCHEMA)
    splits = list(identity["manifests"])
    unfinished = [split for split in splits if not folder.stats_file(split).exists()]
    if unfinished or not folder.inputs_file.exists():
        raise InputFileError(
            f"expected a finished run in {run}, got one without {unfinished[0] if unfinished else 'inputs'}: finish it "
            "with `fastmem score` and --resume"
        )
    before = RunInputs.load(folder)
    model = load_model(
        before.model, checkpoint or before.checkpoint, tokenizer or before.tokenizer, device, dtype or identity["dtype"]
    )
    unedited = dict(model.fingerprint())
    _check_weights(run, identity, model, unedited)
    sources = open_sources(before.model, data or before.data, heldout or before.heldout, classes or before.classes)
    manifests = {split: Manifest.load(folder.manifest_file(split), sources[split]) for split in splits}
    chosen_on = chosen_against = np.empty(0, np.int64)
    if edit is not None:
        plan = load_edit(folder, edit)
        plan.apply(model)
        chosen_on, chosen_against = plan.chosen_on.numpy(), plan.chosen_against.numpy()
        say(CAUTION)
    return OpenedRun(folder, identity, model, unedited, edit, chosen_on, chosen_against, sources, manifests)


def _check_weights(run: str, identity: dict[str, Any], model: Model, found: dict[str, str]) -> None:
    if str(model.dtype).removeprefix("torch.") != identity["dtype"]:
        say(f"weights as {model.dtype}, scored as {identity['dtype']}: whether they are the run's is not checked")
        return
    for part in ("checkpoint", "tokenizer"):
        if found[part] != identity[part]:
            raise UsageError(
                f"expected the {part} that {run} was scored with ({identity[part][:12]}), got {found[part][:12]}: name "
                f"that file with --{part}, or score this one"
            )
