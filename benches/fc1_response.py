"""fc1_response on the CPU: what the segment means cost beside the matrix product and the GELU, and against torch.

Limit: the same matrix product followed by the same C++ GELU with the mean of one position only, which nobody can leave
out; at most 1.03 of it is allowed. Peer: torch's own expression (linear, gelu, abs, mean), which has to be slower.
"""

from __future__ import annotations

import torch
from pairs import Ratio, compare, require_green
from rows import append_row
from torch.nn import functional

from fastmem.backends import cpp, native, plain

MAX_OVER_LIMIT = 1.03
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
STOPS = [sum(n * n for n in SCALES[: i + 1]) for i in range(len(SCALES))]
# name, images, positions, width, units, GELU, spans: about 5 GFLOP to 23 GFLOP a call
LAYERS = (
    ("rar-b last", 8, 258, 768, 3072, "none", [(257, 258), (256, 257)]),
    ("rar-b image", 8, 258, 768, 3072, "none", [(2, 258), (257, 258)]),
    ("var-d16 scales", 4, 680, 1024, 4096, "tanh", list(zip([0, *STOPS], STOPS, strict=False))),
)


def measure(images: int, positions: int, width: int, units: int, gelu: str, spans: list) -> tuple[Ratio, Ratio]:
    """Ratios of fc1_response to the limit and to torch's expression."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, positions, width, generator=generator)
    weight = torch.randn(units, width, generator=generator) / width**0.5
    bias = torch.randn(units, generator=generator)

    def ours() -> None:
        cpp.fc1_response(x, weight, bias, spans, gelu)

    def limit() -> None:
        native.bias_gelu_response_(functional.linear(x, weight), bias, [(0, 1)], gelu)

    def expression() -> None:
        plain.fc1_response(x, weight, bias, spans, gelu)

    return compare(ours, limit), compare(ours, expression)


def main() -> None:
    require_green(["tests/backends/test_backends.py"])
    slow = []
    for name, *layer in LAYERS:
        over_limit, over_torch = measure(*layer)
        for peer, ratio in (("matrix product + C++ GELU", over_limit), ("torch expression", over_torch)):
            print(
                f"{name:<16} / {peer:<26}{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  "
                f"{ratio.ours * 1e3:.0f} ms against {ratio.theirs * 1e3:.0f} ms",
                flush=True,
            )
            numbers = {key: round(getattr(ratio, key), 4) for key in ("median", "low", "high", "ours", "theirs")}
            append_row("fc1_response", {"layer": name, "peer": peer, "threads": torch.get_num_threads(), **numbers})
        if over_limit.median > MAX_OVER_LIMIT or over_torch.high >= 1:
            slow.append(name)
    if slow:
        raise SystemExit(f"slower than allowed ({MAX_OVER_LIMIT} of the limit, 1 of torch): {', '.join(slow)}")


if __name__ == "__main__":
    main()
