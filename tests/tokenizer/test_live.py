"""Tokens enter real tokenizers in memory and leave them: as on disk, found in every text, and nothing else moves."""

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
from embedsurgery.tokenizer.live import change_tokens, encode_plain, fits, known_tokens, next_id, texts, undo_of
from embedsurgery.tokenizer.patching import token_patches, vocabulary
from tests.support.tokenizers import KINDS, SENTENCES, TEXTS, loaded, older, saved

AGES = {"as saved": saved, "older": older}
BY_KIND = pytest.mark.parametrize("kind", KINDS)
BY_SPECIAL = pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
BY_PLACE = pytest.mark.parametrize("place", ["new", "replacing"])


def token_for(tokenizer: Any, kind: str, place: str, special: bool, content: str = "<tool>") -> Token:
    """A token at the next id, or at a reserved one's."""
    if place == "new":
        return Token(content, next_id(tokenizer), special)
    reserved = KINDS[kind].reserved
    return Token(content, tokenizer.get_vocab()[reserved], special, reserved)


def patch(directory: Path, tokens: list[Token], remove: bool = False) -> None:
    for edit in token_patches(directory, tokens, remove):
        assert edit.after is not None
        (directory / edit.path).write_bytes(edit.after)


def content(directory: Path) -> dict[str, Any]:
    """Of tokenizer.json, but for what transformers switches on and off whenever it encodes."""
    return {**json.loads((directory / "tokenizer.json").read_text()), "padding": None, "truncation": None}


def encodings(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def state(tokenizer: Any) -> tuple[Any, ...]:
    """All that a change may touch."""
    extra = [(type(t), str(t)) for t in tokenizer._extra_special_tokens]
    return tokenizer.backend_tokenizer.to_str(), extra, dict(tokenizer.special_tokens_map), len(tokenizer)


@BY_KIND
@BY_SPECIAL
@BY_PLACE
@pytest.mark.parametrize("age", list(AGES))
def test_memory_disk_and_reloading_agree(kind: str, special: bool, place: str, age: str, tmp_path: Path) -> None:
    base = AGES[age](KINDS[kind].build(), tmp_path / "base")
    tokenizer = loaded(base)
    plain = {text: tokenizer(text)["input_ids"] for text in SENTENCES}
    token = token_for(tokenizer, kind, place, special)
    edit = AddTokens((token, Token("[[done]]", next_id(tokenizer) + (place == "new"), special)))
    if kind == "t5" and place == "replacing" and (age == "older" or not special):
        with pytest.raises(UnsupportedError, match="<extra_id_3>"):
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
        assert ids.count(token.id) == (1 if kind == "llama-2-legacy" and not special else 2)  # it wants a space before
        assert ("<tool>" in found.decode(ids, skip_special_tokens=True)) is not special
        assert texts(found)[token.id] == "<tool>"
        assert {text: found(text)["input_ids"] for text in SENTENCES} == plain


@BY_KIND
@BY_SPECIAL
@BY_PLACE
def test_the_undo_brings_everything_back(kind: str, special: bool, place: str, tmp_path: Path) -> None:
    tokenizer = loaded(saved(KINDS[kind].build(), tmp_path))
    before = state(tokenizer)
    edit = AddTokens(
        (token_for(tokenizer, kind, place, special), Token("[[done]]", next_id(tokenizer) + (place == "new"), special))
    )
    if kind == "t5" and place == "replacing" and not special:
        with pytest.raises(UnsupportedError, match="listed as a special one"):
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
def test_a_new_token_is_as_transformers_adds_it(kind: str, special: bool) -> None:
    ours, theirs = KINDS[kind].build(), KINDS[kind].build()
    change_tokens(ours, AddTokens((Token("<tool>", next_id(ours), special),)))
    theirs.add_tokens(["<tool>"], special_tokens=special)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_the_last_bits_of_scores_stay() -> None:
    """The library does not read back every float that it writes; so what it has in memory is not read back."""
    scores = [("<unk>", 0.0), ("madeupword0", -7.0), ("a", -9.531939083047117), ("b", -15.116084083144479)]
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, 0)), unk_token="<unk>")
    tokenizer.backend_tokenizer.model = models.Unigram(scores, 0)  # transformers has made a copy by such a reading
    before = tokenizer.backend_tokenizer.to_str()
    assert Tokenizer.from_str(before).to_str() != before, "the library has learnt it, and the test shows nothing"
    edit = AddTokens((Token("<tool>", 1, replaces="madeupword0"), Token("<b>", next_id(tokenizer))))
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
    edit = AddTokens((Token("<tool>", next_id(tokenizer), True),))
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
    "empty": ("llama-3", [("", 306)], ConfigError, "an empty token"),
    "twice": ("llama-3", [("<a>", 306), ("<a>", 307)], ConfigError, "'<a>'.*name it once"),
    "one id": ("llama-3", [("<a>", 306), ("<b>", 306)], ConfigError, "'<b>'"),
    "negative": ("llama-3", [("<a>", -1)], ConfigError, "found -1"),
    "half a pair": ("llama-3", [("<\ud83d>", 306)], ConfigError, "surrogate"),
    "gap": ("llama-3", [("<a>", 308)], PlanError, "expected 306, found 308"),
    "taken": ("llama-3", [("<a>", 301)], PlanError, r"found '<\|end_of_text\|>'"),
    "another id": ("llama-3", [("hello", 306)], PlanError, "'hello'.*expected 306, found 2"),
    "not special": ("llama-3", [("<|end_of_text|>", 301)], PlanError, "expected False, found True"),
    "one already": ("llama-3", [(" world", 306)], ConfigError, "one token of this text already.*'Ġworld'"),
    "lowered": ("word-piece", [("HELLO", 30522)], ConfigError, "'HELLO'.*found 7592 'hello'.*token_indices"),
    "accents": ("word-piece", [("Café", 30522)], ConfigError, "found 7668 'cafe'"),
    "alike": ("word-piece", [("Foobaz", 30522), ("foobaz", 30523)], ConfigError, "something else of this token's"),
    "within": ("llama-3", [("<a>", 306), ("<a><b>", 307), ("<b>", 308), ("<a>x", 309), ("x<", 310)], None, ""),
    "blank": ("word-piece", [(" ", 30522)], ConfigError, "something else of this token's"),
    "no such": ("word-piece", [("<a>", 6, "[unused999999]")], PlanError, "expected 6, found no such token"),
    "another's": ("word-piece", [("<a>", 6, "[unused4]")], PlanError, "expected 6, found 5"),
    "a role": ("word-piece", [("<a>", 0, "[PAD]")], UnsupportedError, "it in pad_token"),
    "merges": ("gpt2", [("<a>", "h", "h")], UnsupportedError, "it in merges"),
    "post processor": ("t5", [("<a>", 1, "</s>")], UnsupportedError, "it in eos_token"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_token_that_would_not_do_is_refused_and_changes_nothing(case: str) -> None:
    kind, wanted, error, message = BAD[case]
    tokenizer = KINDS[kind].build()
    before = state(tokenizer)
    ids = tokenizer.get_vocab()
    tokens = [Token(t[0], ids[t[1]] if isinstance(t[1], str) else t[1], False, *t[2:]) for t in wanted]
    if error is None:
        change_tokens(tokenizer, AddTokens(tuple(tokens)))
        return
    with pytest.raises(error, match=message) as caught:
        change_tokens(tokenizer, AddTokens(tuple(tokens)))
    assert isinstance(caught.value, EmbedSurgeryError)
    assert state(tokenizer) == before


def test_an_uncased_tokenizer_finds_a_plain_token_in_capitals_and_a_special_one_as_it_is() -> None:
    tokenizer = KINDS["word-piece"].build()
    change_tokens(tokenizer, AddTokens((Token("<Tool>", 30522), Token("<Mark>", 30523, True))))
    assert encode_plain(tokenizer, "<tool> <TOOL><Mark>") == [30522, 30522, 30523]
    assert 30523 not in encode_plain(tokenizer, "<mark>")


def test_a_token_that_has_got_a_role_does_not_leave() -> None:
    tokenizer = KINDS["llama-3"].build()
    edit = AddTokens((Token("<pad>", 306, True),))
    undo = undo_of(tokenizer, edit)
    change_tokens(tokenizer, edit)
    tokenizer.pad_token = "<pad>"
    with pytest.raises(UnsupportedError, match=r"'<pad>'.*it in pad_token"):
        change_tokens(tokenizer, undo[0])
    tokenizer.pad_token = None
    change_tokens(tokenizer, undo[0])
    assert next_id(tokenizer) == 306


def test_a_token_that_a_chat_template_writes_is_not_replaced() -> None:
    tokenizer = KINDS["llama-3"].build()
    tokenizer.chat_template = "{{ '<|reserved_special_token_2|>' }}"
    with pytest.raises(UnsupportedError, match=r"reserved_special_token_2.*chat_template"):
        change_tokens(tokenizer, AddTokens((Token("<a>", 304, True, "<|reserved_special_token_2|>"),)))


def test_tokens_leave_only_as_they_came() -> None:
    tokenizer = KINDS["llama-3"].build()
    change_tokens(tokenizer, AddTokens((Token("<a>", 306), Token("<b>", 307))))
    before = state(tokenizer)
    for token, message in [
        (Token("<a>", 306), "another id"),
        (Token("<b>", 307, True), "as it was added"),
        (Token("hello", 306), "as it was added"),
    ]:
        with pytest.raises(PlanError, match=message):
            change_tokens(tokenizer, AddTokens((token,), remove=True))
        assert state(tokenizer) == before


def test_a_vocabulary_with_holes_gives_no_id_for_sure() -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "[unused1]": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    before = state(tokenizer)
    with pytest.raises(PlanError, match=r"taken by another.*'\[unused1\]'"):
        change_tokens(tokenizer, AddTokens((Token("<x>", 3),)))
    for index in (2, 4):
        with pytest.raises(UnsupportedError, match=r"holes.*expected 3 ids without a gap, found ids up to 3"):
            change_tokens(tokenizer, AddTokens((Token("<x>", index),)))
    edit = AddTokens((Token("<x>", 3, False, "[unused1]"),))
    undo = undo_of(tokenizer, edit)
    change_tokens(tokenizer, edit)
    assert encode_plain(tokenizer, "a <x>") == [1, 3]
    change_tokens(tokenizer, undo[0])
    assert state(tokenizer) == before


def test_a_part_written_in_python_is_refused_by_name() -> None:
    tokenizer = KINDS["llama-3"].build()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(SimpleNamespace())
    with pytest.raises(UnsupportedError, match=r"cannot be written out.*Custom"):
        change_tokens(tokenizer, AddTokens((Token("<a>", 306),)))


@pytest.mark.parametrize("thing", [None, "gpt2", Tokenizer(models.BPE()), SimpleNamespace(tokenizer=3)])
def test_what_is_no_tokenizer_is_refused(thing: Any) -> None:
    with pytest.raises(ConfigError, match="no tokenizer of transformers"):
        change_tokens(thing, AddTokens((Token("<a>", 3),)))


def test_a_processor_has_one() -> None:
    tokenizer = KINDS["llama-3"].build()
    change_tokens(SimpleNamespace(tokenizer=tokenizer), AddTokens((Token("<a>", 306),)))
    assert tokenizer.convert_tokens_to_ids("<a>") == 306


@BY_KIND
def test_what_planning_asks(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind].build()
    known, read = known_tokens(tokenizer), vocabulary(saved(tokenizer, tmp_path))
    assert known.texts == texts(tokenizer) == read.texts == {i: t for t, i in tokenizer.get_vocab().items()}
    assert known.next_id == next_id(tokenizer) == read.next_id == len(tokenizer)
    assert known.unknown == tokenizer.unk_token_id
    assert read.unknown in (known.unknown, None)
    assert known.encode("hello world") == tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert fits(tokenizer, len(tokenizer))
    assert not fits(tokenizer, len(tokenizer) - 1)


class TestSlow:
    """ByT5's is written in Python alone."""

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
    def test_tokens_come_and_go(self, special: bool, tmp_path: Path) -> None:
        tokenizer = tr.ByT5Tokenizer()
        before, plain = self.state(tokenizer), encodings(tokenizer)
        edit = AddTokens((Token("[[b]]", 385, special), Token("[[a]]", 384, special)))
        assert known_tokens(tokenizer).next_id == next_id(tokenizer) == 384
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
        ("token", "error", "message"),
        [
            (Token("<a>", 385), PlanError, "expected 384, found 385"),
            (Token("é", 384), PlanError, "found 236"),
            (Token("<a>", 259, False, "<extra_id_124>"), UnsupportedError, "cannot rename"),
            (Token("", 384), ConfigError, "empty"),
        ],
    )
    def test_what_cannot_be_is_refused(self, token: Token, error: type[Exception], message: str) -> None:
        tokenizer = tr.ByT5Tokenizer()
        before = self.state(tokenizer)
        with pytest.raises(error, match=message):
            change_tokens(tokenizer, AddTokens((token,)))
        assert self.state(tokenizer) == before

    def test_a_failure_in_the_middle_leaves_nothing(self) -> None:
        tokenizer = tr.ByT5Tokenizer()
        tokenizer.do_lower_case = True
        before = self.state(tokenizer)
        with pytest.raises(ConfigError, match=r"'<A>'.*expected 385, found another"):
            change_tokens(tokenizer, AddTokens((Token("<b>", 384), Token("<A>", 385))))
        assert self.state(tokenizer) == before

    def test_tokens_leave_from_the_end(self) -> None:
        tokenizer = tr.ByT5Tokenizer()
        change_tokens(tokenizer, AddTokens((Token("<a>", 384), Token("<b>", 385))))
        with pytest.raises(PlanError, match="not at the end"):
            change_tokens(tokenizer, AddTokens((Token("<a>", 384),), remove=True))
