"""Masks and positions of every kind with a soft prompt: each sample computes what it does alone, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import UnsupportedError
from tests.support.errors import raises
from tests.support.prompt_models import CACHE, TWO, cache_in, padded, rows, tiny, unpadded
from tests.support.prompted import N, alone, close, embedded, prompted, randomise, shared, vectors

LENGTHS = (7, 3, 5, 1)


def of_kind(seen: torch.Tensor, form: str) -> torch.Tensor:
    """Return a mask as bools, or as floats that are added to the scores."""
    return seen if form == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["bert", "bert-cls", "roberta-tok", "t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("each", [False, True], ids=["one row", "a row for each token"])
@pytest.mark.parametrize("form", ["bool", "float"])
def test_encoders_take_masks_of_four_axes(kind: str, side: str, each: bool, form: str) -> None:
    """Samples of one token are among them, whose mask does not tell whether it is causal."""
    if each and kind in TWO:
        pytest.skip("its cross-attention mask has other rows")
    model, att, plain = shared(kind)
    for samples in (rows(*LENGTHS), rows(1)):
        ids, mask = padded(samples, side)
        seen = mask.bool()[:, None, None, :]
        seen = seen.expand(-1, 1, ids.shape[1], -1) if each else seen
        one: dict[str, Any] = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if kind in TWO else {}
        more = {name: ids.expand(len(samples), -1) for name, ids in one.items()}
        with torch.no_grad():
            out = model(ids, attention_mask=of_kind(seen, form), **more)
        found = out.last_hidden_state if kind == "bert" else out.logits
        for number, sample in enumerate(samples):
            wanted = alone(plain, vectors(att), sample, **one)
            expected = wanted.last_hidden_state[0] if kind == "bert" else wanted.logits[0]
            if kind in ("bert", "roberta-tok"):
                close(unpadded(found, samples, side)[number], expected[N:])
            else:
                close(found[number], expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["bool", "float"])
def test_a_prefix_mask_hides_the_rest_from_the_prompt(kind: str, side: str, form: str) -> None:
    """The first two tokens attend to each other: the prompt belongs to them, and does not attend to the others."""
    model, att, plain = shared(kind)
    samples = rows(7, 3, 5)
    ids, mask = padded(samples, side)
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(3, 1, -1, -1).clone()
    for number, sample in enumerate(samples):
        begin = length - len(sample) if side == "left" else 0
        seen[number, :, begin : begin + 2, begin : begin + 2] = True
    seen &= mask.bool()[:, None, None, :]
    with torch.no_grad():
        logits = model(ids, attention_mask=of_kind(seen, form), use_cache=False).logits
    for found, sample in zip(unpadded(logits, samples, side), samples, strict=True):
        whole = torch.ones(N + len(sample), N + len(sample), dtype=torch.bool).tril()
        whole[: N + 2, : N + 2] = True
        close(found, alone(plain, vectors(att), sample, attention_mask=whole[None, None]).logits[0, N:])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_packed_texts_with_a_mask_that_separates_them(kind: str) -> None:
    """Each attends to the prompt, whose positions come directly before its own."""
    model, att, plain = shared(kind)
    samples = rows(4, 3)
    mask = torch.block_diag(*(torch.ones(len(s), len(s)) for s in samples)).bool().tril()[None, None]
    positions = torch.cat([torch.arange(len(s)) for s in samples])[None]
    with torch.no_grad():
        logits = model(torch.cat(samples)[None], attention_mask=mask, position_ids=positions).logits[0]
    for found, sample in zip(logits.split([4, 3]), samples, strict=True):
        close(found, alone(plain, vectors(att), sample).logits[0, N:])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3", "bert-mlm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_hole_in_the_text(kind: str, side: str) -> None:
    """A hidden token inside a text. The model decides which positions follow it."""
    model, att, plain = shared(kind)
    samples = rows(7, 3, 5)
    ids, mask = padded(samples, side)
    mask[0, 3] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    pairs = zip(unpadded(logits, samples, side), unpadded(mask, samples, side), samples, strict=True)
    for found, own, sample in pairs:
        behind = torch.cat([own.new_ones(N), own])[None]
        wanted = alone(plain, vectors(att), sample, attention_mask=behind).logits[0, N:]
        close(found[own.bool()], wanted[own.bool()])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(7, 3, 5), (6, 6, 6)])
def test_types_that_are_looked_up_in_the_same_table_get_no_prompt(side: str, lengths: tuple[int, ...]) -> None:
    """GPT-2 looks token types up in the table of its tokens. A virtual token's type is 0."""
    model, att, plain = shared("gpt2")
    samples = rows(*lengths)
    ids, mask = padded(samples, side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, token_type_ids=torch.full_like(ids, 9)).logits
    for found, sample in zip(unpadded(logits, samples, side), samples, strict=True):
        types = torch.cat([torch.zeros(N, dtype=torch.int64), torch.full_like(sample, 9)])[None]
        close(found, alone(plain, vectors(att), sample, token_type_ids=types).logits[0, N:])


def _cache(model: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("given", [False, True], ids=["its own cache", "a given cache"])
def test_a_decoder_continues_from_a_batch_with_left_padding(kind: str, given: bool) -> None:
    """Or is refused: BART counts positions from the left edge, also without a prompt."""
    model, att = prompted(kind, submodules="decoder")
    plain = tiny(kind)
    samples, token = rows(7, 3, 5), torch.tensor([[9], [10], [11]])
    ids, mask = padded(samples, "left")
    sound = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(3))
    encoded = {"input_features": sound} if kind == "whisper" else {"input_ids": torch.stack(rows(4, 4, 4, seed=9))}

    def expected(number: int, sample: torch.Tensor) -> torch.Tensor:
        embeds = torch.cat([vectors(att), plain.get_decoder().embed_tokens(sample)])[None]
        own = {name: value[number : number + 1] for name, value in encoded.items()}
        return plain(**own, decoder_inputs_embeds=embeds).logits[0, N:]

    cache = {CACHE: _cache(model)} if given else {}
    with torch.no_grad():
        if kind == "bart" and given:
            with raises(UnsupportedError, where="decoder", expected="index 0", hint="use_cache=False"):
                model(**encoded, decoder_input_ids=ids, decoder_attention_mask=mask, **cache)
            return
        out = model(**encoded, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=True, **cache)
        for number, (found, sample) in enumerate(zip(unpadded(out.logits, samples, "left"), samples, strict=True)):
            close(found, expected(number, sample))
        later = {
            "decoder_input_ids": token,
            CACHE: cache_in(out),
            "decoder_attention_mask": torch.cat([mask, mask.new_ones(3, 1)], dim=1),
        }
        if kind == "bart":
            with raises(UnsupportedError, where="decoder", expected="index 0", hint="use_cache=False"):
                model(**encoded, **later)
            return
        out = model(**encoded, **later)
        for number, sample in enumerate(samples):
            close(out.logits[number, -1], expected(number, torch.cat([sample, token[number]]))[-1])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_model_without_a_head_continues_from_its_cache(kind: str) -> None:
    model, plain = tiny(kind).model, tiny(kind).model
    att = randomise(es.attach(model, es.SoftPromptConfig(N)))
    samples, token = rows(7, 3, 5), torch.tensor([[9], [10], [11]])
    ids, mask = padded(samples, "left")
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
        states = out.last_hidden_state
        later = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        more = model(token, attention_mask=later, **{CACHE: cache_in(out)}).last_hidden_state
        for number, (found, sample) in enumerate(zip(unpadded(states, samples, "left"), samples, strict=True)):
            whole = embedded(plain, vectors(att), torch.cat([sample, token[number]]))
            wanted = plain(inputs_embeds=whole).last_hidden_state[0, N:]
            close(found, wanted[:-1])
            close(more[number, 0], wanted[-1])


def test_prompts_of_different_lengths_if_positions_are_counted() -> None:
    model, att = prompted("bart", submodules="decoder")
    randomise(es.attach(model, es.SoftPromptConfig(2, submodules="decoder"), name="b"), seed=2)
    ids = torch.stack(rows(4, 4))
    with (
        att.per_sample(["b", "default"]),
        raises(UnsupportedError, where="decoder", expected="index 0", hint="use_cache=False"),
    ):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    with att.per_sample(["b", "b"]):
        together = model.generate(ids, max_new_tokens=3, do_sample=False)
    att.activate("b")
    assert torch.equal(together, model.generate(ids, max_new_tokens=3, do_sample=False))


def test_packed_texts_with_lengths_are_refused() -> None:
    """Continuous batching packs texts: the prompt would be inserted before the first one only."""
    model, _, _ = shared("llama")
    with raises(UnsupportedError, where="LlamaModel", found="cu_seq_lens_q"):
        model(rows(6)[0][None], cu_seq_lens_q=torch.tensor([0, 2, 6]))


def test_a_lookup_that_returns_more_than_vectors_is_refused() -> None:
    model, _ = prompted("llama")
    lookup = model.get_input_embeddings()
    handle = lookup.register_forward_hook(lambda module, args, output: (output, None), prepend=True)
    with raises(UnsupportedError, where="Embedding", expected="tensor", found="tuple"):
        model(rows(4)[0][None])
    handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_the_model_finds_the_positions_of_images(side: str, use_cache: bool) -> None:
    """Qwen2-VL gives the parts of an image positions in a grid, whatever the padding."""
    import transformers as tr

    sizes = {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    seen = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    ends = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    torch.manual_seed(0)
    model = tr.Qwen2VLForConditionalGeneration(tr.Qwen2VLConfig(text_config=sizes, vision_config=seen, **ends)).eval()
    plain = copy.deepcopy(model)
    samples = [torch.tensor([5, 6, 92, 90, 90, 90, 90, 93, 7, 8]), torch.tensor([9, 92, 90, 90, 90, 90, 93])]
    picture, grid = torch.randn(16, 96), torch.tensor([[1, 4, 4]])

    def logits(of: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return of(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == 90).long(),
            use_cache=use_cache,
            pixel_values=picture.repeat(len(ids), 1),
            image_grid_thw=grid.repeat(len(ids), 1),
        ).logits

    real = torch.tensor([20, 30, 40, 50])
    att = es.attach(model, es.SoftPromptConfig(N))
    with torch.no_grad():
        next(att.parameters()).copy_(plain.get_input_embeddings()(real))
        found = unpadded(logits(model, *padded(samples, side)), samples, side)
        for own, sample in zip(found, samples, strict=True):
            whole = torch.cat([real, sample])[None]
            close(own, logits(plain, whole, torch.ones_like(whole))[0, N:])
