"""Verdicts: how similar a completion and its target are, when the target counts as extracted, and how many are."""

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

# the cosine is the published threshold for SSCD (arXiv 2502.02514); the other is a share of correct tokens
SSCD_THRESHOLD, MATCH_THRESHOLD = 0.75, 0.9
# share of held-out images that may be above the false-alarm threshold
FALSE_ALARMS = 0.01
# embeddings of generated images that are kept in memory, about 200 MiB
REMEMBERED = 100_000
# rows of the similarity matrix computed at once
GROUP_BLOCK = 64


class Judge(Protocol):
    """A measure of how similar completions and their targets are.

    Attributes:
        name: name of the embedder, or "token-match"; results of judges with different names must not be compared.
        threshold: a target counts as extracted when its similarity is above this.
    """

    name: str
    threshold: float

    def similarities(self, model: Model, targets: Targets, prefixes: Sequence[int], generated: Tensor) -> np.ndarray:
        """Return the similarity of every completion with its target, float32 [P,N].

        Args:
            model: the model whose tokenizer decodes tokens to pictures.
            targets: the N images that were attacked, compared as the tokenizer reconstructs them.
            prefixes: the P prefix lengths, in tokens.
            generated: the completions, int64 [P,N,T].
        """


class TokenMatch:
    """A judge that needs no embedder: the share of tokens after the prefix that are correct, in [0,1]."""

    name = "token-match"

    def __init__(self, threshold: float = MATCH_THRESHOLD) -> None:
        self.threshold = threshold

    def similarities(self, model: Model, targets: Targets, prefixes: Sequence[int], generated: Tensor) -> np.ndarray:
        """Return the share of correct tokens after the prefix, float32 [P,N].

        Args:
            model: not used.
            targets: the N images that were attacked.
            prefixes: the P prefix lengths, in tokens.
            generated: the completions, int64 [P,N,T].
        """
        return token_match(targets.tokens, prefixes, generated).float().numpy()


class SSCDJudge:
    """A judge by SSCD: the cosine between embeddings of the decoded completion and the decoded target, in [-1,1].

    ``embedder`` computes the embeddings, and a target counts as extracted when its cosine is above ``threshold``.
    Embeddings are kept in memory, so that equal images are embedded only once, even in later calls.

    Source: arXiv 2502.02514, section 5; SSCD is arXiv 2202.10261.
    """

    def __init__(self, embedder: Embedder, threshold: float = SSCD_THRESHOLD) -> None:
        self.embedder, self.name, self.threshold = embedder, embedder.name, threshold
        self._known: dict[bytes, np.ndarray] = {}
        self._tokenizer = ""

    def similarities(self, model: Model, targets: Targets, prefixes: Sequence[int], generated: Tensor) -> np.ndarray:
        """Return the cosine between every decoded completion and its decoded target, float32 [P,N].

        Args:
            model: the model whose tokenizer decodes tokens to pictures.
            targets: the N images that were attacked.
            prefixes: not used.
            generated: the completions, int64 [P,N,T].
        """
        true = self.vectors(model, targets.tokens)
        made = self.vectors(model, generated.flatten(0, 1)).reshape(*generated.shape[:2], DIMENSIONS)
        return cosines(made, true)

    def vectors(self, model: Model, tokens: Tensor) -> np.ndarray:
        """Return the embeddings, float32 [N,512], of the pictures that ``model`` decodes from tokens int64 [N,T]."""
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
    """Return the cosine of unit vectors ``a`` and ``b``, [...,512], along the last axis, float32 [...], in [-1,1]."""
    return np.einsum("...d,...d->...", a.astype(np.float64), b.astype(np.float64)).clip(-1, 1).astype(np.float32)


@dataclass(frozen=True)
class Count:
    """A count ``k`` out of ``n``, such as extracted targets, with the 95 % Wilson interval of the share k / n.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """

    k: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the interval of the share, in [0,1]; (0, 1) where ``n`` is 0."""
        if not self.n:
            return 0.0, 1.0
        z, n = 1.959963984540054, self.n
        share = self.k / n
        middle = share + z * z / (2 * n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        # at k = 0 and k = n the formula gives 0 and 1, but only up to rounding
        low = 0.0 if self.k == 0 else (middle - half) / scale
        high = 1.0 if self.k == n else (middle + half) / scale
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.k:,} of {self.n:,} ({low:.1%} to {high:.1%})"


def false_alarm_threshold(similarities: np.ndarray, rate: float = FALSE_ALARMS) -> float | None:
    """Return the smallest similarity that at most a share ``rate`` of the held-out similarities, float [M], are above.

    Return None where there are no similarities.
    """
    if not len(similarities):
        return None
    return float(np.sort(similarities)[::-1][math.floor(rate * len(similarities))])


def near_duplicate_groups(count: int, alike: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Return the number of the near-duplicate group of each of ``count`` images, int64 [count].

    Two images are in the same group if a chain of similar images connects them. ``alike(start, stop)`` says which
    images are similar to the images from ``start`` up to but without ``stop``: bool [stop-start,count].
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
    """Return near-duplicate groups, int64 [N], of unit vectors, float32 [N,D], whose cosine is above ``threshold``."""
    return near_duplicate_groups(len(vectors), lambda start, stop: vectors[start:stop] @ vectors.T > threshold)


def groups_by_tokens(tokens: Tensor, threshold: float) -> np.ndarray:
    """Return near-duplicate groups, int64 [N], of images whose share of equal tokens is above ``threshold``.

    ``tokens``, int64 [N,T], are the tokens of the images.
    """
    rows = tokens.numpy()
    return near_duplicate_groups(
        len(rows), lambda start, stop: (rows[start:stop, None] == rows[None]).mean(2) > threshold
    )


def distinct(extracted: np.ndarray, groups: np.ndarray) -> int:
    """Return how many near-duplicate groups hold at least one extracted image.

    ``extracted``, bool [N], says which images are extracted, and ``groups``, int64 [N], in which group each image is.
    """
    return len(np.unique(groups[extracted]))
