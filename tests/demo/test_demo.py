"""The embedded models: their training and doses, and that they memorised more of what they were shown more often."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmem import ArraySource, embedded_source, load_model, score
from fastmem.demo import loop, train
from fastmem.demo.doses import DOSES, GROUP_SIZE, draw_doses, groups, twins
from fastmem.demo.memorisation import DOSE_FILE, GroupRow, an_eighth, dose_table, format_table, measure
from fastmem.demo.recipes import RECIPES
from fastmem.models.checkpoints import read_state
from fastmem.models.registry import entries, find_entry
from tests.conftest import random_images

# embedded models whose weights lie in the package
SHIPPED = [
    entry.name
    for entry in entries().values()
    if entry.embedded and entry.generator_file.path.is_file() and entry.tokenizer_file.path.is_file()
]


def test_the_shipped_doses_are_the_seeded_ones():
    names = embedded_source("train").names.tolist()
    shipped = json.loads(DOSE_FILE.read_text())
    assert shipped == draw_doses(names, loop.SEED)
    assert shipped == draw_doses(names[::-1], loop.SEED)
    members = groups(shipped)
    assert {group: len(listed) for group, listed in members.items() if group not in ("1", "twins")} == {
        str(dose): GROUP_SIZE for dose in DOSES
    }
    assert sum(map(len, members.values())) == 823
    assert set(members["twins"]) == twins() & set(names)


def test_an_epoch_shows_every_image_as_often_as_its_dose():
    doses = np.array([1, 4, 2])
    for epoch in range(3):
        assert np.bincount(train.shown_in_epoch(epoch, doses)).tolist() == [1, 4, 2]
    assert train.shown_in_epoch(0, doses).tolist() != train.shown_in_epoch(1, doses).tolist()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_weights_are_small_and_in_half_precision(name):
    entry = find_entry(name)
    sizes = [file.path.stat().st_size for file in (entry.generator_file, entry.tokenizer_file)]
    assert sum(sizes) < 20e6


@pytest.fixture(scope="module", params=SHIPPED)
def table(request: pytest.FixtureRequest) -> dict[str, GroupRow]:
    return {row.group: row for row in dose_table(load_model(request.param, device="cpu"), most=48)}


def test_memorisation_rises_with_the_dose(table):
    losses = [table[group].loss for group in ("held-out", "1", "2", "4", "8", "16")]
    assert losses == sorted(losses, reverse=True)
    shares = [table[group].came_back / table[group].images for group in ("held-out", "1", "4", "16")]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[1] < 0.1
    assert shares[-1] > 0.8


def test_the_table_is_markdown(table):
    lines = format_table(list(table.values())).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].count("|") == lines[1].count("|") == 6
    assert lines[-1].split("|")[1].strip() == "held-out"


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)

    def run(stops: list[int]) -> tuple[torch.Tensor, int]:
        torch.manual_seed(0)
        network, counter = torch.nn.Linear(4, 4), torch.zeros((), dtype=torch.int64)
        optimizer = torch.optim.Adam(network.parameters(), 0.1)

        def loss(step: int) -> torch.Tensor:
            if stops and step == stops[0]:
                stops.pop()
                raise KeyboardInterrupt
            counter.add_(1)
            batch = torch.randn(8, 4, generator=loop.step_generator(step))
            return (network(batch) - batch).square().mean()

        training = loop.Loop(
            network, optimizer, 0.1, loop.Limits(12), tmp_path / f"{len(stops)}.pt", loss, {"counter": counter}
        )
        while True:
            try:
                training.run()
                return network.weight.detach().clone(), int(counter)
            except KeyboardInterrupt:
                # a new process starts from new weights
                network.reset_parameters()
                counter.zero_()

    undisturbed, interrupted = run([]), run([7])
    assert torch.equal(undisturbed[0], interrupted[0])
    assert undisturbed[1] == interrupted[1] == 12


RATES = {
    "first step": (loop.Limits(1000), 0, 0, 0.01),
    "end of the warm-up": (loop.Limits(1000), 99, 0, 1.0),
    "half way after it": (loop.Limits(1000), 550, 1e9, 0.5),
    "last step": (loop.Limits(1000), 999, 0, 0.0),
    "half of the time": (loop.Limits(10_000, minutes=2), 500, 60, 0.5),
    "no time left": (loop.Limits(10_000, minutes=2), 500, 119.9, 0.0),
    "steps end first": (loop.Limits(1000, minutes=2), 550, 1, 0.5),
}


@pytest.mark.parametrize(("limits", "step", "seconds", "expected"), RATES.values(), ids=RATES)
def test_the_learning_rate_ends_at_zero_with_the_steps_or_the_minutes(limits, step, seconds, expected):
    assert loop.cosine_rate(step, limits.share(step, seconds)) == pytest.approx(expected, abs=1e-4)
    assert not limits.reached(step, seconds)
    assert limits.reached(limits.steps, 0)
    assert limits.minutes == np.inf or limits.reached(0, 60 * limits.minutes)


def test_steps_follow_each_other_through_the_epochs():
    doses = np.array([1, 4, 2])
    shown = torch.cat([train.shown_in_step(step, 3, doses) for step in range(7)])
    assert torch.bincount(shown).tolist() == [3, 12, 6]
    for epoch in range(3):
        assert torch.bincount(shown[epoch * 7 : epoch * 7 + 7]).tolist() == [1, 4, 2]


def test_codes_that_nothing_chose_move_onto_latents():
    weight, rows = torch.zeros(4, 2), torch.arange(2, 12.0).view(5, 2)
    train.reseed_codes(weight, rows, torch.tensor([3, 0, 1, 0]), loop.step_generator(0))
    assert not weight[[0, 2]].any()
    assert all(any(torch.equal(code, row) for row in rows) for code in weight[[1, 3]])


@pytest.fixture(params=sorted(RECIPES))
def briefly_trained(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> train.Training:
    """Every stage of a recipe, three steps each, on a dozen random pictures."""
    source = ArraySource(random_images(12, 64), np.arange(12) % 5)
    short = train.Stage(3, 4, 1e-3)
    recipe = replace(RECIPES[request.param], tokenizer=short, decoder=short, generator=short)
    monkeypatch.setitem(RECIPES, request.param, recipe)
    monkeypatch.setattr(train, "embedded_source", lambda split: source)
    training = train.Training(request.param, tmp_path, torch.device("cpu"))
    training.train_tokenizer()
    return training


def test_every_stage_runs_and_leaves_files_that_load_and_score(briefly_trained, tmp_path):
    training = briefly_trained
    files = (training.generator_file, training.tokenizer_file)
    tokenizer_before = read_state(training.tokenizer_file)
    training.train_decoder()
    tokenizer_after = read_state(training.tokenizer_file)
    changed = {n for n in tokenizer_before if not torch.equal(tokenizer_before[n], tokenizer_after[n])}
    assert changed
    assert {name.split(".")[0] for name in changed} <= {"decoder", "post_quant_conv"}
    training.train_generator()
    assert sum(file.stat().st_size for file in files) < 20e6
    assert set(json.loads((tmp_path / "doses.json").read_text())) == {f"{i % 5}/{i:08d}" for i in range(12)}
    model = load_model(training.name, *files, device="cpu")
    prefix = an_eighth(model)
    assert abs(prefix - model.num_tokens / 8) < model.num_tokens / 16
    source = ArraySource(random_images(6, 64), np.arange(6) % 3)
    stats = score(model, source, views=2, check_classes=False).train
    assert stats.segments == model.segments
    assert 0 < float(stats.unitmem().max()) <= 1
    losses, shares = measure(model, torch.zeros(2, model.num_tokens, dtype=torch.int64), torch.tensor([0, 40]))
    assert losses.shape == shares.shape == (2,)
    assert float(losses.min()) > 0


def test_a_finished_stage_ends_at_once_when_started_again(briefly_trained, capsys):
    before = briefly_trained.tokenizer_file.read_bytes()
    briefly_trained.train_tokenizer()
    assert briefly_trained.tokenizer_file.read_bytes() == before
    assert "continues at step 3" in capsys.readouterr().err
