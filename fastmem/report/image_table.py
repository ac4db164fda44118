"""Write the table of images, a parquet file with one row for every training and held-out image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.files import write_table
from fastmem.scoring.image_losses import ImageLosses


def write_image_table(
    path: Path,
    manifests: Mapping[str, Manifest],
    losses: Mapping[str, ImageLosses | None],
    owned: Mapping[str, np.ndarray],
) -> None:
    """Write id, set, class, label, name and fold of every image, its losses, and the number of units that it owns.

    Args:
        path: the parquet file to write.
        manifests: images by set, "train" first.
        losses: losses of the images by set; None where they were not saved.
        owned: for each ranking, the number of top units that each training image owns, int64 [N] in manifest order;
            the column is null for held-out images.

    Raises: UsageError where the file cannot be written.
    """
    import pyarrow

    tables = []
    for split, manifest in manifests.items():
        count = len(manifest)
        columns = {
            "id": pyarrow.array(manifest.ids),
            "set": pyarrow.array([split] * count),
            "class": pyarrow.array([manifest.classes[label] for label in manifest.labels]),
            "label": pyarrow.array(manifest.labels),
            "name": pyarrow.array(manifest.names.tolist(), pyarrow.string()),
            "fold": pyarrow.array(manifest.fold),
        }
        kept = losses.get(split)
        if kept is not None:
            columns |= {"loss": kept.loss, "candidate_hits": kept.hits}
            if kept.unconditional is not None:
                columns["unconditional_loss"] = kept.unconditional
        for ranking, units in owned.items():
            name = f"owned_by_{ranking.replace('-', '_')}"
            columns[name] = pyarrow.array(units if split == "train" else [None] * count, pyarrow.int64())
        tables.append(pyarrow.table(columns))
    write_table(path, pyarrow.concat_tables(tables))
