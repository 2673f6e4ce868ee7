"""Growing live models and state dicts: parameter objects, sizes, configs and generation; and what is refused."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import embedsurgery as es
from embedsurgery.errors import PlanError, UnsupportedEditError, UnsupportedError
from embedsurgery.plan import AddTokens, Grow, Plan, SetRows, Token
from embedsurgery.stores.apply import apply
from embedsurgery.stores.checks import check_plan
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.state_dicts import state_dict_store
from embedsurgery.tensors.convert import to_raw
from tests.support.comparing import bits, state_bits
from tests.support.errors import raises
from tests.support.models import KINDS, logits, tiny
from tests.support.processes import python

N = 3


def growth(target: Any, count: int = N) -> Grow:
    """New rows and entries for the main vocabulary of a model, a state dict or a graph."""
    graph = target if isinstance(target, es.EmbeddingGraph) else _store(target).graph
    vocabulary = graph.vocabulary_of(graph.main_input())
    generator = torch.Generator().manual_seed(1)
    rows = {n: to_raw(torch.randn(count, graph.table(n).shape[1], generator=generator)) for n in vocabulary.tables}
    return Grow(vocabulary.name, count, rows, {n: to_raw(torch.randn(count)) for n in vocabulary.vectors})


def _store(target: Any) -> Any:
    return module_store(target) if isinstance(target, nn.Module) else state_dict_store(target)


def grow(target: Any, count: int = N) -> Plan:
    return apply(Plan((growth(target, count),)), _store(target))


def integers_of(model: nn.Module) -> dict[str, Any]:
    """All integer attributes of modules, and all configs."""
    found = {}
    for path, module in model.named_modules():
        found.update({f"{path}.{k}": v for k, v in vars(module).items() if type(v) is int})
        config = vars(module).get("config")
        if hasattr(config, "to_dict"):
            found[f"{path}.config"] = copy.deepcopy(config.to_dict())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_model_works_and_an_undo_restores_it(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype=dtype)
    before, sizes = state_bits(model), integers_of(model)
    with torch.no_grad():
        base = logits(model)
    undo = grow(model)
    with torch.no_grad():
        after = logits(model)
    assert after.shape[-1] == base.shape[-1] + N
    assert torch.equal(after[..., : base.shape[-1]], base)
    assert model.config.vocab_size == base.shape[-1] + N
    assert model.get_input_embeddings().num_embeddings == base.shape[-1] + N
    apply(undo, module_store(model))
    assert state_bits(model) == before
    assert integers_of(model) == sizes
    with torch.no_grad():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2"])
def test_a_new_token_is_generated_and_trained(kind: str) -> None:
    model = tiny(kind)
    size = model.config.vocab_size
    grow(model)
    lookup, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (lookup is head) == (kind != "llama-untied")
    ids = torch.tensor([[1, size + 1, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert lookup.grad[size + 1].abs().sum() > 0
    with torch.no_grad():  # the head now always gives the last new token
        head.zero_()
        lookup[: size + 2] = 0.0
        head[size + 2] = 1.0
    out = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (1, 5)


def bart() -> nn.Module:
    import transformers as tr

    config = tr.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = tr.BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_()
    return model


def test_a_buffer_of_one_row_grows() -> None:
    model = bart()
    held = model.final_logits_bias.clone()
    edit = growth(model)
    assert list(edit.vectors) == ["final_logits_bias"]
    undo = apply(Plan((edit,)), module_store(model))
    assert model.final_logits_bias.shape == (1, 40 + N)
    assert bits(model.final_logits_bias) == bits(held) + edit.vectors["final_logits_bias"].data
    assert "final_logits_bias" in dict(model.named_buffers())
    assert "final_logits_bias" in model.state_dict()
    assert model.generate(torch.tensor([[5, 42]]), max_new_tokens=3, do_sample=False).shape[1] > 1
    apply(undo, module_store(model))
    assert bits(model.final_logits_bias) == bits(held)


class Marked(nn.Parameter):
    """A subclass of Parameter."""


class Plain(nn.Module):
    """A small language model, tied or untied, that stores the size of its vocabulary in several places."""

    def __init__(self, size: int = 11, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(size, 6, padding_idx=0)
        self.lm_head = nn.Linear(6, size)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.vocab_size = size
        self.norm = nn.BatchNorm1d(size)
        self.config: Any = {
            "vocab_size": size,
            "hidden_size": 6,
            "text_config": {"vocab_size": size, "n": size},
            "vision_config": {"vocab_size": size},
        }

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed(ids))


def test_parameters_keep_class_attributes_and_layout() -> None:
    model = Plain()
    model.embed.weight = Marked(torch.randn(6, 11).t(), requires_grad=False)
    model.embed.weight.note = "mine"
    model.lm_head.weight.requires_grad_(False)
    old, bias = model.embed.weight, model.lm_head.bias
    before = bits(old)
    undo = grow(model)
    new = model.embed.weight
    assert type(new) is Marked
    assert new is not old
    assert new.note == "mine"
    assert new.stride() == (1, 11 + N)
    assert not new.requires_grad
    assert not model.lm_head.weight.requires_grad
    assert type(model.lm_head.bias) is nn.Parameter
    assert model.lm_head.bias.requires_grad
    assert model.lm_head.bias is not bias
    assert isinstance(dict(model.named_parameters())["embed.weight"], Marked)
    assert bits(old) == before
    apply(undo, module_store(model))
    assert bits(model.embed.weight) == before


def test_all_sizes_follow_and_nothing_else() -> None:
    model = Plain()
    before = copy.deepcopy(integers_of(model))
    undo = grow(model)
    assert (model.embed.num_embeddings, model.lm_head.out_features, model.vocab_size) == (14, 14, 14)
    assert model.config == {
        "vocab_size": 14,
        "hidden_size": 6,
        "text_config": {"vocab_size": 14, "n": 11},
        "vision_config": {"vocab_size": 11},
    }
    assert (model.embed.padding_idx, model.embed.embedding_dim, model.lm_head.in_features) == (0, 6, 6)
    assert model.norm.num_features == 11
    assert model.norm.running_mean.shape == (11,)
    assert model.norm.bias.shape == (11,)
    assert int(model.norm.num_batches_tracked) == 0
    apply(undo, module_store(model))
    assert integers_of(model) == before


def test_an_undo_keeps_sizes_that_had_the_grown_value_before() -> None:
    model = Plain()
    model.config["vocab_size"] = 11 + N
    undo = grow(model)
    assert model.config["vocab_size"] == 11 + N
    apply(undo, module_store(model))
    assert model.config["vocab_size"] == 11 + N
    assert model.config["text_config"]["vocab_size"] == 11


@pytest.mark.parametrize("layout", ["one parameter", "two parameters", "transposed"])
def test_ties_of_every_kind_stay(layout: str) -> None:
    model = Plain(tied=layout == "one parameter")
    if layout == "two parameters":
        model.lm_head.weight = nn.Parameter(model.embed.weight.data)
    elif layout == "transposed":
        model.lm_head = nn.Module()
        model.lm_head.weight = nn.Parameter(model.embed.weight.data.t())
    before = state_bits(model)
    undo = grow(model)
    embed, head = model.embed.weight, model.lm_head.weight
    assert embed.untyped_storage().data_ptr() == head.untyped_storage().data_ptr()
    assert (embed is head) == (layout == "one parameter")
    assert head.shape == ((6, 14) if layout == "transposed" else (14, 6))
    assert embed.untyped_storage().nbytes() == 14 * 6 * 4
    apply(undo, module_store(model))
    assert state_bits(model) == before


def test_the_old_table_is_released() -> None:
    """Growing takes at most one copy of the table, and none stays. Measured in a separate process."""
    code = """
import torch
from torch import nn
from embedsurgery.plan import Grow, Plan
from embedsurgery.tensors.raw import RawArray
from embedsurgery.stores.apply import apply
from embedsurgery.stores.modules import module_store
model = nn.ModuleDict({"embed_tokens": nn.Embedding(64_000, 2048, dtype=torch.bfloat16), "lm_head": nn.Module()})
model["lm_head"].weight = model["embed_tokens"].weight
size = 64_000 * 2048 * 2
def read(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
store = module_store(model)
name = store.graph.vocabularies[0].name
rows = {name: RawArray("BF16", (8, 2048), bytes(8 * 2048 * 2))}
before = read("VmRSS")
undo = apply(Plan((Grow(name, 8, rows, {}),)), store)
print((read("VmHWM") - before) / size, (read("VmRSS") - before) / size)
"""
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    peak, left = map(float, ran.stdout.split())
    assert peak < 1.3
    assert left < 0.3


def add_hook(model: Plain) -> None:
    model.embed.weight.register_hook(lambda grad: grad)


def add_grad_hook(model: Plain) -> None:
    model.embed.weight.register_post_accumulate_grad_hook(lambda p: None)


def add_list(model: Plain) -> None:
    model.tables = [model.embed.weight]


def add_adaptive_softmax(model: Plain) -> None:
    model.softmax = nn.AdaptiveLogSoftmaxWithLoss(6, 11, cutoffs=[4])


def quantise_head(model: Plain) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(11, 6, dtype=torch.int8), requires_grad=False)


def add_scales(model: Plain) -> None:
    model.embed.register_buffer("weight_scale", torch.ones(11, 1))


def add_experts_by_token(model: Plain) -> None:
    model.experts = nn.Module()
    model.experts.register_buffer("of_token", torch.zeros(11, 2, dtype=torch.int64))


def add_mask(model: Plain) -> None:
    model.register_buffer("allowed", torch.ones(11, dtype=torch.bool))


def add_additional_rows(model: Plain) -> None:
    model.embed.num_additional_embeddings = 2


def add_unknown_size(model: Plain) -> None:
    model.embed.rows_in_all = 11


def use_tensor_class(model: Plain) -> None:
    class Odd(torch.Tensor):
        pass

    model.embed.weight = nn.Parameter(torch.randn(11, 6).as_subclass(Odd))


def move_to_meta(model: Plain) -> None:
    model.embed.weight = nn.Parameter(torch.empty(11, 6, device="meta"))


def make_input_longer(model: Plain) -> None:
    model.embed = nn.Embedding(13, 6)
    model.config = {"vocab_size": 11}


def change_config_size(model: Plain) -> None:
    model.config = {"vocab_size": 10}


def add_additional_size(model: Plain) -> None:
    model.config["additional_vocab_size"] = 2


def add_offset(model: Plain) -> None:
    model.config["audio_config"] = {"vocab_offset": 9}


def add_patcher(model: Plain) -> None:
    model.config["patcher_config"] = {"vocab_size": 11}


REFUSED: dict[Callable[[Plain], None], dict[str, Any]] = {
    add_hook: {"where": "embed.weight", "found": "1 hooks"},
    add_grad_hook: {"where": "embed.weight", "found": "1 hooks"},
    add_list: {"where": "tables"},
    add_adaptive_softmax: {"where": "softmax.cutoffs"},
    quantise_head: {"where": "lm_head.weight", "found": "I8"},
    add_scales: {"where": "embed.weight", "found": "embed.weight_scale"},
    add_experts_by_token: {"where": "embed.weight", "found": "experts.of_token, I64 [11, 2]"},
    add_mask: {"where": "embed.weight", "found": "allowed, BOOL [11]"},
    add_additional_rows: {"where": "embed.num_additional_embeddings", "found": "2"},
    add_unknown_size: {"where": "embed.rows_in_all", "found": "rows_in_all = 11"},
    use_tensor_class: {"where": "embed.weight", "expected": "Parameter", "found": "Odd"},
    move_to_meta: {"where": "embed.weight", "found": "meta"},
    make_input_longer: {"where": "embed.weight", "found": ("13", "11")},
    change_config_size: {"where": "embed.weight", "found": ("11", "10")},
    add_additional_size: {"where": "embed.weight", "found": "additional_vocab_size = 2"},
    add_offset: {"where": "embed.weight", "found": "audio_config.vocab_offset = 9"},
    add_patcher: {"where": "embed.weight"},
}
"""What makes a model impossible to grow, and the fields of the error."""


@pytest.mark.parametrize("odd", REFUSED, ids=lambda f: f.__name__)
def test_models_that_cannot_grow_are_refused_before_anything_changes(odd: Callable[[Plain], None]) -> None:
    model = Plain()
    odd(model)
    parameters, sizes = {n: id(p) for n, p in model.named_parameters()}, copy.deepcopy(integers_of(model))
    edit = growth(model)
    for act in (check_plan, apply):
        with raises(UnsupportedError, **REFUSED[odd]):
            act(Plan((edit,)), module_store(model))
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert integers_of(model) == sizes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_table_in_a_layer_of_peft_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama-untied")
    config = peft.LoraConfig(target_modules=["embed_tokens"], r=2, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    edit = growth(wrapped.get_base_model())
    with raises(UnsupportedError, where="embed_tokens.base_layer"):
        apply(Plan((edit,)), module_store(wrapped.get_base_model()))


@dataclass(frozen=True)
class FrozenConfig:
    """A config whose fields cannot be set."""

    vocab_size: int = 11


def test_a_read_only_config_undoes_everything() -> None:
    model = Plain()
    model.config = FrozenConfig()
    parameters, before = {n: id(p) for n, p in model.named_parameters()}, state_bits(model)
    edit = growth(model)
    plan = Plan((SetRows("embed.weight", (1,), to_raw(torch.ones(1, 6))), edit))
    with raises(UnsupportedError, where="config.vocab_size", found="vocab_size"):
        apply(plan, module_store(model))
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert state_bits(model) == before
    assert (model.embed.num_embeddings, model.vocab_size, model.config.vocab_size) == (11, 11, 11)


def test_a_damaged_undo_changes_nothing() -> None:
    model = Plain()
    (undo,) = grow(model).edits
    assert isinstance(undo, Grow)
    before = state_bits(model)
    for saved in (b"", b"[]x", b"[[1]]", b"3", b'[["", ["vocab_size"], "a"]]'):
        with raises(PlanError, where=undo.vocabulary, found="Error"):
            apply(Plan((Grow(undo.vocabulary, undo.count, {}, {}, {"sizes.json": saved}),)), module_store(model))
        assert state_bits(model) == before
        assert model.vocab_size == 14


class Refusing(dict[str, Any]):
    """A state dict that refuses its second write only."""

    writes = 0

    def __setitem__(self, key: str, value: Any) -> None:
        self.writes += 1
        if self.writes == 2:
            raise RuntimeError("not now")
        super().__setitem__(key, value)


def test_a_state_dict_that_fails_half_way_is_restored() -> None:
    values = Refusing(Plain().state_dict())
    held = dict(values)
    edit = growth(dict(values))
    with pytest.raises(RuntimeError, match="not now"):
        apply(Plan((edit,)), state_dict_store(values))
    assert values.writes > 2
    assert all(values[name] is held[name] for name in held)


@pytest.mark.parametrize("tied", [True, False])
def test_a_state_dict_grows_in_its_values(tied: bool) -> None:
    model = Plain(tied=tied)
    values = model.state_dict()
    values["extra"] = {"step": 3}  # type: ignore[assignment]
    before, metadata = {n: v for n, v in values.items()}, values._metadata  # type: ignore[attr-defined]
    edit = growth(values)
    undo = apply(Plan((edit,)), state_dict_store(values))
    grown = {name for name in values if values[name] is not before[name]}
    assert grown == {"embed.weight", "lm_head.weight", "lm_head.bias"}
    assert values._metadata is metadata  # type: ignore[attr-defined]
    assert (values["embed.weight"].data_ptr() == values["lm_head.weight"].data_ptr()) == tied
    assert model.embed.weight.shape == (11, 6)
    fresh = Plain(14, tied=tied)
    tensors = {n: v for n, v in values.items() if n != "extra" and not n.startswith("norm")}
    assert fresh.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert bits(fresh.embed.weight) == bits(values["embed.weight"])
    apply(undo, state_dict_store(values))
    assert {n: bits(v) for n, v in values.items() if n != "extra"} == {
        n: bits(v) for n, v in before.items() if n != "extra"
    }


def test_a_read_only_mapping_is_refused() -> None:
    values = types.MappingProxyType(Plain().state_dict())
    with raises(UnsupportedError, found="mappingproxy"):
        apply(Plan((growth(dict(values)),)), state_dict_store(values))


def test_two_languages_grow_apart() -> None:
    """FSMT has a source and a target vocabulary, even if both have the same size."""
    import transformers as tr

    config = tr.FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=40,
        tgt_vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        tie_word_embeddings=False,
    )
    model = tr.FSMTForConditionalGeneration(config)
    source, target = es.walk(model).vocabularies
    assert source.tables == ("model.encoder.embed_tokens.weight",)
    assert target.tables == ("model.decoder.embed_tokens.weight", "model.decoder.output_projection.weight")
    before = integers_of(model)
    rows = {name: to_raw(torch.randn(2, 16)) for name in target.tables}
    undo = apply(Plan((Grow(target.name, 2, rows, {}),)), module_store(model))
    assert (config.src_vocab_size, config.tgt_vocab_size) == (40, 42)
    out = model(input_ids=torch.tensor([[3, 4]]), decoder_input_ids=torch.tensor([[2, 41]]))
    assert out.logits.shape == (1, 2, 42)
    apply(undo, module_store(model))
    assert integers_of(model) == before


@pytest.mark.parametrize("store", [module_store, lambda m, **k: state_dict_store(m.state_dict(), **k)])
def test_tokens_need_a_tokenizer(store: Any) -> None:
    model = tiny("llama-untied")
    edit = AddTokens((Token("<tool>", 40),))
    with raises(UnsupportedEditError, found="<tool>", hint="tokenizer="):
        check_plan(Plan((edit,)), store(model))


@pytest.mark.parametrize("store", [module_store, lambda m, **k: state_dict_store(m.state_dict(), **k)])
def test_tokens_are_added_to_the_tokenizer_and_removed(store: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"t{i}": i for i in range(40)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0")
    before = tokenizer.backend_tokenizer.to_str()
    model = tiny("llama-untied")
    undo = apply(Plan((AddTokens((Token("<tool>", 40),)),)), store(model, tokenizer=tokenizer))
    assert tokenizer.convert_tokens_to_ids("<tool>") == 40
    apply(undo, store(model, tokenizer=tokenizer))
    assert tokenizer.backend_tokenizer.to_str() == before
