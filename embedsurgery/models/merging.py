"""Merges adapters into a model or state dict in memory, and undoes it.

``combining/`` plans the merge and ``stores/apply.py`` applies it. ``attaching.py`` keeps adapters live instead;
``checkpoints/merging.py`` merges on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.combining.several import Conflict, join_plans, plan_adapters
from embedsurgery.combining.weighted_adapters import parse_weighted_adapters
from embedsurgery.errors import ConfigError
from embedsurgery.models.targets import refuse_attached, store_of, texts_by_id
from embedsurgery.plan import Undo
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply
from embedsurgery.stores.checks import check_plan
from embedsurgery.stores.written import check_written, hash_written
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
    """Merge adapters into a model or state dict, in place. Each row is rounded once to the table's dtype.

    Args:
        target: An ``nn.Module`` without an attachment, or a state dict.
        adapter: One adapter or several, each alone or in a pair with a weight, as for `merge_checkpoint`. Several are
            one merge with one undo.
        tokenizer: The tokenizer to add the adapters' new tokens to, or those that soft prompts become.
        bake: How soft prompts become tokens: for all adapters, or for each.
        on_conflict: How to merge rows that several adapters set: "last" or "average", as for `merge_checkpoint`.
        allow_nan: Merge rows with NaN or infinity, which are refused by default.

    Returns:
        The undo, for `unmerge`.

    Raises:
        BaseMismatchError: The adapter was made from another base.
        TableError: A table is not found.
        PlanError: Two adapters set the same rows, or rows contain NaN or infinity.
        UnsupportedError: A table's rows cannot be set.
        AttachmentError: The model has an attachment; use its own ``merge``.
    """
    refuse_attached(target, "merge")
    weighted = parse_weighted_adapters(adapter, _check_adapter)
    store = store_of(target, tokenizer)
    if tokenizer is None:
        texts_by_id([part.adapter for part in weighted], None)  # for its warning
    tokens = None if tokenizer is None else partial(_known_tokens, tokenizer)
    plans = plan_adapters(
        weighted,
        lambda name: registry().find_surgery(name).surgery,
        store,
        tokens,
        options=bake,
        on_conflict=on_conflict,
        allow_nan=allow_nan,
    )
    plan = plans[0][1] if len(plans) == 1 else join_plans([plan for _, plan in plans])
    undo = apply(plan, store)
    # With hashes of what was written, by which `unmerge` refuses rows that have changed since.
    return MergeUndo(undo.edits, {**plan.facts, "written": hash_written(undo, store)}, tokenizer)


def _check_adapter(adapter: object) -> tuple[Adapter, str]:
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            "not an adapter",
            expected="an Adapter",
            found=type(adapter).__name__,
            hint="embedsurgery.load(directory) or attachment.adapter() gives one",
        )
    return adapter, adapter.source or "adapter"


def _known_tokens(tokenizer: Any) -> KnownTokens:
    from embedsurgery.tokenizer.live import known_tokens_of

    return known_tokens_of(tokenizer)


def unmerge(target: Target, undo: Undo, tokenizer: Tokenizer | None = None) -> None:
    """Undo a merge, bit for bit.

    Args:
        target: The model or state dict that was merged into.
        undo: What `merge` returned, or an `Undo` that was loaded from a file.
        tokenizer: The tokenizer that the merge added tokens to, if the undo was loaded from a file. What `merge`
            returned holds it.

    Raises:
        PlanError: The undo does not fit the target, or the rows have changed since the merge.
        AttachmentError: The model has an attachment; use its own ``unmerge``.
        ConfigError: ``undo`` is not an `Undo`.
    """
    refuse_attached(target, "unmerge")
    if not isinstance(undo, Undo):
        raise ConfigError("not an undo", expected="what merge() returned", found=type(undo).__name__)
    store = store_of(target, tokenizer or getattr(undo, "tokenizer", None))
    check_plan(undo, store)
    if "written" in undo.facts:
        check_written("the undo", undo, store)
    apply(undo, store)


@dataclass(frozen=True)
class MergeUndo(Undo):
    """The undo of a merge in memory.

    Attributes:
        tokenizer: The tokenizer that the merge added tokens to, if any.
    """

    tokenizer: Any = field(default=None, repr=False, compare=False)
