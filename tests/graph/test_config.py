"""Which numbers of a config are a vocabulary's size, and which prevent it from growing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from embedsurgery.graph.config import as_mapping, find_growth_obstacle, find_size_keys, token_kind_of

V = 11
TEXT = ("model.embed_tokens.weight", "lm_head.weight")
ENCODER = ("model.encoder.embed_tokens.weight",)
DECODER = ("model.decoder.embed_tokens.weight", "lm_head.weight")
PER_LAYER = ("model.embed_tokens.weight", "model.embed_tokens_per_layer.weight")
QFORMER = ("qformer.embeddings.word_embeddings.weight",)
ENTITIES = ("luke.entity_embeddings.entity_embeddings.weight", "entity_predictions.decoder.weight")
FSMT = {"src_vocab_size": V, "tgt_vocab_size": V, "vocab_size": V}
MARIAN = {"vocab_size": V, "decoder_vocab_size": V, "share_encoder_decoder_embeddings": False}

KEYS: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str]]] = {
    "plain": ({"vocab_size": V, "hidden_size": V, "bos_token_id": V}, TEXT, ["vocab_size"]),
    "another size": ({"vocab_size": V + 1}, TEXT, []),
    "not an integer": ({"vocab_size": "11", "text_config": {"vocab_size": True}, "n_words": 11.0}, TEXT, []),
    "multimodal": (
        {
            "vocab_size": V,
            "text_config": {"vocab_size": V},
            "vision_config": {"vocab_size": V},
            "audio_config": {"text_config": {"vocab_size": V}},
        },
        TEXT,
        ["vocab_size", "text_config.vocab_size"],
    ),
    "nested twice": (
        {"thinker_config": {"text_config": {"vocab_size": V}}},
        TEXT,
        ["thinker_config.text_config.vocab_size"],
    ),
    "one of two": ({"vocab_size": V, "text_config": {"vocab_size": V + 1}}, TEXT, ["vocab_size"]),
    "an encoder without a table": (
        {"encoder": {"vocab_size": V}, "decoder": {"vocab_size": V}},
        DECODER,
        ["decoder.vocab_size"],
    ),
    "an encoder with one": (
        {"encoder": {"vocab_size": V}, "decoder": {"vocab_size": V}},
        ENCODER + DECODER,
        ["encoder.vocab_size", "decoder.vocab_size"],
    ),
    "a table for each layer": (
        {"vocab_size": V, "vocab_size_per_layer_input": V},
        PER_LAYER,
        ["vocab_size", "vocab_size_per_layer_input"],
    ),
    "no table for each layer": ({"vocab_size": V, "vocab_size_per_layer_input": V}, TEXT, ["vocab_size"]),
    "source": (FSMT, ENCODER, ["src_vocab_size", "vocab_size"]),
    "target": (FSMT, DECODER, ["tgt_vocab_size"]),
    "source and target tied": (FSMT, ENCODER + DECODER, ["src_vocab_size", "tgt_vocab_size", "vocab_size"]),
    "Marian's source": (MARIAN, ENCODER, ["vocab_size"]),
    "Marian's target": (MARIAN, DECODER, ["decoder_vocab_size"]),
    "Marian shared": (
        MARIAN | {"share_encoder_decoder_embeddings": True},
        ENCODER + DECODER,
        ["vocab_size", "decoder_vocab_size"],
    ),
    "entities": ({"vocab_size": V, "entity_vocab_size": V}, ENTITIES, ["entity_vocab_size"]),
    "words beside entities": ({"vocab_size": V, "entity_vocab_size": V}, TEXT, ["vocab_size"]),
    "a Q-Former": ({"vocab_size": V, "qformer_config": {"vocab_size": V}}, QFORMER, ["qformer_config.vocab_size"]),
    "beside a Q-Former": ({"vocab_size": V, "qformer_config": {"vocab_size": V}}, TEXT, ["vocab_size"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_a_vocabulary_size(name: str) -> None:
    config, names, expected = KEYS[name]
    assert [".".join(keys) for keys in find_size_keys(config, names, {V})] == expected


def test_a_deeply_nested_config_is_read_to_a_limit() -> None:
    config: dict[str, Any] = {"vocab_size": V}
    for _ in range(2000):
        config = {"text_config": config, "decoder": config}
    assert find_size_keys(config, TEXT, {V}) == []


OBSTACLES: dict[str, tuple[dict[str, Any], set[int], str | None]] = {
    "none": ({"vocab_size": V}, {V}, None),
    "no config": ({}, {V}, None),
    "additional tokens": (
        {"vocab_size": V, "text_config": {"additional_vocab_size": 2}},
        {V},
        "text_config.additional_vocab_size = 2",
    ),
    "no additional tokens": ({"vocab_size": V, "additional_vocab_size": 0}, {V}, None),
    "ids of sounds": ({"vocab_size": V, "audio_config": {"vocab_offset": 9}}, {V}, "audio_config.vocab_offset = 9"),
    "a shorter head": (
        {"vocab_size": V, "text_config": {"vocab_size": V, "unpadded_vocab_size": V - 2}},
        {V},
        f"text_config.unpadded_vocab_size = {V - 2}",
    ),
    "a pruned head": ({"vocab_size": V, "output_vocab_size": V - 2}, {V}, f"output_vocab_size = {V - 2}"),
    "a head that is not pruned": ({"vocab_size": V, "output_vocab_size": None}, {V}, None),
    "a patcher": ({"vocab_size": V, "patcher_config": {"vocab_size": V}}, {V}, "patcher_config"),
    "a longer input": ({"vocab_size": V}, {V, V + 1}, f"an input of {V + 1} rows"),
    "Mllama's": ({"vocab_size": V, "model_type": "mllama_text_model"}, {V, V + 8}, None),
    "another size": ({"vocab_size": V + 2}, {V}, f"{V} rows, but {V + 2}"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_to_growth(name: str) -> None:
    config, sizes, expected = OBSTACLES[name]
    found = find_growth_obstacle(config, TEXT, sizes)
    assert (found is None) == (expected is None)
    assert (found or "").startswith(expected or "")


@dataclass
class TextConfig:
    """Like transformers' configs: fields of the instance, the model type of the class."""

    model_type = "llama"
    vocab_size: int = V
    rope: dict[str, Any] = field(default_factory=lambda: {"type": "default"})


@dataclass
class WholeConfig:
    """A config with a nested config."""

    model_type = "llava"
    text_config: TextConfig = field(default_factory=TextConfig)
    dtype: object = object


def test_a_config_object_is_read_like_a_file() -> None:
    mapping = as_mapping(WholeConfig())
    assert mapping["text_config"] == {"model_type": "llama", "vocab_size": V, "rope": {"type": "default"}}
    assert mapping["model_type"] == "llava"
    assert find_size_keys(mapping, TEXT, {V}) == [("text_config", "vocab_size")]
    assert as_mapping(None) == {}
    assert as_mapping(3) == {}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (TEXT, ""),
        (ENTITIES, "entity"),
        (QFORMER, "qformer"),
        (("model.identity.embed_tokens.weight",), ""),
        (("model.protein_encoder.model.embeddings.word_embeddings.weight",), "protein"),
        (("talker.model.embed_tokens.weight",), "talker"),
    ],
)
def test_kinds_of_tokens(names: tuple[str, ...], expected: str) -> None:
    assert token_kind_of(names, {}) == expected
