"""Models from checkpoint files: .bin and .pth of torch, and safetensors, each bare or inside a trainer's larger file.

Checkpoints are untrusted files, so only tensors are read from them and nothing in them is ever run.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastmem.errors import InputFileError, UsageError
from fastmem.models.model import Model
from fastmem.models.registry import ModelEntry, OfficialFile, entries, find_entry
from fastmem.models.tokenizer import Tokenizer
from fastmem.runs.ranks import local_rank

# keys under which trainers keep the state dict inside a larger file, outermost first
WRAPPERS = ("trainer", "var_wo_ddp", "module", "state_dict", "model")
# what data-parallel training and torch.compile put before every name, in any order
PREFIXES = ("module.", "_orig_mod.")
NAMES_SHOWN = 3
# how torch's refusal of a pickle names what is in the way
REFUSED_CLASS = re.compile(r"GLOBAL ([\w.]+)")
# an archive that would unpack to more than this many times its size, and more than 1 GiB, is not read
MOST_UNPACKED = 64


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a checkpoint file, with tensors that are memory-mapped where the format allows.

    Raises:
        InputFileError: the file is missing, damaged, or holds something other than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputFileError(f"expected a checkpoint at {path}, got no such file: check the path")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    # on a damaged file these libraries raise exceptions of many kinds
    except Exception as error:
        refused = isinstance(error, pickle.UnpicklingError)
        named = REFUSED_CLASS.search(str(error)) if refused else None
        if named:
            raise InputFileError(
                f"expected plain tensors in {path}, got {named[1]}, which is not loaded because it could run code: "
                "save the weights alone, with torch.save(model.state_dict(), FILE)"
            ) from error
        # torch's own text would advise to load the file unsafely
        detail = "not plain tensors" if refused else " ".join(str(error).split())[:160]
        raise InputFileError(
            f"expected a whole .bin, .pth or .safetensors checkpoint of plain tensors in {path}, got one that cannot "
            f"be read ({type(error).__name__}: {detail}): fetch it again"
        ) from error
    state = unwrap(content, path)
    for name, value in state.items():
        _check_stored(name, value, path)
    return state


def _torch_load(path: Path) -> object:
    # files from before torch 1.6 are no zip archives and cannot be mapped
    if not zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_members(archive, path.stat().st_size)
    # torch maps a tensor from where its member begins, whatever the member's length and compression
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    needed: Counter[int] = Counter()

    def place(storage: Any, location: str) -> Any:
        needed[storage.nbytes()] += 1
        return storage

    content = torch.load(path, map_location=place, weights_only=True, mmap=stored)
    if needed - Counter(member.file_size for member in members):
        raise ValueError("a tensor is larger than its data")
    return content


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Check the checksums of an archive's members, where it has them; torch itself checks none.

    Raises: ValueError where so little data of ``size`` bytes would unpack to so much; zipfile.BadZipFile where a
    member's checksum is wrong.
    """
    members = archive.infolist()
    if sum(member.file_size for member in members) > max(MOST_UNPACKED * size, 2**30):
        raise ValueError(f"it would unpack to more than {MOST_UNPACKED} times its size")
    for member in members:
        # torch may be told to write no checksums, and then writes 0
        if member.CRC:
            with archive.open(member) as file:
                while file.read(2**20):
                    pass


def _check_stored(name: str, value: Tensor, path: Path) -> None:
    """Refuse an entry whose shape is far larger than its numbers, which repeat. Raises: InputFileError."""
    whole = value.layout is torch.strided and value.device.type == "cpu"
    if whole and value.nbytes > max(2**30, value.untyped_storage().nbytes()):
        raise InputFileError(
            f"expected {name} with all of its numbers in {path}, got {list(value.shape)} of "
            f"{value.untyped_storage().nbytes()} bytes: save it with .contiguous()"
        )


def unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint file's ``content``, without wrapper keys and a data-parallel prefix.

    Raises:
        InputFileError: there is none; the message names the file ``path``.
    """
    seen: set[int] = set()
    # a wrapper may hold itself
    while isinstance(content, Mapping) and id(content) not in seen:
        seen.add(id(content))
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputFileError(
            f"expected a state dict of tensors in {path}, bare or under {', '.join(WRAPPERS)}, got something else: "
            "is it a checkpoint?"
        )
    if not all(isinstance(name, str) for name in content):
        raise InputFileError(f"expected names of entries that are text in {path}, got others: is it a checkpoint?")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in content)), None):
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    return dict(content)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of a state dict."""
    return {name: tuple(value.shape) for name, value in state.items()}


def build_networks(
    entry: ModelEntry, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[nn.Module, Tokenizer]:
    """Generator and tokenizer of a registry row, with initial weights.

    ``shapes`` are the shapes in the generator's checkpoint, from which the number of classes is taken, or None to take
    it from the row.
    """
    build: Callable[..., tuple[nn.Module, Tokenizer]] = import_module(entry.module).build
    # no size can be taken from an entry without dimensions or numbers
    return build(entry.generator, entry.tokenizer, {n: s for n, s in (shapes or {}).items() if s and 0 not in s})


def find_mismatch(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is missing, unexpected or misshaped in ``got``, in words; None where everything fits."""
    missing = [n for n in expected if n not in got]
    unexpected = [n for n in got if n not in expected]
    misshaped = [
        f"{n} {list(got[n])} instead of {list(expected[n])}" for n in expected if n in got and got[n] != expected[n]
    ]
    parts = [
        f"{len(names)} {kind} ({_some(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if names
    ]
    return ", ".join(parts) or None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, ..."


def check_state(entry: ModelEntry, network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a state dict that does not fit a network.

    Args:
        entry: the registry row that the network belongs to.
        network: the generator or the tokenizer.
        state: the state dict.
        path: the file that it was read from.

    Raises:
        UsageError: entries are missing, unexpected or misshaped; it names the model that they would fit, if any.
    """
    mismatch = find_mismatch(shapes_of(network.state_dict()), shapes_of(state))
    if mismatch is None:
        return
    fitting = next(iter(_fitting_models(state, but=entry)), None)
    advice = f"it fits {fitting}, so use --model {fitting}" if fitting else "give the file of this model"
    raise UsageError(f"expected the entries of {entry.name} in {path}, got {mismatch}: {advice}")


def _fitting_models(state: Mapping[str, Tensor], but: ModelEntry) -> Iterable[str]:
    shapes = shapes_of(state)
    for other in entries().values():
        if other is but:
            continue
        with torch.device("meta"):
            networks = build_networks(other, shapes)
        if any(find_mismatch(shapes_of(n.state_dict()), shapes) is None for n in networks):
            yield other.name


def resolve_device(name: str | torch.device) -> torch.device:
    """A torch device by name; "auto" is the first GPU, or the CPU where there is none.

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        # each rank of a job takes the GPU of its number on the machine
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"expected a device such as auto, cpu, cuda or cuda:1, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"expected one of this machine's {torch.cuda.device_count()} CUDA devices, got {name}: use --device cpu"
        )
    return device


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """A floating dtype by name.

    Raises:
        UsageError: the name is not that of float32, bfloat16 or float16.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in known:
        raise UsageError(f"expected a dtype out of {', '.join(known)}, got {name!r}")
    return known[name]


def load_model(
    name: str,
    checkpoint: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
) -> Model:
    """A model of the registry with its weights.

    Args:
        name: the model's name, one of ``model_names()``.
        checkpoint: file of the generator; None takes the official one, which lies in the package or where
            ``fastmem fetch`` puts it under ``FASTMEM_HOME``.
        tokenizer: file of the tokenizer; None takes the official one.
        device: a torch device, or "auto" for the first GPU where there is one.
        dtype: floating type of the generator: float32, bfloat16 or float16. The tokenizer stays float32.

    Raises:
        UsageError: the name, device or dtype is unknown, or a file is another model's.
        InputFileError: a file is missing or damaged.
    """
    entry = find_entry(name)
    target, floating = resolve_device(device), resolve_dtype(dtype)
    paths = [_find_file(entry, checkpoint, entry.generator_file), _find_file(entry, tokenizer, entry.tokenizer_file)]
    states = [read_state(path) for path in paths]
    # on the meta device the networks take no memory: the mapped tensors become the weights themselves
    with torch.device("meta"):
        networks = build_networks(entry, shapes_of(states[0]))
    for network, state, path, kind in zip(networks, states, paths, (floating, torch.float32), strict=True):
        check_state(entry, network, state, path)
        expected = network.state_dict()
        # what follows from the sizes is compared, where a family has such entries
        find_constants: Callable[[], dict[str, Tensor]] = getattr(network, "constants", dict)
        constants = find_constants()
        for key in state:
            state[key] = _converted(key, state[key], expected[key], constants.get(key), kind, path).to(target)
        network.load_state_dict(state, strict=True, assign=True)
        state.clear()
    family: type[Model] = import_module(entry.module).model_class
    model = family(*networks, entry.preset, entry.prefixes)
    model.name = entry.name
    model.checkpoint_file = None if checkpoint is None else Path(checkpoint).absolute()
    model.tokenizer_file = None if tokenizer is None else Path(tokenizer).absolute()
    return model


def _converted(
    name: str, value: Tensor, expected: Tensor, constant: Tensor | None, kind: torch.dtype, path: Path
) -> Tensor:
    """Return an entry in the type it is used in.

    Args:
        name: of the entry.
        value: the entry, as it was read.
        expected: the network's own, on the meta device.
        constant: what the entry has to be, where it follows from the network's sizes; else None.
        kind: the floating type of the network.
        path: the file, named in messages.

    Raises: InputFileError for an entry of another kind of number, with NaN or infinity, or other than ``constant``;
    UsageError where the conversion makes it infinite.
    """
    plain = value.layout is torch.strided and not value.is_quantized and value.device.type != "meta"
    # numbers of 8 bits have a scale beside them, which nothing here would take
    plain = plain and not (value.is_floating_point() and value.element_size() == 1)
    if not plain or value.is_floating_point() != expected.is_floating_point() or value.is_complex():
        wanted = "floating-point" if expected.is_floating_point() else "whole"
        raise InputFileError(
            f"expected {name} as plain {wanted} numbers in {path}, got {value.dtype} on {value.device.type}, "
            f"{value.layout}: save it as a dense tensor of {expected.dtype}"
        )
    if constant is not None and not torch.equal(value, constant.to(value.dtype)):
        raise InputFileError(
            f"expected {name} as it follows from the network's sizes in {path}, got other numbers: are the weights "
            "whole?"
        )
    if constant is not None or not value.is_floating_point():
        return value.to(kind) if value.is_floating_point() else value
    if not _is_finite(value):
        raise InputFileError(
            f"expected finite numbers in {path}, got NaN or infinity in {name}: are the weights whole?"
        )
    converted = value.to(kind)
    if converted.dtype != value.dtype and not _is_finite(converted):
        raise UsageError(
            f"expected weights that {str(kind).removeprefix('torch.')} can hold, got larger ones in {name} of {path}: "
            f"{'use --dtype float32 or bfloat16' if kind == torch.float16 else 'are these the right weights?'}"
        )
    return converted


def _is_finite(value: Tensor) -> bool:
    # one pass and no copy: the smallest and the largest of numbers with a NaN among them are NaN
    return not value.numel() or bool(torch.stack(torch.aminmax(value)).isfinite().all())


def _find_file(entry: ModelEntry, given: str | Path | None, official: OfficialFile) -> Path:
    if given is not None:
        return Path(given)
    if not os.path.isfile(official.path):
        raise InputFileError(
            f"expected {official.name} of {entry.name} at {official.path}, got no such file: run `fastmem fetch "
            f"--model {entry.name}`, or put the file there, or name it with --checkpoint or --tokenizer"
        )
    return official.path


def assemble(generator: nn.Module, tokenizer: nn.Module) -> Model:
    """The model object from two networks of any size.

    Raises:
        UsageError: the networks belong to no family, or do not fit each other.
    """
    for module in dict.fromkeys(entry.module for entry in entries().values()):
        family: type[Model] = import_module(module).model_class
        if isinstance(generator, family.generator_class) and isinstance(tokenizer, family.tokenizer_class):
            return family(generator, tokenizer, family.plain_preset)
    raise UsageError(
        f"expected a generator and a tokenizer of one known family, got {type(generator).__name__} and "
        f"{type(tokenizer).__name__}"
    )
