"""What VAR promises beyond equal outputs: segments and the mask, prefixes of whole scales, sampling, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmem import UsageError, assemble, responses, score
from fastmem.data.sources import ArraySource
from fastmem.data.views import CenterCrop, RandomCrops
from fastmem.models import var
from fastmem.models.checkpoints import build_networks
from fastmem.models.model import Model, Sampling
from fastmem.models.registry import Preset, find_entry
from fastmem.models.var import VAR, VARConfig, guide, sample
from fastmem.models.vqvae import MultiScaleVQVAE, MultiScaleVQVAEConfig
from tests.conftest import GOLDEN, int64

TOLERANCE = 2e-4
LABELS = torch.tensor([0, 9, 3, 3])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(32, (4, 30), generator=torch.Generator().manual_seed(1))


def test_inputs_of_the_teacher_forced_pass_equal_the_originals(small_var):
    golden = np.load(GOLDEN / "var-small.npz")
    found = small_var.tokenizer.quantize.inputs(int64(golden["tokens"]), 4)
    np.testing.assert_allclose(found.detach(), golden["teacher_forcing_input"], atol=TOLERANCE, rtol=0)


def test_every_scale_is_a_segment_and_the_first_sees_only_the_class(small_var):
    assert small_var.segments == ("scale1", "scale2", "scale3", "scale4")
    assert small_var.class_only == ("scale1",)
    assert [(s.start, s.stop) for s in small_var.all_segments] == [(0, 1), (1, 5), (5, 14), (14, 30)]
    assert small_var.candidate_positions == (14, 30)


def test_segments_are_the_mean_of_absolute_activations_in_any_order_and_choice(small_var):
    golden = np.load(GOLDEN / "var-small.npz")
    tokens, labels = int64(golden["tokens"]), int64(golden["labels"])
    for names in (["scale3"], ["scale2", "scale1"], ["scale4", "scale2"]):
        found = responses(small_var, tokens, labels, segments=names, backend="torch")
        for i, segment in enumerate(small_var.find_segments(names)):
            expected = np.abs(golden["act"][:, :, segment.start : segment.stop]).mean(2)
            np.testing.assert_allclose(found[:, :, i], expected, atol=TOLERANCE, rtol=0, err_msg=segment.name)


def test_a_scale_sees_itself_and_coarser_ones_and_nothing_finer(small_var, tokens):
    before = small_var.logits(tokens, LABELS)
    changed = tokens.clone()
    changed[:, 5:14] = (changed[:, 5:14] + 1) % 32
    after = small_var.logits(changed, LABELS)
    # the tokens of scale 3 enter as the input of scale 4
    assert torch.equal(before[:, :14], after[:, :14])
    assert not torch.isclose(before[:, 14:], after[:, 14:], atol=1e-4).all()


@pytest.mark.parametrize("together", [1, 6, 14, 128], ids=lambda n: f"up to {n} positions a call")
def test_a_full_mask_gives_the_same_pass(small_var, tokens, together, monkeypatch):
    """The literal form: one attention over all positions with the additive mask of the checkpoint."""
    monkeypatch.setattr(var, "MASKED_POSITIONS", together)

    def masked(self, x, groups, cache=None, layer=0):
        n, length, width = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = torch.nn.functional.linear(x, self.mat_qkv.weight, bias).view(n, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = q / q.norm(dim=-1, keepdim=True) * self.scale_mul_1H11.clamp_max(np.log(100)).exp()
        weights = q @ (k / k.norm(dim=-1, keepdim=True)).transpose(2, 3) + small_var.generator.attn_bias_for_masking
        return self.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))

    expected = small_var.logits(tokens, LABELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(var.Attention, "forward", masked)
        torch.testing.assert_close(small_var.logits(tokens, LABELS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("segments", [None, ["scale2"]], ids=["all", "scale2"])
def test_responses_and_outcomes_from_one_pass_equal_those_of_two(small_var, tokens, segments):
    found, outcomes = small_var.responses_and_outcomes(tokens, LABELS, segments)
    torch.testing.assert_close(found, small_var.responses(tokens, LABELS, segments), atol=1e-6, rtol=0)
    logits = small_var.logits(tokens, LABELS)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(outcomes.loss, loss, atol=1e-5, rtol=0)
    assert torch.equal(outcomes.hit, logits.argmax(-1) == tokens)


def test_outcomes_without_a_class_are_those_of_the_unconditional_branch(small_var, tokens):
    expected = small_var.forward_logits(tokens, torch.full_like(LABELS, -1))
    loss = torch.nn.functional.cross_entropy(expected.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(small_var.outcomes(tokens, None).loss, loss, atol=1e-5, rtol=0)
    assert not torch.allclose(loss, small_var.outcomes(tokens, LABELS).loss)


def test_large_scales_are_attended_alone_and_small_ones_together():
    with torch.device("meta"):
        network = VAR(VARConfig(depth=1))
    groups = network.groups(0, 10)
    assert [(g.start, g.stop) for g in groups] == [(0, 91), (91, 155), (155, 255), (255, 424), (424, 680)]
    assert [g.mask is None for g in groups] == [False, True, True, True, True]
    assert [(g.start, g.stop) for g in network.groups(7, 8)] == [(155, 255)]


def test_labels_are_never_dropped_in_training_mode_either(small_var, tokens):
    expected = small_var.logits(tokens, LABELS)
    small_var.generator.train()
    try:
        assert all(torch.equal(small_var.logits(tokens, LABELS), expected) for _ in range(20))
    finally:
        small_var.generator.eval()


def test_prefixes_of_different_length_share_a_batch(small_var, tokens):
    rows = [row[:length] for row, length in zip(tokens, (0, 30, 5, 14), strict=True)]
    together = small_var.generate(LABELS, rows)
    alone = torch.cat([small_var.generate(LABELS[i : i + 1], [row]) for i, row in enumerate(rows)])
    assert torch.equal(together, alone)
    for made, row in zip(together, rows, strict=True):
        assert torch.equal(made[: len(row)], row)


def test_greedy_generation_follows_the_teacher_forced_arg_max(small_var):
    labels = torch.arange(6)
    made = small_var.generate(labels, torch.zeros(6, 0, dtype=torch.int64))
    assert torch.equal(small_var.logits(made, labels).argmax(-1), made)


def test_images_of_several_classes_in_a_batch_do_not_touch_each_other(small_var, tokens):
    together = small_var.logits(tokens, LABELS)
    alone = torch.cat([small_var.logits(t[None], y[None]) for t, y in zip(tokens, LABELS, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_sampling_is_seeded_and_follows_the_model(small_var):
    labels, empty = torch.zeros(2000, dtype=torch.int64), torch.zeros(2000, 0, dtype=torch.int64)
    preset = Preset(temperature=0.7, guidance=0.0)
    made, again = (
        small_var.generate(labels, empty, greedy=False, preset=preset, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(made, again)
    expected = (small_var.logits(made[:1], labels[:1])[0, 0] / 0.7).softmax(-1)
    frequencies = torch.bincount(made[:, 0], minlength=32) / 2000
    # four standard deviations of a frequency over 2,000 draws
    assert ((frequencies - expected).abs() < 4 * (expected * (1 - expected) / 2000).sqrt() + 1e-3).all()


def test_guided_sampling_mixes_both_branches_ever_more_with_the_scale(small_var):
    # with one token left to choose from, sampling is the arg max of the guided logits
    preset = Preset(guidance=3.0, top_k=1)
    labels = torch.arange(5)
    made = small_var.generate(labels, torch.zeros(5, 0, dtype=torch.int64), greedy=False, preset=preset)
    conditional = small_var.forward_logits(made, labels)
    unconditional = small_var.forward_logits(made, torch.full_like(labels, -1))
    for scale, (start, stop) in enumerate([(0, 1), (1, 5), (5, 14), (14, 30)]):
        strength = 3.0 * scale / 3
        guided = (1 + strength) * conditional - strength * unconditional
        assert torch.equal(guided[:, start:stop].argmax(-1), made[:, start:stop])
    # the guidance changes the outcome, so the above is no accident
    assert not torch.equal(small_var.generate(labels, torch.zeros(5, 0, dtype=torch.int64)), made)


def test_guidance_weighs_the_conditional_branch():
    logits = torch.tensor([[[1.0, 2.0]], [[3.0, 1.0]]])
    assert guide(logits, 0.5).tolist() == [[[0.0, 2.5]]]


CUTS = {
    "top 2": (Preset(top_k=2), {2, 3}),
    "top 1": (Preset(top_k=1), {3}),
    "more than there are": (Preset(top_k=900), {0, 1, 2, 3}),
    "mass of a half": (Preset(top_p=0.5), {3}),
    "mass of 0.75": (Preset(top_p=0.75), {2, 3}),
    "no mass keeps the likeliest": (Preset(top_p=0.0), {3}),
    # of the two that top-k leaves, the likelier alone has 2/3
    "both": (Preset(top_k=2, top_p=0.6), {3}),
}


@pytest.mark.parametrize(("preset", "kept"), CUTS.values(), ids=CUTS)
def test_sampling_draws_from_the_likeliest_only(preset, kept):
    logits = torch.tensor([0.08, 0.12, 0.27, 0.53]).log().expand(400, 1, 4)
    drawn = sample(logits, Sampling(preset, torch.Generator().manual_seed(0)))
    assert drawn.shape == (400, 1)
    assert set(drawn.flatten().tolist()) == kept


def test_the_ladder_takes_whole_scales():
    assert find_entry("var-d30").prefixes == (0, 1, 5, 14, 30)
    assert find_entry("var-tiny").prefixes == (0, 1, 5, 14)
    with torch.device("meta"):
        official, tiny = (assemble(*build_networks(find_entry(name))) for name in ("var-d16", "var-tiny"))
    assert official.prefixes == (0, 1, 5, 14, 30)
    assert tiny.prefixes == (0, 1, 5)
    assert set(find_entry("var-tiny").prefixes) < set(tiny.prefix_lengths)


def test_views_are_those_of_its_training(small_var):
    assert small_var.view_recipe(10) == RandomCrops(64, 10, 1.125)
    assert small_var.view_recipe("center") == CenterCrop(64, 72, "lanczos")


def test_scoring_runs_scale_by_scale_and_never_ranks_the_first(small_var):
    from fastmem.report.unit_table import top_units
    from tests.conftest import random_images

    source = ArraySource(random_images(7, 64), np.array([0, 0, 1, 1, 1, 4, 4]))
    stats = score(small_var, source, views=2, check_classes=False).train
    assert stats.segments == small_var.segments
    # within a class every image responds alike at the first scale
    assert float(stats.class_var[:, :, 0].max()) < 1e-9
    assert "scale1" not in {unit.segment for unit in top_units(stats, 10_000)}


TOKENS = torch.zeros(4, 30, dtype=torch.int64)
BAD_CALLS = {
    "a prefix within a scale": (lambda m: m.generate(LABELS, TOKENS[:, :7]), "prefixes of 0, 1, 5, 14, 30 tokens"),
    "a segment of another family": (lambda m: responses(m, TOKENS, LABELS, segments=["last"]), "segments out of scale"),
    "images of another size": (lambda m: m.tokenize(torch.zeros(2, 3, 32, 32)), "expected images"),
    "tokens of another codebook": (lambda m: m.decode(TOKENS + 32), "expected tokens in 0..31"),
}


@pytest.mark.parametrize(("call", "text"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused_in_one_sentence(small_var, call, text):
    with pytest.raises(UsageError, match=text) as caught:
        call(small_var)
    assert "\n" not in str(caught.value)


def make_pair(codes: int, channels: int, patch_nums: tuple[int, ...]) -> Model:
    tokenizer = MultiScaleVQVAE(MultiScaleVQVAEConfig(32, (1, 2), 16, 8, (1, 1), 1))
    return assemble(VAR(VARConfig(1, patch_nums, codes, channels, 3)), tokenizer)


BAD_SIZES = {
    "another codebook": (
        lambda: make_pair(17, 8, (1, 2)),
        "17 codes and 8 latent channels, got scales 1-2",
    ),
    "other scales": (lambda: make_pair(16, 8, (1, 3)), "pair files of one release"),
    "one scale": (lambda: VARConfig(patch_nums=(4,)), "two or more growing grid sizes"),
    "shrinking scales": (lambda: MultiScaleVQVAEConfig(patch_nums=(1, 3, 2)), "two or more growing grid sizes"),
    "heads that do not fit": (lambda: VARConfig(hidden_size=10, num_heads=3), "multiple of num_heads"),
    "channels that do not fit": (lambda: MultiScaleVQVAEConfig(channels=48), "multiple of 32"),
}


@pytest.mark.parametrize(("make", "text"), BAD_SIZES.values(), ids=BAD_SIZES)
def test_sizes_that_do_not_fit_are_refused(make, text):
    with pytest.raises(UsageError, match=text):
        make()
