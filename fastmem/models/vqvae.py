"""The multi-scale VQVAE, the tokenizer of VAR: pictures to token maps of growing size, and back.

Scale k is a grid of n_k x n_k tokens that codes what the coarser scales left over; tokens stand scale after scale, each
in raster order. State-dict names and shapes equal those of ``vae_ch160v4096z32.pth``.

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
from fastmem.models.layers import nearest_codes

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# convolutions that refine an up-sampled scale; each serves the scales nearest to its tick
REFINERS = 4


def checked_patch_nums(patch_nums: Sequence[int]) -> tuple[int, ...]:
    """Grid sizes of the scales. Raises: UsageError unless there are two or more, each larger than the one before."""
    if len(patch_nums) < 2 or patch_nums[0] < 1 or any(b <= a for a, b in pairwise(patch_nums)):
        raise UsageError(
            f"expected patch_nums as two or more growing grid sizes, got {list(patch_nums)}: give some such as 1, 2, 3"
        )
    return tuple(patch_nums)


def scale_bounds(patch_nums: Sequence[int]) -> tuple[int, ...]:
    """Positions at which the scales begin, and the end: K + 1 numbers from 0 to T."""
    bounds = [0]
    for size in patch_nums:
        bounds.append(bounds[-1] + size**2)
    return tuple(bounds)


@dataclass(frozen=True)
class MultiScaleVQVAEConfig:
    """Sizes of a multi-scale VQVAE; the defaults are the official ch160v4096z32's."""

    channels: int = 160
    patch_nums: tuple[int, ...] = PATCH_NUMS
    codebook_size: int = 4096
    latent_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", checked_patch_nums(self.patch_nums))
        if self.channels % 32:
            raise UsageError(
                f"expected channels to be a multiple of 32 (the group norms have 32 groups), got {self.channels}: "
                "choose 32, 64, 96, 128, ..."
            )

    @property
    def grid(self) -> int:
        """Latents along one side of a picture: the last scale's size."""
        return self.patch_nums[-1]

    @property
    def resolution(self) -> int:
        """Pixels along one side of a picture."""
        return self.grid * 2 ** (len(self.channel_mult) - 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv(channels_in: int, channels_out: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, padding=size // 2)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = _conv(channels_in, channels_out)
        self.norm2 = _norm(channels_out)
        self.conv2 = _conv(channels_out, channels_out)
        self.nin_shortcut = _conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """Self-attention of one head over all places of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = _conv(channels, 3 * channels, 1)
        self.proj_out = _conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        out = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Half the size by a strided convolution, or twice the size by repetition and a convolution."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else _conv(channels, channels)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        # the official network pads on the right and below alone
        return self.conv(functional.pad(x, (0, 1, 0, 1)) if self.down else functional.interpolate(x, scale_factor=2))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the smallest one, then the change of size."""

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


class Encoder(nn.Module):
    """Pictures [N,3,R,R] to latents [N,Z,G,G]."""

    def __init__(self, config: MultiScaleVQVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        last = len(widths) - 1
        self.conv_in = _conv(3, config.channels)
        self.down = nn.ModuleList(
            Level(config.num_res_blocks, before, width, level == last, "downsample" if level < last else None)
            for level, (before, width) in enumerate(zip([config.channels, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv(widths[-1], config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in (*self.down, self.mid):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents [N,Z,G,G] to pictures [N,3,R,R]."""

    def __init__(self, config: MultiScaleVQVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        last = len(widths) - 1
        self.conv_in = _conv(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(config.num_res_blocks + 1, before, width, level == last, "upsample" if level > 0 else None)
            for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Refiners(nn.Module):
    """The shared convolutions phi(h) = 0.5 h + 0.5 conv(h) that every up-sampled scale goes through."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(_conv(channels, channels) for _ in range(REFINERS))
        first = 1 / 3 / REFINERS
        self.ticks = torch.linspace(first, 1 - first, REFINERS, dtype=torch.float64, device="cpu").tolist()

    def forward(self, h: Tensor, share: float) -> Tensor:
        """phi of the scale at ``share`` = k/(K-1)."""
        nearest = min(range(REFINERS), key=lambda i: abs(self.ticks[i] - share))
        return h * 0.5 + self.qresi_ls[nearest](h) * 0.5


class MultiScaleQuantizer(nn.Module):
    """Latents to tokens of every scale by coding residuals; tokens back to latents, and to the generator's inputs."""

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
        """What one scale adds to the latents: its tokens int64 [N, n*n] -> [N,Z,G,G]."""
        size, grid, last = self.patch_nums[scale], self.patch_nums[-1], len(self.patch_nums) - 1
        h = self.embedding(tokens).transpose(1, 2).unflatten(2, (size, size))
        if scale < last:
            h = functional.interpolate(h, size=(grid, grid), mode="bicubic")
        return self.quant_resi(h, scale / last)

    def pool(self, latents: Tensor, scale: int) -> Tensor:
        """Latents [N,Z,G,G] at the size of a scale: [N, n*n, Z], raster order."""
        size = self.patch_nums[scale]
        if scale < len(self.patch_nums) - 1:
            latents = functional.interpolate(latents, size=(size, size), mode="area")
        return latents.flatten(2).transpose(1, 2)

    def forward(self, latents: Tensor) -> Tensor:
        """Tokens of latents: float32 [N,Z,G,G] -> int64 [N,T]."""
        rest, found = latents, []
        for scale in range(len(self.patch_nums)):
            rows = self.pool(rest, scale)
            tokens = nearest_codes(rows.reshape(-1, rows.shape[2]), self.embedding.weight).view(rows.shape[:2])
            rest = rest - self.spread(tokens, scale)
            found.append(tokens)
        return torch.cat(found, dim=1)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Tokens [N,P] of the first scales, P at a scale's end, cut into scales."""
        return [tokens[:, a:b] for a, b in pairwise(self.bounds) if b <= tokens.shape[1]]

    def latents(self, tokens: Tensor) -> Tensor:
        """Latents of the tokens int64 [N,P] of the first scales: float32 [N,Z,G,G]; zeros without a token."""
        grid = self.patch_nums[-1]
        total = self.embedding.weight.new_zeros(len(tokens), self.embedding.embedding_dim, grid, grid)
        for scale, own in enumerate(self.split(tokens)):
            total = total + self.spread(own, scale)
        return total

    def inputs(self, tokens: Tensor, stop: int) -> Tensor:
        """The generator's inputs at the scales 1..stop-1, from the true tokens of the scales before each.

        tokens: int64 [N,P], at least the first ``stop`` - 1 scales. Returns float32 [N, positions, Z]: for every scale
        the latents so far, at its size.
        """
        total = self.latents(tokens[:, :0])
        found = [total.flatten(2).transpose(1, 2)[:, :0]]
        for scale, own in enumerate(self.split(tokens)[: stop - 1]):
            total = total + self.spread(own, scale)
            found.append(self.pool(total, scale + 1))
        return torch.cat(found, dim=1)


class MultiScaleVQVAE(nn.Module):
    """The tokenizer network: ``encode`` pictures to tokens, ``decode`` tokens to pictures."""

    def __init__(self, config: MultiScaleVQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = _conv(config.latent_channels, config.latent_channels)
        self.post_quant_conv = _conv(config.latent_channels, config.latent_channels)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of pictures: float32 [N,3,R,R] in [0,1] -> int64 [N,T]."""
        return self.quantize(self.latents(images))

    def latents(self, images: Tensor) -> Tensor:
        """Latents of pictures before quantisation: float32 [N,3,R,R] in [0,1] -> [N,Z,G,G]."""
        return self.quant_conv(self.encoder(images * 2 - 1))

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures of tokens: int64 [N,T] -> float32 [N,3,R,R], clamped to [0,1]."""
        return self.draw(tokens).clamp(0, 1)

    def draw(self, tokens: Tensor) -> Tensor:
        """As ``decode``, unclamped, for training."""
        return self.draw_latents(self.quantize.latents(tokens))

    def draw_latents(self, latents: Tensor) -> Tensor:
        """Pictures of latents: float32 [N,Z,G,G] -> [N,3,R,R], unclamped, 0..1 for pixels."""
        return (self.decoder(self.post_quant_conv(latents)) + 1) / 2
