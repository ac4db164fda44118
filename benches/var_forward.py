"""VAR's scoring pass against one written as the original is, at VAR-d16's width: 4 blocks, float32, on the CPU.

The plain pass attends over all 680 positions with an additive mask, modulates every image on its own, runs all of the
last block and the head, and takes the responses from fc1 on the way. The limit is the ratio of both passes' matrix
products, counted in multiplications: what leaving them out buys where all cost the same. Beside it stands the time that
our pass's products and attentions take when nothing else runs.

Prints the median of the pairs' ratios with a 95 % bootstrap interval, adds a row, and fails below 90 % of the limit.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from pairs import PAIRS, Ratio, compare, require_green
from rows import append_row
from torch import Tensor
from torch.nn import functional

from fastmem.backends.select import choose_backend
from fastmem.models.var import VAR, VARConfig

BLOCKS, WIDTH, HEADS, VIEWS = 4, 1024, 16, 2
SHARE = 0.9


@torch.inference_mode()
def plain_pass(network: VAR, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Responses and logits as the original network would give them."""
    mask, c = network.attn_bias_for_masking, network.class_emb(labels)
    start = c[:, None] + network.pos_start
    x = torch.cat([start, network.word_embed(inputs)], dim=1)
    x = x + (network.lvl_embed(network.lvl_1L) + network.pos_1LC)
    n, length, width = x.shape
    found = []
    for block in network.blocks:
        attn, ffn = block.attn, block.ffn
        parts = block.ada_lin[1](functional.silu(c)).view(n, 1, 6, width).unbind(2)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = parts
        h = functional.layer_norm(x, (width,), eps=1e-6).mul(scale1.add(1)).add_(shift1)
        qkv = functional.linear(h, attn.mat_qkv.weight, torch.cat([attn.q_bias, attn.zero_k_bias, attn.v_bias]))
        q, k, v = qkv.view(n, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        q = functional.normalize(q, dim=-1).mul(attn.scale_mul_1H11.clamp_max(4.605170185988092).exp())
        k = functional.normalize(k, dim=-1)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        x = x + attn.proj(out.transpose(1, 2).reshape(n, length, width)).mul_(gamma1)
        h = functional.layer_norm(x, (width,), eps=1e-6).mul(scale2.add(1)).add_(shift2)
        hidden = functional.gelu(ffn.fc1(h), approximate="tanh")
        found.append(torch.stack([hidden[:, a:b].abs().mean(1) for a, b in pairwise(network.bounds)], dim=1))
        x = x + ffn.fc2(hidden).mul(gamma2)
    scale, shift = network.head_nm.ada_lin[1](functional.silu(c)).view(n, 1, 2, width).unbind(2)
    logits = network.head(functional.layer_norm(x, (width,), eps=1e-6).mul(scale.add(1)).add_(shift))
    return torch.stack(found, dim=1), logits


@torch.inference_mode()
def products_alone(network: VAR, x: Tensor, hidden: Tensor, q: Tensor) -> None:
    """The matrix products and attentions of our pass, at their shapes, on inputs that lie ready."""
    groups = network.groups(0, 10)
    for i, block in enumerate(network.blocks):
        functional.linear(x, block.attn.mat_qkv.weight)
        for g in groups:
            keys = q[:, :, : g.stop]
            functional.scaled_dot_product_attention(q[:, :, g.start : g.stop], keys, keys, g.mask, scale=1.0)
        functional.linear(x, block.attn.proj.weight)
        functional.linear(x, block.ffn.fc1.weight)
        if i + 1 < len(network.blocks):
            functional.linear(hidden, block.ffn.fc2.weight)


def multiplications(blocks: int, ours: bool) -> int:
    """Multiply-adds of one view's pass."""
    network = VARConfig()
    sizes = [n * n for n in network.patch_nums]
    total = sum(sizes)
    seen = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    pairs = sum(a * b for a, b in zip(sizes, seen, strict=True)) if ours else total * total
    count = blocks * (12 * total * WIDTH**2 + 2 * pairs * WIDTH)
    if ours:
        return count - 4 * total * WIDTH**2
    return count + total * WIDTH * network.codebook_size + (6 * blocks + 2) * WIDTH**2


def main() -> None:
    require_green(["tests/models/test_var.py"])
    torch.manual_seed(0)
    network = VAR(VARConfig(depth=BLOCKS, hidden_size=WIDTH, num_heads=HEADS)).eval().requires_grad_(False)
    length, backend = network.bounds[-1], choose_backend("auto", torch.device("cpu"))
    inputs, labels = torch.randn(VIEWS, length - 1, 32), torch.full((VIEWS,), 7)
    spans = list(pairwise(network.bounds))

    @torch.inference_mode()
    def our_pass() -> Tensor:
        return network.observe(inputs, labels, spans, backend.fc1_response, with_logits=False).responses

    difference = float((our_pass() - plain_pass(network, inputs, labels)[0]).abs().max())
    if difference > 2e-4:
        raise SystemExit(f"the passes differ by {difference:.1e}, so their times say nothing")
    x, hidden = torch.randn(VIEWS, length, WIDTH), torch.randn(VIEWS, length, 4 * WIDTH)
    q = functional.normalize(torch.randn(VIEWS, length, HEADS, WIDTH // HEADS), dim=-1).transpose(1, 2)
    plain = compare(our_pass, lambda: plain_pass(network, inputs, labels))
    products = compare(our_pass, lambda: products_alone(network, x, hidden, q))
    limit = multiplications(BLOCKS, ours=False) / multiplications(BLOCKS, ours=True)
    full = multiplications(16, ours=False) / multiplications(16, ours=True)
    print(f"{PAIRS} interleaved pairs each, {VIEWS} views, {BLOCKS} blocks of width {WIDTH}, backend {backend.name}")
    print(f"ours / plain     {_describe(plain)}")
    print(f"ours / products  {_describe(products)}")
    speedup = 1 / plain.median
    print(f"products alone are {1 / products.median:.1%} of our pass")
    print(f"speed-up {speedup:.3f}: {speedup / limit:.1%} of the limit {limit:.3f} ({full:.3f} for all 16 blocks)")
    row = {"views": VIEWS, "ours_by_plain": plain.median, "plain_low": plain.low, "plain_high": plain.high}
    row |= {"counted_limit": 1 / limit, "ours_by_products": products.median}
    row |= {"products_low": products.low, "products_high": products.high}
    path = append_row("var_forward", {name: round(value, 4) for name, value in row.items()})
    print(f"row added to {path}")
    if speedup < SHARE * limit:
        raise SystemExit(f"below {SHARE:.0%} of the limit")


def _describe(found: Ratio) -> str:
    times = f"{1000 * found.ours / VIEWS:.1f} and {1000 * found.theirs / VIEWS:.1f} ms a view"
    return f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}], median times {times}"


if __name__ == "__main__":
    main()
