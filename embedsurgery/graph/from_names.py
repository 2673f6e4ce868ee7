"""Builds the graph of a checkpoint or a state dict from tensor names, shapes and the config.

A file has neither modules nor shared memory, so roles and ties come from names and from ``architectures.py``. A caller
that can compare two tensors passes ``equal``, and bytes decide what names leave open. Nothing here reads weights:
``stores/checkpoint.py`` opens the files. ``from_modules.py`` walks modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from embedsurgery.graph.architectures import ARCHITECTURES, Layout, is_language_model, layout_of, read_tie_flag
from embedsurgery.graph.config import vocabulary_sizes
from embedsurgery.graph.tables import EmbeddingGraph, Kind, Role, Site, Table
from embedsurgery.graph.vocabularies import (
    COLUMNS,
    HEADS,
    LOOKUPS,
    NOT_TOKENS,
    Vector,
    canonical_name,
    ends,
    group_tables,
    may_be_vector,
)
from embedsurgery.tensors.raw import EDITABLE

VAGUE_LOOKUPS = ("embeddings", "embedding", "word_embed", "embed", "emb", "w", "tok", "tokens", "vocab")
"""As `LOOKUPS`, but only tables with as many rows as the config or a head has are certain."""

VAGUE_HEADS = ("head", "head.decoder", "output", "decoder", "cls")
"""As `HEADS`, but only for weights with as many rows as a lookup or the config has."""

WRAPPERS = ("language_model", "text_model", "text_decoder", "decoder", "thinker", "llm")
"""First components of module paths under which a whole language model is nested, its head included."""

SECONDARY = frozenset({"decoder", "text_decoder", "talker", "patcher", "qformer", "protein_encoder"})
"""Components of module paths whose lookups are the main input only if the model has no other."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored.

    Attributes:
        name: Its key.
        dtype: safetensors' string.
        shape: As stored.
        group: The same for tensors over one memory. In files, each tensor has its own group.
        file: The name of its file, None in memory.
        transposed: Whether it is a transposed view of its group's memory: the shape of a square table does not tell.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str
    file: str | None = None
    transposed: bool = False


Equal = Callable[[str, str], bool]
Tensors = Mapping[str, Stored]


def walk_names(
    stored: Iterable[Stored],
    *,
    config: Mapping[str, Any] | None,
    source: str,
    equal: Equal | None = None,
    architectures: Mapping[str, Layout] = ARCHITECTURES,
) -> EmbeddingGraph:
    """Build the graph of a checkpoint or a state dict.

    Args:
        stored: All tensors.
        config: The checkpoint's ``config.json``, None without one.
        source: Path or name of the checkpoint, for messages.
        equal: Compares two tensors by name. If it is None, ties that the config claims are trusted.
        architectures: Layouts by ``model_type`` or class name.
    """
    tensors = {tensor.name: tensor for tensor in stored}
    layout = layout_of(config, architectures)
    flag = read_tie_flag(config)
    tables = _join_by_memory(_find_candidates(tensors, set(vocabulary_sizes(config))), tensors)
    # False forbids every tie, except in T5 1.1, which says so of its head alone: see `Layout.forced`. None, where the
    # flag is missing or a text section contradicts it, leaves the ties of heads to the bytes.
    if flag is not False or layout.forced:
        for target, origin in layout.ties.items():
            tables = _tie_by_layout(tables, target, origin, tensors, equal)
        tables = _tie_heads(tables, flag, equal)
        tables = _add_unstored_end(tables, tensors, layout, is_language_model(config))
    tables = [_add_biases(table, tensors) for table in tables]
    main = min((t for t in tables if _is_input(t)), key=_rank_input, default=None)
    tables.sort(key=lambda t: (t is not main, t.kind != "vocabulary"))
    vocabularies = group_tables(tables, _find_vectors(tensors, equal), config)
    return EmbeddingGraph(tuple(tables), vocabularies, main.name if main else None, source)


def _find_candidates(tensors: Tensors, sizes: set[int]) -> Iterator[Table]:
    """Find every lookup, and every projection to as many rows as one has. The kind is "unknown" if a name is vague."""
    weights = [t for t in tensors.values() if len(t.shape) == 2 and t.name.endswith(".weight")]
    heads = {t.name: t for t in weights if ends(_module_path(t.name), HEADS + VAGUE_HEADS)}
    lookups = {t.name: t for t in weights if _last_module(t.name) in LOOKUPS + VAGUE_LOOKUPS}
    lookups = {name: t for name, t in lookups.items() if not NOT_TOKENS.search(_module_path(name))}
    known_rows = sizes | {t.shape[0] for name, t in lookups.items() if _last_module(name) in LOOKUPS}
    head_rows = sizes | {t.shape[0] for name, t in heads.items() if ends(_module_path(name), HEADS)}
    lookup_rows = {t.shape[0] for t in lookups.values()}
    for tensor in weights:
        name, size, leaf = tensor.name, tensor.shape[0], _last_module(tensor.name)
        if name in lookups:
            yield _make_table(tensor, "input", certain=leaf in LOOKUPS or size in head_rows)
        elif name in heads and size in known_rows | lookup_rows:
            certain = size in known_rows or ends(_module_path(name), HEADS)
            yield _make_table(tensor, "output", certain=certain)
        # Any other lookup is listed as unknown, so that a user can name it. A quantised weight whose name has "emb" in
        # it, such as "embed_proj", is not a table.
        elif tensor.dtype in EDITABLE and _may_be_lookup(name):
            yield _make_table(tensor, "input", certain=False)
        elif ends(_module_path(name), COLUMNS) and tensor.shape[1] in known_rows and size not in known_rows:
            yield _transpose_table(_make_table(tensor, "output", certain=False))


def _module_path(name: str) -> str:
    return name.rpartition(".")[0]


def _last_module(name: str) -> str:
    return _module_path(name).rpartition(".")[2]


def _may_be_lookup(name: str) -> bool:
    """Whether a name is a lookup's of any kind, or that of a lookup in a list ("embed_tokens.0")."""
    leaf = re.sub(r"\.\d+$", "", _module_path(name)).rpartition(".")[2]
    return "emb" in leaf or NOT_TOKENS.search(leaf) is not None


def _make_table(tensor: Stored, role: Role, *, certain: bool) -> Table:
    rows, columns = tensor.shape
    files = ((tensor.name, tensor.file),) if tensor.file is not None else ()
    sites = (Site(_module_path(tensor.name), role),)
    kind: Kind = "vocabulary" if certain else "unknown"
    return Table(tensor.name, (rows, columns), tensor.dtype, (), sites, kind, files=files)


def _transpose_table(table: Table) -> Table:
    """Return the table of a tensor that is stored (D, V)."""
    sites = tuple(replace(site, transposed=True) for site in table.sites)
    return replace(table, shape=table.shape[::-1], sites=sites, transposed=frozenset({table.name}))


def _join_tables(first: Table, second: Table) -> Table:
    """Join two tables into one under the first's name. A table with both roles is a vocabulary."""
    known = "vocabulary" in (first.kind, second.kind) or len({*first.roles, *second.roles}) == 2
    return replace(
        first,
        aliases=(*first.aliases, *second.names),
        sites=(*first.sites, *second.sites),
        kind="vocabulary" if known else "unknown",
        files=(*first.files, *second.files),
        transposed=first.transposed | second.transposed,
    )


def _join_by_memory(candidates: Iterable[Table], tensors: Tensors) -> list[Table]:
    """Join tables over one memory, under a lookup's name. Other names over the memory become aliases."""
    by_group: dict[str, Table] = {}
    # Lookups first: ``from_modules.py`` names a table after its lookup too, and adapters find tables by name.
    for table in sorted(candidates, key=lambda t: ("input" not in t.roles, t.kind != "vocabulary")):
        by_group.setdefault(tensors[table.name].group, table)
    for tensor in tensors.values():
        owner = by_group.get(tensor.group)
        if owner is not None and tensor.name not in owner.names:
            transposed = tensor.shape != owner.shape or tensor.transposed != tensors[owner.name].transposed
            by_group[tensor.group] = _add_name(owner, tensor.name, transposed=transposed)
    return list(by_group.values())


def _add_name(table: Table, name: str, *, transposed: bool = False) -> Table:
    """Return the table with another name, whose role the name decides.

    Args:
        table: The table.
        name: Name of a parameter.
        transposed: Whether the parameter is stored (D, V).
    """
    module, _, parameter = name.rpartition(".")
    leaf = _last_module(name)
    lookup = "emb" in module or leaf in LOOKUPS + VAGUE_LOOKUPS or NOT_TOKENS.search(leaf)
    role: Role = "input" if lookup and not ends(module, HEADS + VAGUE_HEADS) else "output"
    site = Site(module, role, parameter, transposed=transposed)
    names = frozenset({name} if transposed else ())
    return _join_tables(table, Table(name, table.shape, table.dtype, (), (site,), transposed=names))


def _tie_by_layout(tables: list[Table], target: str, origin: str, tensors: Tensors, equal: Equal | None) -> list[Table]:
    """Join a layout's target to each table of its origin.

    A layout that ties "encoder.embed_tokens" to "shared" applies to each "shared" under the same prefix. If the target
    is stored, its table is joined. If only other tensors of its stack are, the file omits the tied copy, and the table
    gets the target's name.
    """
    done = list(tables)
    for table in tables:
        if not ends(_module_path(table.name), [origin]) or table not in done:
            continue
        prefix = _module_path(table.name).removesuffix(origin)
        name, stack = f"{prefix}{target}.weight", f"{prefix}{target.partition('.')[0]}."
        other = next((t for t in done if name in t.names), None)
        if other is None and any(n.startswith(stack) for n in tensors):
            done[done.index(table)] = _add_name(table, name)
        elif other is not None and other is not table and _are_tied(table, other, True, equal):
            done[done.index(table)] = _join_tables(table, other)
            done.remove(other)
    return done


def _are_tied(first: Table, second: Table, claimed: bool | None, equal: Equal | None) -> bool:
    """Whether two stored tables load as one: decided by their bytes, or without ``equal`` by what is claimed."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return equal(first.name, second.name) if equal is not None else claimed is True


def _tie_heads(tables: list[Table], flag: bool | None, equal: Equal | None) -> list[Table]:
    """Join each head to the lookup that it is tied to.

    Of several equal lookups, such as an encoder's and a decoder's, it is the one with the longest common path, then a
    decoder's.
    """
    done = [t for t in tables if not _is_head(t)]
    for head in filter(_is_head, tables):
        lookups = [t for t in done if "input" in t.roles and t.kind == head.kind]
        fits = [t for t in lookups if _are_tied(t, head, flag, equal)]
        if fits:
            shared = {t.name: _count_shared_parts(t.name, head.name) for t in fits}
            partner = min(fits, key=lambda t: (-shared[t.name], _rank_for_head(t)))
            done[done.index(partner)] = _join_tables(partner, head)
        else:
            done.append(head)
    return done


def _count_shared_parts(a: str, b: str) -> int:
    """Count the leading components that two paths have in common."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _add_unstored_end(tables: list[Table], tensors: Tensors, layout: Layout, language_model: bool) -> list[Table]:
    """Add the name of the end of a tied pair that is not stored to the table of the stored end.

    Usually the head is missing. A file may also have the head and lack the lookup.
    """
    lookups = [t for t in tables if _is_input(t)]
    heads = [t for t in tables if _is_head(t)]
    path = None
    if lookups and not heads:
        table = min(lookups, key=_rank_for_head)
        path = None if "output" in table.roles else _find_head_path(table, tensors, layout, language_model)
    elif heads and not lookups and language_model:
        table = heads[0]
        others = (n for n in tensors if "." in n and not n.startswith(f"{_module_path(table.name)}."))
        base = next(others, "model").partition(".")[0]
        # GPT-2 and its relatives have "transformer.wte", the others "model.embed_tokens" or the like.
        path = f"{base}.{'wte' if base == 'transformer' else 'embed_tokens'}"
    return [_add_name(t, f"{path}.weight") if path and t is table else t for t in tables]


def _find_head_path(table: Table, tensors: Tensors, layout: Layout, language_model: bool) -> str | None:
    """Return the path of a head that is not stored: the path of its bias, or the layout's.

    A bias is better evidence than the default layout, and shows that there is a head even without a config: BERT stores
    "cls.predictions.bias" and not "cls.predictions.decoder.weight".
    """
    biases = [name for name in _find_biases(tensors, table.shape[0]) if _head_path_of_bias(name, tensors)]
    if not layout.head or not (language_model or biases):
        return None
    if biases and layout.head == Layout.head:
        return _head_path_of_bias(biases[0], tensors)
    wrapper, _, rest = _module_path(table.name).partition(".")
    return f"{wrapper}.{layout.head}" if wrapper in WRAPPERS and "." in rest else layout.head


def _head_path_of_bias(name: str, tensors: Tensors) -> str | None:
    """Return the path of the head that a bias belongs to: the bias's module, or ``decoder`` in it."""
    module = _module_path(name)
    if name.endswith("final_logits_bias"):
        return f"{module}.{Layout.head}".removeprefix(".")
    has_weights = any(n.startswith(f"{module}.") and n.endswith(".weight") for n in tensors)
    if has_weights and ends(f"{module}.decoder", HEADS):
        return f"{module}.decoder"
    return module if ends(module, HEADS + VAGUE_HEADS) else None


def _add_biases(table: Table, tensors: Tensors) -> Table:
    """Sort the sites as ``from_modules.py`` does, and add the biases of projections, which their parent may hold."""
    sites = []
    for site in table.sites:
        holders = [m for m in (site.module, _module_path(site.module)) if m and site.role == "output"]
        biases = [f"{m}.bias" for m in holders if f"{m}.bias" in tensors]
        fits = [bias for bias in biases if tensors[bias].shape == table.shape[:1]]
        sites.append(replace(site, bias=fits[0] if fits else None))
    return replace(table, sites=tuple(sorted(sites, key=lambda s: s.role != "input")))


def _is_input(table: Table) -> bool:
    return table.kind == "vocabulary" and "input" in table.roles


def _is_head(table: Table) -> bool:
    """Whether a table is a projection only, and not the rest of a head's weight (`COLUMNS`), which is transposed."""
    return table.roles == ("output",) and not table.transposed


def _rank_input(table: Table) -> tuple[bool, int, int]:
    """Rank a table as the main input, the best lowest: not secondary, the likeliest name, the shortest path."""
    ranks = []
    for module in (site.module for site in table.sites if site.role == "input"):
        *path, leaf = module.split(".")
        likelihood = LOOKUPS.index(leaf) if leaf in LOOKUPS else len(LOOKUPS)
        ranks.append((not SECONDARY.isdisjoint(path), likelihood, len(path)))
    return min(ranks)


def _rank_for_head(table: Table) -> tuple[bool, tuple[bool, int, int]]:
    """Rank a table as the lookup that a head is tied to, the best lowest: a decoder's before the main input."""
    return "decoder" not in table.name.split("."), _rank_input(table)


def _find_biases(tensors: Tensors, size: int) -> list[str]:
    """Return the names of biases with one entry per row."""
    biases = [t for t in tensors.values() if t.name.endswith("bias") and t.shape]
    return [t.name for t in biases if t.shape[-1] == size == math.prod(t.shape)]


def _find_vectors(tensors: Tensors, equal: Equal | None) -> Iterator[Vector]:
    """Find the candidates for per-token vectors, without repeated memory and without a bias's second name."""
    seen: dict[str, str] = {}
    for tensor in tensors.values():
        if not may_be_vector(tensor.name, tensor.shape, tensor.dtype):
            continue
        twin = seen.get(canonical_name(tensor.name))
        stored_twice = twin is not None and _is_same_vector(tensors[twin], tensor, equal)
        if tensor.group in seen or stored_twice:
            continue
        seen[tensor.group] = seen[canonical_name(tensor.name)] = tensor.name
        yield Vector(tensor.name, tensor.shape[-1])


def _is_same_vector(a: Stored, b: Stored, equal: Equal | None) -> bool:
    """Whether two tensors are one bias, which a head stores under both its names."""
    same_name = canonical_name(a.name) == canonical_name(b.name) and (a.dtype, a.shape) == (b.dtype, b.shape)
    return same_name and (equal is None or equal(a.name, b.name))
