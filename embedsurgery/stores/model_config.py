"""What counts the vocabulary in a live model: attributes of modules, and configs wherever they hang.

Which keys of a config count is ``config_sizes.py``'s.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph.config import SIZES, as_mapping, counting_keys, tokens_of

ROWS = ("num_embeddings", "num_", "out_features", "nf")
"""Attributes in which modules count the rows of their weight. ``num_`` is I-BERT's."""

SAVED = "sizes.json"
"""Key in the ``saved`` of a growth's undo: what was counted where."""


@dataclass(frozen=True)
class Count:
    """One place.

    Attributes:
        module: Path of a module.
        keys: From there: an attribute, or ("config", ..., key).
        value: What it says.
    """

    module: str
    keys: tuple[str, ...]
    value: int

    def read(self, model: nn.Module) -> Any:
        """What it says now; None where there is no such place any more."""
        holder = self._holder(model)
        return _item(holder, self.keys[-1]) if holder is not None else None

    def write(self, model: nn.Module, value: int) -> None:
        """Make it say something else."""
        holder = self._holder(model)
        if isinstance(holder, MutableMapping):
            holder[self.keys[-1]] = value
        else:
            setattr(holder, self.keys[-1], value)

    def _holder(self, model: nn.Module) -> Any:
        try:
            holder: Any = model.get_submodule(self.module)
        except AttributeError:
            return None
        for key in self.keys[:-1]:
            holder = _item(holder, key)
        return holder


def _item(holder: object, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)


@dataclass(frozen=True)
class Holder:
    """A module that holds a table or vector of the vocabulary.

    Attributes:
        path: Its path.
        module: Itself.
        transposed: It is a linear layer and holds a table as (D, V), one column a token.
    """

    path: str
    module: nn.Module
    transposed: bool


def counts(
    model: nn.Module, holders: Iterable[Holder], names: Collection[str], sizes: Collection[int], others: Collection[str]
) -> list[Count]:
    """Every place that counts a vocabulary, each object's once.

    Args:
        model: The model.
        holders: The modules that hold the vocabulary.
        names: Of its tables, aliases included.
        sizes: Numbers of rows of its tables.
        others: Paths of modules that hold other vocabularies with as many rows.

    Raises:
        UnsupportedError: A module counts tokens in a way that is not known.
    """
    found: dict[tuple[int, str], Count] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    config = next((vars(m)["config"] for m in modules.values() if vars(m).get("config") is not None), None)
    mine = tokens_of(names, as_mapping(config))
    holders = list(holders)
    for holder in holders:
        for key, value in _rows(holder, sizes):
            found.setdefault((id(holder.module), key), Count(holder.path, (key,), value))
    for path in dict.fromkeys(a for holder in holders for a in _above(holder.path)):
        module = modules[path]
        if mine and any(_is_inside(other, path) for other in others):
            _configs(found, path, module, names, sizes)
            continue
        for key, value in vars(module).items():
            if type(value) is int and value in sizes and SIZES.fullmatch(key):
                found.setdefault((id(module), key), Count(path, (key,), value))
        _configs(found, path, module, names, sizes)
    return list(found.values())


def _configs(
    found: dict[tuple[int, str], Count], path: str, module: nn.Module, names: Collection[str], sizes: Collection[int]
) -> None:
    """Add what a module's config counts, and the configs in it."""
    config = vars(module).get("config")
    if config is None:
        return
    for keys in counting_keys(as_mapping(config), names, sizes):
        holder = config
        for key in keys[:-1]:
            holder = _item(holder, key)
        found.setdefault((id(holder), keys[-1]), Count(path, ("config", *keys), _item(holder, keys[-1])))


def _rows(holder: Holder, sizes: Collection[int]) -> Iterator[tuple[str, int]]:
    """The attributes in which a module counts its rows."""
    linear = isinstance(holder.module, nn.Linear)
    keys = ("in_features",) if linear and holder.transposed else ROWS
    for key in keys:
        value = vars(holder.module).get(key)
        if type(value) is int and value in sizes:
            yield key, value


def _above(path: str) -> Iterator[str]:
    """A module path and those of all modules around it, the outermost first."""
    yield ""
    parts = path.split(".") if path else []
    for number in range(len(parts)):
        yield ".".join(parts[: number + 1])


def _is_inside(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}.")


_KNOWN = (*ROWS, "in_features", "nx", "embedding_dim", "padding_idx")


def refuse_unknown(
    model: nn.Module,
    holders: Iterable[Holder],
    objects: Collection[int],
    rows: Collection[int],
    columns: Collection[int],
) -> None:
    """Refuse what counts or splits the vocabulary in a way that growing would not reach.

    Args:
        model: The model.
        holders: The modules that hold the vocabulary.
        objects: Ids of the tensors that will be replaced.
        rows: Numbers of rows of its tables.
        columns: Their widths.

    Raises:
        UnsupportedError: It names the module and what was found.
    """
    for path, module in model.named_modules():
        fields = vars(module)
        if isinstance(fields.get("cutoffs"), (list, tuple)) and fields["cutoffs"]:
            _refuse(path, "cutoffs", "an adaptive softmax splits the vocabulary")
        for key, value in fields.items():
            parts = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            if key not in ("_parameters", "_buffers") and any(
                isinstance(p, torch.Tensor) and id(p) in objects for p in parts
            ):
                _refuse(path, key, "a second reference to the table, which would keep the old one")
    for holder in holders:
        for key, value in vars(holder.module).items():
            if key in ("num_additional_embeddings", "out_additional_features") and value:
                _refuse(holder.path, key, f"{value} rows for other tokens follow the vocabulary's")
            counted = type(value) is int and value in rows and value not in columns
            if counted and key not in _KNOWN and not SIZES.fullmatch(key):
                _refuse(holder.path, key, f"{key} = {value} may count tokens")


def _refuse(path: str, key: str, found: str) -> None:
    raise UnsupportedError(
        "this vocabulary cannot grow: a module keeps it in a way of its own",
        where=f"{path}.{key}" if path else key,
        found=found,
        hint="take spare or reserved rows instead",
    )


def write_all(model: nn.Module, values: Iterable[tuple[Count, int]]) -> None:
    """Set every place, or none where one cannot be set.

    Raises:
        UnsupportedError: A config that cannot be written to.
    """
    done: list[Count] = []
    try:
        for count, value in values:
            done.append(count)
            count.write(model, value)
    except BaseException as error:
        failed = done.pop()
        for count in done:
            count.write(model, count.value)
        if not isinstance(error, Exception):
            raise
        where = ".".join(part for part in (failed.module, *failed.keys) if part)
        raise UnsupportedError("what counts the vocabulary cannot be set", where=where, found=str(error)) from error


def to_bytes(counted: Iterable[Count]) -> bytes:
    """What was counted where, for the undo of a growth."""
    return json.dumps([[c.module, list(c.keys), c.value] for c in counted]).encode()


def from_bytes(data: bytes) -> list[Count]:
    """The inverse of `to_bytes`; what is none raises ValueError, TypeError or KeyError."""
    return [Count(str(module), tuple(map(str, keys)), int(value)) for module, keys, value in json.loads(data)]
