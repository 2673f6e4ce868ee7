"""Sees a resume that forgot the rows: an optimizer that has trained them before, and rows that are as they began.

A state dict is always the base's, so whoever loads a checkpoint's model and optimizer gets moments that belong to
rows which are not there. This holds in any loop, so it is looked for where any loop comes by: the first
``optimizer.step()``. Once an attachment's rows have been stepped it is looked at no more.

An optimizer without state says nothing. There it counts that a library which resumes training has loaded a state dict.
"""

from __future__ import annotations

import weakref
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from embedsurgery.runtime.calls import frame_at, frames_from, local_of, package_of


class Untrained(Protocol):
    """What is looked at: see `Members`."""

    def before_step(self, optimizer: Optimizer, closure: bool) -> bool:
        """Raises on a forgotten resume; returns whether to look again at the next step."""


_living: weakref.WeakSet[Any] = weakref.WeakSet()
_installed: list[Any] = []


def look_at(members: Untrained) -> None:
    """Ask an attachment's adapters before every optimizer step of this process, until it says that it knows enough."""
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before_step))
    _living.add(members)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    closure = any(callable(given) for given in (*args[1:], *kwargs.values()))
    for members in list(_living):
        if not members.before_step(optimizer, closure):
            _living.discard(members)


_RESUMES = frozenset(
    {
        ("transformers", "_load_from_checkpoint"),
        ("sentence_transformers", "_load_from_checkpoint"),
        ("accelerate", "load_accelerator_state"),
        ("lightning", "restore_model"),
        ("pytorch_lightning", "restore_model"),
    }
)
"""The libraries' functions that load a state dict to go on with training."""


def is_resume() -> bool:
    """Whether a library that resumes training is what loads a state dict just now."""
    return _resuming() is not None


def is_restored() -> bool:
    """Whether it is a Trainer with a callback that restores the rows once the state dict is loaded."""
    frame = _resuming()
    trainer = None if frame is None else local_of(frame, "self")
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    return any(getattr(type(callback), "restores_rows", False) for callback in callbacks)


def _resuming() -> FrameType | None:
    """The library's function that resumes, while it runs."""
    running = frames_from(frame_at())
    return next((frame for frame in running if (package_of(frame), frame.f_code.co_name) in _RESUMES), None)


def holds(optimizer: Optimizer, parameter: nn.Parameter, closure: bool) -> bool:
    """Whether an optimizer is about to step a parameter.

    Args:
        optimizer: Before its step.
        parameter: Any.
        closure: Whether the step is given a closure, which computes the gradients: Lightning does so.
    """
    held = any(p is parameter for group in optimizer.param_groups for p in group["params"])
    return held and (parameter.grad is not None or (closure and parameter.requires_grad))


def has_history(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether an optimizer's state says that it has stepped a parameter before, with a gradient."""
    state = optimizer.state.get(parameter) or {}
    if "step" in state and state["step"] != 1:  # others of its entries may start at any value
        return bool(state["step"] > 1)
    return any(isinstance(v, torch.Tensor) and v.dim() > 0 and bool((v != 0).any()) for v in state.values())


def makes_state_only(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the step that an optimizer is about to make changes nothing.

    ``torch.distributed.checkpoint`` makes one such, with rates and gradients of 0, to have a state to load into.
    """
    rates = [group.get("lr") for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    return rates == [0] and parameter.grad is not None and not bool((parameter.grad != 0).any())
