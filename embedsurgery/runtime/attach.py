"""The attachment: which adapters are live on a model, and what may be done with them.

How rows reach a forward pass is ``sites.py``'s. What an adapter means is its surgery's: this file only takes the
overrides that the surgery returns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedsurgery.adapter import Adapter
from embedsurgery.errors import AttachmentError, ConfigError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.locate import locate
from embedsurgery.plan import Plan, Undo
from embedsurgery.runtime.history import has_history, holds, look_at
from embedsurgery.runtime.hooks import Installed, after, before, remove
from embedsurgery.runtime.loading import check_loaded, replacements
from embedsurgery.runtime.rows import Hidden, Rows
from embedsurgery.runtime.sharded import Guard, save_once, set_rows
from embedsurgery.runtime.sites import Lookup, Materialised, Projection, can_override, holders
from embedsurgery.runtime.unchanged import Unchanged
from embedsurgery.runtime.watch import Watch
from embedsurgery.stores.base import apply, shorten
from embedsurgery.stores.tensors import TensorStore, module_store
from embedsurgery.surgeries.base import RowOverride, Surgery, SurgeryRecord
from embedsurgery.tensors import dtype_string, to_raw
from embedsurgery.wrappers import submodule

CHILD = "embedsurgery"
"""Name under which an attachment is registered on its model."""


@dataclass(frozen=True)
class _Member:
    """An adapter on the model: as it was attached, and what it overrides there."""

    adapter: Adapter
    record: SurgeryRecord
    located: Mapping[str, Table]
    overrides: tuple[RowOverride, ...]


class Attachment(Hidden):
    """The adapters of one model. Made by `embedsurgery.attach`, found again by `embedsurgery.attached`.

    A child module of the model, so that its rows are among the model's parameters and move with it; it stays out of
    the state dict.

    Attributes:
        saved_beside: Whether something saves the rows beside each state dict of the model and restores them with it,
            as the integrations do, so that loading a state dict alone is no matter.
    """

    def __init__(self, model: nn.Module, graph: EmbeddingGraph) -> None:
        super().__init__()
        self.saved_beside = False
        self._unstepped: dict[str, bool] = {}  # adapter that no optimizer here has stepped -> began from a config
        self.rows_of = nn.ModuleDict()
        self.graph = graph
        self._model = (model,)  # in a tuple, so that the parent is not registered as its own child's child
        self._members: dict[str, _Member] = {}
        self._active: list[str] = []
        self._live: dict[str, list[Rows]] = {}
        self._disabled = 0
        self._undo: list[Undo] = []
        self._frozen: list[nn.Parameter] = []
        self._hooks: Installed = []
        self._unchanged = Unchanged()
        self._guarded: Installed = []
        self._site_hooks: dict[str, Installed] = {}
        self._materialised: set[str] = set()
        self._watch: Watch | None = None
        self._guard = Guard(model, (n for t in graph.tables for n in t.names), self._trained, self._started)

    # -- what is on the model ------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model that this is attached to."""
        return self._model[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter, in the order of attaching."""
        return tuple(self._members)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that are live."""
        return tuple(self._active)

    @property
    def merged(self) -> bool:
        """Whether the rows lie in the model's own weights just now."""
        return bool(self._undo)

    def activate(self, *names: str) -> None:
        """Make exactly these adapters live; none makes the model the base's.

        Raises:
            AttachmentError: A name that is not attached, rows of a table in two of the adapters, or a merged model.
        """
        self._not_merged("activate adapters")
        for name in names:
            self._member(name)
        if len(set(names)) != len(names):
            raise AttachmentError("an adapter is named twice", found=", ".join(names))
        self._check_disjoint(names)
        self._active = list(names)
        self._refresh()

    def adapter(self, name: str | None = None) -> Adapter:
        """A snapshot of an adapter's rows as they are now; further training does not change it.

        Where the rows are sharded they are gathered, (K, D) and nothing else: every rank calls it.

        Args:
            name: By default "default", or the only one there is.

        Raises:
            AttachmentError: There is none of this name.
        """
        name = self._name(name)
        member = self._member(name)
        raw = dict(member.adapter.raw)
        for override, rows in zip(member.overrides, self._rows(name), strict=True):
            raw[override.tensor] = to_raw(rows.values)
        return replace(member.adapter, raw=raw)

    def save(self, directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write a snapshot of an adapter. With several processes all of them call it, and rank 0 writes.

        Args:
            directory: Where to.
            name: As for `adapter`.

        Raises:
            AttachmentError: There is none of this name.
            AdapterError: The directory cannot be written, or the ranks hold different rows.
        """
        return save_once(self.adapter(name), directory)

    def restore(self, adapter: Adapter, name: str | None = None) -> None:
        """Set an adapter's rows in place: the Parameters stay the same objects, so an optimizer's state stays theirs.

        Args:
            adapter: What was saved of it, with the same rows of the same tables.
            name: Which one to set; by default "default", or the only one there is.

        Raises:
            AttachmentError: There is none of this name, its rows are others, or the model is merged.
            BaseMismatchError: It was made from another base.
        """
        self._not_merged("restore rows")
        name = self._name(name)
        member = self._member(name)
        if adapter.manifest.surgery != member.record.name:
            raise AttachmentError("the adapter is of another surgery", where=name, expected=member.record.name,
                                  found=adapter.manifest.surgery)  # fmt: skip
        theirs = member.record.surgery.live(adapter, locate(adapter, self._store()))
        values = replacements(name, member.overrides, theirs, adapter)
        with torch.no_grad():
            for rows, new in zip(self._rows(name), values, strict=True):
                set_rows(self.model, rows, new)
        if name in self._unstepped:
            self._unstepped[name] = False

    def remove(self, name: str) -> None:
        """Take an adapter off; the last one detaches the model.

        Raises:
            AttachmentError: There is none of this name, or the model is merged.
        """
        self._not_merged("remove an adapter")
        self._member(name)
        if len(self._members) == 1:
            self.detach()
            return
        self._active = [other for other in self._active if other != name]
        del self._members[name]
        del self.rows_of[_key(name)]
        self._unstepped.pop(name, None)
        self._refresh()

    # -- training ------------------------------------------------------------------------------------------------

    def unfreeze(self) -> None:
        """Make every adapter's rows trainable again, after a wrapper that freezes what it does not know."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters of the model are trained, as PEFT does."""
        everything = {id(p): p for p in self.model.parameters()}
        trained = sum(p.numel() for p in everything.values() if p.requires_grad)
        total = sum(p.numel() for p in everything.values())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base.

        Raises:
            AttachmentError: The rows are merged, so that the base is not there.
        """
        self._not_merged("disable adapters")
        self._disabled += 1
        self._refresh()
        try:
            yield
        finally:
            self._disabled -= 1
            self._refresh()

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, each sample of the batch has an adapter of its own: equal to running each sample alone.

        Args:
            names: One adapter for each sample, None for the base. Adapters may set the same rows here.

        Raises:
            AttachmentError: A name that is not attached, or a merged model.
            UnsupportedError: A table that is overridden by a full copy, which is the same for all samples; and in a
                forward of another number of samples than there are names.
        """
        self._not_merged("mix adapters")
        used = list(dict.fromkeys(name for name in names if name is not None))
        tables = {override.table for name in used for override in self._member(name).overrides}
        if not names:
            raise AttachmentError("no sample is named", expected="one adapter name, or None, for each sample")
        if tables & self._materialised:
            raise UnsupportedError("a batch cannot mix adapters here", where=", ".join(sorted(tables)),
                                   found="a table that is overridden by a full copy of it",
                                   hint="run the samples of each adapter by themselves")  # fmt: skip
        before, self._active = self._active, used
        self._refresh()
        try:
            for name in used:
                for rows in self._rows(name):
                    rows.samples = torch.tensor([other == name for other in names], device=rows.indices.device)
            yield
        finally:
            for name in used:
                for rows in self._rows(name):
                    rows.samples = None
            self._active = before
            self._refresh()

    # -- merging -------------------------------------------------------------------------------------------------

    def merge(self) -> Undo:
        """Write the live adapters' rows into the model's weights, each rounded once to the table's dtype.

        Returns:
            The undo, which `unmerge` uses, and which `embedsurgery.unmerge` takes as well.

        Raises:
            AttachmentError: Merged already, or no adapter is live.
            UnsupportedError: A table whose rows cannot be written, for instance one that is sharded.
        """
        self._not_merged("merge")
        if not self._active:
            raise AttachmentError("no adapter is active", hint="activate one before merging")
        self._unchanged(self.model)
        edits = [edit for name in self._active for edit in self._plan(name).edits]
        undo = apply(Plan(tuple(edits)), self._store())
        self._undo.append(undo)
        self._refresh()
        return undo

    def unmerge(self) -> None:
        """Put the model's weights back bit for bit, and make the adapters live again.

        Raises:
            AttachmentError: Not merged.
        """
        if not self._undo:
            raise AttachmentError("the model is not merged", hint="merge() comes first")
        apply(self._undo[-1], self._store())
        self._undo.pop()
        self._refresh()

    def detach(self) -> None:
        """Take every adapter off and restore what was trainable. A merged model keeps the rows in its weights."""
        for hooks in (self._hooks, self._guarded, *self._site_hooks.values()):
            remove(hooks)
        if self._watch is not None:
            self._watch.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        self._members, self._active, self._live, self._undo, self._unstepped = {}, [], {}, [], {}
        model = self.model
        loading: dict[int, Any] = model._load_state_dict_pre_hooks
        for key in [key for key, wrapped in loading.items() if wrapped.hook == self._before_load]:
            del loading[key]
        model._modules.pop(CHILD, None)

    # -- inside --------------------------------------------------------------------------------------------------

    def forward(self, value: Any) -> Any:
        """The identity: on a ``Sequential`` an attachment is one more layer, which must do nothing."""
        return value

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {m.record.name}" for name, m in self._members.items())

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Called before each step of any optimizer, until each adapter has been stepped once; see `history`.

        Raises:
            AttachmentError: The optimizer has trained rows before, which are as a config started them.
        """
        for name, fresh in list(self._unstepped.items()):
            rows = self._rows(name)
            if not any(holds(optimizer, part.values) for part in rows):
                continue
            member = self._member(name)
            if fresh and any(has_history(optimizer, part.values) for part in rows):
                raw = self.adapter(name).raw
                if all(raw[o.tensor] == member.adapter.raw[o.tensor] for o in member.overrides):
                    raise AttachmentError(
                        "the optimizer has trained these rows before, but they are as they began", where=name,
                        expected="the rows that were trained with this optimizer's state",
                        found="a state dict was loaded, which is the base's and holds no rows",
                        hint="attachment.restore(embedsurgery.load(...)) after loading; with the Trainer "
                        "embedsurgery.integrations.EmbedSurgeryCallback() saves and restores them",
                    )  # fmt: skip
            del self._unstepped[name]
        return bool(self._unstepped)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._unstepped:
            look_at(self)

    def _before_load(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Before a state dict is loaded: what it holds is the base's, and must be of the same base."""
        if self._undo:
            return
        for member in self._members.values():
            check_loaded(self.graph, member.adapter, member.overrides, state_dict, prefix, model)
        if len(self._unstepped) < len(self._members) and not self.saved_beside:
            warnings.warn(
                "a state dict is the base's: loading one leaves the trained rows as they are; attachment.restore() "
                "sets them, and embedsurgery.integrations does it for the Trainer",
                EmbedSurgeryWarning,
                stacklevel=2,
            )

    def _add(
        self,
        name: str,
        adapter: Adapter,
        record: SurgeryRecord,
        *,
        freeze: nn.Module | None,
        materialize: bool,
        fresh: bool,
    ) -> None:
        """Put one more adapter on the model; everything that can fail comes before anything changes."""
        self._check_name(name)
        self._not_merged("attach another adapter")
        for other in self._members.values():
            if other.record.name not in record.shares_model_with:
                raise AttachmentError("these surgeries cannot share a model", expected="one of them",
                                      found=f"{record.name} and {other.record.name}")  # fmt: skip
        store = self._store()
        located = locate(adapter, store)
        surgery: Surgery = record.surgery
        overrides = surgery.live(adapter, located)
        modes = {o.table: self._site_modes(self.graph.table(o.table), o, materialize) for o in overrides}
        member = _Member(adapter, record, located, overrides)
        self._members[name] = member
        try:
            self._check_disjoint([*self._active, name])
        except AttachmentError:
            del self._members[name]
            raise
        device = {o.table: store.tensors[o.table].device for o in overrides}
        rows = [Rows(adapter.raw[o.tensor], o.indices, device[o.table]) for o in overrides]
        self.rows_of[_key(name)] = nn.ModuleList(rows)
        self._active.append(name)
        for override in overrides:
            self._install(self.graph.table(override.table), modes[override.table])
        self._unstepped[name] = fresh
        look_at(self)
        if freeze is not None:
            ours = {id(p) for p in self.parameters()}
            for parameter in freeze.parameters():
                if parameter.requires_grad and id(parameter) not in ours:
                    parameter.requires_grad_(False)
                    self._frozen.append(parameter)
        self._refresh()

    def _store(self) -> TensorStore:
        """The model's tables, in the dtypes that they have now: the model may have been cast since."""
        store = module_store(self.model, self.graph)
        tables = tuple(replace(t, dtype=dtype_string(store.tensors[t.name])) for t in self.graph.tables)
        store.graph = replace(self.graph, tables=tables)
        return store

    def _plan(self, name: str) -> Plan:
        member = self._member(name)
        return member.record.surgery.plan(self.adapter(name), member.located)

    def _rows(self, name: str) -> list[Rows]:
        rows = self.rows_of[_key(name)]
        assert isinstance(rows, nn.ModuleList)
        return [part for part in rows if isinstance(part, Rows)]

    def _name(self, name: str | None) -> str:
        if name is None:
            return next(iter(self._members)) if len(self._members) == 1 else "default"
        return name

    def _member(self, name: str) -> _Member:
        if name not in self._members:
            raise AttachmentError("no such adapter", where=name, found=", ".join(self._members) or "none attached")
        return self._members[name]

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigError("not a name for an adapter", expected="text without a dot", found=repr(name))
        if name in self._members:
            raise AttachmentError("an adapter of this name is attached already", where=name,
                                  found=", ".join(self._members), hint="give another name=, or remove it")  # fmt: skip

    def _not_merged(self, what: str) -> None:
        if self._undo:
            raise AttachmentError(f"cannot {what} while the rows are merged into the weights", hint="unmerge() first")

    def _check_disjoint(self, names: list[str] | tuple[str, ...]) -> None:
        taken: dict[str, dict[int, str]] = {}
        for name in names:
            for override in self._member(name).overrides:
                rows = taken.setdefault(override.table, {})
                twice = [i for i in override.indices if i in rows]
                if twice:
                    raise AttachmentError("two active adapters set the same rows", where=override.table,
                                          expected="disjoint rows", hint="activate one of them at a time",
                                          found=f"{rows[twice[0]]} and {name} both set {shorten(twice)}")  # fmt: skip
                rows.update(dict.fromkeys(override.indices, name))

    def _refresh(self) -> None:
        """Fill the lists that the hooks share with the rows that are live now."""
        for live in self._live.values():
            live.clear()
        if self._disabled or self._undo:
            return
        for name in self._active:
            for override, rows in zip(self._member(name).overrides, self._rows(name), strict=True):
                self._live[override.table].append(rows)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The rows that are live, named by adapter and table."""
        return [] if self._disabled or self._undo else [
            (f"{name}: {override.table}", rows.values)
            for name in self._active
            for override, rows in zip(self._member(name).overrides, self._rows(name), strict=True)
        ]  # fmt: skip

    def _started(self) -> Iterator[bytes]:
        """What the live rows were when they were attached."""
        for name in self._active:
            member = self._member(name)
            yield from (member.adapter.raw[override.tensor].data for override in member.overrides)

    def _site_modes(self, table: Table, override: RowOverride, materialize: bool) -> list[bool]:
        """For each site whether its rows can be overridden; errors come here, before anything changes."""
        modes = []
        used = {id(submodule(self.model, site.module)) for site in table.sites}
        if any(id(module) not in used for module, _, _ in holders(self.model, table.names, table.transposed)):
            materialize = True  # something that is no site holds the table, and reads it in a way of its own
        for site in table.sites:
            module = submodule(self.model, site.module)
            if getattr(module, "max_norm", None) is not None:
                raise UnsupportedError("a lookup with max_norm changes its own table in the forward", where=site.module,
                                       expected="max_norm=None", found=module.max_norm,
                                       hint="normalise the table once and set max_norm to None")  # fmt: skip
            weight = module._parameters[site.parameter]
            assert weight is not None
            rows = torch.tensor(override.indices, device=weight.device)
            modes.append(not materialize and can_override(module, site, rows))
        return modes

    def _install(self, table: Table, modes: list[bool]) -> None:
        """Hooks for a table's sites, once however many adapters have rows of it."""
        if table.name in self._live:
            return
        live = self._live.setdefault(table.name, [])
        hooks = self._site_hooks.setdefault(table.name, [])
        for path in dict.fromkeys(["", *(site.module for site in table.sites)]):
            before(self._guarded, submodule(self.model, path), self._guard)
        if not self._unchanged.sites:
            before(self._guarded, self.model, self._unchanged)
        self._unchanged.watch(self.model, table)
        if not any(modes):
            self._materialise(table)
            return
        done: set[int] = set()
        for site, can in zip(table.sites, modes, strict=True):
            module = submodule(self.model, site.module)
            if id(module) in done:
                continue
            done.add(id(module))
            if not can:
                whole = Materialised([(module, site.parameter, site.transposed)], live)
                before(hooks, module, whole.enter)
                after(hooks, module, whole.leave, always=True)
            elif site.role == "input":
                after(hooks, module, Lookup(module, site, live))
            else:
                after(hooks, module, Projection(module, site, live))
        if self._watch is None:
            self._watch = Watch(self.model, self.graph)
            before(self._hooks, self.model, self._begin)
            after(self._hooks, self.model, self._look)

    def _materialise(self, table: Table) -> Materialised:
        """Override a table by a full copy of it, for whatever part of the model reads it in whatever way."""
        hooks = self._site_hooks[table.name]
        remove(hooks)
        self._materialised.add(table.name)
        whole = Materialised(list(holders(self.model, table.names, table.transposed)), self._live[table.name])
        paths = {""}
        for name in table.names:
            parts = name.split(".")[:-1]
            paths.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
        modules = {id(m): m for m in (submodule(self.model, path) for path in sorted(paths))}
        for module in modules.values():
            before(hooks, module, whole.enter)
            after(hooks, module, whole.leave, always=True)
        return whole

    def _begin(self, *_: Any) -> None:
        if self._watch is not None and not torch.compiler.is_compiling():
            self._watch.forget()

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After a forward of the whole model: see whether every live table was used through its sites."""
        if self._watch is None or torch.compiler.is_compiling() or not any(self._live.values()):
            return output
        tables = [self.graph.table(n) for n, rows in self._live.items() if rows and n not in self._materialised]
        missed = self._watch.unreached(tables, args[0] if args else kwargs.get("input_ids"), output)
        if not missed:
            if self._watch.done(output):
                self._stop_watching()
            return output
        copies = [self._materialise(table) for table in missed]
        if len(self._materialised) == len(self._live):
            self._stop_watching()
        if kwargs.get("past_key_values") is not None:
            names = ", ".join(t.name for t in missed)
            raise UnsupportedError(
                "this model reads a table outside of its modules, which the first forward showed", where=names,
                hint="call again: from now on the rows are put into a full copy of the table in each forward",
            )  # fmt: skip
        with ExitStack() as stack:
            for whole in copies:
                stack.callback(whole.leave)
                whole.enter()
            return model.forward(*args, **kwargs)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        remove(self._hooks)


def _key(name: str) -> str:
    return f"adapter_{name}"


def find(model: nn.Module) -> Attachment | None:
    """The attachment of a model, also where the model is wrapped or a wrapper itself."""
    return next((module for module in model.modules() if isinstance(module, Attachment)), None)


def attach_adapter(
    model: nn.Module,
    adapter: Adapter,
    record: SurgeryRecord,
    *,
    graph: EmbeddingGraph,
    name: str = "default",
    freeze: nn.Module | None = None,
    materialize: bool = False,
    fresh: bool = False,
) -> Attachment:
    """Make an adapter live on a model; see `embedsurgery.attach`.

    Args:
        model: Its root: no wrapper of it.
        adapter: What to attach.
        record: Its surgery.
        graph: Of the model.
        name: The adapter's name.
        freeze: Freeze everything that is trainable here: the model, or a wrapper of it.
        materialize: See `embedsurgery.attach`.
        fresh: The adapter began from a config just now.
    """
    attachment = find(model)
    first = attachment is None
    if attachment is None:
        attachment = Attachment(model, graph)
    attachment._add(name, adapter, record, freeze=freeze, materialize=materialize, fresh=fresh)
    if first:
        model.add_module(CHILD, attachment)
        model.register_load_state_dict_pre_hook(attachment._before_load)  # type: ignore[no-untyped-call]
    return attachment
