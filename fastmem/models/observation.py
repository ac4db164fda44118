"""Values that the teacher-forced pass over true tokens gives: segments, unit responses, losses and hits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastmem.models.finite import Witness


@dataclass(frozen=True)
class Segment:
    """A named range of positions of the teacher-forced pass.

    Attributes:
        name: the name under which users ask for it.
        start: its first position.
        stop: the position after its last one.
        class_only: True where its positions see the class and no image token.
    """

    name: str
    start: int
    stop: int
    class_only: bool = False


@dataclass(frozen=True)
class Observation:
    """What one teacher-forced pass gives while the outputs of every block's fc1 are observed.

    ``responses`` are float32 [N,layers,S,units], each unit's mean absolute activation over each of S spans of
    positions. ``logits`` are float32 [N,T,V], or None where they were not computed. ``stream`` is the residual stream
    of all positions at the end of the pass, [N,positions,width], by which numbers that overflowed are found at any
    position; None where a family has none.
    """

    responses: Tensor
    logits: Tensor | None = None
    stream: Tensor | None = None

    def is_finite(self) -> bool:
        """Whether no response is infinite or NaN, and no number of the stream is or is too large for a norm."""
        return Witness().see(self.responses, *(() if self.stream is None else (self.stream,))).holds()


@dataclass(frozen=True)
class TokenOutcomes:
    """How well the teacher-forced pass predicts the true tokens.

    ``loss`` is the cross entropy of each token in nats, float32 [N,T]. ``hit`` is bool [N,T], True where the arg max of
    the logits is the true token.
    """

    loss: Tensor
    hit: Tensor

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor) -> TokenOutcomes:
        """Outcomes of logits float32 [N,T,V] for the true tokens int64 [N,T]."""
        loss = functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        return cls(loss, logits.argmax(-1) == tokens)

    @classmethod
    def join(cls, parts: Sequence[TokenOutcomes]) -> TokenOutcomes:
        """Outcomes of the images of all parts, in order."""
        return cls(torch.cat([p.loss for p in parts]), torch.cat([p.hit for p in parts]))
