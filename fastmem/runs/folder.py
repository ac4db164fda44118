"""The run folder: what was asked, how far it got, and what came out.

run.json            model, weights, data and settings: what a resumed run must have in common
inputs.json         where weights and images came from, so that later stages find them again
manifest-*.parquet  the images of each set, in order, with their folds
state.safetensors   the statistics so far, replaced by rename; gone when the run is complete
result.json         the document that ``--json`` prints
edits/              which units each edit scales, a file for every edit
samples/            images that the model, edited or not, was sampled for, in shards, with their features
references/         features of the real images that samples were compared with
evaluations/        metrics of samples and losses of real images, a document and a picture for every evaluation
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_json, write_json

RUN_SCHEMA = "fastmem.run/1"
RESULT_SCHEMA = "fastmem.score/1"
INPUTS_SCHEMA = "fastmem.inputs/1"


def default_folder(model: str) -> Path:
    """runs/MODEL-DATE below the current folder, numbered where it exists."""
    stem = Path("runs") / f"{model}-{datetime.now():%Y-%m-%d}"
    candidates = (stem, *(stem.with_name(f"{stem.name}-{i}") for i in range(2, 10_000)))
    return next(path for path in candidates if not path.exists())


@dataclass(frozen=True)
class RunInputs:
    """Where a run's weights and images came from, so that later stages find them again.

    Attributes:
        model: its name in the registry.
        checkpoint: absolute path of the generator's weights; None for the official file, or the one in the package.
        tokenizer: absolute path of the tokenizer's weights; None likewise.
        data: absolute path of the training images, "embedded" or "memory"; None for the embedded ones.
        heldout: the same for the held-out images; None for the embedded ones, or where there are none.
        classes: file with the class order; None where the run's manifest tells it.
        data_split: folder of the split below ``data``; None for the usual one.
        heldout_split: folder of the split below ``heldout``; None for the usual one.
        token_cache: where tokens of images are kept, as in ``fastmem.score``.
    """

    model: str
    checkpoint: str | None = None
    tokenizer: str | None = None
    data: str | None = None
    heldout: str | None = None
    classes: str | None = None
    data_split: str | None = None
    heldout_split: str | None = None
    token_cache: str | None = "auto"

    def save(self, folder: RunFolder) -> None:
        """Write inputs.json. Raises: UsageError where the folder cannot be written."""
        write_json(folder.inputs_file, {"schema": INPUTS_SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, folder: RunFolder) -> RunInputs:
        """Read inputs.json. Raises: InputFileError where it is missing or damaged."""
        document = read_json(folder.inputs_file, INPUTS_SCHEMA)
        known = {field.name: document[field.name] for field in fields(cls) if field.name in document}
        if not isinstance(known.get("model"), str):
            raise InputFileError(f"expected the name of a model in {folder.inputs_file}, got none: score again")
        return cls(**known)


@dataclass(frozen=True)
class RunFolder:
    """One run's folder and the names of the files in it."""

    path: Path

    @property
    def identity_file(self) -> Path:
        return self.path / "run.json"

    @property
    def inputs_file(self) -> Path:
        return self.path / "inputs.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.safetensors"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def edits_folder(self) -> Path:
        return self.path / "edits"

    @property
    def samples_folder(self) -> Path:
        return self.path / "samples"

    @property
    def references_folder(self) -> Path:
        return self.path / "references"

    def evaluation_file(self, name: str) -> Path:
        return self.path / "evaluations" / f"{name}.json"

    def manifest_file(self, split: str) -> Path:
        return self.path / f"manifest-{split}.parquet"

    def stats_file(self, split: str) -> Path:
        return self.path / f"{split}.safetensors"

    def losses_file(self, split: str) -> Path:
        return self.path / f"losses-{split}.safetensors"

    def extraction_folder(self, name: str) -> Path:
        return self.path / "extractions" / name

    def check(self, identity: Mapping[str, Any], resume: bool) -> bool:
        """Whether the folder holds a run to go on with.

        Raises: UsageError where it holds one and ``resume`` is off, or one whose inputs differ from ``identity``;
        InputFileError where run.json is damaged.
        """
        if not self.identity_file.exists():
            return False
        if not resume:
            raise UsageError(
                f"expected a new folder to write to, got {self.path}, which holds a run: continue it with --resume "
                "or choose another --out"
            )
        before = read_json(self.identity_file, RUN_SCHEMA)
        for key, value in identity.items():
            if before.get(key) != value:
                raise UsageError(
                    f"expected the inputs that the run in {self.path} was started with, got {key} {value!r} instead of "
                    f"{before.get(key)!r}: resume with the same options, or choose another --out"
                )
        return True

    def start(self, identity: Mapping[str, Any]) -> None:
        """Make the folder and write down its inputs. Raises: UsageError where it cannot be written."""
        write_json(self.identity_file, {"schema": RUN_SCHEMA, **identity})


def check_writable(path: Path) -> None:
    """Raises: UsageError where a run folder could not be made at ``path``, before any long work starts."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(
            f"expected a folder that can be written for the run, got {path}: choose another --out or change its rights"
        )
