"""Read real images as tokens: those of the centre view, or of the first view of another recipe.

Everything that needs one view of each image reads it here (candidates, losses, the check of the class order, attacks
and the demo), so that an image has to be encoded only once and then comes from the token cache.
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
# losses are computed for at most this many images by default
MOST_IMAGES = 5000


@dataclass(frozen=True, eq=False)
class TrueImages:
    """The tokens of one view of each of N real images.

    An edit of a model does not change its tokenizer, so the tokens are the same for all edits.

    Attributes:
        ids: int64 [N], image ids.
        labels: int64 [N], classes of the images.
        tokens: int64 [N,T], on the CPU.
    """

    ids: np.ndarray
    labels: Tensor
    tokens: Tensor

    @property
    def count(self) -> int:
        """Number N of images."""
        return len(self.ids)

    def take(self, chosen: np.ndarray) -> TrueImages:
        """Return some of the images, chosen by a mask, bool [N], or by positions, int64 [n]."""
        at = torch.from_numpy(chosen)
        return TrueImages(self.ids[chosen], self.labels[at], self.tokens[at])


def spread(total: int, most: int) -> np.ndarray:
    """Return at most ``most`` of the positions 0..total-1, evenly spread, as int64, with the first and the last.

    A manifest is sorted by class, so every class keeps its share. Within a class it is sorted by image ids, which are
    hashes, so the images chosen are as good as random.
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
    """Return the tokens of images, encoded now or taken from the cache; images that cannot be read are left out.

    Args:
        model: the model whose tokenizer encodes.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        positions: manifest positions int64 [n], ascending; None for all images.
        recipe: the recipe whose first view is taken; None for the model's centre view.
        cache: where tokens are looked up; None for no cache. New tokens are kept only when ``positions`` is None,
            because in other batches the rounding of the encoder may give slightly different tokens.
        workers: number of processes that decode images; by default up to 4, as cores allow, and none
            for fewer than 256 images.
        reporter: its ``advance`` is given the number of images read, and its ``note`` a sentence for a damaged file of
            the cache.

    Raises: UsageError where a position is out of range, the manifest is of another source, or ``workers`` is negative;
    FastmemError where a worker process died.
    """
    whole = positions is None
    at = np.arange(len(manifest)) if positions is None else positions
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
