"""The folder of a run: its inputs, its saved progress and its results.

run.json                model, weights, data and settings, which must be the same when the run is resumed
inputs.json             where weights and images came from, so that later stages find them again
manifest-SET.parquet    the images of a set ("train" or "heldout"), in order, with their folds
state.safetensors       the statistics so far; removed when the run is complete
units/                  work units that other ranks have finished and that wait for their turn
SET.safetensors         the statistics of a set
losses-SET.safetensors  the loss and hits of every image of a set, where they were asked for
skipped-SET.json        the images of a set that could not be read, with the reasons
result.json             the document that ``--json`` prints
edits/                  the units that each edit scales, one file per edit
samples/                images that the model generated, with and without edits, and their features
references/             features of the real images that generated images are compared with
evaluations/            metrics of generated images and losses of real ones, a document and a picture per evaluation
extractions/            what was found by each attempt to extract training images
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_json, write_json
from fastmem.runs.ranks import in_job

RUN_SCHEMA = "fastmem.run/1"
RESULT_SCHEMA = "fastmem.score/1"
INPUTS_SCHEMA = "fastmem.inputs/1"


def default_folder(model: str) -> Path:
    """Make a new folder ``runs/MODEL-DATE``, with a number at the end where that is taken, and return its path.

    Processes that call this at the same moment get different folders.

    Raises: UsageError where the folder cannot be made.
    """
    stem = Path("runs") / f"{model}-{datetime.now():%Y-%m-%d}"
    number = 1
    while True:
        path = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if not path.parent.is_dir():
                raise UsageError(f"expected a folder {path.parent}, got a file: choose --out") from None
            number += 1
        except FileNotFoundError:
            # another process had nothing to keep, and removed the parent at this moment
            continue
        except OSError as error:
            raise UsageError(
                f"expected to be able to make the folder {path}, got {error.strerror or error}: choose another --out"
            ) from error
        else:
            return path


class SettingsShape(TypedDict):
    """The settings of a scoring pass in run.json that later stages use."""

    views: int | str
    segments: list[str]
    activation: str
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class IdentityShape(TypedDict):
    """What run.json says of a scored run."""

    stage: str
    model: str
    checkpoint: str
    tokenizer: str
    dtype: str
    device: str
    backend: str
    settings: SettingsShape
    manifests: dict[str, str]


def run_id(identity: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that tell a run, by all of its inputs, from other runs; its files carry them."""
    content = {key: value for key, value in identity.items() if key != "schema"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def out_folder(model: str, out: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder that a caller named, or else a new default one, which goes again where nothing came of it."""
    if out is not None:
        yield Path(out)
        return
    if in_job():
        raise UsageError("expected --out RUN with more than one rank, got none: name one folder for all of them")
    path = default_folder(model)
    try:
        yield path
    finally:
        with suppress(OSError):
            # only empty folders can be removed so
            path.rmdir()
            path.parent.rmdir()


@dataclass(frozen=True)
class RunInputs:
    """Where a run's weights and images came from, so that later stages find them again.

    Attributes:
        model: name of the model in the registry.
        checkpoint: absolute path of the generator's weights; None for the official file, or the one in the package.
        tokenizer: absolute path of the tokenizer's weights; None for the official file, or the one in the package.
        data: absolute path of the training images, or "memory" for images that were in memory only; "embedded" or None
            for those that come with the package.
        heldout: absolute path of the held-out images, "memory" or "embedded"; None for those that come with the
            package, or where there are none.
        classes: text file with the class order; None where the order is taken from the run's manifest.
        data_split: folder below ``data`` with the class folders; None for ``train`` where there is one.
        heldout_split: folder below ``heldout`` with the class folders; None for ``train`` where there is one.
        token_cache: folder of the token cache, "auto" for the one in ``FASTMEM_HOME``, or "off" or None for no cache.
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

    def save(self, folder: RunFolder, run: str) -> None:
        """Write these inputs to inputs.json in the folder of the run with the id ``run``.

        Raises: UsageError where the folder cannot be written.
        """
        write_json(folder.inputs_file, {"schema": INPUTS_SCHEMA, "run": run, **asdict(self)})

    @classmethod
    def load(cls, folder: RunFolder, run: str) -> RunInputs:
        """Read the inputs from inputs.json in the folder of the run with the id ``run``.

        Raises: InputFileError where the file is missing, is damaged or belongs to another run.
        """
        document = read_json(folder.inputs_file, INPUTS_SCHEMA, cls, {"run": run})
        return cls(**{field.name: document[field.name] for field in fields(cls) if field.name in document})


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the paths of the files and folders in it."""

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
    def units_folder(self) -> Path:
        return self.path / "units"

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
        """Return the path of the document of the evaluation called ``name``."""
        return self.path / "evaluations" / f"{name}.json"

    def manifest_file(self, split: str) -> Path:
        """Return the path of the manifest of a set, "train" or "heldout"."""
        return self.path / f"manifest-{split}.parquet"

    def stats_file(self, split: str) -> Path:
        """Return the path of the statistics of a set, "train" or "heldout"."""
        return self.path / f"{split}.safetensors"

    def losses_file(self, split: str) -> Path:
        """Return the path of the losses of every image of a set, "train" or "heldout"."""
        return self.path / f"losses-{split}.safetensors"

    def skipped_file(self, split: str) -> Path:
        """Path of the list of images of a set that could not be read; ``split`` is "train" or "heldout"."""
        return self.path / f"skipped-{split}.json"

    def extraction_folder(self, name: str) -> Path:
        """Return the path of the folder of the extraction called ``name``."""
        return self.path / "extractions" / name

    def check(self, identity: Mapping[str, Any], resume: bool) -> bool:
        """Return True where the folder holds a run that can be resumed, and False where it holds no run.

        ``identity`` are the inputs that run.json has to agree with, and ``resume`` says whether a run may be there.

        Raises: UsageError where there is a run and ``resume`` is False, or where the run's inputs differ from
        ``identity``; InputFileError where run.json is damaged.
        """
        if not self.identity_file.exists():
            stray = next(self.path.glob("*.safetensors"), None)
            if stray is not None:
                raise InputFileError(
                    f"expected run.json beside {stray}, which belongs to a run, got none: choose another --out"
                )
            return False
        if not resume:
            raise UsageError(
                f"expected a new folder to write to, got {self.path}, which holds a run: continue it with --resume "
                "or choose another --out"
            )
        before = self.identity()
        for key, value in identity.items():
            if before.get(key) != value:
                raise UsageError(
                    f"expected the inputs that the run in {self.path} was started with, got {key} {value!r} instead of "
                    f"{before.get(key)!r}: resume with the same options, or choose another --out"
                )
        return True

    def identity(self) -> dict[str, Any]:
        """Return what run.json says. Raises: InputFileError where it is missing or damaged."""
        return read_json(self.identity_file, RUN_SCHEMA)

    def start(self, identity: Mapping[str, Any]) -> None:
        """Create the folder and write ``identity``, the run's inputs, to run.json.

        Raises: UsageError where the folder cannot be written.
        """
        write_json(self.identity_file, {"schema": RUN_SCHEMA, **identity})

    def remove_unscored(self) -> None:
        """Remove what a pass wrote that could not read one training image, so that the folder holds no run."""
        for split in ("train", "heldout"):
            self.manifest_file(split).unlink(missing_ok=True)
        self.state_file.unlink(missing_ok=True)
        self.identity_file.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Check that a run folder can be created at ``path``, so that long work does not fail at its end.

    Raises: UsageError where the folder cannot be created or written.
    """
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(
            f"expected a folder that can be written for the run, got {path}: choose another --out or change its rights"
        )
