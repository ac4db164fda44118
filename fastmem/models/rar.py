"""RAR: a causal transformer over image tokens whose adaLN modulation depends on class and position.

State-dict names and shapes equal those of ``rar_b.bin`` ... ``rar_xxl.bin``. A sequence is a start token (cls), the
class token and the T image tokens in raster order. Position p (1..T) predicts image token p-1. The vocabulary holds the
image tokens as 0..codebook-1, then the mask token (for training only), class c as codebook+1+c, and last "no class".

Source: RAR (arXiv 2411.00776); bytedance/1d-tokenizer ``modeling/rar.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmem.backends.plain import Span
from fastmem.backends.select import FC1Response
from fastmem.data.views import CenterCrop, TenCrop
from fastmem.errors import UsageError
from fastmem.models.finite import Witness, expose
from fastmem.models.layers import MLP, NO_CLASS, Blocks, Cache, Condition, ConditionsAhead, Modulation, modulate
from fastmem.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from fastmem.models.model import Model, Sampling
from fastmem.models.observation import Observation, Segment
from fastmem.models.registry import PREFIX_LADDER, Preset

# positions before the first image token: cls and the class token
LEAD = 2
# candidates are judged by their hits over this many last tokens (arXiv 2502.02514)
CANDIDATE_TOKENS = 99
# tokens of the images for which the prefix ladder was published
PUBLISHED_TOKENS = 256


@dataclass(frozen=True)
class RARConfig:
    """Sizes of a RAR; the defaults are RAR-B's.

    Attributes:
        hidden_size: channels of the residual stream.
        num_layers: blocks.
        num_heads: attention heads of each block, a divisor of hidden_size.
        intermediate_size: units of each block, the outputs of fc1.
        image_seq_len: tokens of an image, T.
        codebook_size: number of image tokens, V.
        num_classes: classes, without the unconditional one.

    Raises:
        UsageError: ``hidden_size`` is not a multiple of ``num_heads``.
    """

    hidden_size: int = 768
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 3072
    image_seq_len: int = 256
    codebook_size: int = 1024
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UsageError(
                f"expected hidden_size to be a multiple of num_heads, got {self.hidden_size} and {self.num_heads}: "
                "change one of them"
            )


class Attention(nn.Module):
    """Causal self-attention with layer-normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # several positions only ever enter together at the start of a sequence, so the plain causal mask fits
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return self.proj(out.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """One transformer block: attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int, units: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, units)
        self.adaLN_modulation = Modulation(width, 6)

    def attend(
        self, x: Tensor, condition: Condition, cache: Cache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attention half of the block, up to the input of the MLP.

        Args:
            x: residual stream [N, n, width].
            condition: what modulates the n positions.
            cache: keys and values of earlier positions, which is extended; None for a sequence from its start.
            layer: the block's number in the cache.

        Returns:
            The residual stream after attention, the MLP's input, and the gate of the MLP's output.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), cache, layer)
        return x, modulate(self.norm2(x), shift_m, scale_m), gate_m

    def forward(self, x: Tensor, condition: Condition, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """The residual stream [N, n, width] after the block; arguments as in ``attend``."""
        x, inner, gate = self.attend(x, condition, cache, layer)
        return x + gate * self.mlp(inner)


class FinalModulation(nn.Module):
    """Affine-free layer norm, scaled and shifted by the condition, before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        scale, shift = self.adaLN_modulation(condition)
        return modulate(self.norm_final(x), shift, scale)


class RAR(nn.Module):
    """The generator network: teacher-forced logits, unit responses, and steps of cached generation."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # the official tables are larger than any sequence; the spare rows are part of the format
        self.pos_embed = nn.Parameter(torch.empty(1, config.image_seq_len + 1024, width))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, config.image_seq_len + 1024, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, config.image_seq_len + 100, width))
        self.blocks = Blocks(Block(width, config.num_heads, config.intermediate_size) for _ in range(config.num_layers))
        self.embeddings = nn.Embedding(config.codebook_size + config.num_classes + 2, width)
        self.adaln_before_head = FinalModulation(width)
        self.lm_head = nn.Linear(width, config.codebook_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the original does: truncated normals of 0.02, zero biases, zero modulation."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)

    def condition_ids(self, labels: Tensor) -> Tensor:
        """Vocabulary ids of class labels int64 [N]; the label ``NO_CLASS`` stands for the unconditional branch."""
        c = self.config
        return torch.where(labels == NO_CLASS, c.num_classes, labels) + c.codebook_size + 1

    def condition(self, labels: Tensor, first: int, stop: int) -> Condition:
        """What modulates the blocks for labels int64 [N] at the positions first..stop-1."""
        distinct, rows = labels.unique(return_inverse=True)
        values = self.embeddings(self.condition_ids(distinct))[:, None] + self.timesteps_embeddings[:, first:stop]
        return Condition(values, None if len(distinct) == 1 else rows)

    def embed(self, tokens: Tensor, first: int) -> Tensor:
        """Inputs [N, n, width] of image tokens int64 [N, n], the first of them at position ``first`` (>= LEAD)."""
        return self.embeddings(tokens) + self.position_table(first, first + tokens.shape[1])

    def embed_start(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Inputs [N, 2+P, width] of the start of a sequence: cls, class token and image tokens int64 [N, P]."""
        classes = self.embeddings(self.condition_ids(labels))[:, None]
        x = torch.cat([self.cls_token.expand(len(labels), -1, -1), classes, self.embeddings(tokens)], dim=1)
        return x + self.position_table(0, x.shape[1])

    def position_table(self, first: int, stop: int) -> Tensor:
        """Position embeddings [1, n, width] of the positions first..stop-1.

        They hold the own position plus, for all but cls and the last position, that of the token to predict.
        """
        length = self.config.image_seq_len + LEAD
        target = functional.pad(self.target_aware_pos_embed[:, LEAD:length], (0, 0, 1, 1))
        return self.pos_embed[:, first:stop] + target[:, first:stop]

    def head(self, x: Tensor, condition: Condition) -> Tensor:
        """Logits float32 [N, n, codebook] of the last block's output [N, n, width]."""
        return self.lm_head(self.adaln_before_head(expose(x), condition)).float()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits float32 [N,T,codebook] of image tokens int64 [N,T] under labels int64 [N]."""
        # the last token is never an input: nothing is predicted from it
        x = self.embed_start(tokens[:, :-1], labels)
        condition = self.condition(labels, 0, x.shape[1])
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x[:, 1:], Condition(condition.values[:, 1:], condition.rows))

    def observe(
        self, tokens: Tensor, labels: Tensor, spans: Sequence[Span], fc1_response: FC1Response, with_logits: bool
    ) -> Observation:
        """The teacher-forced pass with every unit's mean absolute activation over each span of positions.

        Args:
            tokens: image tokens int64 [N,T].
            labels: int64 [N].
            spans: S pairs (start, stop) of positions.
            fc1_response: the operator that runs fc1, see fastmem.backends.plain.fc1_response.
            with_logits: give the logits of ``forward`` too.
        """
        x = self.embed_start(tokens, labels)
        condition = self.condition(labels, 0, x.shape[1])
        responses = []
        for layer, block in enumerate(self.blocks):
            x, inner, gate = block.attend(x, condition)
            if with_logits or layer + 1 < len(self.blocks):
                out, response = block.mlp.observe(inner, spans, fc1_response)
                x = x + gate * out
            else:
                # nothing reads the last block's output: its MLP runs only where a span needs it
                response = block.mlp.respond(inner, spans, fc1_response)
            responses.append(response)
        logits = None
        if with_logits:
            # position t+1 predicts token t; from the last one nothing is predicted
            logits = self.head(x[:, 1:-1], Condition(condition.values[:, 1:-1], condition.rows))
        return Observation(torch.stack(responses, dim=1), logits, x)

    def cache(self, rows: int) -> Cache:
        """An empty cache for the generation of ``rows`` images."""
        c = self.config
        positions = c.image_seq_len + LEAD - 1
        return Cache(c.num_layers, rows, c.num_heads, positions, c.hidden_size // c.num_heads, self.cls_token)

    def conditions_ahead(self, labels: Tensor) -> ConditionsAhead:
        """The conditions of the steps of a generation under labels int64 [N]."""
        modulations = [block.adaLN_modulation for block in self.blocks] + [self.adaln_before_head.adaLN_modulation]
        return ConditionsAhead(
            modulations, lambda first, stop: self.condition(labels, first, stop), self.config.image_seq_len + LEAD - 1
        )

    def start(self, x: Tensor, labels: Tensor, cache: Cache) -> Tensor:
        """Fill an empty cache with a start [N, n, width]; returns the last position's logits float32 [N, codebook]."""
        return self._extend(x, self.condition(labels, 0, x.shape[1]), cache)

    def step(self, x: Tensor, conditions: ConditionsAhead, cache: Cache) -> Tensor:
        """Extend the cache by one position [N, 1, width] and return its logits float32 [N, codebook]."""
        return self._extend(x, conditions.at(cache.length), cache)

    def _extend(self, x: Tensor, condition: Condition, cache: Cache) -> Tensor:
        first = cache.length
        for layer, block in enumerate(self.blocks):
            x = block(x, condition, cache, layer)
        cache.length = first + x.shape[1]
        if x.shape[1] > 1:
            x, condition = x[:, -1:], Condition(condition.values[:, -1:], condition.rows)
        return self.head(x, condition)[:, 0]


class RARModel(Model):
    """RAR with its MaskGIT-VQGAN behind the model seam.

    Raises:
        UsageError: generator and tokenizer differ in their tokens or codes.
    """

    generator_class = RAR
    tokenizer_class = MaskGITVQGAN
    generator: RAR
    tokenizer: MaskGITVQGAN

    def __init__(
        self, generator: RAR, tokenizer: MaskGITVQGAN, preset: Preset, prefixes: Sequence[int] | None = None
    ) -> None:
        g, t = generator.config, tokenizer.config
        if (g.image_seq_len, g.codebook_size) != (t.grid**2, t.codebook_size):
            raise UsageError(
                f"expected a tokenizer with {g.image_seq_len} tokens and {g.codebook_size} codes as the generator has, "
                f"got {t.grid**2} tokens and {t.codebook_size} codes: pair files of one release"
            )
        self.image_size = t.resolution
        self.num_tokens = g.image_seq_len
        self.num_layers = g.num_layers
        self.num_units = g.intermediate_size
        self.num_classes = g.num_classes
        self.vocabulary = g.codebook_size
        super().__init__(generator, tokenizer, preset, prefixes)

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        last = self.num_tokens + LEAD - 1
        return (
            Segment("last", last, last + 1),
            Segment("last-trained", last - 1, last),
            Segment("image", LEAD, last + 1),
            Segment("class", 0, LEAD, class_only=True),
        )

    @property
    def segments(self) -> tuple[str, ...]:
        return ("last", "last-trained")

    @property
    def candidate_positions(self) -> tuple[int, int]:
        return max(0, self.num_tokens - CANDIDATE_TOKENS), self.num_tokens

    @property
    def fc1_layers(self) -> tuple[nn.Linear, ...]:
        return tuple(block.mlp.fc1 for block in self.generator.blocks)

    def view_recipe(self, views: int | str) -> TenCrop | CenterCrop:
        return CenterCrop(self.image_size) if views == "center" else TenCrop(self.image_size, int(views))

    def scaled_prefixes(self) -> tuple[int, ...]:
        shares = (p * self.num_tokens / PUBLISHED_TOKENS for p in PREFIX_LADDER)
        return tuple(dict.fromkeys(round(share) for share in shares))

    def _observe(
        self, tokens: Tensor, labels: Tensor, spans: Sequence[Span], fc1_response: FC1Response, with_logits: bool
    ) -> Observation:
        return self.generator.observe(tokens, labels, spans, fc1_response, with_logits)

    def _generate(self, labels: Tensor, tokens: Tensor, lengths: Tensor, sampling: Sampling | None) -> Tensor:
        network, total = self.generator, self.num_tokens
        done = int(lengths.min())
        guided = sampling is not None and sampling.preset.guidance != 1.0
        # with guidance every row runs twice: under its label, then without a class
        branches = torch.cat([labels, torch.full_like(labels, NO_CLASS)]) if guided else labels
        copies = 2 if guided else 1
        cache, conditions = network.cache(len(branches)), network.conditions_ahead(branches)
        x = network.embed_start(tokens[:, :done].repeat(copies, 1), branches)
        witness = Witness()
        for step in range(done, total):
            logits = network.start(x, branches, cache) if step == done else network.step(x, conditions, cache)
            witness.see(logits)
            if sampling is None:
                chosen = logits.argmax(-1)
            else:
                if guided:
                    conditional, unconditional = logits.chunk(2)
                    logits = torch.lerp(unconditional, conditional, guidance_scale(sampling.preset, step, total))
                chosen = sample(logits, sampling)
            # rows with a longer prefix keep their own token
            tokens[:, step] = torch.where(step < lengths, tokens[:, step], chosen)
            x = network.embed(tokens[:, step : step + 1].repeat(copies, 1), step + LEAD)
        self.check("logits", witness, tokens, labels)
        return tokens


def sample(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw tokens int64 [N] from logits float32 [N,V] at the preset's temperature."""
    # on a GPU a draw from NaN ends the process; the caller refuses what was drawn from it
    probabilities = (logits / sampling.preset.temperature).softmax(-1).nan_to_num(1.0)
    return torch.multinomial(probabilities, 1, generator=sampling.generator)[:, 0]


def guidance_scale(preset: Preset, step: int, total: int) -> float:
    """Guidance scale at a step of ``total``, which rises from 1 to the preset's along a cosine.

    With n steps done out of N it is 1 + (g - 1) (1 - cos(pi (n/N)^power)) / 2.

    Raises:
        UsageError: the preset has no ``guidance_power``.

    Source: bytedance/1d-tokenizer ``modeling/rar.py``, ``generate``.
    """
    if preset.guidance_power is None:
        raise UsageError(
            "expected a preset with a guidance_power, got None: give the exponent along which the guidance rises"
        )
    return 1 + (preset.guidance - 1) * (1 - math.cos(math.pi * (step / total) ** preset.guidance_power)) / 2


def build(
    generator: Mapping[str, Any], tokenizer: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None
) -> tuple[RAR, MaskGITVQGAN]:
    """A generator and a tokenizer of the given sizes, without weights where the default device is "meta".

    ``generator`` and ``tokenizer`` hold the fields of their configs that differ from the defaults. ``shapes`` are the
    shapes in the generator's checkpoint, from which the number of classes is taken, or None to take it from the config.
    """
    config = RARConfig(**generator)
    rows = (shapes or {}).get("embeddings.weight", (0,))[0]
    classes = rows - config.codebook_size - 2
    if classes > 0:
        config = replace(config, num_classes=classes)
    return RAR(config), MaskGITVQGAN(MaskGITVQGANConfig(**tokenizer))


model_class = RARModel
