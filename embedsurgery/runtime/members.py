"""The adapters that are on a model: as they were attached, what they override there, their rows, and which are live."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError, ConfigError, EmbedSurgeryWarning
from embedsurgery.graph import Table
from embedsurgery.plan import Plan, Undo
from embedsurgery.runtime.resume import has_history, holds, look_at, makes_state_only
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.whole_tables import overflown
from embedsurgery.stores.store import shorten
from embedsurgery.stores.tensor_store import TensorStore
from embedsurgery.surgeries.checked import planned
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import RowOverride, SurgeryRecord
from embedsurgery.surgeries.whole_tables import TableOverride
from embedsurgery.tensors.convert import to_raw
from embedsurgery.tensors.sharded import whole


@dataclass(frozen=True)
class Member:
    """One of an attachment's adapters.

    Attributes:
        adapter: As it was attached.
        record: Its surgery.
        located: Table record's name -> table of the model.
        overrides: What its surgery overrides.
        rows: The trainable rows of each override, in their order.
    """

    adapter: Adapter
    record: SurgeryRecord
    located: Mapping[str, Table]
    overrides: tuple[RowOverride, ...]
    rows: nn.ModuleList

    def pairs(self) -> Iterator[tuple[RowOverride, Rows]]:
        """Each override with its rows."""
        for override, rows in zip(self.overrides, self.rows, strict=True):
            assert isinstance(rows, Rows)
            yield override, rows

    def snapshot(self) -> Adapter:
        """The adapter with its rows as they are now."""
        raw = dict(self.adapter.raw)
        raw.update({override.tensor: to_raw(rows.values) for override, rows in self.pairs()})
        return replace(self.adapter, raw=raw)

    def plan(self) -> Plan:
        """What bakes it in as it is now."""
        return planned(self.record.surgery, self.snapshot(), self.located)

    def is_as_it_began(self) -> bool:
        """Whether no row has changed since it was attached."""
        raw = self.snapshot().raw
        return all(raw[override.tensor] == self.adapter.raw[override.tensor] for override in self.overrides)


def is_prompt(member: Member) -> bool:
    """Whether an adapter is a soft prompt."""
    return any(isinstance(override, PromptOverride) for override in member.overrides)


class Members:
    """The adapters of one attachment, by name.

    Attributes:
        all: Every adapter, in the order of attaching.
        active: Names of those that are to be live.
        muted: Whether none is live just now.
        unstepped: Adapter that no optimizer here has stepped -> whether it began from a config.
        resumed: Those of them that were there when a library loaded a state dict to go on with training.
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

    def default(self, name: str | None) -> str:
        """The name that is meant where none is given."""
        if name is None:
            return next(iter(self.all)) if len(self.all) == 1 else "default"
        return name

    def check_new(self, name: str, record: SurgeryRecord) -> None:
        """Refuse a name, or a surgery that cannot share a model with those that are there.

        Raises:
            ConfigError: No name.
            AttachmentError: The name is taken, or the surgeries do not go together.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigError("not a name for an adapter", expected="text without a dot", found=repr(name))
        if name in self.all:
            raise AttachmentError(
                "an adapter of this name is attached already",
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
        """Refuse adapters that are to be live together and set the same rows.

        Args:
            names: Of the adapters.
            new: The last one, where it is not here yet.

        Raises:
            AttachmentError: It lists the rows; or two of them are soft prompts.
        """
        prompts = [*self.prompts(names), *names[-1:]] if new is not None and is_prompt(new) else self.prompts(names)
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
                        hint="activate one of them at a time; before attaching another one, activate() takes all off",
                        found=f"{rows[twice[0]]} and {name} both set {shorten(twice)}",
                    )
                rows.update(dict.fromkeys(indices, name))

    def prompts(self, names: Iterable[str]) -> list[str]:
        """Those of some adapters that are here and are soft prompts."""
        return [name for name in names if name in self.all and is_prompt(self.all[name])]

    def add(self, name: str, member: Member, *, fresh: bool, active: bool) -> None:
        """Put one in."""
        self.all[name] = member
        if active:
            self.active = [*self.active, name]
        self.unstepped[name] = fresh
        look_at(self)

    def drop(self, name: str) -> None:
        """Take one out.

        Raises:
            AttachmentError: There is none of this name.
        """
        _ = self[name]
        del self.all[name]
        self.active = [other for other in self.active if other != name]
        self.unstepped.pop(name, None)

    def clear(self) -> None:
        """Take all out."""
        for name in list(self.all):
            self.drop(name)

    def live(self) -> Iterator[tuple[str, RowOverride, Rows]]:
        """What is live now: adapter's name, what it overrides, and with which rows."""
        for name in () if self.muted else self.active:
            for override, rows in self.all[name].pairs():
                yield name, override, rows

    def named(self) -> list[tuple[str, Rows]]:
        """The rows that are live, named by adapter and table."""
        return [(f"{name}: {override.table}", rows) for name, override, rows in self.live()]

    def begun(self) -> Iterator[bytes]:
        """What the active rows were when they were attached."""
        for name in self.active:
            member = self.all[name]
            yield from (member.adapter.raw[override.tensor].data for override in member.overrides)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.unstepped:
            look_at(self)

    def note_resume(self) -> None:
        """A library that resumes training loads a state dict, which holds no rows."""
        self.resumed = frozenset(self.unstepped)

    def before_step(self, optimizer: torch.optim.Optimizer, closure: bool) -> bool:
        """See `history`: refuses a forgotten resume, and returns whether there are rows that were never stepped.

        Raises:
            AttachmentError: The optimizer has trained rows before, which are as a config started them.
        """
        for name, fresh in list(self.unstepped.items()):
            member = self.all[name]
            rows = [part.values for _, part in member.pairs()]
            if not any(holds(optimizer, values, closure) for values in rows):
                continue
            if all(makes_state_only(optimizer, values) for values in rows):
                continue
            trained = any(has_history(optimizer, values) for values in rows)
            if fresh and (trained or name in self.resumed) and member.is_as_it_began():
                raise AttachmentError(
                    "the optimizer has trained these rows before, but they are as they began"
                    if trained
                    else "training is resumed, but these rows are as they began",
                    where=name,
                    expected="the rows that were trained before the checkpoint was saved",
                    found="a state dict was loaded, which is the base's and holds no rows",
                    hint="attachment.restore(embedsurgery.load(...)) after loading; with the Trainer "
                    "embedsurgery.integrations.EmbedSurgeryCallback() saves and restores them",
                )
            del self.unstepped[name]
        return bool(self.unstepped)


def say_what_overflows(members: Iterable[Member], store: TensorStore, undo: Undo) -> None:
    """Warn of rows that are numbers, and infinite once they are rounded to their table's dtype.

    Args:
        members: Whose rows were merged.
        store: Where to.
        undo: Of the merge.
    """
    dtypes = {name: tensor.dtype for name, tensor in store.tensors.items()}
    found = [f"{table} ({dtypes[table]}), rows {shorten(lost)}" for table, lost in overflown(undo, store)]
    for override, rows in (pair for member in members for pair in member.pairs()):
        if isinstance(override, TableOverride):
            continue
        values = whole(rows.values.detach())
        lost = values.isfinite() & ~values.to(dtypes[override.table]).isfinite()
        if places := lost.any(dim=1).nonzero().flatten().tolist():
            indices = [override.indices[place] for place in places]
            found.append(f"{override.table} ({dtypes[override.table]}), rows {shorten(indices)}")
    if found:
        warnings.warn(
            f"trained values that their table's dtype cannot hold are infinite now: {'; '.join(found)}; "
            "unmerge() takes them out again",
            EmbedSurgeryWarning,
            stacklevel=3,
        )
