"""The bytes that a checkpoint's tokenizer files become when tokens come or go.

Responsible for which file must change and for what stays as it was; what the files say is ``tokenizer_reading.py``'s.
transformers reads these (5.23,
``PreTrainedTokenizerBase._from_pretrained``): ``tokenizer.json``; ``added_tokens_decoder`` of
``tokenizer_config.json`` where that is there, instead of the ``added_tokens`` of ``tokenizer.json``; otherwise
``special_tokens_map.json`` and ``added_tokens.json`` too. ``vocab.txt``, ``vocab.json``, ``merges.txt`` and
``tokenizer.model`` are not read beside a ``tokenizer.json``, and stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.errors import PlanError, UnsupportedError
from embedsurgery.files.json_patching import respell
from embedsurgery.files.json_reading import parse_json, read_json, read_small
from embedsurgery.plan import PatchFile, Prefix, Token
from embedsurgery.tokenizer.classes import plain_config
from embedsurgery.tokenizer.content import TokenizerJson
from embedsurgery.tokenizer.edit import change, unsettled
from embedsurgery.tokenizer.encoding import Encode, backend, check_encodings, encoder
from embedsurgery.tokenizer.prefix import put_first, put_first_in_chat, refuse_held
from embedsurgery.tokenizer.reading import ADDED, CONFIG, SPECIAL, TOKENIZER, read_tokenizer
from embedsurgery.tokenizer.sidecars import Beside, free_reserved, in_templates, refuse_roles, roles_in, templates_in

if TYPE_CHECKING:
    from embedsurgery.tokenizer.known import KnownTokens

TEMPLATES = ("chat_template.jinja", "chat_template.json")


def vocabulary(directory: Path) -> TokenizerJson:
    """What ``tokenizer.json`` says: ``ids``, ``texts``, ``next_id``, ``reserved``.

    Raises:
        CheckpointError: There is no tokenizer, or its file cannot be read.
        UnsupportedError: There are only files of a slow tokenizer.
    """
    return read_tokenizer(directory)[1]


def replaceable(directory: Path) -> tuple[int, ...]:
    """Ids of the reserved tokens ("[unused7]") that nothing names and a new token may replace, ascending.

    Raises:
        CheckpointError: As `vocabulary`.
        UnsupportedError: As `vocabulary`.
    """
    bodies = [read_json(directory / name) for name in (CONFIG, SPECIAL) if (directory / name).exists()]
    templates = [template for body in bodies for template in templates_in(body.get("chat_template"))]
    roles = {text for body in bodies for text in roles_in(body).values()}
    return free_reserved(vocabulary(directory), roles, [*templates, *_template_files(directory)])


def added_tokens(directory: Path) -> tuple[Token, ...]:
    """The added tokens of ``tokenizer.json``, special or not, in its order.

    Raises:
        CheckpointError: As `vocabulary`.
        UnsupportedError: As `vocabulary`.
    """
    content = vocabulary(directory)
    return tuple(
        Token(e["content"], content.ids[e["content"]], e.get("special") is True) for e in content.added if e["content"]
    )


def known_tokens(directory: Path) -> KnownTokens:
    """What planning new tokens needs of a checkpoint's tokenizer; the tokenizers library is loaded when it encodes.

    Raises:
        CheckpointError: As `vocabulary`.
        UnsupportedError: As `vocabulary`; its ``encode`` too, where the library is missing.
    """
    from embedsurgery.tokenizer.known import KnownTokens

    data, content = read_tokenizer(directory)

    @cache
    def load() -> Encode:
        return encoder(backend(data.decode(), content.where))

    return KnownTokens(
        content.texts,
        content.next_id,
        lambda text: load()(text),
        content.unknown,
        str(content.where),
        lambda: replaceable(directory),
        lambda: {token.id for token in added_tokens(directory) if token.special},
    )


def encode(directory: Path, text: str) -> list[int]:
    """The ids of a text, without special tokens around it; needs the tokenizers library.

    Raises:
        UnsupportedError: The library is not installed.
        CheckpointError: There is no tokenizer that it could load.
    """
    data, content = read_tokenizer(directory)
    return encoder(backend(data.decode(), content.where))(text)


def check_tokens(directory: Path, tokens: Sequence[Token]) -> None:
    """Refuse tokens that text would not reach once they are added, by really encoding; needs the tokenizers library.

    Raises:
        ConfigError: A text that is one token already, or that would not become its one id.
        EmbedSurgeryError: As `token_patches`.
    """
    data, content = read_tokenizer(directory)
    missing = unsettled(content, tokens, remove=False)
    after = _with_tokens(data, content, missing, remove=False)[1]
    check_encodings(missing, content, *(partial(_encoder, text, content.where) for text in (data, after)))


def _encoder(data: bytes, where: object) -> Encode:
    return encoder(backend(data.decode(), where))


def check_prefix(directory: Path, prefix: Prefix) -> None:
    """Refuse a tokenizer that does not do what it is said to, by really encoding; needs the tokenizers library.

    Raises:
        PlanError: A text does not get the tokens, or their own texts do not become them.
    """
    data, content = read_tokenizer(directory)
    inner = backend(data.decode(), content.where)
    ids, found = list(prefix.ids), list(inner.encode("a").ids)
    own = list(inner.encode(prefix.text, add_special_tokens=False).ids)
    if own != ids or (prefix.texts and (ids != found[: len(ids)] if not prefix.after_bos else not _within(ids, found))):
        raise PlanError(
            "the tokenizer does not put the soft prompt where it should",
            where=content.where,
            expected=ids[:8],
            found=(own if own != ids else found)[:8],
            hint="bake without a prefix, and report this",
        )


def _within(ids: list[int], found: list[int]) -> bool:
    return any(found[place : place + len(ids)] == ids for place in range(len(found)))


def token_patches(
    directory: Path, tokens: Sequence[Token], remove: bool = False, prefix: Prefix | None = None
) -> tuple[PatchFile, ...]:
    """The files that change when tokens come (or go), each byte that need not change as it was.

    Args:
        directory: The checkpoint.
        tokens: Tokens at the ids that they are to have; those that are there (or gone) already change nothing.
        remove: They leave.
        prefix: Those that are put before every text from then on.

    Returns:
        A patch for each file that changes; nothing is written.

    Raises:
        CheckpointError: There is no tokenizer, or its files are broken or contradict each other.
        UnsupportedError: There are only files of a slow tokenizer, a token to be replaced is in use, or nothing can be
            put before every text.
        ConfigError: A text that is empty or comes twice.
        PlanError: An id or a text that is taken, or that the tokenizer would not give; tokens at the front already.
    """
    data, content = read_tokenizer(directory)
    tokens = unsettled(content, tokens, remove)
    if not tokens and prefix is None:
        return ()
    files = {TOKENIZER: _File(data, dict(content.body), *_with_tokens(data, content, tokens, remove))}
    beside = Beside(content, tokens, remove, {e["content"]: e for e in files[TOKENIZER].after["added_tokens"]})
    refuse_roles({}, _template_files(directory), tokens, remove, directory)
    for name, changed in ((CONFIG, beside.config), (SPECIAL, beside.config), (ADDED, beside.added_ids)):
        path = directory / name
        if path.exists():
            data = read_small(path)
            body = parse_json(data, path)
            files[name] = _File(data, body, changed(body, path))
    texts = {} if prefix is None else _put_first(directory, content, files, prefix)
    patches = [
        PatchFile.change(name, file.data, file.new(directory / name))
        for name, file in files.items()
        if file.after != file.before
    ]
    return (*patches, *(PatchFile.change(name, *change) for name, change in texts.items()))


def _with_tokens(
    data: bytes, content: TokenizerJson, tokens: Sequence[Token], remove: bool
) -> tuple[dict[str, Any], bytes]:
    """What ``tokenizer.json`` says with tokens added or removed, and its bytes then; the last answer is kept."""
    global _last
    asked = (data, tuple(tokens), remove)
    if _last is None or _last[0] != asked:
        body = change(content, tokens, remove)
        _last = (asked, body, respell(data, content.body, body, Path(str(content.where))))
    return dict(_last[1]), _last[2]


_last: tuple[tuple[bytes, tuple[Token, ...], bool], dict[str, Any], bytes] | None = None
"""What `_with_tokens` was asked last, and what it said: one change is checked, tried, planned and done."""


@dataclass
class _File:
    """A JSON file as it is, what it says, and what it is to say; None where it is not there.

    Attributes:
        data: Its bytes.
        before: What they say.
        after: What they are to say.
        spelled: The bytes that say so, where they are known.
    """

    data: bytes | None
    before: dict[str, Any]
    after: dict[str, Any]
    spelled: bytes | None = None

    def new(self, path: Path) -> bytes:
        if self.spelled is not None:
            return self.spelled
        if self.data is None:
            return (json.dumps(self.after, indent=2, ensure_ascii=False) + "\n").encode()
        return respell(self.data, self.before, self.after, path)


def _put_first(
    directory: Path, content: TokenizerJson, files: dict[str, _File], prefix: Prefix
) -> dict[str, tuple[bytes, bytes]]:
    """Change what files are to say so that tokens stand before every text; other files as name -> (old, new)."""
    config = files.setdefault(CONFIG, _File(None, {}, {}))
    special = files[SPECIAL].before if SPECIAL in files else {}
    roles = {**roles_in(special), **roles_in(config.before)}
    known = templates_in(config.before.get("chat_template")) + _template_files(directory)
    refuse_held(content.body.get("post_processor"), known, prefix.contents, directory)
    if not prefix.texts and not known:
        raise UnsupportedError(
            "this tokenizer has no chat template to put the prompt into",
            where=directory,
            hint="put it before every text, or write the markers into the text",
        )
    if prefix.texts:
        model_type = (
            read_json(directory / "config.json").get("model_type") if (directory / "config.json").exists() else None
        )
        processor = content.body.get("post_processor")
        files[TOKENIZER].spelled = None
        files[TOKENIZER].after["post_processor"] = put_first(processor, prefix, directory / TOKENIZER)
        config.after = plain_config(config.after, special, content.given, model_type, directory)
    bos, texts = roles.get("bos_token"), {}

    def written(template: str, where: object) -> str:
        return put_first_in_chat(template, prefix, bos, where)

    if prefix.chats:
        if config.before.get("chat_template"):
            config.after["chat_template"] = in_templates(
                config.after["chat_template"], lambda text: written(text, directory / CONFIG)
            )
        for path in _template_paths(directory):
            data = read_small(path)
            if path.suffix == ".json":
                body = parse_json(data, path)
                after = {**body, "chat_template": in_templates(body.get("chat_template"), lambda t: written(t, path))}  # noqa: B023
                new = respell(data, body, after, path)
            else:
                new = written(data.decode("utf-8"), path).encode()
            texts[path.relative_to(directory).as_posix()] = (data, new)
    return texts


def _template_paths(directory: Path) -> list[Path]:
    """The files that hold chat templates."""
    named = [directory / name for name in TEMPLATES]
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    return [path for path in (*named, *more) if path.exists()]


def _template_files(directory: Path) -> list[str]:
    return [read_small(path).decode("utf-8", "replace") for path in _template_paths(directory)]
