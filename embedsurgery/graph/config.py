"""Which numbers of a config count a vocabulary, and what a config says of rows that follow its tokens'.

Configs are plain mappings here, as ``config.json`` has them; `as_mapping` makes one of a live model's config object.
Changing the numbers is the stores': ``model_sizes.py`` in memory, ``stores/small_files.py`` on disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

SIZES = re.compile(r"((src|tgt|text|entity|encoder|decoder)_)?vocab_size(_per_layer_input)?|n_words")
"""Keys of a config, and attributes of modules, that give the number of rows of a vocabulary."""

ROLES = re.compile(r"\w+_token_(id|ids|index)")
"""Keys of a config that name a token, or several."""

TEXT_SECTIONS = ("text_config", "decoder", "thinker_config", "llm_config", "language_config")
"""Keys of a config that nest the config of its language model."""

SECTIONS: Mapping[str, str | None] = {
    **dict.fromkeys((*TEXT_SECTIONS, "decoder_config"), None),
    "encoder": "encoder",
    "encoder_config": "encoder",
}
"""Keys of a config that nest a config with the vocabulary of the whole; for some of them only where a table lies on a
path with this word. A vision tower's config may name a vocabulary too (Llava's does), which nothing reads."""

OTHER_TOKENS = re.compile(r"(?:^|[._])(entity|qformer|protein|talker|word_timestamp)(?=[._]|$)")
"""Parts of paths and keys that have tokens of their own, which only by chance are as many as the text's."""

SHORTER_HEADS = ("unpadded_vocab_size", "output_vocab_size")
"""Keys of a config that say of how many tokens, its first ones, a head gives logits, whatever rows it has on disk."""

LONGER_INPUTS = ("mllama", "mllama_text_model")
"""Model types whose input has rows beyond the vocabulary that new tokens do not move: theirs have ids of their own."""

_DEPTH = 4


def as_mapping(config: object, depth: int = _DEPTH) -> Mapping[str, Any]:
    """The fields of a config, and of the configs in it, whatever it is: a mapping or an object."""
    fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    found = {
        key: as_mapping(value, depth - 1) if depth and _is_config(value) else value
        for key, value in fields.items()
        if isinstance(key, str)
    }
    kind = getattr(type(config), "model_type", None)  # transformers' objects have it in their class
    return {"model_type": kind, **found} if isinstance(kind, str) else found


def _is_config(value: object) -> bool:
    return isinstance(value, Mapping) or (hasattr(value, "__dict__") and type(value).__name__.endswith("Config"))


def vocabulary_sizes(config: Mapping[str, Any] | None) -> list[int]:
    """Every vocabulary size that a config names, its nested configs included; the outermost first."""
    found, queue = [], [config] if isinstance(config, Mapping) else []
    for part in queue:
        for key, value in part.items():
            if isinstance(value, Mapping) and len(queue) < 64:
                queue.append(value)
            elif type(value) is int and value > 0 and SIZES.fullmatch(key):
                found.append(value)
    return found


def named_ids(config: Mapping[str, Any]) -> dict[int, str]:
    """Id -> key, of the tokens that a config gives a part in its language model: ``pad_token_id`` and its like."""
    found: dict[int, str] = {}
    for path, section in _all_sections(config):
        for key, value in section.items() if all(part in SECTIONS for part in path) else ():
            for index in value if isinstance(value, (list, tuple)) else (value,):
                if type(index) is int and ROLES.fullmatch(key):
                    found.setdefault(index, ".".join((*path, key)))
    return found


def tokens_of(names: Collection[str], config: Mapping[str, Any]) -> str:
    """Whose tokens the tables of these names are for: "" for the model's own, else a word that tells them apart."""
    other = next((match[1] for name in names if (match := OTHER_TOKENS.search(name))), None)
    if other is not None:
        return other
    encoding = ["encoder" in name.split(".") for name in names]
    if not _two_languages(config) or (any(encoding) and not all(encoding)):
        return ""
    return "source" if any(encoding) else "target"


def _two_languages(config: Mapping[str, Any]) -> bool:
    """Whether an encoder and a decoder have vocabularies of their own, of whatever sizes: FSMT, some of Marian."""
    sizes = [config.get(key) for key in ("src_vocab_size", "tgt_vocab_size")]
    return all(type(size) is int for size in sizes) or config.get("share_encoder_decoder_embeddings") is False


def counting_keys(config: Mapping[str, Any], names: Collection[str], sizes: Collection[int]) -> list[tuple[str, ...]]:
    """Where a config counts a vocabulary: paths of keys whose value is one of its sizes.

    Args:
        config: The whole config.
        names: Of all the vocabulary's tables, aliases included.
        sizes: Numbers of rows of its tables.
    """
    tokens = tokens_of(names, config)
    found = []
    for path, section in _sections(config, (), names, tokens):
        for key, value in section.items():
            if type(value) is int and value in sizes and _counts(key, names, tokens):
                found.append((*path, key))
    return found


def _sections(
    section: Mapping[str, Any], path: tuple[str, ...], names: Collection[str], tokens: str
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The configs in a config that may count the vocabulary."""
    apart = tokens not in ("", "source", "target", "entity")
    if not apart or any(tokens in key for key in path):
        yield path, section
    if len(path) == _DEPTH:
        return
    for key, value in section.items():
        if isinstance(value, Mapping) and (apart or _holds(key, names)):
            yield from _sections(value, (*path, key), names, tokens)


def _holds(key: str, names: Collection[str]) -> bool:
    if key not in SECTIONS:
        return False
    word = SECTIONS[key]
    return word is None or any(word in re.split(r"[._]", name) for name in names)


def _counts(key: str, names: Collection[str], tokens: str) -> bool:
    if not SIZES.fullmatch(key) or key.startswith("entity_") != (tokens == "entity"):
        return False
    if key.endswith("_per_layer_input") and not any("per_layer" in name for name in names):
        return False
    if tokens == "source":
        return not key.startswith(("tgt_", "decoder_"))
    return tokens != "target" or key.startswith(("tgt_", "decoder_"))


def obstacle(config: Mapping[str, Any], names: Collection[str], sizes: Collection[int]) -> str | None:
    """What a config says that keeps a vocabulary from growing at its end; None where nothing does.

    Rows for something else lie behind the tokens' (Idefics, Molmo2, Moshi, CPM-Ant), so that an id there would mean two
    things; all ids from one on are taken for images or sounds (Gemma 3n); the head gives the first tokens alone
    (Inkling 2, pruned heads of Apertus 1.5), so that the model would never say a new one; a second model with the same
    vocabulary judges the text, and would judge it differently with more tokens (BLT's patcher); or the config counts
    other rows than there are, so that it cannot be said what it should count.

    Args:
        config: The whole config.
        names: Of the vocabulary's tables, aliases included.
        sizes: Numbers of rows of the vocabulary's tables.
    """
    for path, section in _all_sections(config):
        extra, offset = section.get("additional_vocab_size"), section.get("vocab_offset")
        where = "".join(f"{key}." for key in path)
        if type(extra) is int and extra > 0:
            return f"{where}additional_vocab_size = {extra}"
        if type(offset) is int and offset > 0:
            return f"{where}vocab_offset = {offset}"
        for key in SHORTER_HEADS:
            if type(section.get(key)) is int:
                return f"{where}{key} = {section[key]}"
    if isinstance(config.get("patcher_config"), Mapping):
        return "a patcher, whose patches depend on how many tokens there are"
    if len(set(sizes)) > 1 and config.get("model_type") not in LONGER_INPUTS:
        return f"an input of {max(sizes)} rows beside a vocabulary of {min(sizes)}"
    said = vocabulary_sizes(config)
    if said and not counting_keys(config, names, sizes):
        return f"{max(sizes)} rows, where the config says {' or '.join(map(str, dict.fromkeys(said)))}"
    return None


def _all_sections(
    section: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    yield path, section
    for key, value in section.items():
        if isinstance(value, Mapping) and len(path) < _DEPTH:
            yield from _all_sections(value, (*path, key))


# -- whether the head is tied ------------------------------------------------------------------------------------------

FLAG = "tie_word_embeddings"

Place = tuple[tuple[str, ...], bool | None]
"""Keys of a section of a config, and what it says of the tie: None for nothing."""


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every section of a config that a loader may ask whether the head is tied; none where the flag must stay.

    T5 and its like take the flag for a factor before the head too, and load a head that is stored whatever it says.
    """
    return [] if "d_kv" in config else list(_places(config, ()))


def _places(section: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Place]:
    flag = section.get(FLAG)
    yield path, flag if isinstance(flag, bool) else None
    for key in TEXT_SECTIONS:
        if isinstance(section.get(key), Mapping) and len(path) < 3:
            yield from _places(section[key], (*path, key))


def with_flags(config: Mapping[str, Any], found: list[Place]) -> dict[str, Any]:
    """A config that says of the tie what some places say."""
    after = dict(config)
    for path, flag in found:
        section = after
        for key in path:
            section[key] = dict(section[key])
            section = section[key]
        if flag is None:
            section.pop(FLAG, None)
        else:
            section[FLAG] = flag
    return after


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says that the head is not tied."""
    return with_flags(config, [(path, False) for path, _ in places(config)])


# -- positions ---------------------------------------------------------------------------------------------------------

_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
)


def position_limit(config: object) -> int | None:
    """The least number of positions that a config, or one in it of a language model, names; None where none does.

    Args:
        config: An object, a mapping, or None.
    """
    found: list[int] = []
    sections = [as_mapping(config)] if config is not None else []
    for section in sections:
        if "relative_attention_num_buckets" not in section:  # T5's n_positions limits nothing
            found += [section[key] for key in _POSITIONS if type(section.get(key)) is int and section[key] > 0]
        sections += [section[key] for key in TEXT_SECTIONS if isinstance(section.get(key), Mapping)]
    return min(found, default=None)
