"""The built-in records, returned by the same hooks as a plugin's. Each hook imports what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from embedsurgery.plugins.hookspecs import CommandRecord, LayoutRecord, StoreRecord, hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    import click

    from embedsurgery.graph.architectures import Layout
    from embedsurgery.initializers import InitializerRecord
    from embedsurgery.stores.shards import ShardStore
    from embedsurgery.surgeries.surgery import SurgeryRecord


@hookimpl
def embedsurgery_surgeries() -> Sequence[SurgeryRecord]:
    """Trainable tokens and soft prompts. Adapters of both can share a model; those of tokens need disjoint rows."""
    from embedsurgery.surgeries.soft_prompt.surgery import (
        NO_ROWS,
        P_TUNING,
        PROMPT_TUNING,
        SoftPrompt,
        SoftPromptConfig,
    )
    from embedsurgery.surgeries.surgery import SurgeryRecord
    from embedsurgery.surgeries.trainable_tokens.surgery import PEFT_TYPE, TrainableTokens, TrainableTokensConfig

    tokens, prompt = TrainableTokens(), SoftPrompt()
    both = frozenset({tokens.name, prompt.name})
    return [
        SurgeryRecord(tokens.name, TrainableTokensConfig, tokens, PEFT_TYPE, both),
        SurgeryRecord(prompt.name, SoftPromptConfig, prompt, PROMPT_TUNING, both, frozenset({P_TUNING, *NO_ROWS})),
    ]


@hookimpl
def embedsurgery_initializers() -> Sequence[InitializerRecord]:
    """The built-in initialisers of new rows."""
    from embedsurgery.initializers import BUILT_IN

    return list(BUILT_IN)


@hookimpl
def embedsurgery_layouts() -> Sequence[LayoutRecord]:
    """The architectures whose files do not show their tied names."""
    from embedsurgery.graph.architectures import ARCHITECTURES

    return [LayoutRecord(name, layout) for name, layout in ARCHITECTURES.items()]


@hookimpl
def embedsurgery_stores() -> Sequence[StoreRecord]:
    """Safetensors in one file or in shards. It also opens directories of no known format, to say what is wrong."""
    return [StoreRecord("safetensors", _is_safetensors, _open_shards, fallback=True)]


@hookimpl
def embedsurgery_commands() -> Sequence[CommandRecord]:
    """The built-in commands, so that no plugin takes the name of one. They are imported when they run."""
    from embedsurgery.plugins.verbs import VERBS

    return [CommandRecord(verb, summary, _command_loader(verb)) for verb, summary in VERBS.items()]


def _open_shards(directory: Path, architectures: Mapping[str, Layout]) -> ShardStore:
    from embedsurgery.stores.shards import ShardStore

    return ShardStore.open(directory, architectures=architectures)


def _is_safetensors(directory: Path) -> bool:
    from embedsurgery.stores.checkpoint import INDEX, SINGLE

    return (directory / SINGLE).exists() or (directory / INDEX).exists()


def _command_loader(verb: str) -> Callable[[], click.Command]:
    def load() -> click.Command:
        command: click.Command = import_module(f"embedsurgery.cli.{verb}").command
        return command

    return load
