"""``embedsurgery show``: what an adapter holds, and whether it fits a model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import json_option, print_json, print_table

if TYPE_CHECKING:
    from embedsurgery.adapter import Adapter
    from embedsurgery.stores.store import Store


@click.command("show")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="Compare with this checkpoint, and check that it fits.")
@token_option
@json_option
def command(adapter: Path, model: Path | None, as_json: bool) -> None:
    """What ADAPTER holds, a directory or a Hub id.

    With --model, a directory or an id, exits 1 where that checkpoint is not the adapter's base. Of an id, headers and
    the rows that are compared come, by range requests.
    """
    facts = show(adapter, model)
    if as_json:
        print_json(facts)
        return
    made = facts["library_version"]
    click.echo(f"{adapter}: {facts['surgery']}, base {facts['base_model'] or 'not named'}, "
               f"made by {'embedsurgery ' + made if made else 'PEFT'}")  # fmt: skip
    for table in facts["tables"]:
        columns = ["row", "token", "norm"] + (["base norm", "cosine to base"] if model else [])
        rows = [
            [r["row"], r["token"] or "-", f"{r['norm']:.4f}"]
            + ([f"{r['base_norm']:.4f}", f"{r['cosine']:.4f}"] if model else [])
            for r in table["rows"]
        ]
        tied = f", tied to {', '.join(table['aliases'])}" if table["aliases"] else ""
        where = f", here {table['located']}" if model and table["located"] != table["name"] else ""
        if not rows:
            click.echo(f"{table['name']}{tied}{where}: the whole table, by {', '.join(table['tensors'])}")
            continue
        print_table(f"{table['name']}{tied}{where}", columns, rows)


def show(adapter: Path, model: Path | None) -> dict[str, Any]:
    """What the verb shows, as JSON values.

    Raises:
        BaseMismatchError: The model is not the adapter's base.
    """
    from embedsurgery import hub
    from embedsurgery.api import load

    loaded = load(adapter)
    with hub.store(model) if model is not None else nullcontext() as store:
        tables = _tables(loaded, store)
    manifest = loaded.manifest
    return {
        "adapter": str(adapter),
        "surgery": manifest.surgery,
        "base_model": manifest.base_model,
        "revision": manifest.revision,
        "library_version": manifest.library_version,
        "source": loaded.source,
        "bytes": sum(p.stat().st_size for p in adapter.iterdir() if p.is_file()) if adapter.is_dir() else None,
        "tables": tables,
    }


def _tables(loaded: Adapter, store: Store | None) -> list[dict[str, Any]]:
    """What an adapter has for each table, compared with a model's rows where there is one."""
    import numpy as np

    from embedsurgery.locate import locate
    from embedsurgery.stores.base import rows_of

    manifest = loaded.manifest
    located = locate(loaded, store) if store is not None else {}
    tables = []
    for record in manifest.tables:
        values = loaded.raw[record.name].float32().astype(np.float64)
        norms = np.linalg.norm(values, axis=1)
        by_row = len(record.indices) == len(values)  # else the indices are those that the base is recognised by
        rows = (
            [
                {"row": i, "token": manifest.tokens.get(i), "norm": float(n)}
                for i, n in zip(record.indices, norms, strict=True)
            ]
            if by_row
            else []
        )
        if store is not None and by_row:
            table = located[record.name]
            base = rows_of(store, table, record.indices).float32().astype(np.float64)
            lengths = np.linalg.norm(base, axis=1)
            cosines = (values * base).sum(axis=1) / np.maximum(norms * lengths, 1e-30)
            for row, length, cosine in zip(rows, lengths, cosines, strict=True):
                row.update(base_norm=float(length), cosine=float(cosine))
        tables.append(
            {
                "name": record.name,
                "aliases": list(record.aliases),
                "shape": list(record.shape) if record.shape else None,
                "dtype": record.dtype,
                "checked_base": record.fingerprint is not None,
                "located": located[record.name].name if store is not None else None,
                "rows": rows,
                "tensors": [
                    f"{name.removeprefix(record.name) or 'a tensor'} {list(raw.shape)}"
                    for name, raw in loaded.raw.items()
                    if name.startswith(record.name)
                ],
            }
        )
    return tables
