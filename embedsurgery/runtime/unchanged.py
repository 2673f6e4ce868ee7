"""Sees, before each forward of the whole model, that the modules which were hooked are still the model's own.

Resizing or retying a model, and wrappers that come later, put other modules or parameters in place. Rows that are
hooked to a module that nobody calls any more would be lost without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from embedsurgery.errors import AttachmentError
from embedsurgery.graph import Table
from embedsurgery.runtime.rows import Rows
from embedsurgery.runtime.sites import holders
from embedsurgery.stores.base import shorten
from embedsurgery.wrappers import submodule

_WAY_OUT = "detach(), change the model, and attach again"


class Unchanged:
    """Forward pre-hook of a model's root."""

    def __init__(self) -> None:
        self.sites: list[tuple[str, nn.Module]] = []
        self.ties: list[tuple[Table, list[tuple[nn.Module, str]]]] = []
        self.sizes: list[tuple[Table, nn.Module, str, int, list[Rows]]] = []

    def watch(self, model: nn.Module, table: Table, live: list[Rows]) -> None:
        """Expect the table's modules and live rows to stay, and names that share one Parameter to go on sharing it."""
        self.sites += [(site.module, submodule(model, site.module)) for site in table.sites]
        found = list(holders(model, table.names, table.transposed))
        held = [(module, leaf) for module, leaf, _ in found]
        self.sizes += [(table, module, leaf, int(turned), live) for module, leaf, turned in found[:1]]
        if len(held) > 1 and _parameters(held) == 1:
            self.ties.append((table, held))

    def __call__(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for path, module in self.sites:
            if _at(model, path) is not module:
                raise AttachmentError("a module was replaced after attaching, so that its rows would be lost",
                                      where=path, hint=_WAY_OUT)  # fmt: skip
        for table, held in self.ties:
            if _parameters(held) > 1:
                raise AttachmentError("a tied table was parted after attaching", where=" and ".join(table.names),
                                      expected="one parameter", found=_parameters(held), hint=_WAY_OUT)  # fmt: skip
        for table, module, leaf, axis, live in self.sizes:
            weight = module._parameters.get(leaf)
            size = weight.shape[axis] if weight is not None and weight.dim() == 2 else table.shape[0]
            lost = [n for n in range(size, table.shape[0]) if any(n in rows.numbers for rows in live)]
            if lost:
                raise AttachmentError("a table was cut after attaching, and has lost live rows", where=table.name,
                                      expected=f"{table.shape[0]} rows", found=f"{size}, without {shorten(lost)}",
                                      hint=_WAY_OUT)  # fmt: skip


def _parameters(held: list[tuple[nn.Module, str]]) -> int:
    return len({id(module._parameters.get(leaf)) for module, leaf in held})


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return submodule(model, path)  # a PEFT layer may have come around it, or gone
    except AttributeError:
        return None
