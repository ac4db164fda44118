"""Launch settings in a table by GPU architecture; nothing is auto-tuned, so a run can be repeated bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# from here on nearly every tile of rows holds positions that somebody asked for
MANY_SEGMENTS = 4


@dataclass(frozen=True)
class Tile:
    """Tile of a matrix product and how it is computed.

    Attributes:
        rows: rows of the output tile.
        units: units of the output tile, its columns.
        width: numbers of one step along the inner dimension.
        group: row tiles that share a weight tile in the cache.
        warps: warps of the program that computes the tile.
        stages: steps whose inputs are loaded ahead.
        descriptors: inputs are fetched by the copy engine (sm_90 and later) where rows start on 16-byte borders, in
            place of each thread's own loads.
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
    """Tile of the separate pass over a finished product: its rows, its units, and the warps of its program."""

    rows: int
    units: int
    warps: int


@dataclass(frozen=True)
class Settings:
    """Launch settings of one architecture.

    Attributes:
        matrix16: tile of the matrix product for 16-bit inputs.
        matrix32: tile of the matrix product for float32 inputs.
        fused: element sizes in bytes for which the fused product is taken by default.
        pass_few: tile of the separate pass for fewer than ``MANY_SEGMENTS`` segments.
        pass_many: tile of the separate pass for ``MANY_SEGMENTS`` segments or more.
        reduce_units: units of a program that adds up partial sums.
        update_units: units of a program that updates their statistics.
        update_warps: warps of that program.
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
    """The settings of an architecture, or those that fit every GPU where the table has none for it."""
    return TABLE.get(arch, FALLBACK)
