"""A checkpoint's tokenizer files: what they say, and the bytes that they become when tokens come or go.

Responsible for which file must change and for what stays as it was. transformers reads these (5.23,
``PreTrainedTokenizerBase._from_pretrained``): ``tokenizer.json``; ``added_tokens_decoder`` of
``tokenizer_config.json`` where that is there, instead of the ``added_tokens`` of ``tokenizer.json``; otherwise
``special_tokens_map.json`` and ``added_tokens.json`` too. ``vocab.txt``, ``vocab.json``, ``merges.txt`` and
``tokenizer.model`` are not read beside a ``tokenizer.json``, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.errors import CheckpointError, EmbedSurgeryError, UnsupportedError
from embedsurgery.jsonfile import parse_json, read_json, read_small
from embedsurgery.jsonsplice import respell
from embedsurgery.plan import PatchFile, Token
from embedsurgery.tokenizer_beside import Beside, free_reserved, refuse_roles, roles_in, templates_in
from embedsurgery.tokenizer_edit import change, unsettled
from embedsurgery.tokenizer_encoding import Encode, backend, check_encodings, encoder
from embedsurgery.tokenizer_json import TokenizerJson
from embedsurgery.tokenizer_json import is_reserved as is_reserved

if TYPE_CHECKING:
    from embedsurgery.new_tokens import KnownTokens

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")

_OTHERS = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
           "tekken.json", "tiktoken.model", "bpe.codes", CONFIG, SPECIAL, ADDED)  # fmt: skip
"""What a slow tokenizer, or one of another library, may consist of."""


def token_texts(directory: Path) -> dict[int, str] | None:
    """Id -> text of every token in ``tokenizer.json``, added ones included; None without that file.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    path = directory / TOKENIZER
    if not path.exists():
        return None
    return dict(_tokens(read_json(path)))


def highest_token_id(directory: Path) -> int | None:
    """The highest id that the tokenizer can give, None where ``tokenizer.json`` does not say."""
    texts = token_texts(directory)
    return max(texts) if texts else None


def vocabulary(directory: Path) -> TokenizerJson:
    """What ``tokenizer.json`` says: ``ids``, ``texts``, ``next_id``, ``reserved``.

    Raises:
        CheckpointError: There is no tokenizer, or its file cannot be read.
        UnsupportedError: There are only files of a slow tokenizer.
    """
    return _read(directory)[1]


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
    return tuple(Token(e["content"], content.ids[e["content"]], e.get("special") is True)
                 for e in content.added if e["content"])  # fmt: skip


def known_tokens(directory: Path) -> KnownTokens:
    """What planning new tokens needs of a checkpoint's tokenizer; the tokenizers library is loaded when it encodes.

    Raises:
        CheckpointError: As `vocabulary`.
        UnsupportedError: As `vocabulary`; its ``encode`` too, where the library is missing.
    """
    from embedsurgery.new_tokens import KnownTokens

    data, content = _read(directory)

    @cache
    def load() -> Encode:
        return encoder(backend(data.decode(), content.where))

    return KnownTokens(content.texts, content.next_id, lambda text: load()(text), content.unknown, str(content.where),
                       lambda: replaceable(directory),
                       lambda: {token.id for token in added_tokens(directory) if token.special})  # fmt: skip


def encode(directory: Path, text: str) -> list[int]:
    """The ids of a text, without special tokens around it; needs the tokenizers library.

    Raises:
        UnsupportedError: The library is not installed.
        CheckpointError: There is no tokenizer that it could load.
    """
    data, content = _read(directory)
    return encoder(backend(data.decode(), content.where))(text)


def check_tokens(directory: Path, tokens: Sequence[Token]) -> None:
    """Refuse tokens that text would not reach once they are added, by really encoding; needs the tokenizers library.

    Raises:
        ConfigError: A text that is one token already, or that would not become its one id.
        EmbedSurgeryError: As `token_patches`.
    """
    data, content = _read(directory)
    missing = unsettled(content, tokens, remove=False)
    after = respell(data, content.body, change(content, missing), directory / TOKENIZER)
    old, new = (encoder(backend(text.decode(), content.where)) for text in (data, after))
    check_encodings(missing, content, old, new)


def disagreements(directory: Path, rows: int, sizes: Iterable[int] = ()) -> tuple[str, ...]:
    """In what the tokenizer's files, the config and the input table do not agree; empty where they do.

    Args:
        directory: The checkpoint.
        rows: How many rows the table has.
        sizes: The vocabulary sizes that ``config.json`` names.
    """
    said = tuple(dict.fromkeys(sizes))
    found = []
    if said and rows not in said:
        found.append(f"the config says {' or '.join(map(str, said))}, the table has {rows} rows")
    try:
        return (*found, *_contradictions(directory, rows))
    except EmbedSurgeryError as error:
        return (*found, str(error))


def token_patches(directory: Path, tokens: Sequence[Token], remove: bool = False) -> tuple[PatchFile, ...]:
    """The files that change when tokens come (or go), each byte that need not change as it was.

    Args:
        directory: The checkpoint.
        tokens: Tokens at the ids that they are to have; those that are there (or gone) already change nothing.
        remove: They leave.

    Returns:
        A patch for each file that changes; nothing is written.

    Raises:
        CheckpointError: There is no tokenizer, or its files are broken or contradict each other.
        UnsupportedError: There are only files of a slow tokenizer, or a token to be replaced is in use.
        ConfigError: A text that is empty or comes twice.
        PlanError: An id or a text that is taken, or that the tokenizer would not give.
    """
    data, content = _read(directory)
    tokens = unsettled(content, tokens, remove)
    if not tokens:
        return ()
    after = change(content, tokens, remove)
    patches = [PatchFile.change(TOKENIZER, data, respell(data, content.body, after, directory / TOKENIZER))]
    beside = Beside(content, tokens, remove, {e["content"]: e for e in after["added_tokens"]})
    refuse_roles({}, _template_files(directory), tokens, remove, directory)
    for name, changed in ((CONFIG, beside.config), (SPECIAL, beside.config), (ADDED, beside.added_ids)):
        path = directory / name
        if path.exists():
            data = read_small(path)
            body = parse_json(data, path)
            new = changed(body, path)
            if new != body:
                patches.append(PatchFile.change(name, data, respell(data, body, new, path)))
    return tuple(patches)


def _read(directory: Path) -> tuple[bytes, TokenizerJson]:
    """The bytes and the content of ``tokenizer.json``."""
    path = directory / TOKENIZER
    if not path.exists():
        slow = [name for name in _OTHERS if (directory / name).exists()]
        if not slow:
            raise CheckpointError("no tokenizer beside the weights", where=directory, expected=TOKENIZER,
                                  hint="put the model's tokenizer files there")  # fmt: skip
        raise UnsupportedError("a tokenizer of the slow kind alone", where=directory, expected=TOKENIZER,
                               found=", ".join(slow), hint="AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) "
                               "writes one where the model has a fast tokenizer; es.add_tokens needs none")  # fmt: skip
    config = directory / CONFIG
    versions = read_json(config).get("fast_tokenizer_files") if config.exists() else None
    if isinstance(versions, list) and any(name != TOKENIZER for name in versions):
        raise UnsupportedError("several versions of tokenizer.json", where=config, found=", ".join(map(str, versions)),
                               hint="save the tokenizer again with the transformers that you use")  # fmt: skip
    data = read_small(path)
    return data, TokenizerJson(parse_json(data, path), path)


def _template_files(directory: Path) -> list[str]:
    paths = [directory / name for name in TEMPLATES]
    return [read_small(path).decode("utf-8", "replace") for path in paths if path.exists()]


def _contradictions(directory: Path, rows: int) -> Iterator[str]:
    """What the tokenizer's files say against each other and against the table."""
    content = vocabulary(directory)
    highest = max(content.texts, default=-1)
    if highest >= rows:
        yield f"the tokenizer has ids up to {highest}, the table has {rows} rows"
    config = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    decoder = config.get("added_tokens_decoder")
    listed = read_json(directory / ADDED) if (directory / ADDED).exists() else {}
    said = [(ADDED, text, index) for text, index in listed.items()]
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        said.append((CONFIG, str(entry.get("content") if isinstance(entry, dict) else entry), index))
    for name, text, index in said:
        if str(content.ids.get(text)) != str(index):
            yield f"{name} says that {text!r} is {index}, {TOKENIZER} says {content.ids.get(text, 'nothing of it')}"


def _tokens(body: dict[str, Any]) -> Iterator[tuple[int, str]]:
    model = body.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from ((index, text) for text, index in vocab.items() if type(index) is int)
    elif isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        for index, piece in enumerate(vocab):
            if isinstance(piece, list) and piece and isinstance(piece[0], str):
                yield index, piece[0]
    added = body.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str):
            yield token["id"], token["content"]
