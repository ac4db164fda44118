"""Whatever stands in a document or a file that the page is made of: there is a page of it, or one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.report.page.page import page_data, page_text
from fastmem.stages.report import read_story
from tests.hostile import changed_headers, changed_texts, damaged, read_damaged

FEW = settings(
    derandomize=True, max_examples=20, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
DOCUMENTS = {
    "scores": "result.json",
    "extraction": "extractions/unedited-*/result.json",
    "edited extraction": "extractions/halved-*/result.json",
    "evaluation": "evaluations/halved-*.json",
    "sweep": "sweep/sweep.json",
}


@pytest.fixture(scope="module")
def copied(hostile_run, tmp_path_factory) -> fastmem.OpenedRun:
    """The small run once more, to be damaged."""
    folder = shutil.copytree(hostile_run.run.path, tmp_path_factory.mktemp("copy") / "run")
    return fastmem.open_run(folder, model=hostile_run.run.model)


def tell(run: fastmem.OpenedRun) -> str:
    """All that a page says, but for the script of the charts."""
    story = read_story(run)
    data, _ = page_data(story, False, 0)
    json.dumps(data, allow_nan=False)
    return page_text(story, data, False, "")


def file_of(run: fastmem.OpenedRun, pattern: str) -> Path:
    (found,) = run.path.glob(pattern)
    return found


@pytest.mark.parametrize("pattern", DOCUMENTS.values(), ids=DOCUMENTS)
@FEW
@given(data=st.data())
def test_a_changed_document_gives_a_page_or_one_sentence(copied: Any, pattern: str, data: st.DataObject):
    file = file_of(copied, pattern)
    text = data.draw(changed_texts(file.read_text()))
    told = read_damaged(file, text.encode(), lambda: tell(copied))
    assert told is None or told.startswith("<!DOCTYPE html>")


@FEW
@given(data=st.data())
def test_changed_completions_give_a_page_or_one_sentence(copied: Any, data: st.DataObject):
    file = file_of(copied, "extractions/unedited-*/completions.safetensors")
    content = file.read_bytes()
    kind = changed_headers if data.draw(st.booleans()) else damaged
    told = read_damaged(file, data.draw(kind(content)), lambda: fastmem.report(copied, copied.path / "page.html"))
    assert told is None or told.is_file()
