"""Groups tables and per-token vectors into vocabularies: what has the same row numbers is resized together.

Both walkers, ``from_modules.py`` and ``from_names.py``, use the rules and the lists of names in this file.
``stores/`` asks it what must be resized, and whether something else depends on the size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from embedsurgery.graph.config import as_mapping, token_kind_of, vocabulary_sizes
from embedsurgery.graph.tables import EmbeddingGraph, Site, Table, Vocabulary

LOOKUPS = (
    "shared",
    "embed_tokens",
    "wte",
    "word_embeddings",
    "word_embedding",
    "embed_in",
    "tok_embeddings",
    "tokens_embed",
    "token_embedding",
    "token_embeddings",
    "input_embedding",
    "embed_tokens_per_layer",
)
"""Last components of the module paths of input embeddings, the likeliest main one first."""

OTHER_LOOKUPS = ("value_embeddings",)
"""Last components of the paths of other lookups by the input ids: NeoMME's."""

NOT_TOKENS = re.compile(
    r"(^|[._])(pos|positions?|wpe|types?|segment|relative|rel|time|patch|vision|visual|audio|image|speaker|"
    r"langs?|language_embed\w*|distance|codebook|[xyh])([._]|$)"
)
"""Matches paths of lookups whose rows are not tokens."""

HEADS = (
    "lm_head",
    "lm_head.decoder",
    "lm_head.out_proj",
    "lm_head.linear",
    "embed_out",
    "proj_out",
    "unembed",
    "output_projection",
    "lm_loss",
    "vocab_projector",
    "generator_lm_head",
    "predictions.decoder",
    "pred_layer.proj",
    "mlm.decoder",
    "mlm_head",
    "log_softmax.mlp.layer0",
)
"""Ends of the paths of modules that project to a vocabulary."""

COLUMNS = ("cls.predictions.dense",)
"""Ends of the paths of modules that hold the rest of a head's weight, one column per token.

MobileBERT's embeddings are narrower than its hidden states, so its head is the table joined to such a weight, (D, V).
"""

_WHOLE_HEADS = ("lm_head", "embed_out", "predictions.decoder")
"""Ends in `HEADS` that no other kind of module has. An attention's output may be called ``proj_out`` too."""

_BIAS = re.compile(r"(^|\.)(bias|final_logits_bias)$")


@dataclass(frozen=True)
class Vector:
    """A candidate for a per-token vector: a floating-point tensor with all its entries in the last axis.

    Attributes:
        name: Its first name.
        entries: Number of its entries.
    """

    name: str
    entries: int


def ends(module: str, paths: Iterable[str]) -> bool:
    """Whether a module path equals one of the given paths, or ends with one after a dot."""
    return any(module == path or module.endswith("." + path) for path in paths)


def may_be_vector(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor can be a per-token vector, by its name, shape and dtype."""
    flat = len(shape) >= 1 and all(size == 1 for size in shape[:-1])
    return flat and dtype.startswith(("F", "BF")) and _BIAS.search(name) is not None


def canonical_name(name: str) -> str:
    """Return one name for both names of a bias that heads like BERT's store twice."""
    return re.sub(r"\.decoder\.bias$", ".bias", name)


def group_tables(tables: Iterable[Table], vectors: Iterable[Vector], config: object) -> tuple[Vocabulary, ...]:
    """Group tables and vectors into vocabularies, in the order of their first tables.

    Tables belong to one vocabulary if they are for the same kind of tokens and have the same number of rows.

    Args:
        tables: All tables, in the graph's order.
        vectors: Candidates for per-token vectors, each memory once.
        config: The model's config: a mapping, an object, or None.
    """
    fields = as_mapping(config)
    sizes = vocabulary_sizes(fields)
    groups: dict[tuple[str, int], list[Table]] = {}
    for table in filter(_has_row_per_token, tables):
        groups.setdefault((token_kind_of(table.names, fields), table.shape[0]), []).append(table)
    # Lookups of unknown kind may hold anything, so alone they are not a vocabulary.
    for key in [key for key, members in groups.items() if all(t.kind == "unknown" for t in members)]:
        del groups[key]
    # Mllama's input has eight rows more than its head, for ids beyond the vocabulary. Its config has the head's size:
    # a head whose size is in the config joins the only longer group whose size is not.
    for key in [key for key, members in groups.items() if all(t.roles == ("output",) for t in members)]:
        longer = [k for k in groups if k[0] == key[0] and k[1] > key[1] and k[1] not in sizes]
        if key[1] in sizes and len(longer) == 1:
            groups[longer[0]].extend(groups.pop(key))
    found: dict[tuple[str, int], list[str]] = {key: [] for key in groups}
    for vector in vectors:
        owner = next((key for key, members in groups.items() if _is_bias_of(vector, members)), None)
        if owner is not None:
            found[owner].append(vector.name)
    return tuple(
        Vocabulary(members[0].name, tuple(t.name for t in members), tuple(found[key]), members[0].shape[0])
        for key, members in groups.items()
    )


def _has_row_per_token(table: Table) -> bool:
    """Whether a table has a row for each token: by its kind, or because it is named like an input embedding."""
    if table.kind == "vocabulary" or any(ends(module, COLUMNS) for module in table.modules):
        return True
    leaf = table.name.split(".")[-2:-1]
    return leaf[:1] != [] and leaf[0] in LOOKUPS + OTHER_LOOKUPS and not NOT_TOKENS.search(table.name)


def _is_bias_of(vector: Vector, tables: Iterable[Table]) -> bool:
    """Whether a vector is the bias of a head among the tables: one entry per row, and a name that such a bias has."""
    module, _, leaf = vector.name.rpartition(".")
    heads = [(t, s) for t in tables for s in t.sites if s.role == "output" and t.shape[0] == vector.entries]
    known = leaf == "final_logits_bias" or ends(module, HEADS)
    return any(known or module in _bias_modules(site) for _, site in heads)


def _bias_modules(site: Site) -> tuple[str, str]:
    """Return the modules that may hold a projection's bias: its own, and its parent."""
    return site.module, site.module.rpartition(".")[0]


def resize_graph(graph: EmbeddingGraph, vocabulary: Vocabulary, count: int) -> EmbeddingGraph:
    """Return the graph after a vocabulary grew by ``count`` rows, or shrank if it is negative."""
    tables = tuple(
        replace(t, shape=(t.shape[0] + count, t.shape[1])) if t.name in vocabulary.tables else t for t in graph.tables
    )
    grown = replace(vocabulary, size=vocabulary.size + count)
    vocabularies = tuple(grown if v.name == vocabulary.name else v for v in graph.vocabularies)
    return replace(graph, tables=tables, vocabularies=vocabularies)


def names_of(graph: EmbeddingGraph, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return all names of a vocabulary's tables, aliases included."""
    return tuple(name for table in vocabulary.tables for name in graph.table(table).names)


def row_counts_of(graph: EmbeddingGraph, vocabulary: Vocabulary) -> frozenset[int]:
    """Return the numbers of rows of a vocabulary's tables. They differ where the input is longer than the head."""
    return frozenset(graph.table(name).shape[0] for name in vocabulary.tables)


def find_unknown_tensor(
    graph: EmbeddingGraph, vocabulary: Vocabulary, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> str | None:
    """Return a tensor that may depend on a vocabulary's size and cannot be resized by any rule, None without one.

    - An integer tensor with a row or an entry per token: DeepSeek V4 has a table of experts by token id.
    - A tensor with a row per token in the module of a table: scales of a quantised table, I-BERT's second copy.
    - A head that does not hold plain numbers.

    Args:
        graph: The graph of the model.
        vocabulary: The vocabulary that will grow.
        tensors: Name -> (dtype, shape) of all stored tensors.

    Returns:
        Name, dtype and shape, for messages.
    """
    sizes = row_counts_of(graph, vocabulary)
    known = {*names_of(graph, vocabulary), *vocabulary.vectors}
    vectors = {canonical_name(name) for name in vocabulary.vectors}
    modules = {name.rpartition(".")[0] for name in known}
    for name, (dtype, shape) in tensors.items():
        if name in known or canonical_name(name) in vectors:
            continue
        module = name.rpartition(".")[0]
        # F8 is a quantised format: its numbers mean nothing without scales. A packed head does not have shape (V, D):
        # only its name shows that it depends on the vocabulary.
        plain = dtype.startswith(("F", "BF")) and not dtype.startswith("F8")
        by_token = 1 <= len(shape) <= 2 and shape[0] in sizes
        if (by_token and (not plain or (module in modules and module))) or (ends(module, _WHOLE_HEADS) and not plain):
            return f"{name}, {dtype} {list(shape)}"
    return None
