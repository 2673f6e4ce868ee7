"""Hooks of a soft prompt on the lookups inside the modules that read tokens.

The virtual ids that these hooks replace are inserted in ``stack_hooks.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.runtime.prompts.layout import is_virtual
from embedsurgery.runtime.prompts.live import LivePrompts
from embedsurgery.tensors.sharded import is_sharded


class LookupHooks:
    """Hooks on a lookup: inside a running stack, virtual ids get the prompt's vectors, and real ids the lookup's."""

    def __init__(self, prompts: LivePrompts) -> None:
        self.prompts = prompts

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: replace virtual ids by a real one, because the lookup has no rows for them."""
        call = self.prompts.stack_calls.now()
        if call is None:
            return None
        call.ids = None
        name = None if args else next(iter(kwargs), None)
        ids = args[0] if name is None and args else kwargs.get(name or "")
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            return None
        call.ids = ids
        real = ids.masked_fill(is_virtual(ids), 0)
        return ((real, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: real})

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook: replace the vectors of virtual ids by the prompt's."""
        call = self.prompts.stack_calls.now()
        if call is None or call.ids is None:
            return None
        ids, call.ids = call.ids, None
        if output is None:  # it failed
            return None
        if not isinstance(output, torch.Tensor):
            raise UnsupportedError(
                "a soft prompt needs a lookup that returns vectors",
                where=type(module).__name__,
                expected="a tensor",
                found=type(output).__name__,
            )
        if is_sharded(output):
            raise UnsupportedError(
                "a soft prompt needs a lookup that is not sharded",
                where=type(module).__name__,
                expected="a whole tensor",
                found=type(output).__name__,
                hint="do not shard the lookup",
            )
        # If all virtual tokens are in front, they are concatenated and not selected token by token. Only the first
        # lookup of a call may do so: GPT-2 looks its token types up in the same table, and none of these is virtual.
        leading, call.leading = call.leading, 0
        if leading and ids.shape == call.shape:
            own = self.prompts.vectors(ids[:1, :leading], output.dtype).expand(ids.shape[0], -1, -1)
            return torch.cat([own, output[:, leading:]], dim=1)
        own = self.prompts.vectors(ids, output.dtype)
        return torch.where(is_virtual(ids).unsqueeze(-1), own, output)
