"""Finds and updates the places in a live model that store the size of a vocabulary: module attributes and configs.

``graph/config.py`` knows which keys of a config are vocabulary sizes. ``modules.py`` resizes the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph.config import SIZE_KEYS, as_mapping, find_size_keys, token_kind_of

ROWS = ("num_embeddings", "num_", "out_features", "nf")
"""Attributes of modules with the number of rows of their weight. ``num_`` is I-BERT's."""

SIZES_KEY = "sizes.json"
"""Key in `Grow.saved` of an undo: the sizes before growing."""


@dataclass(frozen=True)
class SizeField:
    """A module attribute or config key that stores the size of a vocabulary.

    Attributes:
        module: Path of the module.
        keys: Path from the module to the value: an attribute, or ("config", ..., key).
        value: The size it has.
    """

    module: str
    keys: tuple[str, ...]
    value: int

    def read(self, model: nn.Module) -> Any:
        """Return its current value; None if it no longer exists."""
        owner = self._owner(model)
        return _get(owner, self.keys[-1]) if owner is not None else None

    def write(self, model: nn.Module, value: int) -> None:
        """Set its value."""
        owner = self._owner(model)
        if isinstance(owner, MutableMapping):
            owner[self.keys[-1]] = value
        else:
            setattr(owner, self.keys[-1], value)

    def _owner(self, model: nn.Module) -> Any:
        """Return the module or config that has the value."""
        try:
            owner: Any = model.get_submodule(self.module)
        except AttributeError:
            return None
        for key in self.keys[:-1]:
            owner = _get(owner, key)
        return owner


def _get(owner: object, key: str) -> Any:
    return owner.get(key) if isinstance(owner, Mapping) else getattr(owner, key, None)


@dataclass(frozen=True)
class VocabularyModule:
    """A module with a table or vector of the vocabulary.

    Attributes:
        path: Path of the module.
        module: The module.
        transposed: Whether its table is stored as (D, V), one column per token.
    """

    path: str
    module: nn.Module
    transposed: bool


def find_size_fields(
    model: nn.Module,
    owners: Collection[VocabularyModule],
    names: Collection[str],
    sizes: Collection[int],
    others: Collection[str],
) -> list[SizeField]:
    """Find every place that stores the size of a vocabulary. A config that modules share is listed once.

    Args:
        model: The model.
        owners: The modules with the vocabulary's tables and vectors.
        names: Names of its tables, including aliases.
        sizes: Numbers of rows of its tables.
        others: Paths of modules with other vocabularies of the same size.
    """
    found: dict[tuple[int, str], SizeField] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    config = next((vars(m)["config"] for m in modules.values() if vars(m).get("config") is not None), None)
    side = token_kind_of(names, as_mapping(config))
    for owner in owners:
        for key, value in _row_attributes(owner, sizes):
            found.setdefault((id(owner.module), key), SizeField(owner.path, (key,), value))
    for path in dict.fromkeys(p for owner in owners for p in _enclosing_paths(owner.path)):
        module = modules[path]
        # A translation model with two vocabularies of one size (FSMT): a bare ``vocab_size`` of a module around both
        # could be that of either, so there only the config is read, whose keys name the side.
        if not (side and any(_is_inside(other, path) for other in others)):
            for key, value in vars(module).items():
                if type(value) is int and value in sizes and SIZE_KEYS.fullmatch(key):
                    found.setdefault((id(module), key), SizeField(path, (key,), value))
        _add_config_fields(found, path, module, names, sizes)
    return list(found.values())


def _add_config_fields(
    found: dict[tuple[int, str], SizeField],
    path: str,
    module: nn.Module,
    names: Collection[str],
    sizes: Collection[int],
) -> None:
    """Add the sizes in a module's config, and in the configs inside it."""
    config = vars(module).get("config")
    if config is None:
        return
    for keys in find_size_keys(as_mapping(config), names, sizes):
        owner = config
        for key in keys[:-1]:
            owner = _get(owner, key)
        found.setdefault((id(owner), keys[-1]), SizeField(path, ("config", *keys), _get(owner, keys[-1])))


def _row_attributes(owner: VocabularyModule, sizes: Collection[int]) -> Iterator[tuple[str, int]]:
    """Yield (attribute, value) of a module's attributes with its number of rows."""
    linear = isinstance(owner.module, nn.Linear)
    keys = ("in_features",) if linear and owner.transposed else ROWS
    for key in keys:
        value = vars(owner.module).get(key)
        if type(value) is int and value in sizes:
            yield key, value


def _enclosing_paths(path: str) -> Iterator[str]:
    """Yield the paths of all modules around a module and its own path, the outermost first."""
    yield ""
    parts = path.split(".") if path else []
    for number in range(len(parts)):
        yield ".".join(parts[: number + 1])


def _is_inside(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}.")


_KNOWN_ATTRIBUTES = (*ROWS, "in_features", "nx", "embedding_dim", "padding_idx")


def refuse_unknown_modules(
    model: nn.Module,
    owners: Iterable[VocabularyModule],
    objects: Collection[int],
    rows: Collection[int],
    columns: Collection[int],
) -> None:
    """Refuse modules that store or split the vocabulary in a way that growing would miss.

    Args:
        model: The model.
        owners: The modules with the vocabulary's tables and vectors.
        objects: ``id`` of each tensor that will be replaced.
        rows: Numbers of rows of the vocabulary's tables.
        columns: Widths of its tables.

    Raises:
        UnsupportedError: It names the module and attribute.
    """
    for path, module in model.named_modules():
        fields = vars(module)
        if isinstance(fields.get("cutoffs"), (list, tuple)) and fields["cutoffs"]:
            _refuse(path, "cutoffs", "an adaptive softmax, which splits the vocabulary")
        for key, value in fields.items():
            if key not in ("_parameters", "_buffers") and any(id(tensor) in objects for tensor in _tensors_in(value)):
                _refuse(path, key, "another reference to the table, which would keep the old tensor")
    for owner in owners:
        for key, value in vars(owner.module).items():
            if key in ("num_additional_embeddings", "out_additional_features") and value:
                _refuse(owner.path, key, f"{value} additional rows behind the vocabulary's")
            # A width that happens to equal the number of rows is not refused.
            may_be_size = type(value) is int and value in rows and value not in columns
            if may_be_size and key not in _KNOWN_ATTRIBUTES and not SIZE_KEYS.fullmatch(key):
                _refuse(owner.path, key, f"{key} = {value}, which may be a number of tokens")


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in an attribute that is a tensor, a list, a tuple or a dict."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return (item for item in items if isinstance(item, torch.Tensor))


def _refuse(path: str, key: str, found: str) -> None:
    raise UnsupportedError(
        "this vocabulary cannot grow, because a module depends on its size",
        where=f"{path}.{key}" if path else key,
        found=found,
        hint="use spare or reserved rows instead",
    )


def write_sizes(model: nn.Module, values: Iterable[tuple[SizeField, int]]) -> None:
    """Set sizes. If one cannot be set, those before it are restored.

    Raises:
        UnsupportedError: A config is read-only.
    """
    done: list[SizeField] = []
    try:
        for size, value in values:
            done.append(size)
            size.write(model, value)
    except BaseException as error:
        failed = done.pop()
        for size in done:
            size.write(model, size.value)
        if not isinstance(error, Exception):
            raise
        where = ".".join(part for part in (failed.module, *failed.keys) if part)
        raise UnsupportedError("cannot set the size of the vocabulary", where=where, found=str(error)) from error


def encode_sizes(sizes: Iterable[SizeField]) -> bytes:
    """Serialise sizes, for the undo of a `Grow`."""
    return json.dumps([[size.module, list(size.keys), size.value] for size in sizes]).encode()


def decode_sizes(data: bytes) -> list[SizeField]:
    """Read what `encode_sizes` wrote.

    Raises:
        ValueError, TypeError or KeyError: The data is something else.
    """
    return [SizeField(str(module), tuple(map(str, keys)), int(value)) for module, keys, value in json.loads(data)]
