"""RAR's scoring pass with statistics against one written as the original is, at RAR-B's width, float32, on the CPU.

The plain pass computes the modulation of every token of every image, all blocks and the head in full, and no
statistics. Ours ends with the statistics folded in. The limit is what the matrix products of our pass's blocks take
when nothing else runs: qkv, projection, fc1 and fc2, of the last block's fc1 the two scored positions alone.

4 blocks are timed in interleaved pairs, the whole RAR-B of 24 blocks once, both on 16 views of one class. Prints the
median of the pairs' ratios with a 95 % bootstrap interval, adds rows, and fails below a speed-up of 1.4.
"""

from __future__ import annotations

import time

import torch
from pairs import Ratio, compare, require_green
from rows import append_row
from scoring_pass import ScoringPass
from torch import Tensor
from torch.nn import functional

from fastmem.models.rar import RAR, Modulation, RARConfig

BLOCKS, ALL_BLOCKS, VIEWS = 4, 24, 16
LEAST_SPEED_UP = 1.4
TOLERANCE = 2e-4


def build(blocks: int) -> RAR:
    """RAR-B's network with that many blocks and weights that say nothing."""
    torch.manual_seed(0)
    network = RAR(RARConfig(num_layers=blocks)).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, Modulation):
            torch.nn.init.normal_(module[1].weight, std=0.02)
    return network


@torch.inference_mode()
def plain_pass(network: RAR, tokens: Tensor, labels: Tensor, seen: list[Tensor] | None = None) -> Tensor:
    """Logits as the original network would give them; ``seen`` takes each block's hidden layer."""
    heads = network.config.num_heads
    classes = network.embeddings(network.condition_ids(labels))[:, None]
    x = torch.cat([network.cls_token.expand(len(tokens), -1, -1), classes, network.embeddings(tokens)], dim=1)
    n, length, width = x.shape
    x = x + network.position_table(0, length)
    condition = classes + network.timesteps_embeddings[:, :length]
    for block in network.blocks:
        attn = block.attn
        parts = block.adaLN_modulation[1](functional.silu(condition)).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        h = block.norm1(x) * (1 + scale_a) + shift_a
        q, k, v = attn.qkv(h).reshape(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + gate_a * attn.proj(out.transpose(1, 2).reshape(n, length, width))
        h = block.norm2(x) * (1 + scale_m) + shift_m
        hidden = functional.gelu(block.mlp.fc1(h))
        if seen is not None:
            seen.append(hidden)
        x = x + gate_m * block.mlp.fc2(hidden)
    scale, shift = network.adaln_before_head.adaLN_modulation[1](functional.silu(condition)).chunk(2, dim=-1)
    x = functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
    return network.lm_head(x)


@torch.inference_mode()
def products_alone(network: RAR, x: Tensor, hidden: Tensor) -> None:
    """The matrix products of our pass's blocks, on inputs that lie ready."""
    last = len(network.blocks) - 1
    for i, block in enumerate(network.blocks):
        functional.linear(x, block.attn.qkv.weight)
        functional.linear(x, block.attn.proj.weight)
        functional.linear(x if i < last else x[:, -2:], block.mlp.fc1.weight)
        if i < last:
            functional.linear(hidden, block.mlp.fc2.weight)


def check(ours: ScoringPass, network: RAR, tokens: Tensor, labels: Tensor) -> None:
    """Raises: SystemExit where the two passes do not see the same."""
    seen: list[Tensor] = []
    plain_pass(network, tokens, labels, seen)
    expected = torch.stack([hidden[:, [257, 256]].abs() for hidden in seen], dim=1)
    difference = float((ours.responses() - expected).abs().max())
    if difference > TOLERANCE:
        raise SystemExit(f"the passes differ by {difference:.1e}, so their times say nothing")


def measure(blocks: int, views: int, pairs: int | None) -> tuple[Ratio, Ratio]:
    """Ratios of our pass to the plain one and to the products; pairs None runs all three once."""
    network = build(blocks)
    tokens = torch.randint(0, network.config.codebook_size, (views, network.config.image_seq_len))
    # one class, as the scoring pass is fed
    labels = torch.full((views,), 7)
    ours = ScoringPass(network, tokens, labels, [(257, 258), (256, 257)])
    check(ours, network, tokens, labels)
    x, hidden = torch.randn(views, 258, 768), torch.randn(views, 258, 3072)
    theirs = (lambda: plain_pass(network, tokens, labels), lambda: products_alone(network, x, hidden))
    if pairs is not None:
        return compare(ours, theirs[0], pairs), compare(ours, theirs[1], pairs)
    seconds = []
    for call in (ours, *theirs):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    nothing = float("nan")
    return tuple(Ratio(seconds[0] / other, nothing, nothing, seconds[0], other) for other in seconds[1:])


def report(blocks: int, views: int, plain: Ratio, products: Ratio) -> None:
    """Print one measurement and add its row."""
    interval = f"[{1 / plain.high:.3f}, {1 / plain.low:.3f}]" if plain.low == plain.low else "once"
    print(
        f"{blocks:>2} blocks, {views} views: {1 / plain.median:.3f} times as fast as plain {interval}, "
        f"{plain.ours:.2f} s against {plain.theirs:.2f} s; the blocks' products alone {products.theirs:.2f} s: at most "
        f"{products.median / plain.median:.3f}",
        flush=True,
    )
    row = {"blocks": blocks, "views": views, "ours_by_plain": plain.median, "low": plain.low, "high": plain.high}
    row |= {"ours": plain.ours, "plain": plain.theirs, "products": products.theirs, "ours_by_products": products.median}
    append_row("rar_forward", {key: round(value, 4) for key, value in row.items()})


def main() -> None:
    require_green(["tests/models/test_rar.py", "tests/backends/test_backends.py"])
    plain, products = measure(BLOCKS, VIEWS, 30)
    report(BLOCKS, VIEWS, plain, products)
    report(ALL_BLOCKS, VIEWS, *measure(ALL_BLOCKS, VIEWS, None))
    if 1 / plain.median < LEAST_SPEED_UP:
        raise SystemExit(f"less than {LEAST_SPEED_UP} times as fast as the plain pass")


if __name__ == "__main__":
    main()
