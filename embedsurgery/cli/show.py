"""``embedsurgery show``: what an adapter holds, and whether it fits a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import json_option, print_json, print_table

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from embedsurgery.adapters.adapter import Adapter
    from embedsurgery.graph import Table
    from embedsurgery.stores.store import Store
    from embedsurgery.tensors.raw import RawArray


@click.command("show")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="Compare with this checkpoint, and check that it fits.")
@token_option
@json_option
def command(adapter: Path, model: Path | None, as_json: bool) -> None:
    """What ADAPTER holds, a directory or a Hub id.

    With --model, a directory or an id, exits 1 where that checkpoint is not the adapter's base; of a soft prompt it
    then names the tokens of the vocabulary that are nearest to each virtual token, by cosine. Of an id, headers and the
    rows that are compared come, by range requests.
    """
    facts = show(adapter, model)
    if as_json:
        print_json(facts)
        return
    made = facts["library_version"]
    click.echo(
        f"{adapter}: {facts['surgery']}, base {facts['base_model'] or 'not named'}, "
        f"made by {'embedsurgery ' + made if made else 'PEFT'}"
    )
    for prompt in facts["prompts"]:
        _print_prompt(prompt, adapter)
    new = facts["new_tokens"]
    if new is not None:
        texts = [f"{t['content']!r} as {t['id']}{' (special)' if t['special'] else ''}" for t in new["tokens"]]
        named = ", ".join(texts[:8]) + (f" and {len(texts) - 8:,} more" if len(texts) > 8 else "") or "none"
        click.echo(f"new tokens: {named}; {new['rows']:,} rows in the base, {new['grown']:,} with them")
    for table in facts["tables"] if not facts["prompts"] else ():
        columns = ["row", "token", "norm"] + (["base norm", "cosine to base"] if model else [])
        rows = [
            [r["row"], r["token"] or "-", f"{r['norm']:.4f}"]
            + ([_number(r["base_norm"]), _number(r["cosine"])] if model else [])
            for r in table["rows"]
        ]
        tied = f", tied to {', '.join(table['aliases'])}" if table["aliases"] else ""
        where = f", here {table['located']}" if model and table["located"] != table["name"] else ""
        if not rows:
            click.echo(f"{table['name']}{tied}{where}: the whole table, by {', '.join(table['tensors'])}")
            continue
        print_table(f"{table['name']}{tied}{where}", columns, rows)


def wide(rows: RawArray) -> npt.NDArray[np.float64]:
    """Rows as fp64, to compute with."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return rows.float32().astype(np.float64)


def _print_prompt(prompt: dict[str, Any], adapter: Path) -> None:
    """A soft prompt: its virtual tokens, and the words they are near to."""
    compared = "vocabulary" in prompt
    columns = ["virtual token", "norm"] + (["nearest tokens (cosine)"] if compared else [])
    rows = []
    for number, token in enumerate(prompt["tokens"]):
        near = ", ".join(f"{n['text'] or n['id']} ({n['cosine']:.2f})" for n in token.get("nearest", ()))
        rows.append([number, f"{token['norm']:.4f}"] + ([near] if compared else []))
    norms = prompt.get("vocabulary")
    beside = (
        ""
        if norms is None
        else (f"; the vocabulary's norms: mean {norms['mean']:.4f}, {norms['least']:.4f} to {norms['greatest']:.4f}")
    )
    print_table(f"prompt of {prompt['submodule']}, {len(rows)} virtual tokens{beside}", columns, rows)


def _number(value: float | None) -> str:
    """A number of the base's row; a new row has none there."""
    return "-" if value is None else f"{value:.4f}"


def show(adapter: Path, model: Path | None) -> dict[str, Any]:
    """What the verb shows, as JSON values.

    Raises:
        BaseMismatchError: The model is not the adapter's base.
    """
    from embedsurgery.adapters.locate import locate
    from embedsurgery.loading import load, open_store

    loaded = load(adapter)
    with open_store(model) if model is not None else nullcontext() as store:
        located = locate(loaded, store) if store is not None else {}
        tables = _tables(loaded, store, located)
        prompts = _prompts(loaded, store, located)
    manifest = loaded.manifest
    return {
        "adapter": str(adapter),
        "surgery": manifest.surgery,
        "base_model": manifest.base_model,
        "revision": manifest.revision,
        "library_version": manifest.library_version,
        "source": loaded.source,
        "new_tokens": None if manifest.new_tokens is None else manifest.new_tokens.to_json(),
        "bytes": sum(p.stat().st_size for p in adapter.iterdir() if p.is_file()) if adapter.is_dir() else None,
        "prompts": prompts,
        "tables": tables,
    }


def _tables(loaded: Adapter, store: Store | None, located: Mapping[str, Table]) -> list[dict[str, Any]]:
    """What an adapter has for each table, compared with a model's rows where there is one."""
    import numpy as np

    from embedsurgery.stores.store import rows_of

    manifest = loaded.manifest
    tables = []
    for record in (record for record in manifest.tables if record.name in loaded.raw):
        values = wide(loaded.raw[record.name])
        norms = np.linalg.norm(values, axis=1)
        by_row = len(record.indices) == len(values)  # else the indices are those that the base is recognised by
        rows: list[dict[str, Any]] = (
            [
                {"row": i, "token": manifest.tokens.get(i), "norm": float(n)}
                for i, n in zip(record.indices, norms, strict=True)
            ]
            if by_row
            else []
        )
        if store is not None and by_row:
            table = located[record.name]
            there = [n for n, index in enumerate(record.indices) if index < table.shape[0]]
            indices = tuple(record.indices[n] for n in there)
            base = wide(rows_of(store, table, indices))
            lengths = np.linalg.norm(base, axis=1)
            cosines = (values[there] * base).sum(axis=1) / np.maximum(norms[there] * lengths, 1e-30)
            for row in rows:  # what the base does not have yet stays so
                row.update(base_norm=None, cosine=None)
            for n, length, cosine in zip(there, lengths, cosines, strict=True):
                rows[n].update(base_norm=float(length), cosine=float(cosine))
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


def _prompts(loaded: Adapter, store: Store | None, located: Mapping[str, Table]) -> list[Any]:
    """The soft prompts of an adapter, as JSON values."""
    import numpy as np

    from embedsurgery.surgeries.soft_prompt.config import NAME, prompts_of
    from embedsurgery.surgeries.soft_prompt.nearest_tokens import read_beside

    if loaded.manifest.surgery != NAME:
        return []
    found = []
    for submodule, vectors in prompts_of(loaded).items():
        values = vectors.float32()
        body: dict[str, Any] = {"submodule": submodule}
        if store is None:
            body["tokens"] = [{"norm": float(n)} for n in np.linalg.norm(values, axis=1)]
        else:
            reading = read_beside(values, store, located[loaded.manifest.tables[0].name])
            norms = {"mean": reading.mean_norm, "least": reading.least_norm, "greatest": reading.greatest_norm}
            body |= {"vocabulary": norms, "tokens": [asdict(token) for token in reading.tokens]}
        found.append(body)
    return found
