"""The attachment: which adapters are live on a model, and what may be done with them.

How rows reach a forward pass is ``installation.py``'s. What an adapter means is its surgery's: this file only takes the
overrides that the surgery returns.
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
from embedsurgery.runtime.calls import run_here, to_the_end
from embedsurgery.runtime.loading import check_loaded, check_order, look_no_more, replacements, say_that_rows_stay
from embedsurgery.runtime.members import Member, Members, is_prompt, say_what_overflows
from embedsurgery.runtime.nesting import forget, places, refuse_more, refuse_part, remember
from embedsurgery.runtime.peft import Switch
from embedsurgery.runtime.prompts.installation import PromptHooks, modules_for
from embedsurgery.runtime.prompts.live import LivePrompts, PromptEmbedding
from embedsurgery.runtime.prompts.task_heads import with_heads
from embedsurgery.runtime.resume import is_restored, is_resume
from embedsurgery.runtime.rows.installation import Installation
from embedsurgery.runtime.rows.mixing import each_its_own
from embedsurgery.runtime.rows.rows import Hidden
from embedsurgery.runtime.rows.sharded import Guard, named_on_any_rank, save_once, set_rows
from embedsurgery.runtime.save_warnings import refuse_to_be_hashed, say_that_no_rows_are_saved
from embedsurgery.stores.apply import apply
from embedsurgery.stores.modules import module_store
from embedsurgery.surgeries.checked import overrides_of
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import SurgeryRecord

CHILD = "embedsurgery"
"""Name under which an attachment is registered on its model."""


class Attachment(Hidden):
    """The adapters of one model. Made by `embedsurgery.attach`, found again by `embedsurgery.get_attachment`.

    A child module of the model, so that its rows are among the model's parameters and move with it; it stays out of
    the state dict.

    Attributes:
        extended: What takes out the tokens that attaching an adapter brought, each with the tokenizer.
    """

    def __init__(self, model: nn.Module, graph: EmbeddingGraph) -> None:
        super().__init__()
        self._beside: bool | FrameType = False
        self.rows_of = nn.ModuleDict()
        self.graph = graph
        self._model = (model,)  # in a tuple, so that the parent is not registered as its own child's child
        self._members = Members()
        self._disabled = 0
        self._undo: list[Undo] = []
        self._frozen: list[nn.Parameter] = []
        self.extended: list[tuple[Undo, Any]] = []
        self._switch = Switch(model, self._members.named, self._refresh)
        guards = (self._switch, Guard(model, self._members.named, self._members.begun))
        self._installation = Installation(model, graph, guards)
        self._prompts = LivePrompts(model, graph)
        self._prompt_hooks = PromptHooks(self._prompts, guards)

    # -- what is on the model ------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model that this is attached to."""
        return self._model[0]

    @property
    def saved_beside(self) -> bool:
        """Whether something saves the rows beside each state dict of the model and restores them with it.

        So do the integrations, and loading a state dict alone is no matter then. Set to a frame, it holds for as long
        as that runs, in its own thread: a training may be interrupted without a word.
        """
        if isinstance(self._beside, FrameType) and not run_here([self._beside]):
            self._beside = False
        return bool(self._beside)

    @saved_beside.setter
    def saved_beside(self, value: bool | FrameType) -> None:
        self._beside = value

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter, in the order of attaching."""
        return tuple(self._members.all)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that are live."""
        return tuple(self._members.active)

    @property
    def merged(self) -> bool:
        """Whether the rows lie in the model's own weights just now."""
        return bool(self._undo)

    def activate(self, *names: str) -> None:
        """Make exactly these adapters live; none makes the model the base's.

        Raises:
            AttachmentError: A name that is not attached, rows of a table in two of the adapters, two soft prompts, or
                a merged model; or inside `per_sample`.
            UnsupportedError: Inside `materialized`, an adapter that this cannot show.
        """
        self._not_merged("activate adapters")
        self._not_mixed("activate adapters")
        if any(not isinstance(name, str) for name in names):
            raise AttachmentError(
                "not an adapter's name",
                found=", ".join(map(repr, names)),
                expected='names one by one: activate("a", "b")',
            )
        if len(set(names)) != len(names):
            raise AttachmentError("an adapter is named twice", found=", ".join(names))
        self._members.check_disjoint(names)
        before, self._members.active = self._members.active, list(names)
        try:
            self._refresh()
        except UnsupportedError:  # what materialized() cannot show
            self._members.active = before
            self._refresh()
            raise

    def adapter(self, name: str | None = None) -> Adapter:
        """A snapshot of an adapter's rows as they are now; further training does not change it.

        Where the rows are sharded they are gathered, (K, D) and nothing else: every rank calls it.

        Args:
            name: By default "default", or the only one there is.

        Raises:
            AttachmentError: There is none of this name.
        """
        return with_heads(self._members[self._members.default(name)].snapshot(), self.model)

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

    def save_pretrained(self, save_directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write a snapshot of an adapter, under the name that transformers and PEFT have for it: see `save`."""
        return self.save(save_directory, name)

    def restore(self, adapter: Adapter, name: str | None = None, *, in_order: bool = False) -> None:
        """Set an adapter's rows in place: the Parameters stay the same objects, so an optimizer's state stays theirs.

        Args:
            adapter: What was saved of it, with the same rows of the same tables.
            name: Which one to set; by default "default", or the only one there is.
            in_order: Refuse the same rows in another order, too: an optimizer's state, where it comes from the same
                checkpoint, goes by their positions.

        Raises:
            AttachmentError: There is none of this name, its rows are others, or the model is merged.
            BaseMismatchError: It was made from another base.
        """
        self._not_merged("restore rows")
        name = self._members.default(name)
        member = self._members[name]
        if adapter.manifest.surgery != member.record.name:
            raise AttachmentError(
                "the adapter is of another surgery",
                where=name,
                expected=member.record.name,
                found=adapter.manifest.surgery,
            )
        theirs = overrides_of(member.record.surgery, adapter, locate(adapter, self._installation.store()))
        values = replacements(name, member.overrides, theirs, member.adapter, adapter)
        if in_order:
            check_order(name, member.overrides, theirs)
        with torch.no_grad():
            for (_, rows), new in zip(member.pairs(), values, strict=True):
                set_rows(self.model, rows, new)
        if name in self._members.unstepped:
            self._members.unstepped[name] = False

    def remove(self, name: str) -> None:
        """Take an adapter off; the last one detaches the model.

        Raises:
            AttachmentError: There is none of this name, the model is merged, or inside `per_sample`.
        """
        self._not_merged("remove an adapter")
        self._not_mixed("remove an adapter")
        if self.names == (name,):
            self.detach()
            return
        self._members.drop(name)
        del self.rows_of[_key(name)]
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
        try:
            self._disabled += 1
            self._refresh()
            yield
        finally:
            self._disabled -= 1
            self._refresh()

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """Inside, code outside of every forward reads ``module.weight`` with the live rows, and their gradient.

        For a loop that gives ``model.lm_head.weight`` to a fused loss by itself: in a forward of the model a weight
        is seen to be read, and needs nothing. Each read after a step makes a (V, D) copy.

        Raises:
            AttachmentError: The rows are merged, and so are in the weights.
            UnsupportedError: A table in pieces, one that is changed as a whole, or a batch that mixes adapters.
        """
        self._not_merged("materialise rows")
        with self._installation.shown():
            yield

    @contextmanager
    def per_sample(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, each sample of the batch has an adapter of its own: equal to running each sample alone.

        Where parts that hold the table are checkpointed, the backward, which computes them again, belongs inside too.
        Ranks may name other adapters each. Where ``fully_shard`` has the rows all ranks enter together to train, and
        the ranks tell each other the names; under DistributedDataParallel ``find_unused_parameters=True`` is needed.

        Args:
            names: One adapter for each sample, None for the base. Adapters may set the same rows here. Without
                gradients a batch may hold each sample n times together, as generation has it for its beams.

        Raises:
            AttachmentError: A name that is not attached, or a merged model.
            UnsupportedError: A table that is overridden by a full copy, which is the same for all samples; and in a
                forward of another number of samples than there are names.
        """
        self._not_merged("mix adapters")
        if isinstance(names, str) or any(not isinstance(name, str) for name in names if name is not None):
            raise AttachmentError(
                "not a list of adapters' names",
                found=repr(names),
                expected='one name, or None, for each sample: ["a", None]',
            )
        if len(names) == 0:
            raise AttachmentError("no sample is named", expected="one adapter name, or None, for each sample")
        here = dict.fromkeys(name for name in names if name is not None)
        _ = [self._members[name] for name in here]
        every = {name: [rows for _, rows in member.pairs()] for name, member in self._members.all.items()}
        used = named_on_any_rank(self.model, here, every)
        pairs = [(name, *pair) for name in used for pair in self._members[name].pairs()]
        tables = {override.table for _, override, _ in pairs if not isinstance(override, PromptOverride)}
        if tables & self._installation.copied:
            raise UnsupportedError(
                "a batch cannot mix adapters here",
                where=", ".join(sorted(tables)),
                found="a table that is overridden by a full copy of it",
                hint="run the samples of each adapter by themselves",
            )
        batch = self._installation.batch
        outside = (self._members.active, batch.mixed)
        try:
            self._members.active, batch.mixed = used, True
            self._refresh()
            with each_its_own([(name, rows) for name, _, rows in pairs], names):
                yield
        finally:
            self._members.active, batch.mixed = outside
            self._refresh()

    # -- merging -------------------------------------------------------------------------------------------------

    def merge(self) -> Undo:
        """Write the live adapters' rows into the model's weights, each rounded once to the table's dtype.

        Returns:
            The undo, which `unmerge` uses, and which `embedsurgery.unmerge` takes as well.

        Raises:
            AttachmentError: Merged already, no adapter is live, or inside `per_sample` or `disabled`.
            UnsupportedError: A table whose rows cannot be written, for instance one that is sharded.
        """
        self._not_merged("merge")
        self._not_mixed("merge")
        if self._disabled:
            raise AttachmentError("cannot merge inside attachment.disabled()", hint="leave the with-block first")
        if not self.active:
            raise AttachmentError("no adapter is active", hint="activate one before merging")
        self._installation.check_unchanged()
        store, members = self._installation.store(), [self._members[name] for name in self.active]
        undo = apply(Plan(tuple(edit for member in members for edit in member.plan().edits)), store)
        self._undo.append(undo)
        self._refresh()
        say_what_overflows(members, store, undo)
        return undo

    def unmerge(self) -> None:
        """Put the model's weights back bit for bit, and make the adapters live again.

        Raises:
            AttachmentError: Not merged.
        """
        if not self._undo:
            raise AttachmentError("the model is not merged", hint="merge() comes first")
        apply(self._undo[-1], self._installation.store())
        try:
            self._undo.pop()
        finally:
            self._refresh()

    def detach(self) -> None:
        """Take every adapter off and restore what was trainable, and take out the tokens that an adapter brought.

        A merged model keeps the rows in its weights, and the tokens.

        Raises:
            AttachmentError: Inside `rows`.
        """
        self._not_mixed("detach")
        self._installation.remove()
        self._prompt_hooks.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        merged = bool(self._undo)
        self._members.clear()
        self.rows_of.clear()  # so that an optimizer of them is refused by torch, not left without effect
        self._undo = []
        model = self.model
        for module in list(model.modules()):
            look_no_more(module, self._before_load, self._before_save)
            if module._modules.get(CHILD) is self:
                module._modules.pop(CHILD)
        forget(self)
        while self.extended and not merged:  # when nothing of the attachment holds a table any more
            undo, tokenizer = self.extended.pop()
            apply(undo, module_store(model, tokenizer=tokenizer))

    # -- inside --------------------------------------------------------------------------------------------------

    def forward(self, value: Any) -> Any:
        """The identity: on a ``Sequential`` an attachment is one more layer, which must do nothing."""
        return value

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {m.record.name}" for name, m in self._members.all.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_beside": self._beside is True}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._disabled:  # the copy leaves no with-block: it is the base until something is activated
            self._disabled, self._members.active, self._members.muted = 0, [], bool(self._undo)
        remember(self)

    def _before_load(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Before a state dict is loaded: what it holds is the base's, and must be of the same base."""
        if self._undo:
            return
        for member in self._members.all.values():
            check_loaded(self.graph, member.adapter, member.overrides, state_dict, prefix, model)
        if is_resume():
            self._members.note_resume()
        if len(self._members.unstepped) < len(self.names) and not self.saved_beside and not is_restored():
            say_that_rows_stay()

    def _before_save(self, *_: Any) -> None:
        """Before a state dict is made: it will hold no rows."""
        if self.active and not self._members.muted:
            refuse_to_be_hashed(self.active)
            if not self.saved_beside:
                say_that_no_rows_are_saved(self.active)

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
        """Put one more adapter on the model; everything that can fail comes before anything changes."""
        self._members.check_new(name, record)
        self._not_merged("attach another adapter")
        self._not_mixed("attach another adapter")
        store = self._installation.store()
        located = locate(adapter, store)
        overrides = self._prompt_hooks.checked(overrides_of(record.surgery, adapter, located), adapter)
        modes = self._installation.modes((o for o in overrides if not isinstance(o, PromptOverride)), materialize)
        devices = [store.tensors[o.table].device for o in overrides]
        rows = nn.ModuleList(modules_for(overrides, adapter.raw, devices))
        member = Member(adapter, record, located, overrides, rows)
        steps_back = self._members.prompts(self.active) if active and is_prompt(member) else []
        live = [other for other in self.active if other not in steps_back]
        if active:
            self._members.check_disjoint([*live, name], member)
        before, trained = self._members.active, len(self._frozen)
        try:
            self._members.active = live
            self._members.add(name, member, fresh=fresh, active=active)
            self.rows_of[_key(name)] = member.rows
            if is_prompt(member):
                self._prompt_hooks.install()
            for table, mode in modes.items():
                self._installation.install(self.graph.table(table), mode)
            if freeze is not None:
                self._freeze(freeze)
            self._refresh()
        except BaseException:  # a KeyboardInterrupt
            self._take_back(name, before, trained)
            raise

    def _freeze(self, module: nn.Module) -> None:
        ours = {id(p) for p in self.parameters()}
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in ours:
                self._frozen.append(parameter)
                parameter.requires_grad_(False)

    def _take_back(self, name: str, active: list[str], trained: int) -> None:
        """Leave nothing of an adapter that was not put on to the end; arguments are what stood before."""
        if name in self.names:
            self._members.drop(name)
        if _key(name) in self.rows_of:
            del self.rows_of[_key(name)]
        for parameter in self._frozen[trained:]:
            parameter.requires_grad_(True)
        del self._frozen[trained:]
        self._members.active = active
        self._refresh()

    def _not_merged(self, what: str) -> None:
        if self._undo:
            raise AttachmentError(f"cannot {what} while the rows are merged into the weights", hint="unmerge() first")

    def _not_mixed(self, what: str) -> None:
        if self._installation.batch.mixed:
            raise AttachmentError(f"cannot {what} inside attachment.per_sample()", hint="leave the with-block first")

    def _refresh(self) -> None:
        to_the_end(self._fill)

    def _fill(self) -> None:
        self._members.muted = bool(self._disabled or self._undo)
        live = [] if self._switch.off else list(self._members.live())
        self._prompts.refresh((name, rows) for name, _, rows in live if isinstance(rows, PromptEmbedding))
        rows = ((override.table, rows) for _, override, rows in live if not isinstance(rows, PromptEmbedding))
        self._installation.refresh(rows)


def _key(name: str) -> str:
    return f"adapter_{name}"


def find(model: nn.Module) -> Attachment | None:
    """The attachment of a model, also where the model is wrapped or a wrapper itself."""
    attachment = next((module for module in model.modules() if isinstance(module, Attachment)), None)
    if attachment is not None:
        attachment._installation.settle()
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
        model: Its root: no wrapper of it.
        adapter: What to attach.
        record: Its surgery.
        graph: Of the model.
        name: The adapter's name.
        freeze: Freeze everything that is trainable here: the model, or a wrapper of it.
        materialize: See `embedsurgery.attach`.
        fresh: Whether the adapter was started from a config for this call.
        active: Whether it is live at once.
        given: What the user gave: the model, or a wrapper of it.
        classify: Says what modules of unknown classes are.

    Raises:
        AttachmentError: A part of the model has an attachment, or what the model is a part of; and as `attach`.
    """
    attachment = find(model)
    first = attachment is None
    if attachment is None:
        refuse_part(model)
        attachment = Attachment(model, graph)
    else:
        refuse_more(given or freeze or model, attachment.model, classify)
    try:
        attachment._add(name, adapter, record, freeze=freeze, materialize=materialize, fresh=fresh, active=active)
        if first:
            held, saves = places(model, graph)
            held.add_module(CHILD, attachment)
            model.register_load_state_dict_pre_hook(attachment._before_load)  # type: ignore[no-untyped-call]
            for module in {id(m): m for m in (model, saves)}.values():
                module.register_state_dict_pre_hook(attachment._before_save)  # type: ignore[no-untyped-call]
            remember(attachment)
    except BaseException:
        if first:
            attachment.detach()
        raise
    return attachment
