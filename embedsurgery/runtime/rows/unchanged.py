"""Sees, before each forward of the whole model, that the modules which were hooked are still the model's own.

Resizing or retying a model, and wrappers that come later, put other modules or parameters in place. Rows that are
hooked to a module that nobody calls any more would be lost without a word. So would what a PEFT layer adds to a table's
own rows, once it is merged into the table below ours.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import AttachmentError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.graph.wrappers import base_layer, merged_layer, submodule
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sites import holders
from embedsurgery.runtime.rows.sparse_lookup import is_transformed
from embedsurgery.stores.store import shorten
from embedsurgery.tensors.sharded import is_sharded

_WAY_OUT = "detach(), change the model, and attach again"


class Unchanged:
    """Forward pre-hook of a model's root."""

    def __init__(self) -> None:
        self.sites: list[tuple[str, nn.Module]] = []
        self.ties: list[tuple[Table, list[tuple[nn.Module, str]]]] = []
        self.sizes: list[tuple[Table, nn.Module, str, int, list[Rows]]] = []
        self.layers: list[_Layer] = []
        self.apart: list[tuple[str, nn.Module, str]] = []
        self.looked = self.trained = False

    def watch(self, model: nn.Module, table: Table, live: list[Rows]) -> None:
        """Expect the table's modules and live rows to stay, and names that share one Parameter to go on sharing it."""
        self.sites += [(site.module, submodule(model, site.module)) for site in table.sites]
        found = list(holders(model, table.names, table.transposed))
        held = [(module, leaf) for module, leaf, _ in found]
        self.sizes += [(table, module, leaf, int(turned), live) for module, leaf, turned in found[:1]]
        self.layers += [_Layer(model, site.module, table, found[0], live) for site in table.sites]
        if len(held) > 1 and _parameters(held) == 1:
            self.ties.append((table, held))

    def keep_apart(self, model: nn.Module, graph: EmbeddingGraph) -> None:
        """Expect the tables of a model to stay several Parameters."""
        self.apart = [
            (table.name, module, leaf)
            for table in graph.tables
            for module, leaf, _ in list(holders(model, table.names, table.transposed))[:1]
        ]

    def __call__(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for path, module in self.sites:
            if _at(model, path) is not module:
                raise AttachmentError(
                    "a module was replaced after attaching, so that its rows would be lost", where=path, hint=_WAY_OUT
                )
        plain = not is_transformed()  # below a transform numbers cannot be compared
        for layer in self.layers if plain else ():
            layer.check(model)
        trains = model.training and torch.is_grad_enabled()
        if not self.looked or (trains and not self.trained):
            self.looked = True
            self._check_tokens_of_peft(model)
        if trains and not self.trained:
            self.trained = True
            self._say_if_frozen(model)
        for rows in {id(rows): rows for _, _, _, _, live in self.sizes for rows in live}.values():
            if plain:
                rows.mend()
        self._check_offloaded()
        for table, held in self.ties:
            if _parameters(held) > 1:
                raise AttachmentError(
                    "a tied table was parted after attaching",
                    where=" and ".join(table.names),
                    expected="one parameter",
                    found=_parameters(held),
                    hint=_WAY_OUT,
                )
        self._check_apart()
        for table, module, leaf, axis, live in self.sizes:
            weight = module._parameters.get(leaf)
            size = weight.shape[axis] if weight is not None and weight.dim() == 2 else table.shape[0]
            lost = [n for n in range(size, table.shape[0]) if any(n in rows.numbers for rows in live)]
            if lost:
                raise AttachmentError(
                    "a table was cut after attaching, and has lost live rows",
                    where=table.name,
                    expected=f"{table.shape[0]} rows",
                    found=f"{size}, without {shorten(lost)}",
                    hint=_WAY_OUT,
                )

    def _check_tokens_of_peft(self, model: nn.Module) -> None:
        """Refuse, at the first forward and at the first that may train, rows that PEFT's layers replace by theirs."""
        layers: list[Any] = [
            m for m in model.modules() if hasattr(m, "trainable_tokens_delta") and hasattr(m, "token_indices")
        ]
        for table, module, _, _, live in self.sizes:
            found: set[int] = set()
            for layer in layers:
                if base_layer(layer) is module:
                    found.update(*(layer.token_indices.get(name, ()) for name in layer.active_adapters))
            both = sorted(n for n in found if any(n in rows.numbers for rows in live))
            if both:
                raise AttachmentError(
                    "PEFT's trainable tokens and attached rows are for the same tokens",
                    where=f"{table.name}, rows {shorten(both)}",
                    hint="give each token to one of them",
                )

    def _check_offloaded(self) -> None:
        for table, module, leaf, _, live in self.sizes:
            weight = module._parameters.get(leaf)
            if weight is None or not weight.is_meta or not live:
                continue
            if hasattr(module, "_hf_hook") or any(not rows.values.is_meta for rows in live):
                raise UnsupportedError(
                    "a table with attached rows has no values here: it was offloaded",
                    where=table.name,
                    expected="a table on a device",
                    found="a meta tensor",
                    hint="let what offloads the model (Accelerate's device_map) keep the table, and offload layers",
                )

    def _check_apart(self) -> None:
        ours = {id(module._parameters.get(leaf)): table.name for table, module, leaf, _, live in self.sizes if live}
        for name, module, leaf in self.apart:
            weight = module._parameters.get(leaf)
            table = None if weight is None else ours.get(id(weight))
            if table not in (None, name):
                raise AttachmentError(
                    "two tables were tied after attaching, of which one's rows would be the other's",
                    where=f"{table} and {name}",
                    expected="two parameters",
                    found="one",
                    hint=_WAY_OUT,
                )

    def _say_if_frozen(self, model: nn.Module) -> None:
        """Warn, at the first forward that may train, where PEFT has frozen the rows beside layers of its own."""
        live = [rows for _, _, _, _, part in self.sizes for rows in part]
        layers = [module for module in model.modules() if hasattr(type(module), "get_base_layer")]
        if live and layers and not any(rows.values.requires_grad for rows in live):
            warnings.warn(
                "every row is frozen, so that none will be trained: PEFT freezes what it does not know; "
                "attachment.unfreeze() makes them trainable again",
                EmbedSurgeryWarning,
                stacklevel=4,
            )


class _Layer:
    """Sees that no PEFT layer around a site is merged into, or out of, a table after attaching.

    Rows of ours are absolute: what a layer adds to all rows would be lost for them, or stay twice. Where the layer is
    gone, a few rows of the table say whether it was merged before: they differ by more than a merge and its unmerge
    leave.
    """

    def __init__(
        self, model: nn.Module, path: str, table: Table, holder: tuple[nn.Module, str, bool], live: list[Rows]
    ) -> None:
        self.path, self.table, self.holder, self.live = path, table, holder, live
        self.last = merged_layer(model, path)
        self.began = bool(self.last)
        self.looked = False
        self.eps = 0.0
        self.sample = self._sample()

    def check(self, model: nn.Module) -> None:
        """Raises AttachmentError where rows are live and a layer was merged since they were attached."""
        if not self.live:
            return
        now = merged_layer(model, self.path)
        gone = now is None and (self.last is not None or self._may_have_come_and_gone())
        if (now is not None and now != self.began) or (gone and self._is_other()):
            raise AttachmentError(
                "a PEFT layer was merged or unmerged below rows that are attached, which lose its part",
                where=self.path,
                found=f"{self.table.name} with other rows than when they were attached",
                hint="attachment.merge() before PEFT's merge_adapter() or merge_and_unload(); unload() takes LoRA off",
            )
        self.last, self.looked = now, True

    def _may_have_come_and_gone(self) -> bool:
        """Whether PEFT may have put a layer around, and taken it off, before any forward: it freezes what it meets."""
        return not self.looked and "peft" in sys.modules and not any(r.values.requires_grad for r in self.live)

    def _sample(self) -> torch.Tensor | None:
        module, leaf, turned = self.holder
        weight = module._parameters.get(leaf)
        if weight is None or weight.is_meta or is_sharded(weight) or not weight.numel() or weight.dim() != 2:
            return None
        if not weight.is_floating_point():
            return None
        self.eps = torch.finfo(weight.dtype).eps
        view = weight.detach().t() if turned else weight.detach()
        size = min(view.shape[0], self.table.shape[0])
        places = torch.arange(_SAMPLED, device=view.device) * (size - 1) // (_SAMPLED - 1)
        return view.index_select(0, places).to(torch.promote_types(view.dtype, torch.float32))

    def _is_other(self) -> bool:
        eps, then, now = self.eps, self.sample, self._sample()
        weight = self.holder[0]._parameters.get(self.holder[1])
        if weight is None or weight.requires_grad:  # what trains is another at each step
            return False
        if now is None or then is None or eps != self.eps or now.shape != then.shape:
            return False
        then = then.to(now.device)
        allowed = 8 * eps * torch.maximum(now.abs().amax(), then.abs().amax())
        return bool(((now - then).abs() > allowed).any())


_SAMPLED = 8


def _parameters(held: list[tuple[nn.Module, str]]) -> int:
    return len({id(module._parameters.get(leaf)) for module, leaf in held})


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return submodule(model, path)  # a PEFT layer may have come around it, or gone
    except AttributeError:
        return None
