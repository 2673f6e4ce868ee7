"""Overrides at sites: what makes a lookup or a projection use trained rows, without a copy of the table.

A lookup runs as it does, and then the rows in the batch that are ours are taken from a *twin* of the module: a
shallow copy over the small table, so that scales and whatever else a subclass does stay right. A projection runs as it
does, and then the columns that are ours are replaced in the logits. Both are forward hooks that come before all others,
so hooks of the user see what they would see on a merged model. Which rows are live is a list that the attachment owns
and the hooks share.

Where a module cannot be overridden so, a full copy is laid over its weight while it runs: ``overlays.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import Site
from embedsurgery.graph.wrappers import submodule
from embedsurgery.runtime.rows.columns import can_replace, columns, put, replaced
from embedsurgery.runtime.rows.mixing import Batch
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sharded import on_plain, plain_rows
from embedsurgery.runtime.rows.sliced_head import sliced, uncover, was_sliced
from embedsurgery.runtime.rows.sparse_lookup import is_transformed, shared
from embedsurgery.runtime.rows.whole_tables import TableRows, chosen
from embedsurgery.tensors.sharded import is_sharded, rows_at


class Lookup:
    """Forward hook of a lookup: ``nn.Embedding`` and subclasses."""

    def __init__(self, module: nn.Module, site: Site, live: list[Rows], batch: Batch) -> None:
        self.twin = _twin(module, site.parameter)
        self.where = site.module
        self.parameter = site.parameter
        self.live = live
        self.batch = batch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.live and is_sharded(output):
            return on_plain(self, module, args, kwargs, output)
        plain = type(module).forward is nn.Embedding.forward
        twin = self.twin
        if self.live and not plain and not torch.compiler.is_compiling():
            twin = _twin(module, self.parameter)  # as the module is now (its mode, scale and the like); of this call
        for rows in self.live:
            ids, args_of, kwargs_of = _split_ids(args, kwargs)
            if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
                raise UnsupportedError(
                    "a lookup that is given something other than ids",
                    where=self.where or "root",
                    expected="integers",
                    found=getattr(ids, "dtype", type(ids).__name__),
                    hint="attach(..., materialize=True) gives it the whole table",
                )
            place, ours, small = chosen(rows, ids, held(module, self.parameter))
            if rows.samples is not None:
                ours = ours & self.batch.mask(rows.samples, ids)
            if plain:
                new = F.embedding(place, small, sparse=module.sparse)  # type: ignore[arg-type]
            else:
                new = _call(twin, self.parameter, small, args_of(place), kwargs_of(place))
            output = torch.where(ours.unsqueeze(-1), new, output)
        return output


class Projection:
    """Forward hook of a projection to logits: ``nn.Linear`` and modules that compute the same.

    Its `enter` is a pre-hook, after which many consecutive rows may be in the logits already: see ``sliced.py``.
    """

    def __init__(self, module: nn.Module, site: Site, live: list[Rows], batch: Batch) -> None:
        self.site = site
        self.live = live
        self.batch = batch

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Pre-hook."""
        was_sliced()  # what a forward that was broken off has left
        cover = sliced(module, held(module, self.site.parameter), self.live)
        if cover is not None:
            module.__dict__[self.site.parameter] = cover

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Also after an exception, when there is no output."""
        uncover(module, self.site.parameter)
        if was_sliced() or output is None:
            return output
        if self.live and is_sharded(output):
            return on_plain(self, module, args, kwargs, output)
        for rows in self.live:
            hidden = args[0] if args else next(iter(kwargs.values()))
            table = held(module, self.site.parameter)
            weight = table.t() if self.site.transposed else table
            if isinstance(rows, TableRows):
                new = rows.project(hidden, output, weight)
                output = (
                    new if rows.samples is None else torch.where(self.batch.mask(rows.samples, output), new, output)
                )
                continue
            bias = getattr(module, "bias", None)  # a buffer or a parametrised one too
            small_bias = None if bias is None else rows_at(bias, rows.indices)
            small = plain_rows(shared(rows)).to(weight.dtype)
            if is_transformed() and not is_sharded(weight):  # what is right for derivatives of every order and kind
                new = F.linear(hidden, small, small_bias).to(output.dtype)
                if rows.samples is not None:
                    old = output.index_select(-1, rows.indices)
                    new = torch.where(self.batch.mask(rows.samples, output), new, old)
                output = output.index_copy(-1, rows.indices, new)
                continue
            wanted = torch.is_grad_enabled() and (hidden.requires_grad or small.requires_grad or output.requires_grad)
            ours_alone = not weight.requires_grad and not is_sharded(weight)
            if wanted and ours_alone and rows.samples is None and can_replace(output):
                output = replaced(output, hidden, small, weight, rows.indices, rows.first, small_bias)
                continue
            if wanted and ours_alone:
                new = change = columns(hidden, small, weight, rows.indices, small_bias).to(output.dtype)
            else:
                new = change = F.linear(hidden, small, small_bias).to(output.dtype)
                if wanted:
                    change = new - F.linear(hidden, rows_at(weight, rows.indices), small_bias).to(output.dtype)
            if rows.samples is not None:
                ours = self.batch.mask(rows.samples, output)
                new = torch.where(ours, new, output.detach().index_select(-1, rows.indices))
                change = torch.where(ours, change, 0) if wanted else change
            if wanted:
                output = output.clone() if is_sharded(weight) else output  # DTensor's views refuse what follows
                output = output.index_add_(-1, rows.indices, change)  # for its gradients
            with torch.no_grad():
                put(output, new, rows.indices, rows.first)  # the exact values
        if output.requires_grad and not torch.compiler.is_compiling():
            assert output.grad_fn is not None  # read once: torch 2.13's register_hook on a changed view crashes else
        return output


def can_override(module: nn.Module, site: Site, indices: torch.Tensor) -> bool:
    """Whether the override of a site gives what its module would give with the rows in its weight.

    The standard modules are known to. Any other, or one whose forward was replaced, is tried on the current rows, for
    which both must agree; the trial runs on a copy with its own buffers, so that it leaves no trace.
    """
    if site.role == "input" and isinstance(module, nn.Embedding):
        if module.scale_grad_by_freq:
            return False  # counts of the whole batch, which the twin does not see
        if type(module).forward is nn.Embedding.forward and not _is_wrapped(module):
            return True
    if site.role == "output":
        if type(module).forward is nn.Linear.forward and not _is_wrapped(module) and not site.transposed:
            return True
        if type(module).forward is not nn.Linear.forward and type(module).__name__ != "Conv1D":
            return False  # what a head of another class does, one trial does not show
    return _agrees(module, site, indices)


@torch.no_grad()
def _agrees(module: nn.Module, site: Site, indices: torch.Tensor) -> bool:
    weight = module._parameters[site.parameter]
    if weight is None or weight.device.type == "meta":
        return False
    table = weight.t() if site.transposed else weight
    small = rows_at(table, indices)
    trial = _without_hooks(module)
    trial.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    try:
        if site.role == "input":
            # between ours stand other rows, so that a lookup which mixes its rows is found out
            place = torch.arange(indices.numel(), device=indices.device)
            among = torch.stack([indices, indices.flip(0).add(1) % table.shape[0]], dim=1).reshape(1, -1)
            full = trial(among)[:, ::2]
            new = _call(_twin(trial, site.parameter), site.parameter, small, (place.unsqueeze(0),), {})
        else:
            hidden = torch.linspace(-1, 1, table.shape[1], device=table.device, dtype=table.dtype).unsqueeze(0)
            bias = getattr(module, "bias", None)
            full = trial(hidden)
            same_shape = isinstance(full, torch.Tensor) and full.shape == (1, table.shape[0])
            full = full.index_select(-1, indices) if same_shape else None
            new = F.linear(hidden, small, None if bias is None else rows_at(bias, indices))
    except Exception:  # whatever a module of unknown kind says to a call it did not expect
        return False
    if not isinstance(full, torch.Tensor) or not isinstance(new, torch.Tensor) or full.shape != new.shape:
        return False
    return torch.equal(full, new) if site.role == "input" else torch.allclose(full, new, rtol=1e-3, atol=1e-5)


_HOOKS = tuple(
    name
    for name in nn.Module().__dict__
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name
)


def held(module: nn.Module, parameter: str) -> nn.Parameter:
    """A module's parameter as it is now: wrappers may have replaced the object since the model was walked."""
    value = module._parameters[parameter]
    assert value is not None
    return value


def drown(module: nn.Module, site: Site, indices: torch.Tensor) -> bool:
    """Whether what a head's rows hold that are replaced would be left in the gradient of its input.

    The gradient of a column that is replaced is what came through the old row, and the change from it. Where the old
    row is no number, or far larger than the rows of the table are, the sum is not what the new row gives. Spare rows
    of a table may never have been initialised. Of a sharded table other rows are not asked for, which would go round
    all ranks.
    """
    weight = held(module, site.parameter).detach()
    if site.role != "output" or weight.device.type == "meta" or not weight.is_floating_point():
        return False
    table = weight.t() if site.transposed else weight
    old = rows_at(table, indices)
    if not bool(torch.isfinite(old).all()):
        return True
    if is_sharded(table):
        return False
    some = torch.arange(0, table.shape[0], max(table.shape[0] // _SAMPLE, 1), device=indices.device)
    others = rows_at(table, some[~torch.isin(some, indices)])
    sizes = others[torch.isfinite(others).all(dim=1)].abs().amax(dim=1).float()
    usual = float(sizes.quantile(0.9)) if sizes.numel() else 0.0  # most rows may be all but zero
    return usual > 0 and float(old.abs().max()) > _FAR * usual


_SAMPLE = 256
"""Rows of a table that tell of what size its rows are."""

_FAR = 64
"""How many times a usual row's largest entry makes a row far larger: what is left of it is then of the size of one
rounding in bfloat16, and of far less than one in fp32."""


def _is_wrapped(module: nn.Module) -> bool:
    """Whether the object has a forward of its own, over its class's: Accelerate and transformers' parallelism do so."""
    return "forward" in module.__dict__


def _without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy that runs the module's forward and none of its hooks."""
    bare = object.__new__(type(module))  # FSDP2's classes make something else of copy.copy
    bare.__dict__.update(module.__dict__)
    bare.__dict__.update({name: OrderedDict() for name in _HOOKS})
    for name in module._parameters:
        bare.__dict__.pop(name, None)  # what is laid over a weight is for the module alone
    return bare


def _twin(module: nn.Module, parameter: str) -> nn.Module:
    """A shallow copy that shares buffers and submodules, has no hooks and no padding row, and holds no table."""
    twin = _without_hooks(module)
    twin.__dict__.pop("forward", None)  # it would run the module, with its own table
    twin.__dict__["_parameters"] = {**module._parameters, parameter: nn.Parameter(torch.empty(0), requires_grad=False)}
    if getattr(module, "padding_idx", None) is not None:
        twin.padding_idx = None  # type: ignore[assignment]
    return twin


def _call(twin: nn.Module, parameter: str, weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.func.functional_call(twin, {parameter: weight}, args, kwargs)


def _split_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any, Any]:
    """The token ids of a lookup's call, and how to make the same call with other ids."""
    if args:
        rest = args[1:]
        return args[0], lambda ids: (ids, *rest), lambda ids: kwargs
    name = next(iter(kwargs))
    return kwargs[name], lambda ids: (), lambda ids: {**kwargs, name: ids}


def holders(
    model: nn.Module, names: Sequence[str], transposed: frozenset[str]
) -> Iterator[tuple[nn.Module, str, bool]]:
    """(module, parameter name, transposed) for each parameter name of a table, each module once."""
    seen = set()
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = submodule(model, path)
        if (id(module), leaf) not in seen:
            seen.add((id(module), leaf))
            yield module, leaf, name in transposed
