"""``embedsurgery plugins``: list the installed plugins with their errors, or create a new one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.render import json_option, print_json, print_table

if TYPE_CHECKING:
    from embedsurgery.plugins.registry import Registry


@click.group("plugins", invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the installed plugins and what each provides. A broken plugin is listed with its error.

    EMBEDSURGERY_DISABLE_PLUGINS=1 loads no plugin; a comma-separated list of names blocks those.
    """
    if context.invoked_subcommand is not None:
        return
    from embedsurgery.plugins.current import registry

    known = registry()
    if as_json:
        print_json(_describe_registry(known))
    else:
        _print_registry(known)


def _print_registry(known: Registry) -> None:
    print_table(
        "plugins",
        ("plugin", "distribution", "version", "hooks", "state"),
        [
            (p.name, p.distribution or "-", p.version or "-", _format_hooks(p.hooks), p.error or "ok")
            for p in known.plugins
        ],
    )
    print_table(
        "surgeries",
        ("surgery", "config", "peft_type", "shares a model with"),
        [
            (r.name, r.config_class.__name__, r.peft_type, ", ".join(sorted(r.shares_model_with)) or "-")
            for r in known.surgeries.values()
        ],
    )
    print_table("initialisers", ("init", "new rows"), [(r.usage, r.summary) for r in known.initializers.values()])
    others = [(kind, ", ".join(names)) for kind, names in _list_others(known).items() if names]
    if others:
        print_table("others", ("kind", "names"), others)


@command.command("new")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    show_default=True,
    help="Directory to create the package in.",
)
def new(name: str, output: Path) -> None:
    """Create a package for the surgery NAME. It installs, registers and passes the test kit as it is."""
    from embedsurgery.plugins.template import write_plugin

    folder, files = write_plugin(name, output)
    click.echo(f"written: {folder}")
    for file in files:
        click.echo(f"  {file}")
    click.echo(f'next: pip install -e "{folder}[test]" && embedsurgery plugins && pytest {folder}')


def _format_hooks(hooks: Iterable[str]) -> str:
    return ", ".join(hook.removeprefix("embedsurgery_") for hook in hooks) or "-"


def _list_others(known: Registry) -> dict[str, list[str]]:
    """List what has no table of its own. The built-in commands and layouts are many, so those are left out."""
    from embedsurgery.plugins import builtin

    commands = {record.name for record in builtin.embedsurgery_commands()}
    layouts = {record.name for record in builtin.embedsurgery_layouts()}
    return {
        "stores": list(known.stores),
        "commands": [name for name in known.commands if name not in commands],
        "layouts": [name for name in known.layouts if name not in layouts],
        "classifiers": list(known.classifiers),
        "card sections": list(known.card_sections),
    }


def _describe_registry(known: Registry) -> dict[str, Any]:
    return {
        "plugins": [asdict(plugin) for plugin in known.plugins],
        "surgeries": [
            {
                "name": r.name,
                "config": r.config_class.__name__,
                "peft_type": r.peft_type,
                "shares_model_with": sorted(r.shares_model_with),
            }
            for r in known.surgeries.values()
        ],
        "initializers": [
            {"name": r.name, "argument": r.argument, "summary": r.summary} for r in known.initializers.values()
        ],
        **{kind.replace(" ", "_"): names for kind, names in _list_others(known).items()},
    }
