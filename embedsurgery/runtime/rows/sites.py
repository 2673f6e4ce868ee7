"""Hooks at sites: a lookup or a projection uses trained rows, without a copy of the table.

A lookup runs unchanged; then the rows of overridden tokens are looked up in a *twin* of the module, a shallow copy
over the small table, so that scales and all else of a subclass are right. A projection runs unchanged; then the
overridden columns are replaced in its logits. The hooks run before all other forward hooks, so users' hooks see what
they would see on a merged model. The live rows are a list that the attachment fills.

A module that cannot be overridden in this way has its weight covered by a full copy: ``overlays.py``.
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
from embedsurgery.runtime.rows.columns import can_replace, new_columns, replace_columns, write_columns
from embedsurgery.runtime.rows.mixing import Batch
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sharded import call_on_plain, plain_rows
from embedsurgery.runtime.rows.sliced_head import make_sliced_weight, remove_sliced_weight, take_sliced_flag
from embedsurgery.runtime.rows.sparse_lookup import is_transformed, values_for_head
from embedsurgery.runtime.rows.whole_tables import TableRows, select_rows
from embedsurgery.tensors.sharded import gather_rows, is_sharded


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
            return call_on_plain(self, module, args, kwargs, output)
        plain = type(module).forward is nn.Embedding.forward
        twin = self.twin
        if self.live and not plain and not torch.compiler.is_compiling():
            twin = _twin(module, self.parameter)  # with the module's present mode, scale and so on
        for rows in self.live:
            ids, args_of, kwargs_of = _split_ids(args, kwargs)
            if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
                raise UnsupportedError(
                    "a lookup must get token ids",
                    where=self.where or "root",
                    expected="integers",
                    found=getattr(ids, "dtype", type(ids).__name__),
                    hint="use attach(..., materialize=True), which gives the lookup the whole table",
                )
            place, is_overridden, small = select_rows(rows, ids, parameter_of(module, self.parameter))
            if rows.samples is not None:
                is_overridden = is_overridden & self.batch.mask(rows.samples, ids)
            if plain:
                new = F.embedding(place, small, sparse=module.sparse)  # type: ignore[arg-type]
            else:
                new = _call(twin, self.parameter, small, args_of(place), kwargs_of(place))
            output = torch.where(is_overridden.unsqueeze(-1), new, output)
        return output


class Projection:
    """Forward hook of a projection to logits: ``nn.Linear`` and modules that compute the same.

    Its pre-hook `enter` may have many consecutive rows computed by the module itself: see ``sliced_head.py``.
    """

    def __init__(self, module: nn.Module, site: Site, live: list[Rows], batch: Batch) -> None:
        self.site = site
        self.live = live
        self.batch = batch

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Pre-hook."""
        take_sliced_flag()  # an interrupted forward may have left it set
        cover = make_sliced_weight(module, parameter_of(module, self.site.parameter), self.live)
        if cover is not None:
            module.__dict__[self.site.parameter] = cover

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the logits with the live columns. It runs after an exception, too, without an output."""
        remove_sliced_weight(module, self.site.parameter)
        if take_sliced_flag() or output is None:
            return output
        if self.live and is_sharded(output):
            return call_on_plain(self, module, args, kwargs, output)
        for rows in self.live:
            hidden = args[0] if args else next(iter(kwargs.values()))
            table = parameter_of(module, self.site.parameter)
            weight = table.t() if self.site.transposed else table
            if isinstance(rows, TableRows):
                new = rows.project(hidden, output, weight)
                output = (
                    new if rows.samples is None else torch.where(self.batch.mask(rows.samples, output), new, output)
                )
                continue
            bias = getattr(module, "bias", None)  # may be a buffer, or parametrised
            small_bias = None if bias is None else gather_rows(bias, rows.indices)
            small = plain_rows(values_for_head(rows)).to(weight.dtype)
            if is_transformed() and not is_sharded(weight):  # right for derivatives of every order and mode
                new = F.linear(hidden, small, small_bias).to(output.dtype)
                if rows.samples is not None:
                    old = output.index_select(-1, rows.indices)
                    new = torch.where(self.batch.mask(rows.samples, output), new, old)
                output = output.index_copy(-1, rows.indices, new)
                continue
            any_grad = hidden.requires_grad or small.requires_grad or output.requires_grad
            needs_grad = torch.is_grad_enabled() and any_grad
            base_is_frozen = not weight.requires_grad and not is_sharded(weight)
            if needs_grad and base_is_frozen and rows.samples is None and can_replace(output):
                output = replace_columns(output, hidden, small, weight, rows.indices, rows.run_start, small_bias)
                continue
            if needs_grad and base_is_frozen:
                new = change = new_columns(hidden, small, weight, rows.indices, small_bias).to(output.dtype)
            else:
                new = change = F.linear(hidden, small, small_bias).to(output.dtype)
                if needs_grad:
                    change = new - F.linear(hidden, gather_rows(weight, rows.indices), small_bias).to(output.dtype)
            if rows.samples is not None:
                is_overridden = self.batch.mask(rows.samples, output)
                new = torch.where(is_overridden, new, output.detach().index_select(-1, rows.indices))
                change = torch.where(is_overridden, change, 0) if needs_grad else change
            if needs_grad:
                output = output.clone() if is_sharded(weight) else output  # views of DTensors refuse in-place writes
                output = output.index_add_(-1, rows.indices, change)  # for its gradients
            with torch.no_grad():
                write_columns(output, new, rows.indices, rows.run_start)  # the exact values, without rounding of a sum
        if output.requires_grad and not torch.compiler.is_compiling():
            assert (
                output.grad_fn is not None
            )  # must be read: else torch 2.13 crashes in register_hook() of a changed view
        return output


def can_override(module: nn.Module, site: Site, indices: torch.Tensor) -> bool:
    """Whether overriding a site gives the result of its module with the rows in its weight.

    It does for the standard modules. Other modules, and those whose forward was replaced, are tried with the base's own
    rows, which must change nothing. The trial runs on a copy with its own buffers.
    """
    if site.role == "input" and isinstance(module, nn.Embedding):
        if module.scale_grad_by_freq:
            return False  # it counts tokens in the whole batch, which the twin does not get
        if type(module).forward is nn.Embedding.forward and not _is_wrapped(module):
            return True
    if site.role == "output":
        if type(module).forward is nn.Linear.forward and not _is_wrapped(module) and not site.transposed:
            return True
        if type(module).forward is not nn.Linear.forward and type(module).__name__ != "Conv1D":
            return False  # one trial cannot show what a head of another class does
    return _matches_override(module, site, indices)


@torch.no_grad()
def _matches_override(module: nn.Module, site: Site, indices: torch.Tensor) -> bool:
    weight = module._parameters[site.parameter]
    if weight is None or weight.device.type == "meta":
        return False
    table = weight.t() if site.transposed else weight
    small = gather_rows(table, indices)
    trial = _without_hooks(module)
    trial.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    try:
        if site.role == "input":
            # Other rows stand in between, so that a lookup that mixes neighbouring rows disagrees.
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
            new = F.linear(hidden, small, None if bias is None else gather_rows(bias, indices))
    except Exception:  # a module of an unknown class may raise anything
        return False
    if not isinstance(full, torch.Tensor) or not isinstance(new, torch.Tensor) or full.shape != new.shape:
        return False
    return torch.equal(full, new) if site.role == "input" else torch.allclose(full, new, rtol=1e-3, atol=1e-5)


_HOOKS = tuple(
    name
    for name in nn.Module().__dict__
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name
)


def parameter_of(module: nn.Module, parameter: str) -> nn.Parameter:
    """Return a module's present parameter: wrappers may have replaced the object since the model was walked."""
    value = module._parameters[parameter]
    assert value is not None
    return value


def swamps_gradient(module: nn.Module, site: Site, indices: torch.Tensor) -> bool:
    """Whether a head's old rows would distort the gradient of its input.

    The gradient through a replaced column is the sum of the gradient through the old row and that of the change. If the
    old row is not finite, or far larger than the table's rows, the sum is not the gradient through the new row.
    Spare rows of a table may never have been initialised. The sizes of a sharded table's rows are not compared, because
    reading them takes a collective operation of all ranks.
    """
    weight = parameter_of(module, site.parameter).detach()
    if site.role != "output" or weight.device.type == "meta" or not weight.is_floating_point():
        return False
    table = weight.t() if site.transposed else weight
    old = gather_rows(table, indices)
    if not bool(torch.isfinite(old).all()):
        return True
    if is_sharded(table):
        return False
    some = torch.arange(0, table.shape[0], max(table.shape[0] // _SAMPLE, 1), device=indices.device)
    others = gather_rows(table, some[~torch.isin(some, indices)])
    sizes = others[torch.isfinite(others).all(dim=1)].abs().amax(dim=1).float()
    usual = float(sizes.quantile(0.9)) if sizes.numel() else 0.0  # not the median: most rows may be almost zero
    return usual > 0 and float(old.abs().max()) > _FAR * usual


_SAMPLE = 256
"""Number of rows that show the usual size of a table's rows."""

_FAR = 64
"""A row is far larger if its largest entry is more than this many times that of a usual row. Up to there, the error is
at most about one rounding in bfloat16, and far less in fp32."""


def _is_wrapped(module: nn.Module) -> bool:
    """Whether the object's forward is not its class's: Accelerate and transformers' parallelism replace it."""
    return "forward" in module.__dict__


def _without_hooks(module: nn.Module) -> nn.Module:
    """Return a shallow copy that runs the module's forward without hooks."""
    bare = object.__new__(type(module))  # FSDP2's classes override copy.copy
    bare.__dict__.update(module.__dict__)
    bare.__dict__.update({name: OrderedDict() for name in _HOOKS})
    for name in module._parameters:
        bare.__dict__.pop(name, None)  # a cover of the weight is for the module only
    return bare


def _twin(module: nn.Module, parameter: str) -> nn.Module:
    """Return a shallow copy that shares buffers and submodules, without hooks, padding row and table."""
    twin = _without_hooks(module)
    twin.__dict__.pop("forward", None)  # a replaced forward would run the module with its own table
    twin.__dict__["_parameters"] = {**module._parameters, parameter: nn.Parameter(torch.empty(0), requires_grad=False)}
    if getattr(module, "padding_idx", None) is not None:
        twin.padding_idx = None  # type: ignore[assignment]
    return twin


def _call(twin: nn.Module, parameter: str, weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.func.functional_call(twin, {parameter: weight}, args, kwargs)


def _split_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any, Any]:
    """Return the token ids of a lookup's call, and two functions that give its arguments with other ids."""
    if args:
        rest = args[1:]
        return args[0], lambda ids: (ids, *rest), lambda ids: kwargs
    name = next(iter(kwargs))
    return kwargs[name], lambda ids: (), lambda ids: {**kwargs, name: ids}


def table_holders(
    model: nn.Module, names: Sequence[str], transposed: frozenset[str]
) -> Iterator[tuple[nn.Module, str, bool]]:
    """Yield (module, parameter name, transposed) for each parameter name of a table, each module once."""
    seen = set()
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = submodule(model, path)
        if (id(module), leaf) not in seen:
            seen.add((id(module), leaf))
            yield module, leaf, name in transposed
