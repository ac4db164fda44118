"""Numbers of a pass that overflow or are NaN, wherever they come from: always an error that names the part."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmem
from fastmem import FastmemError, InputFileError, UsageError
from fastmem.backends import native, plain
from fastmem.models import finite
from fastmem.models.model import Model
from fastmem.models.observation import Observation
from fastmem.models.registry import Preset
from tests.conftest import build_case

CASES = ("rar-small", "var-small")
HUGE = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 65504.0}
# weights of a block whose overflow reaches its output, with the name of the layer in which it begins
PLACES = {
    "rar-small": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "var-small": ("attn.proj", "ffn.fc1", "ffn.fc2"),
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


built = cache(build_case)


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


@pytest.mark.parametrize(
    ("case", "name"), [("rar-small", "responses"), ("rar-small", "sampling"), ("var-small", "responses")]
)
def test_an_overflow_of_float16_is_an_error_that_says_which_type_to_take(case, name):
    model = fresh(case)
    model.generator.half()
    spoil(model, f"blocks.0.{PLACES[case][-2]}", 6e4)
    with pytest.raises(UsageError, match="the first from blocks.0.*in float16: .*--dtype bfloat16 or float32"):
        PASSES[name](model, *inputs(model))


def test_a_number_that_a_norm_would_hide_is_an_error():
    model = fresh("rar-small")
    tokens, labels = inputs(model)
    model.generator.blocks[0].mlp.fc2.bias.data[0] = 1e20
    with torch.inference_mode():
        hidden = model._observe(tokens, labels, [(0, 18)], plain.fc1_response, False).responses
    # they look right, though the norm has left zeros of every image
    assert bool(hidden.isfinite().all())
    with pytest.raises(InputFileError, match="in the residual stream, the first from blocks.0.mlp.fc2"):
        fastmem.responses(model, tokens, labels)


def test_a_wrong_number_outside_the_segments_is_an_error_too():
    model = fresh("var-small")
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
    model = fresh("rar-small")
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
    with pytest.raises(InputFileError, match="pictures of tokens, .* the first from decoder.conv_out: .* --tokenizer"):
        model.decode(tokens)


@pytest.mark.parametrize("case", CASES)
def test_a_code_that_is_nan_is_not_the_nearest_to_everything(case):
    model = fresh(case)
    model.tokenizer.quantize.embedding.weight.data[3] = torch.nan
    with pytest.raises(InputFileError, match="the first from quantize.embedding"):
        model.tokenize(torch.rand(1, 3, model.image_size, model.image_size))


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
@settings(derandomize=True, max_examples=20, deadline=None, database=None)
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
