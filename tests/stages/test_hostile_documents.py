"""Whatever happened to a file of a run, an index or a cache: its reader gives what was written, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmem
from fastmem import open_run
from fastmem.backends.native import RECORD, _read_record
from fastmem.data.decoding import Skipped
from fastmem.data.manifest import Manifest
from fastmem.extraction.extract import UNIT_SCHEMA, _Part
from fastmem.files import read_json, read_tensors, write_json, write_tensors
from fastmem.index.build import BUILD_SCHEMA, BuildShape, build_index
from fastmem.index.pending import PendingPart, read_pending
from fastmem.index.search import EmbeddingIndex
from fastmem.mitigation.edit_file import EditPlan
from fastmem.runs.folder import RUN_SCHEMA, IdentityShape, RunFolder, RunInputs
from fastmem.scoring.image_losses import ImageLosses
from fastmem.scoring.running_set import RunningSet, RunningShape
from fastmem.scoring.score import SKIPPED_SCHEMA, STATE_SCHEMA, SkippedShape
from fastmem.stages.extract import SCHEMA as EXTRACTION
from fastmem.stages.extract import DocumentShape, ExtractionResult
from fastmem.stages.opened_run import OpenedRun
from fastmem.stats import StatsBuilder, UnitStats
from fastmem.stats.class_rows import read_row
from fastmem.sweep.plan import Row
from fastmem.sweep.reattack import Attempt, ReAttack, Rescaling
from fastmem.sweep.table import Measured
from fastmem.tokens.cache import TokenCache
from tests.conftest import FakeEmbedder, random_images
from tests.hostile import changed_headers, changed_texts, damaged, read_damaged

EXAMPLES = settings(
    derandomize=True,
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ROW = Row("unitmem", 0.05, 0.5)
SHAPE = (2, 3, 5)


@dataclass(frozen=True)
class Kept:
    """A file, and how it is read: ``read`` gives numbers, arrays and texts that can be compared."""

    path: Path
    read: Callable[[], Any]


def plain(value: Any) -> Any:
    """What a reader gives, in a form that can be compared."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tolist() if value.dtype.kind == "T" else value.tobytes())
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "__dict__"):
        return plain(vars(value))
    return value


@pytest.fixture(scope="module")
def kept(toy_model, toy_source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    """A file of every kind."""
    run = tmp_path_factory.mktemp("toy") / "run"
    fastmem.score(toy_model, toy_source, views="center", check_classes=False, per_image=True, out=run, pictures=False)
    found = of_a_run(open_run(run, model=toy_model, data=toy_source)) | of_an_index(
        toy_source, tmp_path_factory.mktemp("index")
    )
    return found | of_other_work(toy_source, tmp_path_factory.mktemp("other"))


def of_a_run(run: OpenedRun) -> dict[str, Kept]:
    path = run.path
    edit = fastmem.mitigate(run, top=0.2)
    done = fastmem.extract(run, prefixes=[0], top_per_class=1, judge="tokens")
    ids, recipe = run.manifests["train"].ids[:3], run.model.view_recipe("center")
    tokens = torch.arange(3 * run.model.num_tokens).reshape(3, 1, -1)
    cache = TokenCache(path.parent / "tokens", "{}", run.model.num_tokens, run.model.vocabulary)
    cache.write(recipe, ids, {int(i): (bytes([n] * 16), t) for n, (i, t) in enumerate(zip(ids, tokens, strict=True))})
    folder, train = run.folder, run.owner("train")
    losses = folder.losses_file("train")
    label = int(run.manifests["train"].labels[0])
    edit_file = folder.edits_folder / f"{edit.name}.safetensors"
    return {
        "run.json": Kept(folder.identity_file, lambda: read_json(folder.identity_file, RUN_SCHEMA, IdentityShape)),
        "inputs.json": Kept(folder.inputs_file, lambda: RunInputs.load(RunFolder(path), run.id)),
        "skipped.json": Kept(
            folder.skipped_file("train"),
            lambda: read_json(folder.skipped_file("train"), SKIPPED_SCHEMA, SkippedShape, train),
        ),
        "result.json": Kept(
            done.path / "result.json",
            lambda: read_json(done.path / "result.json", EXTRACTION, DocumentShape, {"run_id": run.id}),
        ),
        "manifest": Kept(folder.manifest_file("train"), lambda: Manifest.load(folder.manifest_file("train"))),
        "verdicts": Kept(
            done.path / "verdicts.parquet", lambda: ExtractionResult(done.path, done.document).verdicts.to_pylist()
        ),
        "statistics": Kept(folder.stats_file("train"), lambda: numbers(folder.stats_file("train"), train)),
        "class row": Kept(
            path / "train.classes" / f"class-{label:05d}.safetensors",
            lambda: read_row(path / "train.classes", 0, label, train),
        ),
        "losses": Kept(losses, lambda: ImageLosses.load(losses, run.manifests["train"].hash, train)),
        "edit": Kept(edit_file, lambda: EditPlan.load(edit_file, run.id)),
        "tokens": Kept(
            cache.shard_file(recipe, ids), lambda: {i: (c, plain(t)) for i, (c, t) in cache.read(recipe, ids).items()}
        ),
    }


def numbers(path: Path, owner: dict[str, str]) -> dict[str, Any]:
    """All that a file of statistics holds but the class rows, which are read later."""
    stats = UnitStats.load(path, owner)
    return {"sums": [fold.fold for fold in stats.folds], "counts": stats.class_counts, "origin": stats.origin}


def of_an_index(source: Any, folder: Path) -> dict[str, Kept]:
    embedder = FakeEmbedder()
    done = build_index(source, embedder, folder / "flat", workers=0)
    graph = build_index(source, embedder, folder / "graph", factory="HNSW4", workers=0)
    queries = embedder(random_images(2, 32, 5))

    def search(path: Path) -> Any:
        opened = EmbeddingIndex(path, "cpu")
        return vars(opened.search(queries, 3)) | {"names": opened.names.to_pylist(), "header": opened.header}

    part = PendingPart(Manifest.build(source))
    part.take(np.arange(3), np.arange(2), embedder(random_images(2, 32)), [Skipped("a/b", "broken")])
    pending, build = part.save(folder / "000000.safetensors", embedder), folder / "build.json"
    write_json(build, {"schema": BUILD_SCHEMA, "factory": "Flat"})
    return {
        "index.json": Kept(done.path / "index.json", lambda: search(done.path)),
        "index images": Kept(done.path / done.header.images_file, lambda: search(done.path)),
        "index vectors": Kept(done.path / done.header.vectors_file, lambda: search(done.path)),
        "index graph": Kept(graph.path / graph.header.vectors_file, lambda: search(graph.path)),
        "pending": Kept(pending, lambda: vectors_of(pending, embedder)),
        "build.json": Kept(build, lambda: read_json(build, BUILD_SCHEMA, BuildShape)),
    }


def vectors_of(path: Path, embedder: FakeEmbedder) -> list[Any]:
    """All that is used of a file of vectors."""
    ids, vectors, header = read_pending(path, embedder)
    return [ids, vectors, *(header[name] for name in ("names", "skipped", "skipped_ids"))]


def of_other_work(source: Any, folder: Path) -> dict[str, Kept]:
    manifest, owner = Manifest.build(source), {"run": "r", "set": "train"}

    def running() -> RunningSet:
        return RunningSet(
            manifest, StatsBuilder(SHAPE, ["a", "b", "c"], []), losses=ImageLosses.zero(len(manifest), False)
        )

    started, state, unit = running(), folder / "state.safetensors", folder / "unit.safetensors"
    started.end_unit(0)
    tensors, header = started.state()
    write_tensors(state, tensors, STATE_SCHEMA, header | owner)

    def restore() -> Any:
        fresh = running()
        fresh.restore(*read_tensors(state, STATE_SCHEMA, RunningShape, owner), state)
        return fresh.state()

    part = _Part(
        torch.arange(2), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(1, 2, 4, dtype=torch.int64),
        torch.ones(1, 2, dtype=torch.float64), *(torch.rand(1, 2) for _ in range(2)), torch.rand(2),
        torch.ones(1, 2, dtype=torch.int64), torch.rand(1, 2), torch.rand(2), torch.empty(2, 0),
    )  # fmt: skip
    write_tensors(unit, part.tensors(), UNIT_SCHEMA, owner)
    row, again, native = folder / "row.safetensors", folder / "again.json", folder / RECORD
    similarity = np.array([[0.5, 1.0]], np.float32)
    Measured(ROW, similarity, {"loss": 1.5, "undefined": float("nan")}, 7, 1.25).save(row, "s")
    attacked = ReAttack(ROW, 7, (Attempt("as published", 1, 4, 3, 1),), (Rescaling("rows", 3, 1, 2),))
    attacked.save(again, "s")
    native.write_text('{"torch": "2.0", "cpp": "no compiler"}')
    return {
        "state": Kept(state, restore),
        "work unit": Kept(unit, lambda: _Part.read(unit, owner)),
        "sweep row": Kept(row, lambda: Measured.load(row, ROW, "s")),
        "re-attack": Kept(again, lambda: ReAttack.load(again, ROW, "s")),
        "native record": Kept(native, lambda: _read_record(folder)),
    }


DOCUMENTS = (
    "run.json", "inputs.json", "skipped.json", "result.json", "index.json", "build.json", "re-attack", "native record",
)  # fmt: skip
TENSORS = (
    "statistics", "class row", "losses", "edit", "tokens", "pending", "state", "work unit", "sweep row",
)  # fmt: skip
TABLES = ("manifest", "verdicts", "index images", "index vectors", "index graph")


@pytest.mark.parametrize("name", DOCUMENTS)
@EXAMPLES
@given(data=st.data())
def test_a_document_with_other_entries_is_read_or_refused(kept, name, data):
    file = kept[name]
    read_damaged(file.path, data.draw(changed_texts(file.path.read_text())).encode(), file.read)


@pytest.mark.parametrize("name", TENSORS)
@EXAMPLES
@given(data=st.data())
def test_a_tensor_file_with_another_header_is_read_or_refused(kept, name, data):
    file = kept[name]
    read_damaged(file.path, data.draw(changed_headers(file.path.read_bytes())), file.read)


@pytest.mark.parametrize("name", [*TENSORS, *TABLES])
@EXAMPLES
@given(data=st.data())
def test_a_damaged_file_is_never_read_as_other_numbers(kept, name, data):
    file = kept[name]
    whole = plain(file.read())
    found = read_damaged(file.path, data.draw(damaged(file.path.read_bytes())), file.read)
    assert found is None or repr(plain(found)) == repr(whole)


@pytest.mark.parametrize("name", [*DOCUMENTS[:-1], *TENSORS, *TABLES])
def test_a_file_of_another_kind_is_refused(kept, name):
    file = kept[name]
    for other in (*DOCUMENTS[:-1], *TENSORS, *TABLES):
        if other != name:
            assert read_damaged(file.path, kept[other].path.read_bytes(), file.read) is None, other
