"""New tokens on real models with real tokenizers: added, trained, saved in an adapter, merged and removed.

The references are transformers': a model reloaded from disk, its encoding, its logits.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from tokenizers import Tokenizer, models

import embedsurgery as es
from embedsurgery.errors import (
    AttachmentError,
    BaseMismatchError,
    ConfigError,
    EmbedSurgeryError,
    EmbedSurgeryWarning,
    OutputExistsError,
    UnsupportedError,
)
from tests.support import tokenizers, zoo
from tests.support.comparing import bits, contents, state_bits
from tests.support.errors import raises
from tests.support.new_tokens import MODELS, NEW, batch, check_encodes, logits, start, trained
from tests.support.processes import cli

INITS: list[Any] = [
    *("mean", "zeros", "random", "normal", "subtokens", "description:the quick fox", "copy:fox"),
    {"<tool>": "zeros", "<answer>": "description:a dog"},
]

FULL_COPY = pytest.mark.filterwarnings("ignore:.*full copy.*:embedsurgery.errors.EmbedSurgeryWarning")
pytestmark = FULL_COPY


@pytest.mark.parametrize(
    ("spare", "special"),
    [
        pytest.param(spare, special, id=f"{spare}-{name}", marks=() if special == (spare == 1) else pytest.mark.sweep)
        for spare in (0, 1, 7)
        for special, name in ((False, "plain"), (True, "special"))
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_from_adding_to_unmerging(kind: str, spare: int, special: bool, tmp_path: Path) -> None:
    """Add, train, save, load onto a fresh base, merge on disk and in memory, and unmerge."""
    begun = start(kind, tmp_path, spare, shards=kind == "llama-untied")
    before = contents(begun.folder)
    ids = es.add_tokens(begun.model, begun.tokenizer, NEW, special=special)
    assert list(ids) == [begun.used, begun.used + 1]
    rows = max(begun.used + spare, begun.used + 2)
    assert begun.model.get_input_embeddings().weight.shape[0] == rows
    check_encodes(begun.tokenizer, ids)
    adapter, expected = trained(begun, ids)
    assert expected.shape[-1] == rows
    adapter.save(tmp_path / "adapter")
    assert sum(p.stat().st_size for p in (tmp_path / "adapter").iterdir()) < 12_000

    loaded = es.load(tmp_path / "adapter")
    fresh = begun.fresh()
    base_bits, base_text = state_bits(fresh.model), fresh.text()
    attachment = es.attach(fresh.model, loaded, tokenizer=fresh.tokenizer)
    check_encodes(fresh.tokenizer, ids)
    assert torch.allclose(logits(fresh.model, batch(ids)), expected, rtol=1e-5, atol=1e-5)
    attachment.detach()
    assert state_bits(fresh.model) == base_bits
    assert fresh.text() == base_text

    undo = es.merge(fresh.model, loaded, fresh.tokenizer)
    in_memory = state_bits(fresh.model)
    assert torch.allclose(logits(fresh.model, batch(ids)), expected, rtol=1e-5, atol=1e-5)
    es.unmerge(fresh.model, undo)
    assert state_bits(fresh.model) == base_bits
    assert fresh.text() == base_text

    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    assert contents(begun.folder) == before
    checks = list(es.verify_checkpoint(tmp_path / "merged"))
    assert all(check.ok for check in checks), checks
    reloaded = type(begun.model).from_pretrained(tmp_path / "merged").eval()
    assert state_bits(reloaded) == in_memory
    assert reloaded.config.get_text_config().vocab_size == rows
    assert torch.allclose(logits(reloaded, batch(ids)), expected, rtol=1e-5, atol=1e-5)
    check_encodes(tr.AutoTokenizer.from_pretrained(tmp_path / "merged"), ids)
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "unmerged")
    assert contents(tmp_path / "unmerged") == before


@pytest.mark.parametrize("kind", MODELS)
def test_undo_in_memory(kind: str, tmp_path: Path) -> None:
    begun = start(kind, tmp_path)
    before, text, config = state_bits(begun.model), begun.text(), begun.model.config.to_dict()
    ids = es.add_tokens(begun.model, begun.tokenizer, NEW, init="normal", pad_to_multiple_of=8)
    assert begun.model.get_input_embeddings().weight.shape[0] % 8 == 0
    assert state_bits(begun.model) != before
    ids.undo()
    assert state_bits(begun.model) == before
    assert begun.text() == text
    assert begun.model.config.to_dict() == config
    with raises(AttachmentError, where=f"AddedTokens({list(ids)})"):
        ids.undo()


@pytest.mark.parametrize("kind", ["llama-untied", "mpt", "bert"])
def test_all_tables_of_the_vocabulary_train_by_default(kind: str, tmp_path: Path) -> None:
    begun = start(kind, tmp_path)
    ids = es.add_tokens(begun.model, begun.tokenizer, NEW)
    graph = es.walk(begun.model)
    tables = graph.vocabulary_of(graph.main_input()).tables
    attachment = es.attach(begun.model, es.TrainableTokensConfig(ids))
    assert len(list(attachment.parameters())) == len(tables)
    attachment.detach()
    if len(tables) == 1:
        return
    name = graph.main_input().modules[0]
    adapter, expected = trained(begun, ids, target_modules=[name])
    adapter.save(tmp_path / "adapter")
    head = es.walk(begun.model).tables[1]
    start_rows = begun.model.get_parameter(head.name)[list(ids)].detach().clone()
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    reloaded = type(begun.model).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(reloaded.get_parameter(head.name)[list(ids)], start_rows)
    assert torch.allclose(logits(reloaded, batch(ids)), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_carries_padding_rows(tmp_path: Path) -> None:
    """Rows that only pad a table give logits too, and they are the same everywhere."""
    begun = start("llama-untied", tmp_path)
    ids = es.add_tokens(begun.model, begun.tokenizer, NEW, pad_to_multiple_of=64)
    adapter, expected = trained(begun, ids)
    adapter.save(tmp_path / "adapter")
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    reloaded = type(begun.model).from_pretrained(tmp_path / "merged").eval()
    assert expected.shape[-1] % 64 == 0
    assert torch.allclose(logits(reloaded, batch(ids)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", INITS, ids=str)
@pytest.mark.parametrize("kind", ["llama-untied", "bert"])
def test_initial_rows_on_disk_and_in_memory_are_equal(kind: str, init: Any, tmp_path: Path) -> None:
    begun = start(kind, tmp_path)
    if init == "copy:fox":
        init = f"copy:{begun.tokenizer.convert_ids_to_tokens(20)}"
    es.add_tokens(begun.model, begun.tokenizer, NEW, init=init, seed=3)
    es.add_tokens_checkpoint(begun.folder, NEW, tmp_path / "out", init=init, seed=3)
    reloaded = type(begun.model).from_pretrained(tmp_path / "out").eval()
    assert state_bits(reloaded) == state_bits(begun.model)
    again = tr.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == begun.tokenizer.get_vocab()
    before = contents(begun.folder)
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize("reserved", [False, True], ids=["spare", "reserved"])
@pytest.mark.parametrize("kind", ["bert", "mobilebert"])
def test_a_heads_bias_is_initialised_at_a_spare_row(kind: str, reserved: bool, tmp_path: Path) -> None:
    """The base's value there might prevent the token from ever being generated."""
    begun = start(kind, tmp_path, spare=2)
    bias = begun.model.get_output_embeddings().bias
    with torch.no_grad():
        bias[-2:] = -1e4
        if reserved:
            bias[begun.tokenizer.convert_tokens_to_ids(tokenizers.KINDS[MODELS[kind]].reserved)] = -1e4
    begun.model.save_pretrained(begun.folder)
    before, kept = contents(begun.folder), bias.detach().clone()
    ids = es.add_tokens(begun.model, begun.tokenizer, "<tool>", reserved=reserved)
    expected = kept.clone()
    expected[ids[0]] = kept[: begun.used].double().mean().float()
    assert torch.allclose(begun.model.get_output_embeddings().bias, expected, atol=1e-6)
    adapter, found = trained(begun, ids)
    ids.undo()
    assert torch.equal(begun.model.get_output_embeddings().bias, kept)
    adapter.save(tmp_path / "adapter")

    fresh = begun.fresh()
    es.attach(fresh.model, es.load(tmp_path / "adapter"), tokenizer=fresh.tokenizer)
    assert torch.allclose(logits(fresh.model, batch(ids)), found, rtol=1e-5, atol=1e-5)
    es.get_attachment(fresh.model).detach()  # type: ignore[union-attr]
    assert torch.equal(fresh.model.get_output_embeddings().bias, kept)
    undo = es.merge(fresh.model, es.load(tmp_path / "adapter"), fresh.tokenizer)
    assert torch.allclose(logits(fresh.model, batch(ids)), found, rtol=1e-5, atol=1e-5)
    es.unmerge(fresh.model, undo)
    assert torch.equal(fresh.model.get_output_embeddings().bias, kept)
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    reloaded = type(begun.model).from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(reloaded, batch(ids)), found, rtol=1e-5, atol=1e-5)
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "unmerged")
    assert contents(tmp_path / "unmerged") == before


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "bert", "gpt2", "qwen2-vl"])
def test_reserved_tokens_are_replaced(kind: str, tmp_path: Path) -> None:
    begun = start(kind, tmp_path)
    reserved = tokenizers.KINDS[MODELS[kind]].reserved
    size = begun.model.get_input_embeddings().weight.shape[0]
    before = contents(begun.folder)
    ids = es.add_tokens(begun.model, begun.tokenizer, "<tool>", reserved=True)
    assert begun.model.get_input_embeddings().weight.shape[0] == size
    assert reserved not in begun.tokenizer.get_vocab() or ids[0] != begun.tokenizer.get_vocab()[reserved]
    check_encodes(begun.tokenizer, ids, ["<tool>"])
    adapter, expected = trained(begun, ids)
    adapter.save(tmp_path / "adapter")
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    check_encodes(tr.AutoTokenizer.from_pretrained(tmp_path / "merged"), ids, ["<tool>"])
    reloaded = type(begun.model).from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(reloaded, batch(ids)), expected, rtol=1e-5, atol=1e-5)
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "unmerged")
    assert contents(tmp_path / "unmerged") == before


def test_existing_and_new_tokens_train_together(tmp_path: Path) -> None:
    """Existing rows train with new ones. Disabled, they are the base's."""
    begun = start("llama-untied", tmp_path)
    base = copy.deepcopy(begun.model)
    ids = es.add_tokens(begun.model, begun.tokenizer, NEW)
    attachment = es.attach(begun.model, es.TrainableTokensConfig([20, *ids], new_tokens=ids), tokenizer=begun.tokenizer)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(1)
    adapter, expected = attachment.adapter(), logits(begun.model, batch(ids))
    attachment.detach()
    adapter.save(tmp_path / "adapter")
    fresh = begun.fresh()
    attachment = es.attach(fresh.model, es.load(tmp_path / "adapter"), tokenizer=fresh.tokenizer)
    assert torch.allclose(logits(fresh.model, batch(ids)), expected, rtol=1e-5, atol=1e-5)
    known = torch.tensor([[20, 21, 22]])
    with attachment.disabled():
        assert torch.allclose(logits(fresh.model, known)[..., : begun.used], logits(base, known), atol=1e-6)


def test_existing_tokens_are_found(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    before = state_bits(begun.model)
    known = begun.tokenizer.convert_ids_to_tokens(20)
    assert list(es.add_tokens(begun.model, begun.tokenizer, known)) == [20]
    assert state_bits(begun.model) == before
    ids = es.add_tokens(begun.model, begun.tokenizer, [known, "<tool>"])
    assert list(ids) == [20, begun.used]
    assert list(es.add_tokens(begun.model, begun.tokenizer, [known, "<tool>"])) == [20, begun.used]
    with raises(ConfigError, where=begun.folder, found=(repr(known), 20)):
        es.add_tokens_checkpoint(begun.folder, known, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_adapters_with_new_tokens(tmp_path: Path) -> None:
    """The second is trained on the result of the first. They stack, and unmerge in reverse order."""
    begun = start("llama-untied", tmp_path)
    first, _ = trained(begun, es.add_tokens(begun.model, begun.tokenizer, "<tool>"))
    second, _ = trained(begun, es.add_tokens(begun.model, begun.tokenizer, "<answer>"))
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    es.merge_checkpoint(begun.folder, tmp_path / "first", tmp_path / "one")
    es.merge_checkpoint(tmp_path / "one", tmp_path / "second", tmp_path / "two")
    es.merge_checkpoint(begun.folder, [tmp_path / "first", tmp_path / "second"], tmp_path / "both")
    for folder in ("two", "both"):
        tokenizer = tr.AutoTokenizer.from_pretrained(tmp_path / folder)
        check_encodes(tokenizer, [begun.used, begun.used + 1])
    weights = {p: d for p, d in contents(tmp_path / "two").items() if not p.startswith(".embedsurgery")}
    assert weights == {p: d for p, d in contents(tmp_path / "both").items() if not p.startswith(".embedsurgery")}
    es.unmerge_checkpoint(tmp_path / "both", tmp_path / "less")
    assert {p: d for p, d in contents(tmp_path / "less").items() if not p.startswith(".embedsurgery")} == {
        p: d for p, d in contents(tmp_path / "one").items() if not p.startswith(".embedsurgery")
    }
    es.unmerge_checkpoint(tmp_path / "less", tmp_path / "least")
    assert contents(tmp_path / "least") == contents(begun.folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, on transformers 5
def test_peft_reads_it_on_an_extended_base(tmp_path: Path) -> None:
    import peft

    begun = start("llama-untied", tmp_path)
    ids = es.add_tokens(begun.model, begun.tokenizer, NEW)
    extended = copy.deepcopy(begun.model)
    adapter, expected = trained(begun, ids)
    adapter.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(extended, tmp_path / "adapter")
    assert torch.allclose(logits(theirs, batch(ids)), expected, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Bad:
    tokens: Any
    options: dict[str, Any]
    error: type[EmbedSurgeryError]
    fields: dict[str, Any]


BAD = {
    "empty": Bad([""], {}, ConfigError, {"found": "['']"}),
    "none": Bad([], {}, ConfigError, {"expected": "string", "found": "[]"}),
    "not a string": Bad([3], {}, ConfigError, {"expected": "string", "found": "[3]"}),
    "repeated": Bad(["<a>", "<a>"], {}, ConfigError, {"where": None, "found": "'<a>'"}),
    "unknown init": Bad(["<a>"], {"init": "meen"}, ConfigError, {"where": "'meen'", "hint": "'mean'"}),
    "init of another": Bad(
        ["<a>"], {"init": {"<b>": "mean"}}, ConfigError, {"where": "init", "expected": "'<a>'", "found": "'<b>'"}
    ),
    "copy of nothing": Bad(
        ["<a>"], {"init": "copy:no such token"}, ConfigError, {"where": "'copy'", "found": "'no such token'"}
    ),
    "description of nothing": Bad(["<a>"], {"init": "description:"}, ConfigError, {"expected": "description:TEXT"}),
    "description of blanks": Bad(
        ["<a>"], {"init": "description: \n "}, ConfigError, {"what": "'description'", "where": "'<a>'", "found": "''"}
    ),
    "current of a grown row": Bad(["<a>"], {"init": "current"}, ConfigError, {"what": "'current'", "found": "'<a>'"}),
    "multiple": Bad(["<a>"], {"pad_to_multiple_of": 0}, ConfigError, {"what": "pad_to_multiple_of", "found": "0"}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["llama-untied", "bert"])
def test_bad_input_changes_nothing(kind: str, name: str, tmp_path: Path) -> None:
    begun, bad = start(kind, tmp_path), BAD[name]
    before, text, files = state_bits(begun.model), begun.text(), contents(tmp_path)
    with raises(bad.error, **bad.fields):
        es.add_tokens(begun.model, begun.tokenizer, bad.tokens, **bad.options)
    with raises(bad.error, **bad.fields):
        es.add_tokens_checkpoint(begun.folder, bad.tokens, tmp_path / "out", **bad.options)
    assert state_bits(begun.model) == before
    assert begun.text() == text
    assert contents(tmp_path) == files


def test_a_head_that_is_shorter_than_the_input_is_refused(tmp_path: Path) -> None:
    """In Mllama, eight rows of the input follow the vocabulary, and a new id would be one of them."""
    case = next(case for case in zoo.cases() if case.name == "MllamaForConditionalGeneration")
    model = zoo.build(case)
    rows = [table.shape[0] for table in es.walk(model).tables[:2]]
    assert rows[0] != rows[1]
    words = {f"w{n}": n for n in range(min(rows))}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    before = state_bits(model)
    with raises(UnsupportedError, where="lm_head.weight", expected=min(rows), found=min(rows)):
        es.add_tokens(model, tokenizer, "<tool>")
    assert state_bits(model) == before


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    other = tokenizers.KINDS["llama-3"].build()
    with raises(BaseMismatchError, expected=begun.used, found=len(other)):
        es.add_tokens(begun.model, other, "<tool>")


def test_an_id_that_is_taken(tmp_path: Path) -> None:
    """Another token has the adapter's id, or its token has another id: the error names it, and nothing changes."""
    begun = start("llama-untied", tmp_path)
    adapter, _ = trained(begun, es.add_tokens(begun.model, begun.tokenizer, NEW))
    adapter.save(tmp_path / "adapter")
    for tokens, found in ((["<other>"], "'<other>'"), (["<one>", "<two>", "<tool>"], "'<one>'")):
        other = begun.fresh()
        es.add_tokens(other.model, other.tokenizer, tokens)
        before = state_bits(other.model)
        with raises(BaseMismatchError, where=begun.used, expected="'<tool>'", found=found):
            es.attach(other.model, es.load(tmp_path / "adapter"), tokenizer=other.tokenizer)
        assert state_bits(other.model) == before
        out = tmp_path / tokens[0].strip("<>")
        es.add_tokens_checkpoint(begun.folder, tokens, out)
        with raises(BaseMismatchError, where=begun.used, expected="'<tool>'", found=found):
            es.merge_checkpoint(out, tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    """A base does not have the new rows, so a sample of its other rows is checked."""
    begun = start("llama-untied", tmp_path)
    adapter, _ = trained(begun, es.add_tokens(begun.model, begun.tokenizer, NEW))
    other = begun.fresh()
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.01)
    with raises(BaseMismatchError, where="model.embed_tokens.weight", expected="sha256"):
        es.attach(other.model, adapter, tokenizer=other.tokenizer)


def test_attaching_without_a_tokenizer_warns(tmp_path: Path) -> None:
    begun = start("llama-untied", tmp_path)
    adapter, expected = trained(begun, (ids := es.add_tokens(begun.model, begun.tokenizer, NEW)))
    fresh = begun.fresh()
    with pytest.warns(EmbedSurgeryWarning, match="tokenizer="):
        es.attach(fresh.model, adapter)
    assert torch.allclose(logits(fresh.model, batch(ids)), expected, rtol=1e-5, atol=1e-5)


def test_adding_to_an_attached_model_is_refused(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    es.attach(begun.model, es.TrainableTokensConfig([5]))
    with raises(AttachmentError, where="LlamaForCausalLM", hint="detach()"):
        es.add_tokens(begun.model, begun.tokenizer, "<tool>")


def test_a_state_dict_grows(tmp_path: Path) -> None:
    begun = start("llama-untied", tmp_path)
    adapter, _ = trained(begun, es.add_tokens(begun.model, begun.tokenizer, NEW))
    fresh = begun.fresh()
    state = {name: tensor.clone() for name, tensor in fresh.model.state_dict().items()}
    before = {name: bits(tensor) for name, tensor in state.items()}
    undo = es.merge(state, adapter, fresh.tokenizer)
    assert state["lm_head.weight"].shape[0] == begun.used + 2
    es.merge(fresh.model, adapter, copy.deepcopy(begun.tokenizer))
    assert {name: bits(tensor) for name, tensor in state.items()} == state_bits(fresh.model)
    es.unmerge(state, undo)
    assert {name: bits(tensor) for name, tensor in state.items()} == before


# -- the command line --------------------------------------------------------------------------------------------------


def test_tokens_add(tmp_path: Path) -> None:
    begun = start("bert", tmp_path)
    done = cli(
        "tokens",
        "add",
        begun.folder,
        "--token",
        "<tool>",
        "--token",
        "<answer>",
        "--init",
        "subtokens",
        "--special",
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == {"<tool>": begun.used, "<answer>": begun.used + 1}
    check_encodes(tr.AutoTokenizer.from_pretrained(tmp_path / "out"), [begun.used, begun.used + 1])
    assert cli("verify", tmp_path / "out").returncode == 0
    shown = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)["rows"]
    assert shown["spare"] == []
    assert shown["disagreements"] == []
    back = cli("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert contents(tmp_path / "back") == contents(begun.folder)


def test_dry_run_of_tokens_add(tmp_path: Path) -> None:
    begun = start("llama-untied", tmp_path)
    done = cli("tokens", "add", begun.folder, "--token", "<tool>", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in ("'<tool>'", str(begun.used)))
    for arguments, code in ((("--token", ""), 1), (("--token", "<a>", "--init", "meen"), 1), ((), 2)):
        failed = cli("tokens", "add", begun.folder, *arguments, "-o", tmp_path / "out")
        assert failed.returncode == code
        assert "Traceback" not in failed.stderr
        assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    with pytest.raises(OutputExistsError):
        es.add_tokens_checkpoint(begun.folder, "<tool>", begun.folder)
