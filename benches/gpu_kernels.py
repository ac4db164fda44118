"""Checks and times every GPU kernel: ``python benches/gpu_kernels.py`` on a machine with an NVIDIA GPU.

Needs torch, Triton and, for scale_rows_, nvcc; the package need not be installed. A kernel that fails its check is not
timed, and does not keep the others from running. Rows are added to benches/results/gpu_kernels.csv when all is green.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

# torch's deterministic mode needs it, and in that mode fills what it allocates with NaN, so that an element which no
# kernel wrote is seen
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402
import triton  # noqa: E402
from checkout import ROOT  # noqa: E402
from fastmem.kernels.fc1_response import fc1_response, pass_launch  # noqa: E402
from fastmem.kernels.segment_plan import plan_segments  # noqa: E402
from fastmem.kernels.settings import PassTile, Settings, Tile, architecture, settings_for  # noqa: E402
from fastmem.kernels.unit_update import unit_update_  # noqa: E402
from gpu_checks import (  # noqa: E402
    LAST,
    OVERLAPPING,
    ScaleRows,
    check_fc1_response,
    check_scale_rows,
    check_unit_update,
    make_layer,
    scale_spans,
)
from gpu_timing import copy_rate, median, product_rate, rotate, time_in_turn  # noqa: E402
from rows import append_row  # noqa: E402
from torch.nn import functional  # noqa: E402

from fastmem.backends import plain  # noqa: E402

VIEWS = 80
# name, positions, width, units, GELU, spans
LAYERS = (
    ("rar-b last", 258, 768, 3072, "none", LAST),
    ("rar-b image", 258, 768, 3072, "none", OVERLAPPING),
    ("rar-xxl last", 258, 1408, 6144, "none", LAST),
    ("var-d16 scales", 680, 1024, 4096, "tanh", scale_spans()),
    ("var-d30 scales", 680, 1920, 7680, "tanh", scale_spans()),
)
TILES = (
    Tile(128, 128, 64, 8, 8, 3),
    Tile(128, 128, 64, 8, 8, 4),
    Tile(128, 256, 64, 8, 8, 3),
    Tile(64, 128, 64, 8, 4, 4),
    Tile(128, 128, 64, 8, 8, 3, True),
    Tile(128, 128, 64, 8, 8, 4, True),
    Tile(128, 128, 64, 16, 8, 3, True),
    Tile(128, 128, 128, 8, 8, 2, True),
    Tile(128, 256, 64, 8, 8, 3, True),
    Tile(256, 128, 64, 8, 8, 3, True),
    Tile(64, 128, 64, 8, 4, 4, True),
)
PASSES = ((16, 128, 4), (32, 128, 4), (64, 128, 8), (32, 256, 8), (64, 64, 4), (16, 512, 8))
STARTED = time.monotonic()


class Report:
    """Lines, failures and rows as they come."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.rows: list[dict[str, object]] = []

    def section(self, name: str, run: Callable[[], object]) -> bool:
        """Run one part; what it raises is printed and remembered. Returns whether it went through."""
        print(f"\n== {name} ({time.monotonic() - STARTED:.0f} s)", flush=True)
        try:
            run()
            torch.cuda.synchronize()
        except Exception:
            traceback.print_exc()
            self.failures.append(name)
            return False
        return True

    def check(self, name: str, results: Iterable[tuple[str, bool]]) -> None:
        good = bad = 0
        for line, passed in results:
            good, bad = good + passed, bad + (not passed)
            # all that failed, and a few that did not
            if not passed or good % 12 == 1:
                print(f"  {'ok  ' if passed else 'FAIL'} {line}", flush=True)
        print(f"  {name}: {good} good, {bad} bad")
        if bad:
            raise AssertionError(f"{name}: {bad} checks failed")

    def time(self, kernel: str, shape: str, variant: str, ms: list[float], flops: float, moved: float) -> None:
        """One row: median time, rate and bytes, with their shares of the measured ceilings."""
        middle, low, high = median(ms), min(ms), max(ms)
        row = {
            "gpu": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "kernel": kernel,
            "shape": shape,
            "variant": variant,
            "ms": round(middle, 4),
            "ms_least": round(low, 4),
            "ms_most": round(high, 4),
            "gflop": round(flops / 1e9, 2),
            "mbyte": round(moved / 1e6, 2),
            "tflop_per_s": round(flops / middle / 1e9, 1),
            "gbyte_per_s": round(moved / middle / 1e6, 0),
            "copy_gbyte_per_s": round(self.copy / 1e9),
            "product_tflop_per_s": round(self.products.get(shape.split()[-1], 0) / 1e12),
        }
        self.rows.append(row)
        share = row["tflop_per_s"] / row["product_tflop_per_s"] if row["product_tflop_per_s"] else 0
        print(
            f"  {shape:<26}{variant:<34}{middle:9.3f} ms ({low:.3f}..{high:.3f}) {row['tflop_per_s']:7.1f} TFLOP/s "
            f"({share:4.0%}) {row['gbyte_per_s']:6.0f} GB/s ({moved / middle * 1e3 / self.copy:4.0%})",
            flush=True,
        )

    def measure_ceilings(self) -> None:
        self.copy = copy_rate()
        self.products = {str(d)[6:]: product_rate(d) for d in (torch.bfloat16, torch.float16, torch.float32)}
        print(f"  copy {self.copy / 1e9:.0f} GB/s read plus written; products in TFLOP/s: ", end="")
        print(", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in self.products.items()))


def by_descriptors() -> Settings:
    """This GPU's settings with 16-bit tiles fetched by the copy engine."""
    base = settings_for(architecture(torch.device("cuda")))
    return replace(base, matrix16=replace(base.matrix16, descriptors=True))


def time_fc1(report: Report, dtype: torch.dtype, descriptors: bool) -> None:
    """Every layer: the library's product alone, torch's expression, the pass, the fused kernel, response only."""
    for name, positions, width, units, gelu, spans in LAYERS:
        if dtype == torch.float32 and name not in ("rar-b last", "var-d16 scales"):
            continue
        _, weight, bias = make_layer(1, 1, width, units, dtype)
        inputs = rotate(lambda p=positions, w=width: torch.randn(VIEWS, p, w, device="cuda").to(dtype))

        def x(i: int, inputs=inputs) -> torch.Tensor:
            return inputs[i % len(inputs)]

        layer = (weight, bias, spans, gelu)
        calls = {
            "library product alone": lambda i, w=weight: functional.linear(x(i), w),
            "torch linear, gelu, abs, mean": lambda i, a=layer: plain.fc1_response(x(i), *a),
            "pass": lambda i, a=layer: fc1_response(x(i), *a, fused=False),
            "fused": lambda i, a=layer: fc1_response(x(i), *a, fused=True),
            "pass, response only": lambda i, a=layer: fc1_response(x(i), *a, fused=False, keep_hidden=False),
            "fused, response only": lambda i, a=layer: fc1_response(x(i), *a, fused=True, keep_hidden=False),
        }
        if descriptors:
            by_engine = by_descriptors()
            calls["fused, by descriptors"] = lambda i, a=layer, s=by_engine: fc1_response(
                x(i), *a, fused=True, settings=s
            )
        if gelu == "tanh":
            calls["library product with gelu, mean"] = lambda i, a=layer: plain.segment_abs_mean(
                torch._addmm_activation(a[1], x(i).flatten(0, 1), a[0].T, use_gelu=True).view(VIEWS, -1, len(a[0])),
                a[2],
            )
        rows, size = VIEWS * positions, torch.finfo(dtype).bits // 8
        flops = 2 * rows * units * width
        moved = size * (rows * width + units * width + rows * units)
        times = time_in_turn(calls)
        for variant, ms in times.items():
            report.time("fc1_response", f"{name} {str(dtype)[6:]}", variant, ms, flops, moved)
        base = median(times["library product alone"])
        ratios = ", ".join(f"{variant} {median(ms) / base:.3f}" for variant, ms in times.items())
        print(f"    over the product alone: {ratios}")


def sweep_tiles(report: Report) -> None:
    """Other settings for the tables, fused and pass, bfloat16."""
    base = settings_for(architecture(torch.device("cuda")))
    for name, positions, width, units, gelu, spans in (LAYERS[0], LAYERS[3]):
        x, weight, bias = make_layer(VIEWS, positions, width, units, torch.bfloat16)
        for tile in TILES:
            settings = replace(base, matrix16=tile)
            call = partial(fc1_response, x, weight, bias, spans, gelu, fused=True, settings=settings)
            _try_tile(f"{name} fused {tile}", call, 2 * VIEWS * positions * units * width)
        linear = torch.randn(VIEWS, positions, units, device="cuda", dtype=torch.bfloat16)
        for rows, width_, warps in PASSES:
            plan = plan_segments(VIEWS, positions, tuple(spans), rows, x.device)
            partial_sums = torch.empty(plan.slots, units, device="cuda")
            launch = pass_launch(linear, bias, linear, partial_sums, plan, gelu, False, PassTile(rows, width_, warps))
            _try_tile(f"{name} pass alone {rows}x{width_} {warps} warps", launch.run, 0, 2 * linear.nbytes)


def _try_tile(name: str, call: Callable[[], object], flops: float, moved: float = 0) -> None:
    try:
        ms = median(time_in_turn({"tile": lambda _: call()}, 10)["tile"])
        print(f"  {name}: {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s, {moved / ms / 1e6:.0f} GB/s", flush=True)
    except Exception as error:
        print(f"  {name}: {type(error).__name__} {str(error)[:120]}", flush=True)


def time_unit_update(report: Report) -> None:
    """A batch of 8 images with 10 views folded into the statistics of whole models."""
    from fastmem.stats.accumulators import Fold

    for name, shape in (("rar-xxl", (40, 2, 6144)), ("var-d30", (30, 10, 7680))):
        fold = Fold.zero(shape, device="cuda")
        m, top = fold.moments, fold.largest
        batches = rotate(lambda s=shape: torch.rand(8, 10, *s, device="cuda"))
        ids = torch.arange(8, device="cuda")

        def update(i: int, fold=fold, m=m, top=top, batches=batches, ids=ids) -> None:
            unit_update_(m.mean, m.m2, fold.view_total, top.value, top.image, 8 * i, batches[i % len(batches)], ids)

        def plain_update(i: int, fold=fold, batches=batches, ids=ids) -> Fold:
            return fold.update(batches[i % len(batches)], ids)

        units = m.mean.numel()
        moved = batches[0].nbytes + 2 * units * (24 + 12 * top.value.shape[-1])
        for variant, ms in time_in_turn({"triton": update, "torch": plain_update}).items():
            report.time("unit_update_", name, variant, ms, 0, moved)


def time_scale_rows(report: Report, scale_rows: ScaleRows) -> None:
    """Halving 5 or 10 % of all rows of a model, other rows in every round."""
    for name, layers, units, width, share in (("rar-xxl", 40, 6144, 1408, 0.05), ("var-d30", 30, 7680, 1920, 0.1)):
        weights = [torch.randn(units, width, device="cuda").to(torch.bfloat16) for _ in range(layers)]
        count = round(units * share)
        shuffled = torch.stack([torch.randperm(units, device="cuda") for _ in weights])
        stops = [count * (i + 1) for i in range(layers)]
        chosen = [shuffled[:, i * count : (i + 1) * count].contiguous() for i in range(8)]

        def scale(i: int, weights=weights, chosen=chosen, stops=stops) -> None:
            scale_rows(weights, chosen[i % 8].flatten(), stops, -1.0)

        def plain_scale(i: int, weights=weights, chosen=chosen) -> None:
            for weight, rows in zip(weights, chosen[i % 8], strict=True):
                weight[rows] *= -1.0

        moved = 2 * layers * count * width * 2
        for variant, ms in time_in_turn({"cuda": scale, "torch": plain_scale}).items():
            report.time("scale_rows_", name, variant, ms, 0, moved)


def print_resources() -> None:
    """The compiler's report for this GPU, from a process of its own: it replaces Triton's driver."""
    code = "import sys, checkout; from fastmem.kernels.resources import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(architecture(torch.device("cuda")))]
    subprocess.run(command, cwd=ROOT / "benches", check=True)


def main() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("expected an NVIDIA GPU, got none: run this on a machine with one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    report = Report()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    has_copy_engine = architecture(torch.device("cuda")) >= 90
    checked = {
        "fc1_response": report.section("check fc1_response", lambda: report.check("fc1", check_fc1_response())),
        "descriptors": has_copy_engine
        and report.section(
            "check fc1_response by descriptors",
            lambda: report.check("descriptors", check_fc1_response(by_descriptors(), (torch.bfloat16, torch.float16))),
        ),
        "unit_update_": report.section("check unit_update_", lambda: report.check("update", check_unit_update())),
    }
    with tempfile.TemporaryDirectory() as folder:
        kernels: list[ScaleRows] = []
        built = report.section("build scale_rows_", lambda: kernels.append(ScaleRows(Path(folder))))
        checked["scale_rows_"] = built and report.section(
            "check scale_rows_", lambda: report.check("scale", check_scale_rows(kernels[0]))
        )
        # filling with NaN would be timed too
        torch.use_deterministic_algorithms(False)
        report.section("ceilings", report.measure_ceilings)
        if checked["fc1_response"]:
            report.section(
                "time fc1_response, bfloat16", lambda: time_fc1(report, torch.bfloat16, checked["descriptors"])
            )
            report.section("settings", lambda: sweep_tiles(report))
            report.section("time fc1_response, float32", lambda: time_fc1(report, torch.float32, False))
        if checked["unit_update_"]:
            report.section("time unit_update_", lambda: time_unit_update(report))
        if checked["scale_rows_"]:
            report.section("time scale_rows_", lambda: time_scale_rows(report, kernels[0]))
    report.section("what the compiler says", print_resources)
    if report.failures:
        print(f"\nFAILED: {', '.join(report.failures)}; no rows written")
        return 1
    for row in report.rows:
        path = append_row("gpu_kernels", row)
    print(f"\nall green after {time.monotonic() - STARTED:.0f} s; {len(report.rows)} rows added to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
