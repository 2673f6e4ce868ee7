"""How many positions a model has, as far as its config says."""

from __future__ import annotations

from collections.abc import Mapping

from embedsurgery.config_sizes import TEXT_SECTIONS, as_mapping

_KEYS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "max_sequence_length",
         "n_ctx")  # fmt: skip


def position_limit(config: object) -> int | None:
    """The least number of positions that a config, or one in it of a language model, names; None where none does.

    Args:
        config: An object, a mapping, or None.
    """
    found: list[int] = []
    sections = [as_mapping(config)] if config is not None else []
    for section in sections:
        if "relative_attention_num_buckets" not in section:  # T5's n_positions limits nothing
            found += [section[key] for key in _KEYS if type(section.get(key)) is int and section[key] > 0]
        sections += [section[key] for key in TEXT_SECTIONS if isinstance(section.get(key), Mapping)]
    return min(found, default=None)
