"""Search for the nearest vectors by faiss on the CPU, by faiss on a GPU, or by torch's matrix product on a GPU.

Each search only proposes rows; `EmbeddingIndex` computes their exact cosines afterwards.
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

# faiss returns at most this many rows per query on a GPU
GPU_WIDTH = 2048
# vectors that torch compares with the queries at a time
BLOCK = 131_072
# GPU memory, in bytes, that a search needs besides the vectors; faiss alone reserves 1.5 GiB
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
    """A search for the nearest rows; ``name`` says what runs it, and ``max_width`` is the most rows per query."""

    name: str
    max_width: int

    def __call__(self, queries: np.ndarray, width: int) -> np.ndarray:
        """Return the ``width`` rows of largest inner product with each query, int64 [q,width]; -1 where none was found.

        Queries are float32 [q,512].
        """


class FaissNearest:
    """A search by faiss, on the CPU or the GPU that holds ``index``, with up to ``max_width`` rows per query."""

    def __init__(self, index: Any, name: str, max_width: int) -> None:
        self._index, self.name, self.max_width = index, name, max_width

    def __call__(self, queries: np.ndarray, width: int) -> np.ndarray:
        return self._index.search(queries, width)[1]


class TorchNearest:
    """A search by torch on any device, with a matrix product in float32 over blocks of the vectors."""

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
    """Return the fastest search for an index that works on ``device``.

    ``note`` is given a sentence where the device is a GPU that faiss cannot use.
    """
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
    """Return why faiss cannot search on this machine's GPU, or None where a small test search there is correct."""
    count = getattr(faiss, "get_num_gpus", lambda: 0)()
    if not count:
        return f"faiss {faiss.__version__} finds no GPU"
    # faiss ends the whole process if it holds no code for this GPU, so the test runs in a process of its own
    done = subprocess.run([sys.executable, "-c", _SELF_TEST], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"faiss {faiss.__version__} fails its own search there (status {done.returncode})"
    return None


@cache
def _resources() -> Any:
    # cached, because an index on the GPU needs these resources but does not keep them alive
    return faiss.StandardGpuResources()
