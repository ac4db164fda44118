"""Scaled units and their exact undo, edit files, and edited checkpoints."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmem import Edit, EditPlan, InputFileError, UsageError, load_model, scale_units
from fastmem.files import write_tensors
from fastmem.mitigation.edit_file import SCHEMA, edit_path, load_edit
from fastmem.mitigation.edited_checkpoint import save_checkpoint
from fastmem.models.model import Model
from fastmem.ranking.selection import Selection
from fastmem.runs.folder import RunFolder
from tests.conftest import build_case, make_toy_model

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELS: dict[str, Callable[[], Model]] = {"rar": make_toy_model, "var": lambda: build_case("var-small")}
CHOSEN = ([0, 0, 1, 0, 1], [3, 23, 0, 7, 22])


def choose(layer: list[int], unit: list[int], **changes: object) -> Selection:
    found = Selection(torch.tensor(layer), torch.tensor(unit), torch.zeros(len(layer)).double(), "unitmem", 0.1)
    return replace(found, **changes)


def state_of(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.generator.state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)

    return first.keys() == second.keys() and all(torch.equal(bits(first[k]), bits(second[k])) for k in first)


@pytest.fixture
def model() -> Model:
    """A toy model of its own: 2 blocks of 24 units."""
    return make_toy_model()


@pytest.mark.parametrize("factor", [0.5, 0.0, 0.3, -1.7], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_only_the_rows_of_the_units_are_multiplied(make, dtype, factor):
    model = make()
    model.generator.to(dtype)
    expected = state_of(model)
    weights = [name for name in expected if name.endswith("fc1.weight")]
    for layer, unit in zip(*CHOSEN, strict=True):
        expected[weights[layer]][unit] *= factor
    before = state_of(model)
    edit = scale_units(model, choose(*CHOSEN), factor)
    assert isinstance(edit, Edit)
    assert len(edit) == 5
    assert not same_bits(state_of(model), before)
    assert same_bits(state_of(model), expected)
    edit.undo()
    assert same_bits(state_of(model), before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_factor_for_each_unit_gives_the_bits_of_one_factor_at_a_time(model, dtype):
    model.generator.to(dtype)
    before = state_of(model)
    factors = torch.tensor([0.3, 0.5, 0.3, 1.7, 0.0], dtype=torch.float64)
    for layer, unit, factor in zip(*CHOSEN, factors.tolist(), strict=True):
        scale_units(model, choose([layer], [unit]), factor)
    expected = state_of(model)
    while model.edits:
        model.edits[-1].undo()
    with scale_units(model, choose(*CHOSEN), factors):
        assert same_bits(state_of(model), expected)
    assert same_bits(state_of(model), before)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_sequence_of_edits_and_undos_ends_with_the_bits_of_the_start(model, dtype, seed):
    rng = np.random.default_rng(seed)
    model.generator.to(dtype)
    weight = model.fc1_layers[0].weight
    # values that arithmetic would not bring back
    weight[3, :4] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-7]).to(dtype)
    before, live, refused, out_of_order = state_of(model), [], 0, 0
    for _ in range(60):
        if live and rng.random() < 0.5:
            at = int(rng.integers(len(live)))
            edit, mine = live[at]
            snapshot = state_of(model)
            if any(mine & theirs for _, theirs in live[at + 1 :]):
                with pytest.raises(UsageError, match="undo the latest edit of a unit first"):
                    edit.undo()
                assert same_bits(state_of(model), snapshot)
                refused += 1
                continue
            out_of_order += at + 1 < len(live)
            edit.undo()
            edit.undo()
            del live[at]
            # a model that was never given this edit has the same bits
            assert same_bits(state_of(model), replay(dtype, weight_row(before), live))
        else:
            chosen = rng.choice(48, int(rng.integers(1, 6)), replace=False)
            factor = torch.from_numpy(rng.normal(size=len(chosen))) if rng.random() < 0.5 else float(rng.normal())
            edit = scale_units(model, choose((chosen // 24).tolist(), (chosen % 24).tolist()), factor)
            live.append((edit, set(chosen.tolist())))
    assert refused
    assert out_of_order
    while live:
        live.pop()[0].undo()
    assert same_bits(state_of(model), before)
    assert model.edits == []


def weight_row(state: dict[str, Tensor]) -> Tensor:
    return state["blocks.0.mlp.fc1.weight"]


def replay(dtype: torch.dtype, first_weight: Tensor, live: list[tuple[Edit, set[int]]]) -> dict[str, Tensor]:
    fresh = make_toy_model()
    fresh.generator.to(dtype)
    fresh.fc1_layers[0].weight.copy_(first_weight)
    for edit, _ in live:
        scale_units(fresh, edit, edit.factor)
    return state_of(fresh)


def test_leaving_a_context_undoes_also_after_an_error(model):
    before = state_of(model)

    def fail_inside() -> None:
        with scale_units(model, choose(*CHOSEN)):
            assert not same_bits(state_of(model), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert same_bits(state_of(model), before)


def test_the_fingerprint_is_always_that_of_the_weights(model):
    def literal() -> str:
        fresh = make_toy_model()
        fresh.generator.load_state_dict(model.generator.state_dict())
        return fresh.fingerprint()["checkpoint"]

    unedited = model.fingerprint()["checkpoint"]
    first = scale_units(model, choose([0], [1]))
    edited = model.fingerprint()["checkpoint"]
    assert edited == literal() != unedited
    second = scale_units(model, choose([1], [2]))
    first.undo()
    assert model.fingerprint()["checkpoint"] == literal() not in (unedited, edited)
    second.undo()
    assert model.fingerprint()["checkpoint"] == literal() == unedited


def test_an_edit_of_no_units_changes_nothing(model):
    before = state_of(model)
    with scale_units(model, choose([], [])):
        assert same_bits(state_of(model), before)


REFUSED = {
    "layer too high": (([2], [0]), 0.5, r"layers in 0..1, got 2..2"),
    "unit too high": (([0, 1], [3, 24]), 0.5, r"units in 0..23, got 3..24"),
    "negative unit": (([0], [-1]), 0.5, r"units in 0..23, got -1..-1"),
    "a unit twice": (([0, 1, 0], [3, 3, 3]), 0.5, "every unit once"),
    "NaN": (([0], [3]), float("nan"), "a finite factor, or one for each of 1 units, got nan"),
    "infinite": (([0, 1], [3, 3]), torch.tensor([0.5, torch.inf]), "got inf"),
    "factors of another number": (([0], [3]), torch.tensor([0.5, 0.5]), r"got a tensor of shape \[2\]"),
    "more layers than units": (([0, 1], [3]), 0.5, "as many layers as units"),
}


@pytest.mark.parametrize(("chosen", "factor", "text"), REFUSED.values(), ids=REFUSED)
def test_wrong_units_and_factors_are_refused_before_anything_changes(model, chosen, factor, text):
    before = state_of(model)
    units = SimpleNamespace(layer=torch.tensor(chosen[0]), unit=torch.tensor(chosen[1]))
    with pytest.raises(UsageError, match=text):
        scale_units(model, units, factor)
    assert same_bits(state_of(model), before)
    assert model.edits == []


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 1e8), ("float32", 1e39), ("bfloat16", -1e39)])
@pytest.mark.parametrize("each", [False, True], ids=["one factor", "a factor each"])
def test_a_factor_that_leaves_the_range_of_the_type_is_refused(model, dtype, factor, each):
    model.generator.to(DTYPES[dtype])
    before = state_of(model)
    factors = torch.tensor([0.5, factor, 0.5, 0.5, 0.5], dtype=torch.float64) if each else factor
    with pytest.raises(
        UsageError, match=f"products stay finite in {dtype}, got .* for a unit of block 0: take a smaller"
    ):
        scale_units(model, choose(*CHOSEN), factors)
    assert same_bits(state_of(model), before)
    assert model.edits == []


@pytest.mark.parametrize(
    ("layer", "unit"),
    [(torch.tensor([0.0]), torch.tensor([3])), (torch.tensor([0]), torch.tensor([True])), ([0], [3.7])],
    ids=["fractional layers", "a mask", "a list of fractions"],
)
def test_units_that_are_no_whole_numbers_are_refused(model, layer, unit):
    with pytest.raises(UsageError, match="layers and units as int64"):
        scale_units(model, SimpleNamespace(layer=layer, unit=unit))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_undo_after_a_change_of_the_scaled_rows_is_refused(model, dtype):
    model.generator.to(DTYPES[dtype])
    edit = scale_units(model, choose(*CHOSEN), 0.3)
    model.fc1_layers[1].weight[22, 0] += 1
    changed = state_of(model)
    with pytest.raises(UsageError, match="rows of block 1 as this edit left them, got others: .* load the model again"):
        edit.undo()
    assert same_bits(state_of(model), changed)
    assert edit.live


def test_an_undo_in_another_type_is_refused(model):
    edit = scale_units(model, choose(*CHOSEN), 0.5)
    model.generator.to(torch.float64)
    with pytest.raises(UsageError, match="weights were changed under the edit"):
        edit.undo()


def test_an_undo_of_rows_that_were_loaded_anew_keeps_them(model):
    before = state_of(model)
    edit = scale_units(model, choose(*CHOSEN), 0.5)
    model.generator.load_state_dict(before)
    edit.undo()
    assert same_bits(state_of(model), before)


def make_plan(model: Model, **changes: object) -> EditPlan:
    factors = torch.tensor([0.5, 0.25, 0.1, 0.5, 3.0], dtype=torch.float64)
    seen = torch.tensor([5, 2**62]), torch.tensor([7])
    return replace(EditPlan.of(model, choose(*CHOSEN, seed=7), factors, *seen), **changes)


def test_an_edit_file_of_the_first_version_is_read(model, tmp_path):
    plan = make_plan(model)
    tensors = {name: tensor for name, tensor in plan.tensors().items() if name != "chosen_against"}
    write_tensors(tmp_path / "edit.safetensors", tensors, SCHEMA, plan.header())
    found = EditPlan.load(tmp_path / "edit.safetensors")
    assert found.equals(replace(plan, chosen_against=torch.empty(0, dtype=torch.int64)))


def test_a_saved_plan_says_the_same_and_does_what_scale_units_does(model, tmp_path):
    plan = make_plan(model)
    plan.save(tmp_path / "edit.safetensors")
    found = EditPlan.load(tmp_path / "edit.safetensors")
    assert found.equals(plan)
    assert (found.by, found.fraction, found.seed, found.layers, found.units) == ("unitmem", 0.1, 7, 2, 24)
    assert (found.chosen_on.tolist(), found.chosen_against.tolist()) == ([5, 2**62], [7])
    assert found.checkpoint == model.fingerprint()["checkpoint"]
    with scale_units(model, choose(*CHOSEN), plan.factor):
        expected = state_of(model)
    with found.apply(model):
        assert same_bits(state_of(model), expected)
    assert (tmp_path / "edit.safetensors").stat().st_size < 2000


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"factor": torch.full((5,), 0.5).double()}, {"unit": torch.tensor([3, 23, 1, 7, 22])}],
    ids=["seed", "factor", "unit"],
)
def test_plans_that_differ_are_not_equal(model, change):
    assert not make_plan(model).equals(make_plan(model, **change))


def test_one_factor_serves_all_units_of_a_plan(model):
    assert EditPlan.of(model, choose(*CHOSEN), 0.25).factor.tolist() == [0.25] * 5


def test_a_plan_refuses_other_weights_and_names_both(model):
    plan = make_plan(model)
    other = make_toy_model()
    other.fc1_layers[0].weight[0, 0] += 1
    hashes = plan.checkpoint[:12], other.fingerprint()["checkpoint"][:12]
    with pytest.raises(UsageError, match=f"RARModel {hashes[0]} in float32, got RARModel {hashes[1]} in float32"):
        plan.apply(other)
    half = make_toy_model()
    half.generator.half()
    with pytest.raises(UsageError, match="in float32, got RARModel .* in float16"):
        plan.apply(half)


def test_a_plan_is_made_and_applied_on_an_unedited_model(model):
    plan = make_plan(model)
    with scale_units(model, choose([0], [0])):
        for call in (lambda: plan.apply(model), lambda: make_plan(model)):
            with pytest.raises(UsageError, match="a model without edits, got one with 1"):
                call()
    with plan.apply(model):
        pass


@pytest.mark.parametrize("factor", [torch.ones(4).double(), float("nan")], ids=["too few", "NaN"])
def test_a_plan_needs_a_finite_factor_for_each_unit(model, factor):
    with pytest.raises(UsageError, match="a finite factor for each of 5 units"):
        EditPlan.of(model, choose(*CHOSEN), factor)


def damaged(plan: EditPlan, what: str, path: Path) -> None:
    tensors, header = plan.tensors(), plan.header()
    if what == "half a file":
        plan.save(path)
        path.write_bytes(path.read_bytes()[:200])
        return
    if what == "another kind":
        write_tensors(path, tensors, "fastmem.stats/1", header)
        return
    if what == "unit out of range":
        tensors["unit"] = tensors["unit"] + 100
    elif what == "missing tensor":
        del tensors["factor"]
    elif what == "another type":
        tensors["factor"] = tensors["factor"].float()
    elif what == "no seed":
        del header["seed"]
    elif what == "factors too few":
        tensors["factor"] = tensors["factor"][:2]
    write_tensors(path, tensors, SCHEMA, header)


DAMAGES = ("half a file", "another kind", "unit out of range", "missing tensor", "another type", "no seed")


@pytest.mark.parametrize("what", [*DAMAGES, "factors too few"])
def test_damaged_edit_files_are_refused(model, tmp_path, what):
    damaged(make_plan(model), what, tmp_path / "edit.safetensors")
    with pytest.raises(InputFileError, match=r"expected a .*edit\.safetensors, got"):
        EditPlan.load(tmp_path / "edit.safetensors")


def test_edits_of_a_run_are_found_by_name_or_path(model, tmp_path):
    folder, plan = RunFolder(tmp_path / "run"), make_plan(model)
    with pytest.raises(UsageError, match=r"\(it has none\), got 'a'"):
        load_edit(folder, "a")
    for name in ("b", "a"):
        plan.save(edit_path(folder, name))
    assert load_edit(folder, "a").equals(plan)
    assert load_edit(RunFolder(tmp_path), str(tmp_path / "run" / "edits" / "b.safetensors")).equals(plan)
    with pytest.raises(UsageError, match=r"\(a, b\), got 'c'"):
        load_edit(folder, "c")
    with pytest.raises(InputFileError, match="no.safetensors, got none"):
        load_edit(folder, "no.safetensors")
    with pytest.raises(UsageError, match=r"a name of letters, digits, .* got '\.\.'"):
        load_edit(folder, "..")


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["rar-tiny", "var-tiny"])
def test_an_edited_checkpoint_has_the_official_entries_and_equal_logits(tmp_path, name, suffix):
    model = load_model(name, device="cpu")
    entries = {key: (value.shape, value.dtype) for key, value in model.generator.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocabulary, (2, model.num_tokens), generator=generator)
    labels = torch.tensor([1, 40])
    plain = model.logits(tokens, labels)
    path = tmp_path / f"edited{suffix}"
    with scale_units(model, choose([0, 7], [3, 767])):
        expected = model.logits(tokens, labels)
        save_checkpoint(model, path)
    assert not torch.equal(expected, plain)
    state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == entries
    assert torch.equal(load_model(name, checkpoint=path, device="cpu").logits(tokens, labels), expected)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_keeps_the_type_that_the_weights_are_held_in(tmp_path):
    save_checkpoint(load_model("rar-tiny", device="cpu", dtype="bfloat16"), tmp_path / "half.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {torch.bfloat16}


def test_a_checkpoint_holds_no_more_than_its_tensors(model, tmp_path):
    weight = model.fc1_layers[0].weight
    weight.data = torch.zeros(1000, *weight.shape)[5]
    save_checkpoint(model, tmp_path / "edited.bin")
    assert (tmp_path / "edited.bin").stat().st_size < 1.2 * sum(t.nbytes for t in state_of(model).values()) + 50_000


CHECKPOINTS_REFUSED = {
    "suffix": ("edited.ckpt", "a .safetensors, .bin or .pth file"),
    "a file that is there": ("there.bin", "a new file to write the checkpoint to"),
    "below a file": ("there.bin/edited.bin", "expected to be able to write"),
}


@pytest.mark.parametrize(("name", "text"), CHECKPOINTS_REFUSED.values(), ids=CHECKPOINTS_REFUSED)
def test_checkpoints_are_written_to_new_files_of_known_kinds(model, tmp_path, name, text):
    (tmp_path / "there.bin").write_text("mine")
    with pytest.raises(UsageError, match=text):
        save_checkpoint(model, tmp_path / name)
    assert (tmp_path / "there.bin").read_text() == "mine"


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_checkpoint_that_does_not_fit_leaves_nothing(model, tmp_path, suffix):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UsageError, match="got a failed write .*: make room or choose another place"):
            save_checkpoint(model, tmp_path / f"edited{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("factor", [0.3, torch.tensor([0.3, 0.5, 0.3, 1.7, 0.0])], ids=["one", "each"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_edits_on_a_gpu_have_the_bits_of_those_on_a_cpu(model, dtype, factor):
    model.generator.to(dtype)
    before = state_of(model)
    with scale_units(model, choose(*CHOSEN), factor):
        expected = state_of(model)
    model.generator.cuda()
    with scale_units(model, choose(*CHOSEN), factor):
        assert same_bits({k: v.cpu() for k, v in state_of(model).items()}, expected)
    assert same_bits({k: v.cpu() for k, v in state_of(model).items()}, before)
