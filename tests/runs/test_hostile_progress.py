"""The log of any bytes is read without an error, and what is read of it is of its types."""

from __future__ import annotations

import json
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmem.reporter import QUIET, Work
from fastmem.runs.owner import owned
from fastmem.runs.progress import LOG_NAME, Line, last_line

QUICK = settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2)
)


def good_line(folder) -> dict:
    with owned(folder, "score"):
        QUIET.planned(Work(10))
    return json.loads((folder / LOG_NAME).read_text().splitlines()[-1])


@QUICK
@given(content=st.binary(max_size=400))
def test_any_bytes_are_a_log_without_lines(tmp_path, content):
    (tmp_path / LOG_NAME).write_bytes(content)
    assert last_line(tmp_path) is None
    with owned(tmp_path, "score"):
        QUIET.planned(Work(3))
    assert last_line(tmp_path).total == 3


@QUICK
@given(data=st.data())
def test_a_line_with_a_changed_entry_is_read_whole_or_passed_over(tmp_path, data):
    line = good_line(tmp_path)
    key = data.draw(st.sampled_from(sorted(line)))
    line[key] = data.draw(VALUES)
    (tmp_path / LOG_NAME).write_text(json.dumps(line) + os.linesep)
    found = last_line(tmp_path)
    assert found is None or (isinstance(found, Line) and found.total >= 0 and found.schema == "fastmem.progress/1")
