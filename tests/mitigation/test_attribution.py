"""Attribution against finite differences, and the split of the candidates that it is chosen on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastmem import ArraySource, InputFileError, UsageError, attribution
from fastmem.data.decoding import DamagedImage
from fastmem.mitigation.attribution import attribution_from_tokens, halves, loss_slopes
from fastmem.models.model import Model, to_unit_range
from tests.conftest import build_case, make_toy_model, random_images

# gates, head and biases away from their zeros, so that every unit matters
SPREAD = 0.05


def random_model(family: str) -> Model:
    model = make_toy_model() if family == "rar" else build_case("var-small")
    generator = torch.Generator().manual_seed(5)
    for parameter in model.generator.parameters():
        parameter.add_(SPREAD * torch.randn(parameter.shape, generator=generator))
    return model


def draw(model: Model, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocabulary, (count, model.num_tokens), generator=generator)
    return tokens, torch.randint(model.num_classes, (count,), generator=generator)


def mean_loss(model: Model, tokens: Tensor, labels: Tensor) -> float:
    # the model's own loss ends in float32
    hidden: list[Tensor] = []
    head = model.generator.lm_head if hasattr(model.generator, "lm_head") else model.generator.head
    hook = head.register_forward_hook(lambda module, given, output: hidden.append(output))
    model.forward_logits(tokens, labels)
    hook.remove()
    return float(functional.cross_entropy(hidden[0].transpose(1, 2), tokens))


@pytest.mark.parametrize(("family", "images"), [("rar", 7), ("var", 3)])
def test_slopes_are_finite_differences_of_factors_on_rows(family, images):
    model = random_model(family)
    model.generator.double()
    tokens, labels = draw(model, images, 0)
    found = loss_slopes(model, tokens, labels, batch_size=2)
    assert found.dtype == torch.float64
    assert found.shape == (model.num_layers, model.num_units)
    step = 1e-3
    for layer in range(model.num_layers):
        for unit in (0, model.num_units // 2, model.num_units - 1):
            row = model.fc1_layers[layer].weight[unit]
            saved, ends = row.clone(), []
            for s in (1 + step, 1 - step):
                row.copy_(saved * s)
                ends.append(mean_loss(model, tokens, labels))
            row.copy_(saved)
            # logits leave in float32, so that slopes carry its rounding, the differences do not
            expected = (ends[0] - ends[1]) / (2 * step)
            assert float(found[layer, unit]) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert float(found.abs().min()) > 1e-8


@pytest.mark.parametrize("family", ["rar", "var"])
def test_slopes_are_row_sums_of_weight_times_gradient_and_leave_no_trace(family):
    model = random_model(family)
    tokens, labels = draw(model, 5, 1)
    found = loss_slopes(model, tokens, labels)
    weights = [layer.weight for layer in model.fc1_layers]
    assert not any(p.requires_grad or p.grad is not None for p in model.generator.parameters())
    assert not any(layer._forward_hooks for layer in model.fc1_layers)
    for weight in weights:
        weight.requires_grad_(True)
    loss = functional.cross_entropy(model.forward_logits(tokens, labels).transpose(1, 2), tokens)
    gradients = torch.autograd.grad(loss, weights)
    expected = torch.stack([(w * g).sum(1) for w, g in zip(weights, gradients, strict=True)]).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("family", ["rar", "var"])
def test_the_batch_size_changes_rounding_only(family, batch_size):
    model = random_model(family)
    data = (*draw(model, 7, 2), *draw(model, 4, 3))
    whole = attribution_from_tokens(model, *data, batch_size=7)
    found = attribution_from_tokens(model, *data, batch_size=batch_size)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-8)


def test_attribution_is_the_heldout_slope_minus_the_memorised_one():
    model = random_model("rar")
    memorised, unseen = draw(model, 6, 4), draw(model, 9, 5)
    found = attribution_from_tokens(model, *memorised, *unseen)
    assert torch.equal(found, loss_slopes(model, *unseen) - loss_slopes(model, *memorised))
    # weakening what is high raises the loss of the memorised images against the others, to first order
    layer, unit = divmod(int(found.argmax()), model.num_units)

    def difference() -> float:
        return mean_loss(model, *memorised) - mean_loss(model, *unseen)

    before = difference()
    model.fc1_layers[layer].weight[unit] *= 0.99
    assert difference() - before == pytest.approx(0.01 * float(found.max()), rel=0.05)


def test_half_precision_gives_about_the_same(toy_model):
    data = (*draw(toy_model, 6, 4), *draw(toy_model, 9, 5))
    whole = attribution_from_tokens(toy_model, *data)
    half = make_toy_model()
    half.generator.bfloat16()
    found = attribution_from_tokens(half, *data)
    assert float(torch.corrcoef(torch.stack([found.flatten(), whole.flatten()]))[0, 1]) > 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("family", ["rar", "var"])
def test_a_gpu_gives_the_slopes_of_a_cpu(family):
    model = random_model(family)
    tokens, labels = draw(model, 5, 1)
    expected = loss_slopes(model, tokens, labels)
    model.generator.cuda()
    model.tokenizer.cuda()
    torch.testing.assert_close(loss_slopes(model, tokens, labels), expected, rtol=1e-3, atol=1e-6)


def test_tokens_and_callers_of_inference_mode_are_taken(toy_model):
    with torch.inference_mode():
        tokens = toy_model.tokenize(to_unit_range(torch.from_numpy(random_images(3, 16))))
        labels = torch.tensor([0, 1, 2])
        inside = loss_slopes(toy_model, tokens, labels)
    assert torch.equal(loss_slopes(toy_model, tokens, labels), inside)


def centre_tokens(model: Model, images: np.ndarray) -> Tensor:
    recipe = model.view_recipe("center")
    source = ArraySource(images, [0] * len(images))
    views = np.stack([recipe(source.read(i), 0)[0] for i in range(len(images))])
    return model.tokenize(to_unit_range(torch.from_numpy(views)))


def test_attribution_reads_the_centre_views_of_the_named_images(toy_model, toy_source):
    pixels = random_images(6, 16, seed=9)
    heldout = ArraySource(pixels, [0, 1, 2, 3, 4, 4])
    at = np.array([20, 3, 11])
    found = attribution(toy_model, toy_source, toy_source.ids[at], heldout, heldout_images=100)
    tokens = centre_tokens(toy_model, random_images(23, 16)[at])
    labels = torch.from_numpy(toy_source.labels[at])
    unseen = centre_tokens(toy_model, pixels), torch.from_numpy(heldout.labels)
    torch.testing.assert_close(found, attribution_from_tokens(toy_model, tokens, labels, *unseen), rtol=1e-4, atol=1e-8)
    some = np.array([4, 1])
    found = attribution(toy_model, toy_source, toy_source.ids[at], heldout, heldout_ids=heldout.ids[some])
    unseen = centre_tokens(toy_model, pixels[some]), torch.from_numpy(heldout.labels[some])
    torch.testing.assert_close(found, attribution_from_tokens(toy_model, tokens, labels, *unseen), rtol=1e-4, atol=1e-8)


class Broken(ArraySource):
    def read(self, index: int):
        raise DamagedImage("damaged", "name")


def test_what_attribution_refuses(toy_model, toy_source):
    ids, heldout = toy_source.ids[:2], ArraySource(random_images(2, 16), [0, 1])
    with pytest.raises(UsageError, match="ids of images in array of 23 images"):
        attribution(toy_model, toy_source, np.array([12345]), heldout)
    with pytest.raises(UsageError, match="ids of images in array of 2 images"):
        attribution(toy_model, toy_source, ids, heldout, heldout_ids=np.array([12345]))
    with pytest.raises(UsageError, match="images, in batches of at least 1, got 0"):
        attribution(toy_model, toy_source, ids[:0], heldout)
    with pytest.raises(UsageError, match="at least 1 held-out image, got 0"):
        attribution(toy_model, toy_source, ids, heldout, heldout_images=0)
    with pytest.raises(UsageError, match="in batches of 0"):
        attribution(toy_model, toy_source, ids, heldout, batch_size=0)
    with pytest.raises(InputFileError, match="2 that cannot"):
        attribution(toy_model, toy_source, ids, Broken(random_images(2, 16), [0, 1]))
    with pytest.raises(UsageError, match="expected tokens as int64"):
        loss_slopes(toy_model, torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 0]))


@pytest.mark.parametrize("sizes", [(1,), (5, 1, 8, 1, 1, 63), (2, 2, 2)], ids=str)
def test_halves_are_even_in_every_class_and_as_a_whole(sizes):
    labels = np.repeat(np.arange(len(sizes)) * 3, sizes)
    ids = np.random.default_rng(1).permutation(10_000)[: len(labels)]
    first = halves(ids, labels, seed=4)
    assert abs(2 * int(first.sum()) - len(ids)) <= 1
    for label in np.unique(labels):
        assert abs(2 * int(first[labels == label].sum()) - int((labels == label).sum())) <= 1
    order = np.random.default_rng(2).permutation(len(ids))
    assert (halves(ids[order], labels[order], seed=4) == first[order]).all()
    if len(ids) > 10:
        assert (halves(ids, labels, seed=5) != first).any()


def test_halves_need_a_label_for_each_id():
    with pytest.raises(UsageError, match="a label for each"):
        halves(np.arange(3), np.arange(2))
