"""How well a tiny model knows its training images, by how often they were shown per epoch (dose), and unseen images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmem.data.manifest import Manifest
from fastmem.data.sources import embedded_source
from fastmem.demo.doses import groups
from fastmem.models.model import Model
from fastmem.report.markdown import markdown_table
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import read_true_images

DOSE_FILE = Path(__file__).parent / "doses.json"
BATCH = 64
# an image counts as reproduced when greedy generation gets this share of its remaining tokens right
CAME_BACK = 0.9


@dataclass(frozen=True)
class GroupRow:
    """How well a model knows one group of images.

    Attributes:
        group: name of the group.
        images: number of images.
        loss: mean teacher-forced loss of the centre views, in nats per token.
        tokens_right: mean share of the remaining tokens that greedy generation gets right from about the first eighth.
        came_back: number of images of which greedy generation gets at least 90 % of the remaining tokens right.
    """

    group: str
    images: int
    loss: float
    tokens_right: float
    came_back: int


def an_eighth(model: Model) -> int:
    """Return the prefix length, in tokens, that the model allows and that is nearest to an eighth of an image."""
    return min(model.prefix_lengths, key=lambda length: abs(length - model.num_tokens // 8))


def measure(model: Model, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of images, in nats per token, and the share of tokens that greedy generation gets right.

    Both are float32 [N]. Generation starts from about the first eighth of the tokens, and the share is of the others.
    ``tokens``, int64 [N,T], are the true tokens, and ``labels``, int64 [N], the classes.
    """
    prefix = an_eighth(model)
    losses, shares = [], []
    for batch, own in zip(tokens.split(BATCH), labels.split(BATCH), strict=True):
        losses.append(model.outcomes(batch, own).loss.mean(1).cpu())
        made = model.generate(own, batch[:, :prefix]).cpu()
        shares.append((made == batch)[:, prefix:].float().mean(1))
    return torch.cat(losses), torch.cat(shares)


def dose_table(
    model: Model, doses: dict[str, int] | None = None, most: int | None = None, cache: TokenCache | None = None
) -> list[GroupRow]:
    """Return a row for each dose, for training images with a near-duplicate ("twins"), and for held-out images.

    Args:
        model: a tiny model.
        doses: number of times that each training image was shown per epoch, by name; None for the list in the package.
        most: greatest number of images of each group; None for all.
        cache: where tokens are looked up; None for no cache.
    """
    doses = json.loads(DOSE_FILE.read_text()) if doses is None else doses
    sources = {split: embedded_source(split) for split in ("train", "heldout")}
    manifests = {split: Manifest.build(source) for split, source in sources.items()}
    images = {
        split: read_true_images(model, source, manifests[split], cache=cache, workers=0)
        for split, source in sources.items()
    }
    names = manifests["train"].names.tolist()
    where = {name: i for i, name in enumerate(names)}
    rows = []
    for group, listed in groups(doses).items():
        chosen = images["train"].take(np.array([where[name] for name in listed[:most]], dtype=np.int64))
        rows.append(_row(group, *measure(model, chosen.tokens, chosen.labels)))
    unseen = images["heldout"]
    return [*rows, _row("held-out", *measure(model, unseen.tokens[:most], unseen.labels[:most]))]


def _row(group: str, losses: Tensor, shares: Tensor) -> GroupRow:
    came_back = int((shares >= CAME_BACK).sum())
    return GroupRow(group, len(losses), float(losses.mean()), float(shares.mean()), came_back)


def format_table(rows: Sequence[GroupRow]) -> str:
    """Return the rows as a table of aligned text, which is also valid Markdown."""
    head = ("shown per epoch", "images", "loss (nats/token)", "tokens right from 1/8", "came back (>= 90 % right)")
    body = [
        (r.group, str(r.images), f"{r.loss:.2f}", f"{r.tokens_right:.0%}", f"{r.came_back} of {r.images}") for r in rows
    ]
    return markdown_table(head, body)
