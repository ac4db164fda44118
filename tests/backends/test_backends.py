"""The operators of every backend that runs here against plain torch, and the choice between backends."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastmem import UsageError, score
from fastmem.backends import cpp, native, plain
from fastmem.backends.select import choose_backend
from fastmem.stats.accumulators import Fold
from tests.backends.conftest import assert_folds_close, make_batches, make_layer

CPU = torch.device("cpu")
FOUND = native.status()
needs_cpu = pytest.mark.skipif(not FOUND.cpu, reason=FOUND.reason)
needs_gpu = pytest.mark.skipif(
    not (FOUND.cuda and torch.cuda.is_available()), reason=FOUND.reason or "this machine has no CUDA GPU"
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).parents[2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# images, positions, width, units, spans
SIZES = {
    "one of each": (1, 1, 1, 1, [(0, 1)]),
    "odd": (3, 63, 33, 500, [(0, 63), (62, 63), (10, 20)]),
    "a panel and one": (2, 30, 16, 257, [(0, 1), (1, 5), (5, 14), (14, 30)]),
    "no images": (0, 7, 5, 9, [(0, 7)]),
}


def with_threads(counts, call):
    """The results of ``call`` under each number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
        return results
    finally:
        torch.set_num_threads(before)


@needs_cpu
@pytest.mark.parametrize("pre", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_cpp_fc1_response_equals_plain_torch_in_float64(size, gelu, pre):
    *shape, spans = size
    layer = make_layer(*shape)
    hidden, response = plain.fc1_response(*(t.double() for t in layer), spans, gelu, pre_activation=pre)
    found_hidden, found = cpp.fc1_response(*layer, spans, gelu, pre_activation=pre)
    torch.testing.assert_close(found_hidden.double(), hidden, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.double(), response.double(), rtol=2e-6, atol=2e-6)
    nothing, only = cpp.fc1_response(*layer, spans, gelu, pre_activation=pre, keep_hidden=False)
    assert nothing is None
    assert torch.equal(only, found)


@needs_cpu
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_cpp_gelu_keeps_its_digits_everywhere(gelu):
    x = torch.linspace(-20, 20, 400_001)
    found = x.clone().view(1, -1, 1)
    native.bias_gelu_response_(found, torch.zeros(1), [(0, 1)], gelu)
    expected = torch.nn.functional.gelu(x.double(), approximate=gelu)
    torch.testing.assert_close(found.flatten().double(), expected, rtol=1.5e-6, atol=1e-9)


@needs_cpu
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_cpp_gelu_of_extreme_values(gelu):
    x = torch.tensor([1e30, -1e30, 0.0, -0.0, 88.0, -88.0, torch.nan])
    found = x.clone().view(1, -1, 1)
    native.bias_gelu_response_(found, torch.zeros(1), [(0, 1)], gelu)
    expected = torch.tensor([1e30, 0.0, 0.0, 0.0, 88.0, 0.0, torch.nan])
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-6, equal_nan=True)


@needs_cpu
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_cpp_response_is_the_segment_mean_of_the_hidden_layer_bit_for_bit(gelu):
    *shape, spans = SIZES["odd"]
    hidden, response = cpp.fc1_response(*make_layer(*shape), spans, gelu)
    again = native.bias_gelu_response_(hidden.clone(), torch.zeros(hidden.shape[2]), spans, gelu, pre_activation=True)
    assert torch.equal(response, again)


@needs_cpu
@pytest.mark.parametrize("pre", [False, True], ids=["post", "pre"])
def test_cpp_response_has_the_same_bits_for_any_number_of_threads(pre):
    generator = torch.Generator().manual_seed(0)
    linear, bias = torch.randn(3, 258, 1025, generator=generator), torch.randn(1025, generator=generator)
    spans = [(0, 258), (257, 258)]

    def call():
        hidden = linear.clone()
        return hidden, native.bias_gelu_response_(hidden, bias, spans, "none", pre)

    first, *others = with_threads((1, 2, 3), call)
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@needs_cpu
def test_cpp_takes_16_bit_inputs_in_plain_torch():
    *shape, spans = SIZES["odd"]
    layer = [t.bfloat16() for t in make_layer(*shape)]
    for found, expected in zip(
        cpp.fc1_response(*layer, spans, "none"), plain.fc1_response(*layer, spans, "none"), strict=True
    ):
        assert torch.equal(found, expected)


@needs_cpu
@pytest.mark.parametrize(
    ("shape", "views", "k"),
    [((2, 3, 500), 10, 4), ((1, 1, 1), 1, 1), ((1, 1, 513), 3, 2), ((3, 1, 63), 1, 5)],
    ids=str,
)
def test_cpp_unit_update_equals_the_running_statistics(shape, views, k):
    fold, expected = Fold.zero(shape, k), Fold.zero(shape, k)
    for responses, ids in make_batches(shape, views):
        expected = expected.update(responses, ids)
        fold = fold.update_by(native.unit_update_, responses, ids)
    assert fold.moments.count == 9
    assert_folds_close(fold, expected)


@needs_cpu
def test_cpp_unit_update_has_the_same_bits_for_any_number_of_threads():
    def call():
        fold = Fold.zero((3, 2, 1025))
        for responses, ids in make_batches((3, 2, 1025), 2):
            fold = fold.update_by(native.unit_update_, responses, ids)
        return fold.moments.mean, fold.moments.m2, fold.view_total, fold.largest.value, fold.largest.image

    first, *others = with_threads((1, 2, 3), call)
    for other in others:
        assert all(map(torch.equal, first, other))


def make_matrices(dtype):
    """Matrices of odd and even widths, rows of each, and what torch makes of them at ``factor``."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(50, w, generator=generator, dtype=torch.float64).to(dtype) for w in (64, 63, 1, 1408, 8)]
    rows = [torch.randperm(50, generator=generator)[:n] for n in (7, 0, 50, 1, 20)]
    return weights, rows


@needs_cpu
@pytest.mark.parametrize("factor", [0.5, 0.3, -1.7])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_cpp_scale_rows_has_the_bits_of_torch(dtype, factor):
    weights, rows = make_matrices(dtype)
    expected = [w.clone() for w in weights]
    plain.scale_rows_(expected, rows, factor)
    assert not torch.equal(expected[0], weights[0])
    native.scale_rows_(weights, rows, factor)
    assert all(map(torch.equal, weights, expected))


@needs_cpu
def test_cpp_scale_rows_takes_more_matrices_than_one_launch():
    weights = [torch.full((3, 5), float(i)) for i in range(300)]
    native.scale_rows_(weights, [torch.tensor([i % 3]) for i in range(300)], 2.0)
    for i, weight in enumerate(weights):
        assert weight[i % 3].eq(2 * i).all()
        assert weight.sum() == 15 * i + 5 * i
    native.scale_rows_([], [], 2.0)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_cuda_scale_rows_has_the_bits_of_torch(dtype):
    weights, rows = make_matrices(dtype)
    weights = [w.cuda() for w in weights]
    expected = [w.clone() for w in weights]
    plain.scale_rows_(expected, rows, 0.3)
    native.scale_rows_(weights, rows, 0.3)
    assert all(map(torch.equal, weights, expected))


@pytest.fixture(scope="module")
def threads_library(tmp_path_factory):
    """The arithmetic of the CUDA kernel built for the CPU."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("threads") / "scale_rows.so"
    command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{Path(torch.__file__).parent / 'include'}", str(ROOT / "tests/native/scale_rows_threads.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True, timeout=60)
    return ctypes.CDLL(str(library)).scale_rows


@pytest.mark.parametrize("factor", [0.5, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_gpu_threads_of_scale_rows_give_the_bits_of_torch(threads_library, dtype, factor):
    weights, rows = make_matrices(dtype)
    expected = [w.clone() for w in weights]
    plain.scale_rows_(expected, rows, factor)
    count, every = len(weights), torch.cat(rows)
    threads_library(
        list(DTYPES.values()).index(dtype),
        (ctypes.c_void_p * count)(*(w.data_ptr() for w in weights)),
        (ctypes.c_int64 * count)(*(w.shape[1] for w in weights)),
        (ctypes.c_int64 * count)(*torch.tensor([len(r) for r in rows]).cumsum(0).tolist()),
        ctypes.c_int64(count),
        ctypes.c_void_p(every.data_ptr()),
        ctypes.c_int64(len(every)),
        ctypes.c_double(factor),
    )
    assert all(map(torch.equal, weights, expected))


LINEAR = torch.zeros(2, 4, 3)
STATE = [torch.zeros(3, dtype=torch.float64) for _ in range(3)]
TOP = [torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64)]
MATRIX = torch.zeros(4, 3)
BAD_OPERATOR_CALLS = {
    "bias type": (lambda: OPS.bias_gelu_response_(LINEAR, torch.zeros(3).double(), [0], [4], False, False), "bias as"),
    "bias size": (lambda: OPS.bias_gelu_response_(LINEAR, torch.zeros(2), [0], [4], False, False), "bias as"),
    "span": (lambda: OPS.bias_gelu_response_(LINEAR, torch.zeros(3), [0], [5], False, False), "stop <= 4"),
    "no view": (lambda: OPS.unit_update_(*STATE, *TOP, 0, torch.zeros(1, 0, 3), torch.zeros(1)), "at least one view"),
    "no largest": (
        lambda: OPS.unit_update_(*STATE, *(t[:, :0] for t in TOP), 0, torch.zeros(1, 1, 3), torch.zeros(1)),
        "room for at least one",
    ),
    "responses": (lambda: OPS.unit_update_(*STATE, *TOP, 0, torch.zeros(1, 1, 4), torch.zeros(1)), "response as"),
    "ids": (lambda: OPS.unit_update_(*STATE, *TOP, 0, torch.zeros(1, 1, 3), torch.zeros(1)), "image_ids as"),
    "no matrix": (lambda: OPS.scale_rows_([], torch.zeros(0).long(), [], 0.5), "CPU|at least one"),
    "stops": (lambda: OPS.scale_rows_([MATRIX], torch.tensor([0]), [2], 0.5), "stops that grow"),
    "rows left over": (lambda: OPS.scale_rows_([MATRIX], torch.tensor([0, 1]), [1], 0.5), "stops that end"),
    "row type": (lambda: OPS.scale_rows_([MATRIX], torch.tensor([0.0]), [1], 0.5), "int64 tensor"),
    "row outside": (lambda: OPS.scale_rows_([MATRIX], torch.tensor([4]), [1], 0.5), r"rows in 0..3"),
    "row twice": (lambda: OPS.scale_rows_([MATRIX], torch.tensor([1, 1]), [2], 0.5), "once, got one twice"),
    "matrix with gaps": (lambda: OPS.scale_rows_([MATRIX.T], torch.tensor([0]), [1], 0.5), "contiguous matrices"),
    "matrix type": (lambda: OPS.scale_rows_([MATRIX.long()], torch.tensor([0]), [1], 0.5), "expected float32"),
}
OPS = torch.ops.fastmem


@needs_cpu
@pytest.mark.parametrize(("call", "text"), BAD_OPERATOR_CALLS.values(), ids=BAD_OPERATOR_CALLS)
def test_operators_check_before_they_touch_memory(call, text):
    with pytest.raises((RuntimeError, NotImplementedError), match=text):
        call()


@needs_cpu
@pytest.mark.parametrize(
    ("linear", "bias", "spans", "text"),
    [
        (LINEAR.double(), torch.zeros(3), [(0, 4)], "float64"),
        (LINEAR, torch.zeros(2), [(0, 4)], r"float32 \[3\], got torch.float32 \[2\]"),
        (LINEAR, torch.zeros(3), [], "at least one"),
        (LINEAR, torch.zeros(3), [(3, 5)], r"got \(3, 5\)"),
        (LINEAR.to("meta"), torch.zeros(3), [(0, 4)], "on 'meta': there are only CPU ones"),
    ],
    ids=["dtype", "bias", "no span", "span", "device"],
)
def test_wrong_arguments_of_bias_gelu_response_are_usage_errors(linear, bias, spans, text):
    with pytest.raises(UsageError, match=text):
        native.bias_gelu_response_(linear, bias, spans, "none")


@needs_cpu
def test_operators_are_well_formed():
    x = torch.randn(2, 5, 7)
    torch.library.opcheck(OPS.bias_gelu_response_.default, (x, torch.randn(7), [0, 2], [5, 3], True, False))
    fold = Fold.zero((1, 1, 7))
    m, top = fold.moments, fold.largest
    state = (m.mean, m.m2, fold.view_total, top.value, top.image, 0, torch.rand(2, 3, 1, 1, 7), torch.arange(2))
    torch.library.opcheck(OPS.unit_update_.default, state)
    weights = [torch.randn(4, 3), torch.randn(2, 5)]
    torch.library.opcheck(OPS.scale_rows_.default, (weights, torch.tensor([3, 0, 1]), [1, 3], 0.5))


@needs_cpu
def test_compiled_calls_give_the_same_bits():
    *shape, spans = SIZES["odd"]
    layer = make_layer(*shape)
    compiled = torch.compile(lambda *a: cpp.fc1_response(*a, spans, "tanh"), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*layer), cpp.fc1_response(*layer, spans, "tanh")))


@pytest.mark.parametrize(
    "name", ["torch", pytest.param("cpp", marks=needs_cpu), pytest.param("triton", marks=needs_triton)]
)
@pytest.mark.parametrize("activation", ["post", "pre"])
def test_unitmem_is_the_plain_backends_on_every_backend_that_runs_here(toy_model, toy_source, name, activation):
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("the model is on the CPU, and the kernels run on the GPU here")
    options = {"views": 2, "segments": ["image", "last"], "activation": activation, "check_classes": False}
    found = score(toy_model, toy_source, backend=name, **options)
    expected = score(toy_model, toy_source, backend="torch", **options)
    assert found.backend == name
    for scores in ("unitmem", "within_class_unitmem", "class_selectivity"):
        torch.testing.assert_close(getattr(found.train, scores)(), getattr(expected.train, scores)(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.train.view_var, expected.train.view_var, rtol=1e-3, atol=1e-9)


def test_auto_takes_cpp_on_the_cpu_and_says_why_where_it_cannot(monkeypatch):
    if FOUND.cpu:
        chosen = choose_backend("auto", CPU)
        assert (chosen.name, chosen.missed) == ("cpp", "")
    monkeypatch.setattr(native, "_status", native.NativeStatus(False, False, "cmake was not found", ROOT))
    chosen = choose_backend("auto", CPU)
    assert (chosen.name, chosen.missed) == ("torch", "cmake was not found")


def test_a_missing_backend_is_told_before_the_pass(toy_model, toy_source, monkeypatch):
    from fastmem.reporter import Reporter

    monkeypatch.setattr(native, "_status", native.NativeStatus(False, False, "cmake was not found", ROOT))
    notes = []
    score(toy_model, toy_source, views="center", check_classes=False, reporter=Reporter(note=notes.append))
    assert notes[0] == "backend torch, because the faster one is missing: cmake was not found"


@pytest.mark.parametrize(
    ("name", "device", "text"),
    [
        ("gpu", "cpu", "expected a backend out of auto, torch, cpp, triton, got 'gpu'"),
        ("cpp", "cuda", "run the backend cpp, got none: it runs on the CPU, and the model is on cuda"),
        ("triton", "meta", "run the backend triton, got none: it runs on NVIDIA GPUs, and the model is on meta"),
    ],
)
def test_a_named_backend_that_cannot_run_is_an_error(name, device, text):
    with pytest.raises(UsageError, match=text):
        choose_backend(name, torch.device(device))


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="it runs on NVIDIA GPUs"):
        choose_backend("triton", CPU)


def test_triton_needs_a_gpu_of_our_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UsageError, match="compute capability 8.0 or newer"):
        choose_backend("triton", torch.device("cuda"))
    assert choose_backend("auto", torch.device("cuda")).missed.startswith("it needs a GPU of compute capability")


def test_a_triton_that_cannot_be_imported_is_told(monkeypatch):
    import sys

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "fastmem.kernels.fc1_response", None)
    with pytest.raises(UsageError, match="it cannot be imported: .*fc1_response"):
        choose_backend("triton", CPU)
