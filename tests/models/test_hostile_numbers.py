"""Numbers of a pass that overflow or are NaN, wherever they come from: always an error that names the part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmem
from fastmem import FastmemError, InputFileError, UsageError, assemble
from fastmem.backends import native, plain
from fastmem.backends.select import choose_backend
from fastmem.mitigation.attribution import loss_slopes
from fastmem.models import finite
from fastmem.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from fastmem.models.model import Model
from fastmem.models.observation import Observation
from fastmem.models.rar import RAR, Modulation, RARConfig
from fastmem.models.registry import Preset
from fastmem.models.var import VAR, VARConfig
from fastmem.models.vqvae import MultiScaleVQVAE, MultiScaleVQVAEConfig
from fastmem.stats import StatsBuilder

CASES = ("rar", "var")
HUGE = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 65504.0}
# weights of a block whose overflow reaches its output, with the name of the layer in which it begins
PLACES = {
    "rar": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "var": ("attn.proj", "ffn.fc1", "ffn.fc2"),
}
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(not native.status().cpu, reason=native.status().reason)),
    pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")),
]
Call = Callable[[Model, Tensor, Tensor], object]
PASSES: dict[str, Call] = {
    "responses": lambda m, t, y: fastmem.responses(m, t, y),
    "responses and outcomes": lambda m, t, y: m.responses_and_outcomes(t, y),
    "logits": lambda m, t, y: m.logits(t, y),
    "outcomes": lambda m, t, y: m.outcomes(t, y),
    "outcomes without a class": lambda m, t, y: m.outcomes(t, None),
    "candidate scores": lambda m, t, y: m.candidate_scores(t, y),
    "greedy generation": lambda m, t, y: m.generate(y, t[:, :1]),
    "sampling": lambda m, t, y: m.generate(
        y, t[:, :1], greedy=False, preset=Preset(guidance=2.0, guidance_power=1.0, top_k=5, top_p=0.9)
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these lose more by waiting for a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def built(case: str) -> Model:
    """A RAR of 3 blocks and 16 tokens or a VAR of 2 blocks and 30 tokens, of 24 units each."""
    torch.manual_seed(0)
    if case == "rar":
        generator = RAR(RARConfig(32, 3, 2, 24, 16, 16, 5))
        for module in generator.modules():
            if isinstance(module, Modulation):
                torch.nn.init.normal_(module[1].weight, std=0.2)
        tokenizer = MaskGITVQGAN(MaskGITVQGANConfig(32, (1, 1, 1, 1), 1, 8, 16, 32))
        torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
        return assemble(generator, tokenizer)
    scales = (1, 2, 3, 4)
    return assemble(
        VAR(VARConfig(2, scales, 16, 8, 5, 32, 2, 24)), MultiScaleVQVAE(MultiScaleVQVAEConfig(32, scales, 16, 8))
    )


def fresh(case: str) -> Model:
    """A model of a case whose weights may be changed."""
    return deepcopy(built(case))


def inputs(model: Model, count: int = 2) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(model.vocabulary, (count, model.num_tokens), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(count) % model.num_classes


def spoil(model: Model, name: str, value: float) -> None:
    """Set every third weight of the layer of the generator to a value."""
    with torch.no_grad():
        model.generator.get_submodule(name).weight[:, ::3] = value


@pytest.mark.parametrize("call", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("case", CASES)
def test_a_huge_weight_is_an_error_that_names_the_layer(case, call):
    model = fresh(case)
    layer = f"blocks.1.{PLACES[case][-1]}" if call is not PASSES["responses"] else f"blocks.1.{PLACES[case][-2]}"
    spoil(model, layer, 3e38)
    with pytest.raises(InputFileError, match=f"expected finite .* the first from {layer}, in float32: the weights are"):
        call(model, *inputs(model))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_responses_name_block_segment_and_unit_in_every_backend(case, backend):
    model = fresh(case)
    name = PLACES[case][-2]
    with torch.no_grad():
        model.generator.get_submodule(f"blocks.1.{name}").bias[17] = torch.inf
    tokens, labels = inputs(model)
    with pytest.raises(InputFileError, match=rf"unit 17 of block 1 in segment {model.segments[0]}, the first from"):
        fastmem.responses(model, tokens, labels, backend=backend)


@pytest.mark.parametrize(("case", "name"), [("rar", "responses"), ("rar", "sampling"), ("var", "responses")])
def test_an_overflow_of_float16_is_an_error_that_says_which_type_to_take(case, name):
    model = fresh(case)
    model.generator.half()
    spoil(model, f"blocks.0.{PLACES[case][-2]}", 6e4)
    with pytest.raises(UsageError, match="the first from blocks.0.*in float16: .*--dtype bfloat16 or float32"):
        PASSES[name](model, *inputs(model))


def test_a_number_that_a_norm_would_hide_is_an_error():
    model = fresh("rar")
    tokens, labels = inputs(model)
    model.generator.blocks[0].mlp.fc2.bias.data[0] = 1e20
    with torch.inference_mode():
        hidden = model._observe(tokens, labels, [(0, 18)], plain.fc1_response, False).responses
    # they look right, though the norm has left zeros of every image
    assert bool(hidden.isfinite().all())
    with pytest.raises(InputFileError, match="in the residual stream, the first from blocks.0.mlp.fc2"):
        fastmem.responses(model, tokens, labels)


def test_a_wrong_number_outside_the_segments_is_an_error_too():
    model = fresh("var")
    tokens, labels = inputs(model)
    # the last place of the last scale is seen by no other scale
    with torch.no_grad():
        model.generator.pos_1LC[0, -1] = torch.nan
    fastmem.responses(model, tokens, labels, segments=["scale2"])
    with pytest.raises(InputFileError, match="nan for unit 0 of block 0 in segment scale"):
        fastmem.responses(model, tokens, labels, segments=["scale2", "scale4"])
    wrong = Observation(torch.zeros(1, 2, 1, 3), stream=torch.tensor([0.0, torch.nan]))
    assert not wrong.is_finite()


def test_an_edit_that_overflows_a_pass_is_said_to():
    model = fresh("rar")
    plan = fastmem.Selection(torch.tensor([0]), torch.tensor([3]), torch.zeros(1).double(), "random", 0.1)
    tokens, labels = inputs(model)
    with (
        fastmem.scale_units(model, plan, 1e36),
        pytest.raises(UsageError, match="under an edit of the weights: take a smaller factor, or undo the edit"),
    ):
        fastmem.responses(model, tokens, labels)
    assert bool(fastmem.responses(model, tokens, labels).isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), 3e38])
@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_that_overflows_gives_no_tokens_and_no_pictures(case, value):
    model = fresh(case)
    images = torch.rand(2, 3, model.image_size, model.image_size)
    tokens, _ = inputs(model)
    model.tokenizer.encoder.conv_out.weight.data.fill_(value)
    with pytest.raises(InputFileError, match="latents of pictures, .* the first from encoder.conv_out: .* --tokenizer"):
        model.tokenize(images)
    model.tokenizer.decoder.conv_out.weight.data.fill_(value)
    with pytest.raises(InputFileError, match="finite pictures, .* the first from decoder.conv_out: .* --tokenizer"):
        model.decode(tokens)


@pytest.mark.parametrize("case", CASES)
def test_a_code_that_is_nan_is_not_the_nearest_to_everything(case):
    model = fresh(case)
    model.tokenizer.quantize.embedding.weight.data[3] = torch.nan
    with pytest.raises(InputFileError, match="the first from quantize.embedding"):
        model.tokenize(torch.rand(1, 3, model.image_size, model.image_size))


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
@settings(derandomize=True, max_examples=60, deadline=None, database=None)
def test_wherever_numbers_go_wrong_no_result_looks_finite(case, data):
    model = fresh(case)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    model.generator.to(dtype)
    block = data.draw(st.integers(0, model.num_layers - 1))
    name = f"blocks.{block}.{data.draw(st.sampled_from(PLACES[case]))}"
    value = data.draw(st.sampled_from([HUGE[dtype], -HUGE[dtype], torch.nan, torch.inf]))
    layer = model.generator.get_submodule(name)
    row = data.draw(st.integers(0, len(layer.weight) - 1))
    # queries and keys beyond the range of a norm are what no check sees
    row = len(layer.weight) - 1 - row // 3 if name.endswith("qkv") else row
    with torch.no_grad():
        layer.weight[row] = value
    # the responses of a block do not go through its own second layer
    names = [n for n in PASSES if n != "responses" or not (name.endswith("fc2") and block == model.num_layers - 1)]
    call = PASSES[data.draw(st.sampled_from(names))]
    with pytest.raises(FastmemError, match=f"the first from blocks.{block}"):
        call(model, *inputs(model))


@given(st.lists(st.floats(-(2.0**56), 2.0**56, width=32), max_size=9), st.sampled_from([torch.nan, 1e20, -torch.inf]))
@settings(derandomize=True, max_examples=40, deadline=None, database=None)
def test_a_witness_sees_every_place(values, wrong):
    tensor = torch.tensor([*values, 0.0])
    assert finite.Witness().see(tensor, tensor[:0]).holds()
    assert torch.equal(finite.expose(tensor), tensor)
    for place in range(len(tensor)):
        spoilt = tensor.clone()
        spoilt[place] = wrong
        assert not finite.Witness().see(tensor, spoilt).holds()
        assert bool(finite.expose(spoilt)[place].isfinite()) is False


def test_statistics_refuse_a_response_that_is_not_finite():
    builder = StatsBuilder((2, 1, 3), ["last"], [])
    responses = torch.rand(4, 2, 2, 1, 3)
    unit = builder.zero_unit()
    unit[1] = unit[1].update(responses, torch.arange(4))
    builder.update(0, unit)
    for wrong in (torch.nan, torch.inf):
        for kernel in (None, choose_backend("auto", torch.device("cpu")).unit_update_):
            spoilt = responses.clone()
            spoilt[2, 1, 1, 0, 2] = wrong
            unit = builder.zero_unit()
            unit[3] = unit[3].update_by(kernel, spoilt, torch.arange(4))
            with pytest.raises(UsageError, match="got a mean of (nan|inf) for unit 2 of block 1 in segment last"):
                builder.update(0, unit)
    # what was refused is not in the statistics
    assert builder.finish().count == 4


@pytest.mark.parametrize("case", CASES)
def test_slopes_of_a_loss_that_overflows_are_an_error(case):
    model = fresh(case)
    spoil(model, f"blocks.0.{PLACES[case][-1]}", 3e38)
    with pytest.raises(InputFileError, match="expected finite slopes of the loss, .* the first from blocks.0"):
        loss_slopes(model, *inputs(model))


PICTURE = torch.full((1, 3, 32, 32), 0.5)
TOKENS, LABELS = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
BAD_INPUTS: dict[str, tuple[Callable[[Model], object], str]] = {
    "pixels in 0..255": (
        lambda m: m.tokenize(PICTURE * 255),
        "pixels in \\[0,1\\], got 127.5..127.5: divide bytes by 255",
    ),
    "pixels in -1..1": (lambda m: m.tokenize(-PICTURE), "got -0.5..-0.5"),
    "a pixel that is NaN": (lambda m: m.tokenize(PICTURE.index_fill(3, LABELS, torch.nan)), "got nan..nan"),
    "an infinite pixel": (lambda m: m.tokenize(PICTURE.index_fill(3, LABELS, torch.inf)), "got 0.5..inf"),
    "an array of pictures": (lambda m: m.tokenize(PICTURE.numpy()), "as a tensor .* got ndarray"),
    "a list of tokens": (lambda m: m.decode(TOKENS.tolist()), "tokens as a tensor .* got list"),
    "tokens that are marks": (lambda m: m.logits(TOKENS.bool(), LABELS), "tokens as int64 .* got torch.bool"),
    "a list of labels": (lambda m: m.logits(TOKENS, [0]), "labels as a tensor .* got list"),
    "labels in two dimensions": (lambda m: m.logits(TOKENS, LABELS[:, None]), "labels as int64"),
    "a vocabulary id as label": (lambda m: m.outcomes(TOKENS, LABELS + 17), "labels in 0..4, got 17..17"),
    "a prefix of fractions": (
        lambda m: m.generate(LABELS, [torch.tensor([0.7])]),
        "a prefix as int64 .* got torch.float32",
    ),
    "a prefix that is one row": (lambda m: m.generate(LABELS, TOKENS[0]), "a prefix as int64 \\[N,P\\]"),
    "a prefix with one dimension more": (lambda m: m.generate(LABELS, TOKENS[..., None]), "a prefix as int64"),
}


@pytest.mark.parametrize(("call", "text"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs_out_of_range_are_refused_in_one_sentence(call, text):
    with pytest.raises(UsageError, match=f"expected .*{text}") as caught:
        call(built("rar"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "preset",
    [
        Preset(temperature=0.0),
        Preset(temperature=-1.0),
        Preset(temperature=float("nan")),
        Preset(guidance=float("inf")),
        Preset(guidance_power=0.0),
        Preset(top_k=0),
        Preset(top_p=0.0),
        Preset(top_p=1.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_presets_from_which_nothing_can_be_drawn_are_refused(case, preset):
    with pytest.raises(UsageError, match="expected a preset with a"):
        built(case).generate(LABELS, [TOKENS[0, :0]], greedy=False, preset=preset)


@pytest.mark.parametrize("case", CASES)
def test_no_images_give_empty_results(case):
    model = built(case)
    total, size = model.num_tokens, model.image_size
    tokens, labels = torch.zeros(0, total, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert model.tokenize(torch.zeros(0, 3, size, size)).shape == (0, total)
    assert model.decode(tokens).shape == (0, 3, size, size)
    assert model.logits(tokens, labels).shape == (0, total, 16)
    assert model.outcomes(tokens, labels).loss.shape == (0, total)
    assert fastmem.responses(model, tokens, labels).shape == (0, model.num_layers, len(model.segments), 24)
    assert model.generate(labels, tokens).shape == (0, total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_pictures_of_every_floating_type_give_tokens(dtype):
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = built("rar")
    assert torch.equal(model.tokenize(picture.to(dtype)), model.tokenize(picture.to(dtype).float()))


def test_integers_of_every_size_are_tokens_and_labels():
    model = built("rar")
    tokens, labels = inputs(model)
    expected = model.logits(tokens, labels)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(model.logits(tokens.to(dtype), labels.to(dtype)), expected)


def test_a_single_segment_needs_no_list():
    tokens, labels = inputs(built("rar"))
    assert torch.equal(
        fastmem.responses(built("rar"), tokens, labels, segments="last"),
        fastmem.responses(built("rar"), tokens, labels, segments=["last"]),
    )
