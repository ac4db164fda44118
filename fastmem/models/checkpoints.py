"""Models from checkpoint files of torch and safetensors, each bare or inside a trainer's larger file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmem.errors import InputFileError, UsageError
from fastmem.models.model import Model
from fastmem.models.registry import ModelEntry, OfficialFile, entries, find_entry
from fastmem.models.tokenizer import Tokenizer
from fastmem.models.weight_files import WeightFile, read_one_file, read_weight_file
from fastmem.models.wrapped import (
    Group,
    describe_content,
    find_groups,
    find_readings,
    nearest,
    without_prefixes,
)
from fastmem.runs.ranks import local_rank

# the two networks of a model, in the order of ``build_networks``, and the options that take their files
ROLES = {"generator": "--checkpoint", "tokenizer": "--tokenizer"}
NAMES_SHOWN, KEYS_SHOWN = 3, 5
# no class count is taken from an entry with more rows
MOST_ROWS = 2**31
# names that tell networks of other tools: what they are, and the option that takes them
STRANGERS = {
    "Mixed_7c.branch_pool.conv.weight": ("the Inception network of FID", "--inception"),
    "backbone.layer4.2.conv3.weight": ("a ResNet-50 such as SSCD", "--sscd"),
}
# how the parts of a checkpoint in parts are named
PART = re.compile(r"-\d+-of-\d+\.")


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a checkpoint file that holds one, with tensors that are memory-mapped where the format allows.

    Raises:
        InputFileError: the file is missing, damaged, or holds something other than tensors.
        UsageError: it holds several state dicts.
    """
    file = WeightFile(Path(path), None, read_one_file(Path(path)))
    groups = _groups(file)
    if len(groups) > 1:
        keys = ", ".join(group.key for group in groups[:KEYS_SHOWN])
        raise UsageError(
            f"expected one set of weights in {path}, got {len(groups)} ({keys}): save the one to take in a file of "
            "its own"
        )
    return _checked(without_prefixes(groups[0]), file.path)


def read_weights(
    entry: ModelEntry, role: str, path: Path, usual: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Entries of a checkpoint that fit a network of a model, wherever in the file they stand.

    Args:
        entry: the model.
        role: the network, "generator" or "tokenizer".
        path: a file, an index of a checkpoint in parts, a folder that holds one of these, or FILE#KEY.
        usual: the shapes of the network's entries with the registry's number of classes, None to work them out.

    Raises:
        InputFileError: the file is missing, damaged, or holds something other than tensors.
        UsageError: its entries fit no such network, and it names the one that they fit, if any; or several differing
            sets of them fit.
    """
    file = read_weight_file(path)
    groups = _groups(file)
    fitting = _fitting(groups, file.key, entry, role, usual)
    if not fitting:
        raise _misfit(file, groups, entry, role)
    others = [group for group in fitting[1:] if not group.equals(fitting[0])]
    if others:
        several = [fitting[0], *others]
        raise UsageError(
            f"expected one {role} of {entry.name} in {file.path}, got {len(several)} that differ: choose with "
            f"{ROLES[role]} {_choices(file, several)}"
        )
    return _checked(fitting[0], file.path)


def _groups(file: WeightFile) -> list[Group]:
    """Return the groups of tensors in a file, those under its key where it has one."""
    groups = find_groups(file.content)
    if not groups:
        raise InputFileError(
            f"expected a state dict of tensors in {file.path}, got {describe_content(file.content)}: is it a "
            "checkpoint?"
        )
    if file.key is None:
        return groups
    chosen = [part for group in groups if (part := group.narrowed(file.key)).entries]
    if not chosen:
        raise UsageError(
            f"expected a key of {file.path} after #, got {file.key!r}: name one of them with {_choices(file, groups)}"
        )
    return chosen


def _choices(file: WeightFile, groups: list[Group]) -> str:
    keys = list(dict.fromkeys(group.key for group in groups))
    more = ", ..." if len(keys) > KEYS_SHOWN else ""
    return " or ".join(f"{file.path}#{key}" for key in keys[:KEYS_SHOWN]) + more


def _checked(group: Group, path: Path) -> dict[str, Tensor]:
    for name, value in group.entries.items():
        _check_stored(name, value, path)
    return dict(group.entries)


def _check_stored(name: str, value: Tensor, path: Path) -> None:
    """Refuse an entry whose shape is far larger than its numbers, which repeat. Raises: InputFileError."""
    whole = value.layout is torch.strided and value.device.type == "cpu"
    if whole and value.nbytes > max(2**30, value.untyped_storage().nbytes()):
        raise InputFileError(
            f"expected {name} with all of its numbers in {path}, got {list(value.shape)} of "
            f"{value.untyped_storage().nbytes()} bytes: save it with .contiguous()"
        )


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
    usable = {n: s for n, s in (shapes or {}).items() if s and 0 not in s and s[0] < MOST_ROWS}
    return build(entry.generator, entry.tokenizer, usable)


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


def _expected(
    entry: ModelEntry, role: str, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's entries; ``shapes`` are those of its checkpoint, as for `build_networks`."""
    with torch.device("meta"):
        networks = build_networks(entry, shapes)
    return shapes_of(networks[list(ROLES).index(role)].state_dict())


def _fitting(
    groups: list[Group],
    key: str | None,
    entry: ModelEntry,
    role: str,
    usual: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Group]:
    """Return the different sets of entries that fit a network in names and shapes; arguments as in `read_weights`."""
    usual = _expected(entry, role) if usual is None else usual
    found: dict[tuple[int, ...], Group] = {}
    for group in groups:
        for reading in find_readings(group, usual):
            shapes = shapes_of(reading.entries)
            # the number of classes is the checkpoint's own
            fits = shapes == usual or (role == "generator" and shapes == _expected(entry, role, shapes))
            if fits and reading.is_under(key):
                found.setdefault(tuple(map(id, reading.entries.values())), reading)
    return list(found.values())


def _misfit(file: WeightFile, groups: list[Group], entry: ModelEntry, role: str) -> UsageError:
    """Return the refusal of a file that does not hold a network; it says what is wrong, and which network it holds.

    Raises: InputFileError where an entry repeats its numbers.
    """
    usual = _expected(entry, role)
    near = shapes_of(_checked(nearest(groups, usual), file.path))
    mismatch = find_mismatch(_expected(entry, role, near), near) or "another order of entries"
    network, advice = _recognised(groups, entry, role)
    if not network and PART.search(file.path.name):
        network, advice = "one part of a checkpoint", "give its .index.json in place of the part"
    return UsageError(
        f"expected the entries of the {role} of {entry.name} in {file.path}, got {network or mismatch}: "
        f"{advice or 'give the file of this model'}"
    )


def _recognised(groups: list[Group], entry: ModelEntry, role: str) -> tuple[str, str]:
    """Return the network that a file holds in place of another one, and what to do; empty words where it is unknown."""
    ordered = [entry, *(other for other in entries().values() if other is not entry)]
    for other in ordered:
        for part in ROLES:
            if (other is entry and part == role) or not _fitting(groups, None, other, part):
                continue
            if other is entry:
                advice = f"give it with {ROLES[part]}, and the {role} with {ROLES[role]}"
            elif part == role == "generator":
                advice = f"use --model {other.name}, or give the {role} of {entry.name}"
            else:
                advice = f"give the {role} of {entry.name}, such as {_official(entry, role).name}"
            return f"the {part} of {other.name}", advice
    for name, (network, option) in STRANGERS.items():
        if any(name in group.entries for group in groups):
            return network, f"give it with {option}, and the {role} with {ROLES[role]}"
    return "", ""


def _official(entry: ModelEntry, role: str) -> OfficialFile:
    return entry.generator_file if role == "generator" else entry.tokenizer_file


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
        checkpoint: file of the generator, an index of one in parts, a folder that holds one of these, or FILE#KEY
            where several sets of weights in a file would fit; None takes the official one, which lies in the package,
            where ``fastmem fetch`` puts it under ``FASTMEM_HOME``, or in the cache of Hugging Face's hub.
        tokenizer: file of the tokenizer, likewise; None takes the official one.
        device: a torch device, or "auto" for the first GPU where there is one.
        dtype: floating type of the generator: float32, bfloat16 or float16. The tokenizer stays float32.

    Raises:
        UsageError: the name, device or dtype is unknown, a file is another model's, or several weights in it fit.
        InputFileError: a file is missing or damaged.
    """
    entry = find_entry(name)
    target, floating = resolve_device(device), resolve_dtype(dtype)
    paths = [_find_file(entry, checkpoint, entry.generator_file), _find_file(entry, tokenizer, entry.tokenizer_file)]
    # on the meta device the networks take no memory: the mapped tensors become the weights themselves
    with torch.device("meta"):
        networks = build_networks(entry)
    usual = [shapes_of(network.state_dict()) for network in networks]
    states = [read_weights(entry, *known) for known in zip(ROLES, paths, usual, strict=True)]
    if shapes_of(states[0]) != usual[0]:
        with torch.device("meta"):
            networks = build_networks(entry, shapes_of(states[0]))
    for network, state, path, kind in zip(networks, states, paths, (floating, torch.float32), strict=True):
        expected = network.state_dict()
        # what follows from the sizes is compared, where a family has such entries
        find_constants: Callable[[], dict[str, Tensor]] = getattr(network, "constants", dict)
        constants = find_constants()
        for key in state:
            state[key] = _converted(key, state[key], expected[key], constants.get(key), kind, path).to(target)
        network.load_state_dict(_apart(state), strict=True, assign=True)
        state.clear()
    family: type[Model] = import_module(entry.module).model_class
    model = family(*networks, entry.preset, entry.prefixes)
    model.name = entry.name
    model.checkpoint_file = None if checkpoint is None else Path(checkpoint).absolute()
    model.tokenizer_file = None if tokenizer is None else Path(tokenizer).absolute()
    return model


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return entries of which none shares memory with another or with itself: an edit of one must change no other."""
    found: dict[str, Tensor] = {}
    end = 0
    dense = {name: value.contiguous() for name, value in state.items()}
    for name in sorted(dense, key=lambda name: dense[name].data_ptr()):
        value = dense[name]
        found[name] = value.clone() if value.data_ptr() < end else value
        end = max(end, value.data_ptr() + value.nbytes)
    return found


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
