"""The model seam: what every stage may ask of an image autoregressive model, whatever its family.

A family is one subclass of :class:`Model` plus a row in the registry. Nothing outside this folder knows a family.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmem.backends.plain import Span
from fastmem.backends.select import Backend, FC1Response, choose_backend

# to_unit_range is imported for those who ask this module for it
from fastmem.data.views import to_unit_range  # noqa: F401
from fastmem.errors import FastmemError, InputFileError, UsageError
from fastmem.models.finite import Witness, first_part, first_wrong
from fastmem.models.layers import NO_CLASS
from fastmem.models.observation import Observation, Segment, TokenOutcomes
from fastmem.models.registry import Preset
from fastmem.models.tokenizer import Tokenizer

# pixels that go through the tokenizer at once, which bounds its memory whatever the caller's batch (8 images of 256 px)
TOKENIZER_PIXELS = 8 * 256 * 256
# how far pixels may leave [0,1], for what a change of their type rounds
PIXEL_SLACK = 1e-3
# images of a pass that is run again to find where its numbers went wrong
BLAMED_IMAGES = 8
# types of tokens and labels
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# logits that are held at once, which bounds them whatever the caller's batch (256 MiB)
LOGITS = 2**26


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: by the settings of a preset, with a random generator, or torch's global one when None."""

    preset: Preset
    generator: torch.Generator | None


class Model(ABC):
    """A generator and its tokenizer behind the one interface that the stages use.

    A family's constructor sets the attributes from ``image_size`` to ``vocabulary`` and then calls this one.

    Args:
        generator: the network that predicts tokens.
        tokenizer: the network that turns images into tokens and back.
        preset: the settings with which ``generate`` samples.
        prefixes: prefix lengths in tokens, the family's scaled ones when None.

    Attributes:
        image_size: pixels along a side of an image.
        num_tokens: tokens of an image, T.
        num_layers: transformer blocks.
        num_units: outputs of fc1 in each block.
        num_classes: classes, whose labels are 0..num_classes-1.
        vocabulary: number of image tokens, V.
        prefixes: the prefix lengths that an extraction tries by default, in tokens.
        name: the registry's name of the model, or the class's where no row describes it.
        checkpoint_file: the generator's file where the user named one, absolute, else None.
        tokenizer_file: the tokenizer's file where the user named one, absolute, else None.
        edits: edits of the weights that are not undone, oldest first.
    """

    generator_class: ClassVar[type[nn.Module]]
    tokenizer_class: ClassVar[type[Tokenizer]]
    # the preset of a model that no registry row describes: plain sampling without guidance
    plain_preset: ClassVar[Preset] = Preset()
    # share of all units whose edit a family's main results are stated for, fixed before anything is measured
    declared_fraction: ClassVar[float] = 0.05

    image_size: int
    num_tokens: int
    num_layers: int
    num_units: int
    num_classes: int
    vocabulary: int

    def __init__(
        self, generator: nn.Module, tokenizer: Tokenizer, preset: Preset, prefixes: Sequence[int] | None = None
    ) -> None:
        self.generator = generator.eval().requires_grad_(False)
        # convolutions of the tokenizer run 1.6 times as fast on a CPU in this layout
        self.tokenizer = tokenizer.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.preset = preset
        self.prefixes = tuple(self.scaled_prefixes() if prefixes is None else prefixes)
        self.name = type(self).__name__
        self.checkpoint_file: Path | None = None
        self.tokenizer_file: Path | None = None
        self.edits: list[Any] = []
        self._fingerprint: dict[str, str] = {}
        self._tokenizer_hash = ""

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
        """Names of the segments that see no image token, which are reported and never ranked."""
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
        """The crops that this family was trained on, as a recipe of fastmem.data.views.

        ``views`` is the number of crops, or "center" for the centre crop alone.
        """

    @abstractmethod
    def scaled_prefixes(self) -> tuple[int, ...]:
        """The published prefix lengths at the same shares of this model's tokens, in tokens."""

    @property
    def prefix_lengths(self) -> Sequence[int]:
        """Every length, in tokens, that a prefix may have, in rising order."""
        return range(self.num_tokens + 1)

    def forward_logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """``logits`` of checked arguments on the model's device, with gradients; the label -1 stands for no class."""
        return self.generator(tokens, labels)

    @abstractmethod
    def _observe(
        self, tokens: Tensor, labels: Tensor, spans: Sequence[Span], fc1_response: FC1Response, with_logits: bool
    ) -> Observation:
        """The teacher-forced pass over true tokens, with every block's fc1 run by ``fc1_response``.

        Args:
            tokens: int64 [N,T], checked and on the model's device.
            labels: int64 [N], likewise.
            spans: the (start, stop) positions of S segments.
            fc1_response: the operator, as fastmem.backends.plain.fc1_response describes it.
            with_logits: logits are wanted too. A family that leaves them None has them computed by ``forward_logits``,
                in a pass of their own.
        """

    @abstractmethod
    def _generate(self, labels: Tensor, tokens: Tensor, lengths: Tensor, sampling: Sampling | None) -> Tensor:
        """Continue the beginnings of rows of tokens to whole images, int64 [N,T].

        Logits that are not finite are refused, best by one call of ``check`` at the end, which costs one wait.

        Args:
            labels: int64 [N], on the model's device as all tensors here, with N of at least 1.
            tokens: int64 [N,T], which may be overwritten.
            lengths: int64 [N], how many first tokens of each row are given.
            sampling: how the other tokens are drawn, or None for the arg max without guidance.
        """

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.generator.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The generator's floating type; the tokenizer stays float32."""
        return next(self.generator.parameters()).dtype

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the weights of "checkpoint" (the generator) and "tokenizer", in hex; computed once."""
        if not self._fingerprint:
            self._fingerprint = {"checkpoint": _hash(self.generator), "tokenizer": self.tokenizer_hash()}
        return self._fingerprint

    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's weights, in hex, which no edit of the generator changes; computed once."""
        if not self._tokenizer_hash:
            self._tokenizer_hash = _hash(self.tokenizer)
        return self._tokenizer_hash

    def exchange_fingerprint(self, known: dict[str, str]) -> dict[str, str]:
        """Replace the remembered fingerprint after a change of the weights in place, and return the one before.

        ``known`` is the fingerprint of the weights as they are now, or {} to have it computed when it is asked for.
        """
        before, self._fingerprint = self._fingerprint, known
        return before

    @property
    def rows_of_logits(self) -> int:
        """How many images' logits are held at once."""
        return max(1, LOGITS // (self.num_tokens * self.vocabulary))

    @torch.inference_mode()
    def tokenize(self, images: Tensor) -> Tensor:
        """Tokens of images: float [N,3,S,S] in [0,1] to int64 [N,T].

        Raises:
            UsageError: the images have another shape, an integer type, or pixels that are NaN or outside [0,1].
            InputFileError: the tokenizer gives numbers that are not finite.
        """
        expected = (3, self.image_size, self.image_size)
        _check_type("images", images, f"float [N,{','.join(map(str, expected))}] in [0,1]")
        if images.ndim != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
            raise UsageError(
                f"expected images as float [N,{','.join(map(str, expected))}] in [0,1], got {images.dtype} "
                f"{list(images.shape)}: resize and scale them first"
            )
        if not len(images):
            return torch.empty(0, self.num_tokens, dtype=torch.int64, device=self.device)
        low, high = torch.stack(images.aminmax()).tolist()
        # NaN fails every comparison
        if not (low >= -PIXEL_SLACK and high <= 1 + PIXEL_SLACK):
            raise UsageError(
                f"expected images with pixels in [0,1], got {low:g}..{high:g}: divide bytes by 255, undo any other "
                "normalisation, and clamp what a resize overshot"
            )
        images = images.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        # a near tie between two codes must not be decided by reduced precision
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([self.tokenizer.encode(chunk) for chunk in self._tokenizer_chunks(images)])

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens: int64 [N,T] to float32 [N,3,S,S] in [0,1].

        Raises:
            UsageError: the tokens have another shape or are outside the codebook.
            InputFileError: the tokenizer gives numbers that are not finite.
        """
        tokens = self._check_tokens(tokens)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([self.tokenizer.decode(chunk) for chunk in self._tokenizer_chunks(tokens)])

    def _tokenizer_chunks(self, batch: Tensor) -> tuple[Tensor, ...]:
        return batch.split(max(1, TOKENIZER_PIXELS // self.image_size**2))

    @torch.inference_mode()
    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits float32 [N,T,V] of true tokens int64 [N,T] under labels int64 [N].

        Position t predicts token t.

        Raises:
            UsageError: tokens or labels have another shape or are out of range.
            FastmemError: the logits are not finite, as ``check`` says.
        """
        tokens, labels = self.check_inputs(tokens, labels)
        logits = self.forward_logits(tokens, labels)
        self.check("logits", Witness().see(logits), tokens, labels)
        return logits

    @torch.inference_mode()
    def outcomes(self, tokens: Tensor, labels: Tensor | None) -> TokenOutcomes:
        """Loss and hits of true tokens int64 [N,T] under labels int64 [N], or without a class where labels are None.

        Raises:
            UsageError: tokens or labels have another shape or are out of range.
            FastmemError: the losses are not finite, as ``check`` says.
        """
        if labels is None:
            tokens = self._check_tokens(tokens)
            labels = torch.full((len(tokens),), NO_CLASS, device=self.device)
        else:
            tokens, labels = self.check_inputs(tokens, labels)
        chunks = self._logits_chunks(tokens, labels)
        outcomes = TokenOutcomes.join([TokenOutcomes.of(self.forward_logits(t, y), t) for t, y in chunks])
        # any logit that is NaN makes the loss of its position NaN
        self.check("losses", Witness().see(outcomes.loss), tokens, labels)
        return outcomes

    def candidate_scores(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Share of hits over the candidate positions, float32 [N], for tokens int64 [N,T] under labels int64 [N].

        A hit is a token that is the arg max of its logits.

        Raises:
            UsageError: tokens or labels have another shape or are out of range.

        Source: arXiv 2502.02514.
        """
        return self.hit_share(self.outcomes(tokens, labels))

    def hit_share(self, outcomes: TokenOutcomes) -> Tensor:
        """Share of hits over the candidate positions, float32 [N], of outcomes that are known already."""
        start, stop = self.candidate_positions
        return outcomes.hit[:, start:stop].float().mean(1)

    @torch.inference_mode()
    def responses(
        self, tokens: Tensor, labels: Tensor, segments: Sequence[str] | None = None, backend: Backend | None = None
    ) -> Tensor:
        """Each unit's mean absolute activation over each segment, float32 [N,layers,segments,units].

        The check of the numbers reaches every position of the pass, inside and outside the segments, as far as the
        family's ``Observation`` holds its residual stream.

        Args:
            tokens: int64 [N,T].
            labels: int64 [N].
            segments: names, the default ones when None.
            backend: the operators to use, the best ones for the model's device when None.

        Raises:
            UsageError: a segment is unknown, or tokens or labels have another shape or are out of range.
            FastmemError: the numbers of the pass are not finite, as ``check`` says.
        """
        spans, fc1_response = self._choose(segments, backend)
        tokens, labels = self.check_inputs(tokens, labels)
        seen = self._observe(tokens, labels, spans, fc1_response, False)
        self._check_observation(seen, segments, tokens, labels)
        return seen.responses

    @torch.inference_mode()
    def responses_and_outcomes(
        self, tokens: Tensor, labels: Tensor, segments: Sequence[str] | None = None, backend: Backend | None = None
    ) -> tuple[Tensor, TokenOutcomes]:
        """What ``responses`` and ``outcomes`` give, from one pass where the family shares it between them.

        Args:
            tokens: true tokens int64 [N,T].
            labels: true labels int64 [N].
            segments: names of the responses' segments, the default ones when None.
            backend: the operators to use, the best ones for the model's device when None.

        Raises:
            UsageError: in the cases in which ``responses`` raises it.
        """
        spans, fc1_response = self._choose(segments, backend)
        tokens, labels = self.check_inputs(tokens, labels)
        responses, parts = [], []
        for t, y in self._logits_chunks(tokens, labels):
            seen = self._observe(t, y, spans, fc1_response, True)
            logits = self.forward_logits(t, y) if seen.logits is None else seen.logits
            self._check_observation(seen, segments, t, y)
            responses.append(seen.responses)
            parts.append(TokenOutcomes.of(logits, t))
        outcomes = TokenOutcomes.join(parts)
        self.check("losses", Witness().see(outcomes.loss), tokens, labels)
        return torch.cat(responses), outcomes

    def check(self, what: str, witness: Witness, tokens: Tensor, labels: Tensor) -> None:
        """Refuse numbers of a pass that are not finite, and say which part of the network gave the first of them.

        Args:
            what: plural noun for what was computed.
            witness: what has seen these numbers.
            tokens: int64 [N,T] of the pass, on the model's device.
            labels: int64 [N] of the pass, likewise; -1 for no class.

        Raises:
            UsageError: a number is NaN or beyond 2^56 in float16 or under an edit, which the caller can change.
            InputFileError: a number is NaN or beyond 2^56, and the weights are to blame.
        """
        if not witness.holds():
            raise self._wrong_numbers(f"finite {what}, got NaN or numbers beyond 2^56", tokens, labels)

    def _check_observation(
        self, seen: Observation, segments: Sequence[str] | None, tokens: Tensor, labels: Tensor
    ) -> None:
        if seen.is_finite():
            return
        found = first_wrong(seen.responses)
        if found is None:
            got = "NaN or numbers beyond 2^56 in the residual stream"
        else:
            block, segment, unit, value = found
            got = f"{value:g} for unit {unit} of block {block} in segment {self.find_segments(segments)[segment].name}"
        raise self._wrong_numbers(f"finite responses, got {got}", tokens, labels)

    def _wrong_numbers(self, what: str, tokens: Tensor, labels: Tensor) -> FastmemError:
        part = self._first_part(tokens, labels)
        dtype = str(self.dtype).removeprefix("torch.")
        said = f"expected {what}{f', the first from {part}' if part else ''}, in {dtype}"
        if self.dtype == torch.float16:
            return UsageError(f"{said}: its largest number is 65504, so take --dtype bfloat16 or float32")
        if self.edits:
            return UsageError(f"{said} under an edit of the weights: take a smaller factor, or undo the edit")
        return InputFileError(
            f"{said}: the weights are damaged or of another network, give the right files with --checkpoint and "
            "--tokenizer"
        )

    @torch.inference_mode()
    def _first_part(self, tokens: Tensor, labels: Tensor) -> str:
        """Name of the first module that gives a wrong number in the teacher-forced pass; "" where none does."""
        # a guided generation also runs without a class
        for classes in (labels, torch.full_like(labels, NO_CLASS)):
            for chunk in zip(tokens.split(BLAMED_IMAGES), classes.split(BLAMED_IMAGES), strict=True):
                part = first_part((self.tokenizer, self.generator), partial(self.forward_logits, *chunk))
                if part:
                    return part
        return ""

    def _choose(self, segments: Sequence[str] | None, backend: Backend | None) -> tuple[list[Span], FC1Response]:
        """The positions of named segments, and the operator that a pass over them uses."""
        spans = [(s.start, s.stop) for s in self.find_segments(segments)]
        backend = choose_backend("auto", self.device) if backend is None else backend
        return spans, backend.fc1_response

    def _logits_chunks(self, tokens: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and labels of as many images at a time as may have their logits held at once."""
        return zip(tokens.split(self.rows_of_logits), labels.split(self.rows_of_logits), strict=True)

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
        """Continue prefixes of true tokens to whole images, int64 [N,T].

        Args:
            labels: int64 [N].
            prefix: int64 [N,P] with P >= 0, or N rows of different length.
            greedy: take the arg max of the conditional logits, without guidance, and compute equal rows once; else
                sample.
            preset: settings to sample with, the model's own when None.
            generator: random state to sample with, torch's global one when None.

        Raises:
            UsageError: a preset is given with ``greedy``, lacks a setting that the family needs or has one that is out
                of range, a prefix has a length that is not among ``prefix_lengths``, the random generator is on another
                device, or labels or tokens have another shape or are out of range.
            FastmemError: the logits are not finite, as ``check`` says.
        """
        if greedy and preset is not None:
            raise UsageError("expected no preset with greedy=True, got one: drop it, or pass greedy=False to sample")
        if preset is not None:
            _check_preset(preset)
        rows = _prefix_rows(prefix)
        labels = self._check_labels(labels, len(rows))
        if generator is not None and generator.device.type != self.device.type:
            raise UsageError(
                f"expected a random generator on {self.device.type}, where the model is, got one on "
                f"{generator.device.type}: make it with torch.Generator({self.device.type!r})"
            )
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        self._check_lengths(lengths.tolist())
        tokens = torch.zeros(len(rows), self.num_tokens, dtype=torch.int64, device=self.device)
        for row, given in zip(tokens, rows, strict=True):
            row[: len(given)] = torch.as_tensor(given, device=self.device)
        tokens = self._check_tokens(tokens)
        if not len(rows):
            return tokens
        lengths = lengths.to(self.device)
        if not greedy:
            return self._generate(labels, tokens, lengths, Sampling(preset or self.preset, generator))
        first, same = _distinct(torch.cat([labels[:, None], lengths[:, None], tokens], dim=1))
        return self._generate(labels[first], tokens[first], lengths[first], None)[same]

    def find_segments(self, names: Sequence[str] | None) -> tuple[Segment, ...]:
        """Segments by name, the default ones when None.

        Raises:
            UsageError: a name is unknown, or there is none.
        """
        known = {s.name: s for s in self.all_segments}
        # a single name would be taken for its letters
        chosen = self.segments if names is None else (names,) if isinstance(names, str) else tuple(names)
        unknown = [n for n in chosen if n not in known]
        if unknown or not chosen:
            raise UsageError(f"expected segments out of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
        return tuple(known[n] for n in chosen)

    def check_inputs(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [N,T] and labels int64 [N] on the model's device, as ``forward_logits`` takes them.

        Raises:
            UsageError: tokens or labels have another shape or are out of range.
        """
        return self._check_tokens(tokens), self._check_labels(labels, len(tokens))

    def _check_tokens(self, tokens: Tensor) -> Tensor:
        _check_type("tokens", tokens, f"int64 [N,{self.num_tokens}]")
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens or tokens.dtype not in INTEGERS:
            raise UsageError(f"expected tokens as int64 [N,{self.num_tokens}], got {tokens.dtype} {list(tokens.shape)}")
        low, high = _range(tokens)
        if low < 0 or high >= self.vocabulary:
            raise UsageError(
                f"expected tokens in 0..{self.vocabulary - 1}, got {low}..{high}: were they made by another tokenizer?"
            )
        return tokens.to(self.device, torch.int64)

    def _check_labels(self, labels: Tensor, count: int) -> Tensor:
        _check_type("labels", labels, f"int64 [{count}]")
        if labels.shape != (count,) or labels.dtype not in INTEGERS:
            raise UsageError(f"expected labels as int64 [{count}], got {labels.dtype} {list(labels.shape)}")
        low, high = _range(labels)
        if low < 0 or high >= self.num_classes:
            raise UsageError(
                f"expected labels in 0..{self.num_classes - 1}, got {low}..{high}: does the data have more classes "
                "than the checkpoint?"
            )
        return labels.to(self.device, torch.int64)

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        longest = max(lengths, default=0)
        if longest > self.num_tokens:
            raise UsageError(f"expected prefixes of at most {self.num_tokens} tokens, got one of {longest}: shorten it")
        unfit = [length for length in lengths if length not in self.prefix_lengths]
        if unfit:
            raise UsageError(
                f"expected prefixes of {', '.join(map(str, self.prefix_lengths))} tokens, got one of {unfit[0]}: "
                "end it at one of these"
            )


def _check_type(name: str, given: object, wanted: str) -> None:
    if not isinstance(given, Tensor):
        raise UsageError(
            f"expected {name} as a tensor {wanted}, got {type(given).__name__}: make one with torch.as_tensor"
        )


def _range(values: Tensor) -> tuple[int, int]:
    """The smallest and the largest of some integers, with one wait for a GPU; 0 and 0 where there are none."""
    if not values.numel():
        return 0, 0
    low, high = torch.stack(values.aminmax()).tolist()
    return low, high


def _check_preset(preset: Preset) -> None:
    """Refuse settings by which logits would become NaN, or nothing could be drawn."""
    right = {
        "a temperature in 1e-6..1e6": 1e-6 <= preset.temperature <= 1e6,
        "a guidance in -1e6..1e6": -1e6 <= preset.guidance <= 1e6,
        "a guidance_power in 1e-6..1e6": preset.guidance_power is None or 1e-6 <= preset.guidance_power <= 1e6,
        "a top_k of at least 1": preset.top_k is None or preset.top_k >= 1,
        "a top_p in (0,1]": preset.top_p is None or 0 < preset.top_p <= 1,
    }
    wrong = [wanted for wanted, holds in right.items() if not holds]
    if wrong:
        raise UsageError(f"expected a preset with {wrong[0]}, got {preset}: change it")


def _prefix_rows(prefix: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The rows of a prefix, each int64 [P]. Raises: UsageError where a row is no list of integers."""
    whole = isinstance(prefix, Tensor) and prefix.ndim != 2
    rows = [] if whole else [torch.as_tensor(row) for row in prefix]
    # an empty list becomes a tensor of floats
    unfit = [r for r in rows if r.ndim != 1 or (r.dtype not in INTEGERS and len(r))]
    if whole or unfit:
        got = prefix if isinstance(prefix, Tensor) else unfit[0]
        raise UsageError(
            f"expected a prefix as int64 [N,P], or N rows of int64 tokens, got {got.dtype} {list(got.shape)}: give one "
            "row of tokens for each image"
        )
    return rows


def _hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each set of equal rows of int64 [N,n], in order, int64 [D]; and which of these each row equals."""
    _, same = rows.unique(dim=0, return_inverse=True)
    order = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(order, len(rows)).scatter_reduce_(0, same, order, "amin")[: int(same.max()) + 1]
    by_first = first.argsort()
    return first[by_first], by_first.argsort()[same]
