"""The Triton kernels of fc1_response: a fused matrix product, a pass over a finished one, and the sum of partial sums.

They compute GELU(x W^T + bias) and each unit's mean absolute activation over segments of positions. The module
fastmem.kernels.fc1_response launches them and states formula, shapes and bytes moved.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu(b_x, TANH: tl.constexpr):
    if TANH:
        # 0.5 (1 + tanh u) is 1 / (1 + exp(-2 u)); the constants are 2 sqrt(2 / pi) log2(e) and that times 0.044715
        b_y = b_x / (1.0 + tl.exp2(-(b_x * (2.30220819 + 0.102943239 * (b_x * b_x)))))
    else:
        # max(x, 0) - |x| tail(|x|); the tail's formula and coefficients are explained in csrc/cpu/gelu.h
        b_a = tl.minimum(tl.abs(b_x), 15.0)
        b_over = ((3.988901856e-01 * b_a + 2.810804564e00) * b_a + 8.538990030e00) * b_a + 1.184614814e01
        b_under = (((b_a + 7.040506790e00) * b_a + 2.248766584e01) * b_a + 3.598129209e01) * b_a + 2.369230452e01
        b_tail = tl.exp2(-0.72134752 * (b_a * b_a)) * (b_over / b_under)
        b_y = tl.maximum(b_x, 0.0) - tl.abs(b_x) * b_tail
    return b_y


@triton.jit
def _finish_tile(
    b_x, p_hidden, p_partial, p_first, p_low, p_high, p_slot, i_m, i_n, ROWS, UNITS,
    TANH: tl.constexpr, PRE: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """GELU, store and partial sums of one tile [BLOCK_M, BLOCK_N] of fc1's output with its bias."""
    o_m = tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < UNITS
    b_y = _gelu(b_x, TANH)
    if STORE:
        p_tile = p_hidden + i_m.to(tl.int64) * BLOCK_M * UNITS
        m_tile = (o_m[:, None] < ROWS - i_m * BLOCK_M) & m_n[None, :]
        tl.store(p_tile + o_m[:, None] * UNITS + o_n[None, :], b_y.to(p_hidden.dtype.element_ty), mask=m_tile)
    b_abs = tl.abs(b_x if PRE else b_y)
    for i_piece in range(tl.load(p_first + i_m), tl.load(p_first + i_m + 1)):
        i_low = tl.load(p_low + i_piece)
        i_high = tl.load(p_high + i_piece)
        m_m = (o_m >= i_low) & (o_m < i_high)
        b_sum = tl.sum(tl.where(m_m[:, None], b_abs, 0.0), axis=0)  # [BLOCK_N]
        p_sum = p_partial + tl.load(p_slot + i_piece).to(tl.int64) * UNITS
        tl.store(p_sum + o_n, b_sum, mask=m_n)


@triton.jit
def fused_kernel(
    p_x, p_weight, p_bias, p_hidden, p_partial, p_first, p_low, p_high, p_slot, ROWS, UNITS, WIDTH,
    TANH: tl.constexpr, PRE: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the matrix product, finished while it is in registers; p_x and p_weight may be tensor descriptors."""
    # programs next to each other in time share weight and input tiles in the second-level cache
    i_program = tl.program_id(0)
    n_m = tl.cdiv(ROWS, BLOCK_M)
    per_group = GROUP * tl.cdiv(UNITS, BLOCK_N)
    i_first = i_program // per_group * GROUP
    n_group = min(n_m - i_first, GROUP)
    i_m = i_first + i_program % per_group % n_group
    i_n = i_program % per_group // n_group
    if not STORE:  # noqa: SIM102
        # nobody asks for a row of this tile
        if tl.load(p_first + i_m) == tl.load(p_first + i_m + 1):
            return
    o_n = tl.arange(0, BLOCK_N)
    b_x = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DESCRIPTORS:
        for i_k in range(0, WIDTH, BLOCK_K):
            # what lies outside arrives as zero
            b_a = p_x.load([i_m * BLOCK_M, i_k])  # [BLOCK_M, BLOCK_K]
            b_b = p_weight.load([i_n * BLOCK_N, i_k])  # [BLOCK_N, BLOCK_K]
            b_x = tl.dot(b_a, b_b.T, b_x, input_precision=PRECISION)
    else:
        o_m = tl.arange(0, BLOCK_M)
        o_k = tl.arange(0, BLOCK_K)
        m_m = o_m[:, None] < ROWS - i_m * BLOCK_M
        m_n = o_n[None, :] < UNITS - i_n * BLOCK_N
        p_a = p_x + i_m.to(tl.int64) * BLOCK_M * WIDTH + o_m[:, None] * WIDTH + o_k[None, :]
        p_b = p_weight + i_n.to(tl.int64) * BLOCK_N * WIDTH + o_n[None, :] * WIDTH + o_k[:, None]
        for i_k in range(0, WIDTH, BLOCK_K):
            if EVEN:
                b_a = tl.load(p_a, mask=m_m, other=0.0)  # [BLOCK_M, BLOCK_K]
                b_b = tl.load(p_b, mask=m_n, other=0.0)  # [BLOCK_K, BLOCK_N]
            else:
                b_a = tl.load(p_a, mask=m_m & (o_k[None, :] < WIDTH - i_k), other=0.0)
                b_b = tl.load(p_b, mask=m_n & (o_k[:, None] < WIDTH - i_k), other=0.0)
            b_x = tl.dot(b_a, b_b, b_x, input_precision=PRECISION)
            p_a += BLOCK_K
            p_b += BLOCK_K
    o_bias = i_n * BLOCK_N + o_n
    b_x += tl.load(p_bias + o_bias, mask=o_bias < UNITS, other=0.0).to(tl.float32)[None, :]
    _finish_tile(
        b_x, p_hidden, p_partial, p_first, p_low, p_high, p_slot, i_m, i_n, ROWS, UNITS, TANH, PRE, STORE, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@triton.jit
def pass_kernel(
    p_linear, p_bias, p_hidden, p_partial, p_first, p_low, p_high, p_slot, ROWS, UNITS,
    TANH: tl.constexpr, PRE: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of a finished matrix product without bias; p_hidden may equal p_linear to overwrite it."""
    i_m = tl.program_id(0)
    i_n = tl.program_id(1)
    if not STORE:  # noqa: SIM102
        if tl.load(p_first + i_m) == tl.load(p_first + i_m + 1):
            return
    o_m = tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < UNITS
    p_tile = p_linear + i_m.to(tl.int64) * BLOCK_M * UNITS
    m_tile = (o_m[:, None] < ROWS - i_m * BLOCK_M) & m_n[None, :]
    b_x = tl.load(p_tile + o_m[:, None] * UNITS + o_n[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_x += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    _finish_tile(
        b_x, p_hidden, p_partial, p_first, p_low, p_high, p_slot, i_m, i_n, ROWS, UNITS, TANH, PRE, STORE, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@triton.jit
def reduce_kernel(p_partial, p_response, p_slot_first, p_positions, UNITS, BLOCK_N: tl.constexpr):
    """The mean of one segment: its partial sums are added in order and divided by its number of positions."""
    i_segment = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < UNITS
    i_first = tl.load(p_slot_first + i_segment)
    p_sum = p_partial + i_first.to(tl.int64) * UNITS
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for _ in range(i_first, tl.load(p_slot_first + i_segment + 1)):
        b_sum += tl.load(p_sum + o_n, mask=m_n, other=0.0)
        p_sum += UNITS
    b_mean = b_sum / tl.load(p_positions + i_segment).to(tl.float32)
    tl.store(p_response + i_segment.to(tl.int64) * UNITS + o_n, b_mean, mask=m_n)
