"""A table of what every Triton kernel needs of a GPU: ``python -m fastmem.kernels.resources [ARCHITECTURE ...]``.

The kernels are compiled ahead of time, without a GPU, for architectures such as ``90`` or for all that have launch
settings. The command fails where a kernel spills registers, or a 16-bit product does not use the architecture's matrix
instructions.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# an interpreted kernel cannot be compiled, and triton reads this when it is first imported
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
from fastmem.kernels.fc1_response import fused_launch, pass_launch, product_tile, reduce_launch  # noqa: E402
from fastmem.kernels.launch import Launch  # noqa: E402
from fastmem.kernels.segment_plan import plan_segments  # noqa: E402
from fastmem.kernels.settings import TABLE, Settings, settings_for  # noqa: E402
from fastmem.kernels.unit_update import update_launch  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

# the instruction a 16-bit product must use, as it stands in PTX
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
IMAGES, POSITIONS, WIDTH, UNITS = 2, 258, 768, 3072


class TargetDriver:
    """Stands in for the driver of a GPU that is not there, as far as compiling needs one."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # triton keeps what it compiled by device number: one for each target
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        name: the kernel and its variant.
        arch: the architecture's compute capability as one number.
        warps: warps of a program.
        registers: registers of a thread.
        shared: bytes of shared memory of a program.
        spilled: bytes of local memory of a thread, which hold registers that did not fit.
        instructions: matrix instructions in its PTX.
        is_product: it has to use matrix instructions.
    """

    name: str
    arch: int
    warps: int
    registers: int
    shared: int
    spilled: int
    instructions: tuple[str, ...]
    is_product: bool

    @property
    def problem(self) -> str:
        """Why this kernel must not be shipped; empty where it may be."""
        if self.spilled:
            return f"spills {self.spilled} bytes a thread"
        wanted = MATRIX_INSTRUCTION.get(self.arch)
        if self.is_product and wanted and wanted not in self.instructions:
            return f"does not use {wanted}"
        return ""


def cases(settings: Settings) -> Iterator[tuple[str, Launch, bool]]:
    """Every kernel and variant that is shipped: its name, its launch, and whether it is a product of 16-bit inputs."""
    device = torch.device("cpu")
    spans = ((0, POSITIONS), (POSITIONS - 1, POSITIONS))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        x = torch.empty(IMAGES, POSITIONS, WIDTH, dtype=dtype)
        weight, bias = torch.empty(UNITS, WIDTH, dtype=dtype), torch.empty(UNITS, dtype=dtype)
        linear = torch.empty(IMAGES, POSITIONS, UNITS, dtype=dtype)
        response = torch.empty(IMAGES, len(spans), UNITS)
        plan = plan_segments(IMAGES, POSITIONS, spans, product_tile(x, settings).rows, device)
        partial = torch.empty(plan.slots, UNITS)
        for gelu in ("none", "tanh"):
            for hidden in (linear, None):
                name = f"{short} {gelu} {'hidden' if hidden is not None else 'response only'}"
                fused = fused_launch(x, weight, bias, hidden, partial, plan, gelu, False, settings)
                yield f"fused {name}", fused, x.element_size() == 2
                for tile in dict.fromkeys((settings.pass_few, settings.pass_many)):
                    launch = pass_launch(linear, bias, hidden, partial, plan, gelu, False, tile)
                    yield f"pass {name} {tile.rows}x{tile.units}", launch, False
    yield "reduce", reduce_launch(partial, response, plan, settings), False
    state = [torch.empty(UNITS, dtype=torch.float64) for _ in range(3)]
    largest = torch.empty(UNITS, 4), torch.empty(UNITS, 4, dtype=torch.int64)
    ids = torch.empty(8, dtype=torch.int64)
    yield "update", update_launch(*state, *largest, 7, torch.empty(8, 10, UNITS), ids, settings), False


def measure(name: str, launch: Launch, arch: int, is_product: bool) -> Resources:
    """Compile a kernel for an architecture and read the compiler's report.

    Args:
        name: the kernel and its variant.
        launch: the launch to compile.
        arch: compute capability as one number, 90 for sm_90.
        is_product: it has to use matrix instructions.
    """
    driver.set_active(TargetDriver(arch))
    compiled = launch.compile()
    usage = _resource_usage(compiled.asm["cubin"])
    found = tuple(i for i in MATRIX_INSTRUCTION.values() if i in compiled.asm["ptx"])
    spilled = usage["STACK"] + usage["LOCAL"]
    warps = launch.constants["num_warps"]
    return Resources(name, arch, warps, usage["REG"], compiled.metadata.shared, spilled, found, is_product)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [_cuobjdump(), "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def _cuobjdump() -> str:
    tool: Any = knobs.nvidia.cuobjdump
    return tool.path


def main(arguments: list[str]) -> int:
    """Print the table for the named architectures, or for all; returns 1 where a kernel has a problem, else 0."""
    problems = 0
    print(f"{'kernel':<44}{'arch':>5}{'warps':>6}{'registers':>10}{'shared':>9}{'spilled':>8}  matrix instructions")
    for arch in [int(a) for a in arguments] or TABLE:
        for name, launch, is_product in cases(settings_for(arch)):
            r = measure(name, launch, arch, is_product)
            instructions = ", ".join(r.instructions) or "none"
            print(
                f"{r.name:<44}{r.arch:>5}{r.warps:>6}{r.registers:>10}{r.shared:>9}{r.spilled:>8}  {instructions}"
                + (f"  FAILED: {r.problem}" if r.problem else ""),
                flush=True,
            )
            problems += bool(r.problem)
    print(f"{problems} kernels with a problem" if problems else "no spills, and the matrix instructions are used")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
