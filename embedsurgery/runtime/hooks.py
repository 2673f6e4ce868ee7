"""Forward hooks that survive ``copy.deepcopy`` and pickling: they are found by the hook itself, not by a handle.

``rows/installation.py`` and ``prompts/installation.py`` decide which hooks go on which modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

InstalledHooks = list[tuple[nn.Module, Any]]
"""Which hook was registered on which module, so that it can be removed."""


def add_pre_hook(
    installed: InstalledHooks, module: nn.Module, hook: Callable[..., Any], *, first: bool = False
) -> None:
    """Run ``hook(module, args, kwargs)`` before a module's forward.

    Args:
        installed: The list that the hook is noted in.
        module: The module.
        hook: The pre-hook.
        first: Run it before the module's other pre-hooks, not after them.
    """
    # Noted before it is registered: a KeyboardInterrupt in between leaves an entry without a hook, which
    # `remove_hooks` ignores, instead of a hook that nothing removes.
    installed.append((module, hook))
    module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)


def add_guards(installed: InstalledHooks, module: nn.Module, guards: Sequence[Callable[..., Any]]) -> None:
    """Run pre-hooks, in their order, before all other pre-hooks of a module."""
    for one in reversed(guards):
        add_pre_hook(installed, module, one, first=True)


def add_post_hook(
    installed: InstalledHooks, module: nn.Module, hook: Callable[..., Any], *, always: bool = False
) -> None:
    """Run ``hook(module, args, kwargs, output)`` after a module's forward, before its other hooks.

    Args:
        installed: The list that the hook is noted in.
        module: The module.
        hook: The hook.
        always: Run it after an exception, too.
    """
    installed.append((module, hook))
    module.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=always)


def remove_hooks(installed: InstalledHooks) -> None:
    """Remove all hooks of a list, and empty it. Missing hooks are ignored."""
    for module, hook in installed:
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            table = getattr(module, kind)
            for key in [key for key, value in table.items() if value == hook]:
                for beside in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                    getattr(module, beside, {}).pop(key, None)
    installed.clear()


def reset_compiled() -> None:
    """Discard all compiled code: it does not notice that hooks or overrides were added since it was compiled."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yield the tensors among a forward's inputs or outputs: in tuples, lists and dicts, two levels deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 2 and isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item, depth + 1)
