"""Attachments on several devices: refuses rows that would differ between ranks, sets sharded rows, and saves once.

Data parallelism averages the gradients of the parameters that were in the model when it was wrapped. Rows that came
later would train on each rank separately, silently; `SyncGuard` refuses them at the first forward that trains. Under
tensor parallelism every rank computes the same gradient of the rows; `call_on_plain` runs an override in a module that
computes on DTensors. ``tensors/sharded.py`` gathers and shards tensors.
"""

from __future__ import annotations

import hashlib
import os
import uuid
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AdapterError, UnsupportedError
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.tensors.sharded import fsdp_version, gather, is_sharded, local_shard, shard_like

_ATTACH_FIRST = (
    "attach before the model is wrapped, so that the wrapper includes the rows; to use an adapter without training it, "
    "call the model under torch.no_grad()"
)


class SyncGuard:
    """Pre-hook: refuses trainable rows that a parallel wrapper does not synchronise.

    It checks rows again when the wrapper has changed, and nothing in inference or on one process. For compiled code it
    runs while the forward is traced.

    Args:
        model: The attached model.
        live_rows: Returns the live rows, each with a name for messages.
        initial_bytes: Yields the bytes of the rows that this rank has attached, which must be equal on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        live_rows: Callable[[], list[tuple[str, Rows]]],
        initial_bytes: Callable[[], Iterator[bytes]],
    ) -> None:
        self.model = (model,)
        self.live_rows = live_rows
        self.initial_bytes = initial_bytes
        self.sharded = frozenset(name for name, p in model.named_parameters() if is_sharded(p))
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("wrapping", "checked", "name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        """Start with nothing checked, and under a new name: a copy of the model has a guard of its own."""
        self.wrapping: tuple[int, ...] = ()
        self.checked: weakref.WeakSet[Rows] = weakref.WeakSet()
        # Dynamo calls a function that is marked constant with constants only, so traced code passes this name.
        self.name = uuid.uuid4().hex
        _GUARDS[self.name] = self

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedError(
                "rows are not live in the replicas of torch.nn.DataParallel",
                where=type(module).__name__,
                expected="DistributedDataParallel",
                hint="start with torchrun, or set CUDA_VISIBLE_DEVICES=0",
            )
        if not torch.is_grad_enabled():
            return
        if not torch.compiler.is_compiling():
            self.check()
        elif not _passes(self.name):
            _check_untraced(self)

    def check(self) -> None:
        """Raise UnsupportedError if live rows would differ between ranks, or a wrapper cannot train them."""
        if world_size() == 1:
            return
        root, kind = self.model[0], nn.parallel.DistributedDataParallel
        ddp = root if isinstance(root, kind) else getattr(kind, "_active_ddp_module", None)
        wrapping = (id(ddp), id(type(root)))
        if wrapping != self.wrapping:
            self.wrapping = wrapping
            self.checked.clear()
        for name, rows in self.live_rows():
            if rows.values.requires_grad and rows not in self.checked:
                self._check_rows(name, rows.values, ddp)
                self.checked.add(rows)

    def _check_rows(self, name: str, parameter: nn.Parameter, ddp: Any) -> None:
        model = self.model[0]
        if ddp is not None and not _is_reduced(ddp, parameter):
            raise _unsynchronised(name, "DistributedDataParallel")
        parameters = dict(model.named_parameters())
        if any(_is_zero_parameter(p) for p in parameters.values()) and not _is_zero_parameter(parameter):
            raise _unsynchronised(name, "DeepSpeed")
        # FullyShardedDataParallel with use_orig_params replaces Parameters by views while it computes.
        has_views = any(not isinstance(p, nn.Parameter) for p in parameters.values())
        if has_views or any(fsdp_version(m) == 1 for m in model.modules()):
            raise UnsupportedError(
                "rows cannot be trained under FullyShardedDataParallel",
                where=name,
                hint="use its successor, torch.distributed.fsdp.fully_shard",
            )
        modules = [m for m in model.modules() if fsdp_version(m) == 2]
        # A part of what fully_shard has wrapped has no wrapped module inside, but its parameters are gathered.
        is_gathered = any(name in parameters and not is_sharded(parameters[name]) for name in self.sharded)
        if not modules and not is_gathered:
            return
        mesh = _mesh_of(parameter, modules)
        if mesh is None:
            raise _unsynchronised(name, "fully_shard")
        _check_same_start(name, mesh, self.initial_bytes())


_GUARDS: weakref.WeakValueDictionary[str, SyncGuard] = weakref.WeakValueDictionary()


def _passes(name: str) -> bool:
    """Whether a guard refuses nothing. Runs while a forward is traced; its result is a constant of the graph."""
    try:
        _GUARDS[name].check()
    except UnsupportedError:
        return False
    return True


# As torch.compiler.assume_constant_result() does, without importing the compiler.
_passes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_untraced(guard: SyncGuard) -> None:
    """Raise a guard's error out of a forward that is traced. Traced itself, it would become an error of dynamo."""
    torch.compiler.disable(guard.check)()  # type: ignore[no-untyped-call]


def world_size() -> int:
    """Return the number of processes."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def adapters_on_any_rank(model: nn.Module, names: Container[str], rows: Mapping[str, Iterable[Rows]]) -> list[str]:
    """Return the adapters that the samples of a batch name, in the order of ``rows``.

    If ``fully_shard`` shards the rows, adapters of other ranks' batches are included: it reduces the gradients of a
    group together, so all ranks need gradients of the same parameters.

    Args:
        model: The attached model.
        names: Adapters of this rank's samples.
        rows: Adapter name -> its rows, for all attached adapters; the same on every rank.
    """
    attached = list(rows)
    wrapped = [module for module in model.modules() if fsdp_version(module) == 2]
    meshes = (_mesh_of(part.values, wrapped) for parts in rows.values() for part in parts if part.values.requires_grad)
    mesh = next((mesh for mesh in meshes if mesh is not None), None) if wrapped and torch.is_grad_enabled() else None
    if mesh is None:
        return [name for name in attached if name in names]
    used = torch.tensor([name in names for name in attached], dtype=torch.uint8, device=mesh.device_type)
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(used, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(axis))
    return [name for name, is_used in zip(attached, used.tolist(), strict=True) if is_used]


def plain_rows(values: torch.Tensor, name: str = "the rows") -> torch.Tensor:
    """Return rows as a plain tensor, inside a forward.

    Under ``fully_shard`` they are plain there, because the module that owns them has gathered them. If that module's
    forward did not run, they are gathered here, without a gradient.

    Args:
        values: The rows, (K, D).
        name: What the rows are, for messages.

    Raises:
        UnsupportedError: They would have to be gathered here, and need a gradient.
    """
    if not is_sharded(values):
        return values
    if torch.is_grad_enabled() and values.requires_grad:
        raise UnsupportedError(
            "the rows are sharded here, because the module that was sharded with them did not run",
            where=name,
            hint="call the module that fully_shard was called on last",
        )
    return gather(values)


@torch.no_grad()
def set_rows(model: nn.Module, rows: Rows, values: torch.Tensor) -> None:
    """Set rows to plain values, (K, D), which must be the same on every rank. The rows may be sharded.

    Raises:
        UnsupportedError: DeepSpeed has its own copy of the rows, which would overwrite the values.
    """
    if _is_zero_parameter(rows.values):
        raise UnsupportedError(
            "rows cannot be set after DeepSpeed's ZeRO has made its own copy of them",
            hint="restore them before deepspeed.initialize",
        )
    wrapped: list[Any] = [module for module in model.modules() if fsdp_version(module) == 2]
    for module in wrapped:
        module.reshard()  # a write into a gathered parameter is lost when it is sharded again
    target: torch.Tensor = rows.values
    if is_sharded(target):
        target, values = local_shard(target), local_shard(shard_like(values.to(target.device), target))
    target.copy_(values)


def call_on_plain(
    hook: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Run a forward hook that needs plain tensors in a module that computes on DTensors.

    Inputs and output are gathered, also all logits of a head that is sharded by vocabulary, and the result is
    replicated. This is slow but correct: every rank computes the whole gradient of the rows.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = output.device_mesh
    plain = tuple(gather(a) if isinstance(a, torch.Tensor) else a for a in args)
    named = {key: gather(a) if isinstance(a, torch.Tensor) else a for key, a in kwargs.items()}
    new = hook(module, plain, named, gather(output))
    return DTensor.from_local(new, mesh, [Replicate()] * mesh.ndim, run_check=False)


def save_once(adapter: Adapter, directory: str | os.PathLike[str]) -> Path:
    """Save an adapter on rank 0 while the others wait. Call it on every rank.

    Raises:
        AdapterError: The rows differ between the ranks, or the directory cannot be written. It is raised on every rank.
    """
    if world_size() == 1:
        return adapter.save(directory)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    if not _is_equal_on_ranks(_hash_number(raw.data for raw in adapter.raw.values()), device, (None,)):
        raise AdapterError(
            "the ranks hold different rows",
            where=directory,
            expected="the same on every rank",
            hint="attach before the model is wrapped, so that their gradients are averaged",
        )
    failed: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            adapter.save(directory)
        except Exception as error:  # of any kind: the other ranks would wait for the all_reduce forever
            failed = error
    flag = torch.tensor([0 if failed is None else 1], device=device)
    torch.distributed.all_reduce(flag)
    if failed is not None:
        raise failed
    if flag.item():
        raise AdapterError("rank 0 could not write the adapter", where=directory)
    return Path(directory)


def _unsynchronised(name: str, wrapper: str) -> UnsupportedError:
    return UnsupportedError(
        f"{wrapper} does not synchronise these trainable rows, so they would differ between ranks",
        where=name,
        hint=_ATTACH_FIRST,
    )


def _is_reduced(ddp: Any, parameter: nn.Parameter) -> bool:
    """Whether DDP averages a parameter's gradient: if the parameter was there, and trainable, when it was made."""
    if not any(p is parameter for p in ddp._module_parameters):
        return False
    count = ddp._get_ddp_logging_data().get("num_parameter_tensors")
    return count is None or count >= sum(p.requires_grad for p in ddp._module_parameters)


def _is_zero_parameter(parameter: torch.Tensor) -> bool:
    """Whether a stage of DeepSpeed's ZeRO manages a parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _mesh_of(parameter: nn.Parameter, modules: Iterable[Any]) -> Any:
    """Return the mesh over which FSDP2 shards a parameter, also while it is gathered; else None."""
    if is_sharded(parameter):
        return parameter.device_mesh  # type: ignore[attr-defined]
    for module in modules:
        state = module._get_fsdp_state()
        context = getattr(state, "_state_ctx", None)
        for one in {id(s): s for s in (state, *getattr(context, "all_states", ()))}.values():
            groups = getattr(one, "_fsdp_param_groups", None)
            for group in [one._fsdp_param_group] if groups is None else groups:
                for fsdp_param in () if group is None else group.fsdp_params:
                    info = fsdp_param._module_info
                    if info.module._parameters.get(info.param_name) is parameter:
                        return fsdp_param.sharded_param.device_mesh
    return None


def _check_same_start(name: str, mesh: Any, initial_bytes: Iterator[bytes]) -> None:
    """Refuse rows whose shards come from different tensors: training would never make them equal."""
    groups = tuple(mesh.get_group(axis) for axis in range(mesh.ndim))
    if not _is_equal_on_ranks(_hash_number(initial_bytes), torch.device(mesh.device_type), groups):
        raise UnsupportedError(
            "the ranks have attached different rows",
            where=name,
            expected="the same adapter and base on every rank",
            hint="load the weights on every rank before attaching (Accelerate: cpu_ram_efficient_loading=False), and "
            "use the same seed for random initial rows",
        )


def _hash_number(parts: Iterable[bytes]) -> int:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest()[:7], "big")


def _is_equal_on_ranks(number: int, device: torch.device | str, groups: tuple[Any, ...]) -> bool:
    """Whether a number below 2**56 is the same on every rank of the groups: its maximum is its minimum."""
    both = torch.tensor([number, -number], dtype=torch.int64, device=device)
    for group in groups:
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(both[0]) == -int(both[1])
