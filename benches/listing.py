"""Seconds and memory to list 1.28 million images in a folder, a zip, tar shards and parquet shards.

The images are empty, because a listing reads names and labels alone: only the headers between the members of a tar, and
only the columns of labels and paths of a parquet file. Each listing is a process of its own, and files are in the
system's cache. Fails where one takes a minute or 1 GB beyond the imports. ``python benches/listing.py [KIND ...]``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from rows import append_row

IMAGES, CLASSES, SHARDS = 1_280_000, 1000, 128
MAX_SECONDS, MAX_MIB = 60, 1000
KINDS = ("folder", "zip", "tar", "labelled tar", "parquet")

LIST = """
import json, re, sys, time
from pathlib import Path
import numpy, pyarrow.parquet, fsspec
from fastmem.data.sources import open_source
# not what getrusage says, which begins at the memory of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, started = peak(), time.monotonic()
images = len(open_source(sys.argv[1]))
print(json.dumps({"images": images, "seconds": round(time.monotonic() - started, 1), "mib": round(peak() - before)}))
"""


def name_of(number: int) -> tuple[int, str, str]:
    """Class, and names of the class's folder and of the file; neighbours are of different classes."""
    label = number * 7919 % CLASSES
    folder = f"n{1440764 + label * 7919:08d}"
    return label, folder, f"{folder}_{number}.JPEG"


def write(kind: str, place: Path) -> str:
    """Write the images; return what ``--data`` is given."""
    if kind == "folder":
        for label in range(CLASSES):
            (place / name_of(label)[1]).mkdir(parents=True)
        for number in range(IMAGES):
            _, folder, name = name_of(number)
            os.close(os.open(place / folder / name, os.O_CREAT))
        return str(place)
    if kind == "zip":
        with zipfile.ZipFile(place.with_suffix(".zip"), "w") as archive:
            for number in range(IMAGES):
                archive.writestr("/".join(name_of(number)[1:]), b"")
        return str(place.with_suffix(".zip"))
    place.mkdir()
    for shard in range(SHARDS):
        numbers = range(shard, IMAGES, SHARDS)
        if kind == "parquet":
            write_parquet(place / f"{shard:03d}.parquet", numbers)
            continue
        with open(place / f"{shard:03d}.tar", "wb") as file:
            for number in numbers:
                label, folder, name = name_of(number)
                member = tarfile.TarInfo(name if kind == "labelled tar" else f"{folder}/{name}")
                file.write(member.tobuf(tarfile.USTAR_FORMAT))
                if kind == "labelled tar":
                    member = tarfile.TarInfo(name.replace(".JPEG", ".cls"))
                    member.size = len(str(label))
                    file.write(member.tobuf(tarfile.USTAR_FORMAT) + str(label).encode().ljust(512, b"\0"))
            file.write(bytes(1024))
    return f"{place}/*.{'parquet' if kind == 'parquet' else 'tar'}"


def write_parquet(path: Path, numbers: range) -> None:
    """Hugging Face's layout, with row groups of 100."""
    import pyarrow
    from pyarrow import parquet

    rows = [name_of(number) for number in numbers]
    images = pyarrow.StructArray.from_arrays(
        [pyarrow.array([b""] * len(rows)), pyarrow.array([row[2] for row in rows])], ["bytes", "path"]
    )
    parquet.write_table(pyarrow.table({"image": images, "label": [row[0] for row in rows]}), path, row_group_size=100)


def main(kinds: list[str]) -> None:
    slow = []
    for kind in kinds or KINDS:
        with tempfile.TemporaryDirectory() as place:
            data = write(kind, Path(place, "images"))
            done = subprocess.run([sys.executable, "-c", LIST, data], stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout)
        print(f"{kind:>12}: {found['images']:,} images, {found['seconds']} s, {found['mib']} MiB", flush=True)
        append_row("listing", {"kind": kind, **found})
        if found["seconds"] >= MAX_SECONDS or found["mib"] >= MAX_MIB or found["images"] != IMAGES:
            slow.append(kind)
    if slow:
        raise SystemExit(f"a listing of {IMAGES:,} images takes a minute, or 1 GB: {', '.join(slow)}")


if __name__ == "__main__":
    main(sys.argv[1:])
