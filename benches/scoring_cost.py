"""What scoring costs on top of the forward pass: ours with statistics against ours without, 4 blocks, on the CPU.

Two peers without statistics: `forward` is the network's own teacher-forced pass to the logits; `blocks` is the scoring
pass itself with the C++ GELU alone in place of the responses, so that it gains nothing by what scoring leaves out. The
upper end of the interval against `forward` has to stay under 1.05, for RAR `last` and for all scales of VAR.

For RAR's ten views the peer is `unchecked`: the same scoring pass without its look for numbers that are not finite.
The look is one for all blocks, so 24 blocks pay less. The interval has to reach below 1.01.

``python benches/scoring_cost.py PEER ...`` measures these peers only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import torch
from pairs import compare, require_green
from rar_forward import build
from rows import append_row
from scoring_pass import ScoringPass
from torch import Tensor
from torch.nn import functional

from fastmem.backends import native
from fastmem.models.rar import RAR
from fastmem.models.var import VAR, VARConfig

BLOCKS = 4
MOST_UPPER, MOST_CHECK = 1.05, 1.01
TEN_VIEWS = "rar-b ten views"


def gelu_only(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    spans: Sequence[tuple[int, int]],
    gelu: str,
    *,
    keep_hidden: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """fc1 and its GELU; the response is the mean over one position, which the operator cannot leave out."""
    hidden = functional.linear(x, weight)
    response = native.bias_gelu_response_(hidden, bias, [(0, 1)], gelu)
    return (hidden if keep_hidden else None), response


def passes() -> dict[str, tuple[RAR | VAR, Tensor, Tensor, list[tuple[int, int]]]]:
    """Network, its input, labels and spans by name."""
    rar = build(BLOCKS)
    tokens = torch.randint(0, rar.config.codebook_size, (4, rar.config.image_seq_len))
    views = torch.randint(0, rar.config.codebook_size, (10, rar.config.image_seq_len))
    var = VAR(VARConfig(depth=BLOCKS, hidden_size=1024, num_heads=16)).eval().requires_grad_(False)
    inputs = torch.randn(2, var.bounds[-1] - 1, 32)
    return {
        "rar-b last": (rar, tokens, torch.full((4,), 7), [(257, 258)]),
        TEN_VIEWS: (rar, views, torch.full((10,), 7), [(256, 257), (257, 258)]),
        "var-d16 scales": (var, inputs, torch.full((2,), 7), list(pairwise(var.bounds))),
    }


def main() -> None:
    require_green(
        [
            "tests/models/test_rar.py",
            "tests/models/test_var.py",
            "tests/backends/test_backends.py",
            "tests/stats/test_stats.py",
        ]
    )
    slow = []
    chosen = sys.argv[1:] or ["forward", "blocks", "unchecked"]
    for name, (network, given, labels, spans) in passes().items():
        ours = ScoringPass(network, given, labels, spans)

        @torch.inference_mode()
        def forward(network: RAR | VAR = network, given: Tensor = given, labels: Tensor = labels) -> None:
            network(given, labels)

        @torch.inference_mode()
        def blocks(
            network: RAR | VAR = network, given: Tensor = given, labels: Tensor = labels, spans: list = spans
        ) -> None:
            network.observe(given, labels, spans, gelu_only, with_logits=False)

        unchecked = ScoringPass(network, given, labels, spans, checked=False)
        peers = {"unchecked": unchecked} if name == TEN_VIEWS else {"forward": forward, "blocks": blocks}
        for peer, call in peers.items():
            if peer not in chosen:
                continue
            ratio = compare(ours, call)
            print(
                f"{name:<16} / {peer:<10}{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  "
                f"{ratio.ours * 1e3:.0f} ms against {ratio.theirs * 1e3:.0f} ms",
                flush=True,
            )
            numbers = {key: round(getattr(ratio, key), 4) for key in ("median", "low", "high", "ours", "theirs")}
            append_row("scoring_cost", {"pass": name, "peer": peer, **numbers})
            if peer == "forward" and ratio.high >= MOST_UPPER:
                slow.append(f"{name}: scoring costs {MOST_UPPER} of the forward pass or more")
            if peer == "unchecked" and ratio.low >= MOST_CHECK:
                slow.append(f"{name}: the check makes it {MOST_CHECK} of the pass without or more")
    if slow:
        raise SystemExit("; ".join(slow))


if __name__ == "__main__":
    main()
