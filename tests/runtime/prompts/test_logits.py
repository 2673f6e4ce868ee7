"""With a soft prompt, each sample of a batch gets the logits of a plain model for prompt and sample alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import ConfigError, UnsupportedError
from tests.support.errors import raises
from tests.support.prompt_models import EACH_CAUSAL, ENCODERS, PAD, TWO, padded, rows, tiny, unpadded
from tests.support.prompted import N, alone, close, embedded, prompted, shared, vectors

LENGTHS = (7, 3, 5)


@pytest.mark.parametrize("kind", EACH_CAUSAL)
def test_one_sample_is_the_plain_model_behind_the_prompt_bit_for_bit(kind: str) -> None:
    model, att, plain = shared(kind)
    (ids,) = rows(7)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    assert torch.equal(logits, alone(plain, vectors(att), ids).logits[0, N:])
    with att.disabled(), torch.no_grad():
        assert torch.equal(model(ids[None]).logits, plain(ids[None]).logits)


@pytest.mark.parametrize("kind", [*ENCODERS, "llama-cls", "gpt2-cls", *TWO, "whisper"])
def test_disabled_it_is_the_plain_model_bit_for_bit(kind: str) -> None:
    model, att, plain = shared(kind)
    ids, mask = padded(rows(*LENGTHS), "left")
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind == "whisper":
        given = {"input_features": torch.ones(3, 4, 12), "decoder_input_ids": ids, "decoder_attention_mask": mask}
    elif kind in TWO:
        given["decoder_input_ids"] = ids
    with att.disabled(), torch.no_grad():
        with att.disabled():
            inner = model(**given)[0]
        outer = model(**given)[0]
    with torch.no_grad():
        wanted = plain(**given)[0]
        assert torch.equal(inner, wanted)
        assert torch.equal(outer, wanted)
        assert not torch.equal(model(**given)[0], wanted)


def causal_mask(mask: torch.Tensor, form: str) -> torch.Tensor:
    seen = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    if form == "4d-bool":
        return seen
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", EACH_CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["int", "bool", "4d-bool", "4d-float", "dict"])
def test_each_sample_of_a_padded_batch_is_as_alone(kind: str, side: str, form: str) -> None:
    model, att, plain = shared(kind)
    samples = rows(*LENGTHS)
    ids, mask = padded(samples, side)
    given: Any = mask.bool() if form == "bool" else causal_mask(mask, form) if form.startswith("4d") else mask
    if form == "dict":
        if kind != "gemma3":
            pytest.skip("does not accept a dict of masks")
        full = causal_mask(mask, "4d-bool")
        place = torch.arange(ids.shape[1])
        given = {"full_attention": full, "sliding_attention": full & (place[:, None] - place < 6)}
    if kind == "gemma3" and form.startswith("4d"):
        pytest.skip("needs a mask for each kind of attention")
    if kind == "opt" and form.startswith("4d"):
        pytest.skip("counts positions in a 2-D mask")
    expected = [alone(plain, vectors(att), s).logits[0, N:] for s in samples]
    inputs = [{"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}]
    for more in inputs:
        for use_cache in (True, False):
            with torch.no_grad():
                logits = model(**more, attention_mask=given, use_cache=use_cache).logits
            assert logits.shape[:2] == ids.shape
            for found, wanted in zip(unpadded(logits, samples, side), expected, strict=True):
                close(found, wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_given_positions_make_room_for_the_prompt(kind: str) -> None:
    model, att, plain = shared(kind)
    samples = rows(*LENGTHS)
    ids, mask = padded(samples, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        later = model(ids[:1], position_ids=torch.arange(3, 10)[None]).logits[0]
    for found, sample in zip(unpadded(logits, samples, "left"), samples, strict=True):
        close(found, alone(plain, vectors(att), sample).logits[0, N:])
    wanted = alone(plain, vectors(att), samples[0], position_ids=torch.arange(3, 10 + N)[None])
    close(later, wanted.logits[0, N:])


def test_texts_packed_into_one_row_are_refused() -> None:
    model, _, _ = shared("llama")
    with raises(UnsupportedError, where="position_ids", expected="1"):
        model(rows(6)[0][None], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


@pytest.mark.parametrize("kind", EACH_CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_loss_includes_the_first_token(kind: str, side: str, keep: bool) -> None:
    model, att = prompted(kind, keep_prompt=keep)
    plain = tiny(kind)
    samples = rows(*LENGTHS)
    ids, mask = padded(samples, side)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    total, count = 0.0, 0
    for sample in samples:
        behind = torch.cat([torch.full((N,), -100), sample])[None]
        total += alone(plain, vectors(att), sample, labels=behind).loss.item() * len(sample)
        count += len(sample)
    assert abs(out.loss.item() - total / count) < 1e-5
    assert out.logits.shape[1] == ids.shape[1] + keep * N
    as_tuple = model(ids, attention_mask=mask, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_of_every_layer_are_as_long_as_the_input(kind: str, side: str) -> None:
    model, att, plain = shared(kind)
    model.set_attn_implementation("eager")
    plain.set_attn_implementation("eager")
    samples = rows(*LENGTHS)
    ids, mask = padded(samples, side)
    more = {"output_hidden_states": True, "output_attentions": True}
    two = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if kind == "t5" else {}
    with torch.no_grad():
        out = model(ids, attention_mask=mask, **more, **{k: v.expand(3, -1) for k, v in two.items()})
    states = out.encoder_hidden_states if kind == "t5" else out.hidden_states
    attentions = out.encoder_attentions if kind == "t5" else out.attentions
    last = {"t5": "encoder_last_hidden_state", "bert": "last_hidden_state"}.get(kind)
    for number, sample in enumerate(samples):
        wanted = alone(plain, vectors(att), sample, **more, **two)
        own = slice(ids.shape[1] - len(sample), None) if side == "left" else slice(len(sample))
        theirs = wanted.encoder_hidden_states if kind == "t5" else wanted.hidden_states
        for found, expected in zip(states, theirs, strict=True):
            close(found[number, own], expected[0, N:], 1e-4)
        theirs = wanted.encoder_attentions if kind == "t5" else wanted.attentions
        for found, expected in zip(attentions, theirs, strict=True):
            close(found[number][:, own, own], expected[0][:, N:, N:], 1e-5)
        if last is not None:
            close(out[last][number, own], wanted[last][0, N:], 1e-4)
        for found, expected in zip(out.get("cross_attentions", ()), wanted.get("cross_attentions", ()), strict=True):
            close(found[number][:, :, own], expected[0][:, :, N:])
    model.set_attn_implementation("sdpa")
    plain.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", ["bert-mlm", "roberta-tok", "bert-qa", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders_compute_for_each_token_what_they_do_alone(kind: str, side: str) -> None:
    model, att, plain = shared(kind)
    samples = rows(*LENGTHS)
    ids, mask = padded(samples, side)
    types = torch.ones_like(ids)
    fields = {"bert-qa": ("start_logits", "end_logits"), "bert": ("last_hidden_state", "pooler_output")}
    for more in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with torch.no_grad():
            out = model(**more, attention_mask=mask, token_type_ids=types)
        for number, sample in enumerate(samples):
            behind = torch.cat([torch.zeros(N, dtype=torch.int64), torch.ones(len(sample), dtype=torch.int64)])[None]
            wanted = alone(plain, vectors(att), sample, token_type_ids=behind)
            for field in fields.get(kind, ("logits",)):
                if field == "pooler_output":
                    close(out[field][number], wanted[field][0])
                    continue
                own = slice(ids.shape[1] - len(sample), None) if side == "left" else slice(len(sample))
                close(out[field][number, own], wanted[field][0, N:])


@pytest.mark.parametrize("kind", ["bert-cls", "gpt2-cls", "llama-cls"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [False, True])
def test_classification_pools_as_without_padding(kind: str, side: str, keep: bool) -> None:
    model, att = prompted(kind, keep_prompt=keep)
    plain = tiny(kind)
    samples = rows(*LENGTHS)
    ids, mask = padded(samples, side)
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels)
    expected = torch.cat([alone(plain, vectors(att), s).logits for s in samples])
    close(out.logits, expected)
    close(out.loss, torch.nn.functional.cross_entropy(expected, labels))


@pytest.mark.parametrize("keep", [False, True])
def test_answers_are_spans_of_the_text(keep: bool) -> None:
    model, att = prompted("bert-qa", keep_prompt=keep)
    plain = tiny("bert-qa")
    (ids,) = rows(7)
    start, end = torch.tensor([2]), torch.tensor([4])
    with torch.no_grad():
        out = model(ids[None], start_positions=start, end_positions=end)
    wanted = alone(plain, vectors(att), ids, start_positions=start + N, end_positions=end + N)
    skip = 0 if keep else N
    close(out.start_logits[0], wanted.start_logits[0, skip:])
    if keep:
        close(out.loss, wanted.loss)
    else:
        found = [torch.nn.functional.cross_entropy(x, p) for x, p in ((out.start_logits, start), (out.end_logits, end))]
        close(out.loss, sum(found) / 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [False, True])
def test_answers_in_a_padded_batch(side: str, keep: bool) -> None:
    """Spans are indices of the batch as it is given. The loss is the mean of the samples' losses."""
    model, att = prompted("bert-qa", keep_prompt=keep)
    plain = tiny("bert-qa")
    samples = rows(*LENGTHS)
    ids, mask = padded(samples, side)
    begins = [ids.shape[1] - len(sample) if side == "left" else 0 for sample in samples]
    spans = {"start_positions": torch.tensor(begins) + 1, "end_positions": torch.tensor(begins) + 2}
    with torch.no_grad():
        out = model(ids, attention_mask=mask, **spans)
        bare = model(ids, attention_mask=mask)
    assert torch.equal(out.start_logits, bare.start_logits)
    lost = []
    for field, places in (("start_logits", spans["start_positions"]), ("end_logits", spans["end_positions"])):
        found = out[field][:, N * keep :]
        for number, sample in enumerate(samples):
            own = slice(begins[number], begins[number] + len(sample))
            close(found[number, own], alone(plain, vectors(att), sample)[field][0, N:])
        lost.append(torch.nn.functional.cross_entropy(out[field], places + N * keep))
    close(out.loss, sum(lost) / 2)


def test_labels_of_tokens_need_no_prompt() -> None:
    model, att, plain = shared("roberta-tok")
    (ids,) = rows(7)
    labels = torch.arange(7) % 5
    out = model(ids[None], labels=labels[None])
    behind = torch.cat([torch.full((N,), -100), labels])[None]
    close(out.loss, alone(plain, vectors(att), ids, labels=behind).loss)


@pytest.mark.parametrize("kind", ["llama", "bert-mlm"])
def test_outputs_can_keep_the_prompt(kind: str) -> None:
    model, att = prompted(kind, keep_prompt=True)
    plain = tiny(kind)
    samples = rows(*LENGTHS)
    ids, mask = padded(samples, "right")
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
    assert out.logits.shape[1] == N + ids.shape[1]
    for number, sample in enumerate(samples):
        close(out.logits[number, : N + len(sample)], alone(plain, vectors(att), sample).logits[0])


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("submodules", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_two_submodules(kind: str, side: str, submodules: tuple[str, ...]) -> None:
    if kind == "bart" and side == "left" and submodules == ("decoder",):
        pytest.skip("its encoder without a prompt counts padding as positions, as in the plain model")
    model, att = prompted(kind, submodules=submodules)
    plain = tiny(kind)
    prompts = dict(zip(submodules, vectors(att).split(N), strict=True))
    samples, targets = rows(*LENGTHS), rows(4, 4, 4, seed=8)
    ids, mask = padded(samples, side)
    labels = torch.stack(targets)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels)
        lost = 0.0
        for number, (sample, target) in enumerate(zip(samples, targets, strict=True)):
            start = torch.tensor([plain.config.decoder_start_token_id])
            nothing = torch.zeros(0, 16)
            lookup = plain.get_decoder().embed_tokens
            shifted = torch.cat([start, target[:-1]])
            decoded = torch.cat([prompts.get("decoder", nothing), lookup(shifted)])[None]
            wanted = plain(
                inputs_embeds=embedded_for(plain, prompts.get("encoder", nothing), sample),
                decoder_inputs_embeds=decoded,
            )
            skip = N if "decoder" in submodules else 0
            close(out.logits[number], wanted.logits[0, skip:])
            own = slice(ids.shape[1] - len(sample), None) if side == "left" else slice(len(sample))
            skip = N if "encoder" in submodules else 0
            if "encoder" in submodules or side == "right" or kind == "t5":
                close(out.encoder_last_hidden_state[number, own], wanted.encoder_last_hidden_state[0, skip:])
            lost += torch.nn.functional.cross_entropy(out.logits[number], target).item()
    assert abs(out.loss.item() - lost / 3) < 1e-5


def embedded_for(plain: Any, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([prompt, plain.get_encoder().embed_tokens(ids)])[None]


def test_whisper_decodes_behind_a_prompt() -> None:
    model, att, plain = shared("whisper")
    assert att.adapter().manifest.config["submodules"] == ["decoder"]
    sound = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(3))
    samples = rows(*LENGTHS)
    for side in ("left", "right"):
        ids, mask = padded(samples, side)
        with torch.no_grad():
            logits = model(sound, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        for number, (found, sample) in enumerate(zip(unpadded(logits, samples, side), samples, strict=True)):
            behind = torch.cat([vectors(att), plain.get_decoder().embed_tokens(sample)])[None]
            with torch.no_grad():
                wanted = plain(sound[number : number + 1], decoder_inputs_embeds=behind).logits
            close(found, wanted[0, N:])


def test_a_prompt_that_leaves_no_positions_is_refused() -> None:
    for kind in ("gpt2", "bert-mlm", "opt", "bart", "llama"):
        with raises(ConfigError, expected="fewer than 64", found=64):
            prompted(kind, count=64)
    for kind in ("gpt2", "bert-mlm", "opt"):
        model, att = prompted(kind, count=60)
        ids = torch.full((1, 4), 7)
        assert model(ids).logits.shape[1] == 4
        with raises(ConfigError, expected="at most 64", found=(65, 60)):
            model(torch.full((1, 5), 7))
        assert model(ids).logits.shape[1] == 4
        with att.disabled():
            assert model(torch.full((1, 64), 7)).logits.shape[1] == 64


def test_the_pad_tokens_row_does_not_matter() -> None:
    """A sample that is all padding does not change the others."""
    model, att, plain = shared("llama")
    (ids,) = rows(5)
    both = torch.stack([ids, torch.full((5,), PAD)])
    mask = torch.tensor([[1] * 5, [0] * 5])
    with torch.no_grad():
        logits = model(both, attention_mask=mask).logits
    close(logits[0], alone(plain, vectors(att), ids).logits[0, N:])
    assert torch.isfinite(logits).all()


def test_embedding_module_gives_vectors_by_index() -> None:
    _, att, _ = shared("llama")
    (module,) = (m for m in att.modules() if type(m).__name__ == "PromptEmbedding")
    indices = torch.arange(N).expand(3, -1)
    assert module(indices).shape == (3, N, 16)
    assert torch.equal(module(indices)[2], vectors(att))
    assert module.values.dtype == torch.float32


def test_half_precision_rounds_the_prompt_once() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    plain = tiny("llama", dtype=torch.bfloat16)
    att = es.attach(model, es.SoftPromptConfig(N))
    assert next(att.parameters()).dtype == torch.float32
    (ids,) = rows(6)
    with torch.no_grad():
        assert torch.equal(model(ids[None]).logits[0], alone(plain, vectors(att).bfloat16(), ids).logits[0, N:])
    assert embedded(plain, vectors(att), ids).dtype == torch.bfloat16
