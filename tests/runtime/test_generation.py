"""Attached models in use: generation in every mode, compilation, mixed batches, and later changes of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import AttachmentError, EmbedSurgeryWarning, UnsupportedError
from tests.support.comparing import state_bits
from tests.support.errors import raises
from tests.support.models import INPUT, VOCABULARY, tiny

IDS = torch.tensor([[5, 7, 9, 3], [7, 7, 4, 30]])
INDICES = [7, 5, 30]
KINDS = ("llama-tied", "llama-untied", "gpt2", "t5")


def attached(kind: str, *, seed: int = 1, indices: list[int] = INDICES, **options: Any) -> tuple[Any, Any]:
    """Return a model with random rows of its input and output tables, and a copy with the rows merged."""
    model = tiny(kind)
    targets = [INPUT[kind].removesuffix(".weight")] + (["lm_head"] if kind == "llama-untied" else [])
    attachment = es.attach(model, es.TrainableTokensConfig(indices, target_modules=targets), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    merged = tiny(kind)
    es.merge(merged, attachment.adapter(options.get("name")))
    return model, merged


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_generation_is_the_merged_models(kind: str, mode: str) -> None:
    if (kind, mode) == ("t5", "static cache"):
        options = {**MODES["greedy"], "use_cache": False}  # T5 has no static cache: without any instead
    else:
        options = MODES[mode]
    model, merged = attached(kind)
    texts = []
    for one in (model, merged):
        torch.manual_seed(3)
        texts.append(one.generate(IDS, max_new_tokens=6, attention_mask=torch.ones_like(IDS), **options))
    assert torch.equal(*texts)
    assert texts[0].shape[1] > 1


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2"])
def test_assisted_generation_is_the_merged_models(kind: str) -> None:
    model, merged = attached(kind)
    helper = tiny(kind, seed=4)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS[:1])}
    assert torch.equal(model.generate(IDS[:1], assistant_model=helper, **options), merged.generate(IDS[:1], **options))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind: str) -> None:
    model, merged = attached(kind)
    more = {"decoder_input_ids": IDS} if kind == "t5" else {}
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS, **more).logits, merged(input_ids=IDS, **more).logits)


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # a read by torch itself
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("warmed", [True, False])
def test_compiled_whole_and_once(kind: str, warmed: bool) -> None:
    """fullgraph=True fails on a graph break; the counter sees every compilation."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model, merged = attached(kind)
    if warmed:
        model(input_ids=IDS)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # through autograd's own tracing, as inductor is
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        ids = torch.randint(0, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(seed))
        logits = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, merged(input_ids=ids).logits)
    assert counter.frame_count == 1
    compiled(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    rows = [parameter for parameter in es.get_attachment(model).parameters()]
    found = [parameter.grad.clone() for parameter in rows]
    for parameter in rows:
        parameter.grad = None
    model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    for parameter, gradient in zip(rows, found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
def test_code_compiled_before_attaching_follows_all_changes() -> None:
    model = tiny("gpt2").requires_grad_(False)  # attaching then changes nothing about its parameters
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")

    def same() -> torch.Tensor:
        logits = compiled(input_ids=IDS, use_cache=False).logits.detach()
        torch.testing.assert_close(logits, model(input_ids=IDS, use_cache=False).logits.detach())
        return logits

    base = same()
    attachment = es.attach(model, es.TrainableTokensConfig([7, 5]), name="a")
    es.attach(model, es.TrainableTokensConfig([9]), name="b")
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(1.0)
    seen = [same()]
    for names in (("a",), ("b",)):
        attachment.activate(*names)
        seen.append(same())
    with attachment.per_sample(["a", "b"]):
        seen.append(same())
    with attachment.disabled():
        assert torch.equal(same(), base)
    attachment.merge()
    same()
    attachment.unmerge()
    attachment.detach()
    assert torch.equal(same(), base)
    assert all(not torch.equal(one, base) for one in seen)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("warmed", [False, True])
def test_attaching_to_a_compiled_model_attaches_to_the_model_inside(warmed: bool) -> None:
    model, dense = tiny("gpt2"), tiny("gpt2")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    if warmed:
        compiled(input_ids=IDS, use_cache=False)
    attachment = es.attach(compiled, es.TrainableTokensConfig([7, 5]))
    assert es.get_attachment(compiled) is es.get_attachment(model) is attachment
    assert attachment.model is model
    (rows,) = attachment.parameters()
    with torch.no_grad():
        rows.add_(1.0)
        dense.get_input_embeddings().weight[[7, 5]] = rows
    found, wanted = (one(input_ids=IDS, use_cache=False).logits for one in (compiled, dense))
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(rows.grad, dense.get_input_embeddings().weight.grad[[7, 5]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_each_sample_alone(kind: str) -> None:
    model, _ = attached(kind, name="a")
    attachment = es.get_attachment(model)
    attachment.activate()
    config = es.get_attachment(model).adapter("a").manifest.config
    es.attach(model, es.TrainableTokensConfig([7, 9], target_modules=config["target_modules"]), name="b")
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.5)
    names = ["a", None, "b", "b"]
    ids = torch.cat([IDS, IDS.flip(0)])

    def run(batch: torch.Tensor) -> torch.Tensor:
        more = {"decoder_input_ids": batch} if kind == "t5" else {}
        return model(input_ids=batch, **more).logits

    with attachment.per_sample(names):
        mixed = run(ids)
        told = model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False, attention_mask=torch.ones_like(ids))
    for number, name in enumerate(names):
        attachment.activate(*([name] if name else []))
        one = ids[number : number + 1]
        torch.testing.assert_close(mixed[number : number + 1], run(one))
        alone = model.generate(one, max_new_tokens=4, num_beams=2, do_sample=False, attention_mask=torch.ones_like(one))
        text = told[number][: alone.shape[1]]
        assert torch.equal(text, alone[0])
    mixed.sum().backward()
    assert all(parameter.grad is not None for parameter in attachment.parameters())


def test_gradients_of_a_mixed_batch_are_the_samples_gradients() -> None:
    model, _ = attached("llama-tied", name="a")
    attachment = es.get_attachment(model)
    with attachment.per_sample(["a", None]):
        model(input_ids=IDS).logits[..., :9].square().sum().backward()
    (rows,) = attachment.parameters()
    mixed = rows.grad.clone()
    rows.grad = None
    model(input_ids=IDS[:1]).logits[..., :9].square().sum().backward()
    torch.testing.assert_close(rows.grad, mixed)


def test_lasting_changes_are_refused_inside_a_block() -> None:
    model, _ = attached("llama-tied", name="a")
    attachment = es.get_attachment(model)
    es.attach(model, es.TrainableTokensConfig([9]), name="b")
    before = state_bits(model)
    inside = {
        "attach()": lambda: es.attach(model, es.TrainableTokensConfig([10]), name="c"),
        "detach()": attachment.detach,
        "merge()": attachment.merge,
        "activate()": lambda: attachment.activate("b"),
        "remove()": lambda: attachment.remove("a"),
    }
    for method, call in inside.items():
        with attachment.per_sample(["a", None]), raises(AttachmentError, where=method, what="per_sample()"):
            call()
    with attachment.disabled(), raises(AttachmentError, where="merge()", what="disabled()"):
        attachment.merge()
    assert attachment.active == attachment.names == ("a", "b")
    assert state_bits(model) == before


def test_mixed_batches_of_other_sizes_are_refused() -> None:
    model, _ = attached("llama-tied", name="a")
    attachment = es.get_attachment(model)
    with raises(AttachmentError, where="nobody", found="a"), attachment.per_sample(["a", "nobody"]):
        pass
    with raises(AttachmentError, found="[]"), attachment.per_sample([]):
        pass
    with raises(UnsupportedError, expected="3 samples", found="[2, 4]"), attachment.per_sample(["a", None, "a"]):
        model(input_ids=IDS)
    assert attachment.active == ("a",)
    four = torch.cat([IDS, IDS.flip(0)])
    for names in (["a"], ["a", None]):  # fewer names than samples, of which only generation has each several times
        with raises(UnsupportedError, expected=f"{len(names)} samples", found="[4, 4]"), attachment.per_sample(names):
            model(input_ids=four)
    with torch.no_grad(), attachment.per_sample(["a", None]):
        beams = model(input_ids=four).logits
    with attachment.disabled():
        assert torch.equal(model(input_ids=four[2:]).logits, beams[2:])
    for wrong in ("a", [["a"]], [1, 2]):
        with raises(AttachmentError, what="names", found=repr(wrong)), attachment.per_sample(wrong):
            pass
    with raises(AttachmentError, expected='activate("a", "b")', found="['a', 'b']"):
        attachment.activate(["a", "b"])
    with attachment.per_sample(["a", None]):
        outer = model(input_ids=IDS).logits
        with attachment.per_sample([None, "a"]):
            assert not torch.equal(model(input_ids=IDS).logits, outer)
        assert torch.equal(model(input_ids=IDS).logits, outer)
    whole, _ = attached("llama-tied", name="a", materialize=True)
    with (
        raises(UnsupportedError, where="embed_tokens.weight", found="full copy"),
        es.get_attachment(whole).per_sample(["a", None]),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_writes_the_base_or_the_merged_rows(kind: str, tmp_path: Path) -> None:
    model, merged = attached(kind)
    with pytest.warns(EmbedSurgeryWarning, match=r"\bdefault\b.*attachment\.merge\(\)") as warned:
        model.save_pretrained(tmp_path / "live")
    assert [one.filename for one in warned] == [__file__]
    model.state_dict()  # may have any purpose, so no warning
    es.get_attachment(model).merge()
    model.save_pretrained(tmp_path / "merged")
    assert state_bits(type(model).from_pretrained(tmp_path / "live")) == state_bits(tiny(kind))
    assert state_bits(type(model).from_pretrained(tmp_path / "merged")) == state_bits(merged)


@pytest.mark.parametrize("kind", KINDS)
def test_tie_weights_changes_nothing(kind: str) -> None:
    model, merged = attached(kind)
    more = {"decoder_input_ids": IDS} if kind == "t5" else {}
    model.tie_weights()
    torch.testing.assert_close(model(input_ids=IDS, **more).logits, merged(input_ids=IDS, **more).logits)
    assert es.get_attachment(model).merge().describe() != []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [VOCABULARY + 8, VOCABULARY - 4])
def test_resizing_an_attached_model_is_right_or_refused(kind: str, size: int) -> None:
    model, merged = attached(kind)
    more = {"decoder_input_ids": IDS} if kind == "t5" else {}
    model.resize_token_embeddings(size, mean_resizing=False)
    merged.resize_token_embeddings(size, mean_resizing=False)
    if kind in ("llama-untied", "t5"):  # transformers replaces the head, or the lookups
        with raises(AttachmentError, where="lm_head" if kind == "llama-untied" else "embed_tokens", hint="detach()"):
            model(input_ids=IDS)
        return
    logits = model(input_ids=IDS, **more).logits
    torch.testing.assert_close(logits[..., : size - 8], merged(input_ids=IDS, **more).logits[..., : size - 8])


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_mixed_batch_with_the_tokens_first_is_refused(length: int) -> None:
    import transformers as tr

    model = tr.XLNetLMHeadModel(tr.XLNetConfig(vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=8)).eval()
    attachment = es.attach(model, es.TrainableTokensConfig([7]), name="a")
    with (
        attachment.per_sample(["a", None]),
        raises(UnsupportedError, expected="2 samples", found=f"[{length}, 2]"),
    ):
        model(input_ids=IDS[:, 4 - length :])


def test_a_mixed_batch_of_selected_tokens_is_refused() -> None:
    """With twice as many masked tokens as samples, the sample of each token is unknown."""

    class Sparse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(40, 4), torch.nn.Linear(4, 40)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found = self.embed(ids)
            return self.head(found[ids == 7] if self.training else found.flatten(0, 1))

    model = Sparse()
    attachment = es.attach(model, es.TrainableTokensConfig([7], target_modules=["embed"]), name="a")
    with torch.no_grad():
        next(attachment.parameters()).fill_(1.0)
    ids = torch.tensor([[7, 7, 7], [7, 2, 3]])
    with attachment.per_sample(["a", None]):
        with raises(UnsupportedError, expected="2 samples", found="[4, 40]"):
            model(ids)
        flat = model.eval()(ids)
    attachment.activate()
    assert torch.equal(flat[3:], model(ids)[3:])
    attachment.activate("a")
    torch.testing.assert_close(flat[:3], model(ids)[:3])


def test_a_table_cut_below_a_live_row_is_refused() -> None:
    model, _ = attached("llama-tied")  # rows 7, 5 and 30
    model.resize_token_embeddings(20, mean_resizing=False)
    for use in (lambda: model(input_ids=IDS[:, :2]), es.get_attachment(model).merge):
        with raises(AttachmentError, where="embed_tokens", expected="40 rows", found=("20 rows", "30")):
            use()


def test_replicas_of_data_parallel_are_refused() -> None:
    model, _ = attached("llama-tied")
    with raises(UnsupportedError, what="torch.nn.DataParallel", expected="DistributedDataParallel"):
        model._replicate_for_data_parallel()(input_ids=IDS)


def test_a_table_untied_after_attaching_is_refused() -> None:
    model, _ = attached("llama-tied")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with raises(AttachmentError, where=("embed_tokens", "lm_head"), expected="one parameter", found="2 parameters"):
        model(input_ids=IDS)


def test_a_module_replaced_after_attaching_is_refused() -> None:
    model, _ = attached("llama-tied")
    model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    with raises(AttachmentError, where="model.embed_tokens", expected=None, hint="detach()"):
        model(input_ids=IDS)


def test_as_many_selected_tokens_as_samples_are_refused() -> None:
    """ModernBERT keeps only labelled tokens. Here both are of the first sample, which their shape does not show."""
    import transformers as tr

    config = tr.ModernBertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        sparse_prediction=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        max_position_embeddings=64,
    )
    model = tr.ModernBertForMaskedLM(config).eval()
    attachment = es.attach(model, es.TrainableTokensConfig([7]), name="a")
    labels = torch.full_like(IDS, -100)
    labels[0, :2] = 7
    for grad in (True, False):
        with torch.set_grad_enabled(grad), attachment.per_sample(["a", None]):
            with raises(UnsupportedError, expected="2 samples", found="[2, 40]"):
                model(input_ids=IDS, labels=labels)
            assert model(input_ids=IDS).logits.shape[0] == 2


@pytest.mark.parametrize("first", ["samples", "tokens"])
def test_a_lookup_of_ids_in_one_axis(first: str) -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(40, 4), torch.nn.Linear(4, 40)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if first == "samples":
                return self.head(self.embed(ids.flatten()).view(*ids.shape, -1))
            return self.head(self.embed(ids.t().flatten()).view(*ids.t().shape, -1).transpose(0, 1))

    torch.manual_seed(0)
    model = Flat()
    attachment = es.attach(model, es.TrainableTokensConfig([7], target_modules=["embed"]), name="a")
    with torch.no_grad():
        next(attachment.parameters()).fill_(1.0)
    ids = torch.tensor([[7, 7, 3], [7, 2, 3]])
    alone = model(ids)[0]
    with attachment.disabled():
        plain = model(ids)[1]
    with attachment.per_sample(["a", None]):
        if first == "tokens":
            with raises(UnsupportedError, expected="2 samples", found="[6]"):
                model(ids)
            return
        found = model(ids)
    assert torch.equal(found[0], alone)
    assert torch.equal(found[1], plain)


def test_tying_after_attaching_is_refused_until_it_is_undone() -> None:
    model, merged = attached("llama-untied")
    logits, own = merged(input_ids=IDS).logits, model.lm_head.weight
    model.lm_head.weight = model.model.embed_tokens.weight
    where = ("model.embed_tokens.weight", "lm_head.weight")
    with raises(AttachmentError, where=where, expected="two parameters", hint="detach()"):
        model(input_ids=IDS)
    model.lm_head.weight = own
    torch.testing.assert_close(model(input_ids=IDS).logits, logits)


def test_an_attachment_is_not_registered_on_a_container() -> None:
    """A SentenceTransformer is a container, and saves its parts one by one."""
    import transformers as tr

    config = tr.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = tr.BertModel(config)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.auto_model(input_ids=ids).last_hidden_state

    torch.manual_seed(0)
    model = torch.nn.Sequential(First(), torch.nn.Linear(16, 4)).eval()
    merged = copy.deepcopy(model)
    attachment = es.attach(model, es.TrainableTokensConfig([7, 5]))
    with torch.no_grad():
        (rows,) = attachment.parameters()
        rows.add_(1.0)
        merged[0].auto_model.embeddings.word_embeddings.weight[[7, 5]] = rows
    assert len(model) == 2
    assert es.get_attachment(model) is es.get_attachment(model[0]) is attachment
    assert any(parameter is rows for parameter in model.parameters())
    torch.testing.assert_close(model(IDS), merged(IDS))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(IDS), merged(IDS))
    assert es.get_attachment(copied) is not attachment
    attachment.detach()
    assert not any(module._state_dict_pre_hooks or module._load_state_dict_pre_hooks for module in model.modules())
    assert es.get_attachment(model) is None
    assert state_bits(model) != state_bits(merged)


def test_saving_a_part_of_the_attached_module_warns(tmp_path: Path) -> None:
    model, _ = attached("llama-tied")
    es.get_attachment(model).detach()
    around = torch.nn.ModuleDict({"language": model})
    es.attach(around, es.TrainableTokensConfig([7]))
    with pytest.warns(EmbedSurgeryWarning, match=r"\bdefault\b.*attachment\.merge\(\)"):
        model.save_pretrained(tmp_path)
