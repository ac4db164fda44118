"""Random damage to archives and images gives the same pixels or an error of fastmem's own, never other pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmem.data.decoding import DamagedImage, decode
from fastmem.data.sources import open_source
from fastmem.errors import InputFileError, UsageError
from tests.data.archives import write_parquet, write_tar, write_zip
from tests.data.test_data_sources import ANIMALS, encoded

# PNG, because its check sums tell damage; a JPEG of other bytes may be another picture
FILES = {name: encoded(shade) for shade, name in enumerate(sorted(ANIMALS))}
PICTURES = {name: np.asarray(decode(io.BytesIO(content))) for name, content in FILES.items()}
LABELLED = {
    key: value
    for number, content in enumerate(FILES.values())
    for key, value in ((f"{number}.png", content), (f"{number}.cls", b"cat"))
}
KINDS = {
    "tar": (write_tar, FILES, "a.tar"),
    "labelled tar": (write_tar, LABELLED, "a.tar"),
    "zip": (write_zip, FILES, "a.zip"),
    "parquet": (write_parquet, FILES, "a.parquet"),
}
quietly = settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# a place as a share of the file, and what is written there; or a length to which it is cut
damages = st.one_of(
    st.tuples(st.just("write"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=600)),
)


def damaged(content: bytes, damage: tuple) -> bytes:
    kind, share, value = damage
    at = int(share * (len(content) - 1))
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + value + content[at:]
    if kind == "flip":
        value = bytes([content[at] ^ (1 << value)])
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize("kind", KINDS)
@quietly
@given(damage=damages)
def test_damage_to_an_archive_never_gives_other_pixels(kind: str, damage: tuple, tmp_path: Path) -> None:
    write, files, name = KINDS[kind]
    path = write(tmp_path / name, files)
    path.write_bytes(damaged(path.read_bytes(), damage))
    try:
        source = open_source(path)
    except (InputFileError, UsageError):
        return
    pictures = [pixels.tobytes() for pixels in PICTURES.values()]
    source.prepare(range(len(source)))
    for index in range(len(source)):
        try:
            found = np.asarray(source.read(index))
        except (DamagedImage, InputFileError):
            continue
        own = PICTURES.get(str(source.names[index]))
        # a changed name is another image, but what is read for it is one of the pictures
        assert found.tobytes() in pictures
        assert own is None or np.array_equal(own, found)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@settings(quietly, max_examples=30)
@given(damage=damages)
def test_damage_to_an_image_gives_a_picture_or_says_so(file_format: str, damage: tuple) -> None:
    content = damaged(encoded(1, (24, 20), file_format=file_format), damage)
    try:
        picture = decode(io.BytesIO(content), "cat/1")
    except DamagedImage:
        return
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
@settings(quietly, max_examples=25)
@given(content=st.binary(max_size=2000), start=st.sampled_from([b"", b"PAR1", b"PK\x03\x04", b"\x1f\x8b"]))
def test_bytes_that_are_no_archive_are_refused(kind: str, content: bytes, start: bytes, tmp_path: Path) -> None:
    (tmp_path / f"a.{kind}").write_bytes(start + content)
    with pytest.raises((InputFileError, UsageError)):
        open_source(tmp_path / f"a.{kind}")
