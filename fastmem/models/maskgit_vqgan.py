"""MaskGIT-VQGAN, the tokenizer of RAR: from pictures to a grid of tokens and back.

State-dict names and shapes equal those of ``maskgit-vqgan-imagenet-f16-256.bin``.

Source: MaskGIT (arXiv 2202.04200); bytedance/1d-tokenizer ``modeling/modules/maskgit_vqgan.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from fastmem.models.tokenizer import (
    CodebookTokenizer,
    Decoder,
    Encoder,
    Quantizer,
    check_channels,
    convolution,
    group_norm,
    nearest_codes,
)


@dataclass(frozen=True)
class MaskGITVQGANConfig:
    """Sizes of a MaskGIT-VQGAN; the defaults are the official f16-256 tokenizer's.

    Attributes:
        hidden_channels: channels of the first convolution, a multiple of 32.
        channel_mult: channels of each level as multiples of hidden_channels; every level but the last halves the size.
        num_res_blocks: residual blocks of a level.
        z_channels: channels of a code vector, Z.
        codebook_size: number of codes, V.
        resolution: pixels along a side of a picture, R.

    Raises:
        UsageError: ``hidden_channels`` is not a multiple of 32.
    """

    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 1024
    resolution: int = 256

    def __post_init__(self) -> None:
        check_channels("hidden_channels", self.hidden_channels)

    @property
    def grid(self) -> int:
        """Tokens along one side of a picture."""
        return self.resolution // 2 ** (len(self.channel_mult) - 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, plus the input, or a convolution of the output where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = convolution(channels_in, channels_out, bias=False)
        self.norm2 = group_norm(channels_out)
        self.conv2 = convolution(channels_out, channels_out, bias=False)
        changes = channels_in != channels_out
        self.nin_shortcut = convolution(channels_out, channels_out, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        # the official network adds shortcut(h), so where the width changes x does not enter
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def _residual_blocks(count: int, channels_in: int, channels_out: int) -> nn.Sequential:
    blocks = (ResidualBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(count))
    return nn.Sequential(*blocks)


class DownLevel(nn.Module):
    """Residual blocks, then, except at the coarsest level, 2x2 average pooling.

    Args:
        count: residual blocks.
        channels_in: channels before.
        channels_out: channels after.
        pool: halve the size at the end.
    """

    def __init__(self, count: int, channels_in: int, channels_out: int, pool: bool) -> None:
        super().__init__()
        self.block = _residual_blocks(count, channels_in, channels_out)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return functional.avg_pool2d(x, 2) if self.pool else x


class UpLevel(nn.Module):
    """Residual blocks, then, except at the finest level, doubling by repetition and a convolution.

    Args:
        count: residual blocks.
        channels_in: channels before.
        channels_out: channels after.
        double: double the size at the end.
    """

    def __init__(self, count: int, channels_in: int, channels_out: int, double: bool) -> None:
        super().__init__()
        self.block = _residual_blocks(count, channels_in, channels_out)
        self.upsample_conv = convolution(channels_out, channels_out) if double else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _encoder(c: MaskGITVQGANConfig) -> Encoder:
    widths = Encoder.widths(c.hidden_channels, c.channel_mult)
    last = widths[-1][1]
    return Encoder(
        convolution(3, c.hidden_channels, bias=False),
        [DownLevel(c.num_res_blocks, *w, pool=level < len(widths) - 1) for level, w in enumerate(widths)],
        _residual_blocks(c.num_res_blocks, last, last),
        convolution(last, c.z_channels, 1),
    )


def _decoder(c: MaskGITVQGANConfig) -> Decoder:
    widths = Decoder.widths(c.hidden_channels, c.channel_mult)
    last = widths[-1][1]
    return Decoder(
        convolution(c.z_channels, last),
        _residual_blocks(c.num_res_blocks, last, last),
        [UpLevel(c.num_res_blocks, *w, double=level > 0) for level, w in enumerate(widths)],
        convolution(widths[0][1], 3),
    )


class Codebook(Quantizer):
    """The learned code vectors [codebook, Z]; the token of a latent is the index of its nearest code."""

    def __init__(self, size: int, channels: int, grid: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)
        self.grid = grid

    def forward(self, latents: Tensor) -> Tensor:
        """Nearest code of every latent: float [N,Z,G,G] to int64 [N,G*G], in raster order."""
        rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        return nearest_codes(rows, self.embedding.weight).view(latents.shape[0], -1)

    def latents(self, tokens: Tensor) -> Tensor:
        """Code of every token: int64 [N,G*G] to float [N,Z,G,G]."""
        return self.embedding(tokens).unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)


class MaskGITVQGAN(CodebookTokenizer):
    """The tokenizer network of RAR."""

    quantize: Codebook

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.quantize = Codebook(config.codebook_size, config.z_channels, config.grid)

    def latents(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def draw_latents(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)
