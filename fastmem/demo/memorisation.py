"""How well a tiny model knows each dose of its training images, and images it never saw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmem.data.loading import load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import embedded_source
from fastmem.demo.doses import groups
from fastmem.models.model import Model, to_unit_range
from fastmem.report.markdown import markdown_table

DOSE_FILE = Path(__file__).parent / "doses.json"
BATCH = 64
# an image came back when greedy generation got this share of its remaining tokens right
CAME_BACK = 0.9


@dataclass(frozen=True)
class GroupRow:
    """What the model knows of one group of images.

    loss: mean teacher-forced loss of the centre views, nats per token; tokens_right: mean share of the remaining tokens
    that greedy generation gets right from about the first eighth; came_back: images with a share of at least 0.9.
    """

    group: str
    images: int
    loss: float
    tokens_right: float
    came_back: int


@torch.inference_mode()
def center_tokens(model: Model, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Centre-view tokens int64 [N,T], labels int64 [N] and names CLASS/NAME of an embedded set."""
    source = embedded_source(split)
    manifest = Manifest.build(source)
    batches = np.array_split(np.arange(len(manifest)), -(-len(manifest) // BATCH))
    loaded = load_views(source, manifest, batches, model.view_recipe("center"), workers=0)
    tokens = torch.cat([model.tokenize(to_unit_range(batch.views[:, 0])).cpu() for batch in loaded])
    return tokens, torch.from_numpy(manifest.labels), manifest.names.tolist()


def an_eighth(model: Model) -> int:
    """The prefix length in tokens, among those that the model allows, that is nearest to an eighth of an image."""
    return min(model.prefix_lengths, key=lambda length: abs(length - model.num_tokens // 8))


def measure(model: Model, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss float32 [N] (nats per token) and share of the remaining tokens right float32 [N] from an eighth."""
    prefix = an_eighth(model)
    losses, shares = [], []
    for batch, own in zip(tokens.split(BATCH), labels.split(BATCH), strict=True):
        losses.append(model.outcomes(batch, own).loss.mean(1).cpu())
        made = model.generate(own, batch[:, :prefix]).cpu()
        shares.append((made == batch)[:, prefix:].float().mean(1))
    return torch.cat(losses), torch.cat(shares)


def dose_table(model: Model, doses: dict[str, int] | None = None, most: int | None = None) -> list[GroupRow]:
    """A row for each dose, for images with a training near-duplicate ("twins"), and for held-out images.

    doses: shows per epoch by name; the shipped list when None. most: images of each group; all when None.
    """
    doses = json.loads(DOSE_FILE.read_text()) if doses is None else doses
    tokens, labels, names = center_tokens(model, "train")
    where = {name: i for i, name in enumerate(names)}
    members = {group: [where[name] for name in listed[:most]] for group, listed in groups(doses).items()}
    rows = [_row(group, *measure(model, tokens[listed], labels[listed])) for group, listed in members.items()]
    tokens, labels, _ = center_tokens(model, "heldout")
    return [*rows, _row("held-out", *measure(model, tokens[:most], labels[:most]))]


def _row(group: str, losses: Tensor, shares: Tensor) -> GroupRow:
    came_back = int((shares >= CAME_BACK).sum())
    return GroupRow(group, len(losses), float(losses.mean()), float(shares.mean()), came_back)


def format_table(rows: Sequence[GroupRow]) -> str:
    """The table as aligned text that is also Markdown."""
    head = ("shown per epoch", "images", "loss (nats/token)", "tokens right from 1/8", "came back (>= 90 % right)")
    body = [
        (r.group, str(r.images), f"{r.loss:.2f}", f"{r.tokens_right:.0%}", f"{r.came_back} of {r.images}") for r in rows
    ]
    return markdown_table(head, body)
