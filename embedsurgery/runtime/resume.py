"""Notices a resumed training that did not restore the rows: the optimizer has trained them, but they are untrained.

A state dict is always the base's, so a loop that loads a checkpoint's model and optimizer gets moments of rows that are
not in the model. Every loop calls ``optimizer.step()``, so the check runs before the steps, until the attachment's rows
have been stepped once.

An optimizer without state (SGD without momentum) shows nothing. In that case the check relies on `is_resuming`: a
library that resumes training has loaded a state dict. `Members.check_step` raises the error.
"""

from __future__ import annotations

import weakref
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from embedsurgery.runtime.calls import frame_at, frames_from, local_of, package_of


class StepChecker(Protocol):
    """What `check_steps` takes: see `Members`."""

    def check_step(self, optimizer: Optimizer, closure: bool) -> bool:
        """Raise if the rows were not restored; return whether to check the next step as well."""


_checkers: weakref.WeakSet[Any] = weakref.WeakSet()
_handles: list[Any] = []


def check_steps(checker: StepChecker) -> None:
    """Call a checker before every optimizer step of this process, until it returns False."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_check_step))
    _checkers.add(checker)


def _check_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    closure = any(callable(given) for given in (*args[1:], *kwargs.values()))
    for checker in list(_checkers):
        if not checker.check_step(optimizer, closure):
            _checkers.discard(checker)


_RESUMING = frozenset(
    {
        ("transformers", "_load_from_checkpoint"),
        ("sentence_transformers", "_load_from_checkpoint"),
        ("accelerate", "load_accelerator_state"),
        ("lightning", "restore_model"),
        ("pytorch_lightning", "restore_model"),
    }
)
"""(package, function) that load a state dict to resume training."""


def is_resuming() -> bool:
    """Whether the state dict that is being loaded is loaded by a library that resumes training."""
    return _resuming_frame() is not None


def is_restored_by_trainer() -> bool:
    """Whether a Trainer is loading the state dict, and one of its callbacks restores the rows afterwards."""
    frame = _resuming_frame()
    trainer = None if frame is None else local_of(frame, "self")
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    return any(getattr(type(callback), "restores_rows", False) for callback in callbacks)


def _resuming_frame() -> FrameType | None:
    """Return the frame of the library's function that resumes, if it is running."""
    running = frames_from(frame_at())
    return next((frame for frame in running if (package_of(frame), frame.f_code.co_name) in _RESUMING), None)


def will_step(optimizer: Optimizer, parameter: nn.Parameter, closure: bool) -> bool:
    """Whether an optimizer's next step changes a parameter.

    Args:
        optimizer: The optimizer, before its step.
        parameter: Any parameter.
        closure: Whether the step gets a closure that computes the gradients, as Lightning's does.
    """
    is_in = any(p is parameter for group in optimizer.param_groups for p in group["params"])
    return is_in and (parameter.grad is not None or (closure and parameter.requires_grad))


def has_history(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether an optimizer's state shows that it has stepped a parameter before, with a gradient."""
    state = optimizer.state.get(parameter) or {}
    if "step" in state and state["step"] != 1:  # the state's other entries may start at any value
        return bool(state["step"] > 1)
    return any(isinstance(v, torch.Tensor) and v.dim() > 0 and bool((v != 0).any()) for v in state.values())


def only_creates_state(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether an optimizer's next step leaves a parameter unchanged and only creates its state.

    ``torch.distributed.checkpoint`` makes one, with learning rate and gradients 0, to have a state to load into.
    """
    rates = [group.get("lr") for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    return rates == [0] and parameter.grad is not None and not bool((parameter.grad != 0).any())
