"""The attack: a model completes an image from its first true tokens, greedily, without guidance or sampling.

Source: arXiv 2502.02514, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.extraction.candidates import Targets
from fastmem.models.model import Model

# number of completions computed at once by default
BATCH_ROWS = 80


def attack(
    model: Model,
    targets: Targets,
    prefixes: Sequence[int],
    *,
    batch_size: int = BATCH_ROWS,
) -> Tensor:
    """Return the greedy completion of every target from each prefix length, int64 [P,N,T], with the prefix itself.

    ``Model.generate`` computes equal requests in a batch only once, such as those of one class with an empty prefix.

    Args:
        model: the model, edited or not.
        targets: the N images to complete.
        prefixes: the P prefix lengths, in tokens.
        batch_size: number of completions computed at once.

    Raises: UsageError where ``prefixes`` is empty, or the model does not allow a prefix length, a label or a token.
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
    """Return the share of tokens after the prefix that are correct, float64 [P,N]; 1 where no token follows the prefix.

    ``tokens`` are the true tokens, int64 [N,T], ``prefixes`` the P prefix lengths in tokens, and ``generated`` the
    completions, int64 [P,N,T].
    """
    right = (generated == tokens).double()
    shares = [
        right[p, :, length:].mean(1) if length < tokens.shape[1] else right[p].mean(1)
        for p, length in enumerate(prefixes)
    ]
    return torch.stack(shares)
