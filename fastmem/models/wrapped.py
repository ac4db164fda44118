"""Finding a network's entries in the content of a checkpoint, under whatever keys and prefixes they stand."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# parts of names that wrappers of a module leave behind: parallel training, torch.compile, sharding, checkpointing
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# what an optimizer keeps has the names and shapes of weights, and is none
NO_WEIGHTS = frozenset({"optimizer", "optim", "opt", "exp_avg", "exp_avg_sq", "momentum_buffer", "grad", "grads"})
# the key of entries that stand under no other
OUTERMOST = "."
KEYS_SHOWN = 6


@dataclass(frozen=True)
class Group:
    """Tensors by name that stand together in a checkpoint, under ``key``, as in "trainer.var_wo_ddp"."""

    key: str
    entries: dict[str, Tensor]

    def is_under(self, key: str | None) -> bool:
        """Whether the group stands under a key that a user chose; None chooses all."""
        return key is None or self.key == key or self.key.startswith(f"{key}.")

    def narrowed(self, key: str) -> Group:
        """The group with those entries alone that stand under ``key``, by their names or by the group's own key."""
        if self.is_under(key):
            return self
        within = key if self.key == OUTERMOST else key.removeprefix(f"{self.key}.")
        reached = self.key == OUTERMOST or within != key
        entries = {n: v for n, v in self.entries.items() if reached and n.startswith(f"{within}.")}
        return Group(self.key, entries)

    def equals(self, other: Group) -> bool:
        """Whether the entries are the same, to the last bit."""
        if self.entries.keys() != other.entries.keys():
            return False
        pairs = [(value, other.entries[name]) for name, value in self.entries.items()]
        return all(_are_equal(one, two) for one, two in pairs)


def _are_equal(one: Tensor, two: Tensor) -> bool:
    if one is two:
        return True
    alike = (one.shape, one.dtype, one.layout, one.device) == (two.shape, two.dtype, two.layout, two.device)
    plain = one.layout is torch.strided and one.device.type == "cpu" and not one.is_quantized
    return alike and plain and bool((one == two).all())


def find_groups(content: object) -> list[Group]:
    """Every mapping in a checkpoint's content that holds tensors by name, outermost first."""
    found: list[Group] = []
    waiting: deque[tuple[tuple[str, ...], object]] = deque([((), content)])
    # a mapping may hold itself
    seen: set[int] = set()
    while waiting:
        keys, inner = waiting.popleft()
        if not isinstance(inner, Mapping) or id(inner) in seen:
            continue
        seen.add(id(inner))
        named = {name: value for name, value in inner.items() if isinstance(name, str)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        # a nested tensor has no shape
        entries = {name: value.detach() for name, value in tensors.items() if not value.is_nested}
        if entries:
            found.append(Group(".".join(keys) or OUTERMOST, entries))
        waiting.extend(((*keys, name), value) for name, value in named.items() if name not in NO_WEIGHTS)
    return found


def find_readings(group: Group, names: Collection[str]) -> Iterator[Group]:
    """Ways to take a group's entries as those of a network with entries of these ``names``.

    They may stand under one prefix, such as "model.", or under several beside each other, and have parts of
    ``WRAPPERS`` in their names.
    """
    wanted, anchor = set(names), max(names, key=len, default="")
    if not wanted or len(group.entries) < len(wanted):
        return
    for entries in _renamed(group.entries):
        prefixes = [
            name.removesuffix(anchor)
            for name in entries
            if name.endswith(anchor) and (name == anchor or name.removesuffix(anchor).endswith("."))
        ]
        whole = [prefix for prefix in prefixes if all(prefix + name in entries for name in wanted)]
        taken = {prefix + name for prefix in whole for name in wanted}
        for prefix in whole:
            # what stands beside them under the same prefix belongs to them, or to another whole set
            if all(name in taken for name in entries if name.startswith(prefix)):
                key = group.key if not prefix else _join(group.key, prefix.removesuffix("."))
                yield Group(key, {name: entries[prefix + name] for name in names})


def _join(key: str, more: str) -> str:
    return more if key == OUTERMOST else f"{key}.{more}"


def _renamed(entries: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Yield entries as they are named, and where that differs without the names of wrappers."""
    yield entries
    plain: dict[str, Tensor] = {}
    for name, value in entries.items():
        if plain.setdefault(_without_wrappers(name), value) is not value:
            # two entries would have one name
            return
    if plain.keys() != entries.keys():
        yield plain


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def nearest(groups: list[Group], names: Collection[str]) -> Group:
    """The group that has most of a network's entries, without a prefix that all of its entries have."""
    readings = [
        Group(group.key, {name.removeprefix(prefix): value for name, value in entries.items()})
        for group in groups
        for entries in _renamed(group.entries)
        for prefix in {"", _common_prefix(entries)}
    ]
    wanted = set(names)
    return max(readings, key=lambda group: (len(wanted & group.entries.keys()), len(group.entries)))


def without_prefixes(group: Group) -> Group:
    """A group without the names of wrappers, where all of its entries have them in front."""
    entries = group.entries
    while (first := _common_prefix(entries).partition(".")[0]) in WRAPPERS:
        entries = {name.removeprefix(f"{first}."): value for name, value in entries.items()}
    return Group(group.key, entries)


def _common_prefix(entries: Collection[str]) -> str:
    prefix, dot, _ = os.path.commonprefix(list(entries)).rpartition(".")
    return prefix + dot


def describe_content(content: object) -> str:
    """What a checkpoint holds in place of weights, in words."""
    if not isinstance(content, Mapping):
        return f"one {type(content).__name__}"
    keys = [str(key)[:40] for key in content]
    more = ", ..." if len(keys) > KEYS_SHOWN else ""
    return f"entries without tensors ({', '.join(keys[:KEYS_SHOWN])}{more})" if keys else "nothing"
