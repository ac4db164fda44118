"""The update of every unit's running statistics by a batch of responses, in Triton.

    r(i)   = mean over views of response(i, view), rounded to float32
    mean, m2 <- Chan's merge with the r(i), one by one: d = r - mean, mean += d / n, m2 += d (r - mean)
    view  += sum over i of the population variance of response(i, view) over the views
    top    = the k largest r with their image ids, best first; among equal ones the smallest id first

    response [images, views, units] float32; mean, m2, view [units] float64; top_value [units, k] float32, top_image
    [units, k] int64; "units" are here the units of all segments of all layers.

Moved: 4 images views units bytes are read, and the state is read and written once, 2 (24 + 12 k) units bytes. About
(8 views + 10 k) images units operations, those on mean and m2 in float64.

One program owns its units, so there are no atomics and the result does not depend on the launch. The kernel is never
auto-tuned, because tuning would run it many times on the first batch and so count that batch many times. The
specification is fastmem.stats.accumulators.Fold.update.

Source: Chan, Golub and LeVeque 1979 (the merge).
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastmem.kernels.launch import Launch
from fastmem.kernels.settings import Settings, architecture, settings_for
from torch import Tensor


@triton.jit
def _replace_worst(b_value, b_image, b_new, i_image, o_k):
    """The k kept responses [BLOCK_N, BLOCK_K], the worst replaced by a new one [BLOCK_N] where that is better."""
    b_min = tl.min(b_value, axis=1)
    m_min = b_value == b_min[:, None]
    b_worst_image = tl.max(tl.where(m_min, b_image, -2), axis=1)
    # empty places are all alike: the last of them is taken
    b_place = tl.max(tl.where(m_min & (b_image == b_worst_image[:, None]), o_k[None, :], -1), axis=1)
    m_better = (b_new > b_min) | ((b_new == b_min) & (i_image < b_worst_image))
    m_put = m_better[:, None] & (o_k[None, :] == b_place[:, None])
    return tl.where(m_put, b_new[:, None], b_value), tl.where(m_put, i_image, b_image)


@triton.jit
def unit_update_kernel(
    p_mean, p_m2, p_view, p_value, p_image, p_response, p_ids, COUNT, IMAGES, VIEWS, UNITS,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All images of the batch, one by one, for one block of units."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < UNITS
    o_k = tl.arange(0, BLOCK_K)
    o_nk = o_n[:, None] * K + o_k[None, :]
    m_nk = m_n[:, None] & (o_k[None, :] < K)
    b_mean = tl.load(p_mean + o_n, mask=m_n, other=0.0)
    b_m2 = tl.load(p_m2 + o_n, mask=m_n, other=0.0)
    b_view = tl.load(p_view + o_n, mask=m_n, other=0.0)
    # a place beyond k holds +inf, so it is never the worst
    b_value = tl.load(p_value + o_nk, mask=m_nk, other=float("inf"))  # [BLOCK_N, BLOCK_K]
    b_image = tl.load(p_image + o_nk, mask=m_nk, other=-1)
    b_zero = tl.zeros((BLOCK_N,), dtype=tl.float64)
    p_r = p_response + o_n
    for i_image in range(0, IMAGES):
        b_sum = b_zero
        p_row = p_r
        for _ in range(0, VIEWS):
            b_sum += tl.load(p_row, mask=m_n, other=0.0).to(tl.float64)
            p_row += UNITS
        b_view_mean = b_sum / (b_zero + VIEWS)
        b_spread = b_zero
        # the same rows again, from the first-level cache
        for _ in range(0, VIEWS):
            b_delta = tl.load(p_r, mask=m_n, other=0.0).to(tl.float64) - b_view_mean
            b_spread += b_delta * b_delta
            p_r += UNITS
        b_view += b_spread / (b_zero + VIEWS)
        # rounded once: every statistic sees the same float32 response of an image
        b_new = b_view_mean.to(tl.float32)
        b_delta = b_new.to(tl.float64) - b_mean
        b_mean += b_delta / (b_zero + (COUNT + i_image + 1))
        b_m2 += b_delta * (b_new.to(tl.float64) - b_mean)
        b_value, b_image = _replace_worst(b_value, b_image, b_new, tl.load(p_ids + i_image), o_k)
    tl.store(p_mean + o_n, b_mean, mask=m_n)
    tl.store(p_m2 + o_n, b_m2, mask=m_n)
    tl.store(p_view + o_n, b_view, mask=m_n)
    # the rank of a place is the number of places that come before it; [BLOCK_N, place, other place]
    b_v, b_other_v = b_value[:, :, None], b_value[:, None, :]
    b_i, b_other_i = b_image[:, :, None], b_image[:, None, :]
    m_first = (b_other_i < b_i) | ((b_other_i == b_i) & (o_k[None, None, :] < o_k[None, :, None]))
    m_before = (b_other_v > b_v) | ((b_other_v == b_v) & m_first)
    b_rank = tl.sum((m_before & (o_k[None, None, :] < K)).to(tl.int32), axis=2)
    o_ranked = o_n[:, None] * K + b_rank
    tl.store(p_value + o_ranked, b_value, mask=m_nk)
    tl.store(p_image + o_ranked, b_image, mask=m_nk)


def unit_update_(
    mean: Tensor,
    m2: Tensor,
    view_total: Tensor,
    top_value: Tensor,
    top_image: Tensor,
    count: int,
    responses: Tensor,
    image_ids: Tensor,
    *,
    settings: Settings | None = None,
) -> None:
    """Update the statistics of ``count`` images by the responses of a batch of images, in place.

    All tensors are on one device, and those of the statistics are contiguous; "..." are layers, segments and units.

    Args:
        mean: float64 [...], each unit's mean response.
        m2: float64 [...], its sum of squared deviations from the mean.
        view_total: float64 [...], its variance over views, summed over images.
        top_value: float32 [..., k], its k largest responses, best first.
        top_image: int64 [..., k], the ids of their images.
        count: number of images that the statistics hold.
        responses: float32 [images, views, ...].
        image_ids: int64 [images].
        settings: launch settings; None takes those of the GPU's architecture.
    """
    settings = settings or settings_for(architecture(responses.device))
    update_launch(
        mean, m2, view_total, top_value, top_image, count, responses.contiguous(), image_ids.contiguous(), settings
    ).run()


def update_launch(
    mean: Tensor,
    m2: Tensor,
    view_total: Tensor,
    top_value: Tensor,
    top_image: Tensor,
    count: int,
    responses: Tensor,
    image_ids: Tensor,
    settings: Settings,
) -> Launch:
    """Launch of the update, with one program for each block of units; the other arguments are those of unit_update_.

    Args:
        responses: float32 [images, views, ...], contiguous.
        image_ids: int64 [images], contiguous.
        settings: launch settings.
    """
    images, views = responses.shape[:2]
    units, k = mean.numel(), top_value.shape[-1]
    grid = (-(-units // settings.update_units) if images else 0,)
    arguments = (mean, m2, view_total, top_value, top_image, responses, image_ids, count, images, views, units)
    constants = {
        "K": k,
        "BLOCK_K": triton.next_power_of_2(k),
        "BLOCK_N": settings.update_units,
        "num_warps": settings.update_warps,
        "num_stages": 1,
    }
    return Launch(unit_update_kernel, grid, arguments, constants)
