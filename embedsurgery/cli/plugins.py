"""``embedsurgery plugins``: what is installed, what each brings, and what is wrong with it; and how one begins."""

from __future__ import annotations

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
    """The plugins that are installed, and what each brings. A broken plugin is named with its error.

    EMBEDSURGERY_DISABLE_PLUGINS=1 loads none of them; names separated by commas block those.
    """
    if context.invoked_subcommand is not None:
        return
    from embedsurgery.plugins.current import registry

    known = registry()
    if as_json:
        print_json(_as_json(known))
        return
    print_table(
        "plugins",
        ("plugin", "distribution", "version", "hooks", "state"),
        [
            (p.name, p.distribution or "-", p.version or "-", ", ".join(map(_short, p.hooks)) or "-", p.error or "ok")
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
    print_table(
        "initialisers", ("init", "new rows start as"), [(r.usage, r.summary) for r in known.initializers.values()]
    )
    brought = [(kind, ", ".join(names)) for kind, names in _others(known).items() if names]
    if brought:
        print_table("others", ("kind", "names"), brought)


@command.command("new")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    show_default=True,
    help="Where the package's directory goes.",
)
def new(name: str, output: Path) -> None:
    """Write a package for the surgery NAME, which installs, registers and passes the test kit at once."""
    from embedsurgery.plugins.template import write_plugin

    folder, files = write_plugin(name, output)
    click.echo(f"written: {folder}")
    for file in files:
        click.echo(f"  {file}")
    click.echo(f'next: pip install -e "{folder}[test]" && embedsurgery plugins && pytest {folder}')


def _short(hook: str) -> str:
    return hook.removeprefix("embedsurgery_")


def _others(known: Registry) -> dict[str, list[str]]:
    """What has no table of its own; of verbs and architectures only what plugins bring, for the built-in are many."""
    from embedsurgery.plugins import builtin

    verbs = {record.name for record in builtin.embedsurgery_commands()}
    layouts = {record.name for record in builtin.embedsurgery_layouts()}
    return {
        "stores": list(known.stores),
        "commands": [name for name in known.commands if name not in verbs],
        "layouts": [name for name in known.layouts if name not in layouts],
        "classifiers": list(known.classifiers),
        "card sections": list(known.card_sections),
    }


def _as_json(known: Registry) -> dict[str, Any]:
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
        **{kind.replace(" ", "_"): names for kind, names in _others(known).items()},
    }
