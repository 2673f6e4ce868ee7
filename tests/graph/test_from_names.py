"""The graph of tensor names, against known checkpoints and against the graph of the modules that wrote them.

The sweep saves every architecture of the zoo and compares the two walkers. The tests before it need no transformers:
their lists of tensors come from real checkpoints of old and new versions of the library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.graph.architectures import Layout, read_tie_flag
from embedsurgery.graph.from_names import Stored, vocabulary_sizes, walk_names

V, D = 100, 16


def stored(*lines: str) -> tuple[list[Stored], dict[str, str]]:
    """Create tensors from "name:100x16=a@g": shape (V, D) by default, values a, memory g. Return values by name too."""
    made, values = [], {}
    for line in lines:
        name = line[: next((i for i, c in enumerate(line) if c in ":=@"), len(line))]
        parts = dict(re.findall(r"([:=@])([^:=@]+)", line))
        shape = tuple(int(n) for n in parts.get(":", f"{V}x{D}").split("x"))
        made.append(Stored(name, "F32", shape, parts.get("@", name), "model.safetensors"))
        values[name] = parts.get("=", name)
    return made, values


def walk(*lines: str, config: Mapping[str, Any] | None, compare: bool = False, **more: Any) -> EmbeddingGraph:
    tensors, values = stored(*lines)
    equal = (lambda a, b: values[a] == values[b]) if compare else None
    return walk_names(tensors, config=config, source="a test", equal=equal, **more)


def vocabulary(graph: EmbeddingGraph) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return names -> roles of the tables of kind "vocabulary"."""
    return {t.names: t.roles for t in graph.tables if t.kind == "vocabulary"}


def lm(name: str, model_type: str = "", **more: Any) -> dict[str, Any]:
    return {"architectures": [name], "model_type": model_type, "vocab_size": V, **more}


BOTH = ("input", "output")
T5 = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
BART = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")

KNOWN: dict[str, tuple[list[str], dict[str, Any], dict[tuple[str, ...], tuple[str, ...]]]] = {
    "GPT-2 with its prefix": (
        ["transformer.wte.weight", "transformer.wpe.weight:64x16", "transformer.h.0.attn.c_attn.weight:16x48"],
        lm("GPT2LMHeadModel", "gpt2"),
        {("transformer.wte.weight", "lm_head.weight"): BOTH},
    ),
    "GPT-2 as it was published": (
        ["wte.weight", "wpe.weight:64x16", "h.0.attn.c_attn.weight:16x48"],
        lm("GPT2LMHeadModel", "gpt2"),
        {("wte.weight", "lm_head.weight"): BOTH},
    ),
    "GPT-2 without a head": (
        ["wte.weight", "wpe.weight:64x16"],
        lm("GPT2Model", "gpt2"),
        {("wte.weight",): ("input",)},
    ),
    "BERT": (
        [
            "bert.embeddings.word_embeddings.weight",
            "bert.embeddings.position_embeddings.weight",
            "bert.embeddings.token_type_embeddings.weight:2x16",
            "cls.predictions.bias:100",
            "cls.predictions.transform.dense.weight:16x16",
        ],
        lm("BertForMaskedLM", "bert"),
        {("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"): BOTH},
    ),
    "RoBERTa": (
        [
            "roberta.embeddings.word_embeddings.weight",
            "roberta.embeddings.position_embeddings.weight",
            "lm_head.bias:100",
            "lm_head.dense.weight:16x16",
        ],
        lm("RobertaForMaskedLM", "roberta"),
        {("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"): BOTH},
    ),
    "T5": (
        ["shared.weight", "encoder.block.0.x.weight:16x16", "decoder.block.0.x.weight:16x16"],
        lm("T5ForConditionalGeneration", "t5"),
        {(*T5, "lm_head.weight"): BOTH},
    ),
    "T5's encoder": (
        ["shared.weight", "encoder.block.0.x.weight:16x16"],
        lm("T5EncoderModel", "t5"),
        {("shared.weight", "encoder.embed_tokens.weight"): ("input",)},
    ),
    "T5 1.1, whose flag is False for its head alone": (
        [*T5, "lm_head.weight"],
        lm("T5ForConditionalGeneration", "t5", tie_word_embeddings=False),
        {T5: ("input",), ("lm_head.weight",): ("output",)},
    ),
    "BART": (
        ["model.shared.weight", "model.encoder.x:16", "model.decoder.x:16", "final_logits_bias:1x100"],
        lm("BartForConditionalGeneration", "bart"),
        {(*BART, "lm_head.weight"): BOTH},
    ),
    "Marian, whose class name is not a language model's": (
        ["model.shared.weight", "model.encoder.x:16", "model.decoder.x:16", "final_logits_bias:1x100"],
        lm("MarianMTModel", "marian"),
        {(*BART, "lm_head.weight"): BOTH},
    ),
    "Marian with two vocabularies": (
        ["model.encoder.embed_tokens.weight:90x16", "model.decoder.embed_tokens.weight", "final_logits_bias:1x100"],
        lm("MarianMTModel", "marian", vocab_size=90, decoder_vocab_size=V),
        {
            ("model.encoder.embed_tokens.weight",): ("input",),
            ("model.decoder.embed_tokens.weight", "lm_head.weight"): BOTH,
        },
    ),
    "OPT with word_embed_proj_dim": (
        [
            "model.decoder.embed_tokens.weight:100x8",
            "model.decoder.embed_positions.weight:66x16",
            "model.decoder.project_in.weight:16x8",
            "model.decoder.project_out.weight:8x16",
        ],
        lm("OPTForCausalLM", "opt"),
        {("model.decoder.embed_tokens.weight", "lm_head.weight"): BOTH},
    ),
    "Whisper": (
        ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", "model.encoder.x:16"],
        lm("WhisperForConditionalGeneration", "whisper"),
        {("model.decoder.embed_tokens.weight", "proj_out.weight"): BOTH},
    ),
    "Gemma 3 with images": (
        ["language_model.model.embed_tokens.weight", "vision_tower.embeddings.position_embedding.weight:4x16"],
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"model_type": "gemma3_text", "vocab_size": V},
            "vision_config": {"model_type": "siglip", "vocab_size": 4, "tie_word_embeddings": False},
        },
        {("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"): BOTH},
    ),
    "Qwen2-VL, tied": (
        ["model.embed_tokens.weight", "visual.blocks.0.x.weight:16x16"],
        lm("Qwen2VLForConditionalGeneration", "qwen2_vl", tie_word_embeddings=True),
        {("model.embed_tokens.weight", "lm_head.weight"): BOTH},
    ),
    "a tie that only the text config has": (
        ["model.language_model.embed_tokens.weight"],
        lm("LlavaForConditionalGeneration", tie_word_embeddings=False, text_config={"tie_word_embeddings": True}),
        {("model.language_model.embed_tokens.weight", "lm_head.weight"): BOTH},
    ),
    "Gemma 3n, with a smaller vocabulary for its layers": (
        ["model.embed_tokens.weight", "model.embed_tokens_per_layer.weight:80x32"],
        lm("Gemma3nForCausalLM", "gemma3n_text", vocab_size_per_layer_input=80),
        {
            ("model.embed_tokens.weight", "lm_head.weight"): BOTH,
            ("model.embed_tokens_per_layer.weight",): ("input",),
        },
    ),
    "GPT-NeoX": (
        ["gpt_neox.embed_in.weight", "embed_out.weight"],
        lm("GPTNeoXForCausalLM", "gpt_neox", tie_word_embeddings=False),
        {("gpt_neox.embed_in.weight",): ("input",), ("embed_out.weight",): ("output",)},
    ),
    "Phi": (
        ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias:100"],
        lm("PhiForCausalLM", "phi", tie_word_embeddings=False),
        {("model.embed_tokens.weight",): ("input",), ("lm_head.weight",): ("output",)},
    ),
    "Mllama, eight rows more in than out": (
        ["language_model.model.embed_tokens.weight:108x16", "language_model.lm_head.weight"],
        {"architectures": ["MllamaForConditionalGeneration"], "text_config": {"vocab_size": V}},
        {
            ("language_model.model.embed_tokens.weight",): ("input",),
            ("language_model.lm_head.weight",): ("output",),
        },
    ),
    "Mamba, with a vague name": (
        ["backbone.embeddings.weight", "backbone.layers.0.x.weight:16x16"],
        lm("MambaForCausalLM", "mamba"),
        {("backbone.embeddings.weight", "lm_head.weight"): BOTH},
    ),
    "ProphetNet, three copies": (
        ["prophetnet.word_embeddings.weight", "prophetnet.encoder.x:16", "prophetnet.decoder.x:16"],
        lm("ProphetNetForConditionalGeneration", "prophetnet"),
        {
            (
                "prophetnet.word_embeddings.weight",
                "prophetnet.encoder.word_embeddings.weight",
                "prophetnet.decoder.word_embeddings.weight",
                "lm_head.weight",
            ): BOTH
        },
    ),
    "an encoder and a decoder of different models": (
        [
            "encoder.embeddings.word_embeddings.weight",
            "decoder.transformer.wte.weight",
            "decoder.transformer.wpe.weight:64x16",
        ],
        {
            "architectures": ["EncoderDecoderModel"],
            "encoder": {"vocab_size": V},
            "decoder": {"model_type": "gpt2", "vocab_size": V},
        },
        {
            ("encoder.embeddings.word_embeddings.weight",): ("input",),
            ("decoder.transformer.wte.weight", "decoder.lm_head.weight"): BOTH,
        },
    ),
    "TrOCR, with another name for the decoder's head": (
        ["encoder.layer.0.x.weight:16x16", "decoder.model.decoder.embed_tokens.weight"],
        {
            "architectures": ["VisionEncoderDecoderModel"],
            "decoder": {"model_type": "trocr", "vocab_size": V},
        },
        {("decoder.model.decoder.embed_tokens.weight", "decoder.output_projection.weight"): BOTH},
    ),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("compare", [False, True])
def test_known_checkpoints(name: str, compare: bool) -> None:
    lines, config, expected = KNOWN[name]
    if name.startswith("T5 1.1"):
        lines = [f"{line}={'head' if line.startswith('lm_head') else 'shared'}" for line in lines]
    graph = walk(*lines, config=config, compare=compare)
    assert vocabulary(graph) == expected
    assert graph.input == next(iter(expected))[0]


LLAMA = ("model.embed_tokens.weight", "lm_head.weight")
APART = {LLAMA[:1]: ("input",), LLAMA[1:]: ("output",)}


@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize(
    ("lines", "flag", "expected"),
    [
        (LLAMA[:1], True, {LLAMA: BOTH}),
        (LLAMA[:1], None, {LLAMA: BOTH}),
        (LLAMA[:1], False, {LLAMA[:1]: ("input",)}),  # its head is initialised at random
        (LLAMA[1:], True, {LLAMA[::-1]: BOTH}),
        (LLAMA[1:], False, {LLAMA[1:]: ("output",)}),
        ([f"{name}=same" for name in LLAMA], True, {LLAMA: BOTH}),
        ([f"{name}=same" for name in LLAMA], False, APART),
        (LLAMA, False, APART),
    ],
    ids=["once", "once, no flag", "once, untied", "head", "head, untied", "twice", "twice, untied", "untied"],
)
def test_ties(lines: list[str], flag: bool | None, expected: dict[tuple[str, ...], Any], compare: bool) -> None:
    config = lm("LlamaForCausalLM", "llama", **({} if flag is None else {"tie_word_embeddings": flag}))
    assert vocabulary(walk(*lines, "model.norm.weight:16", config=config, compare=compare)) == expected


def test_bytes_decide_a_tie_that_the_config_claims() -> None:
    config = lm("LlamaForCausalLM", "llama", tie_word_embeddings=True)
    assert vocabulary(walk(*LLAMA, config=config)) == {LLAMA: BOTH}
    assert vocabulary(walk(*LLAMA, config=config, compare=True)) == APART


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["lm_head.bias:100", "lm_head.weight", "model.norm.weight:16"], "model.embed_tokens.weight"),
        (["lm_head.weight", "transformer.h.0.x.weight:16x48"], "transformer.wte.weight"),
        (["lm_head.weight"], "model.embed_tokens.weight"),
    ],
)
def test_the_lookup_of_a_stored_head(lines: list[str], name: str) -> None:
    graph = walk(*lines, config=lm("LlamaForCausalLM"))
    assert vocabulary(graph) == {("lm_head.weight", name): BOTH}
    assert graph.input == "lm_head.weight"


def test_copies_of_another_shape_or_dtype_are_never_tied() -> None:
    config = lm("LlamaForCausalLM", "llama", tie_word_embeddings=True)
    assert len(vocabulary(walk(LLAMA[0], f"{LLAMA[1]}:100x8", config=config))) == 2
    tensors = [Stored(name, dtype, (V, D), name) for name, dtype in zip(LLAMA, ("F32", "BF16"), strict=True)]
    assert len(vocabulary(walk_names(tensors, config=config, source="a test"))) == 2


def test_all_four_copies_of_t5_are_one_table_with_four_files() -> None:
    lines = [f"{name}=same" for name in (*T5, "lm_head.weight")]
    graph = walk(*lines, config=lm("T5ForConditionalGeneration", "t5"), compare=True)
    assert vocabulary(graph) == {(*T5, "lm_head.weight"): BOTH}
    assert {name for name, _ in graph.tables[0].files} == {*T5, "lm_head.weight"}


def test_a_decoder_with_other_values_is_not_tied() -> None:
    lines = [f"{T5[0]}=a", f"{T5[1]}=a", f"{T5[2]}=b", "lm_head.weight=b"]
    graph = walk(*lines, config=lm("T5ForConditionalGeneration", "t5"), compare=True)
    assert vocabulary(graph) == {T5[:2]: ("input",), (T5[2], "lm_head.weight"): BOTH}
    assert graph.input == "shared.weight"


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (None, None),
        ({}, True),
        ({"transformers_version": "4.51.0"}, True),
        ({"transformers_version": "5.23.0"}, None),
        ({"tie_word_embeddings": False, "transformers_version": "4.51.0"}, False),
        ({"tie_word_embeddings": "no", "text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, None),
        ({"thinker_config": {"text_config": {"tie_word_embeddings": True}}}, True),
        ({"tie_word_embeddings": False, "vision_config": {"tie_word_embeddings": True}}, False),
        ({"tie_word_embeddings": [], "text_config": 3}, True),
    ],
)
def test_tie_flag(config: dict[str, Any] | None, flag: bool | None) -> None:
    assert read_tie_flag(config) is flag


def test_vocabulary_sizes_are_those_of_tokens() -> None:
    config = {"vocab_size": 9, "type_vocab_size": 2, "composer_vocab_size": 3, "text_config": {"vocab_size": 8}}
    assert vocabulary_sizes(config | {"n_words": True, "src_vocab_size": -1}) == [9, 8]
    assert vocabulary_sizes(None) == []


def test_sites_biases_and_vectors() -> None:
    bert = KNOWN["BERT"]
    graph = walk(*bert[0], config=bert[1])
    assert [(s.module, s.role, s.bias) for s in graph.tables[0].sites] == [
        ("bert.embeddings.word_embeddings", "input", None),
        ("cls.predictions.decoder", "output", "cls.predictions.bias"),
    ]
    assert [v.vectors for v in graph.vocabularies] == [("cls.predictions.bias",)]
    phi = walk(*KNOWN["Phi"][0], config=KNOWN["Phi"][1])
    assert [s.bias for t in phi.tables for s in t.sites] == [None, "lm_head.bias"]
    assert [(v.tables, v.vectors) for v in phi.vocabularies] == [(LLAMA, ("lm_head.bias",))]
    bart = walk(*KNOWN["BART"][0], config=KNOWN["BART"][1])
    assert bart.vocabularies[0].vectors == ("final_logits_bias",)


def test_vocabularies_are_grouped_by_size() -> None:
    gemma = KNOWN["Gemma 3n, with a smaller vocabulary for its layers"]
    graph = walk(*gemma[0], config=gemma[1])
    assert [(v.name, v.size) for v in graph.vocabularies] == [
        ("model.embed_tokens.weight", V),
        ("model.embed_tokens_per_layer.weight", 80),
    ]


POSITIONS = (
    "wpe",
    "embeddings.position_embeddings",
    "embeddings.token_type_embeddings",
    "model.decoder.embed_positions",
    "vision_tower.embeddings.position_embedding",
    "x.relative_attention_bias",
    "pos.embedding",
    "time_embed.embedding",
    "speaker.embed_tokens",
)


@pytest.mark.parametrize("module", POSITIONS)
@pytest.mark.parametrize("config", [None, lm("LlamaForCausalLM", "llama")], ids=["state dict", "checkpoint"])
def test_positions_and_types_are_never_a_vocabulary(module: str, config: dict[str, Any] | None) -> None:
    """Even if they have as many rows as the vocabulary."""
    graph = walk("model.embed_tokens.weight", f"{module}.weight", config=config)
    table = graph.find(f"{module}.weight")
    assert table is None or table.kind == "unknown"
    assert [v.tables for v in graph.vocabularies] == [("model.embed_tokens.weight",)]


def test_state_dict_of_a_module_ties_by_memory() -> None:
    graph = walk("model.embed_tokens.weight@1", "model.norm.weight:16", "lm_head.weight@1", config=None)
    assert vocabulary(graph) == {LLAMA: BOTH}
    graph = walk("wte.weight@1", "head.weight:16x100@1", config=None)
    table = graph.table("head.weight")
    assert (table.names, table.transposed) == (("wte.weight", "head.weight"), frozenset({"head.weight"}))
    assert [s.transposed for s in table.sites] == [False, True]


@pytest.mark.parametrize("first", [0, 1])
def test_a_square_head_that_is_stored_transposed(first: int) -> None:
    """Their order in the state dict decides which of the two is transposed. What matters is that they differ."""
    tensors = [Stored(name, "F32", (D, D), "g", transposed=i != first) for i, name in enumerate(LLAMA)]
    graph = walk_names(tensors[::-1] if first else tensors, config=None, source="a test")
    assert graph.table(LLAMA[1]).names == LLAMA
    assert graph.tables[0].transposed == frozenset(LLAMA[1:])


def test_positions_that_share_memory_stay_unknown() -> None:
    graph = walk("encoder.pos.weight@1", "decoder.pos.weight@1", config=None)
    assert [(t.aliases, t.kind) for t in graph.tables] == [(("decoder.pos.weight",), "unknown")]


def test_state_dict_from_a_file_ties_by_bytes() -> None:
    assert vocabulary(walk(*LLAMA, config=None)) == APART
    assert vocabulary(walk(*LLAMA, config=None, compare=True)) == APART
    assert vocabulary(walk(*[f"{n}=same" for n in LLAMA], config=None, compare=True)) == {LLAMA: BOTH}
    assert vocabulary(walk(LLAMA[0], config=None, compare=True)) == {LLAMA[:1]: ("input",)}
    bert = [line for line in KNOWN["BERT"][0] if "transform" not in line]
    names = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    assert vocabulary(walk(*bert, config=None, compare=True)) == {names[:1]: ("input",)}
    assert vocabulary(walk(*KNOWN["BERT"][0], config=None, compare=True)) == {names: BOTH}


def test_plain_module_is_unknown_until_its_head_shares_it() -> None:
    graph = walk("embedding.weight", "pos.weight:64x16", "head.weight", config=None, compare=True)
    assert [(t.name, t.kind) for t in graph.tables] == [
        ("embedding.weight", "unknown"),
        ("pos.weight", "unknown"),
        ("head.weight", "unknown"),
    ]
    assert graph.input is None
    names = ("embedding.weight", "head.weight")
    tied = walk("embedding.weight=a", "head.weight=a", config=None, compare=True)
    assert vocabulary(tied) == {names: BOTH}
    assert tied.input == "embedding.weight"
    assert vocabulary(walk("embedding.weight@1", "out.weight@1", config=None)) == {
        ("embedding.weight", "out.weight"): BOTH
    }


def test_quantised_and_odd_tensors_are_not_tables() -> None:
    tensors = [
        Stored("model.embed_tokens.weight", "F32", (V, D), "a"),
        Stored("model.layers.0.embed_proj.weight", "I8", (D, D), "b"),
        Stored("model.embed_tokens.scales", "F32", (V, 1), "c"),
        Stored("embed_tokens.weight", "F32", (V,), "d"),
        Stored("weight", "F32", (V, D), "e"),
    ]
    graph = walk_names(tensors, config=None, source="a test")
    assert [t.name for t in graph.tables] == ["model.embed_tokens.weight"]


def test_a_plugin_can_add_an_architecture() -> None:
    lines = ["net.embed_tokens.weight", "net.twin.x:16"]
    more = {"mine": Layout(head="out.unembed", ties={"twin.embed_tokens": "embed_tokens"})}
    graph = walk(*lines, config=lm("MineForCausalLM", "mine"), architectures=more)
    assert vocabulary(graph) == {
        ("net.embed_tokens.weight", "net.twin.embed_tokens.weight", "out.unembed.weight"): BOTH
    }
    by_class = walk(*lines, config=lm("MineForCausalLM"), architectures={"MineForCausalLM": Layout(head="")})
    assert vocabulary(by_class) == {("net.embed_tokens.weight",): ("input",)}


# --- the sweep -------------------------------------------------------------------------------------------------------

CLAIMED = {
    name: "its config says that the head is tied, but its class does not tie it: only the bytes tell"
    for name in ("BigBirdPegasusForCausalLM", "LukeForMaskedLM", "Pop2PianoForConditionalGeneration")
}
"""Models -> why headers and config mislead. The graph with bytes is right."""

DIFFERENT = {
    "DiaForConditionalGeneration": "its class declares no input embedding, so in memory its text table is unknown",
    "Molmo2ForConditionalGeneration": "its table is stored in two parts, which loading concatenates",
    "PerceiverForMaskedLM": "get_input_embeddings returns latents, not a lookup",
}
"""Models -> why the two walkers differ, with or without bytes."""


def key(graph: EmbeddingGraph) -> list[tuple[Any, ...]]:
    """Return what does not depend on names of a graph's vocabulary tables."""

    def of(table: Table) -> tuple[Any, ...]:
        return len(table.names), table.shape, table.dtype, table.roles, table.name == graph.input

    return sorted(of(table) for table in graph.tables if table.kind == "vocabulary")


def names(graph: EmbeddingGraph) -> set[frozenset[str]]:
    return {frozenset(t.names) for t in graph.tables if t.kind == "vocabulary"}


def _sweep() -> list[Any]:
    try:
        from tests.support import zoo
    except ImportError:  # without transformers; the tests above do not need it
        return []
    return list(zoo.cases())


@pytest.mark.sweep
@pytest.mark.parametrize("case", _sweep(), ids=lambda case: case.name)
def test_names_agree_with_modules(case: Any, tmp_path: Path) -> None:
    from embedsurgery.graph.from_modules import walk_module
    from embedsurgery.stores.checkpoint import open_checkpoint
    from embedsurgery.stores.shards import ShardStore
    from tests.support import zoo

    model = zoo.build(case)
    truth = walk_module(model)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    by_names = walk_names(checkpoint.stored_tensors(), config=checkpoint.config, source=str(tmp_path))
    by_bytes = ShardStore(checkpoint).graph
    assert (key(by_bytes) == key(truth)) == (case.name not in DIFFERENT)
    assert (key(by_names) == key(truth)) == (case.name not in DIFFERENT | CLAIMED)
    in_memory = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for graph in (by_bytes, by_names):
        renamed = any(name not in in_memory for table in graph.tables for name, _ in table.files)
        if key(graph) == key(truth) and not renamed:
            assert names(graph) == names(truth), json.dumps(checkpoint.config.get("architectures"))


@pytest.mark.sweep
def test_the_exceptions_are_cases() -> None:
    assert {*DIFFERENT, *CLAIMED} <= {case.name for case in _sweep()}
