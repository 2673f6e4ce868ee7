"""`Attachment`: which adapters are live on a model, and the operations on them.

``members.py`` has the adapters, ``rows/installation.py`` and ``prompts/installation.py`` the hooks that bring them into
a forward pass. What an adapter means is up to its surgery: this file only takes the overrides that it returns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.locate import locate
from embedsurgery.errors import AttachmentError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.classify import Classify
from embedsurgery.plan import Plan, Undo
from embedsurgery.runtime.calls import finish_before_interrupt, is_running_here
from embedsurgery.runtime.loading import (
    check_row_order,
    check_state_dict,
    match_rows,
    remove_state_dict_hooks,
    warn_rows_not_loaded,
)
from embedsurgery.runtime.members import Member, Members, is_prompt, warn_overflow
from embedsurgery.runtime.nesting import (
    find_parent_and_writer,
    refuse_part,
    refuse_tables_outside,
    register,
    unregister,
)
from embedsurgery.runtime.peft import PeftSwitch
from embedsurgery.runtime.prompts.installation import PromptHooks, modules_for
from embedsurgery.runtime.prompts.live import LivePrompts, PromptEmbedding
from embedsurgery.runtime.prompts.task_heads import with_current_heads
from embedsurgery.runtime.resume import is_restored_by_trainer, is_resuming
from embedsurgery.runtime.rows.installation import Installation
from embedsurgery.runtime.rows.mixing import per_sample_rows
from embedsurgery.runtime.rows.rows import UnsavedModule
from embedsurgery.runtime.rows.sharded import SyncGuard, adapters_on_any_rank, save_once, set_rows
from embedsurgery.runtime.save_warnings import refuse_state_dict_hash, warn_rows_not_saved
from embedsurgery.stores.apply import apply
from embedsurgery.stores.modules import module_store
from embedsurgery.surgeries.checked import call_live
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import SurgeryRecord

CHILD_NAME = "embedsurgery"
"""Name under which an attachment is registered on its model."""


class Attachment(UnsavedModule):
    """The adapters of one model. Made by `embedsurgery.attach`, returned by `embedsurgery.get_attachment`.

    It is a child module of the model, so that its rows are among the model's parameters and move with the model. They
    are not in the state dict.

    Attributes:
        extended: Undos of the tokens that adapters have added, each with its tokenizer.
    """

    def __init__(self, model: nn.Module, graph: EmbeddingGraph) -> None:
        super().__init__()
        self._saved_beside: bool | FrameType = False
        self.rows_of = nn.ModuleDict()
        self.graph = graph
        self._model = (model,)  # in a tuple, so that the parent is not registered as its own child's child
        self._members = Members()
        self._disabled = 0
        self._undo: list[Undo] = []
        self._frozen: list[nn.Parameter] = []
        self.extended: list[tuple[Undo, Any]] = []
        self._peft = PeftSwitch(model, self._members.named_rows, self._refresh)
        guards = (self._peft, SyncGuard(model, self._members.named_rows, self._members.initial_bytes))
        self._installation = Installation(model, graph, guards)
        self._prompts = LivePrompts(model, graph)
        self._prompt_hooks = PromptHooks(self._prompts, guards)

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The attached model."""
        return self._model[0]

    @property
    def saved_beside(self) -> bool:
        """Whether an integration saves the rows beside each state dict of the model, and restores them with it.

        If so, loading or saving a state dict gives no warning. Set to a frame, it holds while that frame runs in this
        thread, because interrupted training runs no callback that could reset it.
        """
        if isinstance(self._saved_beside, FrameType) and not is_running_here([self._saved_beside]):
            self._saved_beside = False
        return bool(self._saved_beside)

    @saved_beside.setter
    def saved_beside(self, value: bool | FrameType) -> None:
        self._saved_beside = value

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, in the order of attaching."""
        return tuple(self._members.all)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters."""
        return tuple(self._members.active)

    @property
    def merged(self) -> bool:
        """Whether the rows are currently merged into the model's weights."""
        return bool(self._undo)

    def activate(self, *names: str) -> None:
        """Make exactly these adapters live. Without names the model is the base.

        Raises:
            AttachmentError: No adapter has such a name, two set the same rows or are soft prompts, the model is merged,
                or inside `per_sample`.
            UnsupportedError: Inside `materialized`, an adapter that it does not support.
        """
        self._refuse_merged("activate()")
        self._refuse_per_sample("activate()")
        if any(not isinstance(name, str) for name in names):
            raise AttachmentError(
                "an adapter name must be a string",
                found=", ".join(map(repr, names)),
                expected='one argument per name: activate("a", "b")',
            )
        if len(set(names)) != len(names):
            raise AttachmentError("an adapter is named twice", found=", ".join(names))
        self._members.check_disjoint(names)
        before, self._members.active = self._members.active, list(names)
        try:
            self._refresh()
        except UnsupportedError:  # inside materialized()
            self._members.active = before
            self._refresh()
            raise

    def adapter(self, name: str | None = None) -> Adapter:
        """Return a snapshot of an adapter, which further training does not change.

        Sharded rows are gathered, (K, D) values each: call it on every rank.

        Args:
            name: The adapter; by default "default", or the only one.

        Raises:
            AttachmentError: No adapter has this name.
        """
        return with_current_heads(self._members[self._members.resolve_name(name)].snapshot(), self.model)

    def save(self, directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Save a snapshot of an adapter. Call it on every rank; rank 0 writes.

        Args:
            directory: The directory to write.
            name: The adapter; by default "default", or the only one.

        Returns:
            The directory.

        Raises:
            AttachmentError: No adapter has this name.
            AdapterError: The directory cannot be written, or the ranks hold different rows.
        """
        return save_once(self.adapter(name), directory)

    def save_pretrained(self, save_directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Save a snapshot of an adapter: `save` under the name of transformers and PEFT."""
        return self.save(save_directory, name)

    def restore(self, adapter: Adapter, name: str | None = None, *, in_order: bool = False) -> None:
        """Set an adapter's rows in place. The Parameters stay the same objects, so an optimizer keeps their state.

        Args:
            adapter: A saved adapter with the same rows of the same tables.
            name: The adapter to set; by default "default", or the only one.
            in_order: Also refuse the same rows in another order. An optimizer's state from the same checkpoint goes by
                their positions.

        Raises:
            AttachmentError: No adapter has this name, it has other rows or another surgery, or the model is merged.
            BaseMismatchError: The saved adapter was made from another base.
        """
        self._refuse_merged("restore()")
        name = self._members.resolve_name(name)
        member = self._members[name]
        if adapter.manifest.surgery != member.record.name:
            raise AttachmentError(
                "the adapter has another surgery",
                where=name,
                expected=member.record.name,
                found=adapter.manifest.surgery,
            )
        given = call_live(member.record.surgery, adapter, locate(adapter, self._installation.store()))
        values = match_rows(name, member.overrides, given, member.adapter, adapter)
        if in_order:
            check_row_order(name, member.overrides, given)
        with torch.no_grad():
            for (_, rows), new in zip(member.pairs(), values, strict=True):
                set_rows(self.model, rows, new)
        if name in self._members.unstepped:
            self._members.unstepped[name] = False

    def remove(self, name: str) -> None:
        """Remove an adapter. Removing the last one detaches the model.

        Raises:
            AttachmentError: No adapter has this name, the model is merged, or inside `per_sample`.
        """
        self._refuse_merged("remove()")
        self._refuse_per_sample("remove()")
        if self.names == (name,):
            self.detach()
            return
        self._members.drop(name)
        del self.rows_of[_module_name(name)]
        self._refresh()

    # -- training ------------------------------------------------------------------------------------------------

    def unfreeze(self) -> None:
        """Make all rows trainable again, for instance after `peft.get_peft_model`, which freezes them."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters of the model are trainable, in PEFT's format."""
        everything = {id(p): p for p in self.model.parameters()}
        trained = sum(p.numel() for p in everything.values() if p.requires_grad)
        total = sum(p.numel() for p in everything.values())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model the base inside the block.

        Raises:
            AttachmentError: The rows are merged into the weights.
        """
        self._refuse_merged("disabled()")
        try:
            self._disabled += 1
            self._refresh()
            yield
        finally:
            self._disabled -= 1
            self._refresh()

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """Let code outside of all forwards read ``module.weight`` with the live rows, and with their gradient.

        It is for a training loop that passes ``model.lm_head.weight`` to a fused loss. Reads inside a forward of the
        model need nothing. The first read after each step makes a (V, D) copy.

        Raises:
            AttachmentError: The rows are merged into the weights.
            UnsupportedError: A sharded table, a table that is overridden as a whole, or inside `per_sample`.
        """
        self._refuse_merged("materialized()")
        with self._installation.materialized():
            yield

    @contextmanager
    def per_sample(self, names: Sequence[str | None]) -> Iterator[None]:
        """Give each sample of the batch its own adapter. The result equals running each sample alone.

        With gradient checkpointing, run the backward inside the block, too, because it computes the checkpointed parts
        again. Ranks may name different adapters. If ``fully_shard`` shards the rows, all ranks must enter together to
        train, as they exchange the names; DistributedDataParallel needs ``find_unused_parameters=True``.

        Args:
            names: One adapter per sample, None for the base. The adapters may set the same rows. Without gradients a
                batch may hold each sample n times in succession, as generation repeats it for its beams.

        Raises:
            AttachmentError: No adapter has such a name, or the model is merged.
            UnsupportedError: A table is overridden by a full copy, which is the same for all samples; in a forward, the
                number of samples is not that of the names.
        """
        self._refuse_merged("per_sample()")
        if isinstance(names, str) or any(not isinstance(name, str) for name in names if name is not None):
            raise AttachmentError(
                "names must be a list of adapter names",
                found=repr(names),
                expected='one name, or None, per sample: ["a", None]',
            )
        if len(names) == 0:
            raise AttachmentError("names is empty", expected="one adapter name, or None, per sample", found="[]")
        given = dict.fromkeys(name for name in names if name is not None)
        _ = [self._members[name] for name in given]
        rows_by_name = {name: [rows for _, rows in member.pairs()] for name, member in self._members.all.items()}
        used = adapters_on_any_rank(self.model, given, rows_by_name)
        pairs = [(name, *pair) for name in used for pair in self._members[name].pairs()]
        tables = {override.table for _, override, _ in pairs if not isinstance(override, PromptOverride)}
        if tables & self._installation.copied_tables:
            raise UnsupportedError(
                "a batch cannot mix adapters in this table",
                where=", ".join(sorted(tables)),
                found="an override by a full copy",
                hint="run the samples of each adapter separately",
            )
        batch = self._installation.batch
        outside = (self._members.active, batch.mixed)
        try:
            self._members.active, batch.mixed = used, True
            self._refresh()
            with per_sample_rows([(name, rows) for name, _, rows in pairs], names):
                yield
        finally:
            self._members.active, batch.mixed = outside
            self._refresh()

    # -- merging -------------------------------------------------------------------------------------------------

    def merge(self) -> Undo:
        """Merge the active adapters into the model's weights, each row rounded once to its table's dtype.

        Returns:
            The undo. `unmerge` uses it; `embedsurgery.unmerge` takes it as well.

        Raises:
            AttachmentError: The model is merged, no adapter is active, or inside `per_sample` or `disabled`.
            UnsupportedError: A table cannot be written, for instance because it is sharded.
        """
        self._refuse_merged("merge()")
        self._refuse_per_sample("merge()")
        if self._disabled:
            raise AttachmentError(
                "not allowed inside attachment.disabled()", where="merge()", hint="leave the with-block first"
            )
        if not self.active:
            raise AttachmentError("no adapter is active", hint="activate one before merging")
        self._installation.check_unchanged()
        store, members = self._installation.store(), [self._members[name] for name in self.active]
        undo = apply(Plan(tuple(edit for member in members for edit in member.plan().edits)), store)
        self._undo.append(undo)
        self._refresh()
        warn_overflow(members, store, undo)
        return undo

    def unmerge(self) -> None:
        """Restore the model's weights bit for bit, and make the adapters live again.

        Raises:
            AttachmentError: The model is not merged.
        """
        if not self._undo:
            raise AttachmentError("the model is not merged", expected="merge() before unmerge()")
        apply(self._undo[-1], self._installation.store())
        try:
            self._undo.pop()
        finally:
            self._refresh()

    def detach(self) -> None:
        """Remove all adapters, make trainable again what they froze, and remove the tokens that they added.

        A merged model keeps the rows in its weights, and the tokens.

        Raises:
            AttachmentError: Inside `per_sample`.
        """
        self._refuse_per_sample("detach()")
        self._installation.remove()
        self._prompt_hooks.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        merged = bool(self._undo)
        self._members.clear()
        self.rows_of.clear()  # so that torch refuses an optimizer of these rows, which would train nothing
        self._undo = []
        model = self.model
        for module in list(model.modules()):
            remove_state_dict_hooks(module, self._before_load, self._before_save)
            if module._modules.get(CHILD_NAME) is self:
                module._modules.pop(CHILD_NAME)
        unregister(self)
        # Last, because a table is resized only while nothing of the attachment refers to it.
        while self.extended and not merged:
            undo, tokenizer = self.extended.pop()
            apply(undo, module_store(model, tokenizer=tokenizer))

    # -- inside --------------------------------------------------------------------------------------------------

    def forward(self, value: Any) -> Any:
        """Return the input: a ``Sequential`` runs an attachment that was added to it as one more layer."""
        return value

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {m.record.name}" for name, m in self._members.all.items())

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_saved_beside": self._saved_beside is True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A copy made inside `disabled` never leaves that block, so it starts as the base with no active adapter.
        if self._disabled:
            self._disabled, self._members.active, self._members.muted = 0, [], bool(self._undo)
        register(self)

    def _before_load(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Check a state dict before it is loaded: it holds no rows, and must be of the same base."""
        if self._undo:
            return
        for member in self._members.all.values():
            check_state_dict(self.graph, member.adapter, member.overrides, state_dict, prefix, model)
        if is_resuming():
            self._members.note_resume()
        if len(self._members.unstepped) < len(self.names) and not self.saved_beside and not is_restored_by_trainer():
            warn_rows_not_loaded()

    def _before_save(self, *_: Any) -> None:
        """Check who makes a state dict: it will hold no rows."""
        if self.active and not self._members.muted:
            refuse_state_dict_hash(self.active)
            if not self.saved_beside:
                warn_rows_not_saved(self.active)

    def _add(
        self,
        name: str,
        adapter: Adapter,
        record: SurgeryRecord,
        *,
        freeze: nn.Module | None,
        materialize: bool,
        fresh: bool,
        active: bool,
    ) -> None:
        """Add an adapter. All checks run before anything changes."""
        self._members.check_new(name, record)
        self._refuse_merged("attach()")
        self._refuse_per_sample("attach()")
        store = self._installation.store()
        located = locate(adapter, store)
        overrides = self._prompt_hooks.resolve_overrides(call_live(record.surgery, adapter, located), adapter)
        modes = self._installation.modes((o for o in overrides if not isinstance(o, PromptOverride)), materialize)
        devices = [store.tensors[o.table].device for o in overrides]
        rows = nn.ModuleList(modules_for(overrides, adapter.raw, devices))
        member = Member(adapter, record, located, overrides, rows)
        replaced = self._members.soft_prompts(self.active) if active and is_prompt(member) else []
        live = [other for other in self.active if other not in replaced]
        if active:
            self._members.check_disjoint([*live, name], member)
        before, frozen = self._members.active, len(self._frozen)
        try:
            self._members.active = live
            self._members.add(name, member, fresh=fresh, active=active)
            self.rows_of[_module_name(name)] = member.rows
            if is_prompt(member):
                self._prompt_hooks.install()
            for table, mode in modes.items():
                self._installation.install(self.graph.table(table), mode)
            if freeze is not None:
                self._freeze(freeze)
            self._refresh()
        except BaseException:  # including a KeyboardInterrupt
            self._roll_back(name, before, frozen)
            raise

    def _freeze(self, module: nn.Module) -> None:
        own = {id(p) for p in self.parameters()}
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in own:
                self._frozen.append(parameter)
                parameter.requires_grad_(False)

    def _roll_back(self, name: str, active: list[str], frozen: int) -> None:
        """Remove a partly added adapter.

        Args:
            name: Its name.
            active: The active adapters before.
            frozen: The number of parameters that were frozen before.
        """
        if name in self.names:
            self._members.drop(name)
        if _module_name(name) in self.rows_of:
            del self.rows_of[_module_name(name)]
        for parameter in self._frozen[frozen:]:
            parameter.requires_grad_(True)
        del self._frozen[frozen:]
        self._members.active = active
        self._refresh()

    def _refuse_merged(self, method: str) -> None:
        if self._undo:
            raise AttachmentError("the rows are merged into the weights", where=method, hint="unmerge() first")

    def _refuse_per_sample(self, method: str) -> None:
        if self._installation.batch.mixed:
            raise AttachmentError(
                "not allowed inside attachment.per_sample()", where=method, hint="leave the with-block first"
            )

    def _refresh(self) -> None:
        """Pass what is live on to the hooks. An interrupt half way would leave them with rows of two states."""
        finish_before_interrupt(self._pass_on_live)

    def _pass_on_live(self) -> None:
        self._members.muted = bool(self._disabled or self._undo)
        live = [] if self._peft.off else list(self._members.live())
        self._prompts.refresh((name, rows) for name, _, rows in live if isinstance(rows, PromptEmbedding))
        rows = ((override.table, rows) for _, override, rows in live if not isinstance(rows, PromptEmbedding))
        self._installation.refresh(rows)


def _module_name(name: str) -> str:
    return f"adapter_{name}"


def find_attachment(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model, or None. The model may be wrapped, or be a wrapper."""
    attachment = next((module for module in model.modules() if isinstance(module, Attachment)), None)
    if attachment is not None:
        attachment._installation.remove_leftovers()
    return attachment


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
    active: bool = True,
    given: nn.Module | None = None,
    classify: Classify | None = None,
) -> Attachment:
    """Make an adapter live on a model; see `embedsurgery.attach`.

    Args:
        model: The model, without wrappers.
        adapter: The adapter.
        record: Its surgery.
        graph: The model's graph.
        name: The adapter's name.
        freeze: The module whose trainable parameters are frozen: the model, or a wrapper of it.
        materialize: See `embedsurgery.attach`.
        fresh: Whether the adapter was started from a config for this call.
        active: Whether it becomes live at once.
        given: The module that the user passed: the model, or a wrapper of it.
        classify: Classifies modules of unknown classes.

    Returns:
        The model's attachment.

    Raises:
        AttachmentError: A part of the model, or a model around it, has an attachment; and as `embedsurgery.attach`.
    """
    attachment = find_attachment(model)
    is_first = attachment is None
    if attachment is None:
        refuse_part(model)
        attachment = Attachment(model, graph)
    else:
        refuse_tables_outside(given or freeze or model, attachment.model, classify)
    try:
        attachment._add(name, adapter, record, freeze=freeze, materialize=materialize, fresh=fresh, active=active)
        if is_first:
            parent, writer = find_parent_and_writer(model, graph)
            parent.add_module(CHILD_NAME, attachment)
            model.register_load_state_dict_pre_hook(attachment._before_load)  # type: ignore[no-untyped-call]
            for module in {id(m): m for m in (model, writer)}.values():
                module.register_state_dict_pre_hook(attachment._before_save)  # type: ignore[no-untyped-call]
            register(attachment)
    except BaseException:
        if is_first:
            attachment.detach()
        raise
    return attachment
