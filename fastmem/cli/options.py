"""Options that several commands share, one dataclass and one decorator for each group, and how results are printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import click

from fastmem.cli.command import FROM_0, FROM_1, GENERAL, option, option_group
from fastmem.errors import UsageError
from fastmem.extraction.candidates import TOP_PER_CLASS
from fastmem.files import as_json_text
from fastmem.index.embedding import PUBLISHED_SIZE
from fastmem.quality.samples import BATCH
from fastmem.reporter import Reporter, printable
from fastmem.runs.ranks import helps_only
from fastmem.stages.opened_run import OpenedRun, open_run
from fastmem.stages.options import AttackOptions, SamplingOptions, SSCDOptions

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

THE_RUN, IMAGES, WEIGHTS = "The run", "Images", "Weights and device"
ATTACK, SSCD, SAMPLING, WORK = "The attack", "SSCD, which compares pictures", "Samples", "How the work is done"

JSON = option(("--json", "as_json"), GENERAL, "Print one JSON document on stdout.", is_flag=True)
CHECKPOINT = option(
    "--checkpoint", WEIGHTS, "Generator weights.  [default: in FASTMEM_HOME or the package]", metavar="FILE"
)
TOKENIZER = option(
    "--tokenizer", WEIGHTS, "Tokenizer weights.  [default: in FASTMEM_HOME or the package]", metavar="FILE"
)
DEVICE = option("--device", WEIGHTS, "auto, cpu, cuda or cuda:N.", default="auto")
WORKERS = option("--workers", WORK, "Processes that decode images.  [default: by cores]", type=FROM_0)
RESUME = option("--resume", WORK, "Go on with work that was interrupted.", is_flag=True)
EDIT = option("--edit", THE_RUN, "Use the model with this edit: its name in the run, or a file.", metavar="NAME")


def model_option() -> Decorator:
    """--model."""
    return option("--model", WEIGHTS, "Name of the model; `fastmem models` lists them.", required=True, metavar="NAME")


@dataclass(frozen=True)
class RunOptions:
    """The run that a command works on; what is None is as it was scored. Fields as in ``open_run``."""

    run: str
    data: str | None
    heldout: str | None
    classes: str | None
    checkpoint: str | None
    tokenizer: str | None
    device: str
    dtype: str | None

    def open(self, reporter: Reporter) -> OpenedRun:
        """Open the run. Raises: as ``open_run``."""
        settings = asdict(self)
        return open_run(settings.pop("run"), **settings, reporter=reporter)


run_options: Decorator = option_group(
    RunOptions,
    "where",
    option("--run", THE_RUN, "Folder of a scored run.", required=True, metavar="RUN"),
    option("--data", IMAGES, "Training images, if they have moved since they were scored.", metavar="PATH"),
    option("--heldout", IMAGES, "Held-out images, if they have moved since.", metavar="PATH"),
    option("--classes", IMAGES, "File with the class order, if it has changed since.", metavar="FILE"),
    option("--checkpoint", WEIGHTS, "Generator weights, if they have moved since.", metavar="FILE"),
    option("--tokenizer", WEIGHTS, "Tokenizer weights, if they have moved since.", metavar="FILE"),
    DEVICE,
    option("--dtype", WEIGHTS, "Generator as float32, bfloat16 or float16.  [default: as it was scored]"),
)

sscd_options: Decorator = option_group(
    SSCDOptions,
    "sscd",
    option("--sscd", SSCD, "Meta's sscd_disc_mixup.torchscript.pt.  [default: in FASTMEM_HOME]", metavar="FILE"),
    option(
        "--trust-sscd", SSCD, "Load a TorchScript file of unknown SHA-256, although it can run any code.", is_flag=True
    ),
    option(
        ("--size", "sscd_size"),
        SSCD,
        "Side in pixels to which images are resized; SSCD's authors use 288.",
        type=int,
        default=PUBLISHED_SIZE,
    ),
)

attack_options: Decorator = option_group(
    AttackOptions,
    "attack",
    option(
        "--top-per-class", ATTACK, "Number of images of every class that are tried.", type=FROM_1, default=TOP_PER_CLASS
    ),
    option(
        "--judge",
        ATTACK,
        "sscd compares pictures, tokens compares tokens, auto takes sscd if there is a model.",
        default="auto",
    ),
    option(
        "--threshold",
        ATTACK,
        "An image is extracted above this similarity.  [default: 0.75 by sscd, 0.9 by tokens]",
        type=float,
    ),
)


def sampling_options(default: str) -> Decorator:
    """--samples, --seed and --batch-size; ``default`` says how many samples are taken when none are named."""
    return option_group(
        SamplingOptions,
        "sampling",
        option("--samples", SAMPLING, f"Number of images to sample from the model.  [default: {default}]", type=FROM_1),
        option("--seed", SAMPLING, "Seed of the random draws.", type=FROM_0, default=0),
        option(
            "--batch-size",
            SAMPLING,
            "Number of images that are sampled at once; another number draws other images.",
            type=FROM_1,
            default=BATCH,
        ),
    )


def parse_share(text: str, name: str = "--top") -> float:
    """An option as a share of the units: "5%" or "0.05". Raises: UsageError for anything else."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%?)", text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"expected {name} above 0 and up to 100 %, such as 5% or 0.05, got {text!r}")
    return share


def say(sentence: str) -> None:
    """One line on stderr, of the leading rank alone."""
    if helps_only():
        return
    # hours of work do not end because a note about them cannot be shown
    with suppress(OSError):
        click.echo(printable(sentence), sys.stderr)


def tell(*lines: object) -> None:
    """Lines on stdout, of the leading rank alone; an end of a line within one is part of a name, and is escaped."""
    for line in () if helps_only() else lines:
        click.echo(printable(str(line)), sys.stdout)


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document on stdout, of the leading rank alone."""
    if not helps_only():
        click.echo(as_json_text(document))


def print_document(document: Mapping[str, Any], as_json: bool, in_words: Callable[[Mapping[str, Any]], None]) -> None:
    """A stage's document on stdout, as JSON or in words."""
    if as_json:
        print_json(document)
    else:
        in_words(document)
