import json
from pathlib import Path

import pytest
import torch

from fastmem.backends import native
from fastmem.errors import UsageError

FOUND = native.status()

needs_cpu = pytest.mark.skipif(not FOUND.cpu, reason=FOUND.reason)

SPANS = {
    "whole": lambda positions: [(0, positions)],
    "first and last": lambda positions: [(0, 1), (positions - 1, positions)],
    "overlapping": lambda positions: [(0, (positions + 1) // 2), (0, positions), (positions // 2, positions)],
    "every position": lambda positions: [(start, start + 1) for start in range(positions)],
}


def make_hidden(images: int, positions: int, units: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(positions * 1000 + units)
    return torch.randn(images, positions, units, generator=generator)


def segment_means(hidden: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """The operator's means of hidden itself: taken before the GELU, under a bias of 0; it works in place on a copy."""
    linear = hidden.clone(memory_format=torch.preserve_format)
    return native.bias_gelu_response_(linear, torch.zeros(hidden.shape[-1:]), spans, "none", pre_activation=True)


def plain_segment_abs_mean(hidden: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    return torch.stack([hidden[:, start:stop].double().abs().mean(dim=1) for start, stop in spans], dim=1)


@needs_cpu
@pytest.mark.parametrize("make_spans", SPANS.values(), ids=SPANS.keys())
@pytest.mark.parametrize(
    ("images", "positions", "units"),
    [(1, 1, 1), (3, 63, 500), (2, 258, 513), (5, 2, 63), (1, 680, 1), (0, 7, 5), (2, 7, 0), (1, 200, 1025)],
    ids=str,
)
def test_equals_plain_torch(images, positions, units, make_spans):
    hidden, spans = make_hidden(images, positions, units), make_spans(positions)
    got = segment_means(hidden, spans)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), plain_segment_abs_mean(hidden, spans), rtol=1e-6, atol=0)


@needs_cpu
def test_sums_every_group_of_four_and_what_is_left_over():
    hidden = -torch.arange(1, 12, dtype=torch.float32).reshape(1, 11, 1)
    got = segment_means(hidden, [(0, stop) for stop in range(1, 12)])
    assert got.flatten().tolist() == [(stop + 1) / 2 for stop in range(1, 12)]


@needs_cpu
def test_same_bits_for_any_number_of_threads():
    hidden, spans = make_hidden(3, 258, 2050), [(0, 258), (1, 200), (257, 258)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(segment_means(hidden, spans))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_cpu
def test_touches_only_the_contiguous_slice_that_it_was_given():
    hidden = torch.full((4, 5, 3), float("nan"))
    hidden[1:3] = 2.0
    means = native.bias_gelu_response_(hidden[1:3], torch.zeros(3), [(0, 5)], "none", pre_activation=True)
    assert means.unique().tolist() == [2.0]
    assert hidden[[0, 3]].isnan().all()
    assert hidden[1:3].isfinite().all()


@needs_cpu
@pytest.mark.parametrize(
    ("hidden", "spans", "text"),
    [
        (torch.zeros(2, 4, 3, dtype=torch.float64), [(0, 4)], "float64"),
        (torch.zeros(4, 3), [(0, 4)], r"\[4, 3\]"),
        (torch.zeros(2, 3, 4).transpose(1, 2), [(0, 4)], "contiguous"),
        (torch.zeros(2, 4, 3), [], "at least one"),
        (torch.zeros(2, 4, 3), [(0, 5)], r"stop <= 4, got \(0, 5\)"),
        (torch.zeros(2, 4, 3), [(2, 2)], r"got \(2, 2\)"),
        (torch.zeros(2, 4, 3), [(0, 1), (-1, 2)], r"got \(-1, 2\)"),
        (torch.zeros(2, 4, 3, device="meta"), [(0, 4)], "only CPU ones"),
    ],
    ids=["dtype", "dimensions", "strides", "no span", "past the end", "empty span", "negative", "device"],
)
def test_wrong_argument_is_a_usage_error(hidden, spans, text):
    with pytest.raises(UsageError, match=text):
        segment_means(hidden, spans)


@needs_cpu
@pytest.mark.parametrize(
    ("hidden", "starts", "stops", "text"),
    [
        (torch.zeros(2, 4, 3, dtype=torch.float16), [0], [4], "dtype float32"),
        (torch.zeros(4, 3), [0], [4], "got 2 dimensions"),
        (torch.zeros(2, 3, 4).transpose(1, 2), [0], [4], "contiguous"),
        (torch.zeros(2, 4, 3), [], [], "at least one"),
        (torch.zeros(2, 4, 3), [0, 1], [4], "2 starts and 1 stops"),
        (torch.zeros(2, 4, 3), [0, 1], [4, 2**40], "for segment 1"),
    ],
    ids=["dtype", "dimensions", "strides", "no span", "lengths", "past the end"],
)
def test_operator_checks_before_it_touches_memory(hidden, starts, stops, text):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.fastmem.bias_gelu_response_(hidden, torch.zeros(3), starts, stops, False, False)


def test_empty_folder_is_a_status_with_a_reason(tmp_path):
    found = native.load(tmp_path)
    assert (found.cpu, found.cuda, found.folder) == (False, False, tmp_path)
    assert "not built: run pip install --no-build-isolation" in found.reason


def test_reason_of_the_build_is_told(tmp_path):
    (tmp_path / native.RECORD).write_text(json.dumps({"torch": "2.13.0", "cpu": "cmake was not found", "cuda": ""}))
    assert "cmake was not found" in native.load(tmp_path).reason


def test_damaged_record_and_library_are_a_status_with_a_reason(tmp_path):
    (tmp_path / native.RECORD).write_text("{")
    (tmp_path / "_fastmem_cpu.so").write_bytes(b"not a library")
    found = native.load(tmp_path)
    assert not found.cpu
    assert "does not load into torch" in found.reason


@needs_cpu
def test_missing_cuda_library_leaves_the_cpu_one(tmp_path):
    (tmp_path / "_fastmem_cpu.so").symlink_to(FOUND.folder / "_fastmem_cpu.so")
    (tmp_path / native.RECORD).write_text(json.dumps({"cuda": "nvcc was not found"}))
    found = native.load(tmp_path)
    assert (found.cpu, found.cuda) == (True, False)
    assert "nvcc was not found" in found.reason


def test_call_without_library_is_a_usage_error_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_status", native.NativeStatus(False, False, "cmake was not found", Path(tmp_path)))
    with pytest.raises(UsageError, match="cmake was not found; choose another backend"):
        segment_means(torch.zeros(1, 2, 3), [(0, 2)])
