"""Extraction's generation against a plain loop: RAR-B's width, five prefixes of 16 candidates, 64 tokens, float32.

The plain loop is written as the original is: batches of 16, one prefix after the other, one token at a time from the
first on, keys and values concatenated, the modulation computed for every row. Ours is one call with all 80 rows. The
limit is what the matrix products of one step of 80 rows take when nothing else runs. A pair has 4 blocks; the whole
RAR-B of 24 blocks runs once.

Prints the median of the pairs' ratios with a 95 % bootstrap interval, adds rows, and fails below a speed-up of 3.
"""

from __future__ import annotations

import time

import torch
from pairs import Ratio, compare, require_green
from rows import append_row
from torch import Tensor
from torch.nn import functional

from fastmem import assemble
from fastmem.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from fastmem.models.model import Model
from fastmem.models.rar import RAR, Modulation, RARConfig
from fastmem.models.registry import PREFIX_LADDER

TOKENS, BLOCKS, ALL_BLOCKS = 64, 4, 24
# the best five of each class are candidates
LABELS = torch.tensor([3] * 5 + [250] * 5 + [711] * 5 + [999])
LEAST_SPEED_UP = 3.0
MAX_OTHER_ROWS = 2


def build(blocks: int) -> Model:
    """A RAR of RAR-B's width and 64 tokens with weights that say nothing."""
    torch.manual_seed(0)
    network = RAR(RARConfig(num_layers=blocks, image_seq_len=TOKENS))
    for module in network.modules():
        if isinstance(module, Modulation):
            torch.nn.init.normal_(module[1].weight, std=0.02)
    return assemble(network, MaskGITVQGAN(MaskGITVQGANConfig(32, (1, 1, 1, 1, 1), 1, 8, resolution=128)))


@torch.inference_mode()
def plain_generate(network: RAR, labels: Tensor, prefix: Tensor) -> Tensor:
    """Tokens int64 [N,T] after the prefix int64 [N,P], as the original network would give them."""
    rows, heads = len(labels), network.config.num_heads
    classes = network.embeddings(network.condition_ids(labels))[:, None]
    cached: list[tuple[Tensor, Tensor] | None] = [None] * len(network.blocks)
    tokens = torch.empty(rows, 0, dtype=torch.int64)
    x = torch.cat([network.cls_token.expand(rows, -1, -1), classes], dim=1) + network.position_table(0, 2)
    first = 0
    while tokens.shape[1] < TOKENS:
        length, width = x.shape[1:]
        condition = functional.silu(classes + network.timesteps_embeddings[:, first : first + length])
        for i, block in enumerate(network.blocks):
            attn = block.attn
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation[1](condition).chunk(6, -1)
            h = block.norm1(x) * (1 + scale_a) + shift_a
            qkv = attn.qkv(h).reshape(rows, length, 3, heads, width // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = attn.q_norm(q), attn.k_norm(k)
            if cached[i] is not None:
                k, v = torch.cat([cached[i][0], k], dim=2), torch.cat([cached[i][1], v], dim=2)
            cached[i] = k, v
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
            x = x + gate_a * attn.proj(out.transpose(1, 2).reshape(rows, length, width))
            h = block.norm2(x) * (1 + scale_m) + shift_m
            x = x + gate_m * block.mlp.fc2(functional.gelu(block.mlp.fc1(h)))
        scale, shift = network.adaln_before_head.adaLN_modulation[1](condition).chunk(2, -1)
        logits = network.lm_head(functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift)[:, -1]
        step, first = tokens.shape[1], first + length
        chosen = prefix[:, step] if step < prefix.shape[1] else logits.argmax(-1)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        x = network.embeddings(chosen)[:, None] + network.position_table(first, first + 1)
    return tokens


@torch.inference_mode()
def products_of_a_step(network: RAR, x: Tensor, hidden: Tensor) -> None:
    """The matrix products of one step, x [rows,width] and hidden [rows,units], without the modulation's."""
    for block in network.blocks:
        functional.linear(x, block.attn.qkv.weight)
        functional.linear(x, block.attn.proj.weight)
        functional.linear(x, block.mlp.fc1.weight)
        functional.linear(hidden, block.mlp.fc2.weight)
    functional.linear(x, network.lm_head.weight)


def measure(blocks: int, pairs: int | None) -> tuple[Ratio, float]:
    """The ratio ours / plain, and the seconds of one step's products; pairs None runs both once."""
    model = build(blocks)
    network: RAR = model.generator
    true = torch.randint(0, network.config.codebook_size, (len(LABELS), TOKENS))

    def ours() -> Tensor:
        rows = [row[:p] for p in PREFIX_LADDER for row in true]
        return model.generate(LABELS.repeat(len(PREFIX_LADDER)), rows)

    def plain() -> Tensor:
        return torch.cat([plain_generate(network, LABELS, true[:, :p]) for p in PREFIX_LADDER])

    started = time.perf_counter()
    made = ours()
    between = time.perf_counter()
    other = int((made != plain()).any(1).sum())
    seconds = between - started, time.perf_counter() - between
    # a near tie may fall the other way, and what follows it differs
    if other > MAX_OTHER_ROWS:
        raise SystemExit(f"{other} of {len(made)} rows differ from the plain loop's, so the times say nothing")
    x, hidden = torch.randn(len(made), network.config.hidden_size), torch.randn(len(made), 4 * 768)
    limit = compare(lambda: products_of_a_step(network, x, hidden), lambda: products_of_a_step(network, x, hidden))
    if pairs is None:
        return Ratio(seconds[0] / seconds[1], float("nan"), float("nan"), *seconds), limit.ours
    return compare(ours, plain, pairs), limit.ours


def report(blocks: int, found: Ratio, step: float) -> None:
    """Print one measurement and add its row."""
    rows = len(PREFIX_LADDER) * len(LABELS)
    ours, theirs, limit = rows * TOKENS / found.ours, rows * TOKENS / found.theirs, rows / step
    interval = f" [{1 / found.high:.2f}, {1 / found.low:.2f}]" if found.low == found.low else ", once"
    print(
        f"{blocks:>2} blocks: {1 / found.median:.2f} times as fast{interval}; {ours:.0f} tokens/s against {theirs:.0f}"
        f"; the products of a step of {rows} rows alone: {limit:.0f}",
        flush=True,
    )
    numbers = {key: round(getattr(found, key), 4) for key in ("median", "low", "high", "ours", "theirs")}
    speeds = {"tokens_per_s": ours, "plain_tokens_per_s": theirs, "products_tokens_per_s": limit}
    append_row("generation", {"blocks": blocks, **numbers, **{k: round(v, 1) for k, v in speeds.items()}})


def main() -> None:
    require_green(["tests/models/test_rar.py", "tests/models/test_parity.py"])
    found, step = measure(BLOCKS, 30)
    report(BLOCKS, found, step)
    report(ALL_BLOCKS, *measure(ALL_BLOCKS, None))
    if 1 / found.median < LEAST_SPEED_UP:
        raise SystemExit(f"less than {LEAST_SPEED_UP} times as fast")


if __name__ == "__main__":
    main()
