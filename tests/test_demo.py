"""The embedded model: its doses, and that it memorised more of what it was shown more often."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastmem import embedded_source, load_model
from fastmem.demo import train
from fastmem.demo.doses import DOSES, GROUP_SIZE, draw_doses, groups, twins
from fastmem.demo.memorisation import DOSE_FILE, GroupRow, dose_table, format_table
from fastmem.models.registry import find_entry


def test_the_shipped_doses_are_the_seeded_ones():
    names = embedded_source("train").names.tolist()
    shipped = json.loads(DOSE_FILE.read_text())
    assert shipped == draw_doses(names, train.SEED)
    assert shipped == draw_doses(names[::-1], train.SEED)
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


def test_the_weights_are_small_and_in_half_precision():
    entry = find_entry("rar-tiny")
    sizes = [file.path.stat().st_size for file in (entry.generator_file, entry.tokenizer_file)]
    assert sum(sizes) < 20e6


@pytest.fixture(scope="module")
def table() -> dict[str, GroupRow]:
    return {row.group: row for row in dose_table(load_model("rar-tiny", device="cpu"), most=48)}


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


def test_training_resumes_to_the_same_weights(tmp_path):
    def run(stops: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 4)
        optimizer = torch.optim.Adam(network.parameters(), 0.1)
        state = tmp_path / f"{len(stops)}.pt"

        def loss(step: int) -> torch.Tensor:
            if stops and step == stops[0]:
                stops.pop()
                raise KeyboardInterrupt
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return (network(batch) - batch).square().mean()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "SAVE_SECONDS", 0)
            while True:
                try:
                    train.train_loop(network, optimizer, 0.1, 12, state, loss)
                    return network.weight.detach().clone()
                except KeyboardInterrupt:
                    # a new process starts from new weights
                    network.reset_parameters()

    assert torch.equal(run([]), run([7]))
