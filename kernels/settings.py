"""Launch settings: one table per architecture, no auto-tuning, so that a run can be repeated bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# from here on nearly every tile of rows holds positions that somebody asked for
MANY_SEGMENTS = 4


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
class PassTile:
    """Tile of the separate pass over a finished product, and the warps of its program."""

    rows: int
    units: int
    warps: int


@dataclass(frozen=True)
class Settings:
    """What one architecture runs with.

    matrix16, matrix32: tiles for 16-bit and float32 inputs; fused: element sizes in bytes for which the fused product
    is taken when the caller does not say; pass_few, pass_many: tile of the separate pass for few segments and for
    ``MANY_SEGMENTS`` or more; reduce_units: units of a program that adds up partial sums; update_units, update_warps:
    units of a program that owns their statistics.
    """

    matrix16: Tile
    matrix32: Tile
    fused: tuple[int, ...] = ()
    pass_few: PassTile = PassTile(32, 128, 4)
    pass_many: PassTile = PassTile(32, 128, 4)
    reduce_units: int = 256
    update_units: int = 128
    update_warps: int = 4

    def pass_tile(self, segments: int) -> PassTile:
        """The tile of the separate pass for that many segments."""
        return self.pass_many if segments >= MANY_SEGMENTS else self.pass_few


# every GPU from sm_80 on holds these tiles in its shared memory, the small ones (sm_86, sm_89: 99 KB) too
FALLBACK = Settings(matrix16=Tile(64, 128, 64, 8, 8, 3), matrix32=Tile(64, 64, 32, 8, 4, 3))
TABLE = {
    80: Settings(matrix16=Tile(128, 128, 64, 8, 8, 3), matrix32=Tile(64, 64, 32, 8, 4, 3)),
    # measured once, on one H100 in bfloat16: with VAR-d16's ten scales this pass takes 0.381 ms in place of 0.442, with
    # RAR-B's last position 8 % more than the other
    90: Settings(
        matrix16=Tile(128, 128, 64, 8, 8, 3), matrix32=Tile(64, 64, 32, 8, 4, 3), pass_many=PassTile(64, 64, 4)
    ),
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
