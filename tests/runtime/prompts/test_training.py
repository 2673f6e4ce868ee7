"""Soft prompts: how they start, training, switching, mixing in a batch, copies, and resuming."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import AttachmentError, BaseMismatchError, ConfigError, EmbedSurgeryWarning, UnsupportedError
from tests.support.comparing import state_bits
from tests.support.errors import raises
from tests.support.prompt_models import V, padded, rows, tiny, unpadded
from tests.support.prompted import N, alone, close, embedded, prompted, randomise, vectors


def batch(seed: int = 5, side: str = "right") -> dict[str, torch.Tensor]:
    ids, mask = padded(rows(7, 3, 5, seed=seed), side)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# -- how a prompt starts ---------------------------------------------------------------------------------------------


def tokenizer(size: int = V - 10) -> Any:
    """Return a tokenizer of the words t5, t6 ... with special and reserved tokens. The table has ten more rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = ["<pad>", "<s>", "</s>", "[unused0]", "[unused1]", *(f"t{number}" for number in range(5, size))]
    inner = Tokenizer(models.WordLevel({text: number for number, text in enumerate(texts)}, unk_token="t5"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["llama", "gemma3", "bart"])
def test_random_starts_at_the_scale_of_what_the_lookup_gives(kind: str) -> None:
    model = tiny(kind)
    model.config.max_position_embeddings = 10**6
    start = vectors(es.attach(model, es.SoftPromptConfig(400)))
    real = model.get_encoder().embed_tokens if kind == "bart" else model.get_input_embeddings()
    own = real(torch.arange(V)).std().item()
    assert abs(start.std().item() / own - 1) < 0.1
    other = tiny("llama")
    torch.manual_seed(0)
    again = vectors(es.attach(other, es.SoftPromptConfig(8, random_std=1.0)))
    torch.manual_seed(0)
    assert torch.equal(again, torch.randn(8, 16))


@pytest.mark.parametrize("given", ["config", "attach", "name"])
def test_text_is_repeated_or_cut(given: str, tmp_path: Path) -> None:
    model, text = tiny("gemma3"), tokenizer()
    text.save_pretrained(tmp_path)
    chosen: Any = {"config": text, "attach": None, "name": str(tmp_path)}[given]
    for count, ids in ((5, [7, 9, 8, 7, 9]), (2, [7, 9])):
        config = es.SoftPromptConfig(count, init="text", init_text="t7 t9 t8", tokenizer=chosen)
        att = es.attach(model, config, tokenizer=text if given == "attach" else None)
        close(vectors(att), model.get_input_embeddings()(torch.tensor(ids)).detach())
        assert att.adapter().manifest.config["init_text"] == "t7 t9 t8"
        att.detach()
    config = es.SoftPromptConfig(5, init="text", init_text="t7 t9 t8", tokenizer=text, special_tokens=True)
    att = es.attach(model, config)
    close(vectors(att), model.get_input_embeddings()(torch.tensor([1, 7, 9, 8, 2])).detach())


@pytest.mark.parametrize("known", [True, False])
def test_sampled_rows_are_those_of_real_tokens(known: bool) -> None:
    model = tiny("llama")
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[40:44] = 0  # never trained
        table[44:48] = table[48]
    usable = {*range(5, 40), 49} if known else {*range(1, 40), *range(49, V)}
    config = es.SoftPromptConfig(30, init="sample_vocab", tokenizer=tokenizer() if known else None)
    torch.manual_seed(0)
    start = vectors(es.attach(model, config))
    found = [int((table == row).all(1).nonzero()[0]) for row in start]
    assert len(set(found)) == 30
    assert set(found) <= usable
    for _ in range(2):
        torch.manual_seed(0)
        assert torch.equal(vectors(es.attach(copy_of(model), config)), start)
    many = vectors(es.attach(copy_of(model), es.SoftPromptConfig(60, init="sample_vocab", tokenizer=config.tokenizer)))
    assert {int((table == row).all(1).nonzero()[0]) for row in many} == usable


def copy_of(model: Any) -> Any:
    model = copy.deepcopy(model)
    if es.get_attachment(model) is not None:
        es.get_attachment(model).detach()
    model.config.max_position_embeddings = 100
    return model


def test_loading_draws_nothing(tmp_path: Path) -> None:
    _, att = prompted("llama", init="sample_vocab")
    att.save(tmp_path)
    before = torch.get_rng_state()
    assert torch.equal(vectors(es.attach(tiny_quietly("llama"), es.load(tmp_path))), vectors(att))
    torch.set_rng_state(before)
    model = tiny("llama")
    before = torch.get_rng_state()
    es.attach(model, es.load(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def tiny_quietly(kind: str) -> Any:
    state = torch.get_rng_state()
    model = tiny(kind)
    torch.set_rng_state(state)
    return model


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"num_virtual_tokens": 0}, {"what": "num_virtual_tokens", "found": 0}),
        ({"num_virtual_tokens": True}, {"what": "num_virtual_tokens", "found": True}),
        ({"init": "zeros"}, {"expected": "random, sample_vocab, text", "found": "zeros"}),
        ({"init": "text"}, {"expected": "init_text", "found": "None"}),
        ({"init_text": "a"}, {"expected": "init='text'", "found": "init_text='a'"}),
        (
            {"init": "text", "init_text": "a", "random_std": 1.0},
            {"expected": "init='random'", "found": "random_std=1.0"},
        ),
        ({"random_std": -1.0}, {"what": "random_std", "found": -1.0}),
        ({"submodules": ("model", "encoder")}, {"expected": "decoder", "found": "('model', 'encoder')"}),
        ({"submodules": ()}, {"expected": "decoder", "found": "()"}),
        ({"keep_prompt": 1}, {"what": "keep_prompt", "expected": "True or False", "found": 1}),
    ],
)
def test_invalid_configs(options: dict[str, Any], fields: dict[str, Any]) -> None:
    with raises(ConfigError, **fields):
        es.SoftPromptConfig(**{"num_virtual_tokens": N, **options})


def test_configs_that_do_not_fit_the_model(tmp_path: Path) -> None:
    with raises(ConfigError, expected="tokenizer=", found="none"):
        es.attach(tiny("llama"), es.SoftPromptConfig(N, init="text", init_text="a"))
    with raises(ConfigError, where=tmp_path, hint="directory"):
        es.attach(tiny("llama"), es.SoftPromptConfig(N, init="text", init_text="a", tokenizer=str(tmp_path)))
    with raises(ConfigError, where="t90", expected=V, found=90):
        es.attach(tiny("llama"), es.SoftPromptConfig(N, init="text", init_text="t90", tokenizer=tokenizer(100)))
    with raises(UnsupportedError, where="Whisper", expected="decoder", found="encoder"):
        es.attach(tiny("whisper"), es.SoftPromptConfig(N, submodules="encoder"))
    with raises(UnsupportedError, where="Llama", expected="model", found="decoder"):
        es.attach(tiny("llama"), es.SoftPromptConfig(N, submodules="decoder"))


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "evil")
    path = tmp_path / "evil" / "tokenizer_config.json"
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    ran = tmp_path / "ran"
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = es.SoftPromptConfig(2, init="text", init_text="t7", tokenizer=str(tmp_path / "evil"))
    with raises(ConfigError, where=tmp_path / "evil", hint="directory"):
        es.attach(tiny("llama"), config)
    assert not ran.exists()


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5", "bert-mlm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_those_of_embeddings_in_a_plain_model(kind: str, side: str) -> None:
    model, att = prompted(kind)
    plain = tiny(kind)
    given = batch(side=side)
    if kind == "t5":
        given["labels"] = torch.randint(4, V, (3, 4))
    model(**given).loss.backward()
    prompt = vectors(att).requires_grad_()
    losses, counts = [], []
    for row, sample in enumerate(rows(7, 3, 5)):
        target = given["labels"][row : row + 1] if kind == "t5" else torch.cat([torch.full((N,), -100), sample])[None]
        losses.append(plain(inputs_embeds=embedded(plain, prompt, sample), labels=target).loss)
        counts.append(4 if kind == "t5" else len(sample))
    sum(loss * count for loss, count in zip(losses, counts, strict=True)).div(sum(counts)).backward()
    (parameter,) = att.parameters()
    close(parameter.grad, prompt.grad)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("embedsurgery"))


def step_on(model: Any, parameters: Any, count: int = 20, **given: Any) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(**batch(**given)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_does_not_change_the_base(checkpointing: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    before = state_bits(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    att = es.attach(model, es.SoftPromptConfig(N))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "embedsurgery.rows_of.adapter_default.0.values"
    ]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    losses = step_on(model, att.parameters())
    assert losses[-1] < losses[0] - 0.5
    assert state_bits(model) == before
    with pytest.warns(EmbedSurgeryWarning, match=r"\bdefault\b.*attachment\.merge\(\)"):
        model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    (ids,) = rows(6)
    model.eval()
    with torch.no_grad():
        wanted = model(ids[None]).logits
        saved = type(model).from_pretrained(tmp_path)
        assert torch.equal(saved(ids[None]).logits, tiny("llama")(ids[None]).logits)
        es.attach(saved, att.adapter())
        assert torch.equal(saved(ids[None]).logits, wanted)
    att.detach()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert "create_masks_for_generate" not in vars(model)
    assert not model._forward_pre_hooks
    assert not model.model._forward_hooks


def test_training_resumes_from_a_saved_prompt(tmp_path: Path) -> None:
    model, att = prompted("llama")
    step_on(model, att.parameters(), 3)
    att.save(tmp_path)
    again = tiny("llama")
    resumed = es.attach(again, es.load(tmp_path))
    assert step_on(again, resumed.parameters(), 3) == step_on(model, att.parameters(), 3)
    assert torch.equal(vectors(resumed), vectors(att))
    (parameter,) = resumed.parameters()
    resumed.restore(es.load(tmp_path))
    assert next(resumed.parameters()) is parameter
    assert torch.equal(parameter, es.load(tmp_path).tensors["prompt_embeddings"])
    other = es.attach(tiny("llama"), es.SoftPromptConfig(2)).adapter()
    with raises(AttachmentError, where="default", expected=N, found=2):
        resumed.restore(other)


def test_an_optimizer_state_without_its_prompt_is_refused() -> None:
    model, att = prompted("llama")
    optimizer = torch.optim.AdamW(att.parameters(), lr=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    other, fresh = prompted("llama")
    resumed = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    fresh.restore(fresh.adapter())
    other, fresh = tiny("llama"), None
    fresh = es.attach(other, es.SoftPromptConfig(N))
    resumed = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    other(**batch()).loss.backward()
    with raises(AttachmentError, found="moments", where="default", hint="attachment.restore"):
        resumed.step()


def test_a_state_dict_of_another_base_is_refused() -> None:
    model, _ = prompted("llama")
    with raises(BaseMismatchError, where="model.embed_tokens.weight", expected="sha256", hint="detach()"):
        model.load_state_dict(tiny("llama", seed=9).state_dict())
    model.load_state_dict(tiny("llama").state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_a_prompt_of_their_own(how: str) -> None:
    model, att = prompted("llama")
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    ids, mask = padded(rows(7, 3), "left")
    with torch.no_grad():
        assert torch.equal(twin(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
        with es.get_attachment(twin).disabled():
            base = twin(ids, attention_mask=mask).logits
        randomise(es.get_attachment(twin), seed=7)
        assert not torch.equal(twin(ids, attention_mask=mask).logits, base)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask, "cache_implementation": "static"}
    assert not torch.equal(vectors(es.get_attachment(twin)), vectors(att))
    own = tiny("llama")
    es.attach(own, es.get_attachment(twin).adapter())
    assert torch.equal(twin.generate(ids, **options), own.generate(ids, **options))
    es.get_attachment(twin).detach()
    assert torch.equal(twin(ids, attention_mask=mask).logits, base)
    assert es.get_attachment(model) is att


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize("kind", ["llama", pytest.param("bert-mlm", marks=pytest.mark.sweep)])
def test_compiled(kind: str) -> None:
    model, att = prompted(kind)
    ids, mask = padded(rows(7, 3, 5), "left")
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}
    wanted, found = model(**given), fast(**given)
    close(found.loss, wanted.loss)
    assert (found.logits - wanted.logits).abs().max() < 1e-4
    wanted.loss.backward()
    (parameter,) = att.parameters()
    gradient, parameter.grad = parameter.grad, None
    found.loss.backward()
    close(parameter.grad, gradient)
    torch._dynamo.reset()


# -- several -----------------------------------------------------------------------------------------------------------


def test_switching_and_removing() -> None:
    model, att = prompted("llama", seed=1)
    other = randomise(es.attach(tiny("llama"), es.SoftPromptConfig(2)), seed=2).adapter()
    plain = tiny("llama")
    (ids,) = rows(6)

    def check(name: str | None) -> None:
        prompt = torch.zeros(0, 16) if name is None else vectors(att, name)
        with torch.no_grad():
            close(model(ids[None]).logits[0], alone(plain, prompt, ids).logits[0, len(prompt) :])

    assert es.attach(model, other, name="b") is att
    assert (att.names, att.active) == (("default", "b"), ("b",))
    check("b")
    att.activate("default")
    check("default")
    with att.disabled():
        check(None)
    att.activate()
    check(None)
    with raises(AttachmentError, expected="one", found=("default", "b"), hint="per_sample"):
        att.activate("default", "b")
    att.activate("b")
    att.remove("default")
    check("b")
    att.remove("b")
    check(None)
    assert es.get_attachment(model) is None


@pytest.mark.parametrize("kind", ["llama", "bert-cls", "t5", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_prompt_for_each_sample(kind: str, side: str | None) -> None:
    model, att = prompted(kind, seed=1)
    randomise(es.attach(model, es.SoftPromptConfig(2), name="b"), seed=2)
    plain = tiny(kind)
    names = ["b", None, "default", "b"]
    samples = rows(*([6] * 4 if side is None else [7, 3, 5, 4]))
    ids, mask = padded(samples, side or "left")
    more: dict[str, Any] = {} if side is None else {"attention_mask": mask}
    one: dict[str, Any] = {}
    if kind == "t5":
        one = {"decoder_input_ids": torch.tensor([[0, 5, 6]])}
        more["decoder_input_ids"] = one["decoder_input_ids"].expand(4, -1)
    with att.per_sample(names), torch.no_grad():
        out = model(ids, **more).logits
        embeds = model.get_input_embeddings()(ids)
        if kind != "t5":
            assert torch.equal(model(inputs_embeds=embeds, **more).logits, out) or kind != "bert-cls"
    for number, (sample, name) in enumerate(zip(samples, names, strict=True)):
        prompt = torch.zeros(0, 16) if name is None else vectors(att, name)
        wanted = alone(plain, prompt, sample, **one).logits[0]
        if kind in ("bert-cls", "t5"):
            close(out[number], wanted)
        else:
            close(unpadded(out, samples, side or "left")[number], wanted[len(prompt) :])


def test_each_sample_learns_its_own() -> None:
    model, att = prompted("llama", seed=1)
    randomise(es.attach(model, es.SoftPromptConfig(2), name="b"), seed=2)
    plain = tiny("llama")
    names = ["b", None, "default"]
    given = batch(side="left")
    with att.per_sample(names):
        loss = model(**given).loss
        loss.backward()
    lost, count = 0.0, 0
    for sample, name in zip(rows(7, 3, 5), names, strict=True):
        prompt = torch.zeros(0, 16) if name is None else vectors(att, name)
        target = torch.cat([torch.full((len(prompt),), -100), sample])[None]
        own = len(sample) - (name is None)  # without a prompt nothing predicts the first token
        lost += alone(plain, prompt, sample, labels=target).loss.item() * own
        count += own
    assert abs(loss.item() - lost / count) < 1e-5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in att.parameters())


@pytest.mark.parametrize("first", ["tokens", "prompt"])
def test_together_with_trained_tokens(first: str) -> None:
    model = tiny("llama")
    configs = {"tokens": es.TrainableTokensConfig([0, 7]), "prompt": es.SoftPromptConfig(N)}
    att = None
    for name in (first, *(configs.keys() - {first})):
        att = es.attach(model, configs[name], name=name)
    assert att is not None
    randomise(att)
    assert set(att.active) == {"tokens", "prompt"}
    plain = tiny("llama")
    es.merge(plain, att.adapter("tokens"))
    ids = torch.tensor([0, 7, 9, 11, 7])
    with torch.no_grad():
        close(model(ids[None]).logits[0], alone(plain, vectors(att, "prompt"), ids).logits[0, N:])
        att.activate("prompt")
        close(model(ids[None]).logits[0], alone(tiny("llama"), vectors(att, "prompt"), ids).logits[0, N:])
        att.activate("tokens")
        close(model(ids[None]).logits, plain(ids[None]).logits)
    att.activate("tokens", "prompt")
    losses = step_on(model, att.parameters())
    assert losses[-1] < losses[0] - 0.5
    with att.per_sample(["prompt", "tokens", None]), torch.no_grad():
        out = model(ids.expand(3, -1)).logits
    close(out[2], tiny("llama")(ids[None]).logits[0].detach())


def test_a_replaced_module_is_noticed() -> None:
    model, _ = prompted("llama")
    model.set_input_embeddings(torch.nn.Embedding(V, 16))
    with raises(AttachmentError, where="model.embed_tokens"):
        model(rows(4)[0][None])


def test_a_failed_call_leaves_nothing() -> None:
    model, att = prompted("gpt2", count=60)
    plain = tiny("gpt2")
    (ids,) = rows(4)
    for _ in range(2):
        with raises(ConfigError, expected=64, found=(66, 60)):
            model(rows(6)[0][None])
        with pytest.raises(IndexError):
            model(torch.tensor([[V + 5]]))
        close(model.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))
        with torch.no_grad():
            close(model(ids[None]).logits[0], alone(plain, vectors(att), ids).logits[0, 60:])


# -- Trainer -----------------------------------------------------------------------------------------------------------


def trainer(model: Any, folder: Path, callbacks: Any = (), **options: Any) -> Any:
    import transformers as tr

    data = [{"input_ids": ids, "labels": ids} for ids in rows(*[6] * 8)]
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    } | options
    return tr.Trainer(model=model, args=tr.TrainingArguments(**settings), train_dataset=data, callbacks=list(callbacks))


def test_the_trainer_trains_and_resumes(tmp_path: Path) -> None:
    from embedsurgery.integrations import EmbedSurgeryCallback

    torch.manual_seed(0)
    model = tiny("llama")
    att = es.attach(model, es.SoftPromptConfig(N))
    start = att.adapter()
    trained = trainer(model, tmp_path / "whole", [EmbedSurgeryCallback()])
    trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    again = tiny("llama")
    resumed = es.attach(again, start)
    trainer(again, tmp_path / "whole", [EmbedSurgeryCallback()]).train(str(tmp_path / "whole" / "checkpoint-3"))
    close(vectors(resumed), vectors(att))
    reloaded = type(model).from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert state_bits(reloaded) == state_bits(tiny("llama"))
