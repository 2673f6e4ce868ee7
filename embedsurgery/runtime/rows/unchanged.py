"""Checks, before each forward of the model, that the modules with hooks and their tables are still the model's.

Resizing or retying a model, and later wrappers, put other modules or parameters in place. Rows whose hooks are on a
module that is no longer called would be lost silently. So would the part of a PEFT layer in a table's overridden rows,
once PEFT merges it into the table.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import AttachmentError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.graph.wrappers import base_layer, is_layer_merged, submodule
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sites import table_holders
from embedsurgery.runtime.rows.sparse_lookup import is_transformed
from embedsurgery.stores.store import shorten
from embedsurgery.tensors.sharded import is_sharded

_WAY_OUT = "detach(), change the model, and attach again"


class ChangeDetector:
    """Forward pre-hook of a model's root.

    Attributes:
        sites: Paths of modules, and the module that each was when it was hooked.
        ties: Tied tables, and the (module, parameter name) pairs that share one Parameter.
        tables: Watched tables: the table, the module and parameter name that hold it, the axis of its rows, and the
            rows that are live for it.
        layers: Checks of PEFT layers around sites.
        separate: Name, module and parameter name of the model's tables, which must stay separate Parameters.
    """

    def __init__(self) -> None:
        self.sites: list[tuple[str, nn.Module]] = []
        self.ties: list[tuple[Table, list[tuple[nn.Module, str]]]] = []
        self.tables: list[tuple[Table, nn.Module, str, int, list[Rows]]] = []
        self.layers: list[_PeftLayerCheck] = []
        self.separate: list[tuple[str, nn.Module, str]] = []
        self.has_run = self.has_trained = False

    def watch(self, model: nn.Module, table: Table, live: list[Rows]) -> None:
        """Watch a table's modules, size and ties, while rows are live for it."""
        self.sites += [(site.module, submodule(model, site.module)) for site in table.sites]
        holders = list(table_holders(model, table.names, table.transposed))
        parameters = [(module, leaf) for module, leaf, _ in holders]
        self.tables += [(table, module, leaf, int(transposed), live) for module, leaf, transposed in holders[:1]]
        self.layers += [_PeftLayerCheck(model, site.module, table, holders[0], live) for site in table.sites]
        if len(parameters) > 1 and _count_distinct(parameters) == 1:
            self.ties.append((table, parameters))

    def watch_separation(self, model: nn.Module, graph: EmbeddingGraph) -> None:
        """Watch that the tables of a model stay separate Parameters."""
        self.separate = [
            (table.name, module, leaf)
            for table in graph.tables
            for module, leaf, _ in list(table_holders(model, table.names, table.transposed))[:1]
        ]

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """Check all of it.

        Raises:
            AttachmentError: A module was replaced, a table was untied, tied or cut, or a PEFT layer was merged.
            UnsupportedError: A table was offloaded.
        """
        if torch.compiler.is_compiling():
            return
        for path, module in self.sites:
            if _module_at(model, path) is not module:
                raise AttachmentError(
                    "a module was replaced after attaching, so its rows would be lost", where=path, hint=_WAY_OUT
                )
        has_values = not is_transformed()  # below a transform, values cannot be compared
        for layer in self.layers if has_values else ():
            layer.check(model)
        trains = model.training and torch.is_grad_enabled()
        if not self.has_run or (trains and not self.has_trained):
            self.has_run = True
            self._check_peft_tokens(model)
        if trains and not self.has_trained:
            self.has_trained = True
            self._warn_if_frozen(model)
        for rows in {id(rows): rows for _, _, _, _, live in self.tables for rows in live}.values():
            if has_values:
                rows.repair_indices()
        self._check_offloaded()
        for table, parameters in self.ties:
            if _count_distinct(parameters) > 1:
                raise AttachmentError(
                    "a tied table was untied after attaching",
                    where=" and ".join(table.names),
                    expected="one parameter",
                    found=f"{_count_distinct(parameters)} parameters",
                    hint=_WAY_OUT,
                )
        self._check_separation()
        self._check_sizes()

    def _check_sizes(self) -> None:
        for table, module, leaf, axis, live in self.tables:
            weight = module._parameters.get(leaf)
            size = weight.shape[axis] if weight is not None and weight.dim() == 2 else table.shape[0]
            lost = [n for n in range(size, table.shape[0]) if any(n in rows.index_set for rows in live)]
            if lost:
                raise AttachmentError(
                    "a table was cut after attaching and has lost live rows",
                    where=table.name,
                    expected=f"{table.shape[0]} rows",
                    found=f"{size} rows, without {shorten(lost)}",
                    hint=_WAY_OUT,
                )

    def _check_peft_tokens(self, model: nn.Module) -> None:
        """Refuse tokens that PEFT's layers train as well: PEFT would replace their rows by its own.

        It searches the model, so it runs only in the first forward, and in the first that may train.
        """
        layers: list[Any] = [
            m for m in model.modules() if hasattr(m, "trainable_tokens_delta") and hasattr(m, "token_indices")
        ]
        for table, module, _, _, live in self.tables:
            found: set[int] = set()
            for layer in layers:
                if base_layer(layer) is module:
                    found.update(*(layer.token_indices.get(name, ()) for name in layer.active_adapters))
            both = sorted(n for n in found if any(n in rows.index_set for rows in live))
            if both:
                raise AttachmentError(
                    "PEFT's trainable tokens and the attached rows are for the same tokens",
                    where=f"{table.name}, rows {shorten(both)}",
                    hint="give each token to one of them",
                )

    def _check_offloaded(self) -> None:
        for table, module, leaf, _, live in self.tables:
            weight = module._parameters.get(leaf)
            if weight is None or not weight.is_meta or not live:
                continue
            if hasattr(module, "_hf_hook") or any(not rows.values.is_meta for rows in live):
                raise UnsupportedError(
                    "a table with attached rows is offloaded",
                    where=table.name,
                    expected="a table on a device",
                    found="a meta tensor",
                    hint="offload layers instead, and keep the table on a device (Accelerate's device_map)",
                )

    def _check_separation(self) -> None:
        with_rows = {id(module._parameters.get(leaf)): t.name for t, module, leaf, _, live in self.tables if live}
        for name, module, leaf in self.separate:
            weight = module._parameters.get(leaf)
            table = None if weight is None else with_rows.get(id(weight))
            if table not in (None, name):
                raise AttachmentError(
                    "two tables were tied after attaching, so the rows of one would be those of the other",
                    where=f"{table} and {name}",
                    expected="two parameters",
                    found="one parameter",
                    hint=_WAY_OUT,
                )

    def _warn_if_frozen(self, model: nn.Module) -> None:
        """Warn, at the first forward that may train, if all rows are frozen in a model with PEFT layers."""
        live = [rows for _, _, _, _, part in self.tables for rows in part]
        layers = [module for module in model.modules() if hasattr(type(module), "get_base_layer")]
        if live and layers and not any(rows.values.requires_grad for rows in live):
            warnings.warn(
                "all rows are frozen and will not train: PEFT freezes parameters that it does not manage; "
                "attachment.unfreeze() makes them trainable",
                EmbedSurgeryWarning,
                stacklevel=4,
            )


class _PeftLayerCheck:
    """Checks that no PEFT layer around a site was merged into a table, or unmerged, after attaching.

    Attached rows replace the table's, so what a layer adds to all rows would be lost for them, or be in them twice. If
    the layer was unloaded, a few rows of the table show whether it was merged first: they differ by more than the
    rounding that a merge and its unmerge leave.
    """

    def __init__(
        self, model: nn.Module, path: str, table: Table, holder: tuple[nn.Module, str, bool], live: list[Rows]
    ) -> None:
        self.path, self.table, self.holder, self.live = path, table, holder, live
        self.last = is_layer_merged(model, path)
        self.merged_at_start = bool(self.last)
        self.has_run = False
        self.eps = 0.0
        self.sample = self._read_sample()

    def check(self, model: nn.Module) -> None:
        """Raise AttachmentError if rows are live and a layer was merged or unmerged since they were attached."""
        if not self.live:
            return
        merged = is_layer_merged(model, self.path)
        is_gone = merged is None and (self.last is not None or self._may_have_been_unloaded())
        if (merged is not None and merged != self.merged_at_start) or (is_gone and self._sample_differs()):
            raise AttachmentError(
                "a PEFT layer was merged or unmerged below attached rows, which would lose its part",
                where=self.path,
                found=f"{self.table.name} with other rows than when they were attached",
                hint="attachment.merge() before PEFT's merge_adapter() or merge_and_unload(); unload() removes LoRA",
            )
        self.last, self.has_run = merged, True

    def _may_have_been_unloaded(self) -> bool:
        """Whether PEFT may have added and unloaded a layer before the first forward, as it leaves the rows frozen."""
        return not self.has_run and "peft" in sys.modules and not any(r.values.requires_grad for r in self.live)

    def _read_sample(self) -> torch.Tensor | None:
        module, leaf, transposed = self.holder
        weight = module._parameters.get(leaf)
        if weight is None or weight.is_meta or is_sharded(weight) or not weight.numel() or weight.dim() != 2:
            return None
        if not weight.is_floating_point():
            return None
        self.eps = torch.finfo(weight.dtype).eps
        view = weight.detach().t() if transposed else weight.detach()
        size = min(view.shape[0], self.table.shape[0])
        places = torch.arange(_SAMPLE_ROWS, device=view.device) * (size - 1) // (_SAMPLE_ROWS - 1)
        return view.index_select(0, places).to(torch.promote_types(view.dtype, torch.float32))

    def _sample_differs(self) -> bool:
        eps, then, now = self.eps, self.sample, self._read_sample()
        weight = self.holder[0]._parameters.get(self.holder[1])
        if weight is None or weight.requires_grad:  # a table that trains differs after each step
            return False
        if now is None or then is None or eps != self.eps or now.shape != then.shape:
            return False
        then = then.to(now.device)
        allowed = 8 * eps * torch.maximum(now.abs().amax(), then.abs().amax())
        return bool(((now - then).abs() > allowed).any())


_SAMPLE_ROWS = 8


def _count_distinct(parameters: list[tuple[nn.Module, str]]) -> int:
    return len({id(module._parameters.get(leaf)) for module, leaf in parameters})


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return submodule(model, path)  # looks through a PEFT layer that has come around it since
    except AttributeError:
        return None
