"""Deterministic weights and inputs for the parity cases in this folder.

Every tensor is a pure function of its state-dict name and shape, so a case needs no
weight file: build the model, take its state dict's names and shapes, and fill it with
`tensor(name, shape)`.  The expected outputs in `*.npz` were computed with the models'
original authors' code, filled the same way.

Run `python recipe.py` to print a few values and check your numpy reproduces them.
"""

from __future__ import annotations

import zlib

import numpy as np


def _rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights for the state-dict entry `name` of shape `shape`.

    * two or more dimensions: N(0, 1) / sqrt(fan_in), fan_in = product of shape[1:]
      (parameters whose leading dimension is 1, such as position tables: N(0, 0.1^2));
    * one dimension, name ending in 'weight' (norm gains): 1 + 0.1 * N(0, 1);
    * anything else (biases, scalars): 0.1 * N(0, 1).
    """
    z = _rng(name).standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2:
        if shape[0] == 1:
            return (0.1 * z).astype(np.float32)
        return (z / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    if name.endswith("weight"):
        return (1.0 + 0.1 * z).astype(np.float32)
    return (0.1 * z).astype(np.float32)


def images(case: str, n: int, size: int) -> np.ndarray:
    """uint8 images [n, size, size, 3]: smooth random colour fields plus noise."""
    rng = _rng("images/" + case)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        a = rng.uniform(-6, 6, size=(3, 4)).astype(np.float32)
        wave = np.stack([np.sin(a[c, 0] * x + a[c, 1] * y + a[c, 2]) for c in range(3)], -1)
        noise = rng.normal(0, 0.15, size=(size, size, 3)).astype(np.float32)
        out[i] = np.clip((0.5 + 0.4 * wave + noise) * 255, 0, 255).astype(np.uint8)
    return out


def fill(state: dict, skip: tuple[str, ...] = ()) -> dict:
    """A new state dict: every floating entry of `state` (name -> torch.Tensor) is filled by
    `tensor`; integer entries and names containing a word of `skip` are kept as they are."""
    import torch

    out = {}
    for name, value in state.items():
        if not value.is_floating_point() or any(s in name for s in skip):
            out[name] = value
        else:
            out[name] = torch.from_numpy(tensor(name, tuple(value.shape))).to(value.dtype)
    return out


if __name__ == "__main__":
    print(
        "blocks.0.mlp.fc1.weight[:2,:2] of shape (8, 4) =", tensor("blocks.0.mlp.fc1.weight", (8, 4))[:2, :2].tolist()
    )
    print("images('demo', 1, 8)[0,0,:2] =", images("demo", 1, 8)[0, 0, :2].tolist())
