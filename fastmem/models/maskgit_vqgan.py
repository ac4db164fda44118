"""MaskGIT-VQGAN, the tokenizer of RAR: pictures to discrete tokens and back.

State-dict names and shapes equal those of ``maskgit-vqgan-imagenet-f16-256.bin``.

Source: MaskGIT (arXiv 2202.04200); bytedance/1d-tokenizer ``modeling/modules/maskgit_vqgan.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from fastmem.errors import UsageError
from fastmem.models.layers import nearest_codes


@dataclass(frozen=True)
class MaskGITVQGANConfig:
    """Sizes of a MaskGIT-VQGAN; the defaults are the official f16-256 tokenizer's."""

    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 1024
    resolution: int = 256

    @property
    def grid(self) -> int:
        """Tokens along one side of a picture."""
        return self.resolution // 2 ** (len(self.channel_mult) - 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv(channels_in: int, channels_out: int, size: int = 3, bias: bool = False) -> nn.Conv2d:
    # stride 1 and an odd size: "same" padding is symmetric
    return nn.Conv2d(channels_in, channels_out, size, padding=size // 2, bias=bias)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the shortcut of a block that changes width sees the block's *output*."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = _conv(channels_in, channels_out)
        self.norm2 = _norm(channels_out)
        self.conv2 = _conv(channels_out, channels_out)
        self.nin_shortcut = _conv(channels_out, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        # the official network adds shortcut(h), so where the width changes x does not enter
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def _residual_blocks(count: int, channels_in: int, channels_out: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(count))


class DownBlock(nn.Module):
    """Residual blocks, then (but for the last level) 2x2 average pooling."""

    def __init__(self, count: int, channels_in: int, channels_out: int, pool: bool) -> None:
        super().__init__()
        self.block = _residual_blocks(count, channels_in, channels_out)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return functional.avg_pool2d(x, 2) if self.pool else x


class UpBlock(nn.Module):
    """Residual blocks, then (but for the finest level) nearest doubling and a convolution."""

    def __init__(self, count: int, channels_in: int, channels_out: int, double: bool) -> None:
        super().__init__()
        self.block = _residual_blocks(count, channels_in, channels_out)
        self.upsample_conv = _conv(channels_out, channels_out, bias=True) if double else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Pictures [N,3,R,R] to latents [N,Z,G,G]."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_mult]
        self.conv_in = _conv(3, config.hidden_channels)
        self.down = nn.ModuleList(
            DownBlock(config.num_res_blocks, before, width, pool=level < len(widths) - 1)
            for level, (before, width) in enumerate(zip([config.hidden_channels, *widths], widths, strict=False))
        )
        self.mid = _residual_blocks(config.num_res_blocks, widths[-1], widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv(widths[-1], config.z_channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down, *self.mid):
            x = block(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents [N,Z,G,G] to pictures [N,3,R,R]."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_mult]
        self.conv_in = _conv(config.z_channels, widths[-1], bias=True)
        self.mid = _residual_blocks(config.num_res_blocks, widths[-1], widths[-1])
        self.up = nn.ModuleList(
            UpBlock(config.num_res_blocks, before, width, double=level > 0)
            for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv(widths[0], 3, bias=True)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (*self.mid, *reversed(self.up)):
            x = block(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """The learned code vectors [codebook, Z]; a latent becomes the index of its nearest code."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)

    def forward(self, z: Tensor) -> Tensor:
        """Nearest code of every latent: float [N,Z,G,G] -> int64 [N,G*G], raster order."""
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        return nearest_codes(rows, self.embedding.weight).view(z.shape[0], -1)


class MaskGITVQGAN(nn.Module):
    """The tokenizer network: ``encode`` pictures to tokens, ``decode`` tokens to pictures."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        if config.hidden_channels % 32:
            raise UsageError(
                f"expected hidden_channels to be a multiple of 32 (the group norms have 32 groups), "
                f"got {config.hidden_channels}: choose 32, 64, 96, 128, ..."
            )
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.z_channels)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of pictures: float32 [N,3,R,R] in [0,1] -> int64 [N,G*G]."""
        return self.quantize(self.latents(images))

    def latents(self, images: Tensor) -> Tensor:
        """Latents of pictures before quantisation: float32 [N,3,R,R] in [0,1] -> [N,Z,G,G]."""
        return self.encoder(images)

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures of tokens: int64 [N,G*G] -> float32 [N,3,R,R], clamped to [0,1]."""
        return self.draw(tokens).clamp(0, 1)

    def draw(self, tokens: Tensor) -> Tensor:
        """As ``decode``, unclamped, for training."""
        grid = self.config.grid
        z = self.quantize.embedding(tokens).view(-1, grid, grid, self.config.z_channels).permute(0, 3, 1, 2)
        return self.draw_latents(z)

    def draw_latents(self, latents: Tensor) -> Tensor:
        """Pictures of latents: float32 [N,Z,G,G] -> [N,3,R,R], unclamped, 0..1 for pixels."""
        return self.decoder(latents)
