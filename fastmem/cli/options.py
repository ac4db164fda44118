"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL = click.option("--model", required=True, metavar="NAME", help="Model name; `fastmem models` lists them.")
JSON = click.option("--json", "as_json", is_flag=True, help="Put one JSON document on stdout.")

_LOADING = (
    click.option("--checkpoint", metavar="FILE", help="Generator weights; default: FASTMEM_HOME or the package."),
    click.option("--tokenizer", metavar="FILE", help="Tokenizer weights; default: FASTMEM_HOME or the package."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16 (generator)."),
)
_RUNNING = (
    click.option("--backend", default="auto", show_default=True, help="auto, torch, cpp or triton."),
    click.option("--batch-size", type=click.IntRange(1), help="Views of one forward pass.  [default: 80]"),
    click.option("--segments", metavar="A,B", help="Positions to score, by name; default: the model's own."),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of folds and of images taken per class."
    ),
    click.option("--no-class-check", is_flag=True, help="Do not check that the class order fits the checkpoint."),
)


def loading_options(command: Command) -> Command:
    """--checkpoint --tokenizer --device --dtype."""
    return reduce(lambda decorated, option: option(decorated), reversed(_LOADING), command)


def running_options(command: Command) -> Command:
    """--backend --batch-size --segments --seed --no-class-check."""
    return reduce(lambda decorated, option: option(decorated), reversed(_RUNNING), command)


def say(sentence: str) -> None:
    """One line on stderr."""
    click.echo(sentence, err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document on stdout."""
    click.echo(json.dumps(document, indent=2))
