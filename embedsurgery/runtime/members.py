"""The adapters of one attachment: their overrides, their trainable rows, and which are active.

`Attachment` is what a user calls; `resume.py` has the checks of an optimizer that `Members.check_step` combines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError, ConfigError, warn
from embedsurgery.graph import Table
from embedsurgery.plan import Plan, Undo
from embedsurgery.runtime.resume import check_steps, has_history, only_creates_state, will_step
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.whole_tables import find_overflow
from embedsurgery.stores.store import shorten
from embedsurgery.stores.tensor_store import TensorStore
from embedsurgery.surgeries.checked import call_plan
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import RowOverride, SurgeryRecord
from embedsurgery.surgeries.whole_tables import TableOverride
from embedsurgery.tensors.convert import to_raw
from embedsurgery.tensors.sharded import gather


@dataclass(frozen=True)
class Member:
    """One adapter of an attachment.

    Attributes:
        adapter: The adapter when it was attached.
        record: Its surgery.
        located: Table record's name -> table of the model.
        overrides: Its overrides, from its surgery.
        rows: The trainable rows of each override, in the same order.
    """

    adapter: Adapter
    record: SurgeryRecord
    located: Mapping[str, Table]
    overrides: tuple[RowOverride, ...]
    rows: nn.ModuleList

    def pairs(self) -> Iterator[tuple[RowOverride, Rows]]:
        """Yield each override with its rows."""
        for override, rows in zip(self.overrides, self.rows, strict=True):
            assert isinstance(rows, Rows)
            yield override, rows

    def snapshot(self) -> Adapter:
        """Return the adapter with the current values of its rows."""
        raw = dict(self.adapter.raw)
        raw.update({override.tensor: to_raw(rows.values) for override, rows in self.pairs()})
        return replace(self.adapter, raw=raw)

    def plan(self) -> Plan:
        """Return the plan that bakes the current rows into the model."""
        return call_plan(self.record.surgery, self.snapshot(), self.located)

    def is_unchanged(self) -> bool:
        """Whether all rows have the values that they had when the adapter was attached."""
        raw = self.snapshot().raw
        return all(raw[override.tensor] == self.adapter.raw[override.tensor] for override in self.overrides)


def is_prompt(member: Member) -> bool:
    """Whether an adapter is a soft prompt."""
    return any(isinstance(override, PromptOverride) for override in member.overrides)


class Members:
    """The adapters of one attachment, by name.

    Attributes:
        all: Every adapter, in the order of attaching.
        active: Names of the active adapters.
        muted: Whether the active adapters are currently not live, because they are disabled or merged.
        unstepped: Name of an adapter whose rows no optimizer has stepped -> whether it was started from a config.
        resumed: Adapters that were unstepped when a library loaded a state dict to resume training.
    """

    def __init__(self) -> None:
        self.all: dict[str, Member] = {}
        self.active: list[str] = []
        self.muted = False
        self.unstepped: dict[str, bool] = {}
        self.resumed: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Member:
        if name not in self.all:
            raise AttachmentError(
                "no such adapter",
                where=name,
                found=", ".join(self.all) or "none attached",
                hint="name one of them" if self.all else None,
            )
        return self.all[name]

    def resolve_name(self, name: str | None) -> str:
        """Return the name, or the default if it is None: the only adapter's, or "default"."""
        if name is None:
            return next(iter(self.all)) if len(self.all) == 1 else "default"
        return name

    def check_new(self, name: str, record: SurgeryRecord) -> None:
        """Check that an adapter can be attached beside the others.

        Raises:
            ConfigError: The name is empty, has a dot or is not a string.
            AttachmentError: The name is taken, or the surgeries cannot share a model.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigError("invalid adapter name", expected="a non-empty string without a dot", found=repr(name))
        if name in self.all:
            raise AttachmentError(
                "an adapter with this name is already attached",
                where=name,
                found=", ".join(self.all),
                hint="give another name=, or remove it",
            )
        for other in self.all.values():
            if other.record.name not in record.shares_model_with:
                raise AttachmentError(
                    "these surgeries cannot share a model",
                    expected="one of them",
                    found=f"{record.name} and {other.record.name}",
                )

    def check_disjoint(self, names: Sequence[str], new: Member | None = None) -> None:
        """Check that adapters can be live together: disjoint rows, and at most one soft prompt.

        Args:
            names: Names of the adapters.
            new: The adapter of the last name, if it is not attached yet.

        Raises:
            AttachmentError: Two adapters set the same rows, or two are soft prompts.
        """
        prompts = self.soft_prompts(names)
        if new is not None and is_prompt(new):
            prompts += names[-1:]
        if len(prompts) > 1:
            raise AttachmentError(
                "two soft prompts cannot be live at once",
                found=" and ".join(prompts),
                expected="one",
                hint="activate one at a time, or give each sample its own: with attachment.per_sample([...])",
            )
        taken: dict[str, dict[int, str]] = {}
        for name in names:
            for override in (self[name] if new is None or name != names[-1] else new).overrides:
                rows = taken.setdefault(override.table, {})
                indices = range(override.rows) if isinstance(override, TableOverride) else override.indices
                twice = [i for i in indices if i in rows]
                if twice:
                    raise AttachmentError(
                        "two active adapters set the same rows",
                        where=override.table,
                        expected="disjoint rows",
                        hint="activate one of them at a time; activate() without names deactivates all",
                        found=f"{rows[twice[0]]} and {name} both set {shorten(twice)}",
                    )
                rows.update(dict.fromkeys(indices, name))

    def soft_prompts(self, names: Iterable[str]) -> list[str]:
        """Return the names of the attached soft prompts among some names."""
        return [name for name in names if name in self.all and is_prompt(self.all[name])]

    def add(self, name: str, member: Member, *, fresh: bool, active: bool) -> None:
        """Add an adapter.

        Args:
            name: Its name, which `check_new` has accepted.
            member: The adapter.
            fresh: Whether it was started from a config.
            active: Whether it becomes active.
        """
        self.all[name] = member
        if active:
            self.active = [*self.active, name]
        self.unstepped[name] = fresh
        check_steps(self)

    def drop(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            AttachmentError: No adapter has this name.
        """
        _ = self[name]
        del self.all[name]
        self.active = [other for other in self.active if other != name]
        self.unstepped.pop(name, None)

    def clear(self) -> None:
        """Remove all adapters."""
        for name in list(self.all):
            self.drop(name)

    def live(self) -> Iterator[tuple[str, RowOverride, Rows]]:
        """Yield what is live: an adapter's name, one of its overrides, and the override's rows."""
        for name in () if self.muted else self.active:
            for override, rows in self.all[name].pairs():
                yield name, override, rows

    def named_rows(self) -> list[tuple[str, Rows]]:
        """Return the live rows, each with its adapter and table as a name for messages."""
        return [(f"{name}: {override.table}", rows) for name, override, rows in self.live()]

    def initial_bytes(self) -> Iterator[bytes]:
        """Yield the bytes that the active rows had when they were attached."""
        for name in self.active:
            member = self.all[name]
            yield from (member.adapter.raw[override.tensor].data for override in member.overrides)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.unstepped:
            check_steps(self)

    def note_resume(self) -> None:
        """Note that a library that resumes training loads a state dict, which holds no rows."""
        self.resumed = frozenset(self.unstepped)

    def check_step(self, optimizer: torch.optim.Optimizer, closure: bool) -> bool:
        """Refuse to step rows that a resume has not restored.

        Args:
            optimizer: The optimizer, before its step.
            closure: Whether the step gets a closure that computes the gradients.

        Returns:
            Whether there are rows left that no optimizer has stepped.

        Raises:
            AttachmentError: The optimizer has trained the rows before, or training was resumed, but they have the
                initial values of a config.
        """
        for name, fresh in list(self.unstepped.items()):
            member = self.all[name]
            values = [rows.values for _, rows in member.pairs()]
            if not any(will_step(optimizer, one, closure) for one in values):
                continue
            if all(only_creates_state(optimizer, one) for one in values):
                continue
            trained = any(has_history(optimizer, one) for one in values)
            if fresh and (trained or name in self.resumed) and member.is_unchanged():
                raise AttachmentError(
                    "the optimizer has trained these rows before, but they have their initial values"
                    if trained
                    else "training resumes, but these rows have their initial values",
                    where=name,
                    expected="the rows of the checkpoint",
                    found="initial rows, and an optimizer with their moments"
                    if trained
                    else "initial rows, after a state dict was loaded that holds the base only",
                    hint="call attachment.restore(embedsurgery.load(...)) after loading; with the Trainer, "
                    "embedsurgery.integrations.EmbedSurgeryCallback() saves and restores them",
                )
            del self.unstepped[name]
        return bool(self.unstepped)


def warn_overflow(members: Iterable[Member], store: TensorStore, undo: Undo) -> None:
    """Warn of finite rows that became infinite when a merge rounded them to their table's dtype.

    Args:
        members: The merged adapters.
        store: The store that they were merged into.
        undo: The undo of the merge.
    """
    dtypes = {name: tensor.dtype for name, tensor in store.tensors.items()}
    found = [f"{table} ({dtypes[table]}), rows {shorten(lost)}" for table, lost in find_overflow(undo, store)]
    for override, rows in (pair for member in members for pair in member.pairs()):
        if isinstance(override, TableOverride):
            continue
        values = gather(rows.values.detach())
        lost = values.isfinite() & ~values.to(dtypes[override.table]).isfinite()
        if places := lost.any(dim=1).nonzero().flatten().tolist():
            indices = [override.indices[place] for place in places]
            found.append(f"{override.table} ({dtypes[override.table]}), rows {shorten(indices)}")
    if found:
        warn(
            f"trained values overflow their table's dtype and are now infinite: {'; '.join(found)}; "
            "unmerge() removes them"
        )
