"""A simulated ImageNet: what a scoring pass costs beside the network, its memory, and what a second rank brings.

1.28 million images are listed, decoded (8 pixels wide), and turned into responses by a closed form of
the image's id and the unit, for RAR-B's 24 blocks of 3,072 units. All else is the real pass: manifest, work units,
workers, statistics of every unit and class, saved progress, files. The closed form's own time is subtracted.

``python benches/scale.py`` measures 10,000 and 100,000 images, and one and two ranks over 20,000;
``python benches/scale.py 1281167`` measures this many.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rows import append_row
from torch import Tensor

from fastmem.data.sources import ImageSource
from fastmem.data.views import CenterCrop
from fastmem.models.observation import Segment
from fastmem.runs.ranks import current_ranks, shared
from fastmem.scoring.score import score_images
from fastmem.scoring.settings import ScoreSettings

CLASSES, PER_CLASS, BLOCKS, UNITS, SIZE = 1000, 1281, 24, 3072, 8
COUNTS = (10_000, 100_000)
RANKED = 20_000
ROUNDS, LEAST_GAIN = 3, 1.8


class Simulated(ImageSource):
    """Images without files: the pixels of an image are the bytes of its id."""

    def __init__(self, count: int) -> None:
        # as many images in a class as ImageNet has
        classes = tuple(f"n{label:08d}" for label in range(max(1, count // PER_CLASS)))
        labels = np.arange(count) * len(classes) // count
        names = [f"{classes[label]}/{number:08d}.png" for number, label in enumerate(labels.tolist())]
        super().__init__(names, labels, classes, (), f"{count} simulated images")

    def read(self, index: int) -> Image.Image:
        pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
        pixels[0, :, 0] = np.frombuffer(np.int64(self.ids[index]).tobytes(), np.uint8)
        return Image.fromarray(pixels)


class ClosedForm:
    """Stands for a model: a response is a product of a number of the image and a number of the unit."""

    name, num_layers, num_units, num_classes, num_tokens = "simulated", BLOCKS, UNITS, CLASSES, 1
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.units = torch.rand(BLOCKS, 1, UNITS, generator=torch.Generator().manual_seed(0))
        self.seconds = 0.0

    def fingerprint(self) -> dict[str, str]:
        return {"checkpoint": "closed form", "tokenizer": "bytes"}

    def view_recipe(self, views: int | str) -> CenterCrop:
        return CenterCrop(SIZE)

    def find_segments(self, names: object) -> tuple[Segment, ...]:
        return (Segment("last", 0, 1),)

    def tokenize(self, images: Tensor) -> Tensor:
        return (images[:, 0, 0, :4] * 255).round().long() @ torch.tensor([[1], [2**8], [2**16], [2**24]])

    def responses(self, tokens: Tensor, labels: Tensor, names: object, backend: object) -> Tensor:
        started = time.perf_counter()
        found = ((tokens.double() * 0.6180339887) % 1).float().view(-1, 1, 1, 1) * self.units
        self.seconds += time.perf_counter() - started
        return found


def run_here(count: int, out: str) -> None:
    """Score ``count`` images, in this process or as a rank, and print what it took as JSON."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    source, model = Simulated(count), ClosedForm()
    listed = time.perf_counter() - begun
    ready = current_ranks()
    begun = time.perf_counter()
    with shared(Path(out), "bench") as ranks:
        settings = ScoreSettings("center", class_rows="drop")
        found = score_images(
            model, {"train": source}, settings, out=Path(out), check_classes=False, workers=0, ranks=ranks
        )
    seconds = time.perf_counter() - begun
    assert found.train.count == count
    if ready is None or ready.leads:
        print(json.dumps({"listed": listed, "seconds": seconds, "network": model.seconds}))


def measure(count: int, ranks: int = 1) -> dict[str, float]:
    """What ``run_here`` prints, with the peak resident memory of the leading process in MiB."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        processes = []
        for rank in range(ranks):
            job = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | {key: str(value) for key, value in job.items()}
            command = [sys.executable, __file__, "here", str(count), f"{place}/run"]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        for process in processes[1:]:
            process.wait()
        assert processes[0].stdout is not None
        text = processes[0].stdout.read()
        _, status, usage = os.wait4(processes[0].pid, 0)
        if status or any(process.returncode for process in processes[1:]):
            raise SystemExit("a simulated pass failed")
    found: dict[str, float] = json.loads(text.splitlines()[-1])
    return found | {"peak": usage.ru_maxrss / 1024}


def report(count: int, found: dict[str, float], ranks: int, gain: float | None = None) -> None:
    """Print one measurement and keep its row."""
    beside = 1e6 * (found["seconds"] - found["network"]) / count
    print(
        f"{count:>9,} images, {ranks} rank(s): listed in {found['listed']:.1f} s, {beside:7.1f} us an image beside the "
        f"network, peak {found['peak']:,.0f} MiB" + ("" if gain is None else f", {gain:.2f} times one rank"),
        flush=True,
    )
    row = {
        "images": count,
        "ranks": ranks,
        "listed_s": round(found["listed"], 2),
        "seconds": round(found["seconds"], 2),
        "us_an_image": round(beside, 1),
        "peak_mib": round(found["peak"], 1),
        "gain": "" if gain is None else round(gain, 3),
    }
    append_row("scale", row)


def main() -> None:
    if sys.argv[1:2] == ["here"]:
        run_here(int(sys.argv[2]), sys.argv[3])
        return
    if sys.argv[1:]:
        for count in map(int, sys.argv[1:]):
            report(count, measure(count), 1)
        return
    peaks = []
    for count in COUNTS:
        found = measure(count)
        report(count, found, 1)
        peaks.append(found["peak"])
    # in turn, so that a busy machine slows both alike
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for ranks, taken in times.items():
            found = measure(RANKED, ranks)
            taken.append(found["seconds"])
            best = min(times[1])
            report(RANKED, found, ranks, None if ranks == 1 else best / min(taken))
    gain = min(times[1]) / min(times[2])
    spread = max(peaks) / min(peaks) - 1
    print(f"two ranks: {gain:.2f} times one (wanted {LEAST_GAIN}); memory: {spread:.1%} more than of the fewest images")
    if gain < LEAST_GAIN:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
