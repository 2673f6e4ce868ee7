"""Modules to graph: finds every embedding table of an ``nn.Module``, its aliases by memory, and its sites.

Reads no values and changes nothing. What a checkpoint's names say is ``names.py``'s; what a site does in a forward
is the runtime's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from embedsurgery.graph.classify import Classify, UnknownModule
from embedsurgery.graph.tables import EmbeddingGraph, Kind, Role, Site, Table
from embedsurgery.graph.vocabularies import COLUMNS, Vector, ends, group, may_be_vector
from embedsurgery.graph.wrappers import base_layer, base_of, beside_base_layer
from embedsurgery.tensors.convert import dtype_string
from embedsurgery.tensors.memory import Memory, memory_of, refuse_overlaps


@dataclass
class _Found:
    """A table while it is being found: which names and modules reach its memory."""

    memory: Memory  # of the (V, D) view
    dtype: str
    names: list[str] = field(default_factory=list)
    transposed: set[str] = field(default_factory=set)
    sites: list[Site] = field(default_factory=list)
    kind: Kind = "unknown"
    index: int = 0


def walk_module(model: nn.Module, classify: Classify | None = None) -> EmbeddingGraph:
    """Every table of a module tree.

    Lookups are ``nn.Embedding`` and its subclasses wherever they stand, and whatever ``get_input_embeddings()``
    returns that holds a 2-D weight. Projections are what ``get_output_embeddings()`` returns, modules that share a
    lookup's memory, and, where the model does not say, linear layers with as many output rows as a lookup has.

    Args:
        model: What to walk.
        classify: Asked of each module of a class that is none of torch's, with a 2-D parameter that has no use yet.

    Raises:
        OverlapError: A parameter shares memory with a part of a table.
    """
    modules = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if not is_private(m)]
    beside = tuple(f"{name}.{child}." for name, m in modules for child in beside_base_layer(m))
    if beside:
        modules = [(name, m) for name, m in modules if not f"{name}.".startswith(beside)]
    inputs, outputs = _declared(modules)
    found: dict[Memory, _Found] = {}
    lookups = [(name, m) for name, m in modules if _is_lookup(m) or id(m) in inputs]
    for name, module in lookups:
        table = _table_at(found, module.weight, transposed=False)
        _add_site(table, name, module, "input", transposed=False)
        if id(module) in inputs or id(module) in outputs or _is_sibling(name, module, modules, inputs):
            table.kind = "vocabulary"
    classified = _add_classified(modules, found, inputs, classify) if classify is not None else set()
    headless = not any(id(m) in outputs and not _is_lookup(m) for _, m in modules)
    for name, module in modules:
        transposed = _orientation(module, found)
        if transposed is None or _is_lookup(module) or id(module) in inputs or id(module) in classified:
            continue
        memory = _view(module.weight, transposed)
        shared = memory in found
        guessed = not shared and id(module) not in outputs
        if guessed and (not _looks_like_head(module, transposed, found) or _goes_on(name, module, modules)):
            continue
        known = headless and any(t.kind == "vocabulary" for t in found.values())
        table = _table_at(found, module.weight, transposed=transposed)
        _add_site(table, name, module, "output", transposed=transposed)
        if shared or known or id(module) in outputs:
            table.kind = "vocabulary"
    for name, module in modules:
        if ends(name, COLUMNS) and _has_columns(module, found):
            _add_site(_table_at(found, module.weight, transposed=True), name, module, "output", transposed=True)
    _add_names(model, found)
    return _graph(model, modules, found, inputs)


def _add_classified(
    modules: list[tuple[str, nn.Module]], found: dict[Memory, _Found], inputs: dict[int, int], classify: Classify
) -> set[int]:
    """Add the tables of modules that only a classifier knows; returns their ids.

    One that the model itself calls its input embedding is among ``inputs`` then.
    """
    declared = {id(getter) for _, m in modules if (getter := _ask(m, "get_input_embeddings")) is not None}
    classified = set()
    for name, module in modules:
        parameters = {key: value for key, value in module._parameters.items() if value is not None}
        if type(module).__module__.partition(".")[0] == "torch" or id(module) in inputs or _is_lookup(module):
            continue
        if not any(value.dim() == 2 for value in parameters.values()):
            continue
        shapes = tuple((key, tuple(value.shape)) for key, value in parameters.items())
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        answer = classify(UnknownModule(name, kind, shapes, module))
        if answer is None:
            continue
        classified.add(id(module))
        table = _table_at(found, parameters[answer.parameter], transposed=answer.transposed)
        _add_site(table, name, module, answer.role, transposed=answer.transposed)
        table.sites[-1] = replace(table.sites[-1], parameter=answer.parameter, scale=answer.scale)
        if answer.kind == "vocabulary":
            table.kind = "vocabulary"
        if answer.role == "input" and id(module) in declared:
            inputs.setdefault(id(module), len(inputs))
    return classified


def is_private(module: nn.Module) -> bool:
    """Whether a module is embedsurgery's own: what it holds is no part of the base."""
    return getattr(type(module), "embedsurgery_private", False)


def _declared(modules: list[tuple[str, nn.Module]]) -> tuple[dict[int, int], set[int]]:
    """Ids of the modules that get_input_embeddings (with their order) and get_output_embeddings return."""
    inputs: dict[int, int] = {}
    outputs: set[int] = set()
    for _, module in modules:
        lookup = _inner_lookup(_ask(module, "get_input_embeddings"))
        if lookup is not None and (_is_lookup(lookup) or _is_other_lookup(lookup)):
            inputs.setdefault(id(lookup), len(inputs))
        head = _ask(module, "get_output_embeddings")
        if head is not None and _weight(head) is not None:
            outputs.add(id(head))
    return inputs, outputs


def _inner_lookup(module: nn.Module | None) -> nn.Module | None:
    """The lookup inside a wrapper that holds nothing else; else the module itself."""
    if module is None or _weight(module) is not None:
        return module
    inside = list(module.children())
    return inside[0] if len(inside) == 1 and _is_lookup(inside[0]) else module


def _is_sibling(name: str, module: nn.Module, modules: list[tuple[str, nn.Module]], inputs: dict[int, int]) -> bool:
    """Whether a lookup stands beside a declared input and is of its own special class: Gemma3n's per-layer table."""
    if type(module) is nn.Embedding:
        return False
    parent = name.rpartition(".")[0]
    return any(
        id(other) in inputs and type(other) is type(module) and path.rpartition(".")[0] == parent
        for path, other in modules
    )


def _ask(module: nn.Module, method: str) -> nn.Module | None:
    getter = getattr(module, method, None)
    if getter is None:
        return None
    try:
        answer = getter()
    except (NotImplementedError, AttributeError, TypeError, IndexError, KeyError):
        return None  # the method is inherited by every transformers model, and some cannot answer it
    return base_layer(answer) if isinstance(answer, nn.Module) else None


def _weight(module: nn.Module) -> torch.Tensor | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 else None


def _is_lookup(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and _weight(module) is not None


def _is_other_lookup(module: nn.Module) -> bool:
    """A lookup that is no nn.Embedding, such as I-BERT's QuantEmbedding: it takes ids, so it has no in_features."""
    return _weight(module) is not None and not isinstance(module, nn.Linear) and not hasattr(module, "in_features")


def _orientation(module: nn.Module, found: dict[Memory, _Found]) -> bool | None:
    """Whether a module's weight is stored (D, V) as a projection, None where it cannot be one."""
    weight = _weight(module)
    if weight is None:
        return None
    if isinstance(module, nn.Linear):
        # a Linear from V to something that shares W.T is rare, and its memory tells
        return _view(weight, False) not in found and _view(weight, True) in found
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__name__.endswith("Norm"):
        return None
    if _view(weight, False) in found:
        return False
    if _view(weight, True) in found:
        return True
    return type(module).__name__ == "Conv1D"


def _looks_like_head(module: nn.Module, transposed: bool, found: dict[Memory, _Found]) -> bool:
    """In a model that does not say: as many output rows as a vocabulary (or, knowing none, a lookup) has rows.

    A square weight proves nothing, nor does a module that is not known to be a plain projection.
    """
    if not _is_plain(module):
        return False
    weight = _weight(module)
    assert weight is not None
    rows, columns = _view(weight, transposed).shape
    known = [t for t in found.values() if t.kind == "vocabulary"] or list(found.values())
    return rows != columns and any(
        t.memory.shape[0] == rows and any(site.role == "input" for site in t.sites) for t in known
    )


def _goes_on(name: str, module: nn.Module, modules: list[tuple[str, nn.Module]]) -> bool:
    """Whether what a module puts out are hidden states, though there be as many as tokens: the inner half of an MLP.

    Then another projection takes them up in the same numbered part (``layers.3``), which nothing does with logits.
    """
    parents = name.split(".")[:-1]
    while parents and not parents[-1].isdecimal():
        parents.pop()
    part = ".".join((*parents, ""))
    width = _widths(module)[1]
    return bool(parents) and any(
        other.startswith(part) and _is_plain(m) and _widths(m)[0] == width != _widths(m)[1] for other, m in modules
    )


def _is_plain(module: nn.Module) -> bool:
    return _weight(module) is not None and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")


def _widths(module: nn.Module) -> tuple[int, int]:
    """Of a plain projection: how many features it takes, and how many it gives."""
    weight = _weight(module)
    assert weight is not None
    given, taken = weight.shape if isinstance(module, nn.Linear) else weight.t().shape
    return taken, given


def _has_columns(module: nn.Module, found: dict[Memory, _Found]) -> bool:
    """Whether a module's weight is (D, V) for a V that a vocabulary has."""
    weight = _weight(module)
    known = {t.memory.shape[0] for t in found.values() if t.kind == "vocabulary"}
    return weight is not None and weight.shape[1] in known and weight.shape[0] not in known


def _view(weight: torch.Tensor, transposed: bool) -> Memory:
    memory = memory_of(weight)
    return (memory.transposed() if transposed else memory).normalised()


def _table_at(found: dict[Memory, _Found], weight: torch.Tensor, *, transposed: bool) -> _Found:
    memory = _view(weight, transposed)
    if memory not in found:
        found[memory] = _Found(memory, dtype_string(weight), index=len(found))
    return found[memory]


def _add_site(table: _Found, name: str, module: nn.Module, role: Role, *, transposed: bool) -> None:
    dot = f"{name}." if name else ""
    bias = getattr(module, "bias", None) if role == "output" else None
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None)) if role == "input" else None
    if isinstance(scale, torch.Tensor):
        scale = None if scale.device.type == "meta" or scale.numel() != 1 else float(scale)
    table.sites.append(
        Site(
            module=name,
            role=role,
            scale=float(scale) if isinstance(scale, (int, float)) else None,
            bias=f"{dot}bias" if bias is not None else None,
            padding_idx=getattr(module, "padding_idx", None) if role == "input" else None,
            transposed=transposed,
        )
    )


def _parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        if is_private(module):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def _add_names(model: nn.Module, found: dict[Memory, _Found]) -> None:
    """Give each table every parameter name over its memory; refuse a parameter over a part of it."""
    others: dict[str, Memory] = {}
    for name, parameter in _parameters(model):
        memory = memory_of(parameter).normalised()
        plain, turned = found.get(memory), None
        if parameter.dim() == 2:
            turned = found.get(memory.transposed().normalised())
        table = plain or turned
        if table is None:
            others[name] = memory
        elif name not in table.names:
            table.names.append(name)
            if plain is None:
                table.transposed.add(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        memory = memory_of(buffer).normalised()
        if memory not in found:
            others.setdefault(name, memory)
    refuse_overlaps({table.names[0]: table.memory for table in found.values()}, others)


def _graph(
    model: nn.Module,
    modules: list[tuple[str, nn.Module]],
    found: dict[Memory, _Found],
    inputs: dict[int, int],
) -> EmbeddingGraph:
    by_path = dict(modules)
    order = {id(t): _rank(t, by_path, inputs) for t in found.values()}
    ordered = sorted(found.values(), key=lambda t: order[id(t)])
    tables = tuple(_freeze(t, by_path, inputs) for t in ordered)
    main = _inner_lookup(_ask(model, "get_input_embeddings"))
    vocabulary = [t for t in tables if t.kind == "vocabulary" and "input" in t.roles]
    main_name = vocabulary[0].name if len(vocabulary) == 1 and inputs else None
    if main is not None and id(main) in inputs:
        main_name = next(t.name for t in tables for s in t.sites if s.role == "input" and by_path[s.module] is main)
    tables = tuple(sorted(tables, key=lambda t: t.name != main_name))
    vocabularies = group(tables, _vectors(model), config_of(model))
    return EmbeddingGraph(tables, vocabularies, main_name, type(model).__name__)


def _rank(table: _Found, by_path: dict[str, nn.Module], inputs: dict[int, int]) -> tuple[int, int, int]:
    declared = [inputs[id(by_path[s.module])] for s in table.sites if id(by_path[s.module]) in inputs]
    return (table.kind != "vocabulary", min(declared, default=len(inputs)), table.index)


def _freeze(table: _Found, by_path: dict[str, nn.Module], inputs: dict[int, int]) -> Table:
    """The frozen table, named after a declared input embedding where it has one, else after its first lookup."""

    def rank(name: str) -> tuple[bool, bool, bool]:
        path = name.rpartition(".")[0]
        module = by_path[path]
        return (id(module) not in inputs, not _is_lookup(module), name in table.transposed)

    names = sorted(table.names, key=rank)
    rows, columns = table.memory.shape
    sites = tuple(sorted(table.sites, key=lambda s: s.role != "input"))
    return Table(
        names[0], (rows, columns), table.dtype, tuple(names[1:]), sites, table.kind, frozenset(table.transposed)
    )


def config_of(model: nn.Module) -> Any:
    """The config of the outermost module that has one, None where none has."""
    return next((vars(m)["config"] for m in base_of(model).modules() if vars(m).get("config") is not None), None)


def _vectors(model: nn.Module) -> Iterator[Vector]:
    """What may be a per-token vector, each memory once."""
    seen: set[Memory] = set()
    named: list[tuple[str, torch.Tensor]] = [*_parameters(model), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        memory = memory_of(tensor).normalised()
        if memory not in seen and may_be_vector(name, tuple(tensor.shape), dtype_string(tensor)):
            seen.add(memory)
            yield Vector(name, tensor.shape[-1])
