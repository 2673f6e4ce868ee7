"""Mistakes in a plugin are reported as the plugin's, with the function's name, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import CheckpointError, EmbedSurgeryError, PlanError, PluginError
from embedsurgery.initializers import Initializer, InitializerRecord
from embedsurgery.plan import Plan, SetRows
from embedsurgery.plugins.hookspecs import CommandRecord, StoreRecord
from embedsurgery.surgeries.surgery import RowOverride, SurgeryRecord
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
from embedsurgery.testing import TinyModel, contents, installed, write_checkpoint
from embedsurgery.testing.models import INPUT, state_bits
from tests.support.errors import raises


@dataclass(frozen=True)
class Config(es.TrainableTokensConfig):
    """The config of the surgeries below."""


class Rows(TrainableTokens):
    name = "rows"


def plugin(**hooks: Any) -> ModuleType:
    module = ModuleType("a_plugin_of_mistakes")
    for name, record in hooks.items():
        setattr(module, f"embedsurgery_{name}", es.hookimpl(lambda record=record: [record]))
    return module


def surgery(**methods: Any) -> ModuleType:
    kind = type("Mistaken", (Rows,), methods)
    return plugin(surgeries=SurgeryRecord("rows", Config, kind(), "ROWS"))


def starting(change: Callable[[Adapter], Any]) -> Any:
    return lambda self, config, store, base: change(Rows.start(self, config, store, base))


def of_manifest(**parts: Any) -> Any:
    return starting(lambda adapter: replace(adapter, manifest=replace(adapter.manifest, **parts)))


def of_raw(change: Callable[[Any], Any]) -> Any:
    return starting(lambda a: replace(a, raw={name: change(raw) for name, raw in a.raw.items()}))


def lives(*overrides: Any) -> Any:
    return lambda self, adapter, located: overrides


def plans(*edits: Any) -> Any:
    return lambda self, adapter, located: Plan(tuple(edit(adapter.raw[INPUT]) for edit in edits))


def fails(self: Any, *arguments: Any) -> Any:
    raise KeyError("rows")


AT_ATTACHING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no adapter": (
        {"start": starting(lambda adapter: None)},
        {"where": "rows.start", "expected": "Adapter", "found": "NoneType"},
    ),
    "an array": (
        {"start": of_raw(lambda raw: raw.bits)},
        {"where": "rows.start", "expected": "RawArray", "found": "ndarray"},
    ),
    "a torch tensor": (
        {"start": of_raw(lambda raw: torch.zeros(3, 8))},
        {"where": "rows.start", "expected": "RawArray", "found": "Tensor"},
    ),
    "too few rows": (
        {"start": of_raw(lambda raw: raw.take([0]))},
        {"where": "rows.live", "expected": "1", "found": "3"},
    ),
    "no tensors": (
        {"start": starting(lambda a: replace(a, raw={}))},
        {"where": "rows.start", "expected": "tensors", "found": "none"},
    ),
    "another's adapter": (
        {"start": of_manifest(surgery="other")},
        {"where": "rows.start", "expected": "rows", "found": "other"},
    ),
    "no table": ({"start": of_manifest(tables=())}, {"where": "rows.start", "expected": "TableRecord", "found": "()"}),
    "not JSON": (
        {"start": of_manifest(config={"rows": {1, 2}})},
        {"where": "rows.start", "expected": None, "found": "TypeError"},
    ),
    "start fails": ({"start": fails}, {"where": "rows.start", "expected": None, "found": "KeyError: 'rows'"}),
    "nothing live": (
        {"live": lambda self, adapter, located: None},
        {"where": "rows.live", "expected": "RowOverride", "found": "NoneType"},
    ),
    "a name live": ({"live": lives(INPUT)}, {"where": "rows.live", "expected": "RowOverride", "found": "str"}),
    "no such tensor": (
        {"live": lives(RowOverride(INPUT, "rows", (3, 17, 5)))},
        {"where": "rows.live", "expected": ("tensor", INPUT), "found": "rows"},
    ),
    "no such table": (
        {"live": lives(RowOverride("rows", INPUT, (3, 17, 5)))},
        {"where": "rows.live", "expected": ("table", INPUT), "found": "rows"},
    ),
    "a row beyond": (
        {"live": lives(RowOverride(INPUT, INPUT, (3, 17, 99)))},
        {"where": "rows.live", "expected": "0 to 23", "found": "[99]"},
    ),
    "a row twice": (
        {"live": lives(RowOverride(INPUT, INPUT, (3, 17, 17)))},
        {"where": "rows.live", "expected": "0 to 23", "found": "(3, 17, 17)"},
    ),
    "live fails": ({"live": fails}, {"where": "rows.live", "expected": None, "found": "KeyError"}),
}
AT_MERGING: dict[str, tuple[dict[str, Any], type[EmbedSurgeryError], dict[str, Any]]] = {
    "no plan": (
        {"plan": lambda self, adapter, located: None},
        PluginError,
        {"where": "rows.plan", "expected": "Plan", "found": "NoneType"},
    ),
    "edits alone": (
        {"plan": lambda self, adapter, located: (SetRows,)},
        PluginError,
        {"where": "rows.plan", "expected": "Plan", "found": "tuple"},
    ),
    "one edit": (
        {"plan": lambda self, a, located: Plan(SetRows(INPUT, (1,), a.raw[INPUT]))},
        PluginError,
        {"where": "rows.plan", "expected": "Plan", "found": "SetRows"},
    ),
    "no edit": (
        {"plan": plans(lambda raw: "rows")},
        PluginError,
        {"where": "rows.plan", "expected": "SetRows", "found": "str"},
    ),
    "a row beyond": (
        {"plan": plans(lambda raw: SetRows(INPUT, (3, 17, 99), raw))},
        PlanError,
        {"expected": "0 to 23", "found": "99"},
    ),
    "a row before": (
        {"plan": plans(lambda raw: SetRows(INPUT, (3, 17, -1), raw))},
        PlanError,
        {"expected": "0 to 23", "found": "-1"},
    ),
    "too few rows": (
        {"plan": plans(lambda raw: SetRows(INPUT, (3, 17, 5), raw.take([0])))},
        PlanError,
        {"where": INPUT, "expected": "3", "found": "1"},
    ),
    "an array": (
        {"plan": plans(lambda raw: SetRows(INPUT, (3, 17, 5), raw.bits))},
        PluginError,
        {"where": "rows.plan", "expected": "RawArray", "found": "ndarray"},
    ),
    "texts for rows": (
        {"plan": plans(lambda raw: SetRows(INPUT, ("3", "17", "5"), raw))},
        PluginError,
        {"where": "rows.plan", "expected": "integers", "found": "'3'"},
    ),
    "no such table": (
        {"plan": plans(lambda raw: SetRows("rows", (3, 17, 5), raw))},
        PlanError,
        {"expected": "rows", "found": INPUT},
    ),
    "plan fails": ({"plan": fails}, PluginError, {"where": "rows.plan", "expected": None, "found": "KeyError"}),
}
AT_SAVING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no files": (
        {"to_peft": lambda self, adapter: {}},
        {"where": "rows.to_peft", "expected": "PeftFiles", "found": "dict"},
    ),
    "an array": (
        {"to_peft": lambda self, a: replace(Rows.to_peft(self, a), tensors={"x": a.raw[INPUT].bits})},
        {"where": "rows.to_peft", "expected": "x as a RawArray", "found": "ndarray"},
    ),
    "not JSON": (
        {"to_peft": lambda self, a: replace(Rows.to_peft(self, a), config={"x": {1}})},
        {"where": "rows.to_peft", "expected": "JSON", "found": "set"},
    ),
    "to_peft fails": ({"to_peft": fails}, {"where": "rows.to_peft", "expected": None, "found": "KeyError"}),
}
AT_LOADING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing filled": (
        {"from_files": lambda self, files, adapter: files.tensors},
        {"where": "rows.from_files", "expected": "Adapter", "found": "dict"},
    ),
    "not filled": (
        {"from_files": lambda self, files, adapter: adapter},
        {"where": "rows.from_files", "expected": "tensors", "found": "none"},
    ),
    "from_files fails": ({"from_files": fails}, {"where": "rows.from_files", "expected": None, "found": "KeyError"}),
}


@pytest.mark.parametrize("name", AT_ATTACHING)
def test_at_attaching(name: str) -> None:
    methods, fields = AT_ATTACHING[name]
    model = TinyModel()
    before = state_bits(model)
    with installed(surgery(**methods)), raises(PluginError, **fields):
        es.attach(model, Config([3, 17, 5]))
    assert (es.get_attachment(model), state_bits(model)) == (None, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", AT_MERGING)
def test_at_merging(name: str, tmp_path: Path) -> None:
    """In memory by either way, and on disk."""
    methods, kind, fields = AT_MERGING[name]
    model = TinyModel()
    before, base = state_bits(model), write_checkpoint(model, tmp_path / "base")
    with installed(surgery(**methods)):
        attachment = es.attach(model, Config([3, 17, 5]))
        adapter = attachment.adapter()
        with raises(kind, **fields):
            attachment.merge()
        attachment.detach()
        for act in (
            lambda: es.merge(model, adapter),
            lambda: es.merge_checkpoint(base, adapter, tmp_path / "out"),
            lambda: es.merge_checkpoint(base, adapter, in_place=True),
        ):
            with raises(kind, **fields):
                act()
    assert state_bits(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert contents(base) == contents(write_checkpoint(model, tmp_path / "again"))


@pytest.mark.parametrize("name", [*AT_SAVING, *AT_LOADING])
def test_at_saving_and_loading(name: str, tmp_path: Path) -> None:
    methods, fields = {**AT_SAVING, **AT_LOADING}[name]
    with installed(surgery()):
        adapter = es.attach(TinyModel(), Config([3, 17, 5])).adapter()
        adapter.save(tmp_path / "adapter")
    with installed(surgery(**methods)) as known:
        mistaken = replace(adapter, surgery=known.find_surgery("rows").surgery)
        with raises(PluginError, **fields):
            mistaken.save(tmp_path / "other") if name in AT_SAVING else es.load(tmp_path / "adapter")
    assert not (tmp_path / "other").exists()


def test_lists_and_numpy_integers_are_accepted(tmp_path: Path) -> None:
    live = lambda self, adapter, located: [RowOverride(INPUT, INPUT, (3, 17, 5))]  # noqa: E731
    for indices in ([3, 17, 5], np.array([3, 17, 5])):
        plan = lambda self, a, located: Plan([SetRows(INPUT, indices, a.raw[INPUT])])  # noqa: E731, B023
        model = TinyModel()
        base = write_checkpoint(model, tmp_path / f"base{type(indices).__name__}")
        before = state_bits(model)
        with installed(surgery(live=live, plan=plan)):
            attachment = es.attach(model, Config([3, 17, 5]))
            with torch.no_grad():
                next(attachment.parameters()).fill_(7)
            adapter = attachment.adapter()
            attachment.detach()
            undo = es.merge(model, adapter)
            assert np.flatnonzero((model.lm_head.weight.detach() == 7).all(1)).tolist() == [3, 5, 17]
            es.unmerge(model, undo)
            assert state_bits(model) == before
            out = tmp_path / f"out{type(indices).__name__}"
            es.merge_checkpoint(base, adapter, out)
            merged = load_file(out / "model.safetensors")[INPUT]
            assert np.flatnonzero((merged == 7).all(1)).tolist() == [3, 5, 17]


ROWS_EXPECTED = {"where": "wrong", "expected": ("float32", "float64", "(1, 8)")}


class Starts(Initializer):
    """An initialiser with one fault."""

    def __init__(self, **methods: Any) -> None:
        vars(self).update(methods)

    def rows(self, *arguments: Any) -> Any:
        return np.zeros((1, 8))


@pytest.mark.parametrize(
    ("methods", "fields"),
    [
        ({"rows": lambda *a: None}, {**ROWS_EXPECTED, "found": "NoneType"}),
        ({"rows": lambda *a: [[0.0] * 8]}, {**ROWS_EXPECTED, "found": "list"}),
        ({"rows": lambda *a: np.zeros(8)}, {**ROWS_EXPECTED, "found": "float64 (8,)"}),
        ({"rows": lambda *a: np.zeros((1, 8), int)}, {**ROWS_EXPECTED, "found": "int64"}),
        ({"rows": lambda *a: torch.zeros(1, 8)}, {**ROWS_EXPECTED, "found": "Tensor"}),
        ({"rows": lambda *a: {}["x"]}, {"where": "wrong.rows", "expected": None, "found": "KeyError"}),
        ({"ask": lambda *a: "t1"}, {"where": "wrong.ask", "expected": "Ask", "found": "str"}),
        ({"ask": lambda *a: {}["x"]}, {"where": "wrong.ask", "expected": None, "found": "KeyError"}),
    ],
)
def test_an_initialiser(methods: Mapping[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    base = write_checkpoint(TinyModel(), tmp_path / "base")
    record = InitializerRecord("wrong", Starts(**methods))
    with installed(plugin(initializers=record)), raises(PluginError, **fields):
        es.add_tokens_checkpoint(base, "new", tmp_path / "out", init="wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("opens", "fields"),
    [
        (
            lambda directory, architectures: None,
            {"where": "wrong.open", "expected": "Store", "found": "NoneType"},
        ),
        (lambda directory, architectures: {}["x"], {"where": "wrong.open", "expected": None, "found": "KeyError"}),
    ],
)
def test_a_store(opens: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    base = write_checkpoint(TinyModel(), tmp_path / "base")
    adapter = es.attach(TinyModel(), es.TrainableTokensConfig([3])).adapter()
    (base / "model.safetensors").rename(base / "model.wrong")
    record = StoreRecord("wrong", lambda directory: (directory / "model.wrong").exists(), opens)
    with installed(plugin(stores=record)):
        for act in (lambda: es.walk(base), lambda: es.merge_checkpoint(base, adapter, tmp_path / "out")):
            with raises(PluginError, **fields):
                act()
    with pytest.raises(CheckpointError):
        es.walk(base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


class Loose:
    """Not a dataclass."""


@dataclass
class Mutable:
    """A dataclass that is not frozen."""


@pytest.mark.parametrize(
    ("hook", "record", "named"),
    [
        ("surgeries", SurgeryRecord("rows", Loose, Rows(), "ROWS"), ("config_class", "Loose")),
        ("surgeries", SurgeryRecord("rows", Mutable, Rows(), "ROWS"), ("config_class", "Mutable")),
        ("surgeries", SurgeryRecord("rows", Config, Rows, "ROWS"), ("surgery", "Surgery: Rows")),  # type: ignore[arg-type]
        ("surgeries", SurgeryRecord("row", Config, Rows(), "ROWS"), ("surgery.name", "'rows'")),
        ("surgeries", SurgeryRecord("rows", Config, Rows(), ""), ("peft_type",)),
        ("surgeries", SurgeryRecord("rows", Config, Rows(), "R", {"rows"}), ("shares_model_with", "frozenset")),  # type: ignore[arg-type]
        ("initializers", InitializerRecord("a b", Starts()), ("name", "space")),
        ("initializers", InitializerRecord("a", Starts), ("initializer", "Initializer: Starts")),  # type: ignore[arg-type]
        ("commands", CommandRecord("A_B", "Does.", lambda: None), ("name", "hyphens")),  # type: ignore[arg-type, return-value]
        ("commands", CommandRecord("a", "", lambda: None), ("summary",)),  # type: ignore[arg-type, return-value]
        ("stores", StoreRecord("a", None, None), ("recognises",)),  # type: ignore[arg-type]
    ],
)
def test_the_fault_of_a_record_is_named(hook: str, record: Any, named: tuple[str, ...]) -> None:
    hook_and_record = (f"embedsurgery_{hook}", type(record).__name__, repr(record.name))
    with raises(PluginError, found=(*hook_and_record, *named)), installed(plugin(**{hook: record})):
        pass
