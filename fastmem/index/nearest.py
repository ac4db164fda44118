"""Where the nearest vectors are looked for: faiss on the CPU, faiss on a GPU, or torch's matrix product on that GPU.

Every place only proposes rows; the cosines that count are computed from the proposed vectors afterwards.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import faiss
import numpy as np
import torch

from fastmem.index.embedding import DIMENSIONS
from fastmem.index.faiss_index import is_exact, vectors_at

# faiss's own limit on a GPU
GPU_WIDTH = 2048
BLOCK = 131_072
# beside the vectors, a search on a GPU needs room for scores; faiss takes 1.5 GiB at once
ROOM = 2 * 2**30

_SELF_TEST = """
import faiss, numpy as np
vectors = np.random.default_rng(0).standard_normal((3000, 512), dtype=np.float32)
index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), 512)
index.add(vectors)
found = index.search(vectors[:7], 3)[1]
expected = np.argsort(-(vectors[:7] @ vectors.T), axis=1)[:, :3]
raise SystemExit(0 if (found == expected).all() else 1)
"""


class Nearest(Protocol):
    """Proposes rows; ``name`` says where it runs, ``max_width`` how many rows it can give."""

    name: str
    max_width: int

    def __call__(self, queries: np.ndarray, width: int) -> np.ndarray:
        """Rows of largest inner product, float32 [q,512] -> int64 [q,width], -1 where none was found."""


class FaissNearest:
    """A search by faiss in an index on the CPU or on a GPU."""

    def __init__(self, index: Any, name: str, max_width: int) -> None:
        self._index, self.name, self.max_width = index, name, max_width

    def __call__(self, queries: np.ndarray, width: int) -> np.ndarray:
        return self._index.search(queries, width)[1]


class TorchNearest:
    """A matrix product and top-k in blocks by torch, float32, on any device."""

    def __init__(self, index: Any, device: torch.device) -> None:
        self.name, self.max_width = f"torch-{device.type}", index.ntotal
        self._vectors = torch.empty((index.ntotal, DIMENSIONS), device=device)
        for start in range(0, index.ntotal, BLOCK):
            rows = np.arange(start, min(start + BLOCK, index.ntotal))
            self._vectors[start : start + len(rows)] = torch.from_numpy(vectors_at(index, rows))

    def __call__(self, queries: np.ndarray, width: int) -> np.ndarray:
        asked = torch.from_numpy(queries).to(self._vectors.device)
        best = torch.empty((len(asked), 0), device=asked.device)
        rows = torch.empty((len(asked), 0), dtype=torch.int64, device=asked.device)
        for start in range(0, len(self._vectors), BLOCK):
            scores = asked @ self._vectors[start : start + BLOCK].T
            found, where = scores.topk(min(width, scores.shape[1]))
            best, rows = torch.cat([best, found], 1), torch.cat([rows, where + start], 1)
            best, kept = best.topk(min(width, best.shape[1]))
            rows = rows.gather(1, kept)
        return rows.cpu().numpy()


def choose_nearest(index: Any, device: torch.device, note: Callable[[str], None]) -> Nearest:
    """The fastest place that works on ``device``; ``note`` is told where it is a GPU and something else runs."""
    on_cpu = FaissNearest(index, "faiss-cpu", index.ntotal)
    if device.type != "cuda" or not is_exact(index):
        return on_cpu
    free, needed = torch.cuda.mem_get_info(device)[0], index.ntotal * DIMENSIONS * 4 + ROOM
    if needed > free:
        note(f"searching on the CPU: the vectors need {needed:,} bytes on {device}, which has {free:,} free")
        return on_cpu
    reason = gpu_problem()
    if reason is None:
        moved = faiss.index_cpu_to_gpu(_resources(), device.index or 0, index)
        return FaissNearest(moved, "faiss-gpu", GPU_WIDTH)
    note(f"searching with torch's matrix product on {device}: {reason}")
    return TorchNearest(index, device)


@cache
def gpu_problem() -> str | None:
    """Why faiss cannot search on a GPU here, or None where a small search there gives what numpy gives."""
    count = getattr(faiss, "get_num_gpus", lambda: 0)()
    if not count:
        return f"faiss {faiss.__version__} finds no GPU"
    # in a process of its own, because faiss ends the process where its wheel carries no code for the GPU
    done = subprocess.run([sys.executable, "-c", _SELF_TEST], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"faiss {faiss.__version__} fails its own search there (status {done.returncode})"
    return None


@cache
def _resources() -> Any:
    # kept for the process: an index on the GPU does not keep them alive itself
    return faiss.StandardGpuResources()
