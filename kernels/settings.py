"""Launch settings: one table per architecture, no auto-tuning, so that a run can be repeated bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Tile of a matrix product and how it is run.

    rows, units: of the output tile; width: of one step along the inner dimension; group: row tiles that share a
    weight tile in the cache; warps, stages: of the program and of its software pipeline; descriptors: tiles are fetched
    by the copy engine (sm_90 and later) where rows start on 16-byte borders, instead of by every thread's own loads.
    """

    rows: int
    units: int
    width: int
    group: int
    warps: int
    stages: int
    descriptors: bool = False


@dataclass(frozen=True)
class Settings:
    """What one architecture runs with.

    matrix16, matrix32: tiles for 16-bit and float32 inputs; fused: element sizes in bytes for which the fused product
    is taken when the caller does not say; pass_rows, pass_units, pass_warps: tile of the separate pass over a finished
    product; reduce_units: units of a program that adds up partial sums; update_units, update_warps: units of a program
    that owns their statistics.
    """

    matrix16: Tile
    matrix32: Tile
    fused: tuple[int, ...] = ()
    pass_rows: int = 32
    pass_units: int = 128
    pass_warps: int = 4
    reduce_units: int = 256
    update_units: int = 128
    update_warps: int = 4


# every GPU from sm_80 on holds these tiles in its shared memory, the small ones (sm_86, sm_89: 99 KB) too
FALLBACK = Settings(matrix16=Tile(64, 128, 64, 8, 8, 3), matrix32=Tile(64, 64, 32, 8, 4, 3))
TABLE = {
    80: Settings(matrix16=Tile(128, 128, 64, 8, 8, 3), matrix32=Tile(64, 64, 32, 8, 4, 3)),
    90: Settings(matrix16=Tile(128, 128, 64, 8, 8, 3), matrix32=Tile(64, 64, 32, 8, 4, 3)),
    100: Settings(matrix16=Tile(128, 128, 64, 8, 8, 3), matrix32=Tile(64, 64, 32, 8, 4, 3)),
}


def architecture(device: torch.device) -> int:
    """Compute capability as one number (sm_90 is 90); 0 for a device that is not a CUDA GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def settings_for(arch: int) -> Settings:
    """The settings of an architecture, or the ones that fit every GPU."""
    return TABLE.get(arch, FALLBACK)
