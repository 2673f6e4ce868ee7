"""Attachments on several devices: what is right, what would drift apart and is refused, and saving once.

Data parallelism of every kind averages the gradients of the parameters that it knew when it wrapped the model. Rows
that it does not know train on each rank by themselves, without a word: `Guard` refuses them at the first forward.
Under tensor parallelism every rank computes the same gradient of the rows; `on_plain` lets an override run where its
module computes on DTensors.
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
from embedsurgery.tensors.sharded import fsdp_version, is_sharded, local, part_of, whole

_LATE = (
    "attach before the model is wrapped, and let the wrapper have the rows; an adapter that is only used needs no "
    "gradient: call the model under torch.no_grad()"
)


class Guard:
    """Pre-hook: refuses trainable rows that a parallel wrapper does not synchronise.

    Looks when the wrapping has changed since it last looked; in inference and on one process never. What is compiled
    was looked at while it was traced.

    Args:
        model: The attached model.
        rows: Gives the live rows, with a name for messages.
        start: Gives the bytes of what this rank attached, to be the same on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Callable[[], list[tuple[str, Rows]]],
        start: Callable[[], Iterator[bytes]],
    ) -> None:
        self.model = (model,)
        self.rows = rows
        self.start = start
        self.sharded = frozenset(name for name, p in model.named_parameters() if is_sharded(p))
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("wrapping", "seen", "name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        """Have seen nothing, and be found by what is traced: a copy is another one."""
        self.wrapping: tuple[int, ...] = ()
        self.seen: weakref.WeakSet[Rows] = weakref.WeakSet()
        self.name = uuid.uuid4().hex
        _GUARDS[self.name] = self

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedError(
                "rows are not live in the replicas that torch.nn.DataParallel makes",
                where=type(module).__name__,
                expected="DistributedDataParallel",
                hint="start with torchrun, or set CUDA_VISIBLE_DEVICES=0",
            )
        if not torch.is_grad_enabled():
            return
        if not torch.compiler.is_compiling():
            self.look()
        elif not _passes(self.name):
            _look_again(self)

    def look(self) -> None:
        """Raises UnsupportedError where live rows would drift apart, or a wrapper cannot train them."""
        if world_size() == 1:
            return
        root, kind = self.model[0], nn.parallel.DistributedDataParallel
        ddp = root if isinstance(root, kind) else getattr(kind, "_active_ddp_module", None)
        wrapping = (id(ddp), id(type(root)))
        if wrapping != self.wrapping:
            self.wrapping = wrapping
            self.seen.clear()
        for name, rows in self.rows():
            if rows.values.requires_grad and rows not in self.seen:
                self._check(name, rows.values, ddp)
                self.seen.add(rows)

    def _check(self, name: str, parameter: nn.Parameter, ddp: Any) -> None:
        model = self.model[0]
        if ddp is not None and not _reduced(ddp, parameter):
            raise _unknown(name, "DistributedDataParallel")
        parameters = dict(model.named_parameters())
        if any(_is_deepspeeds(p) for p in parameters.values()) and not _is_deepspeeds(parameter):
            raise _unknown(name, "DeepSpeed")
        views = any(not isinstance(p, nn.Parameter) for p in parameters.values())
        if views or any(fsdp_version(m) == 1 for m in model.modules()):
            raise UnsupportedError(
                "rows cannot be trained under FullyShardedDataParallel",
                where=name,
                hint="use its successor, torch.distributed.fsdp.fully_shard",
            )
        modules = [m for m in model.modules() if fsdp_version(m) == 2]
        unsharded = any(name in parameters and not is_sharded(parameters[name]) for name in self.sharded)
        if not modules and not unsharded:
            return
        mesh = _mesh(parameter, modules)
        if mesh is None:
            raise _unknown(name, "fully_shard")
        _same_start(name, mesh, self.start())


_GUARDS: weakref.WeakValueDictionary[str, Guard] = weakref.WeakValueDictionary()


def _passes(name: str) -> bool:
    """Whether a guard has nothing to refuse: asked while a forward is traced, and a constant in what comes out."""
    try:
        _GUARDS[name].look()
    except UnsupportedError:
        return False
    return True


_passes._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result() loads the compiler


def _look_again(guard: Guard) -> None:
    """Raises out of a forward that is traced: not compiled, so that the error is ours."""
    torch.compiler.disable(guard.look)()  # type: ignore[no-untyped-call]


def world_size() -> int:
    """How many processes compute together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def named_on_any_rank(model: nn.Module, names: Container[str], rows: Mapping[str, Iterable[Rows]]) -> list[str]:
    """The adapters that samples of a batch have, in the order of ``rows``; where ``fully_shard`` has the rows, those
    of the other ranks' batches as well.

    What is sharded together has its gradients reduced together, so all ranks must have one for the same parameters.

    Args:
        model: The attached model.
        names: Of this rank's samples.
        rows: Adapter's name -> its rows, of all that are attached; the same on every rank.
    """
    known = list(rows)
    wrapped = [module for module in model.modules() if fsdp_version(module) == 2]
    meshes = (_mesh(part.values, wrapped) for parts in rows.values() for part in parts if part.values.requires_grad)
    mesh = next((mesh for mesh in meshes if mesh is not None), None) if wrapped and torch.is_grad_enabled() else None
    if mesh is None:
        return [name for name in known if name in names]
    used = torch.tensor([name in names for name in known], dtype=torch.uint8, device=mesh.device_type)
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(used, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(axis))
    return [name for name, is_used in zip(known, used.tolist(), strict=True) if is_used]


def plain_rows(values: torch.Tensor, name: str = "the rows") -> torch.Tensor:
    """Rows as a plain tensor inside a forward.

    Under ``fully_shard`` they are plain there, gathered by the module that owns them; where that module's own forward
    did not run, they are gathered here, which gives no gradient.

    Raises:
        UnsupportedError: A gradient is wanted.
    """
    if not is_sharded(values):
        return values
    if torch.is_grad_enabled() and values.requires_grad:
        raise UnsupportedError(
            "the rows are sharded here, because the module that was sharded with them did not run",
            where=name,
            hint="call the module that fully_shard was called on last",
        )
    return whole(values)


@torch.no_grad()
def set_rows(model: nn.Module, rows: Rows, values: torch.Tensor) -> None:
    """Set rows to plain values, the same on every rank, wherever they lie.

    Raises:
        UnsupportedError: DeepSpeed holds a copy of them, which would overwrite what is set.
    """
    if _is_deepspeeds(rows.values):
        raise UnsupportedError(
            "rows cannot be set once DeepSpeed's ZeRO has its own copy of them",
            hint="restore them before deepspeed.initialize",
        )
    wrapped: list[Any] = [module for module in model.modules() if fsdp_version(module) == 2]
    for module in wrapped:
        module.reshard()  # what is written into a gathered parameter is lost
    held: torch.Tensor = rows.values
    if is_sharded(held):
        held, values = local(held), local(part_of(values.to(held.device), held))
    held.copy_(values)


def on_plain(
    hook: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Run a forward hook that knows plain tensors only where a module computes on DTensors.

    What goes in is gathered, so the logits of a vocabulary-sharded head are gathered whole, and what comes out is
    replicated: the slow right way. Every rank computes the whole gradient of the rows.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = output.device_mesh
    given = tuple(whole(a) if isinstance(a, torch.Tensor) else a for a in args)
    named = {key: whole(a) if isinstance(a, torch.Tensor) else a for key, a in kwargs.items()}
    new = hook(module, given, named, whole(output))
    return DTensor.from_local(new, mesh, [Replicate()] * mesh.ndim, run_check=False)


def save_once(adapter: Adapter, directory: str | os.PathLike[str]) -> Path:
    """Write an adapter on rank 0 while the others wait; every rank calls it.

    Raises:
        AdapterError: The rows differ between the ranks, or the directory cannot be written; then on every rank.
    """
    if world_size() == 1:
        return adapter.save(directory)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    if not _agree(_number(raw.data for raw in adapter.raw.values()), device, (None,)):
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
        except Exception as error:  # whatever it is, the others must not wait for ever
            failed = error
    flag = torch.tensor([0 if failed is None else 1], device=device)
    torch.distributed.all_reduce(flag)
    if failed is not None:
        raise failed
    if flag.item():
        raise AdapterError("rank 0 could not write the adapter", where=directory)
    return Path(directory)


def _unknown(name: str, wrapper: str) -> UnsupportedError:
    return UnsupportedError(
        f"trainable rows that {wrapper} does not know: they would drift apart on the ranks", where=name, hint=_LATE
    )


def _reduced(ddp: Any, parameter: nn.Parameter) -> bool:
    """Whether DDP averages a parameter's gradient: it does for what was there, and trainable, when it was made."""
    if not any(p is parameter for p in ddp._module_parameters):
        return False
    made = ddp._get_ddp_logging_data().get("num_parameter_tensors")
    return made is None or made >= sum(p.requires_grad for p in ddp._module_parameters)


def _is_deepspeeds(parameter: torch.Tensor) -> bool:
    """Whether one of ZeRO's stages has taken a parameter over."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _mesh(parameter: nn.Parameter, modules: Iterable[Any]) -> Any:
    """The mesh over which FSDP2 shards a parameter, which may be gathered just now; None if it does not."""
    if is_sharded(parameter):
        return parameter.device_mesh  # type: ignore[attr-defined]
    for module in modules:
        state = module._get_fsdp_state()
        context = getattr(state, "_state_ctx", None)
        for one in {id(s): s for s in (state, *getattr(context, "all_states", ()))}.values():
            groups = getattr(one, "_fsdp_param_groups", None)
            for group in [one._fsdp_param_group] if groups is None else groups:
                for held in () if group is None else group.fsdp_params:
                    info = held._module_info
                    if info.module._parameters.get(info.param_name) is parameter:
                        return held.sharded_param.device_mesh
    return None


def _same_start(name: str, mesh: Any, start: Iterator[bytes]) -> None:
    """Refuse rows whose shards come from different wholes: nothing would ever make them equal."""
    groups = tuple(mesh.get_group(axis) for axis in range(mesh.ndim))
    if not _agree(_number(start), torch.device(mesh.device_type), groups):
        raise UnsupportedError(
            "the ranks have attached different rows",
            where=name,
            expected="the same adapter and base on every rank",
            hint="load the weights on every rank before attaching (Accelerate: cpu_ram_efficient_loading=False), and "
            "seed random initial rows alike",
        )


def _number(parts: Iterable[bytes]) -> int:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest()[:7], "big")


def _agree(number: int, device: torch.device | str, groups: tuple[Any, ...]) -> bool:
    """Whether a number is the same on every rank of the groups."""
    both = torch.tensor([number, -number], dtype=torch.int64, device=device)
    for group in groups:
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(both[0]) == -int(both[1])
