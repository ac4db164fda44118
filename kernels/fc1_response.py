"""First linear layer of an MLP, its GELU and each unit's mean absolute activation over segments, in Triton.

    linear = x W^T + bias         x [images, positions, width], W [units, width], bias [units]
    hidden = GELU(linear)         [images, positions, units], in x's dtype
    response = mean |hidden| over the positions of each span, float32 [images, spans, units]

Either one kernel computes the product and finishes each tile ("fused"), or a kernel passes over torch's product
("pass"). With R = images * positions rows, e bytes an element, tiles of BLOCK_M rows and BLOCK_N units:

    FLOPs          2 R units width, plus about 20 R units for the GELU and one addition per row, span and unit
    fused, moved   e (R width + units width) once from memory (again from cache per tile), e R units written unless
                   only the response is wanted; 8 bytes per piece of a segment and unit for the partial sums
    pass, moved    the product writes e R units, the pass reads them and writes them: 3 e R units in all
                   (2 e R units when only the response is wanted)

Every program writes its partial sums to places of its own, and they are added in a fixed order, without atomics.
Products accumulate in float32, and float32 inputs are multiplied with IEEE rounding instead of tf32. The specification
is fastmem.backends.plain.fc1_response.

Source: arXiv 2509.00488 (absolute value before the average); tiling as in Triton's own matrix multiplication tutorial.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastmem.kernels.fc1_kernels import fused_kernel, pass_kernel, reduce_kernel
from fastmem.kernels.launch import Launch
from fastmem.kernels.segment_plan import SegmentPlan, Span, plan_segments
from fastmem.kernels.settings import PassTile, Settings, Tile, architecture, settings_for
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor


def fc1_response(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    spans: Sequence[Span],
    gelu: str,
    *,
    pre_activation: bool = False,
    keep_hidden: bool = True,
    fused: bool | None = None,
    settings: Settings | None = None,
) -> tuple[Tensor | None, Tensor]:
    """First linear layer of an MLP, its GELU, and each unit's mean absolute activation over each span.

    Args:
        x: float32, bfloat16 or float16 [images, positions, width].
        weight: [units, width], in x's dtype.
        bias: [units], in x's dtype.
        spans: pairs (start, stop) of positions, which may overlap.
        gelu: "none" for the exact function, "tanh" for its approximation.
        pre_activation: respond with the input of the GELU in place of its output.
        keep_hidden: return the hidden layer too; False where only the responses are wanted.
        fused: compute the product in the fused kernel (True), or in torch with a pass over it (False); None takes what
            the settings say.
        settings: launch settings; None takes those of the GPU's architecture.

    Returns:
        The hidden layer [images, positions, units] in x's dtype, or None, and the responses float32 [images, spans,
        units].
    """
    settings = settings or settings_for(architecture(x.device))
    fused = x.element_size() in settings.fused if fused is None else fused
    images, positions, _ = x.shape
    units = len(weight)
    response = torch.empty(images, len(spans), units, dtype=torch.float32, device=x.device)
    hidden = x.new_empty(images, positions, units) if fused and keep_hidden else None
    if not response.numel():
        return (functional.linear(x, weight) if keep_hidden else None), response
    pass_tile = settings.pass_tile(len(spans))
    tile_rows = product_tile(x, settings).rows if fused else pass_tile.rows
    plan = plan_segments(images, positions, tuple(spans), tile_rows, x.device)
    partial = torch.empty(plan.slots, units, dtype=torch.float32, device=x.device)
    if fused:
        launch = fused_launch(x.contiguous(), weight, bias, hidden, partial, plan, gelu, pre_activation, settings)
    else:
        linear = functional.linear(x, weight)
        # in place: the product itself is not wanted by anyone
        hidden = linear if keep_hidden else None
        launch = pass_launch(linear, bias, hidden, partial, plan, gelu, pre_activation, pass_tile)
    launch.run()
    reduce_launch(partial, response, plan, settings).run()
    return hidden, response


def product_tile(x: Tensor, settings: Settings) -> Tile:
    """The tile of the matrix product for x's element size."""
    return settings.matrix32 if x.element_size() == 4 else settings.matrix16


def fused_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden: Tensor | None,
    partial: Tensor,
    plan: SegmentPlan,
    gelu: str,
    pre_activation: bool,
    settings: Settings,
) -> Launch:
    """Launch of the fused kernel, which finishes each tile of the matrix product while it is in registers.

    Args:
        x: contiguous [images, positions, width].
        weight: [units, width].
        bias: [units].
        hidden: takes the hidden layer [images, positions, units]; None stores none.
        partial: takes the partial sums, float32 [plan.slots, units].
        plan: the segments' pieces, for the tile's number of rows.
        gelu: "none" for the exact function, "tanh" for its approximation.
        pre_activation: sum the GELU's input in place of its output.
        settings: launch settings.
    """
    tile = product_tile(x, settings)
    units, width = weight.shape
    rows = x.numel() // width
    grid = (-(-rows // tile.rows) * -(-units // tile.units),)
    # the copy engine wants rows that start on 16-byte borders
    descriptors = tile.descriptors and width * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    descriptors = descriptors and weight.data_ptr() % 16 == 0
    x_tiles, weight_tiles = x, weight
    if descriptors:
        x_tiles = TensorDescriptor.from_tensor(x.view(rows, width), [tile.rows, tile.width])
        weight_tiles = TensorDescriptor.from_tensor(weight, [tile.units, tile.width])
    stored = bias if hidden is None else hidden
    arguments = (x_tiles, weight_tiles, bias, stored, partial, *_pieces(plan), rows, units, width)
    constants = {
        "TANH": gelu == "tanh",
        "PRE": pre_activation,
        "STORE": hidden is not None,
        "PRECISION": "ieee",
        "EVEN": width % tile.width == 0,
        "DESCRIPTORS": descriptors,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.units,
        "BLOCK_K": tile.width,
        "GROUP": tile.group,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return Launch(fused_kernel, grid, arguments, constants)


def pass_launch(
    linear: Tensor,
    bias: Tensor,
    hidden: Tensor | None,
    partial: Tensor,
    plan: SegmentPlan,
    gelu: str,
    pre_activation: bool,
    tile: PassTile,
) -> Launch:
    """Launch of the pass over a finished matrix product; the arguments from bias on are those of ``fused_launch``.

    Args:
        linear: contiguous [images, positions, units], the product without bias.
        hidden: takes the hidden layer and may be ``linear`` itself; None stores none.
        tile: tile and warps of a program.
    """
    units = linear.shape[-1]
    rows = linear.numel() // units
    grid = (-(-rows // tile.rows), -(-units // tile.units))
    arguments = (linear, bias, linear if hidden is None else hidden, partial, *_pieces(plan), rows, units)
    constants = {
        "TANH": gelu == "tanh",
        "PRE": pre_activation,
        "STORE": hidden is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.units,
        "num_warps": tile.warps,
        "num_stages": 1,
    }
    return Launch(pass_kernel, grid, arguments, constants)


def reduce_launch(partial: Tensor, response: Tensor, plan: SegmentPlan, settings: Settings) -> Launch:
    """Launch of the sum over every segment's pieces, divided by the segment's number of positions.

    Args:
        partial: float32 [plan.slots, units], the partial sums.
        response: float32 [images, segments, units], which takes the means.
        plan: where each segment's pieces lie.
        settings: launch settings.
    """
    units = response.shape[-1]
    grid = (response.numel() // units, -(-units // settings.reduce_units))
    arguments = (partial, response, plan.slot_first, plan.positions, units)
    constants = {"BLOCK_N": settings.reduce_units, "num_warps": 4, "num_stages": 1}
    return Launch(reduce_kernel, grid, arguments, constants)


def _pieces(plan: SegmentPlan) -> tuple[Tensor, ...]:
    return plan.first, plan.low, plan.high, plan.slot
