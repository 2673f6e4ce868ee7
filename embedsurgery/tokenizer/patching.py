"""Computes the new bytes of a checkpoint's tokenizer files when tokens are added or removed. Writes nothing.

Decides which files must change. ``reading.py`` reads them, ``edit.py`` and ``sidecars.py`` have their new content, and
``files/json_patching.py`` keeps the formatting of the rest. ``live.py`` edits a tokenizer in memory.

transformers 5.23 reads these files (``PreTrainedTokenizerBase._from_pretrained``): ``tokenizer.json``, and
``added_tokens_decoder`` of ``tokenizer_config.json``, if it is there, instead of the ``added_tokens`` of
``tokenizer.json``; if it is not, ``special_tokens_map.json`` and ``added_tokens.json`` too. They must agree, so all of
them are patched. ``vocab.txt``, ``vocab.json``, ``merges.txt`` and ``tokenizer.model`` are not read beside a
``tokenizer.json`` and stay unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.errors import PlanError, UnsupportedError
from embedsurgery.files.json_patching import patch_json
from embedsurgery.files.json_reading import parse_json, read_json, read_small
from embedsurgery.plan import PatchFile, Prefix, Token
from embedsurgery.tokenizer.classes import use_plain_class
from embedsurgery.tokenizer.content import TokenizerJson
from embedsurgery.tokenizer.edit import edit_tokenizer_json, select_pending
from embedsurgery.tokenizer.encoding import Encode, check_encodings, load_backend, make_encode
from embedsurgery.tokenizer.prefix import add_to_chat_template, add_to_post_processor, refuse_existing_prefix
from embedsurgery.tokenizer.reading import ADDED, CONFIG, SPECIAL, TOKENIZER, read_tokenizer
from embedsurgery.tokenizer.sidecars import (
    SidecarEdit,
    find_replaceable_ids,
    map_templates,
    refuse_roles,
    roles_in,
    templates_in,
)

if TYPE_CHECKING:
    from embedsurgery.tokenizer.known import KnownTokens

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def read_vocabulary(directory: Path) -> TokenizerJson:
    """Read a checkpoint's ``tokenizer.json``.

    Raises:
        CheckpointError: There is no tokenizer, or its file cannot be read.
        UnsupportedError: There are only files of a slow tokenizer.
    """
    return read_tokenizer(directory)[1]


def read_replaceable_ids(directory: Path) -> tuple[int, ...]:
    """Return the ids of the reserved tokens ("[unused7]") that a new token may replace, ascending.

    Raises:
        CheckpointError: As `read_vocabulary`.
        UnsupportedError: As `read_vocabulary`.
    """
    bodies = [read_json(directory / name) for name in (CONFIG, SPECIAL) if (directory / name).exists()]
    templates = [template for body in bodies for template in templates_in(body.get("chat_template"))]
    roles = {text for body in bodies for text in roles_in(body).values()}
    return find_replaceable_ids(read_vocabulary(directory), roles, [*templates, *_read_template_files(directory)])


def read_added_tokens(directory: Path) -> tuple[Token, ...]:
    """Return the added tokens of ``tokenizer.json``, special or not, in its order.

    Raises:
        CheckpointError: As `read_vocabulary`.
        UnsupportedError: As `read_vocabulary`.
    """
    content = read_vocabulary(directory)
    return tuple(
        Token(e["content"], content.ids[e["content"]], e.get("special") is True) for e in content.added if e["content"]
    )


def read_known_tokens(directory: Path) -> KnownTokens:
    """Return what planning new tokens must know of a checkpoint's tokenizer.

    ``encode`` loads the tokenizers library on its first call, and raises `UnsupportedError` if it is not installed.

    Raises:
        CheckpointError: As `read_vocabulary`.
        UnsupportedError: As `read_vocabulary`.
    """
    from embedsurgery.tokenizer.known import KnownTokens

    data, content = read_tokenizer(directory)

    @cache
    def load() -> Encode:
        return make_encode(load_backend(data.decode(), content.where))

    return KnownTokens(
        content.texts,
        content.next_id,
        lambda text: load()(text),
        content.unknown,
        str(content.where),
        lambda: read_replaceable_ids(directory),
        lambda: {token.id for token in read_added_tokens(directory) if token.special},
    )


def encode_text(directory: Path, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it. Needs the tokenizers library.

    Raises:
        UnsupportedError: The library is not installed.
        CheckpointError: There is no tokenizer, or the library cannot load it.
    """
    data, content = read_tokenizer(directory)
    return make_encode(load_backend(data.decode(), content.where))(text)


def check_tokens(directory: Path, tokens: Sequence[Token]) -> None:
    """Check by really encoding that new tokens would be found in texts. Needs the tokenizers library.

    Raises:
        ConfigError: A text is one token already, or would not become its one id.
        EmbedSurgeryError: As `token_patches`.
    """
    data, content = read_tokenizer(directory)
    missing = select_pending(content, tokens, remove=False)
    after = _edit_bytes(data, content, missing, remove=False)[1]
    check_encodings(missing, content, *(partial(_load_encode, text, content.where) for text in (data, after)))


def _load_encode(data: bytes, where: object) -> Encode:
    return make_encode(load_backend(data.decode(), where))


def check_prefix(directory: Path, prefix: Prefix) -> None:
    """Check by really encoding that a checkpoint's tokenizer prepends a prefix. Needs the tokenizers library.

    Raises:
        PlanError: It does not prepend the tokens to a text, or their own texts do not become their ids.
    """
    data, content = read_tokenizer(directory)
    inner = load_backend(data.decode(), content.where)
    ids, found = list(prefix.ids), list(inner.encode("a").ids)
    own = list(inner.encode(prefix.text, add_special_tokens=False).ids)
    prepended = _contains_run(ids, found) if prefix.after_bos else ids == found[: len(ids)]
    if own != ids or (prefix.texts and not prepended):
        raise PlanError(
            "the tokenizer does not prepend the soft prompt",
            where=content.where,
            expected=ids[:8],
            found=(own if own != ids else found)[:8],
            hint="bake without a prefix, and report this as a bug",
        )


def _contains_run(ids: list[int], found: list[int]) -> bool:
    return any(found[begin : begin + len(ids)] == ids for begin in range(len(found)))


def token_patches(
    directory: Path, tokens: Sequence[Token], remove: bool = False, prefix: Prefix | None = None
) -> tuple[PatchFile, ...]:
    """Compute the patches of a checkpoint's files that add tokens, or remove them. Other bytes of the files stay.

    Args:
        directory: The checkpoint.
        tokens: The tokens with their ids. Tokens that the tokenizer has (or lacks) already are skipped.
        remove: Whether to remove them.
        prefix: Tokens that the tokenizer will prepend to every text; None if that does not change.

    Returns:
        A patch for each file that changes.

    Raises:
        CheckpointError: There is no tokenizer, or its files are broken or contradict each other.
        UnsupportedError: There are only files of a slow tokenizer, a token to replace is in use, or this tokenizer
            cannot prepend a prefix.
        ConfigError: A text is empty or repeated.
        PlanError: An id or a text is taken, the library would assign another id, or the tokenizer has a prefix already.
    """
    data, content = read_tokenizer(directory)
    tokens = select_pending(content, tokens, remove)
    if not tokens and prefix is None:
        return ()
    files = {TOKENIZER: _JsonFile(data, dict(content.body), *_edit_bytes(data, content, tokens, remove))}
    sidecars = SidecarEdit(content, tokens, remove, {e["content"]: e for e in files[TOKENIZER].after["added_tokens"]})
    # Only templates: each file's roles are checked when it is edited.
    refuse_roles({}, _read_template_files(directory), tokens, remove, directory)
    editors = ((CONFIG, sidecars.edit_config), (SPECIAL, sidecars.edit_config), (ADDED, sidecars.edit_added_tokens))
    for name, edit in editors:
        path = directory / name
        if path.exists():
            data = read_small(path)
            body = parse_json(data, path)
            files[name] = _JsonFile(data, body, edit(body, path))
    others = {} if prefix is None else _prepend_prefix(directory, content, files, prefix)
    patches = [
        PatchFile.change(name, file.data, file.encode(directory / name))
        for name, file in files.items()
        if file.after != file.before
    ]
    return (*patches, *(PatchFile.change(name, *pair) for name, pair in others.items()))


def _edit_bytes(
    data: bytes, content: TokenizerJson, tokens: Sequence[Token], remove: bool
) -> tuple[dict[str, Any], bytes]:
    """Return the new content and bytes of ``tokenizer.json`` with tokens added or removed. The last result is kept."""
    global _last_edit
    key = (data, tuple(tokens), remove)
    if _last_edit is None or _last_edit[0] != key:
        body = edit_tokenizer_json(content, tokens, remove)
        _last_edit = (key, body, patch_json(data, content.body, body, Path(str(content.where))))
    return dict(_last_edit[1]), _last_edit[2]


_last_edit: tuple[tuple[bytes, tuple[Token, ...], bool], dict[str, Any], bytes] | None = None
"""The last arguments and result of `_edit_bytes`. An edit calls it again and again: to check, to plan and to write."""


@dataclass
class _JsonFile:
    """A JSON file and its new content.

    Attributes:
        data: Its bytes, None if it does not exist.
        before: Its content.
        after: Its new content.
        encoded: The bytes of the new content, if they are known.
    """

    data: bytes | None
    before: dict[str, Any]
    after: dict[str, Any]
    encoded: bytes | None = None

    def encode(self, path: Path) -> bytes:
        if self.encoded is not None:
            return self.encoded
        if self.data is None:
            return (json.dumps(self.after, indent=2, ensure_ascii=False) + "\n").encode()
        return patch_json(self.data, self.before, self.after, path)


def _prepend_prefix(
    directory: Path, content: TokenizerJson, files: dict[str, _JsonFile], prefix: Prefix
) -> dict[str, tuple[bytes, bytes]]:
    """Edit ``files`` so that the tokenizer prepends a prefix, and return name -> (old, new) of other changed files."""
    config = files.setdefault(CONFIG, _JsonFile(None, {}, {}))  # created if the checkpoint has none
    special = files[SPECIAL].before if SPECIAL in files else {}
    roles = {**roles_in(special), **roles_in(config.before)}
    templates = templates_in(config.before.get("chat_template")) + _read_template_files(directory)
    refuse_existing_prefix(content.body.get("post_processor"), templates, prefix.contents, directory)
    if not prefix.texts and not templates:
        raise UnsupportedError(
            "this tokenizer has no chat template to add the prompt to",
            where=directory,
            hint="prepend the prompt to every text, or write the markers into the text",
        )
    if prefix.texts:
        model_config = directory / "config.json"
        model_type = read_json(model_config).get("model_type") if model_config.exists() else None
        processor = content.body.get("post_processor")
        files[TOKENIZER].encoded = None  # the new content is changed once more
        files[TOKENIZER].after["post_processor"] = add_to_post_processor(processor, prefix, directory / TOKENIZER)
        config.after = use_plain_class(config.after, special, content.assigned_ids, model_type, directory)
    if not prefix.chats:
        return {}

    def edit(path: Path, template: str) -> str:
        return add_to_chat_template(template, prefix, roles.get("bos_token"), path)

    if config.before.get("chat_template"):
        edit_in_config = partial(edit, directory / CONFIG)
        config.after["chat_template"] = map_templates(config.after["chat_template"], edit_in_config)
    changed = {}
    for path in _find_template_files(directory):
        data = read_small(path)
        changed[path.relative_to(directory).as_posix()] = (data, _edit_template_file(path, data, partial(edit, path)))
    return changed


def _edit_template_file(path: Path, data: bytes, edit: Callable[[str], str]) -> bytes:
    """Return the new bytes of a file with chat templates."""
    if path.suffix != ".json":
        return edit(data.decode("utf-8")).encode()
    body = parse_json(data, path)
    return patch_json(data, body, {**body, "chat_template": map_templates(body.get("chat_template"), edit)}, path)


def _find_template_files(directory: Path) -> list[Path]:
    """Return the paths of a checkpoint's files with chat templates."""
    named = [directory / name for name in TEMPLATE_FILES]
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    return [path for path in (*named, *more) if path.exists()]


def _read_template_files(directory: Path) -> list[str]:
    return [read_small(path).decode("utf-8", "replace") for path in _find_template_files(directory)]
