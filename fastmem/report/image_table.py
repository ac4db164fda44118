"""The table of images: one row per training and held-out image, as parquet."""

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
    """Write id, set, class, label, name and fold of every image, its losses where kept, and the units it owns.

    manifests, losses: by set, "train" first; owned: for each ranking the selected units that each training image owns,
    int [N]; empty for held-out images.
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
