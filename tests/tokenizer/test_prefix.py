"""Prefixes for each kind of tokenizer: post-processors, tokenizer classes and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tr
from tokenizers import processors

from embedsurgery.errors import EmbedSurgeryError, PlanError, UnsupportedError
from embedsurgery.plan import AddTokens, PatchFile, Prefix, Token
from embedsurgery.tokenizer.classes import replaces_post_processor, use_plain_class
from embedsurgery.tokenizer.live import change_tokens, undo_of
from embedsurgery.tokenizer.patching import check_prefix, token_patches
from tests.support import baked, tokenizers
from tests.support.errors import raises

TEXTS = ("hello world", "the quick  brown fox", "a", "")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
BOS_FIRST = "{{- bos_token }}\n{%- for m in messages %}{{ m.content }}{% endfor %}"


def bert(tokenizer: Any) -> Any:
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, cls_token="[CLS]", sep_token="[SEP]"
    )


def bare(tokenizer: Any) -> Any:
    inner = tokenizer.backend_tokenizer
    text = json.loads(inner.to_str()) | {"post_processor": None}
    return tr.PreTrainedTokenizerFast(tokenizer_object=type(inner).from_str(json.dumps(text)), unk_token="<unk>")


BUILD: dict[str, Callable[[], Any]] = {
    **{name: kind.build for name, kind in tokenizers.KINDS.items()},
    "llama-3-bos": lambda: baked.with_bos(tokenizers.KINDS["llama-3"].build()),
    "bert-processing": lambda: bert(tokenizers.KINDS["word-piece"].build()),
    "roberta": baked.roberta,
    "qwen2": baked.qwen2,
    "no-processor": lambda: bare(tokenizers.KINDS["llama-2"].build()),
}


def edit_for(tokenizer: Any, **options: bool) -> AddTokens:
    """Return the edit that adds three virtual tokens and a prefix of them."""
    first = max(tokenizer.get_vocab().values()) + 1
    contents = tuple(f"<|soft:poet:{n}|>" for n in range(3))
    tokens = tuple(Token(text, first + n, special=True) for n, text in enumerate(contents))
    return AddTokens(tokens, prefix=Prefix("<|soft:poet|>", contents, tuple(t.id for t in tokens), **options))


def apply_patches(folder: Path, patches: tuple[PatchFile, ...]) -> None:
    for patch in patches:
        assert patch.after is not None
        (folder / patch.path).write_bytes(patch.after)


def check(old: Any, new: Any, edit: AddTokens) -> None:
    """Check that every encoding is the old one with the virtual tokens inserted, and nothing else."""
    assert edit.prefix is not None
    ids = list(edit.prefix.ids)
    for inner in (old._tokenizer, new._tokenizer):
        inner.no_padding()
        inner.no_truncation()
    for text in (*TEXTS, ("hello", "world, says")):
        pair = text if isinstance(text, tuple) else (text,)
        before, after = old._tokenizer.encode(*pair), new._tokenizer.encode(*pair)
        begin = next((n for n, of in enumerate(before.sequence_ids) if of == 0), 0) if edit.prefix.after_bos else 0
        if edit.prefix.after_bos and 0 not in before.sequence_ids:
            begin = after.ids.index(ids[0])
        end = begin + len(ids)
        assert after.ids == [*before.ids[:begin], *ids, *before.ids[begin:]]
        assert after.type_ids[:begin] + after.type_ids[end:] == before.type_ids
        assert after.offsets[:begin] + after.offsets[end:] == before.offsets
        assert old._tokenizer.encode(*pair, add_special_tokens=False).ids == (
            new._tokenizer.encode(*pair, add_special_tokens=False).ids
        )
    assert new.decode(new("hello world").input_ids, skip_special_tokens=True) == (
        old.decode(old("hello world").input_ids, skip_special_tokens=True)
    )


@pytest.mark.parametrize("after_bos", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("kind", BUILD)
def test_on_disk_and_in_memory(kind: str, after_bos: bool, tmp_path: Path) -> None:
    tokenizer = BUILD[kind]()
    tokenizer.save_pretrained(tmp_path)
    old = tr.AutoTokenizer.from_pretrained(tmp_path)
    edit = edit_for(tokenizer, after_bos=after_bos)
    apply_patches(tmp_path, token_patches(tmp_path, edit.tokens, prefix=edit.prefix))
    assert edit.prefix is not None
    check_prefix(tmp_path, edit.prefix)
    new = tr.AutoTokenizer.from_pretrained(tmp_path)
    check(old, new, edit)
    assert new.padding_side == old.padding_side
    assert new.model_input_names == old.model_input_names
    assert {k: str(v) for k, v in new.special_tokens_map.items() if isinstance(v, str)} == (
        {k: str(v) for k, v in old.special_tokens_map.items() if isinstance(v, str)}
    )
    with pytest.raises((PlanError, UnsupportedError)):
        token_patches(tmp_path, edit.tokens, prefix=edit.prefix)
    before = json.loads(tokenizer._tokenizer.to_str())
    undo = undo_of(tokenizer, edit)
    change_tokens(tokenizer, edit)
    check(old, tokenizer, edit)
    for back in undo:
        change_tokens(tokenizer, back)
    after = json.loads(tokenizer._tokenizer.to_str())
    assert {k: v for k, v in after.items() if k not in ("padding", "truncation")} == (
        {k: v for k, v in before.items() if k not in ("padding", "truncation")}
    )


def test_flags_that_rebuild_the_post_processor_in_transformers_4_are_removed(tmp_path: Path) -> None:
    tokenizers.KINDS["llama-2"].build().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True, "add_eos_token": False}))
    old = tr.AutoTokenizer.from_pretrained(tmp_path)
    edit = edit_for(old)
    apply_patches(tmp_path, token_patches(tmp_path, edit.tokens, prefix=edit.prefix))
    after = json.loads(path.read_text())
    assert "add_bos_token" not in after
    assert "add_eos_token" not in after
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    check(old, tr.AutoTokenizer.from_pretrained(tmp_path), edit)


def test_files_of_transformers_4(tmp_path: Path) -> None:
    """Added tokens are in three files, roles in two."""
    for kind in ("llama-3", "word-piece", "t5"):
        folder = tmp_path / kind
        folder.mkdir()
        tokenizers.older(tokenizers.KINDS[kind].build(), folder)
        old = tr.AutoTokenizer.from_pretrained(folder)
        edit = edit_for(old)
        apply_patches(folder, token_patches(folder, edit.tokens, prefix=edit.prefix))
        check(old, tr.AutoTokenizer.from_pretrained(folder), edit)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "named"])
@pytest.mark.parametrize("after_bos", [False, True], ids=["before", "behind"])
def test_chat_templates(after_bos: bool, place: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.KINDS["llama-2"].build()
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(BOS_FIRST)
    else:
        named = BOS_FIRST if place != "named" else [{"name": "default", "template": BOS_FIRST}]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    edit = edit_for(tokenizer, after_bos=after_bos)
    apply_patches(tmp_path, token_patches(tmp_path, edit.tokens, prefix=edit.prefix))
    new = tr.AutoTokenizer.from_pretrained(tmp_path)
    assert edit.prefix is not None
    found = new.apply_chat_template([{"role": "user", "content": "hello world"}], return_dict=False)
    text = new(("" if after_bos else "<s>") + "hello world", add_special_tokens=False).input_ids
    ids = [1, *edit.prefix.ids] if after_bos else list(edit.prefix.ids)
    assert found[: len(ids)] == ids
    if not after_bos:
        assert found == [*ids, *text]
    live = tokenizers.KINDS["llama-2"].build()
    live.chat_template = BOS_FIRST
    undo = undo_of(live, edit)
    change_tokens(live, edit)
    assert live.apply_chat_template([{"role": "user", "content": "hello world"}], return_dict=False) == found
    for back in undo:
        change_tokens(live, back)
    assert live.chat_template == BOS_FIRST


def test_refused_prefixes(tmp_path: Path) -> None:
    tokenizer = tokenizers.KINDS["llama-2"].build()
    tokenizer.save_pretrained(tmp_path)
    edit = edit_for(tokenizer)
    assert edit.prefix is not None
    before = tokenizers.files(tmp_path)

    def check_refused(kind: type[EmbedSurgeryError], fields: dict[str, object], **options: bool) -> None:
        prefix = edit_for(tokenizer, **options).prefix
        with raises(kind, **fields):
            token_patches(tmp_path, edit.tokens, prefix=prefix)

    check_refused(UnsupportedError, {"where": tmp_path, "expected": None, "found": None}, texts=False)
    (tmp_path / "chat_template.jinja").write_text("{% if x %}{{ bos_token + 'a' }}{% endif %}")
    check_refused(UnsupportedError, {"where": "chat_template.jinja", "expected": "bos_token"}, after_bos=True)
    (tmp_path / "chat_template.jinja").write_text("You are <|soft:poet:1|>." + CHAT)
    check_refused(PlanError, {"where": "chat template 1", "found": "'<|soft:poet:1|>'"})
    (tmp_path / "chat_template.jinja").unlink()
    body = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(body | {"tokenizer_class": "NllbTokenizer"}))
    check_refused(UnsupportedError, {"where": tmp_path, "found": "NllbTokenizer"})
    (tmp_path / "tokenizer_config.json").write_bytes(before["tokenizer_config.json"])
    assert tokenizers.files(tmp_path) == before


@pytest.mark.sweep
def test_every_class_that_replaces_the_post_processor_is_known() -> None:
    """In the installed transformers, each such class is replaced by the plain one with its settings, or refused."""
    import inspect

    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    for name in sorted({n for n in TOKENIZER_MAPPING_NAMES.values() if n}):
        made = tokenizer_class_from_name(name)
        if made is None or not hasattr(made, "__init__") or "__init__" not in vars(made):
            continue
        source = inspect.getsource(made.__init__)
        late = source.rpartition("super().__init__")[2]
        if ".post_processor =" not in late and "update_post_processor" not in late:
            continue
        if name == "TokenizersBackend":
            continue
        assert replaces_post_processor(name), name
        try:
            after = use_plain_class({"tokenizer_class": name}, {}, {}, None, "test")
        except UnsupportedError:
            continue
        assert after.get("padding_side", "right") == made.padding_side
        assert after["model_input_names"] == made.model_input_names, name
