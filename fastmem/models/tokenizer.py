"""Parts that the tokenizers share: convolutions, the encoder's and the decoder's frames, and the nearest code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmem.errors import InputFileError, UsageError
from fastmem.models.finite import Witness, first_part

# groups of every group norm, as in the official networks
GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm over a feature map's channels, a multiple of 32."""
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def check_channels(name: str, channels: int) -> None:
    """Refuse a number of channels, called ``name`` in a config, that the group norms cannot divide.

    Raises:
        UsageError: it is not a multiple of 32.
    """
    if channels % GROUPS:
        raise UsageError(
            f"expected {name} to be a multiple of {GROUPS} (the group norms have {GROUPS} groups), got {channels}: "
            "choose 32, 64, 96, 128, ..."
        )


def convolution(channels_in: int, channels_out: int, size: int = 3, bias: bool = True) -> nn.Conv2d:
    """Convolution that keeps the size of a feature map.

    Args:
        channels_in: channels before.
        channels_out: channels after.
        size: pixels along a side of the kernel, an odd number.
        bias: add a learned number to each channel.
    """
    return nn.Conv2d(channels_in, channels_out, size, padding=size // 2, bias=bias)


class Encoder(nn.Module):
    """Pictures [N,3,R,R] to latents [N,Z,G,G].

    Args:
        conv_in: from pictures to the first level's channels.
        down: the levels, from the finest to the coarsest.
        mid: what follows the coarsest level.
        conv_out: from the coarsest level's channels to latents.
    """

    def __init__(self, conv_in: nn.Conv2d, down: list[nn.Module], mid: nn.Module, conv_out: nn.Conv2d) -> None:
        super().__init__()
        self.conv_in = conv_in
        self.down = nn.ModuleList(down)
        self.mid = mid
        self.norm_out = group_norm(conv_out.in_channels)
        self.conv_out = conv_out

    @staticmethod
    def widths(channels: int, channel_mult: Sequence[int]) -> list[tuple[int, int]]:
        """Channels before and after each level; level i ends with ``channels`` times ``channel_mult[i]``."""
        return list(pairwise([channels, *(channels * m for m in channel_mult)]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in (*self.down, self.mid):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents [N,Z,G,G] to pictures [N,3,R,R].

    Args:
        conv_in: from latents to the coarsest level's channels.
        mid: what precedes the coarsest level.
        up: the levels, from the finest to the coarsest, which run the other way round.
        conv_out: from the finest level's channels to pictures.
    """

    def __init__(self, conv_in: nn.Conv2d, mid: nn.Module, up: list[nn.Module], conv_out: nn.Conv2d) -> None:
        super().__init__()
        self.conv_in = conv_in
        self.mid = mid
        self.up = nn.ModuleList(up)
        self.norm_out = group_norm(conv_out.in_channels)
        self.conv_out = conv_out

    @staticmethod
    def widths(channels: int, channel_mult: Sequence[int]) -> list[tuple[int, int]]:
        """Channels before and after each level; level i ends with ``channels`` times ``channel_mult[i]``."""
        after = [channels * m for m in channel_mult]
        return list(zip([*after[1:], after[-1]], after, strict=True))

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Tokenizer(nn.Module, ABC):
    """A tokenizer network: ``encode`` turns pictures into tokens, ``decode`` tokens into pictures."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Tokens of pictures: float32 [N,3,R,R] in [0,1] to int64 [N,T].

        Raises:
            InputFileError: the weights give numbers that are not finite.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures of tokens: int64 [N,T] to float32 [N,3,R,R], clamped to [0,1].

        Raises:
            InputFileError: the weights give numbers that are not finite.
        """


class Quantizer(nn.Module, ABC):
    """Turns latents into tokens, the indices of learned code vectors, and tokens into latents."""

    embedding: nn.Embedding

    @abstractmethod
    def forward(self, latents: Tensor) -> Tensor:
        """Tokens of latents: float32 [N,Z,G,G] to int64 [N,T]."""

    @abstractmethod
    def latents(self, tokens: Tensor) -> Tensor:
        """Latents of tokens: int64 [N,T] to float32 [N,Z,G,G]."""


class CodebookTokenizer(Tokenizer):
    """A tokenizer with a quantizer between the passes from pictures to latents and back, which a family defines."""

    quantize: Quantizer

    def encode(self, images: Tensor) -> Tensor:
        latents = self.latents(images)
        tokens = self.quantize(latents)
        # a code that is NaN is nearest to everything, and shows in the latents of the tokens
        if not Witness().see(latents, self.quantize.latents(tokens)).holds():
            raise self._wrong_numbers(
                "latents of pictures", lambda: self.quantize.latents(self.quantize(self.latents(images)))
            )
        return tokens

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Latents of pictures before they are quantised: float32 [N,3,R,R] in [0,1] to float32 [N,Z,G,G]."""

    def decode(self, tokens: Tensor) -> Tensor:
        pictures = self.draw(tokens)
        if not Witness().see(pictures).holds():
            raise self._wrong_numbers("pictures", lambda: self.draw(tokens))
        return pictures.clamp(0, 1)

    def _wrong_numbers(self, what: str, run: Callable[[], object]) -> InputFileError:
        return InputFileError(
            f"expected finite {what}, got NaN or numbers beyond 2^56 from the tokenizer, the first from "
            f"{first_part([self], run) or 'its input'}: its weights are damaged or of another network, give the right "
            "file with --tokenizer"
        )

    def draw(self, tokens: Tensor) -> Tensor:
        """Pictures of tokens as ``decode`` gives them, but not clamped, for training."""
        return self.draw_latents(self.quantize.latents(tokens))

    @abstractmethod
    def draw_latents(self, latents: Tensor) -> Tensor:
        """Pictures of latents: float32 [N,Z,G,G] to float32 [N,3,R,R], in [0,1] but not clamped."""


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest to each row, the smallest one among equals: float [n,Z] and [codes,Z] to int64 [n]."""
    squares = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
    return torch.addmm(squares, rows, codes.t(), alpha=-2.0).argmin(1)
