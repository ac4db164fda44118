"""Ways to damage a file of the tool, which property tests draw from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fastmem.errors import InputFileError, UsageError

# what stands in place of an entry: other types, huge and odd numbers, other words
ODD = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    2**70,
    0.5,
    -1e308,
    "",
    "x",
    "0",
    "../..",
    [],
    [0],
    {},
    {"a": 1},
    [[], {}],
    "NaN",
)
# texts that no writer of JSON makes
ODD_TEXTS = ("", "null", "[]", "{", '"a"', "NaN", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000, '{"a":' * 100_000, "\0")


def entries_of(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all entries of a JSON document, at any depth."""
    if not isinstance(document, (dict, list)):
        return []
    keys = document.keys() if isinstance(document, dict) else range(min(len(document), 3))
    return [p for key in keys for p in ((*path, key), *entries_of(document[key], (*path, key)))]


@st.composite
def changed_texts(draw: st.DrawFn, text: str) -> str:
    """JSON texts near ``text``: an entry is missing or another value, or the text is odd or cut off."""
    document = json.loads(text)
    kind = draw(st.sampled_from(("drop", "replace", "replace", "odd", "cut")))
    if kind == "odd":
        return draw(st.sampled_from(ODD_TEXTS))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    *above, last = draw(st.sampled_from(entries_of(document)))
    place = document
    for key in above:
        place = place[key]
    if kind == "drop":
        del place[last]
    else:
        place[last] = draw(st.sampled_from(ODD))
    return json.dumps(document)


@st.composite
def changed_headers(draw: st.DrawFn, content: bytes) -> bytes:
    """Safetensors files near ``content``, whose own header is changed and without a check sum."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    own = json.loads(header["__metadata__"]["fastmem"])
    own.pop("checksum", None)
    tensor = draw(st.sampled_from([None, *(name for name in header if name != "__metadata__")]))
    if tensor is None:
        header["__metadata__"]["fastmem"] = draw(changed_texts(json.dumps(own)))
    else:
        header["__metadata__"]["fastmem"] = json.dumps(own)
        entry = header.pop(tensor)
        kind = draw(st.sampled_from(("name", "dtype", "shape")))
        if kind == "dtype":
            same = {"F64": "I64", "I64": "F64", "F32": "I32", "I16": "F16", "I32": "F32"}
            entry["dtype"] = same.get(entry["dtype"], "I8")
        elif kind == "shape":
            entry["shape"] = entry["shape"][1:] if entry["shape"][:1] == [1] else [1, *entry["shape"]]
        header[f"{tensor}x" if kind == "name" else tensor] = entry
    made = json.dumps(header).encode()
    return struct.pack("<Q", len(made)) + made + content[8 + size :]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Files near ``content``: one bit is flipped, the file ends early or is longer, or a piece of it is other bytes."""
    kind = draw(st.sampled_from(("flip", "flip", "cut", "longer", "piece")))
    at = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        return content[:at]
    if kind == "longer":
        return content + draw(st.binary(min_size=1, max_size=16))
    if kind == "piece":
        piece = draw(st.binary(min_size=1, max_size=16))
        return content[:at] + piece + content[at + len(piece) :]
    return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]


def read_damaged(path: Path, content: bytes, read: Callable[[], Any]) -> Any:
    """Return what ``read`` gives while the file ``path`` has other ``content``; None where it is refused."""
    # a new file each time, because readers map files into memory
    before = path.rename(path.with_name(f"{path.name}.before"))
    path.write_bytes(content)
    try:
        return read()
    except (InputFileError, UsageError) as error:
        sentence = str(error)
        assert sentence.startswith("expected ")
        assert "\n" not in sentence.strip()
        return None
    finally:
        before.replace(path)
