"""Sees in the first forward whether a model uses its tables through their modules at all.

A few architectures read ``module.weight`` in a forward of their own and never call the module (MobileBERT's and
DeBERTa's heads, Perceiver's decoder). No override at a site reaches such a read. The watch compares what came out of
the first forward with the sites that ran: logits as wide as a vocabulary, and no projection that made them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.runtime.hooks import Installed, after, remove


class Watch:
    """Watches the sites of a graph until one whole forward has shown how its tables are used."""

    def __init__(self, model: nn.Module, graph: EmbeddingGraph) -> None:
        self.graph = graph
        self.ran: set[str] = set()
        self.installed: Installed = []
        for table in graph.tables:
            for site in table.sites:
                after(self.installed, model.get_submodule(site.module), _Mark(self.ran, site.module))

    def remove(self) -> None:
        """Stop watching."""
        remove(self.installed)

    def unreached(self, tables: Iterable[Table], ids: Any, output: Any) -> list[Table]:
        """The tables that the forward just seen has used otherwise than through their sites.

        Args:
            tables: Those whose rows are overridden.
            ids: What the forward was given as input ids, if anything.
            output: What it returned.
        """
        widths = {t.shape[-1] for t in _tensors(output) if t.is_floating_point() and t.dim() > 1}
        given = isinstance(ids, torch.Tensor) and not ids.is_floating_point()
        any_ran = any(self._ran(t, "input") for t in self.graph.tables)
        found = []
        for table in tables:
            size = table.shape[0]
            projected = any(t.shape[0] == size and self._ran(t, "output") for t in self.graph.tables)
            looked_up = self._ran(table, "input") if table.name == self.graph.input else any_ran
            main = table.name == self.graph.input or self.graph.input is None
            if (size in widths and not projected) or (given and main and not looked_up):
                found.append(table)
        return found

    def done(self, output: Any) -> bool:
        """Whether the forward just seen proves enough: it looked ids up, and made logits through a projection."""
        sizes = {t.shape[0] for t in self.graph.tables if self._ran(t, "output")}
        logits = any(t.shape[-1] in sizes for t in _tensors(output) if t.dim() > 1)
        return logits and any(self._ran(t, "input") for t in self.graph.tables)

    def forget(self) -> None:
        """Begin the next forward."""
        self.ran.clear()

    def _ran(self, table: Table, role: str) -> bool:
        return any(site.role == role and site.module in self.ran for site in table.sites)


class _Mark:
    """Notes that a module ran."""

    def __init__(self, ran: set[str], module: str) -> None:
        self.ran = ran
        self.module = module

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.ran.add(self.module)


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors in an output: a tensor, a tuple, a dict (ModelOutput is one), two levels deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 2 and isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth + 1)
    elif depth < 2 and isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, depth + 1)
