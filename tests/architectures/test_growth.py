"""Growing the vocabulary of a tiny model of every architecture, compared with ``resize_token_embeddings``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import embedsurgery as es
from embedsurgery.graph import Vocabulary
from embedsurgery.plan import Grow, Plan
from embedsurgery.stores.apply import apply
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.convert import to_raw
from embedsurgery.tensors.raw import RawArray
from tests.support import zoo
from tests.support.comparing import bits, contents
from tests.support.errors import raises

pytestmark = pytest.mark.sweep

N = 8

REFUSED = {
    "BltForCausalLM": "patcher_config",  # a second model divides the text by the probability of its next token
    "CpmAntForCausalLM": "1121 rows",  # rows of prompts follow the tokens', at ids that config.vocab_size determines
    "DeepseekV4ForCausalLM": "tid2eid, I64",  # its first layers choose experts by token id
    "DoryForCausalLM": "lm_head.logit_scale",  # its head scales each token's logit
    "Gemma3nForConditionalGeneration": "_config.vocab_offset",  # all ids from the offset on are images or sounds
    "IBertForMaskedLM": "word_embeddings.weight_integer",  # a second table of integers
    "IBertForMaskedLM[quant]": "word_embeddings.weight_integer",
    **dict.fromkeys(
        (
            "Inkling2ForCausalLM",
            "Inkling2ForConditionalGeneration",
            "Inkling2LoopForCausalLM",
            "Inkling2LoopForConditionalGeneration",
        ),
        "unpadded_vocab_size",  # its head returns logits of so many tokens
    ),
    "KyutaiSpeechToTextForConditionalGeneration": "131 rows",  # rows of audio codes follow the tokens'
    "Molmo2ForConditionalGeneration": "text_config.additional_vocab_size",  # these rows are another tensor on disk
    "MoshiForCausalLM": "98 rows",  # the row after the tokens' begins a text
}
"""Models that are refused -> what prevents them from growing, in the error."""

NO_INPUT = ("DiaForConditionalGeneration", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM", "PerceiverForMaskedLM")
"""Models without a table for their input ids."""

DIFFERENT = {
    "EsmForMaskedLM": "transformers does not resize the head's bias, and the forward fails",
    "FSMTForConditionalGeneration": "transformers grows source and target together, and updates only the target's size",
    "Gemma3nForCausalLM": "transformers grows the per-layer table too, which has another, smaller vocabulary",
    "MllamaForCausalLM": "transformers makes the head as long as the input, 8 rows longer; that file cannot be loaded",
    "MllamaForConditionalGeneration": "as MllamaForCausalLM",
    "NemotronH_Omni_Reasoning_V3": "transformers does not find the head, and does not resize it",
    "ReformerForMaskedLM": "transformers drops the head's bias, or (from 5.24 on) ties the head's two",
    "ReformerModelWithLMHead": "as ReformerForMaskedLM",
}
"""Models -> why the shapes or configs differ from transformers'."""

NO_ORACLE = (
    "EncoderDecoderModel",
    "PPFormulaNetForConditionalGeneration",
    "SpeechEncoderDecoderModel",
    "VisionEncoderDecoderModel",
    "xLSTMForCausalLM",
)
"""Models that transformers cannot resize, and embedsurgery can."""

CASES = [pytest.param(case, id=case.name) for case in zoo.cases()]


def growth(graph: es.EmbeddingGraph) -> tuple[Vocabulary, Grow]:
    """Return new rows for the main vocabulary: equal in memory and on disk, where names may differ."""
    vocabulary = graph.vocabulary_of(graph.main_input())

    def values(seed: int, *shape: int) -> RawArray:
        return to_raw(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3)

    tables = map(graph.table, vocabulary.tables)
    rows = {table.name: values(int("input" in table.roles), N, table.shape[1]) for table in tables}
    return vocabulary, Grow(vocabulary.name, N, rows, {name: values(2, N) for name in vocabulary.vectors})


def configs(model: nn.Module) -> dict[str, int]:
    """Return every integer in every config of a model."""
    found: dict[str, int] = {}

    def walk(part: Any, path: str) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                walk(value, f"{path}.{key}")
            elif type(value) is int:
                found[f"{path}.{key}"] = value

    for path, module in model.named_modules():
        config = vars(module).get("config")
        if hasattr(config, "to_dict"):
            walk(config.to_dict(), path)
    return found


def attributes(model: nn.Module) -> dict[str, int]:
    return {f"{path}.{k}": v for path, m in model.named_modules() for k, v in vars(m).items() if type(v) is int}


def shapes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (tensor.shape, tensor.dtype) for name, tensor in named}


def ties(model: nn.Module) -> set[frozenset[str]]:
    found: dict[tuple[int, int], set[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if tensor.numel():
            found.setdefault((tensor.data_ptr(), tensor.numel()), set()).add(name)
    return {frozenset(names) for names in found.values() if len(names) > 1}


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def forward(case: zoo.Case, model: nn.Module, **ids: int) -> torch.Tensor:
    """Return the logits, with one id of some inputs replaced."""
    inputs = copy.deepcopy(zoo.inputs(case, model))
    for name, index in ids.items():
        if name in inputs:
            inputs[name][0, 1] = index
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return zoo.logits(model(**inputs))


def resized(case: zoo.Case, size: int) -> nn.Module:
    """Return the same model, resized by transformers."""
    model = zoo.build(case)
    options = {} if "MobileBert" in case.name else {"mean_resizing": False}
    model.resize_token_embeddings(size, **options)
    return model


@pytest.mark.parametrize("case", CASES)
def test_in_memory(case: zoo.Case) -> None:
    model = zoo.build(case)
    graph = es.walk(model)
    if case.name in NO_INPUT:
        assert graph.input is None
        return
    base = forward(case, model)
    kept = state(model), attributes(model), configs(model), ties(model), shapes(model)
    vocabulary, edit = growth(graph)
    if case.name in REFUSED:
        with raises(es.errors.UnsupportedError, where=vocabulary.name, found=REFUSED[case.name]):
            apply(Plan((edit,)), module_store(model))
        assert (state(model), attributes(model), configs(model), ties(model), shapes(model)) == kept
        return
    undo = apply(Plan((edit,)), module_store(model))
    size, heads = vocabulary.size, base.shape[-1]
    after = forward(case, model)
    assert torch.equal(after[..., :heads], base)
    one_language = "FSMT" not in case.name
    assert after.shape[-1] == heads + N * one_language
    new = forward(case, model, input_ids=size + 3, **({"decoder_input_ids": heads + 2} if one_language else {}))
    assert torch.isfinite(new).all()
    assert ties(model) == kept[3]
    if case.name in NO_ORACLE:
        with pytest.raises((NotImplementedError, AttributeError)):
            resized(case, size + N)
    else:
        check_against_transformers(case, model, resized(case, size + N), kept[2], kept[1])
    apply(undo, module_store(model))
    assert (state(model), attributes(model), configs(model), ties(model), shapes(model)) == kept


def check_against_transformers(
    case: zoo.Case, model: nn.Module, theirs: nn.Module, before: dict[str, int], counted: dict[str, int]
) -> None:
    """Check for equal tensors and ties, and for the sizes that transformers updates in configs and modules."""
    differ = (
        shapes(theirs) != shapes(model)
        or ties(theirs) != ties(model)
        or any(configs(model)[key] != value for key, value in configs(theirs).items() if value != before[key])
    )
    assert differ == (case.name in DIFFERENT)
    if differ:
        return
    for ours, others, old in (
        (configs(model), configs(theirs), before),
        (attributes(model), attributes(theirs), counted),
    ):
        size = {value for key, value in others.items() if old.get(key) not in (None, value)}
        assert all(ours[key] == value for key, value in others.items() if old.get(key) not in (None, value))
        assert {value for key, value in ours.items() if value != old[key]} <= size


@pytest.mark.parametrize("case", CASES)
def test_on_disk(case: zoo.Case, tmp_path: Path) -> None:
    """A checkpoint grown on disk loads with the bits of the model that was grown in memory, saved and loaded."""
    model = zoo.build(case)
    graph = es.walk(model)
    if case.name in NO_INPUT:
        return
    model.save_pretrained(tmp_path / "base")
    before, store = contents(tmp_path / "base"), ShardStore.open(tmp_path / "base")
    if case.name in REFUSED:
        if store.graph.input is None:  # Molmo2's table is stored as two tensors
            return
        vocabulary, edit = growth(store.graph)
        with raises(es.errors.UnsupportedError, where=vocabulary.name, found=REFUSED[case.name]):
            apply(Plan((edit,)), store)
        assert contents(tmp_path / "base") == before
        return
    _, edit = growth(graph)
    _, stored = growth(store.graph)
    undo = apply(Plan((stored,)), store)
    grown = contents(tmp_path / "base")
    apply(Plan((edit,)), module_store(model))
    assert len(stored.rows) + len(stored.vectors) == len(edit.rows) + len(edit.vectors)
    model.save_pretrained(tmp_path / "memory")
    loaded, info = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    again, expected = type(model).from_pretrained(tmp_path / "memory", output_loading_info=True)
    assert not info["mismatched_keys"]
    assert info["missing_keys"] == expected["missing_keys"]
    assert configs(loaded) == configs(again)
    on_disk, in_memory = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("base", "memory"))
    assert on_disk == in_memory
    found, right = state(loaded), state(again)
    assert {name for name in right if found[name] != right[name]} == set()
    assert {name for name in right if right[name] != state(model)[name]} <= set(info["missing_keys"])
    redo = apply(undo, ShardStore.open(tmp_path / "base"))
    assert contents(tmp_path / "base") == before
    apply(redo, ShardStore.open(tmp_path / "base"))
    assert contents(tmp_path / "base") == grown


def test_the_exceptions_are_cases() -> None:
    assert {*REFUSED, *NO_INPUT, *DIFFERENT, *NO_ORACLE} <= {case.name for case in zoo.cases()}
