"""Options of ``embedsurgery merge``: how adapters are combined, and how soft prompts become tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig

_PREFIX_PLACES = ("all", "text", "chat", "none")

_COMBINE_OPTIONS = (
    click.option(
        "--weight",
        "weights",
        multiple=True,
        metavar="ADAPTER=NUMBER",
        help="Weight of an adapter, 1 by default: its rows become BASE + NUMBER * (ADAPTER - BASE). Repeat for each "
        "adapter. Rows of new tokens are not weighted.",
    ),
    click.option(
        "--on-conflict",
        type=click.Choice(["last", "average"]),
        help="If several adapters set the same rows, use those of the last adapter or the average of all. Refused by "
        "default.",
    ),
    click.option("--allow-nan", is_flag=True, help="Merge rows with NaN or infinity, which are refused by default."),
)

_BAKE_OPTIONS = (
    click.option(
        "--prompt-name",
        "names",
        multiple=True,
        metavar="NAME",
        help="Name of a soft prompt, for its tokens <|soft:NAME:0|>. Repeat for each ADAPTER, in order.  "
        "[default: the directory's name]",
    ),
    click.option(
        "--prefix",
        type=click.Choice(_PREFIX_PLACES),
        default=None,
        help="Where the tokenizer adds a soft prompt automatically: text (before every text), chat (in the chat "
        "templates), all (both) or none.  [default: all for one prompt, none for several]",
    ),
    click.option(
        "--after-bos", is_flag=True, help="Add the prompt after the BOS token; in training it is before the BOS."
    ),
    click.option(
        "--keep-tie",
        is_flag=True,
        help="Keep a tied head tied. Then only generation_config.json stops the model from generating virtual tokens.",
    ),
)


def combine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--weight``, ``--on-conflict`` and ``--allow-nan``, as ``weights``, ``on_conflict`` and ``allow_nan``."""
    for option in reversed(_COMBINE_OPTIONS):
        command = option(command)
    return command


def bake_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of baking soft prompts, for `take_bake_configs`."""
    for option in reversed(_BAKE_OPTIONS):
        command = option(command)
    return command


def parse_weights(adapters: Sequence[Path], weights: Sequence[str]) -> list[tuple[Path, float]]:
    """Pair adapters with the weights of ``--weight``, which names an adapter by its argument or its last part.

    Raises:
        click.BadParameter: A weight is not a finite number, or its name fits no adapter, several, or one twice.
    """
    by_position = dict.fromkeys(range(len(adapters)), 1.0)
    given: set[int] = set()
    for weight in weights:
        name, equals, text = weight.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not equals or not math.isfinite(number):
            raise click.BadParameter(f"{weight!r} is not ADAPTER=NUMBER", param_hint="'--weight'")
        position = _find_adapter(adapters, name)
        if position in given:
            raise click.BadParameter(f"{name!r} is given twice", param_hint="'--weight'")
        given.add(position)
        by_position[position] = number
    return [(adapter, by_position[position]) for position, adapter in enumerate(adapters)]


def _find_adapter(adapters: Sequence[Path], name: str) -> int:
    """Return the position of the adapter that ``--weight`` names."""
    found = [n for n, adapter in enumerate(adapters) if str(adapter) == name or adapter == Path(name)]
    found = found or [n for n, adapter in enumerate(adapters) if adapter.name == name]
    if len(found) != 1:
        problem = "fits more than one ADAPTER" if found else "is not an ADAPTER"
        raise click.BadParameter(f"{name!r} {problem} of this merge", param_hint="'--weight'")
    return found[0]


def take_bake_configs(options: dict[str, Any]) -> BakeConfig | list[BakeConfig] | None:
    """Take the values of `bake_options` out of a command's options; None if none was given."""
    names, prefix, after_bos = options.pop("names"), options.pop("prefix"), options.pop("after_bos")
    tied = "keep" if options.pop("keep_tie") else "untie"
    if not (names or prefix or after_bos or tied == "keep"):
        return None
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig

    configs = [BakeConfig(name, prefix, after_bos, tied) for name in names or (None,)]  # type: ignore[arg-type]
    return configs if names else configs[0]
