"""From image files to statistics: images a second and the share of every stage, with what was built for it and without.

RAR-B's sizes with weights that say nothing, four JPEG files of ImageNet's usual size, ten views each, float32, no
worker processes, so that the stages' times add up. Three passes: the tokenizer with channels first and no cache, as it
was before; channels last, filling the token cache; and again with the cache full. All three have to end with UnitMem
equal to 1e-5, the last two with the same bits.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import require_green
from PIL import Image
from rar_forward import ALL_BLOCKS, build
from rows import append_row

from fastmem import FolderSource, ScoreResult, assemble, score
from fastmem.data.views import TenCrop
from fastmem.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from fastmem.models.model import Model
from fastmem.scoring.running_set import RunningSet

IMAGES, CLASSES, WIDTH, HEIGHT = 4, 2, 500, 375
STAGES = ("decode", "views", "tokenizer", "transformer", "statistics")
TOLERANCE = 1e-5


def write_images(folder: Path) -> None:
    """JPEG files of smooth noise, evenly from all classes."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / f"class-{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(place / f"{number}.jpg", quality=90)


@contextmanager
def stage_clock(model: Model) -> Iterator[Counter[str]]:
    """Seconds by stage of all passes while it is entered."""
    seconds: Counter[str] = Counter()
    places = (
        (FolderSource, "read", "decode"),
        (TenCrop, "__call__", "views"),
        (model, "tokenize", "tokenizer"),
        (model, "responses", "transformer"),
        (RunningSet, "update", "statistics"),
        (RunningSet, "end_unit", "statistics"),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, stage), (_, _, call) in zip(places, before, strict=True):
        setattr(owner, name, _timed(call, stage, seconds))
    try:
        yield seconds
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def _timed(call: Callable[..., Any], stage: str, seconds: Counter[str]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds[stage] += time.perf_counter() - started

    return timed


@contextmanager
def channels_first(model: Model) -> Iterator[None]:
    """The tokenizer's layout as it was."""
    encode = model.tokenizer.encode
    model.tokenizer.to(memory_format=torch.contiguous_format)
    model.tokenizer.encode = lambda images: encode(images.contiguous())
    try:
        yield
    finally:
        del model.tokenizer.encode
        model.tokenizer.to(memory_format=torch.channels_last)


def measure(name: str, model: Model, source: FolderSource, cache: Path | None) -> ScoreResult:
    """One pass: print its speed and shares, and add a row."""
    with stage_clock(model) as seconds:
        started = time.perf_counter()
        result = score(model, source, batch_size=20, check_classes=False, workers=0, token_cache=cache)
        whole = time.perf_counter() - started
    shares = {stage: seconds[stage] / whole for stage in STAGES}
    told = ", ".join(f"{stage} {share:.1%}" for stage, share in shares.items())
    print(f"{name:<36}{IMAGES / whole:.4f} images/s: {told}, other {1 - sum(shares.values()):.1%}", flush=True)
    row = {"pass": name, "images": IMAGES, "images_per_s": round(IMAGES / whole, 5)}
    append_row("pipeline", row | {stage: round(share, 5) for stage, share in shares.items()})
    return result


def main() -> None:
    require_green(["tests/tokens/test_token_cache.py", "tests/scoring/test_score.py"])
    tokenizer = MaskGITVQGAN(MaskGITVQGANConfig())
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    model = assemble(build(ALL_BLOCKS), tokenizer)
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place, "images"), Path(place, "tokens")
        write_images(folder)
        source = FolderSource(folder)
        with channels_first(model):
            before = measure("channels first, no cache", model, source, None)
        filling = measure("channels last, filling the cache", model, source, cache)
        full = measure("channels last, from the cache", model, source, cache)
    difference = float((before.train.unitmem() - filling.train.unitmem()).abs().max())
    if difference > TOLERANCE or not torch.equal(filling.train.mean, full.train.mean):
        raise SystemExit(f"the passes differ (by {difference:.1e} in UnitMem), so their times say nothing")


if __name__ == "__main__":
    main()
