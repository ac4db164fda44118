"""Write a model's generator, with its edits, as a checkpoint that the code of the model's authors can load."""

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
    """Check that a checkpoint can be written to ``path``.

    Raises: UsageError where the suffix is not .safetensors, .bin or .pth, or the file exists already.
    """
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UsageError(
            f"expected a .safetensors, .bin or .pth file to write the checkpoint to, got {path}: rename it"
        )
    if path.exists():
        raise UsageError(f"expected a new file to write the checkpoint to, got {path}, which is there: choose another")


def save_checkpoint(model: Model, path: str | Path) -> None:
    """Write the generator's weights, with all edits in force, under their official names and in their present type.

    ``path`` is a new file. The suffix .safetensors makes a safetensors file; .bin and .pth make a plain state dict that
    ``torch.load(weights_only=True)`` can read.

    Raises: UsageError where the suffix is another one, the file exists already, or the folder cannot be written.
    """
    path = Path(path)
    check_checkpoint_path(path)
    state = {name: _own_memory(tensor) for name, tensor in model.generator.state_dict().items()}
    write = save_file if path.suffix == ".safetensors" else torch.save
    try:
        write_atomically(path, lambda partial: write(state, partial))
    except (RuntimeError, SafetensorError) as error:
        # on a full disk the two libraries raise these errors instead of an OSError
        raise UsageError(
            f"expected room for {sum(t.nbytes for t in state.values()) / 1e6:,.0f} MB at {path}, got a failed write "
            f"({' '.join(str(error).split())[:100]}): make room or choose another place"
        ) from error


def _own_memory(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # torch would write a view together with the whole tensor that it is a part of
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
