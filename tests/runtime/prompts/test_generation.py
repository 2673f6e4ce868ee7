"""Generation with a soft prompt: every way to generate gives what a plain model gives for each sample alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import AttachmentError, UnsupportedError
from embedsurgery.runtime.prompts.caches import cached_prompt_of, record_prompt
from tests.support import zoo
from tests.support.errors import raises
from tests.support.prompt_models import CACHE, EACH_CAUSAL, PAD, V, cache_in, padded, rows, tiny
from tests.support.prompted import N, alone, close, embedded, prompted, randomise, shared, vectors

MORE, END = 6, 2


def expected(plain: Any, prompt: torch.Tensor, ids: torch.Tensor, **options: Any) -> list[int]:
    """Return what a plain model generates for one sample, with the prompt as embeddings."""
    options = {"max_new_tokens": MORE, "do_sample": False, **options}
    embeds = embedded(plain, prompt, ids)
    out = plain.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **options)
    return out[0].tolist()


def new(out: torch.Tensor, length: int) -> list[list[int]]:
    """Return the tokens behind the text."""
    return [row[length:] for row in out.tolist()]


def same_until_the_end(found: list[int], wanted: list[int]) -> None:
    """Compare two generations: after the shorter one, the longer one has only padding, which for beams is the EOS."""
    count = min(len(found), len(wanted))
    assert found[:count] == wanted[:count]
    assert set(found[count:] + wanted[count:]) <= {PAD, END}


@pytest.mark.parametrize("kind", EACH_CAUSAL)
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_in_a_padded_batch(kind: str, cache: str | None) -> None:
    model, att, plain = shared(kind)
    samples = rows(7, 3, 5)
    ids, mask = padded(samples, "left")
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=MORE, do_sample=False, **how)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for found, sample in zip(new(out, ids.shape[1]), samples, strict=True):
        same_until_the_end(found, expected(plain, vectors(att), sample))


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "MllamaForCausalLM"])
def test_logits_to_keep_of_a_model_in_one_module_with_its_head(name: str) -> None:
    """The module that reads the tokens returns the logits, and they are counted in the text."""
    (case,) = (case for case in zoo.cases() if case.name == name)
    model, plain = zoo.build(case), zoo.build(case)
    att = randomise(es.attach(model, es.SoftPromptConfig(N)))
    samples = [sample.clamp(min=12) for sample in rows(7, 3, 5)]
    wanted = [alone(plain, vectors(att), sample).logits[0, N:] for sample in samples]
    for side in ("left", "right"):
        ids, mask = padded(samples, side)
        for last in (1, 3, torch.tensor([6, 2])):
            with torch.no_grad():
                given = {"attention_mask": mask, "use_cache": False, "logits_to_keep": last}
                found = [model(ids, **given).logits, model(ids, **given, return_dict=False)[0]]
            places = last if isinstance(last, torch.Tensor) else torch.arange(7 - last, 7)
            for logits in found:
                assert logits.shape[1] == len(places)
                for number, sample in enumerate(samples):
                    begin = 7 - len(sample) if side == "left" else 0
                    for column, place in enumerate(places.tolist()):
                        if mask[number, place]:
                            close(logits[number, column], wanted[number][place - begin])


def test_a_cropped_cache_keeps_its_prompt() -> None:
    model, att, plain = shared("llama")
    (ids,) = rows(8)
    with torch.no_grad():
        cache = cache_in(model(ids[None], use_cache=True))
        cache.crop(-2)
        assert cache.get_seq_length() == 6
        logits = model(ids[None, 6:], **{CACHE: cache}).logits
    close(logits[0], alone(plain, vectors(att), ids).logits[0, N + 6 :])


@pytest.mark.parametrize(("size", "cropped"), [(6, 6 + N), (-2, -2)])
def test_a_cache_is_cropped_to_a_length_of_text(size: int, cropped: int) -> None:
    """As in transformers 4; transformers 5 crops by a number of tokens."""

    class Cache:
        def crop(self, size: int) -> None:
            self.size = size

    model, _, _ = shared("llama")
    with torch.no_grad():
        cached = cached_prompt_of(cache_in(model(rows(8)[0][None], use_cache=True)))
    cache: Any = Cache()
    record_prompt(cache, cached.layout, cached.names)
    cache.crop(size)
    assert cache.size == cropped


@pytest.mark.parametrize("kind", EACH_CAUSAL)
def test_beams_and_sampling(kind: str) -> None:
    model, att, plain = shared(kind)
    samples = rows(7, 3, 5)
    ids, mask = padded(samples, "left")
    beams = {"num_beams": 3, "length_penalty": 0.5}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=MORE, do_sample=False, **beams)
    for found, sample in zip(new(out, ids.shape[1]), samples, strict=True):
        same_until_the_end(found, expected(plain, vectors(att), sample, **beams))
    torch.manual_seed(4)
    drawn = model.generate(samples[0][None], max_new_tokens=MORE, do_sample=True, top_k=8, num_return_sequences=2)
    torch.manual_seed(4)
    embeds = embedded(plain, vectors(att), samples[0])
    wanted = plain.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2]),
        max_new_tokens=MORE,
        do_sample=True,
        top_k=8,
        num_return_sequences=2,
    )
    assert torch.equal(drawn[:, 7:], wanted)


@pytest.mark.parametrize("kind", EACH_CAUSAL)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_embeddings_of_the_text_follow_the_prompt(kind: str, cache: str) -> None:
    model, att, plain = shared(kind)
    samples = rows(7, 3)
    ids, mask = padded(samples, "left")
    embeds = model.get_input_embeddings()(ids).detach()
    out = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=MORE, do_sample=False, cache_implementation=cache
    )
    for found, sample in zip(out.tolist(), samples, strict=True):
        same_until_the_end(found, expected(plain, vectors(att), sample))


@pytest.mark.parametrize("kind", EACH_CAUSAL)
@pytest.mark.parametrize("static", [False, True])
def test_continuing_from_a_cache(kind: str, static: bool) -> None:
    """By generate, given all ids or the new ones alone, and in a loop written by hand."""
    from transformers import StaticCache

    model, att, plain = shared(kind)
    first, second = rows(6, 3)
    wanted = expected(plain, vectors(att), torch.cat([first, second]))

    def fresh() -> Any:
        cache = StaticCache(config=model.config, max_cache_len=6 + 3 + MORE) if static else None
        with torch.no_grad():
            return cache_in(model(first[None], **{CACHE: cache}, use_cache=True))

    cache = fresh()
    assert int(cache.get_seq_length()) == 6
    whole = torch.cat([first, second])[None]
    out = model.generate(whole, **{CACHE: cache}, max_new_tokens=MORE, do_sample=False)
    same_until_the_end(out[0, 9:].tolist(), wanted)
    cache = fresh()
    out = model.generate(
        second[None], attention_mask=torch.ones(1, 9), **{CACHE: cache}, max_new_tokens=MORE, do_sample=False
    )
    same_until_the_end(out[0, 3:].tolist(), wanted)
    cache, ids, found = fresh(), second[None], []
    for _ in range(MORE):
        with torch.no_grad():
            logits = model(ids, **{CACHE: cache}).logits
        assert logits.shape[1] == ids.shape[1]
        ids = logits[:, -1:].argmax(-1)
        found.append(ids.item())
        if found[-1] == 2:
            break
    same_until_the_end(found, wanted)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gemma3"])
def test_a_loop_by_hand_over_a_padded_batch(kind: str) -> None:
    model, att, plain = shared(kind)
    samples = rows(7, 3, 5)
    ids, mask = padded(samples, "left")
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
        for step in range(3):
            next_ids = out.logits[:, -1:].argmax(-1)
            samples = [torch.cat([s, n]) for s, n in zip(samples, next_ids, strict=True)]
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            out = model(next_ids, attention_mask=mask, **{CACHE: cache_in(out)})
            for logits, sample in zip(out.logits, samples, strict=True):
                close(logits[0], alone(plain, vectors(att), sample).logits[0, -1])
            assert cache_in(out).get_seq_length() == 8 + step


def test_a_cache_keeps_its_prompt_when_it_is_copied_and_reordered() -> None:
    model, _, _ = shared("llama")
    samples = rows(7, 3)
    ids, mask = padded(samples, "left")
    with torch.no_grad():
        cache = cache_in(model(ids, attention_mask=mask, use_cache=True))
        token, more = torch.tensor([[9], [9]]), torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        wanted = model(token, attention_mask=more, **{CACHE: copy.deepcopy(cache)}).logits
        again = pickle.loads(pickle.dumps(cache))
        assert torch.equal(model(token, attention_mask=more, **{CACHE: again}).logits, wanted)
        turned = copy.deepcopy(cache)
        turned.reorder_cache(torch.tensor([1, 0]))
        close(model(token, attention_mask=more.flip(0), **{CACHE: turned}).logits, wanted.flip(0))
        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        out = model(token.repeat(2, 1), attention_mask=more.repeat_interleave(2, 0), **{CACHE: twice}).logits
        close(out, wanted.repeat_interleave(2, 0))
        one = copy.deepcopy(cache)
        one.batch_select_indices(torch.tensor([1]))
        close(model(token[1:], attention_mask=more[1:], **{CACHE: one}).logits, wanted[1:])
        cache.crop(-2)
        assert cache.get_seq_length() == 5
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_the_former_name_of_the_cache_argument() -> None:
    """transformers renamed ``past_key_values`` to ``cache`` in 5.24, and accepts both."""
    model, _ = prompted("llama")
    (ids,) = rows(5)
    token = torch.tensor([[9]])
    with torch.no_grad():
        cache = cache_in(model(ids[None], use_cache=True))
        wanted = model(token, **{CACHE: copy.deepcopy(cache)}).logits
        assert torch.equal(model(token, past_key_values=copy.deepcopy(cache)).logits, wanted)
    found = model.generate(torch.cat([ids, token[0]])[None], past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert found[0, -1] == wanted[0, -1].argmax()


def test_a_cache_of_another_prompt_is_refused() -> None:
    model, att = prompted("llama")
    (ids,) = rows(5)
    token = torch.tensor([[9]])
    with torch.no_grad():
        cache = cache_in(model(ids[None], use_cache=True))
        with att.disabled(), raises(AttachmentError, where="model", expected="none", found="default"):
            model(token, **{CACHE: copy.deepcopy(cache)})
        with att.disabled():
            bare = cache_in(model(ids[None], use_cache=True))
            model(token, **{CACHE: copy.deepcopy(bare)})
        with raises(AttachmentError, where="model", expected="default", found="none"):
            model(token, **{CACHE: bare})
        randomise(es.attach(model, es.SoftPromptConfig(2), name="b"))
        with raises(AttachmentError, where="model", expected="b", found="default"):
            model(token, **{CACHE: cache})
        att.activate("default")
        assert model(token, **{CACHE: cache}).logits.shape == (1, 1, V)


def test_a_static_cache_that_cannot_grow_is_refused() -> None:
    from transformers import StaticCache

    model, _, _ = shared("llama")
    cache = StaticCache(config=model.config, max_cache_len=6)
    cache.early_initialization(1, 1, 8, torch.float32, torch.device("cpu"))
    with raises(UnsupportedError, expected=("max_cache_len", 5 + N), found=6):
        model(rows(5)[0][None], **{CACHE: cache})


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_disabled_is_the_base_everywhere(kind: str, cache: str) -> None:
    model, att, plain = shared(kind)
    ids, mask = padded(rows(7, 3), "left")
    options = {"max_new_tokens": MORE, "do_sample": False, "cache_implementation": cache, "attention_mask": mask}
    with att.disabled():
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert not torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("submodules", [("encoder",), ("decoder",), ("encoder", "decoder")])
@pytest.mark.parametrize("how", ["greedy", "beams", "static"])
def test_encoder_and_decoder(kind: str, submodules: tuple[str, ...], how: str) -> None:
    model, att = prompted(kind, submodules=submodules)
    plain = tiny(kind)
    prompts = dict(zip(submodules, vectors(att).split(N), strict=True))
    samples = rows(7, 3)
    options = {"greedy": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"}}[how]
    for side in ("left", "right"):
        if kind == "bart" and side == "left" and "encoder" not in submodules:
            continue
        ids, mask = padded(samples, side)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=MORE, do_sample=False, **options)
        for found, sample in zip(out.tolist(), samples, strict=True):
            nothing = torch.zeros(0, 16)
            embeds = torch.cat([prompts.get("encoder", nothing), plain.get_encoder().embed_tokens(sample)])[
                None
            ].detach()
            if "decoder" not in submodules:
                wanted = plain.generate(inputs_embeds=embeds, max_new_tokens=MORE, do_sample=False, **options)[
                    0
                ].tolist()
                same_until_the_end(found, wanted)
                continue
            if how == "beams":
                continue
            ids_so_far = [plain.config.decoder_start_token_id]
            for _ in range(MORE):
                decoded = torch.cat([prompts["decoder"], plain.get_decoder().embed_tokens(torch.tensor(ids_so_far))])[
                    None
                ]
                with torch.no_grad():
                    logits = plain(inputs_embeds=embeds, decoder_inputs_embeds=decoded).logits
                ids_so_far.append(logits[0, -1].argmax().item())
                if ids_so_far[-1] == 2:
                    break
            same_until_the_end(found, ids_so_far)


def test_whisper_generates_behind_a_prompt() -> None:
    model, att, plain = shared("whisper")
    sound = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(3))
    for options in ({}, {"cache_implementation": "static"}):
        out = model.generate(
            sound, max_new_tokens=MORE, do_sample=False, decoder_input_ids=torch.tensor([[3, 9]] * 2), **options
        )
        for number, found in enumerate(out.tolist()):
            ids = [3, 9]
            for _ in range(MORE):
                decoded = torch.cat([vectors(att), plain.get_decoder().embed_tokens(torch.tensor(ids))])[None]
                with torch.no_grad():
                    logits = plain(sound[number : number + 1], decoder_inputs_embeds=decoded).logits
                ids.append(logits[0, -1].argmax().item())
                if ids[-1] == 2:
                    break
            wanted = ids if found[0] == 3 else ids[2:]
            same_until_the_end(found, wanted)


@pytest.mark.parametrize("how", ["greedy", "beams", "static"])
def test_each_sample_with_a_prompt_of_its_own(how: str) -> None:
    model, att = prompted("llama", seed=1)
    randomise(es.attach(model, es.SoftPromptConfig(2), name="short"), seed=2)
    plain = tiny("llama")
    samples = rows(7, 3, 5, 4)
    ids, mask = padded(samples, "left")
    names = ["default", "short", None, "default"]
    options = {"greedy": {}, "beams": {"num_beams": 2}, "static": {"cache_implementation": "static"}}[how]
    with att.per_sample(names):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=MORE, do_sample=False, **options)
        if how == "greedy":
            with raises(UnsupportedError, where="input_ids", expected=4, found=3):
                model(ids[:3])
    for found, sample, name in zip(new(out, 7), samples, names, strict=True):
        prompt = torch.zeros(0, 16) if name is None else vectors(att, name)
        same_until_the_end(found, expected(plain, prompt, sample, **options))


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 2}, {"penalty_alpha": None}, {"prefill_chunk_size": 3}]
)
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    model, att, plain = shared("llama")
    (ids,) = rows(7)
    out = model.generate(ids[None], max_new_tokens=MORE, do_sample=False, repetition_penalty=1.3, **options)
    wanted: list[int] = []
    for _ in range(MORE):  # the penalty sees the text, and no virtual token
        logits = alone(plain, vectors(att), torch.cat([ids, torch.tensor(wanted, dtype=torch.int64)])).logits[0, -1]
        seen = torch.tensor([*ids.tolist(), *wanted])
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.3, logits[seen] / 1.3)
        wanted.append(logits.argmax().item())
        if wanted[-1] == 2:
            break
    same_until_the_end(out[0, 7:].tolist(), wanted)
