"""Which tables and vectors form a vocabulary. The sweeps over architectures test whole models."""

from __future__ import annotations

import pytest

from embedsurgery.graph import EmbeddingGraph, Kind, Role, Site, Table
from embedsurgery.graph.vocabularies import (
    Vector,
    canonical_name,
    find_unknown_tensor,
    group_tables,
    may_be_vector,
    resize_graph,
)
from embedsurgery.plan import Grow
from embedsurgery.tensors.raw import RawArray

V, D = 100, 16


def table(name: str, rows: int = V, *roles: Role, kind: Kind = "vocabulary", dtype: str = "F32") -> Table:
    sites = tuple(Site(name.rpartition(".")[0], role) for role in roles or ("input",))
    return Table(name, (rows, D), dtype, (), sites, kind)


EMBED, HEAD = table("model.embed_tokens.weight"), table("lm_head.weight", V, "output")
VECTORS = {
    "of the head": ("lm_head.bias", V, True),
    "of the module around it": ("cls.predictions.bias", V, True),
    "of the logits": ("final_logits_bias", V, True),
    "of a head without a weight of its own": ("model.mlm_head.bias", V, True),
    "of a layer as wide as the vocabulary": ("model.layers.0.mlp.fc_in.bias", V, False),
    "of a norm as wide as the vocabulary": ("model.norm.bias", V, False),
    "of another length": ("lm_head.bias", V + 1, False),
    "of the timestamps' head": ("word_timestamp_head.bias", V, False),
}


@pytest.mark.parametrize("name", VECTORS)
def test_which_biases_are_per_token(name: str) -> None:
    bias, entries, expected = VECTORS[name]
    head = table("cls.predictions.decoder.weight", V, "output") if bias.startswith("cls") else HEAD
    (vocabulary,) = group_tables([EMBED, head], [Vector(bias, entries)], {"vocab_size": V})
    assert vocabulary.vectors == ((bias,) if expected else ())


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("lm_head.bias", (V,), "F32", True),
        ("final_logits_bias", (1, V), "BF16", True),
        ("bias", (V,), "F64", True),
        ("lm_head.bias", (V, 2), "F32", False),
        ("lm_head.bias", (), "F32", False),
        ("lm_head.bias", (V,), "I64", False),
        ("lm_head.weight", (V,), "F32", False),
        ("attention.bias", (1, 1, V, V), "F32", False),
    ],
)
def test_candidates_for_vectors(name: str, shape: tuple[int, ...], dtype: str, expected: bool) -> None:
    assert may_be_vector(name, shape, dtype) == expected


def test_one_bias_has_two_names() -> None:
    for name in ("cls.predictions.decoder.bias", "cls.predictions.bias"):
        assert canonical_name(name) == "cls.predictions.bias"
    assert canonical_name("lm_head.bias") == "lm_head.bias"


GROUPS: dict[str, tuple[list[Table], dict[str, object], list[tuple[str, ...]]]] = {
    "input and head": ([EMBED, HEAD], {"vocab_size": V}, [(EMBED.name, HEAD.name)]),
    "without a config": ([EMBED, HEAD], {}, [(EMBED.name, HEAD.name)]),
    "another size": (
        [EMBED, HEAD, table("x.embed_tokens_per_layer.weight", 80)],
        {},
        [(EMBED.name, HEAD.name), ("x.embed_tokens_per_layer.weight",)],
    ),
    "as many entities": (
        [EMBED, HEAD, table("luke.entity_embeddings.weight")],
        {},
        [(EMBED.name, HEAD.name), ("luke.entity_embeddings.weight",)],
    ),
    "as many positions": (
        [EMBED, HEAD, table("model.embed_positions.weight", kind="unknown")],
        {},
        [(EMBED.name, HEAD.name)],
    ),
    "another lookup by the input ids": (
        [EMBED, table("model.value_embeddings.weight", kind="unknown")],
        {},
        [(EMBED.name, "model.value_embeddings.weight")],
    ),
    "an unused lookup with the usual name": (
        [EMBED, table("model.shared.weight", kind="unknown")],
        {},
        [(EMBED.name, "model.shared.weight")],
    ),
    "only lookups of unknown kind": ([table("model.shared.weight", kind="unknown")], {}, []),
    "a longer input": (
        [table("model.embed_tokens.weight", V + 8), HEAD],
        {"vocab_size": V},
        [("model.embed_tokens.weight", "lm_head.weight")],
    ),
    "a head for something else": (
        [table("model.embed_tokens.weight", V + 8), HEAD],
        {"text_vocab_size": V + 8, "vocab_size": V},
        [("model.embed_tokens.weight",), ("lm_head.weight",)],
    ),
    "a longer input, and no config": (
        [table("model.embed_tokens.weight", V + 8), HEAD],
        {},
        [("model.embed_tokens.weight",), ("lm_head.weight",)],
    ),
    "a longer head": (
        [EMBED, table("lm_head.weight", V + 8, "output")],
        {"vocab_size": V},
        [(EMBED.name,), ("lm_head.weight",)],
    ),
    "two languages": (
        [table("model.encoder.embed_tokens.weight"), table("model.decoder.embed_tokens.weight"), HEAD],
        {"src_vocab_size": V, "tgt_vocab_size": V},
        [("model.encoder.embed_tokens.weight",), ("model.decoder.embed_tokens.weight", HEAD.name)],
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_which_tables_are_grouped(name: str) -> None:
    tables, config, expected = GROUPS[name]
    assert [v.tables for v in group_tables(tables, [], config)] == expected


def test_a_grown_graph() -> None:
    tables = (EMBED, HEAD, table("x.pos.weight", 50, kind="unknown"))
    vocabularies = group_tables(tables, [Vector("lm_head.bias", V)], {})
    graph = EmbeddingGraph(tables, vocabularies, EMBED.name)
    grown = resize_graph(graph, vocabularies[0], 3)
    assert [t.shape[0] for t in grown.tables] == [V + 3, V + 3, 50]
    assert grown.table(EMBED.name).shape == (V + 3, D)
    assert grown.vocabularies[0].size == V + 3
    assert resize_graph(grown, grown.vocabularies[0], -3) == graph
    assert Grow("x", 1, {"x": RawArray("F32", (1, 1), b"1234")}, {}).describe() == "grow the vocabulary of x by 1 row"


UNKNOWN: dict[str, tuple[str, str, tuple[int, ...], bool]] = {
    "experts by token": ("model.gate.tid2eid", "I64", (V, 2), True),
    "a flag a token": ("model.allowed", "BOOL", (V,), True),
    "scales": ("model.embed_tokens.weight_scale", "F32", (V, 1), True),
    "a second copy": ("model.embed_tokens.weight_integer", "F32", (V, D), True),
    "a packed head": ("lm_head.qweight", "I32", (D, 7), True),
    "a head of bytes": ("lm_head.weight", "U8", (V * 3, 1), True),
    "position ids": ("embeddings.position_ids", "I64", (1, V), False),
    "a mask": ("attn.bias", "BOOL", (1, 1, V, V), False),
    "another integer": ("norm.num_batches_tracked", "I64", (), False),
    "a norm as wide": ("model.norm.weight", "F32", (V,), False),
    "an attention's output of bytes": ("vision.attn.proj_out.weight", "I8", (D, D), False),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_tensors_that_no_rule_resizes(name: str) -> None:
    key, dtype, shape, expected = UNKNOWN[name]
    vocabularies = group_tables([EMBED], [], {})
    graph = EmbeddingGraph((EMBED,), vocabularies, EMBED.name)
    found = find_unknown_tensor(graph, vocabularies[0], {EMBED.name: ("F32", EMBED.shape), key: (dtype, shape)})
    assert (found is not None) == expected
    assert found is None or f"{key}, {dtype}" in found
