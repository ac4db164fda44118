"""Write the table of units, a parquet file with one row for every block, segment and unit, and find the top units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """A unit among those of highest UnitMem.

    Attributes:
        layer: block of the unit, from 0.
        segment: name of the segment in which its UnitMem is highest.
        unit: position of the unit in its block, from 0.
        unitmem: UnitMem in that segment.
        class_selectivity: class selectivity in that segment; None where there is one class.
        image_ids: ids of the images with the largest responses, largest first.
        responses: responses to these images.
    """

    layer: int
    segment: str
    unit: int
    unitmem: float
    class_selectivity: float | None
    image_ids: tuple[int, ...]
    responses: tuple[float, ...]


def top_units(stats: UnitStats, count: int) -> list[TopUnit]:
    """Return the ``count`` units of highest UnitMem, highest first; the highest value over the segments counts.

    There are none of fewer than two images. Of units with equal values, the one in the lower layer or at the lower
    position comes first.
    """
    segments = ranked_segments(stats)
    if not segments or "unitmem" in stats.undefined:
        return []
    best, which = stats.unitmem()[:, segments].max(1)
    selectivity = None if "class-selectivity" in stats.undefined else stats.class_selectivity()
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
                None if selectivity is None else float(selectivity[layer, segment, unit]),
                tuple(stats.top_image[layer, segment, unit][kept].tolist()),
                tuple(stats.top_value[layer, segment, unit][kept].tolist()),
            )
        )
    return found


def names_by_id(manifest: Manifest) -> dict[int, str]:
    """Return the image names ``class/name`` by id."""
    return dict(zip(manifest.ids.tolist(), manifest.names.tolist(), strict=True))


def write_unit_table(
    path: Path, stats: UnitStats, heldout: UnitStats | None, names: Mapping[int, str], gap: Gap | None = None
) -> None:
    """Write one row for every layer, segment and unit, with its scores, moments and images of largest response.

    Scores that the images do not have, such as UnitMem of one image, are null.

    Args:
        path: the parquet file to write.
        stats: statistics of the training images.
        heldout: statistics of the held-out images, for columns of their own; None where there are none.
        names: ``class/name`` of the training images by id.
        gap: difference in UnitMem between training and held-out images; None leaves out its columns.

    Raises: UsageError where the file cannot be written.
    """
    import pyarrow

    layers, segments, units = stats.shape
    grid = torch.cartesian_prod(torch.arange(layers), torch.arange(segments), torch.arange(units))

    def flat(values: Tensor) -> np.ndarray:
        return values.flatten().numpy()

    def defined(of: UnitStats, score: str, values: Callable[[], Tensor]) -> Any:
        nothing = pyarrow.nulls(len(grid), pyarrow.float64())
        return nothing if score in of.undefined else flat(values())

    images = stats.top_image.reshape(-1, stats.k).tolist()
    columns = {
        "layer": pyarrow.array(grid[:, 0].numpy().astype(np.int32)),
        "segment": pyarrow.DictionaryArray.from_arrays(grid[:, 1].numpy().astype(np.int32), list(stats.segments)),
        "unit": pyarrow.array(grid[:, 2].numpy().astype(np.int32)),
        "unitmem": defined(stats, "unitmem", stats.unitmem),
        "within_class_unitmem": defined(stats, "within-class", stats.within_class_unitmem),
        "class_selectivity": defined(stats, "class-selectivity", stats.class_selectivity),
        "mean": flat(stats.mean),
        "variance": flat(stats.var),
        "view_variance": flat(stats.view_var),
        "top_images": [[i for i in row if i >= 0] for row in images],
        "top_names": [[names[i] for i in row if i >= 0] for row in images],
        "top_responses": [[v for v in row if v >= 0] for row in stats.top_value.reshape(-1, stats.k).tolist()],
    }
    if heldout is not None:
        columns["heldout_unitmem"] = defined(heldout, "unitmem", heldout.unitmem)
        columns["heldout_mean"] = flat(heldout.mean)
    if gap is not None:
        columns["gap"] = flat(gap.value)
        named = {"fold_mean": gap.fold_value, "low": gap.low, "high": gap.high, "p": gap.p_value, "q": gap.q_value}
        columns |= {f"gap_{name}": flat(values) for name, values in named.items()}
    write_table(path, columns)
