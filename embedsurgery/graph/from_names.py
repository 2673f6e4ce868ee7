"""Tensor names to graph: what the names, shapes and config of a checkpoint or state dict tell of its tables.

A file has no modules and no memory, so roles and ties come from names. What is known of architectures is
``architectures.py``'s. Where a caller can compare two tensors, bytes settle what names leave open; this file
reads no weights. What modules say is ``walker.py``'s; a checkpoint's files are ``checkpoint.py``'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from embedsurgery.graph.architectures import ARCHITECTURES, Layout, is_language_model, layout_of, tie_flag
from embedsurgery.graph.config import vocabulary_sizes as vocabulary_sizes
from embedsurgery.graph.tables import EmbeddingGraph, Kind, Role, Site, Table
from embedsurgery.graph.vocabularies import (
    COLUMNS,
    HEADS,
    LOOKUPS,
    NOT_TOKENS,
    Vector,
    canonical,
    ends,
    group,
    may_be_vector,
)
from embedsurgery.tensors.raw import EDITABLE

VAGUE_LOOKUPS = ("embeddings", "embedding", "word_embed", "embed", "emb", "w", "tok", "tokens", "vocab")
"""As `LOOKUPS`, for names that count only where the config or a head has as many rows."""

VAGUE_HEADS = ("head", "head.decoder", "output", "decoder", "cls")
"""As `HEADS`, for names that count only where a lookup or the config has as many rows."""

WRAPPERS = ("language_model", "text_model", "text_decoder", "decoder", "thinker", "llm")
"""First parts of module paths under which a whole language model, its head included, is nested."""

SECONDARY = frozenset({"decoder", "text_decoder", "talker", "patcher", "qformer", "protein_encoder"})
"""Parts of module paths whose lookups take the model's input ids only where there is no other."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored.

    Attributes:
        name: Its key.
        dtype: safetensors' string.
        shape: As stored.
        group: Equal for tensors over one memory; in files every tensor is a group of its own.
        file: Its file, None in memory.
        transposed: Its memory is its group's the other way round; the shape of a square one does not tell.
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
    """The graph of a checkpoint or a state dict.

    Args:
        stored: Every tensor.
        config: The checkpoint's ``config.json``, None where there is none.
        source: For messages.
        equal: Compares two tensors by name. Where it is None, ties that the config claims are believed.
        architectures: What is special about which architecture.
    """
    tensors = {tensor.name: tensor for tensor in stored}
    layout = layout_of(config, architectures)
    flag = tie_flag(config)
    tables = _join_memory(_candidates(tensors, set(vocabulary_sizes(config))), tensors)
    if flag is not False or layout.forced:
        for target, origin in layout.ties.items():
            tables = _tie(tables, target, origin, tensors, equal)
        tables = _tie_heads(tables, flag, equal)
        tables = _add_unstored(tables, tensors, layout, is_language_model(config))
    tables = [_finish(table, tensors) for table in tables]
    main = min((t for t in tables if _is_input(t)), key=_rank, default=None)
    tables.sort(key=lambda t: (t is not main, t.kind != "vocabulary"))
    vocabularies = group(tables, _vector_candidates(tensors, equal), config)
    return EmbeddingGraph(tuple(tables), vocabularies, main.name if main else None, source)


def _candidates(tensors: Tensors, sizes: set[int]) -> Iterator[Table]:
    """Every lookup, and every projection to as many rows; "unknown" where its rows may be something else."""
    weights = [t for t in tensors.values() if len(t.shape) == 2 and t.name.endswith(".weight")]
    heads = {t.name: t for t in weights if ends(_module(t.name), HEADS + VAGUE_HEADS)}
    lookups = {t.name: t for t in weights if _leaf(t.name) in LOOKUPS + VAGUE_LOOKUPS}
    lookups = {name: t for name, t in lookups.items() if not NOT_TOKENS.search(_module(name))}
    rows = sizes | {t.shape[0] for name, t in lookups.items() if _leaf(name) in LOOKUPS}
    head_rows = sizes | {t.shape[0] for name, t in heads.items() if ends(_module(name), HEADS)}
    maybe = {t.shape[0] for t in lookups.values()}
    for tensor in weights:
        name, size, leaf = tensor.name, tensor.shape[0], _leaf(tensor.name)
        if name in lookups:
            yield _table(tensor, "input", certain=leaf in LOOKUPS or size in head_rows)
        elif name in heads and size in rows | maybe:
            sure = ends(_module(name), HEADS) and size in maybe
            yield _table(tensor, "output", certain=size in rows or sure)
        elif tensor.dtype in EDITABLE and _is_some_lookup(name):
            yield _table(tensor, "input", certain=False)
        elif ends(_module(name), COLUMNS) and tensor.shape[1] in rows and size not in rows:
            yield _turned(_table(tensor, "output", certain=False))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return _module(name).rpartition(".")[2]


def _is_some_lookup(name: str) -> bool:
    """Whether a name is that of a lookup of whatever kind, or of one in a list ("embed_tokens.0")."""
    leaf = re.sub(r"\.\d+$", "", _module(name)).rpartition(".")[2]
    return "emb" in leaf or NOT_TOKENS.search(leaf) is not None


def _table(tensor: Stored, role: Role, *, certain: bool) -> Table:
    rows, columns = tensor.shape
    files = ((tensor.name, tensor.file),) if tensor.file is not None else ()
    sites = (Site(_module(tensor.name), role),)
    kind: Kind = "vocabulary" if certain else "unknown"
    return Table(tensor.name, (rows, columns), tensor.dtype, (), sites, kind, files=files)


def _turned(table: Table) -> Table:
    """The table of a tensor that is stored (D, V)."""
    sites = tuple(replace(site, transposed=True) for site in table.sites)
    return replace(table, shape=table.shape[::-1], sites=sites, transposed=frozenset({table.name}))


def _join(first: Table, second: Table) -> Table:
    """Two names of one table; the first names it. What is looked up and projected to is a vocabulary."""
    known = "vocabulary" in (first.kind, second.kind) or len({*first.roles, *second.roles}) == 2
    return replace(
        first,
        aliases=(*first.aliases, *second.names),
        sites=(*first.sites, *second.sites),
        kind="vocabulary" if known else "unknown",
        files=(*first.files, *second.files),
        transposed=first.transposed | second.transposed,
    )


def _join_memory(candidates: Iterable[Table], tensors: Tensors) -> list[Table]:
    """Tables over one memory become one, named after a lookup; other names over it become aliases."""
    by_group: dict[str, Table] = {}
    for table in sorted(candidates, key=lambda t: ("input" not in t.roles, t.kind != "vocabulary")):
        by_group.setdefault(tensors[table.name].group, table)
    for tensor in tensors.values():
        owner = by_group.get(tensor.group)
        if owner is not None and tensor.name not in owner.names:
            turned = tensor.shape != owner.shape or tensor.transposed != tensors[owner.name].transposed
            by_group[tensor.group] = _with_name(owner, tensor.name, turned=turned)
    return list(by_group.values())


def _with_name(table: Table, name: str, *, turned: bool = False) -> Table:
    """The table with another name, that of a lookup or else of a projection, stored (D, V) where turned."""
    module, _, parameter = name.rpartition(".")
    leaf = _leaf(name)
    lookup = "emb" in module or leaf in LOOKUPS + VAGUE_LOOKUPS or NOT_TOKENS.search(leaf)
    role: Role = "input" if lookup and not ends(module, HEADS + VAGUE_HEADS) else "output"
    site = Site(module, role, parameter, transposed=turned)
    names = frozenset({name} if turned else ())
    return _join(table, Table(name, table.shape, table.dtype, (), (site,), transposed=names))


def _tie(tables: list[Table], target: str, origin: str, tensors: Tensors, equal: Equal | None) -> list[Table]:
    """Join a layout's target, its table or else its bare name, to each table of its origin."""
    done = list(tables)
    for table in tables:
        if not ends(_module(table.name), [origin]) or table not in done:
            continue
        prefix = _module(table.name).removesuffix(origin)
        name, stack = f"{prefix}{target}.weight", f"{prefix}{target.partition('.')[0]}."
        other = next((t for t in done if name in t.names), None)
        if other is None and any(n.startswith(stack) for n in tensors):
            done[done.index(table)] = _with_name(table, name)
        elif other is not None and other is not table and _agree(table, other, True, equal):
            done[done.index(table)] = _join(table, other)
            done.remove(other)
    return done


def _agree(first: Table, second: Table, claimed: bool | None, equal: Equal | None) -> bool:
    """Whether two stored tables load as one: by their bytes, or else by what is claimed."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return equal(first.name, second.name) if equal is not None else claimed is True


def _tie_heads(tables: list[Table], flag: bool | None, equal: Equal | None) -> list[Table]:
    """Join each head to the lookup that loads as one with it: the nearest, a decoder's before others."""
    done = [t for t in tables if not _is_head(t)]
    for head in filter(_is_head, tables):
        lookups = [t for t in done if "input" in t.roles and t.kind == head.kind]
        fits = [t for t in lookups if _agree(t, head, flag, equal)]
        if fits:
            shared = {t.name: _shared_parts(t.name, head.name) for t in fits}
            partner = min(fits, key=lambda t: (-shared[t.name], _rank_for_head(t)))
            done[done.index(partner)] = _join(partner, head)
        else:
            done.append(head)
    return done


def _shared_parts(a: str, b: str) -> int:
    """How many leading parts two paths have in common."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _add_unstored(tables: list[Table], tensors: Tensors, layout: Layout, language_model: bool) -> list[Table]:
    """Give the table that is the one stored end of a tied pair the name of the other end."""
    lookups = [t for t in tables if _is_input(t)]
    heads = [t for t in tables if _is_head(t)]
    path = None
    if lookups and not heads:
        table = min(lookups, key=_rank_for_head)
        path = None if "output" in table.roles else _head_path(table, tensors, layout, language_model)
    elif heads and not lookups and language_model:
        table = heads[0]
        others = (n for n in tensors if "." in n and not n.startswith(f"{_module(table.name)}."))
        base = next(others, "model").partition(".")[0]
        path = f"{base}.{'wte' if base == 'transformer' else 'embed_tokens'}"
    return [_with_name(t, f"{path}.weight") if path and t is table else t for t in tables]


def _head_path(table: Table, tensors: Tensors, layout: Layout, language_model: bool) -> str | None:
    """Where the head of a lookup is that is not stored: where the layout says, or else where its bias is."""
    biases = [name for name in _vectors(tensors, table.shape[0]) if _bias_path(name, tensors)]
    if not layout.head or not (language_model or biases):
        return None
    if biases and layout.head == Layout.head:
        return _bias_path(biases[0], tensors)
    wrapper, _, rest = _module(table.name).partition(".")
    return f"{wrapper}.{layout.head}" if wrapper in WRAPPERS and "." in rest else layout.head


def _bias_path(name: str, tensors: Tensors) -> str | None:
    """The path of the head whose bias this is: the module that holds it, or ``decoder`` in that module."""
    module = _module(name)
    if name.endswith("final_logits_bias"):
        return f"{module}.{Layout.head}".removeprefix(".")
    beside = any(n.startswith(f"{module}.") and n.endswith(".weight") for n in tensors)
    if beside and ends(f"{module}.decoder", HEADS):
        return f"{module}.decoder"
    return module if ends(module, HEADS + VAGUE_HEADS) else None


def _finish(table: Table, tensors: Tensors) -> Table:
    """Sites in the walker's order; projections with their bias, which the module around them may hold."""
    sites = []
    for site in table.sites:
        holders = [m for m in (site.module, _module(site.module)) if m and site.role == "output"]
        biases = [f"{m}.bias" for m in holders if f"{m}.bias" in tensors]
        fits = [bias for bias in biases if tensors[bias].shape == table.shape[:1]]
        sites.append(replace(site, bias=fits[0] if fits else None))
    return replace(table, sites=tuple(sorted(sites, key=lambda s: s.role != "input")))


def _is_input(table: Table) -> bool:
    return table.kind == "vocabulary" and "input" in table.roles


def _is_head(table: Table) -> bool:
    """Whether a table is a whole projection and nothing else: none that holds the rest of one's columns."""
    return table.roles == ("output",) and not table.transposed


def _rank(table: Table) -> tuple[bool, int, int]:
    """Least for the main input table: no part that others feed, the likeliest name, the shortest path."""
    ranks = []
    for module in (site.module for site in table.sites if site.role == "input"):
        *path, leaf = module.split(".")
        place = LOOKUPS.index(leaf) if leaf in LOOKUPS else len(LOOKUPS)
        ranks.append((not SECONDARY.isdisjoint(path), place, len(path)))
    return min(ranks)


def _rank_for_head(table: Table) -> tuple[bool, tuple[bool, int, int]]:
    """Least for the lookup that a head is tied to: a decoder's before the main one."""
    return "decoder" not in table.name.split("."), _rank(table)


def _vectors(tensors: Tensors, size: int) -> list[str]:
    """Names of per-token vectors: biases with one value for each row."""
    biases = [t for t in tensors.values() if t.name.endswith("bias") and t.shape]
    return [t.name for t in biases if t.shape[-1] == size == math.prod(t.shape)]


def _vector_candidates(tensors: Tensors, equal: Equal | None) -> Iterator[Vector]:
    """What may be a per-token vector, each once: one memory, or one bias that is stored under its two names."""
    seen: dict[str, str] = {}
    for tensor in tensors.values():
        if not may_be_vector(tensor.name, tensor.shape, tensor.dtype):
            continue
        twin = seen.get(canonical(tensor.name))
        stored_twice = twin is not None and same_vector(tensors[twin], tensor, equal)
        if tensor.group in seen or stored_twice:
            continue
        seen[tensor.group] = seen[canonical(tensor.name)] = tensor.name
        yield Vector(tensor.name, tensor.shape[-1])


def same_vector(a: Stored, b: Stored, equal: Equal | None) -> bool:
    """Whether two names that a head may store its bias under hold one vector."""
    alike = canonical(a.name) == canonical(b.name) and (a.dtype, a.shape) == (b.dtype, b.shape)
    return alike and (equal is None or equal(a.name, b.name))
