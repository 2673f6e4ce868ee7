"""Walking and merging: each puts the pieces together with what the registry holds, and no logic of its own.

Loading is ``reading.py``'s, attachments and new tokens on a live model are ``live.py``'s, checkpoints on disk
``offline/``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.combining.several import Conflict, joined_plan, plan_adapters
from embedsurgery.combining.weighted_adapters import weighted_adapters
from embedsurgery.errors import ConfigError
from embedsurgery.models.targets import refuse_attached, store_of, texts_of
from embedsurgery.plan import Undo
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply
from embedsurgery.stores.checks import check
from embedsurgery.stores.written import check_written, written
from embedsurgery.surgeries.surgery import Tokenizer

if TYPE_CHECKING:
    from embedsurgery.models.targets import Target
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig
    from embedsurgery.tokenizer.known import KnownTokens


def merge(
    target: Target,
    adapter: Adapter | tuple[Adapter, float] | Sequence[Adapter | tuple[Adapter, float]],
    tokenizer: Tokenizer | None = None,
    *,
    bake: BakeConfig | Sequence[BakeConfig | None] | None = None,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
) -> Undo:
    """Bake adapters into a model or state dict, in place; each row is rounded once to the table's dtype.

    Args:
        target: An ``nn.Module`` without an attachment, or a state dict.
        adapter: What to bake in: one or several, each alone or in a pair with a weight, as `merge_checkpoint` takes
            them. Several are one merge, with one undo.
        tokenizer: Gets the tokens that the adapters bring, if any, or that soft prompts become.
        bake: How soft prompts become tokens: for all, or for each adapter.
        on_conflict: What becomes of rows that several set: "last" or "average", as for `merge_checkpoint`.
        allow_nan: Merge rows with NaN or infinity, which are refused otherwise.

    Returns:
        The undo, for `unmerge`.

    Raises:
        BaseMismatchError: The target's rows are not those the adapter was made from.
        TableError: The table is not found.
        PlanError: Two adapters set the same rows, or rows hold NaN or infinity.
        UnsupportedError: A table whose rows cannot be set.
        AttachmentError: The model has an attachment, which merges by itself.
    """
    refuse_attached(target, "merge")
    asked = weighted_adapters(adapter, _loaded)
    store = store_of(target, tokenizer)
    if tokenizer is None:
        texts_of([part.adapter for part in asked], None)  # which says what an adapter's tokens would need
    tokens = None if tokenizer is None else partial(_known, tokenizer)
    planned = plan_adapters(
        asked,
        lambda name: registry().named(name).surgery,
        store,
        tokens,
        options=bake,
        on_conflict=on_conflict,
        allow_nan=allow_nan,
    )
    plan = planned[0][1] if len(planned) == 1 else joined_plan([plan for _, plan in planned])
    undo = apply(plan, store)
    return MergeUndo(undo.edits, {**plan.facts, "written": written(undo, store)}, tokenizer)


def _loaded(adapter: object) -> tuple[Adapter, str]:
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            "not an adapter",
            expected="an Adapter",
            found=type(adapter).__name__,
            hint="embedsurgery.load(directory) or attachment.adapter() gives one",
        )
    return adapter, adapter.source or "adapter"


def _known(tokenizer: Any) -> KnownTokens:
    from embedsurgery.tokenizer.live import known_tokens

    return known_tokens(tokenizer)


def unmerge(target: Target, undo: Undo, tokenizer: Tokenizer | None = None) -> None:
    """Put back, bit for bit, what a merge changed.

    Args:
        target: What was merged into.
        undo: What `merge` returned, or one that was loaded from a file.
        tokenizer: Where the merge added tokens and the undo comes from a file; what `merge` returned knows its own.

    Raises:
        PlanError: The undo does not fit the target, or the rows have changed since the merge.
        AttachmentError: The model has an attachment, which unmerges by itself.
    """
    refuse_attached(target, "unmerge")
    if not isinstance(undo, Undo):
        raise ConfigError("not an undo", expected="what merge() returned", found=type(undo).__name__)
    store = store_of(target, tokenizer or getattr(undo, "tokenizer", None))
    check(undo, store)
    if "written" in undo.facts:
        check_written("the undo", undo, store)
    apply(undo, store)


@dataclass(frozen=True)
class MergeUndo(Undo):
    """The undo of a merge in memory, with the tokenizer that was changed along, if any."""

    tokenizer: Any = field(default=None, repr=False, compare=False)
