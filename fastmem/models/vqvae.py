"""The multi-scale VQVAE, the tokenizer of VAR: from pictures to grids of tokens of growing size and back.

Scale k is a grid of n_k x n_k tokens that code what the coarser scales left over. The tokens of an image stand scale
after scale, each in raster order. State-dict names and shapes equal those of ``vae_ch160v4096z32.pth``.

Source: VAR (arXiv 2404.02905); FoundationVision/VAR ``models/vqvae.py``, ``quant.py`` and ``basic_vae.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmem.errors import UsageError
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

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# convolutions that refine an up-sampled scale; each serves the scales nearest to its tick
REFINERS = 4


def checked_patch_nums(patch_nums: Sequence[int]) -> tuple[int, ...]:
    """Grid sizes of the scales.

    Raises:
        UsageError: there are fewer than two, or one is not larger than the one before.
    """
    if len(patch_nums) < 2 or patch_nums[0] < 1 or any(b <= a for a, b in pairwise(patch_nums)):
        raise UsageError(
            f"expected patch_nums as two or more growing grid sizes, got {list(patch_nums)}: give some such as 1, 2, 3"
        )
    return tuple(patch_nums)


def scale_bounds(patch_nums: Sequence[int]) -> tuple[int, ...]:
    """First position of each of K scales, and the end of the last one: K + 1 numbers from 0 to T."""
    bounds = [0]
    for size in patch_nums:
        bounds.append(bounds[-1] + size**2)
    return tuple(bounds)


@dataclass(frozen=True)
class MultiScaleVQVAEConfig:
    """Sizes of a multi-scale VQVAE; the defaults are the official ch160v4096z32's.

    Attributes:
        channels: channels of the first convolution, a multiple of 32.
        patch_nums: tokens along a side of each scale, in rising order.
        codebook_size: number of codes, V.
        latent_channels: channels of a code vector, Z.
        channel_mult: channels of each level as multiples of ``channels``; every level but the last halves the size.
        num_res_blocks: residual blocks of an encoder level; a decoder level has one more.

    Raises:
        UsageError: ``channels`` is not a multiple of 32, there is one scale, or the scales do not grow.
    """

    channels: int = 160
    patch_nums: tuple[int, ...] = PATCH_NUMS
    codebook_size: int = 4096
    latent_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", checked_patch_nums(self.patch_nums))
        check_channels("channels", self.channels)

    @property
    def grid(self) -> int:
        """Latents along one side of a picture: the last scale's size."""
        return self.patch_nums[-1]

    @property
    def resolution(self) -> int:
        """Pixels along one side of a picture."""
        return self.grid * 2 ** (len(self.channel_mult) - 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, plus the input, or a 1x1 convolution of it where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = convolution(channels_in, channels_out)
        self.norm2 = group_norm(channels_out)
        self.conv2 = convolution(channels_out, channels_out)
        self.nin_shortcut = convolution(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """Self-attention of one head over all places of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = convolution(channels, 3 * channels, 1)
        self.proj_out = convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        out = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Half the size, by a strided convolution, or twice the size, by repetition and a convolution."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else convolution(channels, channels)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        # the official network pads on the right and below alone
        return self.conv(functional.pad(x, (0, 1, 0, 1)) if self.down else functional.interpolate(x, scale_factor=2))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention after each one at the lowest, then the change of size.

    Args:
        count: residual blocks.
        channels_in: channels before.
        channels_out: channels after.
        attends: attention follows each block.
        resample: "downsample" or "upsample", the name of the change of size in the state dict; None for no change.
    """

    def __init__(self, count: int, channels_in: int, channels_out: int, attends: bool, resample: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(count)
        )
        self.attn = nn.ModuleList(SpatialAttention(channels_out) for _ in range(count if attends else 0))
        if resample is not None:
            self.add_module(resample, Resample(channels_out, down=resample == "downsample"))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x if self.resample is None else self.get_submodule(self.resample)(x)


class Middle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def _encoder(c: MultiScaleVQVAEConfig) -> Encoder:
    widths = Encoder.widths(c.channels, c.channel_mult)
    last = len(widths) - 1
    return Encoder(
        convolution(3, c.channels),
        [
            Level(c.num_res_blocks, *w, attends=level == last, resample="downsample" if level < last else None)
            for level, w in enumerate(widths)
        ],
        Middle(widths[-1][1]),
        convolution(widths[-1][1], c.latent_channels),
    )


def _decoder(c: MultiScaleVQVAEConfig) -> Decoder:
    widths = Decoder.widths(c.channels, c.channel_mult)
    last = len(widths) - 1
    return Decoder(
        convolution(c.latent_channels, widths[-1][1]),
        Middle(widths[-1][1]),
        [
            Level(c.num_res_blocks + 1, *w, attends=level == last, resample="upsample" if level > 0 else None)
            for level, w in enumerate(widths)
        ],
        convolution(widths[0][1], 3),
    )


class Refiners(nn.Module):
    """Convolutions that up-sampled scales go through, phi(h) = 0.5 h + 0.5 conv(h); several scales share one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(convolution(channels, channels) for _ in range(REFINERS))
        first = 1 / 3 / REFINERS
        self.ticks = torch.linspace(first, 1 - first, REFINERS, dtype=torch.float64, device="cpu").tolist()

    def forward(self, h: Tensor, share: float) -> Tensor:
        """phi of scale k out of K, which is given as its ``share`` k/(K-1)."""
        nearest = min(range(REFINERS), key=lambda i: abs(self.ticks[i] - share))
        return h * 0.5 + self.qresi_ls[nearest](h) * 0.5


class MultiScaleQuantizer(Quantizer):
    """Turns latents into tokens of every scale, and tokens into latents and into the generator's inputs."""

    def __init__(self, config: MultiScaleVQVAEConfig) -> None:
        super().__init__()
        self.patch_nums = config.patch_nums
        self.bounds = scale_bounds(config.patch_nums)
        # how often training met each code at each scale: part of the format, read by nothing here
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.patch_nums), config.codebook_size))
        self.quant_resi = Refiners(config.latent_channels)
        self.embedding = nn.Embedding(config.codebook_size, config.latent_channels)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)

    def spread(self, tokens: Tensor, scale: int) -> Tensor:
        """What one scale adds to the latents, [N,Z,G,G], from its tokens int64 [N, n*n]."""
        size, grid, last = self.patch_nums[scale], self.patch_nums[-1], len(self.patch_nums) - 1
        h = self.embedding(tokens).transpose(1, 2).unflatten(2, (size, size))
        if scale < last:
            h = functional.interpolate(h, size=(grid, grid), mode="bicubic")
        return self.quant_resi(h, scale / last)

    def pool(self, latents: Tensor, scale: int) -> Tensor:
        """Latents [N,Z,G,G] at the size of a scale: [N, n*n, Z], in raster order."""
        size = self.patch_nums[scale]
        if scale < len(self.patch_nums) - 1:
            latents = functional.interpolate(latents, size=(size, size), mode="area")
        return latents.flatten(2).transpose(1, 2)

    def forward(self, latents: Tensor) -> Tensor:
        """Tokens of latents: float32 [N,Z,G,G] to int64 [N,T]."""
        rest, found = latents, []
        for scale in range(len(self.patch_nums)):
            rows = self.pool(rest, scale)
            tokens = nearest_codes(rows.reshape(-1, rows.shape[2]), self.embedding.weight).view(rows.shape[:2])
            rest = rest - self.spread(tokens, scale)
            found.append(tokens)
        return torch.cat(found, dim=1)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """The tokens [N,P] of the first scales, cut into scales; P is the end of one."""
        return [tokens[:, a:b] for a, b in pairwise(self.bounds) if b <= tokens.shape[1]]

    def latents(self, tokens: Tensor) -> Tensor:
        """Latents float32 [N,Z,G,G] of the tokens int64 [N,P] of the first scales; zeros where P is 0."""
        grid = self.patch_nums[-1]
        total = self.embedding.weight.new_zeros(len(tokens), self.embedding.embedding_dim, grid, grid)
        for scale, own in enumerate(self.split(tokens)):
            total = total + self.spread(own, scale)
        return total

    def inputs(self, tokens: Tensor, stop: int) -> Tensor:
        """The generator's inputs float32 [N, positions, Z] at the scales 1..stop-1.

        A scale's inputs are the latents of all coarser scales at its size. ``tokens`` int64 [N,P] hold at least the
        first ``stop`` - 1 scales.
        """
        total = self.latents(tokens[:, :0])
        found = [total.flatten(2).transpose(1, 2)[:, :0]]
        for scale, own in enumerate(self.split(tokens)[: stop - 1]):
            total = total + self.spread(own, scale)
            found.append(self.pool(total, scale + 1))
        return torch.cat(found, dim=1)


class MultiScaleVQVAE(CodebookTokenizer):
    """The tokenizer network of VAR."""

    quantize: MultiScaleQuantizer

    def __init__(self, config: MultiScaleVQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = convolution(config.latent_channels, config.latent_channels)
        self.post_quant_conv = convolution(config.latent_channels, config.latent_channels)

    def latents(self, images: Tensor) -> Tensor:
        # the network takes pictures in [-1,1]
        return self.quant_conv(self.encoder(images * 2 - 1))

    def draw_latents(self, latents: Tensor) -> Tensor:
        return (self.decoder(self.post_quant_conv(latents)) + 1) / 2
