"""What a config says once a projection that was tied has a table of its own, and back again.

Configs are plain mappings here, as in `config_sizes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from embedsurgery.config_sizes import TEXT_SECTIONS

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
