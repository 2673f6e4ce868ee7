"""Soft prompts on every architecture: virtual tokens with the vectors of real ones give what the real ones give."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import embedsurgery as es
from tests import zoo

N = 3
OWN_MASKS = {"IdeficsForVisionText2Text", "UdopForConditionalGeneration", "VoxtralRealtimeForConditionalGeneration",
             "KyutaiSpeechToTextForConditionalGeneration", "Kosmos2ForConditionalGeneration"}  # fmt: skip
"""Their further inputs have an entry for each token of the text, so that the longer text of the reference fails."""

LOUD = {"DeepseekV4ForCausalLM", "NeoMMEForMaskedLM", "FalconMambaForCausalLM"}
"""What looks ids up by itself, or has another kind of memory: an error in its own code, never a wrong number."""


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
        pytest.skip("fails in its own code")
    stack = att._prompts.stacks[0]
    key = "decoder_input_ids" if stack.name == "decoder" and "decoder_input_ids" in inputs else "input_ids"
    if key not in inputs or case.name in OWN_MASKS:
        pytest.skip("takes no ids here, or something else that goes by token")
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
