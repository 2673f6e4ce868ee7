"""What is installed on a model: hooks at the sites of its tables, and the rows that are live, which the hooks share.

Which adapters there are and which of them are live is ``attach.py``'s; what a hook does is ``sites.py``'s and
``overlays.py``'s.
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

from embedsurgery.errors import EmbedSurgeryWarning, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.graph.wrappers import submodule
from embedsurgery.runtime.calls import frame_at, frames_from, to_the_end
from embedsurgery.runtime.hooks import Installed, after, before, forget_compiled, guard, remove
from embedsurgery.runtime.rows.materialized import Standing, standing
from embedsurgery.runtime.rows.mixing import Batch
from embedsurgery.runtime.rows.overlays import Materialised, StandIns
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sites import Lookup, Projection, can_override, drown, holders
from embedsurgery.runtime.rows.sliced_head import uncover
from embedsurgery.runtime.rows.unchanged import Unchanged
from embedsurgery.runtime.rows.uncovered import Uncovered
from embedsurgery.runtime.rows.whole_tables import Companion
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.tensor_store import TensorStore
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.tensors.convert import dtype_string


class Installation:
    """The hooks of one attachment, once for each table however many adapters have rows of it.

    Args:
        model: The attached model.
        graph: Of it.
        guards: Pre-hooks for its root and every site.

    Attributes:
        live: Table's name -> the rows that are live for it.
        batch: What the model is given while a batch mixes adapters.
    """

    def __init__(self, model: nn.Module, graph: EmbeddingGraph, guards: Sequence[Callable[..., Any]]) -> None:
        self.live: dict[str, list[Rows]] = {}
        self.batch = Batch()
        self._model = (model,)  # as in the attachment
        self._graph = graph
        self._guards = guards
        self._unchanged = Unchanged()
        self._overlays: list[Materialised] = []
        self._standing: list[list[Standing]] = []
        self._hooks: Installed = []
        self._installed: dict[str, list[bool]] = {}

    @property
    def copied(self) -> set[str]:
        """The tables that are overridden by a full copy, at a site at least."""
        return {name for name, modes in self._installed.items() if not all(modes)}

    def modes(self, overrides: Iterable[RowOverride], materialize: bool) -> dict[str, list[bool]]:
        """For each table, and each of its sites, whether rows can be overridden there, or need a full copy.

        Errors and warnings come here, before anything changes.

        Raises:
            UnsupportedError: A lookup that changes its own table, or one that another library has set aside.
        """
        found = {}
        for override in overrides:
            if override.indices:  # of a whole table's tensors the last stands for all
                found[override.table] = self._modes(override, materialize)
        return found

    def _modes(self, override: RowOverride, materialize: bool) -> list[bool]:
        model, table = self._model[0], self._graph.table(override.table)
        modules = [submodule(model, site.module) for site in table.sites]
        why = [
            f"a module of type {type(module).__name__}, no lookup and no projection, holds it too"
            for module, _, _ in holders(model, table.names, table.transposed)
            if not any(module is one for one in modules)
        ]
        materialize = materialize or bool(why)
        modes = []
        for site, module in zip(table.sites, modules, strict=True):
            if getattr(module, "max_norm", None) is not None:
                raise UnsupportedError(
                    "a lookup with max_norm changes its own table in the forward",
                    where=site.module,
                    expected="max_norm=None",
                    found=module.max_norm,
                    hint="normalise the table once and set max_norm to None",
                )
            if "original_module" in site.module.split("."):
                raise UnsupportedError(
                    "PEFT has set this table aside for a trained copy of its own, so its rows would change nothing",
                    where=site.module,
                    found="modules_to_save",
                    hint="leave the table out of modules_to_save",
                )
            weight = module._parameters[site.parameter]
            assert weight is not None
            rows = torch.tensor(override.indices, dtype=torch.int64, device=weight.device)
            drowns = not materialize and drown(module, site, rows)
            modes.append(not materialize and not drowns and can_override(module, site, rows))
            if not modes[-1] and not materialize:
                where = f"{site.module or 'the model'} ({type(module).__name__})"
                why.append(
                    f"old rows of {where} are no numbers, or far larger than its others, which would be left in "
                    "gradients"
                    if drowns
                    else f"of what {where} computes"
                )
        known = self._installed.get(override.table)
        if known is not None and all(can for can, could in zip(modes, known, strict=True) if could):
            why = []  # as it is already
        if why:
            warnings.warn(_costs(table, f"because {' and '.join(why)}"), EmbedSurgeryWarning, stacklevel=6)
        return modes

    def install(self, table: Table, modes: list[bool]) -> None:
        """Put the hooks for a table on its sites, unless they are there and do for these rows too.

        Args:
            table: What rows are for.
            modes: What `modes` says of its sites for them.
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
                self._put(table)
            else:
                self._put_all()
        except BaseException:  # a KeyboardInterrupt
            self._installed = before
            self._put_all()
            raise

    def _put_all(self) -> None:
        """Put all hooks on anew, for they stand in an order."""
        remove(self._hooks)
        self._overlays.clear()
        self._unchanged = Unchanged()
        for name in self._installed:
            self._put(self._graph.table(name))

    def _put(self, table: Table) -> None:
        model, live, modes = self._model[0], self.live.setdefault(table.name, []), self._installed[table.name]
        sites = {
            id(module): (module, site, can)
            for site, can in zip(table.sites, modes, strict=True)
            for module in (submodule(model, site.module),)
        }
        if not self._unchanged.sites:
            guard(self._hooks, model, self._guards)
            before(self._hooks, model, self._unchanged)
            self._unchanged.keep_apart(model, self._graph)
            before(self._hooks, model, self.batch.enter)
            after(self._hooks, model, self.batch.leave, always=True)
        for module, _, _ in sites.values():
            guard(self._hooks, module, self._guards)
        self._unchanged.watch(model, table, live)
        for parts in self._standing:
            if all(part.table.name != table.name for part in parts):
                parts += standing(model, self._graph, {table.name: live})
        forget_compiled()
        held = list(holders(model, table.names, table.transposed))
        if not any(modes):
            self._overlay(Materialised(held, live), _around(model, table))
            return
        around = [module for module in _around(model, table) if id(module) not in sites]
        overlay = StandIns(table, held, live, _say, around)
        self._overlay(overlay, around)
        for module, site, can in sites.values():
            if not can:
                self._overlay(Materialised([(module, site.parameter, site.transposed)], live), [module])
                continue
            uncovered = Uncovered(site.parameter, overlay)
            before(self._hooks, module, uncovered.enter)
            after(self._hooks, module, uncovered.leave, always=True)
            if site.role == "input":
                after(self._hooks, module, Lookup(module, site, live, self.batch))
                continue
            projection = Projection(module, site, live, self.batch)
            before(self._hooks, module, projection.enter)
            after(self._hooks, module, projection, always=True)

    def refresh(self, live: Iterable[tuple[str, Rows]]) -> None:
        """Fill the lists that the hooks share.

        Args:
            live: Rows that are live now, each with its table's name.
        """
        for rows in self.live.values():
            rows.clear()
        for table, part in live:
            if not isinstance(part, Companion):
                self.live[table].append(part)
        self.settle()
        for overlay in self._overlays:
            overlay.refresh()
        shown = [one for parts in self._standing for one in parts]
        for one in reversed(shown):  # each keeps what it was laid over
            one.take_away()
        for one in shown:
            one.lay()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, code outside of every forward reads the tables' weights with the live rows."""
        parts = standing(self._model[0], self._graph, self.live)
        try:
            self._standing.append(parts)
            for part in parts:
                part.lay()
            yield
        finally:
            to_the_end(lambda: self._hide(parts))

    def _hide(self, parts: list[Standing]) -> None:
        self.settle()  # what a forward laid over it, and left
        self._standing = [others for others in self._standing if others is not parts]
        for part in reversed(parts):
            part.take_away()

    def settle(self) -> None:
        """Take away what forwards left over weights that were broken off."""
        for overlay in self._overlays:
            overlay.settle()
        for module, hook in self._hooks:
            if isinstance(hook, Projection):
                uncover(module, hook.site.parameter)

    def store(self) -> TensorStore:
        """The model's tables, in the dtypes that they have now: the model may have been cast since."""
        store = module_store(self._model[0], self._graph)
        tables = tuple(replace(t, dtype=dtype_string(store.tensors[t.name])) for t in self._graph.tables)
        store.graph = replace(self._graph, tables=tables)
        return store

    def check_unchanged(self) -> None:
        """Raises AttachmentError where the modules that were hooked are not the model's any more."""
        self._unchanged(self._model[0])

    def remove(self) -> None:
        """Take everything off."""
        self.refresh(())
        remove(self._hooks)

    def _overlay(self, overlay: Materialised, modules: Iterable[nn.Module]) -> None:
        self._overlays.append(overlay)
        for module in modules:
            before(self._hooks, module, overlay.enter)
            after(self._hooks, module, overlay.leave, always=True)


def _around(model: nn.Module, table: Table) -> list[nn.Module]:
    """The modules that hold a table, and those around them."""
    paths = {""}
    for name in table.names:
        parts = name.split(".")[:-1]
        paths.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return list({id(m): m for m in (submodule(model, path) for path in sorted(paths))}.values())


def _say(table: Table, function: Any) -> None:
    """Warn, at the line that reads it, of a weight that is read outside of its sites."""
    if torch.compiler.is_compiling():
        return
    name = getattr(function, "__name__", str(function))
    message = _costs(table, f"that reads the weight outside of its module, as {name} does here")
    stack = list(frames_from(frame_at()))
    frame = next((one for one in stack if not one.f_code.co_filename.startswith(_NOT_THE_READER)), stack[-1])
    warnings.warn_explicit(message, EmbedSurgeryWarning, frame.f_code.co_filename, frame.f_lineno)


def _costs(table: Table, why: str) -> str:
    size = f"{table.shape[0]:,} x {table.shape[1]:,}"
    return (
        f"the rows of {table.name} are put into a full copy of the table, {size}, in each forward {why}; "
        "attach(..., materialize=True) says that this is meant"
    )


_NOT_THE_READER = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[2]}{os.sep}")
