"""Any text is a shard or one sentence, and slices of any images are whole classes that make all of them."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmem import ArraySource, UsageError
from fastmem.data.manifest import Manifest
from fastmem.scoring.shard import Shard

QUICK = settings(derandomize=True, max_examples=60, deadline=None, database=None)


@QUICK
@given(text=st.one_of(st.text(max_size=12), st.from_regex(r"-?\d{1,12}/-?\d{1,12}", fullmatch=True)))
def test_any_text_is_a_shard_or_refused(text):
    found = None
    with suppress(UsageError):
        found = Shard.parse(text)
    assert found is None or 1 <= found.number <= found.of


@QUICK
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), data=st.data())
def test_slices_are_whole_classes_that_make_all_images(counts, data):
    of = data.draw(st.integers(1, len(counts)))
    labels = np.repeat(np.arange(len(counts)), counts)
    manifest = Manifest.build(ArraySource(np.zeros((len(labels), 4, 4, 3), np.uint8), labels))
    parts = [Shard(i, of).cut({"train": manifest})["train"] for i in range(1, of + 1)]
    assert np.concatenate(parts).tolist() == list(range(len(labels)))
    assert sum(len(set(manifest.labels[part].tolist())) for part in parts) == len(counts)
    # no slice is further from its share than a class is large, unless it was given its only class
    assert all(len(part) < len(labels) / of + 2 * max(counts) for part in parts)
    joined, order = Manifest.join([manifest.take(part) for part in reversed(parts)])
    assert joined.hash == manifest.hash
    assert sorted(order.tolist()) == list(range(len(labels)))
