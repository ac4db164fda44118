"""Writing a model's generator as a checkpoint that its authors' code reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.files import write_atomically
from fastmem.models.model import Model

TORCH_SUFFIXES = (".bin", ".pth")


def check_checkpoint_path(path: Path) -> None:
    """Raises: UsageError where no checkpoint can be written: another suffix, or a file that is there already."""
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UsageError(
            f"expected a .safetensors, .bin or .pth file to write the checkpoint to, got {path}: rename it"
        )
    if path.exists():
        raise UsageError(f"expected a new file to write the checkpoint to, got {path}, which is there: choose another")


def save_checkpoint(model: Model, path: str | Path) -> None:
    """Write the generator's weights as they are now, under the official names, in the type they are held in.

    path: a new file; .safetensors, or .bin and .pth for a bare state dict that ``torch.load(weights_only=True)`` reads.

    Raises: UsageError for another suffix, a file that is there already, or a place that cannot be written.
    """
    path = Path(path)
    check_checkpoint_path(path)
    state = {name: _own_memory(tensor) for name, tensor in model.generator.state_dict().items()}
    write = save_file if path.suffix == ".safetensors" else torch.save
    try:
        write_atomically(path, lambda partial: write(state, partial))
    except (RuntimeError, SafetensorError) as error:
        # neither writer raises an OSError where the disk is full
        raise UsageError(
            f"expected room for {sum(t.nbytes for t in state.values()) / 1e6:,.0f} MB at {path}, got a failed write "
            f"({' '.join(str(error).split())[:100]}): make room or choose another place"
        ) from error


def _own_memory(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # a view of something larger would be written with all of it
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
