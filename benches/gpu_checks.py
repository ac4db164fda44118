"""Every kernel against float64 on the GPU, with outputs that start as NaN; each check returns the errors it found."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from checkout import ROOT
from fastmem.kernels.fc1_response import fc1_response
from fastmem.kernels.settings import Settings
from fastmem.kernels.unit_update import unit_update_
from torch import Tensor

from fastmem.backends import plain

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
LAST = ((257, 258), (256, 257))
OVERLAPPING = ((2, 258), (257, 258), (0, 2))
# relative error allowed of hidden, of the fused response and of the response of the separate pass: in float32 the
# rounding of about 2,000 additions, in 16 bits of one value, which the fused response never is
ALLOWED = {
    torch.float32: (4e-6, 4e-6, 4e-6),
    torch.bfloat16: (4e-3, 1e-5, 4e-3),
    torch.float16: (5e-4, 1e-5, 5e-4),
}
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def scale_spans() -> tuple[tuple[int, int], ...]:
    """VAR's segments: one span of positions for each scale."""
    stops = [sum(n * n for n in SCALES[: i + 1]) for i in range(len(SCALES))]
    return tuple(zip([0, *stops], stops, strict=False))


def make_layer(images: int, positions: int, width: int, units: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random x, weight and bias on the GPU."""
    x = torch.randn(images, positions, width, device="cuda").to(dtype)
    weight = (torch.randn(units, width, device="cuda") / width**0.5).to(dtype)
    return x, weight, torch.randn(units, device="cuda").to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected).norm() / expected.norm()
    return float(difference) if torch.isfinite(found).all() else float("nan")


def check_fc1_response(
    settings: Settings | None = None, dtypes: Sequence[torch.dtype] = tuple(ALLOWED)
) -> Iterator[tuple[str, bool]]:
    """One line and verdict for every size, type, GELU and path; with settings of its own only the fused one."""
    sizes = [(3, 258, 768, 3072, LAST), (2, 258, 1408, 6144, OVERLAPPING), (2, 680, 1024, 4096, scale_spans())]
    sizes += [(5, 63, 129, 500, ((0, 63), (62, 63), (7, 40))), (1, 1, 5, 3, ((0, 1),))]
    for images, positions, width, units, spans in sizes:
        for dtype in dtypes:
            hidden_limit, fused_limit, pass_limit = ALLOWED[dtype]
            layer = make_layer(images, positions, width, units, dtype)
            for gelu in ("none", "tanh"):
                # one size is enough for the other response, and every variant costs a compilation
                for pre in (False, True) if units == 500 else (False,):
                    doubles = (t.double() for t in layer)
                    hidden, response = plain.fc1_response(*doubles, spans, gelu, pre_activation=pre)
                    for fused in (True,) if settings else (True, False):
                        options = {"pre_activation": pre, "fused": fused, "settings": settings}
                        got_hidden, got = fc1_response(*layer, spans, gelu, **options)
                        again_hidden, again = fc1_response(*layer, spans, gelu, **options)
                        _, only = fc1_response(*layer, spans, gelu, **options, keep_hidden=False)
                        errors = relative_error(got_hidden, hidden), relative_error(got, response)
                        same = torch.equal(got, again) and torch.equal(got_hidden, again_hidden)
                        limit = fused_limit if fused else pass_limit
                        good = errors[0] <= hidden_limit and errors[1] <= limit and same
                        good = good and relative_error(only, response) <= limit
                        yield (
                            f"fc1_response {images}x{positions}x{width}->{units} {str(dtype)[6:]} {gelu} "
                            f"{'pre' if pre else 'post'} {'fused' if fused else 'pass'}: hidden {errors[0]:.1e} "
                            f"response {errors[1]:.1e} repeatable {same}",
                            good,
                        )


def check_unit_update() -> Iterator[tuple[str, bool]]:
    """Three batches folded one after the other, against all images at once in float64."""
    for units, views, k in ((1, 1, 1), (500, 3, 4), (147456, 10, 4), (4097, 2, 3)):
        state = [torch.zeros(units, dtype=torch.float64, device="cuda") for _ in range(3)]
        value = torch.full((units, k), -torch.inf, device="cuda")
        image = torch.full((units, k), -1, dtype=torch.int64, device="cuda")
        batches, count = [], 0
        for images in (5, 1, 8):
            # few distinct values, so that equal responses of different images occur
            batch = torch.randint(0, 50, (images, views, units), device="cuda").float() / 7
            ids = torch.randperm(2**20, device="cuda")[:images] + 2**45
            unit_update_(*state, value, image, count, batch, ids)
            count += images
            batches.append((batch, ids))
        every = torch.cat([batch for batch, _ in batches]).double()
        ids = torch.cat([ids for _, ids in batches])
        per_image = every.mean(1).float()
        by_id = ids.argsort()
        order = per_image[by_id].argsort(dim=0, descending=True, stable=True)[:k].T
        deviations = per_image.double() - per_image.double().mean(0)
        expected = per_image.double().mean(0), deviations.square().sum(0), every.var(1, correction=0).sum(0)
        errors = [float((a - b).abs().max()) for a, b in zip(state, expected, strict=True)]
        found_ids = ids[by_id][order]
        wrong = int((image != found_ids).sum()), int((value != per_image[by_id].T.gather(1, order)).sum())
        good = max(errors) <= 1e-11 and wrong[1] <= units // 10000 and wrong[0] <= units // 10000
        text = " ".join(f"{e:.1e}" for e in errors)
        yield (
            f"unit_update_ {units} units, {views} views, k {k}: mean, m2, view {text}; wrong ids, values {wrong}",
            good,
        )


class ScaleRows:
    """The CUDA kernel of scale_rows_, built with nvcc as a plain library and called through its C entry point."""

    def __init__(self, folder: Path) -> None:
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        major, minor = torch.cuda.get_device_capability()
        target = folder / "scale_rows.so"
        includes = [f"-I{Path(torch.__file__).parent / 'include'}"]
        command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}", *includes]
        command += [str(ROOT / "benches" / "scale_rows_entry.cu"), "-o", str(target)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{built.stderr[-3000:]}")
        self.call = ctypes.CDLL(str(target)).fastmem_scale_rows

    def __call__(self, weights: list[Tensor], rows: Tensor, stops: list[int], factor: float) -> None:
        """rows: int64 on the GPU, those of the first matrix first; stops: their ends for each matrix."""
        count = len(weights)
        table = (ctypes.c_void_p * count)(*(w.data_ptr() for w in weights))
        widths = (ctypes.c_int64 * count)(*(w.shape[1] for w in weights))
        error = self.call(
            DTYPE_NUMBERS[weights[0].dtype],
            table,
            widths,
            (ctypes.c_int64 * count)(*stops),
            ctypes.c_int64(count),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int64(len(rows)),
            ctypes.c_double(factor),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if error:
            raise RuntimeError(f"scale_rows_ could not be launched: CUDA error {error}")


def check_scale_rows(scale_rows: ScaleRows) -> Iterator[tuple[str, bool]]:
    """Bit for bit what ``w[rows] *= factor`` gives, rows of odd widths and untouched rows included."""
    for dtype in DTYPE_NUMBERS:
        for factor in (0.5, 0.3, -1.7):
            widths = (64, 63, 1408, 1920, 1, 769)
            weights = [torch.randn(101, w, device="cuda", dtype=torch.float64).to(dtype) for w in widths]
            rows = [torch.randperm(101, device="cuda")[:n] for n in (7, 0, 101, 1, 50, 33)]
            expected = [w.clone() for w in weights]
            for weight, chosen in zip(expected, rows, strict=True):
                weight[chosen] *= factor
            stops = torch.tensor([len(r) for r in rows]).cumsum(0).tolist()
            scale_rows(weights, torch.cat(rows), stops, factor)
            wrong = sum(int((a != b).sum()) for a, b in zip(weights, expected, strict=True))
            yield f"scale_rows_ {str(dtype)[6:]} factor {factor}: {wrong} values differ", wrong == 0
