"""Builds the graph of an ``nn.Module``: finds its embedding tables, their aliases by memory, and their sites.

Reads no values and changes nothing. ``from_names.py`` builds the graph of a checkpoint. ``runtime/`` has what happens
at a site in a forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from embedsurgery.graph.classify import Classify, UnknownModule
from embedsurgery.graph.tables import EmbeddingGraph, Kind, Role, Site, Table
from embedsurgery.graph.vocabularies import COLUMNS, Vector, ends, group_tables, may_be_vector
from embedsurgery.graph.wrappers import added_children_of, base_layer, base_of
from embedsurgery.tensors.convert import dtype_string
from embedsurgery.tensors.memory import Memory, memory_of, refuse_overlaps


@dataclass
class _TableDraft:
    """A table under construction: the names and modules that share its memory."""

    memory: Memory  # of the table as (V, D), also if it is stored transposed
    dtype: str
    names: list[str] = field(default_factory=list)
    transposed: set[str] = field(default_factory=set)
    sites: list[Site] = field(default_factory=list)
    kind: Kind = "unknown"
    index: int = 0


def walk_module(model: nn.Module, classify: Classify | None = None) -> EmbeddingGraph:
    """Find every table of a module tree.

    Lookups are instances of ``nn.Embedding``, and what ``get_input_embeddings()`` returns if it holds a 2-D weight.
    Projections are what ``get_output_embeddings()`` returns, modules that share a lookup's memory, and linear layers
    with as many output rows as a lookup has. The last are of unknown kind if the model declares another head.

    Args:
        model: The model.
        classify: Called for modules that are not torch's and have a 2-D parameter of unknown use.

    Raises:
        OverlapError: A parameter shares memory with a part of a table.
    """
    # A module under two names has two sites, and one of them may be the only one that is called.
    modules = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if not is_private(m)]
    added = tuple(f"{name}.{child}." for name, m in modules for child in added_children_of(m))
    if added:  # such as ``lora_A``, which is not the base's
        modules = [(name, m) for name, m in modules if not f"{name}.".startswith(added)]
    inputs, outputs = _find_declared(modules)
    drafts: dict[Memory, _TableDraft] = {}
    lookups = [(name, m) for name, m in modules if _is_lookup(m) or id(m) in inputs]
    for name, module in lookups:
        table = _draft_at(drafts, module.weight, transposed=False)
        _add_site(table, name, module, "input", transposed=False)
        if id(module) in inputs or id(module) in outputs or _is_sibling(name, module, modules, inputs):
            table.kind = "vocabulary"
    classified = _add_classified(modules, drafts, inputs, classify) if classify is not None else set()
    # If the model declares a head, another projection to V features is something else until it shares a table's memory.
    headless = not any(id(m) in outputs and not _is_lookup(m) for _, m in modules)
    for name, module in modules:
        transposed = _is_transposed(module, drafts)
        if transposed is None or _is_lookup(module) or id(module) in inputs or id(module) in classified:
            continue
        memory = _memory_of_table(module.weight, transposed)
        shared = memory in drafts
        guessed = not shared and id(module) not in outputs
        if guessed and (
            not _looks_like_head(module, transposed, drafts) or _feeds_another_layer(name, module, modules)
        ):
            continue
        known = headless and any(t.kind == "vocabulary" for t in drafts.values())
        table = _draft_at(drafts, module.weight, transposed=transposed)
        _add_site(table, name, module, "output", transposed=transposed)
        if shared or known or id(module) in outputs:
            table.kind = "vocabulary"
    for name, module in modules:
        if ends(name, COLUMNS) and _holds_columns(module, drafts):
            _add_site(_draft_at(drafts, module.weight, transposed=True), name, module, "output", transposed=True)
    _add_names(model, drafts)
    return _build_graph(model, modules, drafts, inputs)


def _add_classified(
    modules: list[tuple[str, nn.Module]], drafts: dict[Memory, _TableDraft], inputs: dict[int, int], classify: Classify
) -> set[int]:
    """Add the tables of modules that only the classifier knows, and return the modules' ids.

    A module that the model declares as its input embeddings is added to ``inputs``.
    """
    declared = {id(getter) for _, m in modules if (getter := _call_accessor(m, "get_input_embeddings")) is not None}
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
        table = _draft_at(drafts, parameters[answer.parameter], transposed=answer.transposed)
        _add_site(table, name, module, answer.role, transposed=answer.transposed)
        table.sites[-1] = replace(table.sites[-1], parameter=answer.parameter, scale=answer.scale)
        if answer.kind == "vocabulary":
            table.kind = "vocabulary"
        if answer.role == "input" and id(module) in declared:
            inputs.setdefault(id(module), len(inputs))
    return classified


def is_private(module: nn.Module) -> bool:
    """Whether a module is embedsurgery's, so that its parameters are not the base's."""
    return getattr(type(module), "embedsurgery_private", False)


def _find_declared(modules: list[tuple[str, nn.Module]]) -> tuple[dict[int, int], set[int]]:
    """Return the ids of the modules that get_input_embeddings (id -> order) and get_output_embeddings return."""
    inputs: dict[int, int] = {}
    outputs: set[int] = set()
    for _, module in modules:
        lookup = _unwrap_lookup(_call_accessor(module, "get_input_embeddings"))
        if lookup is not None and (_is_lookup(lookup) or _is_other_lookup(lookup)):
            inputs.setdefault(id(lookup), len(inputs))
        head = _call_accessor(module, "get_output_embeddings")
        if head is not None and _matrix_of(head) is not None:
            outputs.add(id(head))
    return inputs, outputs


def _unwrap_lookup(module: nn.Module | None) -> nn.Module | None:
    """Return the lookup inside a wrapper without other children, or the module itself."""
    if module is None or _matrix_of(module) is not None:
        return module
    inside = list(module.children())
    return inside[0] if len(inside) == 1 and _is_lookup(inside[0]) else module


def _is_sibling(name: str, module: nn.Module, modules: list[tuple[str, nn.Module]], inputs: dict[int, int]) -> bool:
    """Whether a lookup is a sibling of a declared input, of the same special class: Gemma 3n's per-layer table."""
    if type(module) is nn.Embedding:
        return False
    parent = name.rpartition(".")[0]
    return any(
        id(other) in inputs and type(other) is type(module) and path.rpartition(".")[0] == parent
        for path, other in modules
    )


def _call_accessor(module: nn.Module, method: str) -> nn.Module | None:
    getter = getattr(module, method, None)
    if getter is None:
        return None
    try:
        answer = getter()
    except (NotImplementedError, AttributeError, TypeError, IndexError, KeyError):
        return None  # every transformers model inherits the method, and in some it fails
    return base_layer(answer) if isinstance(answer, nn.Module) else None


def _matrix_of(module: nn.Module) -> torch.Tensor | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 else None


def _is_lookup(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and _matrix_of(module) is not None


def _is_other_lookup(module: nn.Module) -> bool:
    """Whether a declared input that is not an nn.Embedding is a lookup. I-BERT's QuantEmbedding has no in_features."""
    return _matrix_of(module) is not None and not isinstance(module, nn.Linear) and not hasattr(module, "in_features")


def _is_transposed(module: nn.Module, drafts: dict[Memory, _TableDraft]) -> bool | None:
    """Whether a projection's weight is stored (D, V), None for a module that cannot be a projection."""
    weight = _matrix_of(module)
    if weight is None:
        return None
    if isinstance(module, nn.Linear):
        # A Linear is stored (V, D). It is transposed only if it shares W.T, which its memory shows.
        return _memory_of_table(weight, False) not in drafts and _memory_of_table(weight, True) in drafts
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__name__.endswith("Norm"):
        return None
    if _memory_of_table(weight, False) in drafts:
        return False
    if _memory_of_table(weight, True) in drafts:
        return True
    return type(module).__name__ == "Conv1D"


def _looks_like_head(module: nn.Module, transposed: bool, drafts: dict[Memory, _TableDraft]) -> bool:
    """Whether a module that the model does not declare as its head has as many output rows as a vocabulary has.

    If there is no vocabulary, any lookup counts. A square weight is never a head: its orientation is unknown.
    """
    if not _is_plain_projection(module):
        return False
    weight = _matrix_of(module)
    assert weight is not None
    rows, columns = _memory_of_table(weight, transposed).shape
    known = [t for t in drafts.values() if t.kind == "vocabulary"] or list(drafts.values())
    return rows != columns and any(
        t.memory.shape[0] == rows and any(site.role == "input" for site in t.sites) for t in known
    )


def _feeds_another_layer(name: str, module: nn.Module, modules: list[tuple[str, nn.Module]]) -> bool:
    """Whether another layer consumes a projection's outputs: then they are hidden states, by chance as many as tokens.

    The inner half of an MLP was once taken for a head, in models without a head whose intermediate size equals V. What
    tells them apart is that another projection of the same numbered block (``layers.3``) takes as many features as
    this one gives. Nothing consumes logits.
    """
    parents = name.split(".")[:-1]
    while parents and not parents[-1].isdecimal():
        parents.pop()
    block = ".".join((*parents, ""))
    width = _features_of(module)[1]
    inside = [_features_of(m) for path, m in modules if path.startswith(block) and _is_plain_projection(m)]
    return bool(parents) and any(inputs == width != outputs for inputs, outputs in inside)


def _is_plain_projection(module: nn.Module) -> bool:
    return _matrix_of(module) is not None and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")


def _features_of(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output features of a plain projection."""
    weight = _matrix_of(module)
    assert weight is not None
    outputs, inputs = weight.shape if isinstance(module, nn.Linear) else weight.t().shape
    return inputs, outputs


def _holds_columns(module: nn.Module, drafts: dict[Memory, _TableDraft]) -> bool:
    """Whether a module's weight is (D, V) for the V of a vocabulary."""
    weight = _matrix_of(module)
    known = {t.memory.shape[0] for t in drafts.values() if t.kind == "vocabulary"}
    return weight is not None and weight.shape[1] in known and weight.shape[0] not in known


def _memory_of_table(weight: torch.Tensor, transposed: bool) -> Memory:
    memory = memory_of(weight)
    return (memory.transpose() if transposed else memory).normalize()


def _draft_at(drafts: dict[Memory, _TableDraft], weight: torch.Tensor, *, transposed: bool) -> _TableDraft:
    memory = _memory_of_table(weight, transposed)
    if memory not in drafts:
        drafts[memory] = _TableDraft(memory, dtype_string(weight), index=len(drafts))
    return drafts[memory]


def _add_site(table: _TableDraft, name: str, module: nn.Module, role: Role, *, transposed: bool) -> None:
    dot = f"{name}." if name else ""
    bias = getattr(module, "bias", None) if role == "output" else None
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None)) if role == "input" else None
    if isinstance(scale, torch.Tensor):  # a buffer, without a value on the meta device
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


def _iterate_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        if is_private(module):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def _add_names(model: nn.Module, drafts: dict[Memory, _TableDraft]) -> None:
    """Add every parameter name over a table's memory to the table, and refuse a parameter over a part of it."""
    others: dict[str, Memory] = {}
    for name, parameter in _iterate_parameters(model):
        memory = memory_of(parameter).normalize()
        plain, transposed = drafts.get(memory), None
        if parameter.dim() == 2:
            transposed = drafts.get(memory.transpose().normalize())
        table = plain or transposed
        if table is None:
            others[name] = memory
        elif name not in table.names:
            table.names.append(name)
            if plain is None:
                table.transposed.add(name)
    # A buffer over the whole of a table is not one of its names, but one over a part of it overlaps.
    for name, buffer in model.named_buffers(remove_duplicate=False):
        memory = memory_of(buffer).normalize()
        if memory not in drafts:
            others.setdefault(name, memory)
    refuse_overlaps({table.names[0]: table.memory for table in drafts.values()}, others)


def _build_graph(
    model: nn.Module,
    modules: list[tuple[str, nn.Module]],
    drafts: dict[Memory, _TableDraft],
    inputs: dict[int, int],
) -> EmbeddingGraph:
    by_path = dict(modules)
    order = {id(t): _rank_draft(t, by_path, inputs) for t in drafts.values()}
    ordered = sorted(drafts.values(), key=lambda t: order[id(t)])
    tables = tuple(_freeze_draft(t, by_path, inputs) for t in ordered)
    main = _unwrap_lookup(_call_accessor(model, "get_input_embeddings"))
    vocabulary = [t for t in tables if t.kind == "vocabulary" and "input" in t.roles]
    # The outermost module decides. If it declares no input, a nested one's counts if there is only one vocabulary.
    main_name = vocabulary[0].name if len(vocabulary) == 1 and inputs else None
    if main is not None and id(main) in inputs:
        main_name = next(t.name for t in tables for s in t.sites if s.role == "input" and by_path[s.module] is main)
    tables = tuple(sorted(tables, key=lambda t: t.name != main_name))
    vocabularies = group_tables(tables, _iterate_vectors(model), config_of(model))
    return EmbeddingGraph(tables, vocabularies, main_name, type(model).__name__)


def _rank_draft(table: _TableDraft, by_path: dict[str, nn.Module], inputs: dict[int, int]) -> tuple[int, int, int]:
    declared = [inputs[id(by_path[s.module])] for s in table.sites if id(by_path[s.module]) in inputs]
    return (table.kind != "vocabulary", min(declared, default=len(inputs)), table.index)


def _freeze_draft(table: _TableDraft, by_path: dict[str, nn.Module], inputs: dict[int, int]) -> Table:
    """Return the table, named after a declared input embedding, else after its first lookup."""

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
    """Return the config of the outermost module that has one, None without one."""
    return next((vars(m)["config"] for m in base_of(model).modules() if vars(m).get("config") is not None), None)


def _iterate_vectors(model: nn.Module) -> Iterator[Vector]:
    """Iterate the candidates for per-token vectors, each memory once."""
    seen: set[Memory] = set()
    named: list[tuple[str, torch.Tensor]] = [*_iterate_parameters(model), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        memory = memory_of(tensor).normalize()
        if memory not in seen and may_be_vector(name, tuple(tensor.shape), dtype_string(tensor)):
            seen.add(memory)
            yield Vector(name, tensor.shape[-1])
