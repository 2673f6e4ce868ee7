"""Growing the vocabulary of a tiny model of every architecture, against ``resize_token_embeddings`` as the oracle."""

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

pytestmark = pytest.mark.sweep

N = 8

REFUSED = {
    "BltForCausalLM": "a patcher judges the text by how likely it finds the next of all tokens",
    "CpmAntForCausalLM": "rows of prompts follow the tokens', at places that config.vocab_size gives",
    "DeepseekV4ForCausalLM": "its first layers choose experts by a table of token ids",
    "DoryForCausalLM": "its head scales each token's logit by a number of its own",
    "Gemma3nForConditionalGeneration": "every id from its audio's vocab_offset on is taken for a sound",
    "IBertForMaskedLM": "it keeps a second table for integers",
    "IBertForMaskedLM[quant]": "it keeps a second table for integers",
    **dict.fromkeys(
        (
            "Inkling2ForCausalLM",
            "Inkling2ForConditionalGeneration",
            "Inkling2LoopForCausalLM",
            "Inkling2LoopForConditionalGeneration",
        ),
        "its head gives the first unpadded_vocab_size tokens",
    ),
    "KyutaiSpeechToTextForConditionalGeneration": "rows of audio codes follow the tokens'",
    "Molmo2ForConditionalGeneration": "rows of additional tokens follow, which are a tensor of their own on disk",
    "MoshiForCausalLM": "the row behind the tokens' starts a text",
}
"""Where growing is refused by name, and why."""

NO_INPUT = ("DiaForConditionalGeneration", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM", "PerceiverForMaskedLM")
"""Models without a token table that the whole looks its input up in."""

DIFFERENT = {
    "EsmForMaskedLM": "transformers leaves the head's bias at V, so that the forward fails",
    "FSMTForConditionalGeneration": "transformers grows source and target together, and counts only the target",
    "Gemma3nForCausalLM": "transformers grows the per-layer table too, which has a smaller vocabulary of its own",
    "MllamaForCausalLM": "transformers makes the head as long as the input, which has 8 rows more; saved, that cannot "
    "be loaded",
    "MllamaForConditionalGeneration": "as MllamaForCausalLM",
    "NemotronH_Omni_Reasoning_V3": "transformers does not find the head and leaves it at V",
    "ReformerForMaskedLM": "transformers drops the head's bias, or (from 5.24 on) ties the head's two",
    "ReformerModelWithLMHead": "as ReformerForMaskedLM",
}
"""Where the shapes or configs are not those that transformers gives, and why."""

NO_ORACLE = (
    "EncoderDecoderModel",
    "PPFormulaNetForConditionalGeneration",
    "SpeechEncoderDecoderModel",
    "VisionEncoderDecoderModel",
    "xLSTMForCausalLM",
)
"""What transformers cannot resize, and embedsurgery can."""

CASES = [pytest.param(case, id=case.name) for case in zoo.cases()]


def growth(graph: es.EmbeddingGraph) -> tuple[Vocabulary, Grow]:
    """New rows for everything in the main vocabulary, the same in memory and on disk, where names may differ."""
    vocabulary = graph.vocabulary_of(graph.main_input())

    def values(seed: int, *shape: int) -> RawArray:
        return to_raw(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3)

    tables = map(graph.table, vocabulary.tables)
    rows = {table.name: values(int("input" in table.roles), N, table.shape[1]) for table in tables}
    return vocabulary, Grow(vocabulary.name, N, rows, {name: values(2, N) for name in vocabulary.vectors})


def configs(model: nn.Module) -> dict[str, int]:
    """Every integer in every config of a model."""
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
    """Logits, with one id of some inputs replaced."""
    inputs = copy.deepcopy(zoo.inputs(case, model))
    for name, index in ids.items():
        if name in inputs:
            inputs[name][0, 1] = index
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return zoo.logits(model(**inputs))


def resized(case: zoo.Case, size: int) -> nn.Module:
    """What transformers makes of the same model."""
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
        with pytest.raises(es.errors.UnsupportedError, match="cannot grow"):
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
        agrees_with_transformers(case, model, resized(case, size + N), kept[2], kept[1])
    apply(undo, module_store(model))
    assert (state(model), attributes(model), configs(model), ties(model), shapes(model)) == kept


def agrees_with_transformers(
    case: zoo.Case, model: nn.Module, theirs: nn.Module, before: dict[str, int], counted: dict[str, int]
) -> None:
    """The same tensors and ties; the same sizes in configs and modules, or more that transformers leaves behind."""
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
    """Grown on disk and loaded by transformers: the bits of the model grown in memory, saved and loaded again."""
    model = zoo.build(case)
    graph = es.walk(model)
    if case.name in NO_INPUT:
        return
    model.save_pretrained(tmp_path / "base")
    before, store = contents(tmp_path / "base"), ShardStore.open(tmp_path / "base")
    if case.name in REFUSED:
        if store.graph.input is None:  # Molmo2's table is two tensors there
            return
        with pytest.raises(es.errors.UnsupportedError, match="cannot grow"):
            apply(Plan((growth(store.graph)[1],)), store)
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
