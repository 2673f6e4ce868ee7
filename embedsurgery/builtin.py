"""What is built in, registered through the same hooks as a plugin's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from embedsurgery import cli
from embedsurgery.architectures import ARCHITECTURES
from embedsurgery.checkpoint import INDEX, SINGLE
from embedsurgery.hookspecs import CommandRecord, LayoutRecord, StoreRecord, hookimpl
from embedsurgery.initializers import BUILT_IN, InitializerRecord
from embedsurgery.stores.shards import ShardStore
from embedsurgery.surgeries.base import SurgeryRecord
from embedsurgery.surgeries.soft_prompt import NO_ROWS, P_TUNING, PROMPT_TUNING, SoftPrompt, SoftPromptConfig
from embedsurgery.surgeries.trainable_tokens import PEFT_TYPE, TrainableTokens, TrainableTokensConfig

if TYPE_CHECKING:
    from pathlib import Path

    import click

_NO_VERBS = ("main", "render")


@hookimpl
def embedsurgery_surgeries() -> Sequence[SurgeryRecord]:
    """Trainable tokens and soft prompts; adapters of both can share a model, those of tokens with disjoint rows."""
    tokens, prompt = TrainableTokens(), SoftPrompt()
    both = frozenset({tokens.name, prompt.name})
    return [
        SurgeryRecord(tokens.name, TrainableTokensConfig, tokens, PEFT_TYPE, both),
        SurgeryRecord(prompt.name, SoftPromptConfig, prompt, PROMPT_TUNING, both, frozenset({P_TUNING, *NO_ROWS})),
    ]


@hookimpl
def embedsurgery_initializers() -> Sequence[InitializerRecord]:
    """How rows start without any plugin."""
    return list(BUILT_IN)


@hookimpl
def embedsurgery_layouts() -> Sequence[LayoutRecord]:
    """The architectures that need telling."""
    return [LayoutRecord(name, layout) for name, layout in ARCHITECTURES.items()]


@hookimpl
def embedsurgery_stores() -> Sequence[StoreRecord]:
    """Safetensors in one file or in shards: also what is asked where a directory is nothing that anybody knows."""
    return [StoreRecord("safetensors", _is_safetensors, _open_shards, fallback=True)]


@hookimpl
def embedsurgery_commands() -> Sequence[CommandRecord]:
    """The verbs of the command line, one a file, so that no plugin takes the name of one; none is imported for it."""
    verbs = (module.name for module in iter_modules(cli.__path__) if module.name not in _NO_VERBS)
    return [CommandRecord(verb, f"built in; embedsurgery {verb} --help", _loader(verb)) for verb in verbs]


def _open_shards(directory: Path) -> ShardStore:
    """With the architectures that plugins know, who are asked when a checkpoint is opened."""
    from embedsurgery.registry import registry

    return ShardStore.open(directory, architectures=registry().architectures)


def _is_safetensors(directory: Path) -> bool:
    return (directory / SINGLE).exists() or (directory / INDEX).exists()


def _loader(verb: str) -> Callable[[], click.Command]:
    def load() -> click.Command:
        command: click.Command = import_module(f"embedsurgery.cli.{verb}").command
        return command

    return load
