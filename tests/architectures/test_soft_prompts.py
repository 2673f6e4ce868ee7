"""Soft prompts on every architecture: virtual tokens with the vectors of real tokens give the same logits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import embedsurgery as es
from tests.support import zoo

N = 3
OWN_MASKS = {
    "IdeficsForVisionText2Text",
    "UdopForConditionalGeneration",
    "VoxtralRealtimeForConditionalGeneration",
    "KyutaiSpeechToTextForConditionalGeneration",
    "Kosmos2ForConditionalGeneration",
}
"""Other inputs of these have an entry per token of the text, so the reference with a longer text fails."""

LOUD = {"DeepseekV4ForCausalLM", "NeoMMEForMaskedLM", "FalconMambaForCausalLM"}
"""These use ids outside the lookup, or another kind of cache: their own code fails, and never gives wrong numbers."""


@pytest.mark.sweep
@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_a_prompt_is_what_its_tokens_would_be(case: zoo.Case) -> None:
    model = zoo.build(case)
    inputs = zoo.inputs(case, model)
    plain = copy.deepcopy(model)
    tokens = torch.randint(
        zoo.FIRST_ORDINARY_ID, zoo.LAST_ORDINARY_ID, (N,), generator=torch.Generator().manual_seed(9)
    )
    try:
        att = es.attach(model, es.SoftPromptConfig(N))
    except (es.errors.UnsupportedError, es.errors.TableError, es.errors.BaseMismatchError) as error:
        pytest.skip(str(error))
    if case.name in LOUD:
        pytest.skip("the model's own code fails")
    stack = att._prompts.stacks[0]
    key = "decoder_input_ids" if stack.name == "decoder" and "decoder_input_ids" in inputs else "input_ids"
    if key not in inputs or case.name in OWN_MASKS:
        pytest.skip("does not accept ids here, or other inputs depend on the number of tokens")
    longer = {**inputs, key: torch.cat([tokens.expand(2, -1), inputs[key]], 1)}
    mask = "attention_mask" if key == "input_ids" else "decoder_attention_mask"
    for name, value in ((mask, 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name].new_full((2, N), value), inputs[name]], 1)
    with torch.no_grad(), warnings.catch_warnings():
        vectors = plain.get_submodule(stack.lookups[0])(tokens)
        next(att.parameters()).copy_(vectors if isinstance(vectors, torch.Tensor) else vectors[0])
        wanted, found = zoo.logits(plain(**longer)), zoo.logits(model(**inputs))
        base = zoo.logits(plain(**inputs))
    wanted = wanted[:, N:] if wanted.shape[1] == found.shape[1] + N else wanted
    assert found.shape == wanted.shape == base.shape
    assert (found - wanted).abs().max() < 1e-4
    assert (found - base).abs().max() > 1e-3


HASHED = {"ReformerForMaskedLM"}
"""What a token attends to depends on the length of its batch."""

OTHER_SIZES = {
    "Florence2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "ReformerModelWithLMHead",
    "SmolVLMForConditionalGeneration",
}
"""These do not accept a shorter text with the other inputs of this batch."""


def padded_case(case: zoo.Case, model: Any, key: str, side: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return inputs with two padding tokens in the first sample, inputs of that sample alone, and its tokens."""
    inputs = zoo.inputs(case, model)
    ids, mask = inputs[key].clone(), torch.ones_like(inputs[key])
    own = inputs[key][0, :-2]
    pad = getattr(model.config, "pad_token_id", None)
    fill = torch.full((2,), pad if isinstance(pad, int) and pad >= 0 else 0)
    ids[0] = torch.cat([fill, own] if side == "left" else [own, fill])
    mask[0] = torch.cat([mask.new_zeros(2), mask[0, 2:]] if side == "left" else [mask[0, 2:], mask.new_zeros(2)])
    name = "attention_mask" if key == "input_ids" else "decoder_attention_mask"
    one = {k: v[:1] if isinstance(v, torch.Tensor) and v.shape[:1] == (2,) else v for k, v in inputs.items()}
    return {**inputs, key: ids, name: mask}, one, own


def alone(plain: Any, one: dict[str, Any], key: str, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a plain model for tokens without padding."""
    mask = "attention_mask" if key == "input_ids" else "decoder_attention_mask"
    given = {**one, key: tokens[None], mask: torch.ones_like(tokens)[None]}
    given |= {name: torch.zeros_like(tokens)[None] for name in ("token_type_ids", "mm_token_type_ids") if name in one}
    return zoo.logits(plain(**given))[0]


@pytest.mark.sweep
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_padding_has_no_effect_unless_it_has_without_a_prompt(case: zoo.Case, side: str) -> None:
    model = zoo.build(case)
    plain = copy.deepcopy(model)
    tokens = torch.randint(
        zoo.FIRST_ORDINARY_ID, zoo.LAST_ORDINARY_ID, (N,), generator=torch.Generator().manual_seed(9)
    )
    try:
        att = es.attach(model, es.SoftPromptConfig(N))
    except (es.errors.UnsupportedError, es.errors.TableError, es.errors.BaseMismatchError) as error:
        pytest.skip(str(error))
    stack = att._prompts.stacks[0]
    inputs = zoo.inputs(case, plain)
    key = "decoder_input_ids" if stack.name == "decoder" and "decoder_input_ids" in inputs else "input_ids"
    if case.name in LOUD | OWN_MASKS | HASHED | OTHER_SIZES or key not in inputs or len(inputs[key]) != 2:
        pytest.skip("does not accept ids here, or other inputs depend on the number of tokens")
    given, one, own = padded_case(case, model, key, side)

    def of_first(logits: torch.Tensor) -> torch.Tensor:
        by_token = logits.dim() == 3 and logits.shape[1] == len(own) + 2
        return logits[0] if not by_token else logits[0, 2:] if side == "left" else logits[0, :-2]

    with torch.no_grad(), warnings.catch_warnings():
        vectors = plain.get_submodule(stack.lookups[0])(tokens)
        next(att.parameters()).copy_(vectors)
        base, wanted = alone(plain, one, key, own), alone(plain, one, key, torch.cat([tokens, own]))
        if (of_first(zoo.logits(plain(**given))) - base).abs().max() > 1e-4:
            pytest.skip("padding matters to this model without a prompt")
        for options in ({}, {"use_cache": False}):
            found = of_first(zoo.logits(model(**given, **options)))
            wanted = wanted[N:] if wanted.shape[0] == found.shape[0] + N else wanted
            assert (found - wanted).abs().max() < 1e-4
