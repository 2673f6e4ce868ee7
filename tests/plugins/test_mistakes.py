"""What a plugin's author gets wrong is said as the plugin's fault, by its function's name, and changes nothing."""

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


@dataclass(frozen=True)
class Config(es.TrainableTokensConfig):
    """Asks for rows."""


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


def started(change: Callable[[Adapter], Any]) -> Any:
    return lambda self, config, store, base: change(Rows.start(self, config, store, base))


def of_manifest(**parts: Any) -> Any:
    return started(lambda adapter: replace(adapter, manifest=replace(adapter.manifest, **parts)))


def of_raw(change: Callable[[Any], Any]) -> Any:
    return started(lambda a: replace(a, raw={name: change(raw) for name, raw in a.raw.items()}))


def lives(*overrides: Any) -> Any:
    return lambda self, adapter, located: overrides


def plans(*edits: Any) -> Any:
    return lambda self, adapter, located: Plan(tuple(edit(adapter.raw[INPUT]) for edit in edits))


def fails(self: Any, *arguments: Any) -> Any:
    raise KeyError("rows")


AT_ATTACHING: dict[str, tuple[dict[str, Any], str]] = {
    "no adapter": ({"start": started(lambda adapter: None)}, r"rows.start\): expected Adapter, found NoneType"),
    "an array": ({"start": of_raw(lambda raw: raw.bits)}, "as a RawArray, found ndarray"),
    "a torch tensor": ({"start": of_raw(lambda raw: torch.zeros(3, 8))}, "as a RawArray, found Tensor"),
    "too few rows": ({"start": of_raw(lambda raw: raw.take([0]))}, "has rows, 1, found 3"),
    "no tensors": ({"start": started(lambda a: replace(a, raw={}))}, "with tensors, found none"),
    "another's adapter": ({"start": of_manifest(surgery="other")}, "an adapter of rows, found one of other"),
    "no table": ({"start": of_manifest(tables=())}, "a TableRecord of each table"),
    "no JSON": ({"start": of_manifest(config={"rows": {1, 2}})}, "set is not JSON serializable"),
    "start fails": ({"start": fails}, r"failed \(rows.start\): found KeyError: 'rows'"),
    "nothing live": ({"live": lambda self, adapter, located: None}, "a sequence of RowOverrides, found NoneType"),
    "a name live": ({"live": lives(INPUT)}, "expected RowOverrides, found str"),
    "no such tensor": ({"live": lives(RowOverride(INPUT, "rows", (3, 17, 5)))}, "a tensor of the adapter"),
    "no such table": ({"live": lives(RowOverride("rows", INPUT, (3, 17, 5)))}, "a table of the manifest"),
    "a row beyond": ({"live": lives(RowOverride(INPUT, INPUT, (3, 17, 99)))}, r"0 to 23, each once, found \[99\]"),
    "a row twice": ({"live": lives(RowOverride(INPUT, INPUT, (3, 17, 17)))}, r"each once, found \(3, 17, 17\)"),
    "live fails": ({"live": fails}, "rows.live"),
}
AT_MERGING: dict[str, tuple[dict[str, Any], str]] = {
    "no plan": ({"plan": lambda self, adapter, located: None}, r"rows.plan\): expected Plan, found NoneType"),
    "edits alone": ({"plan": lambda self, adapter, located: (SetRows,)}, "expected Plan, found tuple"),
    "one edit": ({"plan": lambda self, a, located: Plan(SetRows(INPUT, (1,), a.raw[INPUT]))}, "a Plan of a SetRows"),
    "no edit": ({"plan": plans(lambda raw: "rows")}, "edits such as SetRows, found str"),
    "a row beyond": ({"plan": plans(lambda raw: SetRows(INPUT, (3, 17, 99), raw))}, "expected 0 to 23, found 99"),
    "a row before": ({"plan": plans(lambda raw: SetRows(INPUT, (3, 17, -1), raw))}, "expected 0 to 23, found -1"),
    "too few rows": ({"plan": plans(lambda raw: SetRows(INPUT, (3, 17, 5), raw.take([0])))}, "wrong shape"),
    "an array": ({"plan": plans(lambda raw: SetRows(INPUT, (3, 17, 5), raw.bits))}, "as a RawArray, found ndarray"),
    "texts for rows": ({"plan": plans(lambda raw: SetRows(INPUT, ("3", "17", "5"), raw))}, "integers as indices"),
    "no such table": ({"plan": plans(lambda raw: SetRows("rows", (3, 17, 5), raw))}, "not in the store"),
    "plan fails": ({"plan": fails}, "failed .*rows.plan.*KeyError"),
}
AT_SAVING: dict[str, tuple[dict[str, Any], str]] = {
    "no files": ({"to_peft": lambda self, adapter: {}}, r"rows.to_peft\): expected PeftFiles, found dict"),
    "an array": (
        {"to_peft": lambda self, a: replace(Rows.to_peft(self, a), tensors={"x": a.raw[INPUT].bits})},
        "x as a RawArray, found ndarray",
    ),
    "no JSON": ({"to_peft": lambda self, a: replace(Rows.to_peft(self, a), config={"x": {1}})}, "JSON values"),
    "to_peft fails": ({"to_peft": fails}, "rows.to_peft"),
}
AT_LOADING: dict[str, tuple[dict[str, Any], str]] = {
    "nothing filled": ({"from_files": lambda self, files, adapter: files.tensors}, "expected Adapter, found dict"),
    "not filled": ({"from_files": lambda self, files, adapter: adapter}, "with tensors, found none"),
    "from_files fails": ({"from_files": fails}, "rows.from_files"),
}


@pytest.mark.parametrize("name", AT_ATTACHING)
def test_at_attaching(name: str) -> None:
    methods, said = AT_ATTACHING[name]
    model = TinyModel()
    before = state_bits(model)
    with installed(surgery(**methods)), pytest.raises(PluginError, match=said) as caught:
        es.attach(model, Config([3, 17, 5]))
    assert "\n" not in str(caught.value)
    assert (es.get_attachment(model), state_bits(model)) == (None, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", AT_MERGING)
def test_at_merging(name: str, tmp_path: Path) -> None:
    """In memory by either way, and on disk."""
    methods, said = AT_MERGING[name]
    model = TinyModel()
    before, base = state_bits(model), write_checkpoint(model, tmp_path / "base")
    with installed(surgery(**methods)):
        attachment = es.attach(model, Config([3, 17, 5]))
        adapter = attachment.adapter()
        with pytest.raises((PluginError, PlanError), match=said):
            attachment.merge()
        attachment.detach()
        for act in (
            lambda: es.merge(model, adapter),
            lambda: es.merge_checkpoint(base, adapter, tmp_path / "out"),
            lambda: es.merge_checkpoint(base, adapter, in_place=True),
        ):
            with pytest.raises((PluginError, PlanError), match=said):
                act()
    assert state_bits(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert contents(base) == contents(write_checkpoint(model, tmp_path / "again"))


@pytest.mark.parametrize("name", [*AT_SAVING, *AT_LOADING])
def test_at_saving_and_loading(name: str, tmp_path: Path) -> None:
    methods, said = {**AT_SAVING, **AT_LOADING}[name]
    with installed(surgery()):
        adapter = es.attach(TinyModel(), Config([3, 17, 5])).adapter()
        adapter.save(tmp_path / "adapter")
    with installed(surgery(**methods)) as known:
        mistaken = replace(adapter, surgery=known.named("rows").surgery)
        with pytest.raises(PluginError, match=said):
            mistaken.save(tmp_path / "other") if name in AT_SAVING else es.load(tmp_path / "adapter")
    assert not (tmp_path / "other").exists()


def test_lists_and_numpys_integers_are_no_mistake(tmp_path: Path) -> None:
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


class Starts(Initializer):
    """Wrong in one way."""

    def __init__(self, **methods: Any) -> None:
        vars(self).update(methods)

    def rows(self, *arguments: Any) -> Any:
        return np.zeros((1, 8))


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"rows": lambda *a: None}, "expected float32 or float64 .1, 8., found NoneType"),
        ({"rows": lambda *a: [[0.0] * 8]}, "found list"),
        ({"rows": lambda *a: np.zeros(8)}, "found float64 .8,."),
        ({"rows": lambda *a: np.zeros((1, 8), int)}, "found int64"),
        ({"rows": lambda *a: torch.zeros(1, 8)}, "Tensor"),
        ({"rows": lambda *a: {}["x"]}, "failed .wrong.rows.: found KeyError"),
        ({"ask": lambda *a: "t1"}, "an Ask, or None"),
        ({"ask": lambda *a: {}["x"]}, "failed .wrong.ask.: found KeyError"),
    ],
)
def test_an_initialiser(methods: Mapping[str, Any], said: str, tmp_path: Path) -> None:
    base = write_checkpoint(TinyModel(), tmp_path / "base")
    record = InitializerRecord("wrong", Starts(**methods))
    with installed(plugin(initializers=record)), pytest.raises(PluginError, match=said):
        es.add_tokens_checkpoint(base, "new", tmp_path / "out", init="wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("opens", "said"),
    [
        (lambda directory, architectures: None, "expected Store, found NoneType"),
        (lambda directory, architectures: {}["x"], "failed .wrong.open.: "),
    ],
)
def test_a_store(opens: Any, said: str, tmp_path: Path) -> None:
    base = write_checkpoint(TinyModel(), tmp_path / "base")
    adapter = es.attach(TinyModel(), es.TrainableTokensConfig([3])).adapter()
    (base / "model.safetensors").rename(base / "model.wrong")
    record = StoreRecord("wrong", lambda directory: (directory / "model.wrong").exists(), opens)
    with installed(plugin(stores=record)):
        for act in (lambda: es.walk(base), lambda: es.merge_checkpoint(base, adapter, tmp_path / "out")):
            with pytest.raises(PluginError, match=said):
                act()
    with pytest.raises(CheckpointError):
        es.walk(base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


class Loose:
    """No dataclass."""


@dataclass
class Thawed:
    """One that can be changed."""


@pytest.mark.parametrize(
    ("hook", "record", "said"),
    [
        ("surgeries", SurgeryRecord("rows", Loose, Rows(), "ROWS"), "config_class is no frozen dataclass: Loose"),
        ("surgeries", SurgeryRecord("rows", Thawed, Rows(), "ROWS"), "config_class is no frozen dataclass: Thawed"),
        ("surgeries", SurgeryRecord("rows", Config, Rows, "ROWS"), "no instance of a Surgery: Rows"),  # type: ignore[arg-type]
        ("surgeries", SurgeryRecord("row", Config, Rows(), "ROWS"), "the surgery's own name is 'rows'"),
        ("surgeries", SurgeryRecord("rows", Config, Rows(), ""), "peft_type is no text"),
        ("surgeries", SurgeryRecord("rows", Config, Rows(), "R", {"rows"}), "no frozenset"),  # type: ignore[arg-type]
        ("initializers", InitializerRecord("a b", Starts()), "a colon or a space"),
        ("initializers", InitializerRecord("a", Starts), "no instance of an Initializer: Starts"),  # type: ignore[arg-type]
        ("commands", CommandRecord("A_B", "Does.", lambda: None), "no verb"),  # type: ignore[arg-type, return-value]
        ("commands", CommandRecord("a", "", lambda: None), "summary is no text"),  # type: ignore[arg-type, return-value]
        ("stores", StoreRecord("a", None, None), "recognises is no function"),  # type: ignore[arg-type]
    ],
)
def test_a_record_says_what_is_wrong_with_it(hook: str, record: Any, said: str) -> None:
    with pytest.raises(EmbedSurgeryError, match=said), installed(plugin(**{hook: record})):
        pass
