"""The model seam: what every stage may ask of an image autoregressive model, whatever its family.

A family is one subclass of :class:`Model` plus a row in the registry; nothing outside this folder knows a family.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmem.backends.select import Backend, choose_backend
from fastmem.errors import UsageError
from fastmem.models.layers import NO_CLASS
from fastmem.models.registry import Preset

# pixels that go through the tokenizer at once, which bounds its memory whatever the caller's batch (8 images of 256 px)
TOKENIZER_PIXELS = 8 * 256 * 256
# logits that are held at once, which bounds them whatever the caller's batch (256 MiB)
LOGITS = 2**26


def to_unit_range(images: Tensor) -> Tensor:
    """Pictures uint8 [N,S,S,3] in 0..255 to float32 [N,3,S,S] in [0,1]."""
    return images.permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Segment:
    """A named range of positions of the teacher-forced pass; ``class_only`` ones see no image token."""

    name: str
    start: int
    stop: int
    class_only: bool = False


@dataclass(frozen=True)
class TokenOutcomes:
    """How the teacher-forced pass did on true tokens: ``loss`` in nats, float32 [N,T]; ``hit``, bool [N,T], where the
    arg max of the logits is the true token."""

    loss: Tensor
    hit: Tensor


def _outcomes(logits: Tensor, tokens: Tensor) -> TokenOutcomes:
    loss = functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return TokenOutcomes(loss, logits.argmax(-1) == tokens)


def _hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Model(ABC):
    """A generator and its tokenizer behind the one interface that the stages use.

    image_size: pixels along a side; num_tokens: T; num_layers, num_units: blocks, and fc1 outputs of each;
    num_classes: labels are 0..num_classes-1; prefixes: the ladder of prefix lengths in tokens.
    """

    generator_class: ClassVar[type[nn.Module]]
    tokenizer_class: ClassVar[type[nn.Module]]
    # of a model that no registry row describes: plain sampling, no guidance
    plain_preset: ClassVar[Preset] = Preset()
    # share of units whose edit a family's results are stated for, named before anything is measured
    declared_fraction: ClassVar[float] = 0.05

    def __init__(
        self, generator: nn.Module, tokenizer: nn.Module, preset: Preset, prefixes: Sequence[int] | None = None
    ) -> None:
        self.generator = generator.eval().requires_grad_(False)
        # convolutions of the tokenizer run 1.6 times as fast on a CPU in this layout
        self.tokenizer = tokenizer.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.preset = preset
        self.prefixes = tuple(self.scaled_prefixes() if prefixes is None else prefixes)
        self.name = type(self).__name__
        self._fingerprint: dict[str, str] = {}
        self._tokenizer_hash = ""
        # edits of the weights that are not undone, oldest first
        self.edits: list[Any] = []

    image_size: int
    num_tokens: int
    num_layers: int
    num_units: int
    num_classes: int

    @property
    @abstractmethod
    def all_segments(self) -> tuple[Segment, ...]:
        """Every segment that can be asked for by name."""

    @property
    @abstractmethod
    def segments(self) -> tuple[str, ...]:
        """Names of the default segments, in order."""

    @property
    def class_only(self) -> tuple[str, ...]:
        """Names of the segments that see no image token: reported, never ranked."""
        return tuple(s.name for s in self.all_segments if s.class_only)

    @property
    @abstractmethod
    def candidate_positions(self) -> tuple[int, int]:
        """Token range (start, stop) over which an extraction candidate's hits are counted."""

    @property
    @abstractmethod
    def fc1_layers(self) -> tuple[nn.Linear, ...]:
        """The first linear layer of every block's MLP, in block order; its outputs are the units."""

    @abstractmethod
    def view_recipe(self, views: int | str) -> Any:
        """The view recipe this family was trained with: a number of views, or "center"; see fastmem.data.views."""

    @abstractmethod
    def scaled_prefixes(self) -> tuple[int, ...]:
        """The published prefix ladder at the same shares of this model's tokens."""

    @property
    def prefix_lengths(self) -> Sequence[int]:
        """Every length, in tokens, that a prefix may have, in rising order."""
        return range(self.num_tokens + 1)

    def forward_logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """``logits`` of checked arguments on the model's device, with gradients; the label -1 stands for no class."""
        return self.generator(tokens, labels)

    @abstractmethod
    def _responses(self, tokens: Tensor, labels: Tensor, spans: Sequence[tuple[int, int]], backend: Backend) -> Tensor:
        """Responses float32 [N,layers,S,units] of checked tokens and labels."""

    def _responses_and_logits(
        self, tokens: Tensor, labels: Tensor, spans: Sequence[tuple[int, int]], backend: Backend
    ) -> tuple[Tensor, Tensor]:
        """Responses and logits of checked tokens and labels; a family can share the pass between them."""
        return self._responses(tokens, labels, spans, backend), self.forward_logits(tokens, labels)

    @abstractmethod
    def _generate(
        self,
        labels: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        preset: Preset | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Complete rows of tokens int64 [N,T] whose first ``lengths`` [N] are given; greedy without a preset."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.generator.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The generator's floating type; the tokenizer stays float32."""
        return next(self.generator.parameters()).dtype

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the weights of "checkpoint" (the generator) and "tokenizer", as hex; computed once."""
        if not self._fingerprint:
            self._fingerprint = {"checkpoint": _hash(self.generator), "tokenizer": self.tokenizer_hash()}
        return self._fingerprint

    def tokenizer_hash(self) -> str:
        """The "tokenizer" of ``fingerprint`` alone, which no edit of the generator changes; computed once."""
        if not self._tokenizer_hash:
            self._tokenizer_hash = _hash(self.tokenizer)
        return self._tokenizer_hash

    def exchange_fingerprint(self, known: dict[str, str]) -> dict[str, str]:
        """For who changes the weights in place: say which hashes are known of them now ({}: none), and get those that
        were known before."""
        before, self._fingerprint = self._fingerprint, known
        return before

    @property
    def rows_of_logits(self) -> int:
        """How many images' logits are held at once."""
        return max(1, LOGITS // (self.num_tokens * self.vocabulary))

    def _tokenizer_chunks(self, batch: Tensor) -> tuple[Tensor, ...]:
        return batch.split(max(1, TOKENIZER_PIXELS // self.image_size**2))

    @torch.inference_mode()
    def tokenize(self, images: Tensor) -> Tensor:
        """Tokens of images: float [N,3,S,S] in [0,1] -> int64 [N,T].

        Raises: UsageError for another shape.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
            raise UsageError(
                f"expected images as float [N,{','.join(map(str, expected))}] in [0,1], got {images.dtype} "
                f"{list(images.shape)}: resize and scale them first"
            )
        images = images.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        # a near tie between two codes must not be decided by reduced precision
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([self.tokenizer.encode(chunk) for chunk in self._tokenizer_chunks(images)])

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens: int64 [N,T] -> float32 [N,3,S,S] in [0,1].

        Raises: UsageError for another shape or tokens outside the codebook.
        """
        tokens = self._check_tokens(tokens)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([self.tokenizer.decode(chunk) for chunk in self._tokenizer_chunks(tokens)])

    @torch.inference_mode()
    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits of true tokens int64 [N,T] under labels int64 [N]: float32 [N,T,V].

        Position t predicts token t. Raises: UsageError for other shapes, tokens or labels out of range.
        """
        return self.forward_logits(*self.check_inputs(tokens, labels))

    @torch.inference_mode()
    def outcomes(self, tokens: Tensor, labels: Tensor | None) -> TokenOutcomes:
        """Loss and hits of true tokens int64 [N,T] under labels int64 [N], or without a class where labels are None.

        Raises: as ``logits``.
        """
        tokens = self._check_tokens(tokens)
        if labels is None:
            labels = torch.full((len(tokens),), NO_CLASS, device=self.device)
        else:
            labels = self._check_labels(labels, len(tokens))
        chunks = (c.split(self.rows_of_logits) for c in (tokens, labels))
        return _join([_outcomes(self.forward_logits(t, y), t) for t, y in zip(*chunks, strict=True)])

    @torch.inference_mode()
    def responses_and_outcomes(
        self, tokens: Tensor, labels: Tensor, segments: Sequence[str] | None = None, backend: Backend | None = None
    ) -> tuple[Tensor, TokenOutcomes]:
        """What ``responses`` and ``outcomes`` give, from one pass. Raises: as both."""
        spans = [(s.start, s.stop) for s in self.find_segments(segments)]
        backend = choose_backend("auto", self.device) if backend is None else backend
        tokens = self._check_tokens(tokens)
        labels = self._check_labels(labels, len(tokens))
        responses, outcomes = [], []
        for t, y in zip(*(c.split(self.rows_of_logits) for c in (tokens, labels)), strict=True):
            response, logits = self._responses_and_logits(t, y, spans, backend)
            responses.append(response)
            outcomes.append(_outcomes(logits, t))
        return torch.cat(responses), _join(outcomes)

    def candidate_scores(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Share of hits over the candidate positions, float32 [N]: where the arg max of the logits is the true token.

        tokens: int64 [N,T]; labels: int64 [N]. Raises: as ``logits``. Source: arXiv 2502.02514.
        """
        return self.hit_share(self.outcomes(tokens, labels))

    def hit_share(self, outcomes: TokenOutcomes) -> Tensor:
        """``candidate_scores`` from outcomes: float32 [N]."""
        start, stop = self.candidate_positions
        return outcomes.hit[:, start:stop].float().mean(1)

    @torch.inference_mode()
    def responses(
        self, tokens: Tensor, labels: Tensor, segments: Sequence[str] | None = None, backend: Backend | None = None
    ) -> Tensor:
        """Mean absolute fc1 activation over each segment: float32 [N,layers,segments,units].

        tokens: int64 [N,T]; labels: int64 [N]; segments: names, the default ones when None.

        Raises: UsageError for an unknown segment, other shapes, tokens or labels out of range.
        """
        spans = [(s.start, s.stop) for s in self.find_segments(segments)]
        backend = choose_backend("auto", self.device) if backend is None else backend
        return self._responses(self._check_tokens(tokens), self._check_labels(labels, len(tokens)), spans, backend)

    @torch.inference_mode()
    def generate(
        self,
        labels: Tensor,
        prefix: Tensor | Sequence[Tensor],
        *,
        greedy: bool = True,
        preset: Preset | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prefixes of true tokens to whole images: int64 [N,T].

        labels: int64 [N]; prefix: int64 [N,P] with P >= 0, or N rows of different length; greedy: arg max of the
        conditional branch, no guidance, equal rows computed once; else sampled by ``preset`` (the model's own when
        None) with ``generator``.

        Raises: UsageError for a preset with greedy, other shapes, prefixes longer than T or of a length that is not
        among ``prefix_lengths``, values out of range.
        """
        if greedy and preset is not None:
            raise UsageError("expected no preset with greedy=True, got one: drop it, or pass greedy=False to sample")
        rows = list(prefix)
        labels = self._check_labels(labels, len(rows))
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        if len(rows) and int(lengths.max()) > self.num_tokens:
            raise UsageError(
                f"expected prefixes of at most {self.num_tokens} tokens, got one of {int(lengths.max())}: shorten it"
            )
        unfit = [length for length in lengths.tolist() if length not in self.prefix_lengths]
        if unfit:
            raise UsageError(
                f"expected prefixes of {', '.join(map(str, self.prefix_lengths))} tokens, got one of {unfit[0]}: "
                "end it at one of these"
            )
        tokens = torch.zeros(len(rows), self.num_tokens, dtype=torch.int64, device=self.device)
        for row, given in zip(tokens, rows, strict=True):
            row[: len(given)] = torch.as_tensor(given, device=self.device)
        tokens = self._check_tokens(tokens)
        if not len(rows):
            return tokens
        lengths = lengths.to(self.device)
        if not greedy:
            return self._generate(labels, tokens, lengths, preset or self.preset, generator)
        first, same = _distinct(torch.cat([labels[:, None], lengths[:, None], tokens], dim=1))
        return self._generate(labels[first], tokens[first], lengths[first], None, None)[same]

    def find_segments(self, names: Sequence[str] | None) -> tuple[Segment, ...]:
        """Segments by name, the default ones when None. Raises: UsageError for an unknown or empty list of names."""
        known = {s.name: s for s in self.all_segments}
        chosen = self.segments if names is None else tuple(names)
        unknown = [n for n in chosen if n not in known]
        if unknown or not chosen:
            raise UsageError(f"expected segments out of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
        return tuple(known[n] for n in chosen)

    def check_inputs(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [N,T] and labels int64 [N] on the model's device, as ``forward_logits`` takes them.

        Raises: as ``logits``.
        """
        return self._check_tokens(tokens), self._check_labels(labels, len(tokens))

    def _check_tokens(self, tokens: Tensor) -> Tensor:
        vocabulary = self.vocabulary
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens or tokens.is_floating_point():
            raise UsageError(f"expected tokens as int64 [N,{self.num_tokens}], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary):
            raise UsageError(
                f"expected tokens in 0..{vocabulary - 1}, got {int(tokens.min())}..{int(tokens.max())}: "
                "were they made by another tokenizer?"
            )
        return tokens.to(self.device, torch.int64)

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of image tokens, V."""

    def _check_labels(self, labels: Tensor, count: int) -> Tensor:
        if labels.shape != (count,) or labels.is_floating_point():
            raise UsageError(f"expected labels as int64 [{count}], got {labels.dtype} {list(labels.shape)}")
        if count and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            raise UsageError(
                f"expected labels in 0..{self.num_classes - 1}, got {int(labels.min())}..{int(labels.max())}: "
                "does the data have more classes than the checkpoint?"
            )
        return labels.to(self.device, torch.int64)


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of int64 [N,n]: the first of each set of equal rows, in order, int64 [D]; and which of them each row equals."""
    _, same = rows.unique(dim=0, return_inverse=True)
    order = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(order, len(rows)).scatter_reduce_(0, same, order, "amin")[: int(same.max()) + 1]
    by_first = first.argsort()
    return first[by_first], by_first.argsort()[same]


def _join(parts: Sequence[TokenOutcomes]) -> TokenOutcomes:
    return TokenOutcomes(torch.cat([p.loss for p in parts]), torch.cat([p.hit for p in parts]))
