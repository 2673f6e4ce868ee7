"""Registers the hooks at the sites of a model's tables, and fills the lists of live rows that the hooks share.

``attachment.py`` decides which adapters are live. The hooks are in ``sites.py``, ``overlays.py``, ``uncovered.py`` and
``unchanged.py``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import EmbedSurgeryWarning, UnsupportedError, warn
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.graph.wrappers import submodule
from embedsurgery.runtime.calls import finish_before_interrupt, frame_at, frames_from
from embedsurgery.runtime.hooks import (
    InstalledHooks,
    add_guards,
    add_post_hook,
    add_pre_hook,
    remove_hooks,
    reset_compiled,
)
from embedsurgery.runtime.rows.materialized import MaterializedWeights, materialized_weights
from embedsurgery.runtime.rows.mixing import Batch
from embedsurgery.runtime.rows.overlays import CopyOverlay, LazyOverlay
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sites import Lookup, Projection, can_override, swamps_gradient, table_holders
from embedsurgery.runtime.rows.sliced_head import remove_sliced_weight
from embedsurgery.runtime.rows.unchanged import ChangeDetector
from embedsurgery.runtime.rows.uncovered import UncoveredSite
from embedsurgery.runtime.rows.whole_tables import ExtraTensor
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.tensor_store import TensorStore
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.tensors.convert import dtype_string


class Installation:
    """The hooks of one attachment. The adapters of a table share its hooks.

    Args:
        model: The attached model.
        graph: Its graph.
        guards: Pre-hooks for the root and every site.

    Attributes:
        live: Table name -> its live rows.
        batch: The model's inputs, for batches that mix adapters.
    """

    def __init__(self, model: nn.Module, graph: EmbeddingGraph, guards: Sequence[Callable[..., Any]]) -> None:
        self.live: dict[str, list[Rows]] = {}
        self.batch = Batch()
        self._model = (model,)  # as in the attachment
        self._graph = graph
        self._guards = guards
        self._change_detector = ChangeDetector()
        self._overlays: list[CopyOverlay] = []
        self._materialized: list[list[MaterializedWeights]] = []
        self._hooks: InstalledHooks = []
        self._installed: dict[str, list[bool]] = {}

    @property
    def copied_tables(self) -> set[str]:
        """The tables that are overridden by a full copy at one site or more."""
        return {name for name, modes in self._installed.items() if not all(modes)}

    def modes(self, overrides: Iterable[RowOverride], materialize: bool) -> dict[str, list[bool]]:
        """For each table and each of its sites, return whether rows can be overridden there; else it gets a full copy.

        All errors and warnings of an installation come from here, before anything changes.

        Args:
            overrides: The overrides of one adapter.
            materialize: Whether a full copy is accepted at every site, without a warning.

        Raises:
            UnsupportedError: A lookup changes its own table, or PEFT's modules_to_save replaces it.
        """
        found = {}
        for override in overrides:
            if override.indices:  # of the tensors that change a whole table, only the last one has indices
                found[override.table] = self._modes(override, materialize)
        return found

    def _modes(self, override: RowOverride, materialize: bool) -> list[bool]:
        model, table = self._model[0], self._graph.table(override.table)
        modules = [submodule(model, site.module) for site in table.sites]
        reasons = [
            f"a module of type {type(module).__name__} has it, which is neither a lookup nor a projection"
            for module, _, _ in table_holders(model, table.names, table.transposed)
            if not any(module is one for one in modules)
        ]
        materialize = materialize or bool(reasons)
        modes = []
        for site, module in zip(table.sites, modules, strict=True):
            if getattr(module, "max_norm", None) is not None:
                raise UnsupportedError(
                    "a lookup with max_norm changes its own table in the forward",
                    where=site.module,
                    expected="max_norm=None",
                    found=module.max_norm,
                    hint="normalise the table once, and set max_norm to None",
                )
            if "original_module" in site.module.split("."):
                raise UnsupportedError(
                    "PEFT uses a trained copy instead of this table, so its rows would have no effect",
                    where=site.module,
                    found="modules_to_save",
                    hint="leave the table out of modules_to_save",
                )
            weight = module._parameters[site.parameter]
            assert weight is not None
            rows = torch.tensor(override.indices, dtype=torch.int64, device=weight.device)
            swamps = not materialize and swamps_gradient(module, site, rows)
            modes.append(not materialize and not swamps and can_override(module, site, rows))
            if not modes[-1] and not materialize:
                where = f"{site.module or 'the model'} ({type(module).__name__})"
                reasons.append(
                    f"old rows of {where} are non-finite or far larger than its others, and would distort gradients"
                    if swamps
                    else f"{where} cannot be overridden row by row"
                )
        known = self._installed.get(override.table)
        if known is not None and all(can for can, could in zip(modes, known, strict=True) if could):
            reasons = []  # the table already has a full copy at these sites
        if reasons:
            warn(_describe_copy(table, f"because {' and '.join(reasons)}"))
        return modes

    def install(self, table: Table, modes: list[bool]) -> None:
        """Register the hooks of a table, unless those that are registered serve the new rows, too.

        Args:
            table: The table.
            modes: The modes of its sites for the new rows, from `modes`.
        """
        known = self._installed.get(table.name)
        if known is not None:
            modes = [could and can for could, can in zip(known, modes, strict=True)]
            if modes == known:
                return
        before = dict(self._installed)
        try:
            self._installed[table.name] = modes
            if known is None:
                self._install_table(table)
            else:
                self._reinstall_all()
        except BaseException:  # including a KeyboardInterrupt
            self._installed = before
            self._reinstall_all()
            raise

    def _reinstall_all(self) -> None:
        """Register all hooks again, because their order matters."""
        remove_hooks(self._hooks)
        self._overlays.clear()
        self._change_detector = ChangeDetector()
        for name in self._installed:
            self._install_table(self._graph.table(name))

    def _install_table(self, table: Table) -> None:
        model, live, modes = self._model[0], self.live.setdefault(table.name, []), self._installed[table.name]
        sites = {
            id(module): (module, site, can)
            for site, can in zip(table.sites, modes, strict=True)
            for module in (submodule(model, site.module),)
        }
        if not self._change_detector.sites:
            add_guards(self._hooks, model, self._guards)
            add_pre_hook(self._hooks, model, self._change_detector)
            self._change_detector.watch_separation(model, self._graph)
            add_pre_hook(self._hooks, model, self.batch.enter)
            add_post_hook(self._hooks, model, self.batch.leave, always=True)
        for module, _, _ in sites.values():
            add_guards(self._hooks, module, self._guards)
        self._change_detector.watch(model, table, live)
        for parts in self._materialized:
            if all(part.table.name != table.name for part in parts):
                parts += materialized_weights(model, self._graph, {table.name: live})
        reset_compiled()
        holders_of_table = list(table_holders(model, table.names, table.transposed))
        if not any(modes):
            self._overlay(CopyOverlay(holders_of_table, live), _modules_around(model, table))
            return
        around = [module for module in _modules_around(model, table) if id(module) not in sites]
        overlay = LazyOverlay(table, holders_of_table, live, _warn_read, around)
        self._overlay(overlay, around)
        for module, site, can in sites.values():
            if not can:
                self._overlay(CopyOverlay([(module, site.parameter, site.transposed)], live), [module])
                continue
            uncovered = UncoveredSite(site.parameter, overlay)
            add_pre_hook(self._hooks, module, uncovered.enter)
            add_post_hook(self._hooks, module, uncovered.leave, always=True)
            if site.role == "input":
                add_post_hook(self._hooks, module, Lookup(module, site, live, self.batch))
                continue
            projection = Projection(module, site, live, self.batch)
            add_pre_hook(self._hooks, module, projection.enter)
            add_post_hook(self._hooks, module, projection, always=True)

    def refresh(self, live: Iterable[tuple[str, Rows]]) -> None:
        """Fill the lists that the hooks share.

        Args:
            live: (table name, rows) of what is live now.
        """
        for rows in self.live.values():
            rows.clear()
        for table, part in live:
            if not isinstance(part, ExtraTensor):
                self.live[table].append(part)
        self.remove_leftovers()
        for overlay in self._overlays:
            overlay.refresh()
        shown = [one for parts in self._materialized for one in parts]
        for one in reversed(shown):  # each one restores what it found, so the last one comes first
            one.uncover()
        for one in shown:
            one.cover()

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """Let code outside of all forwards read the tables' weights with the live rows."""
        parts = materialized_weights(self._model[0], self._graph, self.live)
        try:
            self._materialized.append(parts)
            for part in parts:
                part.cover()
            yield
        finally:
            finish_before_interrupt(lambda: self._hide(parts))

    def _hide(self, parts: list[MaterializedWeights]) -> None:
        self.remove_leftovers()  # an interrupted forward may have covered the weights once more
        self._materialized = [others for others in self._materialized if others is not parts]
        for part in reversed(parts):
            part.uncover()

    def remove_leftovers(self) -> None:
        """Uncover the weights that interrupted forwards have left covered."""
        for overlay in self._overlays:
            overlay.remove_leftovers()
        for module, hook in self._hooks:
            if isinstance(hook, Projection):
                remove_sliced_weight(module, hook.site.parameter)

    def store(self) -> TensorStore:
        """Return a store of the model's tables. Its graph has their present dtypes: the model may have been cast."""
        store = module_store(self._model[0], self._graph)
        tables = tuple(replace(t, dtype=dtype_string(store.tensors[t.name])) for t in self._graph.tables)
        store.graph = replace(self._graph, tables=tables)
        return store

    def check_unchanged(self) -> None:
        """Raise AttachmentError if modules with hooks are no longer the model's."""
        self._change_detector(self._model[0])

    def remove(self) -> None:
        """Remove all hooks."""
        self.refresh(())
        remove_hooks(self._hooks)

    def _overlay(self, overlay: CopyOverlay, modules: Iterable[nn.Module]) -> None:
        self._overlays.append(overlay)
        for module in modules:
            add_pre_hook(self._hooks, module, overlay.enter)
            add_post_hook(self._hooks, module, overlay.leave, always=True)


def _modules_around(model: nn.Module, table: Table) -> list[nn.Module]:
    """Return the modules that have a table, and the modules around them."""
    paths = {""}
    for name in table.names:
        parts = name.split(".")[:-1]
        paths.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return list({id(m): m for m in (submodule(model, path) for path in sorted(paths))}.values())


def _warn_read(table: Table, function: Any) -> None:
    """Warn, at the line that reads it, that a weight is read outside of its sites."""
    if torch.compiler.is_compiling():
        return
    name = getattr(function, "__name__", str(function))
    message = _describe_copy(table, f"in which code reads the weight outside of its module, here {name}()")
    stack = list(frames_from(frame_at()))
    frame = next((one for one in stack if not one.f_code.co_filename.startswith(_LIBRARY_DIRECTORIES)), stack[-1])
    warnings.warn_explicit(message, EmbedSurgeryWarning, frame.f_code.co_filename, frame.f_lineno)


def _describe_copy(table: Table, why: str) -> str:
    size = f"{table.shape[0]:,} x {table.shape[1]:,}"
    return (
        f"the rows of {table.name} are inserted into a full copy of the table, {size}, in each forward {why}; "
        "attach(..., materialize=True) accepts this without a warning"
    )


_LIBRARY_DIRECTORIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[2]}{os.sep}")
