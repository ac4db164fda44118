"""Every family against its original authors' code on regenerated weights, and against the official entry names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastmem import responses
from fastmem.models.checkpoints import build_networks, shapes_of
from fastmem.models.model import Model
from fastmem.models.registry import find_entry
from tests.conftest import GOLDEN, build_case, case_images, int64

# seen between two float32 implementations of the same network
ABSOLUTE = 2e-4
HEAVY = ("rar-b", "var-d16")
CASES = ["rar-small", "var-small", *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY)]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Model, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{request.param}.npz") as golden:
        arrays = {name: golden[name] for name in golden.files}
    return request.param, build_case(request.param), arrays


def test_tokens_equal_the_originals(case):
    name, model, golden = case
    close_calls = golden["token_margin"] < 1e-4 if "token_margin" in golden else False
    different = model.tokenize(case_images(name)).numpy() != golden["tokens"]
    assert not (different & np.logical_not(close_calls)).any()


def test_logits_equal_the_originals(case):
    _, model, golden = case
    tokens = int64(golden["tokens"])
    logits = model.logits(tokens, int64(golden["labels"]))
    assert logits.dtype == torch.float32
    if "logits" in golden:
        np.testing.assert_allclose(logits, golden["logits"], atol=ABSOLUTE, rtol=0)
    else:
        np.testing.assert_allclose(logits.logsumexp(-1), golden["logits_logsumexp"], atol=ABSOLUTE, rtol=0)
        np.testing.assert_allclose(logits[..., :8], golden["logits_first8"], atol=ABSOLUTE, rtol=0)
    probabilities = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
    np.testing.assert_allclose(probabilities, golden["token_probs"], atol=1e-5, rtol=1e-3)
    top_two = logits.topk(2).values
    clear = (top_two[..., 0] - top_two[..., 1] > 1e-4).numpy()
    assert (logits.argmax(-1).numpy() == golden["argmax_tokens"])[clear].all()
    assert clear.mean() > 0.99


def test_candidate_scores_equal_the_originals(case):
    _, model, golden = case
    scores = model.candidate_scores(int64(golden["tokens"]), int64(golden["labels"]))
    expected = golden["candidate_score"] if "candidate_score" in golden else golden["candidate_score_per_scale"][:, -1]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_responses_equal_the_originals(case):
    _, model, golden = case
    if "per_scale_mean_abs_act" in golden:
        segments, expected = None, golden["per_scale_mean_abs_act"]
    else:
        segments, expected = ["last"], golden["last_position_abs_act"][:, :, None]
    found = responses(model, int64(golden["tokens"]), int64(golden["labels"]), segments=segments)
    assert found.shape == (len(golden["tokens"]), model.num_layers, expected.shape[2], model.num_units)
    np.testing.assert_allclose(found, expected, atol=ABSOLUTE, rtol=0)


def test_greedy_generation_equals_the_originals_from_every_prefix(case):
    _, model, golden = case
    labels, tokens = int64(golden["labels"]), int64(golden["tokens"])
    prefixes = [int(name.removeprefix("greedy_prefix_")) for name in golden if name.startswith("greedy_prefix_")]
    assert prefixes
    for number in prefixes:
        # of tokens, or of scales where a prefix has to end with one
        made = model.generate(labels, tokens[:, : model.prefix_lengths[number]]).numpy()
        assert (made == golden[f"greedy_prefix_{number}"]).all(), f"prefix {number}"


def test_reconstruction_equals_the_originals(case):
    _, model, golden = case
    rebuilt = model.decode(int64(golden["tokens"])).numpy()
    expected = golden["reconstruction"]
    if expected.dtype == np.uint8:
        # rounding of values that lie within the tolerance of a half may go either way
        assert np.abs(rebuilt[0] * 255 - expected).max() <= 0.5 + 255 * ABSOLUTE
    else:
        np.testing.assert_allclose(rebuilt, expected, atol=ABSOLUTE, rtol=0)


@pytest.mark.parametrize("name", ["rar-small", "var-small"])
def test_half_precision_generators_give_float32_results(name):
    model = build_case(name)
    golden = np.load(GOLDEN / f"{name}.npz")
    tokens, labels = int64(golden["tokens"]), int64(golden["labels"])
    before = responses(model, tokens, labels)
    model.generator.to(torch.bfloat16)
    found = responses(model, tokens, labels)
    assert found.dtype == model.logits(tokens, labels).dtype == torch.float32
    torch.testing.assert_close(found, before, atol=0.15, rtol=0.1)
    assert model.generate(labels, tokens[:, :5]).shape == tokens.shape


OFFICIAL = {
    **dict.fromkeys(("rar-b", "rar-l", "rar-xl", "rar-xxl"), "maskgit-vqgan-imagenet-f16-256"),
    **dict.fromkeys(("var-d16", "var-d20", "var-d24", "var-d30"), "vae_ch160v4096z32"),
}


@pytest.mark.parametrize(("name", "tokenizer_file"), OFFICIAL.items(), ids=OFFICIAL)
def test_entry_names_and_shapes_equal_the_official_files(name, tokenizer_file):
    shapes = json.loads((GOLDEN / "checkpoint_shapes.json").read_text())
    with torch.device("meta"):
        networks = build_networks(find_entry(name))
    for network, file in zip(networks, (name, tokenizer_file), strict=True):
        own = {entry: list(shape) for entry, shape in shapes_of(network.state_dict()).items()}
        assert own == shapes[file]
