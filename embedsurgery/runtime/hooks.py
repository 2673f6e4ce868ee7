"""Forward hooks that survive deepcopy and pickling: found again by the hook itself, not by a handle."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

Installed = list[tuple[nn.Module, Any]]
"""Which hook was put on which module, so that it can be taken off."""


def before(installed: Installed, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
    """Run ``hook(module, args, kwargs)`` before a module's forward, after the pre-hooks that are there, or before."""
    installed.append((module, hook))  # first: this may be interrupted
    module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)


def guard(installed: Installed, module: nn.Module, guards: Sequence[Callable[..., Any]]) -> None:
    """Run pre-hooks before a module's forward, in their order and before all that are there."""
    for one in reversed(guards):
        before(installed, module, one, first=True)


def after(installed: Installed, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
    """Run ``hook(module, args, kwargs, output)`` after a module's forward, before the hooks that are there."""
    installed.append((module, hook))
    module.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=always)


def remove(installed: Installed) -> None:
    """Take every hook of the list off; those that are gone already are no matter."""
    for module, hook in installed:
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            table = getattr(module, kind)
            for key in [key for key, value in table.items() if value == hook]:
                for beside in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                    getattr(module, beside, {}).pop(key, None)
    installed.clear()


def forget_compiled() -> None:
    """Have all be compiled again: what was compiled before never looks whether there are hooks, or covers, by now."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors in what a forward takes or gives: a tensor, a tuple, a dict (ModelOutput is one), two levels deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 2 and isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item, depth + 1)
