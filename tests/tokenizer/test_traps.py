"""Mistakes with new tokens that must not go unnoticed."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr

import embedsurgery as es
from embedsurgery.errors import BaseMismatchError, ConfigError, EmbedSurgeryWarning
from embedsurgery.graph.config import find_named_ids
from embedsurgery.plan import AddTokens, Token
from embedsurgery.tokenizer.live import change_tokens, encode_plain, known_tokens_of
from embedsurgery.tokenizer.patching import check_tokens
from tests.support.comparing import contents, state_bits
from tests.support.errors import raises
from tests.support.new_tokens import NEW, Start, batch, build, check_encodes, logits, start, trained
from tests.support.processes import cli
from tests.support.tokenizers import KINDS, saved


def check_carries(adapter: es.Adapter, expected: torch.Tensor, begun: Start, ids: Any, texts: list[str]) -> None:
    """Check that the adapter adds its tokens to a fresh base and gives the same logits, in memory and on disk."""
    fresh = begun.fresh()
    adapter.save(begun.folder.parent / "adapter")
    es.attach(fresh.model, es.load(begun.folder.parent / "adapter"), tokenizer=fresh.tokenizer)
    check_encodes(fresh.tokenizer, ids, texts)
    assert torch.allclose(logits(fresh.model, batch(ids)), expected, rtol=1e-5, atol=1e-5)
    merged = begun.folder.parent / "merged"
    es.merge_checkpoint(begun.folder, begun.folder.parent / "adapter", merged)
    check_encodes(tr.AutoTokenizer.from_pretrained(merged), ids, texts)
    reloaded = type(begun.model).from_pretrained(merged).eval()
    assert torch.allclose(logits(reloaded, batch(ids)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("how", ["list", "part", "again", "copy", "dict", "two calls"])
def test_new_ids_are_recognised_in_a_plain_list(how: str, spare: int, tmp_path: Path) -> None:
    """The head trains too, and the adapter carries the tokens: the model remembers which ids are new."""
    begun = start("llama-untied", tmp_path, spare)
    if how == "two calls":
        ids: Any = [i for text in NEW for i in es.add_tokens(begun.model, begun.tokenizer, text)]
    else:
        ids = es.add_tokens(begun.model, begun.tokenizer, NEW)
    if how == "again":  # as in a notebook cell that is run twice
        ids = es.add_tokens(begun.model, begun.tokenizer, NEW)
        assert ids.new_tokens is None
    if how == "copy":
        begun.model = copy.deepcopy(begun.model)
    indices: Any = {"list": list(ids), "part": ids[:1], "dict": {"embed_tokens": list(ids), "lm_head": list(ids)}}
    attachment = es.attach(begun.model, es.TrainableTokensConfig(indices.get(how, ids)), tokenizer=begun.tokenizer)
    assert len(list(attachment.parameters())) == 2
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(1)
    check_carries(attachment.adapter(), logits(begun.model, batch(ids)), begun, ids, NEW)


def test_undone_tokens_are_not_new(tmp_path: Path) -> None:
    begun = start("llama-untied", tmp_path, 3)
    ids = es.add_tokens(begun.model, begun.tokenizer, NEW)
    later = es.add_tokens(begun.model, begun.tokenizer, "<third>")
    later.undo()
    ids.undo()
    adapter, _ = trained(begun, list(ids))
    assert adapter.manifest.new_tokens is None


SPLITS = {"llama-3": "<tool", "gpt2": "ool>", "word-piece": "<tool", "t5": "<tool", "llama-2": "<tool"}


@pytest.mark.parametrize("kind", SPLITS)
def test_a_special_token_that_would_split_a_plain_one_is_refused(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind].build()
    following = known_tokens_of(tokenizer).next_id
    change_tokens(tokenizer, AddTokens((Token("<tool>", following),)))
    folder = saved(tokenizer, tmp_path / "base")
    before = tokenizer.backend_tokenizer.to_str()
    token = Token(SPLITS[kind], following + 1, special=True)
    with raises(ConfigError, where="'<tool>'", expected=following):
        change_tokens(tokenizer, AddTokens((token,)))
    with raises(ConfigError, where="'<tool>'", expected=following):
        check_tokens(folder, [token])
    assert tokenizer.backend_tokenizer.to_str() == before
    change_tokens(tokenizer, AddTokens((Token(SPLITS[kind], following + 1),)))  # both plain: the longer one matches
    assert encode_plain(tokenizer, "<tool>") == [following]


def test_a_slow_tokenizer_matches_the_longer_token() -> None:
    tokenizer = tr.ByT5Tokenizer()
    change_tokens(tokenizer, AddTokens((Token("<tool>", 384),)))
    change_tokens(tokenizer, AddTokens((Token("<tool", 385, special=True),)))
    assert encode_plain(tokenizer, "<tool><tool") == [384, 385]


def test_whitespace_left_of_an_unknown_text_is_not_its_token(tmp_path: Path) -> None:
    """A vocabulary without the letter and without an unknown token drops it. Training the space would not help."""
    tokenizer = KINDS["llama-2"].build()
    space = tokenizer.convert_tokens_to_ids("▁")
    assert encode_plain(tokenizer, "🙂") == [space]
    following = known_tokens_of(tokenizer).next_id
    change_tokens(tokenizer, AddTokens((Token("🙂", following),)))
    assert encode_plain(tokenizer, "🙂") == [following]
    with raises(ConfigError, where="' '", hint=f"token_indices=[{space}]"):
        change_tokens(tokenizer, AddTokens((Token(" ", following + 1),)))


def test_an_existing_token_is_special_only_if_it_was_before(tmp_path: Path) -> None:
    begun = start("bert", tmp_path)
    before, text = state_bits(begun.model), begun.text()
    for add in (
        lambda t: es.add_tokens(begun.model, begun.tokenizer, t, special=True),
        lambda t: es.add_tokens_checkpoint(begun.folder, t, tmp_path / "out", special=True),
    ):
        with raises(ConfigError, found="'hello' (7592)", hint="special"):
            add(["[CLS]", "hello", "<new>"])
    assert (state_bits(begun.model), begun.text()) == (before, text)
    assert list(es.add_tokens(begun.model, begun.tokenizer, ["[CLS]", "[PAD]"], special=True)) == [101, 0]
    assert list(es.add_tokens(begun.model, begun.tokenizer, ["hello", "[SEP]"])) == [7592, 102]
    with pytest.warns(EmbedSurgeryWarning, match=r"'\[unused5\]'.*\b6\b.*reserved=True"):
        assert list(es.add_tokens(begun.model, begun.tokenizer, "[unused5]")) == [6]


def test_a_tokenizer_with_far_fewer_tokens_is_refused(tmp_path: Path) -> None:
    """Its next id would be the row of another token of the model's tokenizer."""
    begun = start("llama-untied", tmp_path)
    large = build("llama-untied", begun.used + 4097)
    before = state_bits(large)
    with raises(BaseMismatchError, expected=begun.used + 4097, found=begun.used, hint="resize_token_embeddings"):
        es.add_tokens(large, begun.tokenizer, "<tool>")
    large.save_pretrained(begun.folder)
    with raises(BaseMismatchError, expected=begun.used + 4097, found=begun.used, hint="resize_token_embeddings"):
        es.add_tokens_checkpoint(begun.folder, "<tool>", tmp_path / "out")
    assert state_bits(large) == before
    assert not (tmp_path / "out").exists()
    assert list(es.add_tokens(build("llama-untied", begun.used + 4096), begun.tokenizer, "<tool>")) == [begun.used]


@pytest.mark.parametrize("kind", ["llama-untied", "gemma3"])
def test_a_new_id_that_the_config_names_is_warned_of(kind: str, tmp_path: Path) -> None:
    begun = start(kind, tmp_path, 4)
    begun.model.config.get_text_config().pad_token_id = begun.used
    begun.model.save_pretrained(begun.folder)
    values = rf"'<tool>'.*\b{begun.used}\b.*\b(text_config\.)?pad_token_id"
    with pytest.warns(EmbedSurgeryWarning, match=values):
        es.add_tokens(begun.model, begun.tokenizer, "<tool>")
    with pytest.warns(EmbedSurgeryWarning, match=values):
        es.add_tokens_checkpoint(begun.folder, "<tool>", tmp_path / "out")


def test_a_reserved_token_that_the_config_names_is_not_replaced(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    first, second = (begun.tokenizer.convert_tokens_to_ids(f"<unused{n}>") for n in (0, 1))
    begun.model.config.pad_token_id = first
    begun.model.save_pretrained(begun.folder)
    assert list(es.add_tokens(begun.model, begun.tokenizer, "<tool>", reserved=True)) == [second]
    report = es.add_tokens_checkpoint(begun.folder, "<tool>", tmp_path / "out", reserved=True)
    assert report.tokens == {"<tool>": second}


def test_named_ids() -> None:
    config = {
        "eos_token_id": [3, 4],
        "image_token_index": 7,
        "pad_token_id": None,
        "bos_token_id": True,
        "num_token_idle": 9,
        "text_config": {"pad_token_id": 3, "bos_token_id": 5},
        "vision_config": {"pad_token_id": 6},
    }
    assert find_named_ids(config) == {
        3: "eos_token_id",
        4: "eos_token_id",
        7: "image_token_index",
        5: "text_config.bos_token_id",
    }


def test_thousands_of_tokens_take_seconds(tmp_path: Path) -> None:
    begun = start("bert", tmp_path)
    texts = [f"<word {n}>" for n in range(3000)]
    began = time.process_time()
    ids = es.add_tokens(begun.model, begun.tokenizer, texts)
    adapter, _ = trained(begun, ids)
    fresh = begun.fresh()
    attachment = es.attach(fresh.model, adapter, tokenizer=fresh.tokenizer)
    assert time.process_time() - began < 15  # it took 45 s when each token searched all others
    assert fresh.tokenizer.convert_tokens_to_ids(texts) == list(ids)
    attachment.detach()
    assert len(fresh.tokenizer) == begun.used


def test_the_error_of_an_attached_model_has_the_way_out(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    ids = es.add_tokens(begun.model, begun.tokenizer, NEW)
    attachment = es.attach(begun.model, es.TrainableTokensConfig(ids))
    with raises(es.errors.AttachmentError, hint="detach()") as caught:
        ids.undo()
    assert "merge()" not in caught.value.hint
    with raises(es.errors.AttachmentError, hint=("detach()", "merge()")):
        es.merge(begun.model, attachment.adapter())
    attachment.detach()
    ids.undo()


@pytest.mark.parametrize("spare", [0, 1])
def test_show_compares_new_tokens_with_their_base(spare: int, tmp_path: Path) -> None:
    """A spare row of the base has a norm there. A row that the base lacks has none, and is not an error."""
    begun = start("llama-untied", tmp_path, spare)
    adapter, _ = trained(begun, es.add_tokens(begun.model, begun.tokenizer, NEW, special=True))
    adapter.save(tmp_path / "adapter")
    done = cli("show", tmp_path / "adapter", "--model", begun.folder, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [(t["content"], t["id"], t["special"]) for t in facts["new_tokens"]["tokens"]] == [
        (NEW[0], begun.used, True),
        (NEW[1], begun.used + 1, True),
    ]
    assert (facts["new_tokens"]["rows"], facts["new_tokens"]["grown"]) == (begun.used + spare, begun.used + 2)
    for table in facts["tables"]:
        name = table["name"]
        base = begun.fresh().model.get_parameter(name).detach()
        for row in table["rows"]:
            if row["row"] < begun.used + spare:
                assert row["base_norm"] == pytest.approx(base[row["row"]].norm().item(), rel=1e-5)
            else:
                assert row["base_norm"] is row["cosine"] is None
    text = cli("show", tmp_path / "adapter", "--model", begun.folder).stdout
    assert f"'<tool>' as {begun.used} (special)" in text
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    merged = json.loads(cli("show", tmp_path / "adapter", "--model", tmp_path / "merged", "--json").stdout)
    assert all(row["cosine"] == pytest.approx(1) for table in merged["tables"] for row in table["rows"])


def test_inspect_without_a_tokenizer_json(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    (begun.folder / "tokenizer.json").rename(begun.folder / "tokenizer.model")
    done = cli("inspect", begun.folder)
    assert done.returncode == 0, done.stderr
    assert "tokenizer.json" in done.stdout
    before = contents(tmp_path)
    refused = cli("tokens", "add", begun.folder, "--token", "<tool>", "-o", tmp_path / "out")
    assert refused.returncode == 1
    assert "tokenizer.json" in refused.stderr
    assert "tokenizer.model" in refused.stderr
    assert contents(tmp_path) == before
