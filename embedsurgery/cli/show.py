"""``embedsurgery show``: show what an adapter holds, and whether it fits a model."""

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
    from embedsurgery.adapters.manifest import TableRecord
    from embedsurgery.graph import Table
    from embedsurgery.stores.store import Store
    from embedsurgery.tensors.raw import RawArray

_MAX_TOKENS = 8


@click.command("show")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Compare with this checkpoint, a directory or a Hub id, and check that it is the adapter's base.",
)
@token_option
@json_option
def command(adapter: Path, model: Path | None, as_json: bool) -> None:
    """Show what ADAPTER, a directory or a Hub id, holds.

    With --model, exits with 1 if that checkpoint is not the adapter's base. For a soft prompt, it then also lists the
    tokens of the vocabulary that are nearest to each virtual token, by cosine. For a Hub id, only headers and the
    compared rows are fetched, by range requests.
    """
    facts = show(adapter, model)
    if as_json:
        print_json(facts)
        return
    version = facts["library_version"]
    click.echo(
        f"{adapter}: {facts['surgery']}, base {facts['base_model'] or 'not recorded'}, "
        f"made by {f'embedsurgery {version}' if version else 'PEFT'}"
    )
    for prompt in facts["prompts"]:
        _print_prompt(prompt)
    if facts["new_tokens"] is not None:
        _print_new_tokens(facts["new_tokens"])
    for table in facts["tables"] if not facts["prompts"] else ():
        _print_table(table, compared=model is not None)


def _print_new_tokens(new: dict[str, Any]) -> None:
    texts = [f"{t['content']!r} as {t['id']}{' (special)' if t['special'] else ''}" for t in new["tokens"]]
    more = f" and {len(texts) - _MAX_TOKENS:,} more" if len(texts) > _MAX_TOKENS else ""
    listed = ", ".join(texts[:_MAX_TOKENS]) + more or "none"
    click.echo(f"new tokens: {listed}; {new['rows']:,} rows in the base, {new['grown']:,} with them")


def _print_table(table: dict[str, Any], compared: bool) -> None:
    tied = f", tied to {', '.join(table['aliases'])}" if table["aliases"] else ""
    here = f", in the model {table['located']}" if compared and table["located"] != table["name"] else ""
    if not table["rows"]:
        click.echo(f"{table['name']}{tied}{here}: the whole table, by {', '.join(table['tensors'])}")
        return
    columns = ["row", "token", "norm"] + (["base norm", "cosine to base"] if compared else [])
    rows = [
        [r["row"], r["token"] or "-", f"{r['norm']:.4f}"]
        + ([_format_number(r["base_norm"]), _format_number(r["cosine"])] if compared else [])
        for r in table["rows"]
    ]
    print_table(f"{table['name']}{tied}{here}", columns, rows)


def _print_prompt(prompt: dict[str, Any]) -> None:
    """Print a soft prompt: the norms of its virtual tokens, and the tokens nearest to them."""
    norms = prompt.get("vocabulary")
    columns = ["virtual token", "norm"] + ([] if norms is None else ["nearest tokens (cosine)"])
    rows = []
    for number, token in enumerate(prompt["tokens"]):
        nearest = ", ".join(f"{n['text'] or n['id']} ({n['cosine']:.2f})" for n in token.get("nearest", ()))
        rows.append([number, f"{token['norm']:.4f}"] + ([] if norms is None else [nearest]))
    title = f"prompt of {prompt['submodule']}, {len(rows)} virtual tokens"
    if norms is not None:
        title += f"; norms in the vocabulary: {norms['least']:.4f} to {norms['greatest']:.4f}, mean {norms['mean']:.4f}"
    print_table(title, columns, rows)


def _format_number(value: float | None) -> str:
    """Format a number of the base's row; "-" for a new row, which the base does not have."""
    return "-" if value is None else f"{value:.4f}"


def show(adapter: Path, model: Path | None) -> dict[str, Any]:
    """Return what the command prints, as JSON values.

    Raises:
        BaseMismatchError: The model is not the adapter's base.
    """
    from embedsurgery.adapters.locate import locate
    from embedsurgery.loading import load, open_store

    loaded = load(adapter)
    with open_store(model) if model is not None else nullcontext() as store:
        located = locate(loaded, store) if store is not None else {}
        tables = _describe_tables(loaded, store, located)
        prompts = _describe_prompts(loaded, store, located)
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


def _describe_tables(loaded: Adapter, store: Store | None, located: Mapping[str, Table]) -> list[dict[str, Any]]:
    """Describe an adapter's tensors for each table, compared with a model's rows if there is a model."""
    manifest = loaded.manifest
    tables = []
    for record in (record for record in manifest.tables if record.name in loaded.raw):
        tensors = [
            f"{name.removeprefix(record.name) or 'a tensor'} {list(raw.shape)}"
            for name, raw in loaded.raw.items()
            if name.startswith(record.name)
        ]
        tables.append(
            {
                "name": record.name,
                "aliases": list(record.aliases),
                "shape": list(record.shape) if record.shape else None,
                "dtype": record.dtype,
                "checked_base": record.fingerprint is not None,
                "located": located[record.name].name if store is not None else None,
                "rows": _describe_rows(loaded, record, store, located),
                "tensors": tensors,
            }
        )
    return tables


def _describe_rows(
    loaded: Adapter, record: TableRecord, store: Store | None, located: Mapping[str, Table]
) -> list[dict[str, Any]]:
    """Describe the rows of one table; none for an adapter that changes the whole table."""
    import numpy as np

    from embedsurgery.stores.store import rows_of

    values = to_float64(loaded.raw[record.name])
    if len(record.indices) != len(values):  # a whole table: the indices are the rows that its base is recognised by
        return []
    norms = np.linalg.norm(values, axis=1)
    rows: list[dict[str, Any]] = [
        {"row": i, "token": loaded.manifest.tokens.get(i), "norm": float(n)}
        for i, n in zip(record.indices, norms, strict=True)
    ]
    if store is None:
        return rows
    table = located[record.name]
    in_base = [n for n, index in enumerate(record.indices) if index < table.shape[0]]
    base = to_float64(rows_of(store, table, tuple(record.indices[n] for n in in_base)))
    base_norms = np.linalg.norm(base, axis=1)
    cosines = (values[in_base] * base).sum(axis=1) / np.maximum(norms[in_base] * base_norms, 1e-30)
    for row in rows:  # new rows keep None
        row.update(base_norm=None, cosine=None)
    for n, norm, cosine in zip(in_base, base_norms, cosines, strict=True):
        rows[n].update(base_norm=float(norm), cosine=float(cosine))
    return rows


def to_float64(rows: RawArray) -> npt.NDArray[np.float64]:
    """Convert rows to fp64, to compute with them."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return rows.float32().astype(np.float64)


def _describe_prompts(loaded: Adapter, store: Store | None, located: Mapping[str, Table]) -> list[dict[str, Any]]:
    """Describe the soft prompts of an adapter, with their nearest tokens if there is a model."""
    import numpy as np

    from embedsurgery.surgeries.soft_prompt.config import NAME, prompts_of
    from embedsurgery.surgeries.soft_prompt.nearest_tokens import compare_with_checkpoint

    if loaded.manifest.surgery != NAME:
        return []
    prompts = []
    for submodule, vectors in prompts_of(loaded).items():
        values = vectors.float32()
        prompt: dict[str, Any] = {"submodule": submodule}
        if store is None:
            prompt["tokens"] = [{"norm": float(n)} for n in np.linalg.norm(values, axis=1)]
        else:
            comparison = compare_with_checkpoint(values, store, located[loaded.manifest.tables[0].name])
            prompt["vocabulary"] = {
                "mean": comparison.mean_norm,
                "least": comparison.min_norm,
                "greatest": comparison.max_norm,
            }
            prompt["tokens"] = [asdict(token) for token in comparison.tokens]
        prompts.append(prompt)
    return prompts
