"""What RAR promises beyond equal outputs: segments, generation in batches, sampling, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmem import UsageError, assemble, responses
from fastmem.models import layers
from fastmem.models.checkpoints import build_networks
from fastmem.models.maskgit_vqgan import MaskGITVQGANConfig
from fastmem.models.rar import RAR, RARConfig, guidance_scale
from fastmem.models.registry import PREFIX_LADDER, Preset, find_entry
from tests.conftest import GOLDEN, build_case, int64

# seen between two float32 implementations of the same network
ABSOLUTE = 2e-4


def test_every_segment_is_the_mean_of_absolute_activations():
    model = build_case("rar-small")
    golden = np.load(GOLDEN / "rar-small.npz")
    segments = [s.name for s in model.all_segments]
    found = responses(model, int64(golden["tokens"]), int64(golden["labels"]), segments=segments, backend="torch")
    for i, segment in enumerate(model.all_segments):
        expected = np.abs(golden["act"][:, :, segment.start : segment.stop]).mean(2)
        np.testing.assert_allclose(found[:, :, i], expected, atol=ABSOLUTE, rtol=0, err_msg=segment.name)
    assert model.segments == ("last", "last-trained")
    assert model.class_only == ("class",)
    starts = {s.name: s.start for s in model.all_segments}
    assert (starts["last"], starts["last-trained"]) == (17, 16)


def test_prefixes_of_different_length_share_a_batch(small_model):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(32, (4, 16), generator=generator)
    labels = torch.tensor([0, 9, 3, 3])
    rows = [tokens[i, :length] for i, length in enumerate((0, 16, 5, 9))]
    together = small_model.generate(labels, rows)
    alone = torch.cat([small_model.generate(labels[i : i + 1], [row]) for i, row in enumerate(rows)])
    assert torch.equal(together, alone)
    for made, row in zip(together, rows, strict=True):
        assert torch.equal(made[: len(row)], row)


def test_equal_rows_are_computed_once_and_the_others_keep_their_order(small_model, monkeypatch):
    made, batches = small_model._generate, []

    def counted(labels, tokens, lengths, sampling):
        batches.append((labels.tolist(), lengths.tolist()))
        return made(labels, tokens, lengths, sampling)

    true = torch.arange(16).remainder(5).repeat(6, 1)
    true[2] += 1
    labels, lengths = torch.tensor([7, 2, 7, 2, 7, 7]), [3, 0, 3, 0, 3, 0]
    rows = [row[:length] for row, length in zip(true, lengths, strict=True)]
    alone = torch.cat([small_model.generate(labels[i : i + 1], [rows[i]]) for i in range(6)])
    monkeypatch.setattr(small_model, "_generate", counted)
    assert torch.equal(small_model.generate(labels, rows), alone)
    assert batches == [([7, 2, 7, 7], [3, 0, 3, 0])]


def test_sampled_rows_are_drawn_one_by_one(toy_model):
    drawn = toy_model.generate(torch.zeros(40, dtype=torch.int64), torch.empty(40, 0, dtype=torch.int64), greedy=False)
    assert len(drawn.unique(dim=0)) > 1


@pytest.mark.parametrize(("most", "numbers"), [(3, 2**26), (64, 1), (5, 2**26)], ids=["3 steps", "one", "5 steps"])
def test_modulations_may_be_computed_ahead_in_any_pieces(small_model, monkeypatch, most, numbers):
    labels, prefix = torch.tensor([1, 8, 1]), torch.arange(6).view(3, 2)
    whole = small_model.generate(labels, prefix)
    monkeypatch.setattr(layers, "MOST_AHEAD", most)
    monkeypatch.setattr(layers, "NUMBERS_AHEAD", numbers)
    assert torch.equal(small_model.generate(labels, prefix), whole)


def test_greedy_generation_follows_the_teacher_forced_arg_max(small_model):
    labels = torch.arange(6)
    made = small_model.generate(labels, torch.zeros(6, 0, dtype=torch.int64))
    assert torch.equal(small_model.logits(made, labels).argmax(-1), made)


def test_images_of_several_classes_in_a_batch_do_not_touch_each_other(small_model):
    tokens = torch.randint(32, (5, 16), generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([7, 0, 7, 2, 0])
    together = small_model.logits(tokens, labels)
    alone = torch.cat([small_model.logits(t[None], y[None]) for t, y in zip(tokens, labels, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_sampling_is_seeded_and_follows_the_model(toy_model):
    labels = torch.zeros(2000, dtype=torch.int64)
    empty = torch.zeros(2000, 0, dtype=torch.int64)
    preset = Preset(temperature=0.7, guidance=1.0)
    made = toy_model.generate(labels, empty, greedy=False, preset=preset, generator=torch.Generator().manual_seed(3))
    again = toy_model.generate(labels, empty, greedy=False, preset=preset, generator=torch.Generator().manual_seed(3))
    assert torch.equal(made, again)
    expected = (toy_model.logits(made[:1], labels[:1])[0, 0] / 0.7).softmax(-1)
    frequencies = torch.bincount(made[:, 0], minlength=16) / 2000
    # four standard deviations of a frequency over 2,000 draws
    assert ((frequencies - expected).abs() < 4 * (expected * (1 - expected) / 2000).sqrt() + 1e-3).all()


def test_guided_sampling_mixes_both_branches(toy_model):
    # at a temperature near zero sampling is the arg max of the guided logits
    preset = Preset(temperature=1e-4, guidance=5.0, guidance_power=0.5)
    labels = torch.arange(5)
    made = toy_model.generate(labels, torch.zeros(5, 0, dtype=torch.int64), greedy=False, preset=preset)
    network = toy_model.generator
    conditional, unconditional = network(made, labels), network(made, torch.full_like(labels, -1))
    for step in range(4):
        scale = guidance_scale(preset, step, 4)
        guided = unconditional[:, step] + (conditional - unconditional)[:, step] * scale
        assert torch.equal(guided.argmax(-1), made[:, step])


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (128, 8.5), (256, 16.0)], ids=["first", "middle", "end"])
def test_guidance_rises_from_one_to_its_full_scale(step, expected):
    assert guidance_scale(Preset(guidance=16.0, guidance_power=1.0), step, 256) == pytest.approx(expected)


def test_small_models_take_the_same_shares_of_their_tokens_as_prefixes(small_model):
    assert small_model.prefixes == (0, 1, 2)
    with torch.device("meta"):
        generator, tokenizer = build_networks(find_entry("rar-tiny"))
    assert assemble(generator, tokenizer).prefixes == (0, 1, 4, 8)
    assert find_entry("rar-xxl").prefixes == PREFIX_LADDER == (0, 1, 5, 14, 30)


LABELS = torch.zeros(2, dtype=torch.int64)
TOKENS = torch.zeros(2, 16, dtype=torch.int64)
BAD_CALLS = {
    "images of another size": lambda m: m.tokenize(torch.zeros(2, 3, 32, 32)),
    "images as integers": lambda m: m.tokenize(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)),
    "too few tokens": lambda m: m.logits(TOKENS[:, :5], LABELS),
    "tokens of another codebook": lambda m: m.decode(TOKENS + 32),
    "negative tokens": lambda m: m.decode(TOKENS - 1),
    "a label the checkpoint lacks": lambda m: m.logits(TOKENS, LABELS + 10),
    "a negative label": lambda m: m.logits(TOKENS, LABELS - 1),
    "fewer labels than images": lambda m: m.logits(TOKENS, LABELS[:1]),
    "an unknown segment": lambda m: responses(m, TOKENS, LABELS, segments=["scale1"]),
    "no segment": lambda m: responses(m, TOKENS, LABELS, segments=[]),
    "a prefix longer than an image": lambda m: m.generate(LABELS, torch.zeros(2, 17, dtype=torch.int64)),
    "greedy with a preset": lambda m: m.generate(LABELS, TOKENS[:, :3], preset=Preset()),
    "guidance without its power": lambda m: m.generate(
        LABELS, TOKENS[:, :3], greedy=False, preset=Preset(guidance=2.0)
    ),
    "an unknown backend": lambda m: responses(m, TOKENS, LABELS, backend="magic"),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused_in_one_sentence(small_model, call):
    with pytest.raises(UsageError, match="expected .* got ") as caught:
        call(small_model)
    assert "\n" not in str(caught.value)


def test_networks_that_do_not_fit_each_other_are_refused(small_model):
    with pytest.raises(UsageError, match="64 tokens and 32 codes"):
        assemble(RAR(RARConfig(64, 1, 4, 16, 64, 32, 10)), small_model.tokenizer)
    with pytest.raises(UsageError, match="one known family"):
        assemble(torch.nn.Linear(2, 2), small_model.tokenizer)
    with pytest.raises(UsageError, match="multiple of num_heads"):
        RARConfig(hidden_size=10, num_heads=3)
    with pytest.raises(UsageError, match="hidden_channels to be a multiple of 32 .* got 48: choose 32, 64, 96, 128"):
        MaskGITVQGANConfig(hidden_channels=48)


def test_the_tokenizer_runs_with_cudnn_and_without_tf32(toy_model, monkeypatch):
    seen = []
    for name in ("encode", "decode"):
        original = getattr(toy_model.tokenizer, name)

        def record(value, original=original):
            seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
            return original(value)

        monkeypatch.setattr(toy_model.tokenizer, name, record)
    toy_model.decode(toy_model.tokenize(torch.rand(1, 3, 16, 16)))
    assert seen == [(True, False)] * 2
