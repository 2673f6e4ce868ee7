"""Reads a model's config: vocabulary sizes, named token ids, tie flags and the position limit.

A config is a plain mapping here, as in ``config.json``; `as_mapping` makes one from a live model's config object.
``architectures.py`` has what is known of an architecture by its name. When a vocabulary grows,
``stores/model_config.py`` sets the new sizes in memory and ``stores/small_files.py`` on disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

SIZE_KEYS = re.compile(r"((src|tgt|text|entity|encoder|decoder)_)?vocab_size(_per_layer_input)?|n_words")
"""Config keys, and attributes of modules, that store the number of rows of a vocabulary."""

TOKEN_ID_KEYS = re.compile(r"\w+_token_(id|ids|index)")
"""Config keys that store one or several token ids."""

TEXT_SECTIONS = ("text_config", "decoder", "thinker_config", "llm_config", "language_config")
"""Config keys of a nested config of the language model."""

VOCABULARY_SECTIONS: Mapping[str, str | None] = {
    **dict.fromkeys((*TEXT_SECTIONS, "decoder_config"), None),
    "encoder": "encoder",
    "encoder_config": "encoder",
}
"""Config key of a nested config with the model's vocabulary size -> word that a table's path must contain, or None.

The config of a vision tower is not listed: it may have a ``vocab_size`` too, as Llava's does, which nothing reads.
"""

OTHER_TOKENS = re.compile(r"(?:^|[._])(entity|qformer|protein|talker|word_timestamp)(?=[._]|$)")
"""Parts of paths and keys of vocabularies other than the text's. An equal number of rows is a coincidence."""

SHORTER_HEAD_KEYS = ("unpadded_vocab_size", "output_vocab_size")
"""Config keys for the number of logits: the head returns those of the first tokens only, whatever its rows on disk."""

LONGER_INPUT_TYPES = ("mllama", "mllama_text_model")
"""Model types whose input has rows beyond the vocabulary. They have separate ids, so new tokens do not move them."""

TIE_FLAG = "tie_word_embeddings"

SectionFlag = tuple[tuple[str, ...], bool | None]
"""The keys that lead to a section of a config, and its tie flag: None if the section has none."""

_POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
)

_MAX_DEPTH = 4


def as_mapping(config: object, depth: int = _MAX_DEPTH) -> Mapping[str, Any]:
    """Return a config, and the configs nested in it, as mappings.

    Args:
        config: A mapping, an object with fields, or anything else, which gives an empty mapping.
        depth: How many levels of nested configs are converted.
    """
    fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    found = {
        key: as_mapping(value, depth - 1) if depth and _is_config(value) else value
        for key, value in fields.items()
        if isinstance(key, str)
    }
    kind = getattr(type(config), "model_type", None)  # transformers' config classes define it, their instances do not
    return {"model_type": kind, **found} if isinstance(kind, str) else found


def _is_config(value: object) -> bool:
    return isinstance(value, Mapping) or (hasattr(value, "__dict__") and type(value).__name__.endswith("Config"))


def vocabulary_sizes(config: Mapping[str, Any] | None) -> list[int]:
    """Return every vocabulary size in a config and its nested configs, the outermost first."""
    found, queue = [], [config] if isinstance(config, Mapping) else []
    for section in queue:
        for key, value in section.items():
            if isinstance(value, Mapping) and len(queue) < 64:  # a broken config may nest thousands
                queue.append(value)
            elif type(value) is int and value > 0 and SIZE_KEYS.fullmatch(key):
                found.append(value)
    return found


def find_named_ids(config: Mapping[str, Any]) -> dict[int, str]:
    """Return id -> key of the tokens that a config names for its language model, such as ``pad_token_id``."""
    found: dict[int, str] = {}
    for path, section in _iterate_sections(config):
        for key, value in section.items() if all(part in VOCABULARY_SECTIONS for part in path) else ():
            for index in value if isinstance(value, (list, tuple)) else (value,):
                if type(index) is int and TOKEN_ID_KEYS.fullmatch(key):
                    found.setdefault(index, ".".join((*path, key)))
    return found


def token_kind_of(names: Collection[str], config: Mapping[str, Any]) -> str:
    """Return the kind of tokens that tables are for: "" for the model's own, else "source", "entity" or the like.

    Args:
        names: Names of the tables, aliases included.
        config: The whole config.
    """
    other = next((match[1] for name in names if (match := OTHER_TOKENS.search(name))), None)
    if other is not None:
        return other
    in_encoder = ["encoder" in name.split(".") for name in names]
    if not _has_two_languages(config) or (any(in_encoder) and not all(in_encoder)):
        return ""
    return "source" if any(in_encoder) else "target"


def _has_two_languages(config: Mapping[str, Any]) -> bool:
    """Whether encoder and decoder have separate vocabularies, even of one size: FSMT, and some Marian models."""
    sizes = [config.get(key) for key in ("src_vocab_size", "tgt_vocab_size")]
    return all(type(size) is int for size in sizes) or config.get("share_encoder_decoder_embeddings") is False


# -- vocabulary sizes --------------------------------------------------------------------------------------------------


def find_size_keys(config: Mapping[str, Any], names: Collection[str], sizes: Collection[int]) -> list[tuple[str, ...]]:
    """Return where a config stores the size of a vocabulary, each as a path of keys.

    Args:
        config: The whole config.
        names: Names of all the vocabulary's tables, aliases included.
        sizes: Numbers of rows of its tables.
    """
    kind = token_kind_of(names, config)
    found = []
    for path, section in _size_sections(config, (), names, kind):
        for key, value in section.items():
            if type(value) is int and value in sizes and _is_size_key(key, names, kind):
                found.append((*path, key))
    return found


def _size_sections(
    section: Mapping[str, Any], path: tuple[str, ...], names: Collection[str], kind: str
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Iterate the sections of a config that may store the size of a vocabulary.

    Another kind's size is in a section called like it, such as ``qformer_config``. Entities are the exception: LUKE
    has their size at the top, as ``entity_vocab_size``.
    """
    separate = kind not in ("", "source", "target", "entity")
    if not separate or any(kind in key for key in path):
        yield path, section
    if len(path) == _MAX_DEPTH:
        return
    for key, value in section.items():
        if isinstance(value, Mapping) and (separate or _may_nest_vocabulary(key, names)):
            yield from _size_sections(value, (*path, key), names, kind)


def _may_nest_vocabulary(key: str, names: Collection[str]) -> bool:
    if key not in VOCABULARY_SECTIONS:
        return False
    word = VOCABULARY_SECTIONS[key]
    return word is None or any(word in re.split(r"[._]", name) for name in names)


def _is_size_key(key: str, names: Collection[str], kind: str) -> bool:
    if not SIZE_KEYS.fullmatch(key) or key.startswith("entity_") != (kind == "entity"):
        return False
    if key.endswith("_per_layer_input") and not any("per_layer" in name for name in names):
        return False
    if kind == "source":
        return not key.startswith(("tgt_", "decoder_"))
    return kind != "target" or key.startswith(("tgt_", "decoder_"))


def find_growth_obstacle(config: Mapping[str, Any], names: Collection[str], sizes: Collection[int]) -> str | None:
    """Return what in a config prevents a vocabulary from growing at its end, None if nothing does.

    - Rows for something else follow the tokens' (Idefics, Molmo2, Moshi, CPM-Ant), so a new id would have two meanings.
    - All ids from some id on stand for images or sounds (Gemma 3n).
    - The head returns logits of the first tokens only (Inkling 2, pruned heads of Apertus 1.5), so the model could not
      generate a new token.
    - A second model with the same vocabulary divides the text into patches, and new tokens would change them (BLT).
    - The config has a different size than the tables, so the new size is unknown.

    Args:
        config: The whole config.
        names: Names of the vocabulary's tables, aliases included.
        sizes: Numbers of rows of the vocabulary's tables.
    """
    for path, section in _iterate_sections(config):
        extra, offset = section.get("additional_vocab_size"), section.get("vocab_offset")
        where = "".join(f"{key}." for key in path)
        if type(extra) is int and extra > 0:
            return f"{where}additional_vocab_size = {extra}"
        if type(offset) is int and offset > 0:
            return f"{where}vocab_offset = {offset}"
        for key in SHORTER_HEAD_KEYS:
            if type(section.get(key)) is int:
                return f"{where}{key} = {section[key]}"
    if isinstance(config.get("patcher_config"), Mapping):
        return "patcher_config: the patches depend on the number of tokens"
    if len(set(sizes)) > 1 and config.get("model_type") not in LONGER_INPUT_TYPES:
        return f"an input of {max(sizes)} rows and a vocabulary of {min(sizes)}"
    known = vocabulary_sizes(config)
    if known and not find_size_keys(config, names, sizes):
        return f"{max(sizes)} rows, but {' or '.join(map(str, dict.fromkeys(known)))} in the config"
    return None


def _iterate_sections(
    section: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Iterate a config and every mapping nested in it, each with the keys that lead to it."""
    yield path, section
    for key, value in section.items():
        if isinstance(value, Mapping) and len(path) < _MAX_DEPTH:
            yield from _iterate_sections(value, (*path, key))


# -- tie flags ---------------------------------------------------------------------------------------------------------


def read_tie_flags(config: Mapping[str, Any]) -> list[SectionFlag]:
    """Return the tie flag of each section that a loader may read; an empty list if the flag must not change.

    It must not change in T5 and its relatives, which scale the head's input when the flag is set and load a stored head
    whatever the flag is.
    """
    return [] if "d_kv" in config else list(_iterate_tie_flags(config, ()))


def _iterate_tie_flags(section: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[SectionFlag]:
    flag = section.get(TIE_FLAG)
    yield path, flag if isinstance(flag, bool) else None
    for key in TEXT_SECTIONS:
        if isinstance(section.get(key), Mapping) and len(path) < 3:
            yield from _iterate_tie_flags(section[key], (*path, key))


def replace_tie_flags(config: Mapping[str, Any], flags: list[SectionFlag]) -> dict[str, Any]:
    """Return a copy of a config with the given tie flags."""
    after = dict(config)
    for path, flag in flags:
        section = after
        for key in path:
            section[key] = dict(section[key])
            section = section[key]
        if flag is None:
            section.pop(TIE_FLAG, None)
        else:
            section[TIE_FLAG] = flag
    return after


def clear_tie_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config in which every tie flag is False."""
    return replace_tie_flags(config, [(path, False) for path, _ in read_tie_flags(config)])


# -- positions ---------------------------------------------------------------------------------------------------------


def position_limit(config: object) -> int | None:
    """Return the smallest number of positions in a config and its nested configs of a language model, None without one.

    Args:
        config: An object, a mapping, or None.
    """
    found: list[int] = []
    sections = [as_mapping(config)] if config is not None else []
    for section in sections:
        if "relative_attention_num_buckets" not in section:  # T5 has n_positions, but its positions are relative
            found += [section[key] for key in _POSITION_KEYS if type(section.get(key)) is int and section[key] > 0]
        sections += [section[key] for key in TEXT_SECTIONS if isinstance(section.get(key), Mapping)]
    return min(found, default=None)
