"""The one reader of real images as tokens: of their centre views, or of another recipe's first view.

Candidates, losses, the check of the class order, attacks and the demo all read through here, so an image that one of
them has encoded is taken from the token cache by the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Views
from fastmem.models.model import Model
from fastmem.reporter import SILENT, Reporter
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.encoding import tokens_of

BATCH = 64
# whose loss is taken, at the most
MOST_IMAGES = 5000


@dataclass(frozen=True, eq=False)
class TrueImages:
    """Real images as the tokens of one view; an edit leaves the tokenizer alone, so they serve for all edits.

    Attributes:
        ids: int64 [N], image ids.
        labels: int64 [N].
        tokens: int64 [N,T], on the CPU.
    """

    ids: np.ndarray
    labels: Tensor
    tokens: Tensor

    @property
    def count(self) -> int:
        """N."""
        return len(self.ids)

    def take(self, chosen: np.ndarray) -> TrueImages:
        """Some of the images, by a mask bool [N] or by positions int64 [n]."""
        at = torch.from_numpy(chosen)
        return TrueImages(self.ids[chosen], self.labels[at], self.tokens[at])


def spread(total: int, most: int) -> np.ndarray:
    """At most ``most`` positions out of ``total``, evenly spread, int64 ascending; the first and the last are in it.

    A manifest is ordered by class, so every class keeps its share; within a class images are ordered by a hash.
    """
    if total <= most:
        return np.arange(total)
    return np.linspace(0, total - 1, most).round().astype(np.int64)


def read_true_images(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    positions: np.ndarray | None = None,
    *,
    recipe: Views | None = None,
    cache: TokenCache | None = None,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> TrueImages:
    """Tokenize images, or take their tokens from the cache; images that cannot be read are left out.

    Args:
        model: whose tokenizer encodes.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        positions: manifest positions int64 [n], ascending; None for all images.
        recipe: which view to take, the first of its views; None for the model's centre view.
        cache: where tokens are looked up; it is written to only when all images are read, because an image that is
            encoded beside others than usual may differ from them by rounding.
        workers: processes that decode images, as in ``load_views``.
        reporter: ``advance`` is told of images that were read, ``note`` of a damaged file of the cache.

    Raises: as ``load_views``.
    """
    whole = positions is None
    at = np.arange(len(manifest)) if whole else positions
    batches = [at[start : start + BATCH] for start in range(0, len(at), BATCH)]
    view = model.view_recipe("center") if recipe is None else recipe
    encoded = tokens_of(model, source, manifest, batches, view, cache, keep=whole, workers=workers, note=reporter.note)
    kept, tokens = [np.empty(0, np.int64)], [torch.empty(0, model.num_tokens, dtype=torch.int64)]
    for asked, batch in zip(batches, encoded, strict=True):
        kept.append(batch.positions)
        tokens.append(batch.tokens[:, 0].cpu())
        reporter.advance(len(asked))
    found = np.concatenate(kept)
    return TrueImages(manifest.ids[found], torch.from_numpy(manifest.labels[found]), torch.cat(tokens))
