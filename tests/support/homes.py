"""The kinds of data that stores are opened over, for tests that run over every store.

A `Home` makes a `Case`: a small model in one layout and dtype, as a state dict, a module or files. A case opens stores
over its data, and reads the data with torch or the safetensors library, never with embedsurgery. A new store adds one
`Home` here.
"""

from __future__ import annotations

import json
import resource
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from embedsurgery.stores.modules import module_store
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.state_dicts import state_dict_store
from embedsurgery.stores.store import Store

V, D, W = 11, 6, 9
EMBED, HEAD, LAST = "model.embed_tokens.weight", "lm_head.weight", "model.z_emb.weight"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = tuple(DTYPES)


def patterns(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return random bit patterns: numbers of all magnitudes, subnormals, infinities, NaNs with payloads."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def tensors(
    layout: str, dtype: torch.dtype, rows: int = V, width: int = D, *, bias: bool = True
) -> dict[str, torch.Tensor]:
    """Return the tensors of the model. Ties share their memory, except in the layout "twice", which has equal copies.

    The names are chosen so that `LAST` is the last table in a file, after a filler.
    """
    embed = patterns((rows, width), dtype, 1)
    head = {
        "untied": lambda: patterns((rows, width), dtype, 2),
        "tied": lambda: embed,
        "two parameters": lambda: embed.view(embed.shape),
        "twice": lambda: embed.clone(),
        "transposed": lambda: embed.t(),
        "head only": lambda: embed,
    }[layout]()
    return {
        HEAD: head,
        **({"lm_head.bias": patterns((rows,), dtype, 3)} if bias else {}),
        EMBED: embed,
        "model.filler.weight": patterns((8 * rows, width), dtype, 4),
        "model.norm.weight": patterns((width,), dtype, 5),
        LAST: patterns((W, width), dtype, 6),
    }


class Case(ABC):
    """A small model in one home.

    Attributes:
        table: Name of the main table in the store's graph.
        stored: Names of the tensors with the main table, in what `read` returns.
        transposed: Those of them that are (D, V).
    """

    table: str = EMBED
    stored: tuple[str, ...]
    transposed: frozenset[str] = frozenset()

    @abstractmethod
    def store(self) -> Store:
        """Open a new store over the current data."""

    @abstractmethod
    def read(self) -> dict[str, torch.Tensor]:
        """Read copies of all tensors."""

    @abstractmethod
    def identity(self) -> object:
        """Return everything that an edit of rows must not change: memory, objects, headers, other files."""

    @abstractmethod
    @contextmanager
    def make_last_read_only(self) -> Iterator[None]:
        """Make writes to the table `LAST` fail inside the block. Everything can still be read."""
        yield

    def expect_edited(
        self, before: Mapping[str, torch.Tensor], indices: Any, rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return what `read` must return after rows of the main table were set."""
        after = {name: tensor.clone() for name, tensor in before.items()}
        for name in self.stored:
            view = after[name].t() if name in self.transposed else after[name]
            view[torch.tensor(list(indices), dtype=torch.int64)] = rows.to(view.dtype)
        return after


class Home(ABC):
    """A kind of data that a store is opened over."""

    layouts: tuple[str, ...]
    """The layouts that it supports."""

    @abstractmethod
    def make(self, folder: Path, layout: str, dtype: torch.dtype, **shape: int) -> Case:
        """Make a case. ``shape`` may have ``rows``, ``width``, and ``bias=False`` for a head without bias."""

    @abstractmethod
    def make_store(self, folder: Path, table: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> Store:
        """Open a store with one table `EMBED` of any dtype, and other tensors by name."""


class Conv1D(nn.Module):
    """A projection that is stored as (D, V), like transformers' class of this name."""


class Model(nn.Module):
    """A model with ``get_input_embeddings``."""

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(EMBED.rpartition(".")[0])


def module_of(values: Mapping[str, torch.Tensor]) -> nn.Module:
    """Make a model over the memory of the values. One tensor under two names is one parameter."""
    root = Model()
    root.model = nn.Module()
    parameters: dict[int, nn.Parameter] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        above, _, last = path.rpartition(".")
        parent = root.get_submodule(above)
        if last not in parent._modules:
            parent.add_module(last, _make_module(last, tuple(value.shape), turned=value.shape == (D, V)))
        parameter = parameters.setdefault(id(value), nn.Parameter(value, requires_grad=value.is_floating_point()))
        parent.get_submodule(last)._parameters[leaf] = parameter
    return root


def _make_module(last: str, shape: tuple[int, ...], *, turned: bool) -> nn.Module:
    """Make a module without parameters, of the class that its name suggests, with the sizes of that class."""
    if last in ("embed_tokens", "z_emb"):
        module: nn.Module = nn.Embedding(*shape[:2], _weight=torch.empty(shape[:2])) if len(shape) == 2 else nn.Module()
    elif last == "lm_head" and turned:
        module = Conv1D()
        module.nx, module.nf = shape
    elif last == "lm_head":
        module = nn.Linear(1, 1)
        module.out_features, module.in_features = shape[0], shape[-1]
    else:
        module = nn.Module()
    module._parameters.clear()
    return module


class ReadOnly(torch.Tensor):
    """A tensor subclass that can be read and not written."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__setitem__", "copy_", "index_copy_", "index_put_"):
            raise NotImplementedError("this tensor is read-only")
        return super().__torch_function__(func, types, args, kwargs or {})


class MemoryCase(Case):
    """Named tensors, edited in place."""

    def __init__(self, values: dict[str, torch.Tensor], layout: str) -> None:
        self.values = values
        self.stored = (EMBED,) if layout == "untied" else (EMBED, HEAD)
        self.transposed = frozenset({HEAD} if layout == "transposed" else ())

    def store(self) -> Store:
        return state_dict_store(self.values)

    def read(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.values.items()}

    def identity(self) -> object:
        return {n: (id(v), v.data_ptr(), v.shape, v.stride(), v.requires_grad) for n, v in self.values.items()}

    @contextmanager
    def make_last_read_only(self) -> Iterator[None]:
        self.values[LAST] = self.values[LAST].detach().clone().as_subclass(ReadOnly)
        yield


class ModuleCase(MemoryCase):
    """The parameters of a plain model."""

    def __init__(self, values: dict[str, torch.Tensor], layout: str) -> None:
        self.model = module_of(values)
        super().__init__(dict(self.model.named_parameters(remove_duplicate=False)), layout)

    def store(self) -> Store:
        return module_store(self.model)

    def read(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters(remove_duplicate=False)}

    @contextmanager
    def make_last_read_only(self) -> Iterator[None]:
        with super().make_last_read_only():
            self.model.get_submodule("model.z_emb")._parameters["weight"] = nn.Parameter(self.values[LAST])
            yield


class FileCase(Case):
    """The safetensors files of a checkpoint directory."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.folder = folder
        self.stored = {"twice": (EMBED, HEAD), "head only": (HEAD,)}.get(layout, (EMBED,))
        self.table = self.stored[0]

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def store(self) -> Store:
        return ShardStore.open(self.folder)

    def read(self) -> dict[str, torch.Tensor]:
        # Cloned, because the library may return a memory map of the file.
        return {name: value.clone() for file in self.files() for name, value in load_file(file).items()}

    def identity(self) -> object:
        headers = {}
        for file in self.files():
            data = file.read_bytes()
            headers[file.name] = (data[: 8 + int.from_bytes(data[:8], "little")], len(data))
        small = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.suffix != ".safetensors"}
        return headers, small

    @contextmanager
    def make_last_read_only(self) -> Iterator[None]:
        data = self.files()[-1].read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        begin = size + json.loads(data[8:size])[LAST]["data_offsets"][0]
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (begin, hard))  # as on a full disk
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class StateDictHome(Home):
    layouts = ("untied", "tied", "two parameters", "twice", "transposed")

    def make(self, folder: Path, layout: str, dtype: torch.dtype, **shape: int) -> Case:
        return MemoryCase(tensors(layout, dtype, **shape), layout)

    def make_store(self, folder: Path, table: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> Store:
        return state_dict_store({EMBED: table, **(beside or {})})


class ModuleHome(Home):
    layouts = ("untied", "tied", "two parameters", "transposed")

    def make(self, folder: Path, layout: str, dtype: torch.dtype, **shape: int) -> Case:
        return ModuleCase(tensors(layout, dtype, **shape), layout)

    def make_store(self, folder: Path, table: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> Store:
        return module_store(module_of({EMBED: table, **(beside or {})}))


class FileHome(Home):
    """A checkpoint in one file, or in two shards with the head in the first."""

    layouts = ("untied", "tied", "twice", "head only")

    def __init__(self, *, shards: bool) -> None:
        self.shards = shards

    def make(self, folder: Path, layout: str, dtype: torch.dtype, **shape: int) -> Case:
        values = tensors(layout, dtype, **shape)
        if layout in ("tied", "head only"):
            del values[HEAD if layout == "tied" else EMBED]
        self._write(folder, values, tied=layout != "untied")
        return FileCase(folder, layout)

    def make_store(self, folder: Path, table: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> Store:
        self._write(folder, {EMBED: table, **(beside or {})}, tied=True)
        return ShardStore.open(folder)

    def _write(self, folder: Path, values: Mapping[str, torch.Tensor], *, tied: bool) -> None:
        rows = next(v.shape[0] for k, v in values.items() if k in (EMBED, HEAD))
        config = {"architectures": ["LlamaForCausalLM"], "vocab_size": rows, "tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(config))
        first = {name: value for name, value in values.items() if self.shards and name.startswith("lm_head")}
        second = {name: value for name, value in values.items() if name not in first}
        parts = {f"model-{n}.safetensors": p for n, p in ((1, first), (2, second)) if p}
        if not self.shards:
            parts = {"model.safetensors": second}
        for name, part in parts.items():
            save_file({k: v.contiguous() for k, v in part.items()}, folder / name, {"format": "pt"})
        if self.shards:
            total = sum(v.numel() * v.itemsize for v in values.values())
            body = {"metadata": {"total_size": total}, "weight_map": {k: n for n, p in parts.items() for k in p}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(body))


HOMES: dict[str, Home] = {
    "state dict": StateDictHome(),
    "module": ModuleHome(),
    "file": FileHome(shards=False),
    "shards": FileHome(shards=True),
}
