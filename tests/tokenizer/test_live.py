"""Tokens added to real tokenizers in memory, and removed: as on disk, found in every text, nothing else changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as tr
from tokenizers import Tokenizer, models, pre_tokenizers

from embedsurgery.errors import ConfigError, EmbedSurgeryError, PlanError, UnsupportedError
from embedsurgery.plan import AddTokens, Token
from embedsurgery.tokenizer.live import (
    change_tokens,
    encode_plain,
    fits_table,
    known_tokens_of,
    next_id_of,
    token_texts_of,
    undo_of,
)
from embedsurgery.tokenizer.patching import read_vocabulary, token_patches
from tests.support.errors import raises
from tests.support.tokenizers import KINDS, SENTENCES, TEXTS, loaded, older, saved

AGES = {"as saved": saved, "older": older}
BY_KIND = pytest.mark.parametrize("kind", KINDS)
BY_SPECIAL = pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
BY_ID = pytest.mark.parametrize("place", ["new", "replacing"])


def token_for(tokenizer: Any, kind: str, place: str, special: bool, content: str = "<tool>") -> Token:
    """Return a token with the next id, or with that of a reserved token, which it replaces."""
    if place == "new":
        return Token(content, next_id_of(tokenizer), special)
    reserved = KINDS[kind].reserved
    return Token(content, tokenizer.get_vocab()[reserved], special, reserved)


def patch(directory: Path, tokens: list[Token], remove: bool = False) -> None:
    for edit in token_patches(directory, tokens, remove):
        assert edit.after is not None
        (directory / edit.path).write_bytes(edit.after)


def content(directory: Path) -> dict[str, Any]:
    """Return the content of tokenizer.json without padding and truncation, which each encoding sets."""
    return {**json.loads((directory / "tokenizer.json").read_text()), "padding": None, "truncation": None}


def encodings(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def state(tokenizer: Any) -> tuple[Any, ...]:
    """Return everything of a tokenizer that an edit may change."""
    extra = [(type(t), str(t)) for t in tokenizer._extra_special_tokens]
    return tokenizer.backend_tokenizer.to_str(), extra, dict(tokenizer.special_tokens_map), len(tokenizer)


@BY_KIND
@BY_SPECIAL
@BY_ID
@pytest.mark.parametrize("age", list(AGES))
def test_memory_disk_and_reloading_agree(kind: str, special: bool, place: str, age: str, tmp_path: Path) -> None:
    base = AGES[age](KINDS[kind].build(), tmp_path / "base")
    tokenizer = loaded(base)
    plain = {text: tokenizer(text)["input_ids"] for text in SENTENCES}
    token = token_for(tokenizer, kind, place, special)
    edit = AddTokens((token, Token("[[done]]", next_id_of(tokenizer) + (place == "new"), special)))
    if kind == "t5" and place == "replacing" and (age == "older" or not special):
        with raises(UnsupportedError, where="<extra_id_3>"):
            token_patches(base, edit.tokens)
        return

    change_tokens(tokenizer, edit)
    patch(base, list(edit.tokens))
    saved(tokenizer, tmp_path / "again")

    on_disk, again = loaded(base), loaded(tmp_path / "again")
    assert encodings(tokenizer) == encodings(on_disk) == encodings(again)
    assert tokenizer.backend_tokenizer.to_str() == on_disk.backend_tokenizer.to_str()
    assert content(base) == content(tmp_path / "again")
    assert tokenizer.all_special_ids == on_disk.all_special_ids == again.all_special_ids
    for found in (tokenizer, on_disk, again):
        ids = found("the <tool> and<tool>", add_special_tokens=False)["input_ids"]
        assert ids.count(token.id) == (
            1 if kind == "llama-2-legacy" and not special else 2
        )  # legacy: only after a space
        assert ("<tool>" in found.decode(ids, skip_special_tokens=True)) is not special
        assert token_texts_of(found)[token.id] == "<tool>"
        assert {text: found(text)["input_ids"] for text in SENTENCES} == plain


@BY_KIND
@BY_SPECIAL
@BY_ID
def test_undo_restores_everything(kind: str, special: bool, place: str, tmp_path: Path) -> None:
    tokenizer = loaded(saved(KINDS[kind].build(), tmp_path))
    before = state(tokenizer)
    edit = AddTokens(
        (
            token_for(tokenizer, kind, place, special),
            Token("[[done]]", next_id_of(tokenizer) + (place == "new"), special),
        )
    )
    if kind == "t5" and place == "replacing" and not special:
        with raises(UnsupportedError, where="'<extra_id_3>'", found="'<tool>'"):
            change_tokens(tokenizer, edit)
        assert state(tokenizer) == before
        return
    undo = undo_of(tokenizer, edit)
    change_tokens(tokenizer, edit)
    after = state(tokenizer)
    redo = [again for step in undo for again in [*undo_of(tokenizer, step)]]
    for step in undo:
        change_tokens(tokenizer, step)
    assert state(tokenizer) == before
    for step in undo:
        change_tokens(tokenizer, step)
    assert state(tokenizer) == before
    for step in reversed(redo):
        change_tokens(tokenizer, step)
    assert state(tokenizer) == after
    assert undo_of(tokenizer, edit) == ()


@BY_KIND
@BY_SPECIAL
def test_a_token_is_added_as_transformers_adds_it(kind: str, special: bool) -> None:
    ours, theirs = KINDS[kind].build(), KINDS[kind].build()
    change_tokens(ours, AddTokens((Token("<tool>", next_id_of(ours), special),)))
    theirs.add_tokens(["<tool>"], special_tokens=special)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_the_last_bits_of_scores_stay() -> None:
    """The library does not read back every float that it writes, so the model in memory must not be read back."""
    scores = [("<unk>", 0.0), ("madeupword0", -7.0), ("a", -9.531939083047117), ("b", -15.116084083144479)]
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, 0)), unk_token="<unk>")
    tokenizer.backend_tokenizer.model = models.Unigram(scores, 0)  # transformers copied it by writing and reading
    before = tokenizer.backend_tokenizer.to_str()
    assert Tokenizer.from_str(before).to_str() != before, (
        "the library reads its floats back, so this test shows nothing"
    )
    edit = AddTokens((Token("<tool>", 1, replaces="madeupword0"), Token("<b>", next_id_of(tokenizer))))
    undo = undo_of(tokenizer, edit)
    change_tokens(tokenizer, edit)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert [tuple(piece) for piece in model["vocab"]] == [scores[0], ("<tool>", -7.0), *scores[2:]]
    for step in undo:
        change_tokens(tokenizer, step)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_truncation_padding_and_splitting_stay() -> None:
    tokenizer = KINDS["word-piece"].build()
    inner = tokenizer.backend_tokenizer
    inner.enable_truncation(4, stride=1)
    inner.enable_padding(length=9, pad_id=0)
    inner.encode_special_tokens = True
    before = inner.to_str()
    edit = AddTokens((Token("<tool>", next_id_of(tokenizer), True),))
    assert encode_plain(tokenizer, "the tool is called") == tokenizer.convert_tokens_to_ids(
        ["the", "tool", "is", "called"]
    )
    assert inner.to_str() == before
    assert inner.encode_special_tokens
    change_tokens(tokenizer, edit)
    now = tokenizer.backend_tokenizer
    assert (now.truncation, now.padding, now.encode_special_tokens) == (inner.truncation, inner.padding, True)
    change_tokens(tokenizer, AddTokens(edit.tokens, remove=True))
    assert tokenizer.backend_tokenizer.to_str() == before


BAD = {
    "empty": ("llama-3", [("", 306)], ConfigError, {"where": "token 0 of 1"}),
    "twice": ("llama-3", [("<a>", 306), ("<a>", 307)], ConfigError, {"where": "'<a>'", "hint": "once"}),
    "one id": ("llama-3", [("<a>", 306), ("<b>", 306)], ConfigError, {"where": "'<b>'", "found": 306}),
    "negative": ("llama-3", [("<a>", -1)], ConfigError, {"found": -1}),
    "half a pair": ("llama-3", [("<\ud83d>", 306)], ConfigError, {"where": "ud83d", "found": "surrogate"}),
    "gap": ("llama-3", [("<a>", 308)], PlanError, {"expected": 306, "found": 308}),
    "taken": ("llama-3", [("<a>", 301)], PlanError, {"expected": 301, "found": "'<|end_of_text|>'"}),
    "another id": ("llama-3", [("hello", 306)], PlanError, {"where": "'hello'", "expected": 306, "found": 2}),
    "not special": ("llama-3", [("<|end_of_text|>", 301)], PlanError, {"expected": False, "found": True}),
    "one already": ("llama-3", [(" world", 306)], ConfigError, {"where": "' world'", "found": "'Ġworld'"}),
    "lowered": (
        "word-piece",
        [("HELLO", 30522)],
        ConfigError,
        {"where": "'HELLO'", "found": "7592 'hello'", "hint": "token_indices=[7592]"},
    ),
    "accents": ("word-piece", [("Café", 30522)], ConfigError, {"found": "7668 'cafe'"}),
    "same in lower case": (
        "word-piece",
        [("Foobaz", 30522), ("foobaz", 30523)],
        ConfigError,
        {"where": "oobaz'", "expected": 3052, "found": 3052},  # the library decides which of the two is found
    ),
    "nested": ("llama-3", [("<a>", 306), ("<a><b>", 307), ("<b>", 308), ("<a>x", 309), ("x<", 310)], None, {}),
    "blank": ("word-piece", [(" ", 30522)], ConfigError, {"where": "' '", "expected": 30522}),
    "no such": ("word-piece", [("<a>", 6, "[unused999999]")], PlanError, {"where": "[unused999999]", "expected": 6}),
    "another's": ("word-piece", [("<a>", 6, "[unused4]")], PlanError, {"expected": 6, "found": 5}),
    "a role": ("word-piece", [("<a>", 0, "[PAD]")], UnsupportedError, {"where": "[PAD]", "found": "pad_token"}),
    "merges": ("gpt2", [("<a>", "h", "h")], UnsupportedError, {"where": "'h'", "found": "merges"}),
    "post processor": ("t5", [("<a>", 1, "</s>")], UnsupportedError, {"where": "'</s>'", "found": "eos_token"}),
}


@pytest.mark.parametrize("case", list(BAD))
def test_an_invalid_token_is_refused_and_changes_nothing(case: str) -> None:
    kind, specs, error, fields = BAD[case]
    tokenizer = KINDS[kind].build()
    before = state(tokenizer)
    ids = tokenizer.get_vocab()
    tokens = [Token(t[0], ids[t[1]] if isinstance(t[1], str) else t[1], False, *t[2:]) for t in specs]
    if error is None:
        change_tokens(tokenizer, AddTokens(tuple(tokens)))
        return
    with raises(error, **fields):
        change_tokens(tokenizer, AddTokens(tuple(tokens)))
    assert state(tokenizer) == before


def test_an_uncased_tokenizer_finds_plain_tokens_in_capitals_and_special_ones_as_they_are() -> None:
    tokenizer = KINDS["word-piece"].build()
    change_tokens(tokenizer, AddTokens((Token("<Tool>", 30522), Token("<Mark>", 30523, True))))
    assert encode_plain(tokenizer, "<tool> <TOOL><Mark>") == [30522, 30522, 30523]
    assert 30523 not in encode_plain(tokenizer, "<mark>")


def test_a_token_with_a_role_is_not_removed() -> None:
    tokenizer = KINDS["llama-3"].build()
    edit = AddTokens((Token("<pad>", 306, True),))
    undo = undo_of(tokenizer, edit)
    change_tokens(tokenizer, edit)
    tokenizer.pad_token = "<pad>"
    with raises(UnsupportedError, where="'<pad>'", found="pad_token"):
        change_tokens(tokenizer, undo[0])
    tokenizer.pad_token = None
    change_tokens(tokenizer, undo[0])
    assert next_id_of(tokenizer) == 306


def test_a_token_that_a_chat_template_writes_is_not_replaced() -> None:
    tokenizer = KINDS["llama-3"].build()
    tokenizer.chat_template = "{{ '<|reserved_special_token_2|>' }}"
    with raises(UnsupportedError, where="reserved_special_token_2", found="chat_template"):
        change_tokens(tokenizer, AddTokens((Token("<a>", 304, True, "<|reserved_special_token_2|>"),)))


def test_only_a_token_as_it_was_added_is_removed() -> None:
    tokenizer = KINDS["llama-3"].build()
    change_tokens(tokenizer, AddTokens((Token("<a>", 306), Token("<b>", 307))))
    before = state(tokenizer)
    for token, fields in [
        (Token("<a>", 306), {"where": "'<b>'", "expected": 307, "found": 306}),  # <b> would get another id
        (Token("<b>", 307, True), {"where": "'<b>'", "expected": "'special': True", "found": "'special': False"}),
        (Token("hello", 306), {"where": "'hello'", "expected": 306, "found": None}),
    ]:
        with raises(PlanError, **fields):
            change_tokens(tokenizer, AddTokens((token,), remove=True))
        assert state(tokenizer) == before


def test_a_vocabulary_with_gaps_gets_no_new_ids() -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "[unused1]": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    before = state(tokenizer)
    with raises(PlanError, expected=3, found="'[unused1]'"):
        change_tokens(tokenizer, AddTokens((Token("<x>", 3),)))
    for index in (2, 4):
        with raises(UnsupportedError, expected="3", found="up to 3"):
            change_tokens(tokenizer, AddTokens((Token("<x>", index),)))
    edit = AddTokens((Token("<x>", 3, False, "[unused1]"),))
    undo = undo_of(tokenizer, edit)
    change_tokens(tokenizer, edit)
    assert encode_plain(tokenizer, "a <x>") == [1, 3]
    change_tokens(tokenizer, undo[0])
    assert state(tokenizer) == before


def test_a_part_written_in_python_is_refused() -> None:
    tokenizer = KINDS["llama-3"].build()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(SimpleNamespace())
    with raises(UnsupportedError, what="tokenizer.json", found="Custom"):
        change_tokens(tokenizer, AddTokens((Token("<a>", 306),)))


@pytest.mark.parametrize("thing", [None, "gpt2", Tokenizer(models.BPE()), SimpleNamespace(tokenizer=3)])
def test_other_objects_are_refused(thing: Any) -> None:
    with raises(ConfigError, found=type(thing).__name__, hint="AutoTokenizer"):
        change_tokens(thing, AddTokens((Token("<a>", 3),)))


def test_the_tokenizer_of_a_processor_is_edited() -> None:
    tokenizer = KINDS["llama-3"].build()
    change_tokens(SimpleNamespace(tokenizer=tokenizer), AddTokens((Token("<a>", 306),)))
    assert tokenizer.convert_tokens_to_ids("<a>") == 306


@BY_KIND
def test_known_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind].build()
    known, read = known_tokens_of(tokenizer), read_vocabulary(saved(tokenizer, tmp_path))
    assert known.texts == token_texts_of(tokenizer) == read.texts == {i: t for t, i in tokenizer.get_vocab().items()}
    assert known.next_id == next_id_of(tokenizer) == read.next_id == len(tokenizer)
    assert known.unknown == tokenizer.unk_token_id
    assert read.unknown in (known.unknown, None)
    assert known.encode("hello world") == tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert fits_table(tokenizer, len(tokenizer))
    assert not fits_table(tokenizer, len(tokenizer) - 1)


class TestSlow:
    """ByT5's tokenizer exists in Python only."""

    def state(self, tokenizer: Any) -> Any:
        extra = [str(t) for t in tokenizer._extra_special_tokens]
        return copy.deepcopy(
            (
                tokenizer._added_tokens_decoder,
                tokenizer._added_tokens_encoder,
                extra,
                len(tokenizer),
                tokenizer.tokens_trie.data,
                tokenizer.tokens_trie._tokens,
            )
        )

    @BY_SPECIAL
    def test_tokens_are_added_and_removed(self, special: bool, tmp_path: Path) -> None:
        tokenizer = tr.ByT5Tokenizer()
        before, plain = self.state(tokenizer), encodings(tokenizer)
        edit = AddTokens((Token("[[b]]", 385, special), Token("[[a]]", 384, special)))
        assert known_tokens_of(tokenizer).next_id == next_id_of(tokenizer) == 384
        undo = undo_of(tokenizer, edit)
        change_tokens(tokenizer, edit)
        assert encode_plain(tokenizer, "x [[a]][[b]]") == [123, 35, 384, 385]
        again = loaded(saved(tokenizer, tmp_path))
        assert encode_plain(again, "x [[a]][[b]]") == [123, 35, 384, 385]
        assert again.all_special_ids == tokenizer.all_special_ids
        assert undo_of(tokenizer, edit) == ()
        for step in [*undo, *undo]:
            change_tokens(tokenizer, step)
        assert self.state(tokenizer) == before
        assert encodings(tokenizer) == plain

    @pytest.mark.parametrize(
        ("token", "error", "fields"),
        [
            (Token("<a>", 385), PlanError, {"expected": 384, "found": 385}),
            (Token("é", 384), PlanError, {"expected": 384, "found": 236}),
            (Token("<a>", 259, False, "<extra_id_124>"), UnsupportedError, {"where": "'<extra_id_124>'"}),
            (Token("", 384), ConfigError, {"where": "token 0 of 1"}),
        ],
    )
    def test_invalid_tokens_are_refused(
        self, token: Token, error: type[EmbedSurgeryError], fields: dict[str, Any]
    ) -> None:
        tokenizer = tr.ByT5Tokenizer()
        before = self.state(tokenizer)
        with raises(error, **fields):
            change_tokens(tokenizer, AddTokens((token,)))
        assert self.state(tokenizer) == before

    def test_a_failure_halfway_changes_nothing(self) -> None:
        tokenizer = tr.ByT5Tokenizer()
        tokenizer.do_lower_case = True
        before = self.state(tokenizer)
        with raises(ConfigError, where="'<A>'", expected=385):
            change_tokens(tokenizer, AddTokens((Token("<b>", 384), Token("<A>", 385))))
        assert self.state(tokenizer) == before

    def test_the_last_tokens_are_removed_first(self) -> None:
        tokenizer = tr.ByT5Tokenizer()
        change_tokens(tokenizer, AddTokens((Token("<a>", 384), Token("<b>", 385))))
        with raises(PlanError, where="'<a>'", expected="'id': 384", found="'id': 384"):  # as it was added, but not last
            change_tokens(tokenizer, AddTokens((Token("<a>", 384),), remove=True))
