"""Which tables and per-token vectors share their row numbers, and so grow together: one rule for both walkers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from embedsurgery.graph.config import as_mapping, tokens_of, vocabulary_sizes
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
"""Last parts of the module paths of input embeddings, the likeliest main one first."""

BESIDE_INPUT = ("value_embeddings",)
"""Last parts of the paths of lookups that take the input's ids too: NeoMME's."""

NOT_TOKENS = re.compile(
    r"(^|[._])(pos|positions?|wpe|types?|segment|relative|rel|time|patch|vision|visual|audio|image|speaker|"
    r"langs?|language_embed\w*|distance|codebook|[xyh])([._]|$)"
)
"""Paths of lookups that are indexed by something else than tokens."""

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
"""Ends of the module paths that project to a vocabulary."""

COLUMNS = ("cls.predictions.dense",)
"""Ends of the paths of modules that hold the rest of a head's columns, one column a token: MobileBERT's."""

_WHOLE_HEADS = ("lm_head", "embed_out", "predictions.decoder")
"""Those of the heads that nothing else is called like."""

_BIAS = re.compile(r"(^|\.)(bias|final_logits_bias)$")


@dataclass(frozen=True)
class Vector:
    """What may be a per-token vector: a tensor of floats with all its entries in the last axis.

    Attributes:
        name: Its first name.
        entries: How many.
    """

    name: str
    entries: int


def ends(module: str, paths: Iterable[str]) -> bool:
    """Whether a module path is one of the given, or ends with one after a dot."""
    return any(module == path or module.endswith("." + path) for path in paths)


def may_be_vector(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor can be a per-token vector at all."""
    flat = len(shape) >= 1 and all(size == 1 for size in shape[:-1])
    return flat and dtype.startswith(("F", "BF")) and _BIAS.search(name) is not None


def canonical(name: str) -> str:
    """One name for the two under which heads like BERT's store one bias."""
    return re.sub(r"\.decoder\.bias$", ".bias", name)


def group(tables: Iterable[Table], vectors: Iterable[Vector], config: object) -> tuple[Vocabulary, ...]:
    """The vocabularies of a model, the main input's first if its table comes first.

    Tables are of one vocabulary if they are for the same tokens and have as many rows. A head with fewer rows than
    the input belongs to it where the head's are those that the config names: the input has some more at its end.

    Args:
        tables: All tables, in the graph's order.
        vectors: What may be a per-token vector, each memory once.
        config: The model's config: a mapping, an object, or None.
    """
    fields = as_mapping(config)
    sizes = vocabulary_sizes(fields)
    groups: dict[tuple[str, int], list[Table]] = {}
    for table in filter(_is_by_token, tables):
        groups.setdefault((tokens_of(table.names, fields), table.shape[0]), []).append(table)
    for key in [key for key, members in groups.items() if all(t.kind == "unknown" for t in members)]:
        del groups[key]
    for key in [key for key, members in groups.items() if all(t.roles == ("output",) for t in members)]:
        longer = [k for k in groups if k[0] == key[0] and k[1] > key[1] and k[1] not in sizes]
        if key[1] in sizes and len(longer) == 1:
            groups[longer[0]].extend(groups.pop(key))
    found: dict[tuple[str, int], list[str]] = {key: [] for key in groups}
    for vector in vectors:
        owner = next((key for key, members in groups.items() if _is_of(vector, members)), None)
        if owner is not None:
            found[owner].append(vector.name)
    return tuple(
        Vocabulary(members[0].name, tuple(t.name for t in members), tuple(found[key]), members[0].shape[0])
        for key, members in groups.items()
    )


def _is_by_token(table: Table) -> bool:
    """Whether a table has a row a token: a vocabulary, or one that a model has beside its own and is called like it."""
    if table.kind == "vocabulary" or any(ends(module, COLUMNS) for module in table.modules):
        return True
    leaf = table.name.split(".")[-2:-1]
    return leaf[:1] != [] and leaf[0] in LOOKUPS + BESIDE_INPUT and not NOT_TOKENS.search(table.name)


def _is_of(vector: Vector, tables: Iterable[Table]) -> bool:
    """Whether a vector is the bias of a head among the tables: it has an entry a row, and lies where heads keep it."""
    module, _, leaf = vector.name.rpartition(".")
    heads = [(t, s) for t in tables for s in t.sites if s.role == "output" and t.shape[0] == vector.entries]
    known = leaf == "final_logits_bias" or ends(module, HEADS)
    return any(known or module in _places(site) for _, site in heads)


def _places(site: Site) -> tuple[str, str]:
    """The modules that hold a projection's bias: its own, or the one around it."""
    return site.module, site.module.rpartition(".")[0]


def grown_graph(graph: EmbeddingGraph, vocabulary: Vocabulary, count: int) -> EmbeddingGraph:
    """The graph after a vocabulary has got (or lost) rows."""
    tables = tuple(
        replace(t, shape=(t.shape[0] + count, t.shape[1])) if t.name in vocabulary.tables else t for t in graph.tables
    )
    grown = replace(vocabulary, size=vocabulary.size + count)
    vocabularies = tuple(grown if v.name == vocabulary.name else v for v in graph.vocabularies)
    return replace(graph, tables=tables, vocabularies=vocabularies)


def names_of(graph: EmbeddingGraph, vocabulary: Vocabulary) -> tuple[str, ...]:
    """All names of a vocabulary's tables."""
    return tuple(name for table in vocabulary.tables for name in graph.table(table).names)


def rows_of_tables(graph: EmbeddingGraph, vocabulary: Vocabulary) -> frozenset[int]:
    """The numbers of rows that a vocabulary's tables have."""
    return frozenset(graph.table(name).shape[0] for name in vocabulary.tables)


def unexplained(
    graph: EmbeddingGraph, vocabulary: Vocabulary, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> str | None:
    """A tensor with something for each token that no rule knows how to grow; None where there is none.

    That is a tensor of integers with an entry or a row a token (DeepSeek V4's experts by token id), a tensor with a
    row a token beside a table (quantisation's scales, I-BERT's second copy), or a head that holds no plain numbers.

    Args:
        graph: Of the model.
        vocabulary: What is to grow.
        tensors: Name -> (dtype, shape) of everything that is stored.
    """
    sizes = rows_of_tables(graph, vocabulary)
    known = {*names_of(graph, vocabulary), *vocabulary.vectors}
    canon = {canonical(name) for name in vocabulary.vectors}
    homes = {name.rpartition(".")[0] for name in known}
    for name, (dtype, shape) in tensors.items():
        if name in known or canonical(name) in canon:
            continue
        module = name.rpartition(".")[0]
        plain = dtype.startswith(("F", "BF")) and not dtype.startswith("F8")
        by_token = 1 <= len(shape) <= 2 and shape[0] in sizes
        if (by_token and (not plain or (module in homes and module))) or (ends(module, _WHOLE_HEADS) and not plain):
            return f"{name}, {dtype} {list(shape)}"
    return None
