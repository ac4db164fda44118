"""The table of units: one row per block, segment and unit, as parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmem.data.manifest import Manifest
from fastmem.files import write_table
from fastmem.ranking.gap import Gap
from fastmem.ranking.selection import highest, ranked_segments
from fastmem.stats import UnitStats


@dataclass(frozen=True)
class TopUnit:
    """A unit of the ranking: block and unit from 0, the segment of its highest UnitMem, its largest images' ids."""

    layer: int
    segment: str
    unit: int
    unitmem: float
    class_selectivity: float
    image_ids: tuple[int, ...]
    responses: tuple[float, ...]


def top_units(stats: UnitStats, count: int) -> list[TopUnit]:
    """The units of highest UnitMem, merged over segments by the maximum; ties by (layer, unit)."""
    segments = ranked_segments(stats)
    if not segments:
        return []
    best, which = stats.unitmem()[:, segments].max(1)
    selectivity = stats.class_selectivity()
    found = []
    layer_of, unit_of = highest(best, min(1.0, count / best.numel()), "global")
    for layer, unit in zip(layer_of.tolist(), unit_of.tolist(), strict=True):
        segment = segments[int(which[layer, unit])]
        kept = stats.top_image[layer, segment, unit] >= 0
        found.append(
            TopUnit(
                layer,
                stats.segments[segment],
                unit,
                float(best[layer, unit]),
                float(selectivity[layer, segment, unit]),
                tuple(stats.top_image[layer, segment, unit][kept].tolist()),
                tuple(stats.top_value[layer, segment, unit][kept].tolist()),
            )
        )
    return found


def names_by_id(manifest: Manifest) -> dict[int, str]:
    """Image names CLASS/NAME by id."""
    return dict(zip(manifest.ids.tolist(), manifest.names.tolist(), strict=True))


def write_unit_table(
    path: Path, stats: UnitStats, heldout: UnitStats | None, names: Mapping[int, str], gap: Gap | None = None
) -> None:
    """Write one row per (layer, segment, unit) with scores, moments and the largest images, whole or not at all.

    names: CLASS/NAME by image id.
    """
    import pyarrow

    layers, segments, units = stats.shape
    grid = torch.cartesian_prod(torch.arange(layers), torch.arange(segments), torch.arange(units))

    def flat(values: Tensor) -> np.ndarray:
        return values.flatten().numpy()

    images = stats.top_image.reshape(-1, stats.k).tolist()
    columns = {
        "layer": pyarrow.array(grid[:, 0].numpy().astype(np.int32)),
        "segment": pyarrow.DictionaryArray.from_arrays(grid[:, 1].numpy().astype(np.int32), list(stats.segments)),
        "unit": pyarrow.array(grid[:, 2].numpy().astype(np.int32)),
        "unitmem": flat(stats.unitmem()),
        "within_class_unitmem": flat(stats.within_class_unitmem()),
        "class_selectivity": flat(stats.class_selectivity()),
        "mean": flat(stats.mean),
        "variance": flat(stats.var),
        "view_variance": flat(stats.view_var),
        "top_images": [[i for i in row if i >= 0] for row in images],
        "top_names": [[names[i] for i in row if i >= 0] for row in images],
        "top_responses": [[v for v in row if v >= 0] for row in stats.top_value.reshape(-1, stats.k).tolist()],
    }
    if heldout is not None:
        columns["heldout_unitmem"] = flat(heldout.unitmem())
        columns["heldout_mean"] = flat(heldout.mean)
    if gap is not None:
        columns["gap"] = flat(gap.value)
        named = {"fold_mean": gap.fold_value, "low": gap.low, "high": gap.high, "p": gap.p_value, "q": gap.q_value}
        columns |= {f"gap_{name}": flat(values) for name, values in named.items()}
    write_table(path, columns)
