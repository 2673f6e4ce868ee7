"""``embedsurgery plugins``: what is installed, what each brings, and what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict

import click

from embedsurgery.cli.render import json_option, print_json, print_table


@click.command("plugins")
@json_option
def command(as_json: bool) -> None:
    """The plugins that are installed, and the surgeries there are. A broken plugin is named with its error."""
    from embedsurgery.registry import registry

    known = registry()
    if as_json:
        surgeries = [
            {
                "name": r.name,
                "config": r.config_class.__name__,
                "peft_type": r.peft_type,
                "shares_model_with": sorted(r.shares_model_with),
            }
            for r in known.surgeries.values()
        ]
        print_json({"plugins": [asdict(plugin) for plugin in known.plugins], "surgeries": surgeries})
        return
    print_table(
        "plugins",
        ("plugin", "distribution", "version", "hooks", "state"),
        [(p.name, p.distribution or "-", p.version or "-", ", ".join(p.hooks) or "-", p.error or "ok")
         for p in known.plugins],
    )  # fmt: skip
    print_table(
        "surgeries",
        ("surgery", "config", "peft_type", "shares a model with"),
        [(r.name, r.config_class.__name__, r.peft_type, ", ".join(sorted(r.shares_model_with)) or "-")
         for r in known.surgeries.values()],
    )  # fmt: skip
