"""Patches of a checkpoint's tokenizer files: the bytes that change when tokens are added or removed, and errors."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedsurgery.errors import CheckpointError, ConfigError, EmbedSurgeryError, PlanError, UnsupportedError
from embedsurgery.plan import PatchFile, Token
from embedsurgery.tokenizer import live as live_tokenizer
from embedsurgery.tokenizer.content import TokenizerJson, is_reserved
from embedsurgery.tokenizer.patching import (
    check_tokens,
    encode_text,
    read_added_tokens,
    read_known_tokens,
    read_replaceable_ids,
    read_vocabulary,
    token_patches,
)
from embedsurgery.tokenizer.reading import find_disagreements, highest_token_id, read_token_texts
from tests.support.errors import raises
from tests.support.real_encoder import model_directory
from tests.support.tokenizers import KINDS, files, loaded, older, saved

STYLES: dict[str, dict[str, Any]] = {
    "two": {"indent": 2, "ensure_ascii": False},
    "ascii": {"indent": 4},
    "tab": {"indent": "\t", "ensure_ascii": False},
    "spaced": {"ensure_ascii": False},
    "compact": {"separators": (",", ":"), "ensure_ascii": False},
}
TOOL = "<tööl>"


def restyled(directory: Path, style: str, end: str = "\n") -> Path:
    """Rewrite the files in another formatting."""
    for name, data in files(directory).items():
        if name.endswith(".json"):
            (directory / name).write_text(json.dumps(json.loads(data), **STYLES[style]) + end, encoding="utf-8")
    return directory


def write(directory: Path, patches: tuple[PatchFile, ...]) -> None:
    for patch in patches:
        path = directory / patch.path
        assert hashlib.sha256(path.read_bytes()).hexdigest() == patch.before
        assert patch.after is not None
        path.write_bytes(patch.after)


def tokens_for(directory: Path, kind: str, special: bool) -> list[Token]:
    """Return a token that replaces a reserved one, and two with new ids."""
    known = read_vocabulary(directory)
    reserved = KINDS[kind].reserved
    first = Token(TOOL, known.ids[reserved], special, reserved)
    return [first, Token("a second", known.next_id, special), Token('"third"\\', known.next_id + 1, special)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["llama-3", "gpt2", "llama-2", "word-piece", "unigram"])
@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
def test_only_the_necessary_bytes_change(kind: str, special: bool, style: str, tmp_path: Path) -> None:
    directory = restyled(older(KINDS[kind].build(), tmp_path / "base"), style, "" if style == "ascii" else "\n")
    (directory / "tokenizer.model").write_bytes(b"\x00 stays unchanged")
    if kind == "word-piece":  # nothing reads it beside a tokenizer.json
        shutil.copyfile(model_directory() / "vocab.txt", directory / "vocab.txt")
    before = files(directory)
    tokens = tokens_for(directory, kind, special)
    patches = token_patches(directory, tokens)
    assert [patch.path for patch in patches] == [
        name
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        if name in before and name != "special_tokens_map.json"
    ]
    assert files(directory) == before
    write(directory, patches)

    after = files(directory)
    assert [name for name in after if after[name] != before[name]] == sorted(patch.path for patch in patches)
    for patch in patches:
        end = "" if style == "ascii" else "\n"
        escaped = b"\\u" in before[patch.path]  # a file without such a character is not escaped
        whole = json.dumps(json.loads(after[patch.path]), **{**STYLES[style], "ensure_ascii": escaped}) + end
        assert after[patch.path] == whole.encode(), "not in the file's own formatting"
    body = json.loads(after["tokenizer.json"])
    old = json.loads(before["tokenizer.json"])
    assert list(body) == list(old)
    assert {**body, "added_tokens": 0, "model": 0} == {**old, "added_tokens": 0, "model": 0}
    assert {**body["model"], "vocab": 0} == {**old["model"], "vocab": 0}
    assert [entry["id"] for entry in body["added_tokens"]] == sorted(e["id"] for e in body["added_tokens"])
    config = json.loads(after["tokenizer_config.json"])
    decoder = {int(index): entry for index, entry in config["added_tokens_decoder"].items()}
    assert list(decoder) == sorted(decoder)
    assert {index: decoder[index] for index in (token.id for token in tokens)} == {
        e["id"]: {name: value for name, value in e.items() if name != "id"}
        for e in body["added_tokens"]
        if e["id"] in [token.id for token in tokens]
    }
    assert token_patches(directory, tokens) == ()
    ids = loaded(directory)(f"x {TOOL} y", add_special_tokens=False)["input_ids"]
    assert ids.count(tokens[0].id) == 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["gpt2", "word-piece", "unigram"])
def test_removing_restores_every_byte(kind: str, style: str, tmp_path: Path) -> None:
    directory = restyled(older(KINDS[kind].build(), tmp_path / "base"), style)
    before = files(directory)
    tokens = tokens_for(directory, kind, special=True)
    write(directory, token_patches(directory, tokens))
    write(directory, token_patches(directory, tokens, remove=True))
    assert files(directory) == before
    assert token_patches(directory, tokens, remove=True) == ()


def test_an_existing_list_of_special_tokens_grows(tmp_path: Path) -> None:
    directory = older(KINDS["t5"].build(), tmp_path / "old")
    before = files(directory)
    token = Token(TOOL, read_vocabulary(directory).next_id, special=True)
    write(directory, token_patches(directory, [token]))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        listed = json.loads(files(directory)[name])["additional_special_tokens"]
        assert listed == [*(f"<extra_id_{n}>" for n in range(5)), TOOL]
    assert json.loads(files(directory)["tokenizer_config.json"])["extra_special_tokens"] == {}
    write(directory, token_patches(directory, [token], remove=True))
    assert files(directory) == before


def test_a_listed_token_is_replaced_at_its_position_in_any_form(tmp_path: Path) -> None:
    directory = saved(KINDS["t5"].build(), tmp_path / "t5")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["extra_special_tokens"][3] = {"__type": "AddedToken", "content": "<extra_id_3>", "lstrip": True}
    path.write_text(json.dumps(config))
    token = Token(TOOL, read_vocabulary(directory).ids["<extra_id_3>"], True, "<extra_id_3>")
    write(directory, token_patches(directory, [token]))
    after = json.loads(path.read_text())
    assert after["extra_special_tokens"][3] == {"__type": "AddedToken", "content": TOOL, "lstrip": True}
    assert after["extra_special_tokens"][:3] == config["extra_special_tokens"][:3]
    assert TOOL in json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"][token.id]


def test_a_token_with_a_role_or_in_a_template_is_not_replaced(tmp_path: Path) -> None:
    directory = saved(KINDS["llama-3"].build(), tmp_path / "base")
    reserved = KINDS["llama-3"].reserved
    token = Token(TOOL, read_vocabulary(directory).ids[reserved], True, reserved)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    for extra, role in [
        ({"pad_token": reserved}, "pad_token"),
        ({"image_token": {"content": reserved}}, "image_token"),
        ({"extra_special_tokens": {"boi_token": reserved}}, "boi_token"),
        ({"chat_template": "{{ '" + reserved + "' }}"}, "chat_template"),
        ({"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": reserved}]}, "chat_template"),
    ]:
        (directory / "tokenizer_config.json").write_text(json.dumps({**config, **extra}))
        with raises(UnsupportedError, where="reserved_special_token_1", found=role):
            token_patches(directory, [token])
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(reserved)
    with raises(UnsupportedError, where="reserved_special_token_1", found="chat_template"):
        token_patches(directory, [token])


def test_a_token_that_the_post_processor_writes_is_not_replaced(tmp_path: Path) -> None:
    directory = saved(KINDS["word-piece"].build(), tmp_path / "base")
    (directory / "tokenizer_config.json").unlink()
    with raises(UnsupportedError, where="'[CLS]'", found="post_processor"):
        token_patches(directory, [Token("<a>", 101, True, "[CLS]")])


@pytest.mark.parametrize(
    ("name", "body", "found"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"306": {"content": "<other>"}}}, "'<other>'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}, "306": 7}}, "7"),
        ("added_tokens.json", {"<a>": 400}, "400"),
    ],
)
def test_files_that_contradict_each_other_are_refused(name: str, body: Any, found: str, tmp_path: Path) -> None:
    directory = saved(KINDS["llama-3"].build(), tmp_path / "base")
    (directory / name).write_text(json.dumps(body))
    with raises(CheckpointError, where=(name, "'<a>'"), expected=306, found=found):
        token_patches(directory, [Token("<a>", 306)])
    assert find_disagreements(directory, 306)


@pytest.mark.parametrize(
    ("tokens", "error", "fields"),
    [
        ([Token("<a>", 307)], PlanError, {"expected": 306, "found": 307}),
        ([Token("<a>", 5)], PlanError, {"where": "'<a>'", "expected": "id 5", "found": "'"}),
        ([Token("hello", 306)], PlanError, {"where": "'hello'", "expected": 306, "found": 2}),
        ([Token("", 306)], ConfigError, {"where": "token 0 of 1"}),
        ([Token("<a>", 306), Token("<a>", 307)], ConfigError, {"where": "'<a>'", "found": None, "hint": "once"}),
        ([Token("<a>", 303, False, "<|reserved_special_token_0|>")], PlanError, {"expected": 303, "found": 302}),
    ],
)
def test_a_token_with_an_invalid_text_or_id_is_refused(
    tokens: list[Token], error: type[EmbedSurgeryError], fields: dict[str, Any], tmp_path: Path
) -> None:
    directory = saved(KINDS["llama-3"].build(), tmp_path / "base")
    with raises(error, **fields):
        token_patches(directory, tokens)


def test_a_directory_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with raises(CheckpointError, where=tmp_path, expected="tokenizer.json", found=None):
        token_patches(tmp_path, [Token("<a>", 3)])
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with raises(UnsupportedError, found="tokenizer.model, vocab.txt", hint="save_pretrained"):
        token_patches(tmp_path, [Token("<a>", 3)])
    assert read_token_texts(tmp_path) is None
    assert highest_token_id(tmp_path) is None


def test_versions_of_tokenizer_json_are_refused(tmp_path: Path) -> None:
    directory = saved(KINDS["llama-3"].build(), tmp_path / "base")
    (directory / "tokenizer_config.json").write_text(
        '{"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"]}'
    )
    with raises(UnsupportedError, where="tokenizer_config.json", found="tokenizer.4.0.json"):
        token_patches(directory, [Token("<a>", 306)])


SOUND = {"id": 2, "content": "<x>", "special": True}
BROKEN = {
    "no JSON": b"{",
    "a list": b"[]",
    "not UTF-8": b'{"model": "\xff"}',
    "deep": b'{"model": ' + b"[" * 200_000,
    "no model": b"{}",
    "model a list": b'{"model": []}',
    "vocab of texts": b'{"model": {"vocab": {"a": "0"}}}',
    "vocab below zero": b'{"model": {"vocab": {"a": -1}}}',
    "vocab of truth": b'{"model": {"vocab": {"a": true}}}',
    "pieces of numbers": b'{"model": {"vocab": [[1, 2]]}}',
    "added no list": b'{"model": {"vocab": {"a": 0}}, "added_tokens": {}}',
    "added of texts": b'{"model": {"vocab": {"a": 0}}, "added_tokens": ["b"]}',
    "added without id": b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}',
    "an id it will not get": b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": 7}]}',
    "the vocabulary's, elsewhere": b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "a", "id": 1}]}',
    "twice": b'{"model": {"vocab": {"a": 0}}, "added_tokens": [], "added_tokens": []}',
    "huge number": b'{"model": {"vocab": {"a": ' + b"9" * 5000 + b"}}}",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with raises(CheckpointError, where="tokenizer.json"):
        token_patches(tmp_path, [Token("<a>", 1)])


@pytest.mark.parametrize("merges", [[["a", {}]], [["a", 1]], [3], 3])
def test_invalid_merges_are_refused(merges: Any, tmp_path: Path) -> None:
    body = {"model": {"vocab": {"[unused1]": 0, "b": 1}, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    with raises(CheckpointError, where="tokenizer.json", expected="pairs"):
        token_patches(tmp_path, [Token("<a>", 0, False, "[unused1]")])


WILD = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.sampled_from(["a", "b", "<a>", "[unused1]", "0", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["content", "id", "special", "a", "<a>", "vocab", "merges", "0", "2"]), inner)
    ),
    max_leaves=8,
)
BODIES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"vocab": st.just({"a": 0, "[unused1]": 1}) | WILD}, optional={"merges": WILD})
        | WILD
    },
    optional={"added_tokens": st.just([SOUND]) | WILD, "post_processor": WILD},
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "added_tokens_decoder": WILD,
        "extra_special_tokens": WILD,
        "additional_special_tokens": WILD,
        "pad_token": WILD,
        "chat_template": WILD,
        "fast_tokenizer_files": WILD,
        "extra_ids": WILD,
    },
)


@settings(max_examples=200, deadline=None)
@given(BODIES, CONFIGS, st.dictionaries(st.sampled_from(["<a>", "b"]), WILD), st.booleans())
def test_arbitrary_files_give_patches_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, body: Any, config: Any, added: Any, remove: bool
) -> None:
    directory = tmp_path_factory.mktemp("wild")
    for name, value in {
        "tokenizer.json": body,
        "tokenizer_config.json": config,
        "special_tokens_map.json": config,
        "added_tokens.json": added,
    }.items():
        (directory / name).write_text(json.dumps(value))
    tokens = [Token("<a>", 1, True, "[unused1]"), Token("b", 3, True)]
    try:
        patches = token_patches(directory, tokens, remove)
    except EmbedSurgeryError:
        return
    for patch in patches:
        assert patch.after is not None
        json.loads(patch.after)
    find_disagreements(directory, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_the_files(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind].build()
    directory = older(tokenizer, tmp_path / "base")
    known = read_vocabulary(directory)
    assert known.ids == tokenizer.get_vocab()
    assert known.next_id == len(tokenizer) == (highest_token_id(directory) or 0) + 1
    assert read_token_texts(directory) == known.texts
    texts = tokenizer.convert_ids_to_tokens(known.reserved)
    assert texts == [text for text in tokenizer.convert_ids_to_tokens(range(len(tokenizer))) if is_reserved(text)]
    assert (KINDS[kind].reserved in texts) is (kind != "t5")  # T5 uses its sentinel tokens
    decoder = tokenizer.added_tokens_decoder.items()
    assert read_added_tokens(directory) == tuple(Token(t.content, index, t.special) for index, t in sorted(decoder))
    assert find_disagreements(directory, len(tokenizer), [len(tokenizer)]) == ()
    fewer = find_disagreements(directory, len(tokenizer) - 1, [len(tokenizer)])
    assert len(fewer) == 2
    assert fewer[1].count(str(len(tokenizer) - 1)) == 2  # the highest id, and the number of rows
    planning = read_known_tokens(directory)
    plain = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert planning.encode("hello world") == encode_text(directory, "hello world") == plain
    assert (planning.texts, planning.next_id, planning.unknown) == (known.texts, known.next_id, known.unknown)


def test_disagreeing_files_are_listed(tmp_path: Path) -> None:
    directory = older(KINDS["llama-3"].build(), tmp_path / "base")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["305"]["content"] = "<other>"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "added_tokens.json").write_text('{"<new>": 306, "<|end_of_text|>": 301}')
    in_added, in_config = find_disagreements(directory, 320)
    assert all(part in in_added for part in ("added_tokens.json", "'<new>'", "306", " tokenizer.json"))
    assert all(part in in_config for part in ("tokenizer_config.json", "'<other>'", "305", " tokenizer.json"))


def test_encoding_finds_tokens_that_no_text_gives(tmp_path: Path) -> None:
    directory = saved(KINDS["word-piece"].build(), tmp_path / "base")
    check_tokens(directory, [Token("<tool>", 30522), Token("hakurei", 6, False, "[unused5]")])
    with raises(ConfigError, where="'HELLO'", found="7592 'hello'"):
        check_tokens(directory, [Token("HELLO", 30522)])
    with raises(ConfigError, where="<", expected=3052, found=3052):  # the library decides which of the two is found
        check_tokens(directory, [Token("<TOOL>", 30522), Token("<tool>", 30523)])
    assert token_patches(directory, [Token("HELLO", 30522)]), "the files alone do not show it"


def test_the_error_without_the_library_has_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved(KINDS["llama-3"].build(), tmp_path / "base")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with raises(UnsupportedError, hint="pip install tokenizers"):
        encode_text(directory, "a")
    known = read_known_tokens(directory)
    assert token_patches(directory, [Token("<a>", known.next_id)])
    with raises(UnsupportedError, hint="pip install tokenizers"):
        known.encode("a")


def test_a_file_that_the_library_cannot_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nothing", "vocab": {"a": 0}}, "added_tokens": []}')
    with raises(CheckpointError, what="tokenizers", where="tokenizer.json"):
        encode_text(tmp_path, "a")


def test_the_library_skips_an_empty_added_token() -> None:
    entries = [{"id": 9, "content": ""}, {"id": 1, "content": "<x>"}]
    content = TokenizerJson({"model": {"vocab": {"a": 0}}, "added_tokens": entries}, "x")
    assert (content.ids, content.next_id) == ({"a": 0, "<x>": 1}, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_reserved_tokens_in_use_are_not_replaceable(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind].build()
    directory = saved(tokenizer, tmp_path / "base")
    known = read_vocabulary(directory)
    assert read_replaceable_ids(directory) == live_tokenizer.replaceable_ids_of(tokenizer) == known.reserved
    if kind == "t5":
        return
    first, second, *rest = (known.texts[index] for index in known.reserved)
    tokenizer.pad_token = first
    if kind == "llama-3":
        tokenizer.chat_template = "{{ '" + second + "' }}"
    else:
        rest = [second, *rest]
    saved(tokenizer, directory)
    assert (directory / "chat_template.jinja").exists() is (kind == "llama-3")
    expected = tuple(known.ids[text] for text in rest)
    assert read_replaceable_ids(directory) == live_tokenizer.replaceable_ids_of(tokenizer) == expected
    assert token_patches(directory, [Token("<a>", index, False, known.texts[index]) for index in expected[:1]])
    with raises(UnsupportedError, found="pad_token"):
        token_patches(directory, [Token("<a>", known.ids[first], False, first)])


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1).filter(
        lambda vocab: len(set(vocab.values())) == len(vocab)
    ),
    st.lists(st.tuples(st.sampled_from(["a", "b", "x", "y", "z", ""]), st.booleans()), max_size=5),
)
def test_ids_are_those_that_the_library_assigns(vocab: dict[str, int], entries: list[tuple[str, bool]]) -> None:
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": next(iter(vocab))}
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": 5, "content": text, **rest, "special": special} for text, special in entries]
    body = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    inner = Tokenizer.from_str(json.dumps(body))
    assert TokenizerJson(body, "x").assigned_ids == inner.get_vocab()
    ids = inner.get_vocab()
    body["added_tokens"] = [{**entry, "id": ids[entry["content"]]} for entry in added if entry["content"]]
    content = TokenizerJson(body, "x")
    assert content.ids == ids
    more = {**body, "added_tokens": [*added, {"id": 5, "content": "new", **rest, "special": False}]}
    assert Tokenizer.from_str(json.dumps(more)).token_to_id("new") == content.next_id
    inner.add_tokens(["new"])
    assert content.has_gaps or content.next_id == inner.token_to_id("new")
