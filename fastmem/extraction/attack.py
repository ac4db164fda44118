"""The attack: greedy completion of prefixes of true tokens.

Source: arXiv 2502.02514, section 5 (greedy, no guidance, no sampling).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.extraction.candidates import Targets
from fastmem.models.model import Model

BATCH_ROWS = 80


def attack(
    model: Model,
    targets: Targets,
    prefixes: Sequence[int],
    *,
    batch_size: int = BATCH_ROWS,
) -> Tensor:
    """Greedy completions of the first P tokens of every target, for each P of ``prefixes``: int64 [P,N,T].

    All prefixes of a target stand side by side in a batch; ``Model.generate`` completes rows of the same label and the
    same prefix once, such as all those of one class without a prefix.

    Args:
        model: the model, edited or not.
        targets: the images, N of them.
        prefixes: lengths in tokens, P of them.
        batch_size: rows that are completed at once.

    Raises: UsageError without prefixes, or as ``Model.generate``.
    """
    if not prefixes:
        raise UsageError("expected at least one prefix length, got none")
    found = torch.empty(len(prefixes), len(targets), model.num_tokens, dtype=torch.int64)
    rows = [(p, i) for i in range(len(targets)) for p in range(len(prefixes))]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        labels = torch.from_numpy(targets.labels[[i for _, i in batch]])
        made = model.generate(labels, [targets.tokens[i, : prefixes[p]] for p, i in batch]).cpu()
        for (p, i), row in zip(batch, made, strict=True):
            found[p, i] = row
    return found


def token_match(tokens: Tensor, prefixes: Sequence[int], generated: Tensor) -> Tensor:
    """Share of the tokens after the prefix that are the true ones: float64 [P,N], 1 where the prefix is everything.

    tokens: true ones, int64 [N,T]; generated: int64 [P,N,T].
    """
    right = (generated == tokens).double()
    shares = [
        right[p, :, length:].mean(1) if length < tokens.shape[1] else right[p].mean(1)
        for p, length in enumerate(prefixes)
    ]
    return torch.stack(shares)
