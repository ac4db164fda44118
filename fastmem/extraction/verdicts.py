"""Verdicts: when a completion counts as its target, and what a count of such verdicts says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fastmem.extraction.attack import token_match
from fastmem.extraction.candidates import Targets
from fastmem.index.embedding import DIMENSIONS, Embedder, embed
from fastmem.models.model import Model

# published for SSCD (arXiv 2502.02514); of tokens this share has to be right
SSCD_THRESHOLD, MATCH_THRESHOLD = 0.75, 0.9
FALSE_ALARMS = 0.01
# embeddings of token rows that are kept for the next question, 200 MiB
REMEMBERED = 100_000
GROUP_BLOCK = 64


class Judge(Protocol):
    """Tells how alike a completion and its target are.

    name: the embedder, or token-match: results of different names are never compared; threshold: a completion that is
    more alike than this counts as extracted.
    """

    name: str
    threshold: float

    def similarities(self, model: Model, targets: Targets, prefixes: Sequence[int], generated: Tensor) -> np.ndarray:
        """Similarity of completions int64 [P,N,T] with their targets as the tokenizer shows them: float32 [P,N]."""


class TokenMatch:
    """Without an embedder: the share of the tokens after the prefix that are the true ones, in [0,1]."""

    name = "token-match"

    def __init__(self, threshold: float = MATCH_THRESHOLD) -> None:
        self.threshold = threshold

    def similarities(self, model: Model, targets: Targets, prefixes: Sequence[int], generated: Tensor) -> np.ndarray:
        """Share of right tokens after the prefix, float32 [P,N]."""
        return token_match(targets.tokens, prefixes, generated).float().numpy()


class SSCDJudge:
    """The cosine of SSCD embeddings of pictures, in [-1,1].

    Equal rows of tokens are decoded and embedded once, also over many calls.

    Source: arXiv 2502.02514, section 5; SSCD is arXiv 2202.10261.
    """

    def __init__(self, embedder: Embedder, threshold: float = SSCD_THRESHOLD) -> None:
        self.embedder, self.name, self.threshold = embedder, embedder.name, threshold
        self._known: dict[bytes, np.ndarray] = {}
        self._tokenizer = ""

    def similarities(self, model: Model, targets: Targets, prefixes: Sequence[int], generated: Tensor) -> np.ndarray:
        """Cosine of decoded completions with the decoded targets, float32 [P,N]."""
        true = self.vectors(model, targets.tokens)
        made = self.vectors(model, generated.flatten(0, 1)).reshape(*generated.shape[:2], DIMENSIONS)
        return cosines(made, true)

    def vectors(self, model: Model, tokens: Tensor) -> np.ndarray:
        """Embeddings of decoded tokens int64 [N,T]: float32 [N,512]."""
        tokenizer = model.tokenizer_hash()
        if tokenizer != self._tokenizer:
            self._known, self._tokenizer = {}, tokenizer
        keys = [row.tobytes() for row in tokens.cpu().numpy()]
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._known}
        rows, step = sorted(new.values()), self.embedder.batch_size
        fresh: dict[bytes, np.ndarray] = {}
        for start in range(0, len(rows), step):
            batch = rows[start : start + step]
            found = embed(self.embedder, model.decode(tokens[batch]))
            fresh.update(zip((keys[i] for i in batch), found, strict=True))
        known = self._known | fresh
        if len(known) <= REMEMBERED:
            self._known = known
        return np.stack([known[key] for key in keys]) if keys else np.empty((0, DIMENSIONS), np.float32)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of unit vectors [...,512] and [...,512] along the last axis, float32 [...]; 1 for equal vectors."""
    return np.einsum("...d,...d->...", a.astype(np.float64), b.astype(np.float64)).clip(-1, 1).astype(np.float32)


@dataclass(frozen=True)
class Count:
    """k of n, with the 95 % Wilson interval of the share.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """

    k: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end of the share, in [0,1]; (0, 1) of nothing."""
        if not self.n:
            return 0.0, 1.0
        z, n = 1.959963984540054, self.n
        share = self.k / n
        middle = share + z * z / (2 * n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        # at the ends the formula is exact but for rounding
        low = 0.0 if self.k == 0 else (middle - half) / scale
        high = 1.0 if self.k == n else (middle + half) / scale
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.k:,} of {self.n:,} ({low:.1%} to {high:.1%})"


def false_alarm_threshold(similarities: np.ndarray, rate: float = FALSE_ALARMS) -> float | None:
    """The smallest threshold that at most ``rate`` of held-out similarities, float [M], exceed; None of nothing."""
    if not len(similarities):
        return None
    return float(np.sort(similarities)[::-1][math.floor(rate * len(similarities))])


def near_duplicate_groups(count: int, alike: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """The group of each of ``count`` images, int64 [N]: images chained by being alike share one.

    alike: bool [stop-start,N] for rows start..stop-1.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = [np.empty((2, 0), np.int64)]
    for start in range(0, count, GROUP_BLOCK):
        pairs.append(np.argwhere(alike(start, min(start + GROUP_BLOCK, count))).T + np.array([[start], [0]]))
    row, column = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(row), dtype=bool), (row, column)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def groups_by_cosine(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """Near-duplicates by cosine above ``threshold``: unit vectors float32 [N,D] -> int64 [N]."""
    return near_duplicate_groups(len(vectors), lambda start, stop: vectors[start:stop] @ vectors.T > threshold)


def groups_by_tokens(tokens: Tensor, threshold: float) -> np.ndarray:
    """Near-duplicates by a share of equal tokens above ``threshold``: int64 [N,T] -> int64 [N]."""
    rows = tokens.numpy()
    return near_duplicate_groups(
        len(rows), lambda start, stop: (rows[start:stop, None] == rows[None]).mean(2) > threshold
    )


def distinct(extracted: np.ndarray, groups: np.ndarray) -> int:
    """Groups of near-duplicates with at least one extracted image: bool [N], int64 [N]."""
    return len(np.unique(groups[extracted]))
