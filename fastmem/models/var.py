"""VAR: a transformer that predicts an image scale by scale, all tokens of a scale at once.

State-dict names and shapes equal those of ``var_d16.pth`` ... ``var_d30.pth``. Position t of the sequence predicts
token t. Its input is the class at the first scale, and at the others the sum of the coarser scales, resized to its own
scale. A position sees its own scale and all coarser ones, so a scale that is attended alone needs no mask.

Source: VAR (arXiv 2404.02905); FoundationVision/VAR ``models/var.py``, ``basic_var.py`` and ``helpers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmem.backends.plain import Span
from fastmem.backends.select import FC1Response
from fastmem.data.views import CenterCrop, RandomCrops
from fastmem.errors import UsageError
from fastmem.models.finite import Witness, expose
from fastmem.models.layers import MLP, NO_CLASS, Blocks, Cache, Condition, Modulation, modulate
from fastmem.models.model import Model, Sampling
from fastmem.models.observation import Observation, Segment
from fastmem.models.registry import PREFIX_LADDER, Preset
from fastmem.models.vqvae import PATCH_NUMS, MultiScaleVQVAE, MultiScaleVQVAEConfig, checked_patch_nums, scale_bounds

# tokens of the images for which the prefix ladder was published
PUBLISHED_TOKENS = 680
# short side to which images are resized before they are cropped, as a multiple of the crop
RESIZE = 1.125
# the learned factor on the queries is an exponential, bounded as the original bounds it
MAX_LOG_SCALE = math.log(100)

# scales are attended together, with a mask, up to this many positions: computing what the mask throws away costs less
# there than a call for each scale
MASKED_POSITIONS = 128


@dataclass(frozen=True)
class Group:
    """Whole scales that are attended in one call.

    The queries stand at the positions ``start`` to ``stop`` - 1, the keys at 0 to ``stop`` - 1. ``mask`` is bool
    [stop - start, stop], True where a query sees a key, or None for a single scale, which sees all keys.
    """

    start: int
    stop: int
    mask: Tensor | None


@dataclass(frozen=True)
class VARConfig:
    """Sizes of a VAR; the defaults are VAR-d16's.

    Attributes:
        depth: blocks.
        patch_nums: tokens along a side of each scale, in rising order.
        codebook_size: number of image tokens, V.
        latent_channels: channels of a code vector, Z.
        num_classes: classes, without the unconditional one.
        hidden_size: channels of the residual stream, 64 times the depth when None.
        num_heads: attention heads of each block, a divisor of hidden_size, equal to the depth when None.
        intermediate_size: units of each block, the outputs of fc1, four times hidden_size when None.

    Raises:
        UsageError: there is one scale, the scales do not grow, or ``hidden_size`` is not a multiple of ``num_heads``.
    """

    depth: int = 16
    patch_nums: tuple[int, ...] = PATCH_NUMS
    codebook_size: int = 4096
    latent_channels: int = 32
    num_classes: int = 1000
    hidden_size: int | None = None
    num_heads: int | None = None
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", checked_patch_nums(self.patch_nums))
        if self.width % self.heads:
            raise UsageError(
                f"expected hidden_size to be a multiple of num_heads, got {self.width} and {self.heads}: change one"
            )

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return 64 * self.depth if self.hidden_size is None else self.hidden_size

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.depth if self.num_heads is None else self.num_heads

    @property
    def units(self) -> int:
        """Outputs of fc1 in each block."""
        return 4 * self.width if self.intermediate_size is None else self.intermediate_size


class Attention(nn.Module):
    """Attention of whole scales with l2-normalised queries and keys and a learned factor for each head."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.empty(1, heads, 1, 1))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, groups: Sequence[Group], cache: Cache | None = None, layer: int = 0) -> Tensor:
        """Attention of x [N, n, width] at the groups' positions, over these and those that the cache holds.

        Args:
            x: the modulated and normalised residual stream.
            groups: the scales of the n positions, in order.
            cache: keys and values of earlier scales, which is extended; None for a sequence from its start.
            layer: the block's number in the cache.
        """
        n, length, width = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = functional.linear(x, self.mat_qkv.weight, bias).view(n, length, 3, self.heads, width // self.heads)
        # queries and keys in one go: every pass over them costs as much as its memory
        factor = self.scale_mul_1H11[0, :, 0].clamp_max(MAX_LOG_SCALE).exp()
        both = qkv[:, :, :2]
        norm = torch.linalg.vector_norm(both, dim=-1, keepdim=True).clamp_min(1e-12)
        # under autocast a norm is float32
        both = (both * (torch.stack([factor, torch.ones_like(factor)]) / norm)).to(qkv.dtype)
        (q, k), v = both.permute(2, 0, 3, 1, 4), qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        first = groups[0].start
        parts = [
            functional.scaled_dot_product_attention(
                q[:, :, g.start - first : g.stop - first], k[:, :, : g.stop], v[:, :, : g.stop], g.mask, scale=1.0
            ).transpose(1, 2)
            for g in groups
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.proj(out.reshape(n, length, width))


class Block(nn.Module):
    """One transformer block: attention and MLP, each shifted, scaled and gated by the class."""

    def __init__(self, width: int, heads: int, units: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ffn = MLP(width, units, gelu="tanh")
        self.ada_lin = Modulation(width, 6)

    def attend(
        self, x: Tensor, condition: Condition, groups: Sequence[Group], cache: Cache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attention half of the block, up to the input of the MLP.

        Args:
            x: residual stream [N, n, width] of whole scales.
            condition: what modulates them.
            groups: the scales, in order.
            cache: keys and values of the scales before, which is extended; None when there are none.
            layer: the block's number in the cache.

        Returns:
            The residual stream after attention, the MLP's input, and the gate of the MLP's output.
        """
        gate_a, gate_m, scale_a, scale_m, shift_a, shift_m = self.ada_lin(condition)
        x = torch.addcmul(x, gate_a, self.attn(_modulated_norm(x, shift_a, scale_a), groups, cache, layer))
        return x, _modulated_norm(x, shift_m, scale_m), gate_m

    def forward(
        self, x: Tensor, condition: Condition, groups: Sequence[Group], cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        """The residual stream [N, n, width] after the block; arguments as in ``attend``."""
        x, inner, gate = self.attend(x, condition, groups, cache, layer)
        return torch.addcmul(x, gate, self.ffn(inner))


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    if shift.shape[0] == 1:
        # one class, the same at all positions: the modulation is what a layer norm applies on its way
        return functional.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return modulate(functional.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)


class BeforeHead(nn.Module):
    """Affine-free layer norm, scaled and shifted by the class, before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        scale, shift = self.ada_lin(condition)
        return _modulated_norm(x, shift, scale)


class VAR(nn.Module):
    """The generator network: teacher-forced logits, unit responses, and steps of cached generation."""

    lvl_1L: Tensor

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.bounds = scale_bounds(config.patch_nums)
        width = config.width
        self.pos_start = nn.Parameter(torch.empty(1, self.bounds[1], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.bounds[-1], width))
        for name, value in self.constants().items():
            self.register_buffer(name, value)
        self.word_embed = nn.Linear(config.latent_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(len(config.patch_nums), width)
        self.blocks = Blocks(Block(width, config.heads, config.units) for _ in range(config.depth))
        self.head_nm = BeforeHead(width)
        self.head = nn.Linear(width, config.codebook_size)
        self.reset_parameters()

    def constants(self) -> dict[str, Tensor]:
        """The entries of the state dict that follow from the scales: int64 [1,L] and float32 [1,1,L,L], by name."""
        levels = torch.cat([torch.full((size**2,), k) for k, size in enumerate(self.config.patch_nums)])
        # part of the format; the pass goes by scales and needs no mask
        mask = torch.zeros(len(levels), len(levels)).masked_fill(levels[:, None] < levels, -torch.inf)
        return {"lvl_1L": levels[None], "attn_bias_for_masking": mask[None, None]}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the original does: truncated normals, zero biases, small head, gates near zero."""
        width = self.config.width
        std = math.sqrt(1 / width / 3)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(table, std=std)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin.weight.mul_(0.5)
        for block in self.blocks:
            block.attn.scale_mul_1H11.fill_(math.log(4))
            for out in (block.attn.proj, block.ffn.fc2):
                out.weight.div_(math.sqrt(2 * self.config.depth))
            # the first third makes the gates
            block.ada_lin.weight[2 * width :].mul_(0.5)
            block.ada_lin.weight[: 2 * width].mul_(1e-5)

    def condition(self, labels: Tensor) -> Condition:
        """What modulates the blocks for labels int64 [N]; ``NO_CLASS`` stands for the unconditional branch."""
        distinct, rows = labels.unique(return_inverse=True)
        return Condition(self.embed_class(distinct)[:, None], None if len(distinct) == 1 else rows)

    def embed_class(self, labels: Tensor) -> Tensor:
        """Class embeddings [N, width] of labels int64 [N]."""
        return self.class_emb(torch.where(labels == NO_CLASS, self.config.num_classes, labels))

    def embed(self, inputs: Tensor, labels: Tensor, first: int) -> Tensor:
        """The sequence [N, positions, width] of the scales from number ``first`` on.

        ``inputs`` are those scales' [N, positions, Z]. Scale 0 has none: it takes the class of ``labels`` int64 [N].
        """
        x = self.word_embed(inputs.to(self.word_embed.weight.dtype))
        if first == 0:
            x = torch.cat([self.embed_class(labels)[:, None] + self.pos_start, x], dim=1)
        start = self.bounds[first]
        places = slice(start, start + x.shape[1])
        return x + (self.lvl_embed(self.lvl_1L[:, places]) + self.pos_1LC[:, places])

    def groups(self, first: int, stop: int) -> list[Group]:
        """The scales first..stop-1, with small ones attended together in one call."""
        spans: list[tuple[int, int]] = []
        for start, end in pairwise(self.bounds[first : stop + 1]):
            if spans and end - spans[-1][0] <= MASKED_POSITIONS:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        return [Group(start, end, self._mask(start, end)) for start, end in spans]

    def _mask(self, start: int, stop: int) -> Tensor | None:
        if self.bounds.index(stop) - self.bounds.index(start) == 1:
            return None
        levels = self.lvl_1L[0, :stop]
        return levels[start:, None] >= levels

    def logits(self, x: Tensor, condition: Condition) -> Tensor:
        """Logits float32 [N, n, codebook] of the last block's output [N, n, width]."""
        return self.head(self.head_nm(expose(x), condition)).float()

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits float32 [N,T,codebook] for inputs [N,T-1,Z] of all scales but the first.

        ``labels`` are int64 [N].
        """
        x = self.embed(inputs, labels, 0)
        condition, groups = self.condition(labels), self.groups(0, len(self.config.patch_nums))
        for block in self.blocks:
            x = block(x, condition, groups)
        return self.logits(x, condition)

    def observe(
        self, inputs: Tensor, labels: Tensor, spans: Sequence[Span], fc1_response: FC1Response, with_logits: bool
    ) -> Observation:
        """The teacher-forced pass with every unit's mean absolute activation over each span of positions.

        Args:
            inputs: [N, positions, Z] of the scales from the second up to the last one that a span reaches into; of all
                of them where logits are wanted.
            labels: int64 [N].
            spans: S pairs (start, stop) of positions.
            fc1_response: the operator that runs fc1, see fastmem.backends.plain.fc1_response.
            with_logits: give the logits of ``forward`` too.
        """
        x = self.embed(inputs, labels, 0)
        condition, groups = self.condition(labels), self.groups(0, self.bounds.index(x.shape[1]))
        responses = []
        for layer, block in enumerate(self.blocks):
            x, inner, gate = block.attend(x, condition, groups)
            if with_logits or layer + 1 < len(self.blocks):
                out, response = block.ffn.observe(inner, spans, fc1_response)
                x = torch.addcmul(x, gate, out)
            else:
                # nothing reads the last block's output: its MLP runs only where a span needs it
                response = block.ffn.respond(inner, spans, fc1_response)
            responses.append(response)
        return Observation(torch.stack(responses, dim=1), self.logits(x, condition) if with_logits else None, x)

    def cache(self, rows: int) -> Cache:
        """An empty cache for the generation of ``rows`` images."""
        c = self.config
        return Cache(c.depth, rows, c.heads, self.bounds[-1], c.width // c.heads, self.pos_start)

    def step(self, inputs: Tensor, labels: Tensor, cache: Cache) -> Tensor:
        """Extend the cache by the inputs [N, n, Z] of one or more whole scales.

        Returns:
            Logits float32 [N, tokens, codebook] of the last of these scales.
        """
        first = self.bounds.index(cache.length)
        x = self.embed(inputs, labels, first)
        stop = self.bounds.index(cache.length + x.shape[1])
        condition, groups = self.condition(labels), self.groups(first, stop)
        for layer, block in enumerate(self.blocks):
            x = block(x, condition, groups, cache, layer)
        cache.length = self.bounds[stop]
        return self.logits(x[:, self.bounds[stop - 1] - self.bounds[stop] :], condition)


class VARModel(Model):
    """VAR with its multi-scale VQVAE behind the model seam.

    Raises:
        UsageError: generator and tokenizer differ in their scales, codes or latent channels.
    """

    generator_class = VAR
    tokenizer_class = MultiScaleVQVAE
    plain_preset = Preset(guidance=0.0)
    # the published edit is of this share (arXiv 2509.00488); RAR's is the default
    declared_fraction = 0.10
    generator: VAR
    tokenizer: MultiScaleVQVAE

    def __init__(
        self, generator: VAR, tokenizer: MultiScaleVQVAE, preset: Preset, prefixes: Sequence[int] | None = None
    ) -> None:
        g, t = generator.config, tokenizer.config
        own, given = ((c.patch_nums, c.codebook_size, c.latent_channels) for c in (g, t))
        if own != given:
            raise UsageError(
                f"expected a tokenizer with the generator's {_describe(*own)}, got {_describe(*given)}: pair files of "
                "one release"
            )
        self.bounds = generator.bounds
        self.image_size = t.resolution
        self.num_tokens = self.bounds[-1]
        self.num_layers = g.depth
        self.num_units = g.units
        self.num_classes = g.num_classes
        self.vocabulary = g.codebook_size
        super().__init__(generator, tokenizer, preset, prefixes)

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        return tuple(
            Segment(f"scale{k + 1}", start, stop, class_only=k == 0)
            for k, (start, stop) in enumerate(pairwise(self.bounds))
        )

    @property
    def segments(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.all_segments)

    @property
    def candidate_positions(self) -> tuple[int, int]:
        return self.bounds[-2], self.bounds[-1]

    @property
    def prefix_lengths(self) -> Sequence[int]:
        return self.bounds

    @property
    def fc1_layers(self) -> tuple[nn.Linear, ...]:
        return tuple(block.ffn.fc1 for block in self.generator.blocks)

    def view_recipe(self, views: int | str) -> RandomCrops | CenterCrop:
        if views == "center":
            return CenterCrop(self.image_size, round(RESIZE * self.image_size), "lanczos")
        return RandomCrops(self.image_size, int(views), RESIZE)

    def scaled_prefixes(self) -> tuple[int, ...]:
        shares = (p * self.num_tokens / PUBLISHED_TOKENS for p in PREFIX_LADDER)
        return tuple(dict.fromkeys(min(self.bounds, key=lambda end: abs(end - share)) for share in shares))

    def forward_logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.generator(self._inputs(tokens, len(self.bounds) - 1), labels)

    def _inputs(self, tokens: Tensor, scales: int) -> Tensor:
        # the tokenizer stays float32 also where a training runs the generator in half precision
        with torch.autocast(tokens.device.type, enabled=False):
            return self.tokenizer.quantize.inputs(tokens, scales)

    def _observe(
        self, tokens: Tensor, labels: Tensor, spans: Sequence[Span], fc1_response: FC1Response, with_logits: bool
    ) -> Observation:
        # no scale sees a finer one, so without logits the pass ends with the last scale that is asked for
        last = self.num_tokens if with_logits else max(stop for _, stop in spans)
        scales = next(k for k, end in enumerate(self.bounds) if end >= last)
        return self.generator.observe(self._inputs(tokens, scales), labels, spans, fc1_response, with_logits)

    def _generate(self, labels: Tensor, tokens: Tensor, lengths: Tensor, sampling: Sampling | None) -> Tensor:
        network, quantize, last = self.generator, self.tokenizer.quantize, len(self.bounds) - 2
        done = self.bounds.index(int(lengths.min()))
        if done > last:
            return tokens
        guided = sampling is not None and sampling.preset.guidance != 0
        # with guidance every row runs twice: under its label, then without a class
        branches = torch.cat([labels, torch.full_like(labels, NO_CLASS)]) if guided else labels
        cache = network.cache(len(branches))
        prefix = tokens[:, : self.bounds[done]]
        latents, inputs = quantize.latents(prefix), quantize.inputs(prefix, done + 1)
        witness = Witness()
        for scale in range(done, last + 1):
            logits = network.step(inputs.repeat(2, 1, 1) if guided else inputs, branches, cache)
            witness.see(logits)
            if sampling is None:
                chosen = logits.argmax(-1)
            else:
                if guided:
                    logits = guide(logits, sampling.preset.guidance * scale / last)
                chosen = sample(logits, sampling)
            start, stop = self.bounds[scale : scale + 2]
            # rows with a longer prefix keep their own tokens
            tokens[:, start:stop] = torch.where(lengths[:, None] >= stop, tokens[:, start:stop], chosen)
            if scale < last:
                latents = latents + quantize.spread(tokens[:, start:stop], scale)
                inputs = quantize.pool(latents, scale + 1)
        self.check("logits", witness, tokens, labels)
        return tokens


def _describe(patch_nums: tuple[int, ...], codes: int, channels: int) -> str:
    return f"scales {'-'.join(map(str, patch_nums))}, {codes} codes and {channels} latent channels"


def guide(logits: Tensor, strength: float) -> Tensor:
    """Guided logits [N,n,V]: (1 + strength) times the conditional ones minus strength times the unconditional ones.

    ``logits`` [2N,n,V] hold the conditional rows first.

    Source: FoundationVision/VAR ``models/var.py``, ``autoregressive_infer_cfg``.
    """
    conditional, unconditional = logits.chunk(2)
    return (1 + strength) * conditional - strength * unconditional


def sample(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw tokens int64 [N,n] from logits float32 [N,n,V].

    Only the preset's ``top_k`` likeliest tokens can be drawn, and of these only the likeliest with the mass ``top_p``.

    Source: FoundationVision/VAR ``models/helpers.py``.
    """
    preset = sampling.preset
    logits = logits / preset.temperature
    if preset.top_k is not None and preset.top_k < logits.shape[-1]:
        least = logits.topk(preset.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if preset.top_p is not None:
        rising, order = logits.sort(dim=-1)
        dropped = rising.softmax(-1).cumsum(-1) <= 1 - preset.top_p
        # the likeliest always stays
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    # on a GPU a draw from NaN ends the process; the caller refuses what was drawn from it
    probabilities = logits.softmax(-1).nan_to_num(1.0)
    return torch.multinomial(probabilities.flatten(0, 1), 1, generator=sampling.generator).view(probabilities.shape[:2])


def build(
    generator: Mapping[str, Any], tokenizer: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None
) -> tuple[VAR, MultiScaleVQVAE]:
    """A generator and a tokenizer of the given sizes, without weights where the default device is "meta".

    ``generator`` and ``tokenizer`` hold the fields of their configs that differ from the defaults. ``shapes`` are the
    shapes in the generator's checkpoint, from which the number of classes is taken, or None to take it from the config.
    """
    config = VARConfig(**generator)
    rows = (shapes or {}).get("class_emb.weight", (0,))[0]
    if rows > 1:
        config = replace(config, num_classes=rows - 1)
    return VAR(config), MultiScaleVQVAE(MultiScaleVQVAEConfig(**tokenizer))


model_class = VARModel
