"""The Triton kernels against plain torch: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from fastmem.backends import plain
from fastmem.stats.accumulators import Fold
from tests.backends.conftest import assert_folds_close, make_batches
from tests.backends.conftest import make_layer as make_cpu_layer

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from fastmem.kernels import settings as table
from fastmem.kernels.fc1_response import fc1_response, fused_launch, pass_launch, reduce_launch
from fastmem.kernels.segment_plan import plan_segments
from fastmem.kernels.settings import FALLBACK, MANY_SEGMENTS, PassTile, Tile
from fastmem.kernels.unit_update import unit_update_, update_launch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="this machine has no CUDA GPU")

# small tiles, so that small tensors have several of them and cut ones
SMALL = replace(
    FALLBACK,
    matrix16=Tile(32, 64, 32, 2, 4, 2),
    matrix32=Tile(32, 64, 32, 2, 4, 2),
    pass_few=PassTile(16, 64, 4),
    pass_many=PassTile(8, 32, 2),
    reduce_units=64,
    update_units=32,
)
BY_DESCRIPTORS = replace(SMALL, matrix16=Tile(32, 64, 32, 2, 4, 2, True), matrix32=Tile(32, 64, 32, 2, 4, 2, True))
# images, positions, width, units, spans
SIZES = {
    "one of each": (1, 1, 1, 1, [(0, 1)]),
    "odd": (3, 37, 65, 130, [(0, 37), (36, 37), (10, 20)]),
    "whole tiles": (2, 32, 64, 64, [(0, 32), (0, 16)]),
    "one position in many": (2, 63, 33, 70, [(62, 63), (61, 62)]),
    "scales": (2, 30, 16, 65, [(0, 1), (1, 5), (5, 14), (14, 30)]),
}


def make_layer(*sizes, dtype=torch.float32):
    return tuple(t.to(DEVICE, dtype) for t in make_cpu_layer(*sizes))


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def filled_memory():
    """New tensors start as NaN, so an element that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("pre", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "pass"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_fc1_response_equals_plain_torch_in_float64(size, fused, gelu, pre):
    *shape, spans = size
    layer = make_layer(*shape)
    hidden, response = plain.fc1_response(*(t.double() for t in layer), spans, gelu, pre_activation=pre)
    options = {"pre_activation": pre, "fused": fused, "settings": SMALL}
    found_hidden, found = fc1_response(*layer, spans, gelu, **options)
    assert (found_hidden.dtype, found.dtype) == (torch.float32, torch.float32)
    assert_close(found_hidden, hidden, 5e-6)
    assert_close(found, response.double(), 5e-6)
    nothing, only = fc1_response(*layer, spans, gelu, **options, keep_hidden=False)
    assert nothing is None
    assert torch.equal(only, found)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("width", [16, 36, 33], ids=["whole", "cut", "rows off the border"])
@pytest.mark.skipif(HAS_GPU and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no copy engine")
def test_tiles_fetched_by_descriptor_give_the_same(width):
    layer, spans = make_layer(3, 37, width, 130), SIZES["odd"][-1]
    by_loads = fc1_response(*layer, spans, "tanh", fused=True, settings=SMALL)
    found = fc1_response(*layer, spans, "tanh", fused=True, settings=BY_DESCRIPTORS)
    assert all(map(torch.equal, found, by_loads))


# the interpreter multiplies bfloat16 by its raw bits and truncates where hardware rounds: only the pass, with twice
# the tolerance, can be tested there
HALVES = [
    pytest.param(torch.float16, True, 1e-3, 2e-6, id="float16 fused"),
    pytest.param(torch.float16, False, 2e-3, 1e-3, id="float16 pass"),
    pytest.param(torch.bfloat16, False, 1.6e-2, 8e-3, id="bfloat16 pass"),
    pytest.param(torch.bfloat16, True, 8e-3, 2e-6, id="bfloat16 fused", marks=needs_gpu),
]


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize(("dtype", "fused", "hidden_tolerance", "tolerance"), HALVES)
def test_fc1_response_in_16_bits_sums_in_float32(dtype, fused, hidden_tolerance, tolerance):
    *shape, spans = SIZES["odd"]
    layer = make_layer(*shape, dtype=dtype)
    hidden, response = plain.fc1_response(*(t.double() for t in layer), spans, "none")
    found_hidden, found = fc1_response(*layer, spans, "none", fused=fused, settings=SMALL)
    assert found_hidden.dtype == dtype
    assert_close(found_hidden, hidden, hidden_tolerance)
    assert_close(found, response.double(), tolerance)


@pytest.mark.parametrize("settings", [FALLBACK, *table.TABLE.values()], ids=["fallback", *map(str, table.TABLE)])
def test_settings_of_every_architecture_give_the_same(settings):
    layer, few = make_layer(2, 70, 40, 90), [(0, 70), (69, 70)]
    many = [(0, 1), (1, 20), (20, 69), (69, 70)]
    for fused, spans in ((True, few), (False, few), (False, many)):
        _, expected = plain.fc1_response(*(t.double() for t in layer), spans, "tanh")
        assert_close(fc1_response(*layer, spans, "tanh", fused=fused, settings=settings)[1], expected.double(), 5e-6)


def test_many_segments_have_a_tile_of_their_own():
    assert [SMALL.pass_tile(n) for n in (1, MANY_SEGMENTS - 1)] == [SMALL.pass_few] * 2
    assert [SMALL.pass_tile(n) for n in (MANY_SEGMENTS, 10)] == [SMALL.pass_many] * 2


def test_an_unknown_architecture_gets_the_fallback():
    assert table.settings_for(89) is FALLBACK
    assert table.architecture(torch.device("cpu")) == 0


def test_no_images_give_empty_results():
    x, weight, bias = make_layer(2, 5, 4, 6)
    hidden, response = fc1_response(x[:0], weight, bias, [(0, 5)], "none", fused=True, settings=SMALL)
    assert (hidden.shape, response.shape) == ((0, 5, 6), (0, 1, 6))


def test_an_input_with_gaps_is_read_right():
    x, weight, bias = make_layer(2, 9, 8, 6)
    part = x[:, 3:8]
    _, expected = fc1_response(part.contiguous(), weight, bias, [(0, 5)], "none", fused=True, settings=SMALL)
    _, found = fc1_response(part, weight, bias, [(0, 5)], "none", fused=True, settings=SMALL)
    assert torch.equal(found, expected)


CANARY = 1234.5
GUARD = 4096


def guarded(*shape, dtype=torch.float32, fill=CANARY):
    """A tensor in the middle of a larger one that is filled with ``fill``; returns both."""
    count = torch.Size(shape).numel()
    around = torch.full((count + 2 * GUARD,), fill, dtype=dtype, device=DEVICE)
    return around[GUARD : GUARD + count].view(shape), around


def assert_guards_untouched(around, fill=CANARY):
    assert (around[:GUARD] == fill).all()
    assert (around[-GUARD:] == fill).all()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "pass"])
def test_fc1_response_neither_reads_nor_writes_outside_its_tensors(fused):
    images, positions, width, units, spans = SIZES["odd"]
    tensors = make_layer(images, positions, width, units)
    # what is read by mistake is NaN, and would be seen in the result
    layer = [guarded(*t.shape, fill=torch.nan)[0].copy_(t) for t in tensors]
    rows = SMALL.matrix32.rows if fused else SMALL.pass_few.rows
    plan = plan_segments(images, positions, tuple(spans), rows, DEVICE)
    partial, around_partial = guarded(plan.slots, units)
    response, around_response = guarded(images, len(spans), units)
    hidden, around_hidden = guarded(images, positions, units)
    if fused:
        fused_launch(*layer, hidden, partial, plan, "none", False, SMALL).run()
    else:
        linear = guarded(images, positions, units, fill=torch.nan)[0].copy_(layer[0] @ layer[1].T)
        pass_launch(linear, layer[2], hidden, partial, plan, "none", False, SMALL.pass_few).run()
    reduce_launch(partial, response, plan, SMALL).run()
    for around in (around_partial, around_response, around_hidden):
        assert_guards_untouched(around)
    expected_hidden, expected = plain.fc1_response(*(t.double() for t in tensors), spans, "none")
    assert_close(hidden, expected_hidden, 5e-6)
    assert_close(response, expected.double(), 5e-6)


@pytest.mark.parametrize("tile_rows", [1, 16, 64])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_plan_counts_every_row_of_every_segment_once(size, tile_rows):
    images, positions, _, _, spans = size
    plan = plan_segments(images, positions, tuple(spans), tile_rows, torch.device("cpu"))
    counted = torch.zeros(images * len(spans), images * positions, dtype=torch.int64)
    for tile in range(len(plan.first) - 1):
        for piece in range(int(plan.first[tile]), int(plan.first[tile + 1])):
            segment = int(torch.searchsorted(plan.slot_first, plan.slot[piece], right=True)) - 1
            low, high = int(plan.low[piece]), int(plan.high[piece])
            assert 0 <= low < high <= tile_rows
            counted[segment, tile * tile_rows + low : tile * tile_rows + high] += 1
    expected = torch.zeros_like(counted)
    for image in range(images):
        for i, (start, stop) in enumerate(spans):
            expected[image * len(spans) + i, image * positions + start : image * positions + stop] = 1
    assert torch.equal(counted, expected)
    assert torch.equal(plan.positions.long(), expected.sum(1))
    assert sorted(plan.slot.tolist()) == list(range(plan.slots))


@pytest.mark.parametrize(
    ("shape", "views", "k"),
    [((2, 3, 37), 10, 4), ((1, 1, 1), 1, 1), ((1, 2, 50), 2, 3), ((3, 1, 33), 1, 5)],
    ids=str,
)
def test_unit_update_equals_the_running_statistics(shape, views, k):
    fold, expected = Fold.zero(shape, k, DEVICE), Fold.zero(shape, k, DEVICE)
    kernel = partial(unit_update_, settings=SMALL)
    for responses, ids in make_batches(shape, views):
        responses, ids = responses.to(DEVICE), ids.to(DEVICE)
        expected = expected.update(responses, ids)
        fold = fold.update_by(kernel, responses, ids)
    assert fold.moments.count == 9
    assert_folds_close(fold, expected)


def test_unit_update_does_not_write_outside_its_tensors():
    units, k = 37, 3
    state = [guarded(units, dtype=torch.float64) for _ in range(3)]
    value, around_value = guarded(units, k)
    image, around_image = guarded(units, k, dtype=torch.int64, fill=77)
    for tensor, _ in state:
        tensor.zero_()
    value.fill_(-torch.inf)
    image.fill_(-1)
    responses = guarded(4, 2, units, fill=torch.nan)[0].copy_(torch.rand(4, 2, units))
    ids = torch.arange(4, device=DEVICE)
    update_launch(*(tensor for tensor, _ in state), value, image, 0, responses, ids, SMALL).run()
    for around in (around_value, *(around for _, around in state)):
        assert_guards_untouched(around)
    assert_guards_untouched(around_image, 77)
    assert torch.isfinite(value).all()
    assert bool((image >= 0).all())


@pytest.mark.heavy
def test_every_kernel_compiles_for_every_architecture_without_spills():
    command = [sys.executable, "-m", "fastmem.kernels.resources"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    for arch, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")):
        products = [line for line in lines if line.startswith("fused") and "float16" in line and f" {arch} " in line]
        assert len(products) == 8
        assert all(instruction in line for line in products)


# the module takes the interpreter's variable away when it is imported, so it is tried in a process of its own
PROBLEMS = """
from fastmem.kernels.resources import Resources
fine = Resources("fused", 90, 8, 128, 98304, 0, ("wgmma.mma_async",), True)
from dataclasses import replace
print([replace(fine, **c).problem for c in ({}, {"spilled": 8}, {"instructions": ("mma.sync",)}, {"arch": 120})])
"""


def test_a_spill_or_a_missing_matrix_instruction_is_a_problem():
    found = subprocess.run([sys.executable, "-c", PROBLEMS], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "['', 'spills 8 bytes a thread', 'does not use wgmma.mma_async', '']"
