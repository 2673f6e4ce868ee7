"""Working and broken plugins: each broken one is reported, and the others go on working."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click
import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import CheckpointError, ConfigError, PluginError, UnknownSurgeryError
from embedsurgery.graph.architectures import ARCHITECTURES, Layout
from embedsurgery.initializers import BUILT_IN, NewToken, TableView, compute_initial_rows, parse_init
from embedsurgery.plugins.checks import KINDS
from embedsurgery.plugins.current import build_registry, builtin_registry, installed, registry
from embedsurgery.plugins.entry_points import may_have_plugins
from embedsurgery.plugins.hookspecs import CardSection, EmbeddingModule, Hooks, UnknownModule
from embedsurgery.plugins.registry import DISABLE, Registry
from embedsurgery.plugins.verbs import VERBS
from embedsurgery.stores.state_dicts import state_dict_store
from tests.support.errors import raises

GOOD = """
from dataclasses import dataclass
import embedsurgery as es
from embedsurgery.surgeries.surgery import SurgeryRecord
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens

@dataclass(frozen=True)
class Config:
    size: int = 1

class Mine(TrainableTokens):
    name = "NAME"

@es.hookimpl
def embedsurgery_surgeries():
    return [SurgeryRecord("NAME", Config, Mine(), "PEFT_NAME")]
"""
SURGERIES = ("trainable_tokens", "soft_prompt")
STARTS = """
import numpy as np
import embedsurgery as es
from embedsurgery.initializers import Initializer, InitializerRecord

class Sevens(Initializer):
    \"\"\"All sevens.\"\"\"

    def rows(self, view, tokens, argument, streams):
        return np.full((len(tokens), view.shape[1]), 7.0)

@es.hookimpl
def embedsurgery_initializers():
    return [InitializerRecord("NAME", Sevens(), None)]
"""
HOOK = "import embedsurgery as es\n@es.hookimpl\ndef embedsurgery_surgeries"


def record(hook: str, records: str) -> str:
    """Return the code of a plugin with one hook that returns these records."""
    lines = (
        "import embedsurgery as es",
        "from embedsurgery.plugins import hookspecs as h",
        "from embedsurgery.graph.architectures import Layout",
        "@es.hookimpl",
    )
    head = "\n".join(lines)
    return f"{head}\ndef embedsurgery_{hook}(): return [{records}]"


BROKEN: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "no syntax": ("def (:", "SyntaxError"),
    "raises": ("raise RuntimeError('out of\\nluck')", "out of luck"),
    "no module": ("import a_module_that_nobody_has", "a_module_that_nobody_has"),
    "exits": ("raise SystemExit(3)", "SystemExit"),
    "an argument too many": (f"{HOOK}(model): return []", "model"),
    "an unknown hook": (
        "import embedsurgery as es\n@es.hookimpl\ndef embedsurgery_surgerys(): return []",
        "embedsurgery_surgerys",
    ),
    "the hook raises": (f"{HOOK}(): raise KeyError('x')", "x"),
    "a number": (f"{HOOK}(): return 3", "embedsurgery_surgeries"),
    "a list of numbers": (f"{HOOK}(): return [3]", "int"),
    "a string": (f"{HOOK}(): return 'abc'", "str"),
    "one name twice": (GOOD.replace("return [", "return 2 * [").replace("NAME", "double"), "double"),
    "a built-in name": (GOOD.replace("NAME", "trainable_tokens"), "trainable_tokens"),
    "a record of nothing": (
        GOOD.replace('SurgeryRecord("NAME", Config, Mine(), "PEFT_NAME")', "SurgeryRecord(None, None, None, None)"),
        "SurgeryRecord",
    ),
    "initialisers of the wrong kind": (GOOD + STARTS.replace("[InitializerRecord(", "[("), "tuple"),
    "initialisers without a name": (GOOD + STARTS.replace('"NAME"', '""'), "InitializerRecord"),
    "a colon in an initialiser's name": (GOOD + STARTS.replace("NAME", "a:b"), "a:b"),
    "a space in an initialiser's name": (GOOD + STARTS.replace("NAME", "a b"), "a b"),
    "an argument without a name": (GOOD + STARTS.replace("None)]", "'')]"), "InitializerRecord"),
    "an initialiser of another kind": (GOOD + STARTS.replace("Sevens(),", "Sevens,"), "InitializerRecord"),
    "a built-in initialiser's name": (GOOD + STARTS.replace("NAME", "mean"), "'mean'"),
    "an initialiser twice": (GOOD + STARTS.replace("return [", "return 2 * ["), ("initialisers", "'NAME'")),
    "the second hook raises": (GOOD + STARTS.replace("return [", "return 1 / 0 + ["), "division"),
    "a good initialiser beside a bad surgery": (f"{STARTS}\n{HOOK}(): return [3]", "SurgeryRecord"),
    "a surgery whose method lacks an argument": (
        GOOD.replace('name = "NAME"', 'name = "NAME"\n    def plan(self, adapter): return None'),
        ("plan(self, adapter, located)", "plan(self, adapter)"),
    ),
    "an initialiser whose method lacks an argument": (
        STARTS.replace("tokens, argument, streams", "tokens, streams"),
        ("rows(self, view, tokens, argument, streams)", "rows(self, view, tokens, streams)"),
    ),
    "a surgery of another name than its record's": (GOOD.replace('name = "NAME"', 'name = "x"'), "SurgeryRecord"),
    "a newer contract": (GOOD + "embedsurgery_contract = 2", ("embedsurgery_contract", "1 to 1")),
    "a contract that is not a number": (GOOD + "embedsurgery_contract = 'new'", "'new'"),
    "no hook": ("x = 1", "embedsurgery.hookimpl"),
    "a hook without its mark": ("def embedsurgery_stores(): return []", "embedsurgery.hookimpl"),
    "both signatures": (
        f"{HOOK}(model, size=1): return []",
        ("embedsurgery_surgeries()", "embedsurgery_surgeries(model, size=1)"),
    ),
    **{
        f"a broken {kind}: {what}": broken
        for kind, cases in {
            "classifier": {
                "no record": (record("classifiers", "3"), "ClassifierRecord"),
                "no function": (record("classifiers", "h.ClassifierRecord('x', 3)"), "ClassifierRecord"),
                "signature": (
                    record("classifiers", "h.ClassifierRecord('x', lambda a, b: None)"),
                    ("classify(unknown)", "classify(a, b)"),
                ),
                "twice": (
                    record("classifiers", "*[h.ClassifierRecord('x', lambda a: None)] * 2"),
                    ("classifiers", "'x'"),
                ),
            },
            "layout": {
                "no layout": (record("layouts", "h.LayoutRecord('x', {})"), "LayoutRecord"),
                "built in": (record("layouts", "h.LayoutRecord('t5', Layout())"), "'t5'"),
            },
            "store": {
                "no function": (record("stores", "h.StoreRecord('x', None, None)"), "StoreRecord"),
                "signature": (
                    record("stores", "h.StoreRecord('x', lambda: 1, lambda d, a: 1)"),
                    ("recognises(directory)", "recognises()"),
                ),
                "built in": (
                    record("stores", "h.StoreRecord('safetensors', bool, lambda d, a: None)"),
                    "'safetensors'",
                ),
            },
            "command": {
                "an invalid name": (record("commands", "h.CommandRecord('A B', 'x', dict)"), "CommandRecord"),
                "signature": (record("commands", "h.CommandRecord('x', 'x', lambda a: a)"), ("load()", "load(a)")),
                "a built-in command": (record("commands", "h.CommandRecord('merge', 'x', dict)"), "'merge'"),
            },
            "card section": {
                "no function": (record("card_sections", "h.CardSectionRecord('x', None)"), "CardSectionRecord"),
                "signature": (
                    record("card_sections", "h.CardSectionRecord('x', lambda: None)"),
                    ("section(manifest)", "section()"),
                ),
            },
        }.items()
        for what, broken in cases.items()
    },
}

Install = Callable[[str, str], EntryPoint]
_numbers = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Returns a function that writes a module and returns an entry point to it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(DISABLE, raising=False)

    def write(name: str, source: str) -> EntryPoint:
        module = f"embedsurgery_test_plugin_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text(source)
        return EntryPoint(name, module, "embedsurgery")

    return write


def state(known: Registry) -> dict[str, str | None]:
    return {plugin.name: plugin.error for plugin in known.plugins}


def test_a_plugin_brings_a_surgery(install: Install) -> None:
    known = build_registry([install("good", GOOD)])
    assert state(known) == {"builtin": None, "good": None}
    assert known.plugins[1].hooks == ("embedsurgery_surgeries",)
    record = known.find_surgery("NAME")
    assert record is known.for_peft_type("PEFT_NAME")
    assert record is known.for_config(record.config_class())
    assert list(known.surgeries) == [*SURGERIES, "NAME"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_work(name: str, install: Install) -> None:
    source, named = BROKEN[name]
    points = [
        install("a", GOOD.replace("NAME", "first")),
        install("b", source),
        install("c", GOOD.replace("NAME", "last")),
    ]
    known = build_registry(points)
    assert list(known.surgeries) == [*SURGERIES, "first", "last"]
    assert list(known.initializers) == [record.name for record in BUILT_IN]
    found = state(known)
    assert [plugin for plugin, error in found.items() if error is not None] == ["b"]
    assert all(text in str(found["b"]) for text in ([named] if isinstance(named, str) else named))
    assert "\n" not in str(found["b"])
    assert known.plugins[2].hooks == ()


def test_a_plugin_brings_an_initialiser(install: Install) -> None:
    """It is registered beside the built-in ones, is found by its name, and returns rows."""
    known = build_registry([install("good", STARTS), install("other", GOOD + STARTS.replace("NAME", "other"))])
    assert state(known) == {"builtin": None, "good": None, "other": None}
    assert known.plugins[2].hooks == ("embedsurgery_initializers", "embedsurgery_surgeries")
    assert known.plugins[1].hooks == ("embedsurgery_initializers",)
    assert list(known.initializers) == [*(record.name for record in BUILT_IN), "NAME", "other"]
    record, argument = parse_init("NAME", known.initializers)
    assert record is known.initializer("NAME")
    assert (record.usage, record.summary) == ("NAME", "All sevens.")
    store = state_dict_store({"embed_tokens.weight": torch.zeros(5, 3)})
    view = TableView.of_table(store, store.graph.tables[0], known=5)
    rows = compute_initial_rows(record, argument, view, [NewToken("a", 5), NewToken("b", 6)], seed=0)
    assert rows.float32().tolist() == [[7.0] * 3] * 2
    with raises(ConfigError, where="nothing", expected="copy:TOKEN, NAME, other"):
        known.initializer("nothing")


def test_one_initialiser_from_two_plugins_names_both(install: Install) -> None:
    """The second plugin is not registered at all: neither is its surgery."""
    known = build_registry([install("second", GOOD + STARTS), install("first", STARTS)])
    found = state(known)
    assert found["first"] is None
    assert all(word in str(found["second"]) for word in ("'NAME'", "first", "second"))
    assert list(known.surgeries) == [*SURGERIES]
    assert [name for name in known.initializers if name == "NAME"] == ["NAME"]


def test_one_surgery_from_two_plugins_names_both(install: Install) -> None:
    known = build_registry([install("second", GOOD), install("first", GOOD)])
    found = state(known)
    assert found["first"] is None
    assert "NAME" in str(found["second"])
    assert "first" in str(found["second"])
    assert "second" in str(found["second"])
    assert type(known.find_surgery("NAME").surgery).__module__ == type(known.surgeries["NAME"].surgery).__module__


def test_two_plugins_of_one_name(install: Install) -> None:
    known = build_registry([install("same", GOOD.replace("NAME", "x")), install("same", GOOD.replace("NAME", "y"))])
    assert [plugin.name for plugin in known.plugins] == ["builtin", "same", "same"]
    assert [plugin.error is None for plugin in known.plugins] == [True, True, False]
    assert "same" in str(known.plugins[2].error)
    assert list(known.surgeries) == [*SURGERIES, "x"]


def test_one_module_under_two_names(install: Install) -> None:
    one = install("one", GOOD)
    known = build_registry([one, EntryPoint("two", one.value, one.group)])
    assert [plugin.error is None for plugin in known.plugins] == [True, True, False]
    assert list(known.surgeries) == [*SURGERIES, "NAME"]


@pytest.mark.parametrize("clash", ["peft_type", "config"])
def test_two_surgeries_that_cannot_be_told_apart(clash: str, install: Install) -> None:
    """With one config class or one peft_type, a lookup would depend on their order."""
    if clash == "peft_type":
        sources = [GOOD.replace('"NAME"', f'"{name}"') for name in ("x", "y")]
    else:
        config = "from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokensConfig as Config\n"
        sources = [GOOD.replace("@dataclass(frozen=True)\nclass Config:\n    size: int = 1\n", config)]
    known = build_registry([install(f"p{number}", source) for number, source in enumerate(sources)])
    assert known.plugins[-1].error is not None


def test_a_plugin_called_like_the_built_in_one(install: Install) -> None:
    known = build_registry([install("builtin", GOOD)])
    assert [plugin.error is None for plugin in known.plugins] == [True, False]
    assert list(known.surgeries) == [*SURGERIES]


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("", ["a", "b"]),
        ("1", []),
        ("a", ["b"]),
        (" b , c", ["a"]),
        ("a,b", []),
        ("builtin", ["a", "b"]),
    ],
)
def test_plugins_can_be_disabled(
    value: str, left: list[str], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [install("a", GOOD.replace("NAME", "a")), install("b", GOOD.replace("NAME", "b"))]
    monkeypatch.setenv(DISABLE, value)
    known = build_registry(points)
    assert list(known.surgeries) == [*SURGERIES, *left]
    assert all(DISABLE in str(error) for name, error in state(known).items() if error is not None)


def test_a_disabled_plugin_is_not_imported(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point = install("a", f"open({str(tmp_path / 'ran')!r}, 'x')")
    monkeypatch.setenv(DISABLE, "a")
    build_registry([point])
    assert not (tmp_path / "ran").exists()


def test_what_no_plugin_brings(install: Install) -> None:
    known = build_registry([install("good", GOOD)])
    for find in (known.find_surgery, known.for_peft_type):
        with raises(UnknownSurgeryError, where="nothing"):
            find("nothing")
    with raises(UnknownSurgeryError, where="['x']"):
        known.for_peft_type(["x"])
    with raises(ConfigError, expected="Config", found="int"):
        known.for_config(3)
    with raises(UnknownSurgeryError, where="x" * 100) as caught:
        known.find_surgery("x" * 10_000)
    assert len(str(caught.value)) < 500


def test_the_process_has_one_registry() -> None:
    assert registry() is registry()
    assert registry().for_config(es.TrainableTokensConfig([1])).name == "trainable_tokens"
    assert registry().for_peft_type("TRAINABLE_TOKENS").name == "trainable_tokens"


OTHERS = (
    record(
        "classifiers",
        "h.ClassifierRecord('c', lambda unknown: h.EmbeddingModule('input', 'table') "
        "if unknown.type_name == 'x.Y' else None)",
    )
    + """
from embedsurgery.stores.store import Store
S = type("S", (Store,), dict.fromkeys(Store.__abstractmethods__))
def open_it(directory, architectures):
    store = S()
    store.name = f"s {directory}"
    return store
@es.hookimpl
def embedsurgery_layouts(): return [h.LayoutRecord("mymodel", Layout(head="to_vocab"))]
@es.hookimpl
def embedsurgery_stores(): return [h.StoreRecord("s", lambda d: (d / "s.txt").exists(), open_it)]
@es.hookimpl
def embedsurgery_commands(): return [h.CommandRecord("hello", "Says hello.", lambda: "a command")]
@es.hookimpl
def embedsurgery_card_sections():
    return [h.CardSectionRecord("c", lambda manifest: h.CardSection("How", str(manifest)) if manifest else None)]
"""
)


def test_a_plugin_brings_everything_else(install: Install, tmp_path: Path) -> None:
    known = build_registry([install("all", OTHERS)])
    assert state(known)["all"] is None
    assert len(known.plugins[1].hooks) == 5
    module = UnknownModule("a", "x.Y", (("table", (3, 2)), ("vector", (3,))), torch.nn.Module())
    assert known.classify(module) == EmbeddingModule("input", "table")
    assert known.classify(UnknownModule("a", "x.Z", (), torch.nn.Module())) is None
    assert known.architectures == {**ARCHITECTURES, "mymodel": Layout(head="to_vocab")}
    (tmp_path / "s.txt").touch()
    assert known.open_store(tmp_path).name == f"s {tmp_path}"
    (tmp_path / "s.txt").unlink()
    with raises(CheckpointError, where=tmp_path, expected="model.safetensors"):
        known.open_store(tmp_path)
    assert known.commands["hello"].load() == "a command"
    assert {"merge", "unmerge", "plugins", "verify"} <= known.commands.keys()
    assert isinstance(known.commands["merge"].load(), click.Command)
    assert known.sections("x") == [CardSection("How", "x")]
    assert known.sections("") == []


def test_a_function_that_fails_later_is_skipped_with_a_warning(install: Install, tmp_path: Path) -> None:
    broken = OTHERS.replace("lambda unknown:", "lambda unknown: 1 / 0 if True else")
    broken = broken.replace("lambda d: (d", "lambda d: (d.nothing")
    broken = broken.replace("lambda manifest: ", "lambda manifest: 3 if True else ")
    known = build_registry([install("later", broken)])
    assert state(known)["later"] is None
    with pytest.warns(es.errors.EmbedSurgeryWarning, match=r"\bc\b.*ZeroDivisionError"):
        assert known.classify(UnknownModule("a", "x.Y", (), torch.nn.Module())) is None
    with pytest.warns(es.errors.EmbedSurgeryWarning, match=r"\bc\b.*\bint\b"):
        assert known.sections("x") == []
    with pytest.warns(es.errors.EmbedSurgeryWarning, match=r"\bs\b.*nothing"), pytest.raises(CheckpointError):
        known.open_store(tmp_path)


def test_two_formats_that_recognise_one_checkpoint(install: Install, tmp_path: Path) -> None:
    one = record("stores", "h.StoreRecord('NAME', lambda d: True, lambda d, a: None)")
    known = build_registry([install(name, one.replace("NAME", name)) for name in ("x", "y")])
    with raises(CheckpointError, where=tmp_path, found="x, y"):
        known.open_store(tmp_path)


def test_installed_registers_modules_for_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_temporary_plugin.py").write_text(STARTS)
    (tmp_path / "a_broken_plugin.py").write_text(STARTS.replace("NAME", "mean"))
    module, broken = (importlib.import_module(name) for name in ("a_temporary_plugin", "a_broken_plugin"))
    before = registry()
    with installed(module) as known:
        assert registry() is known
        assert "NAME" in registry().initializers
    assert registry() is before
    with raises(PluginError, where="a_broken_plugin", found="'mean'"), installed(broken):
        pass
    assert registry() is before


def test_the_lazy_built_in_registry_equals_the_discovered_one() -> None:
    lazy, discovered = builtin_registry(), build_registry([])
    assert lazy.plugins == discovered.plugins
    for kind in KINDS:
        name = kind.name.removeprefix("embedsurgery_")
        one, other = getattr(lazy, name), getattr(discovered, name)
        assert list(one) == list(other)
        assert [type(record) for record in one.values()] == [type(record) for record in other.values()]
    assert list(lazy.commands) == list(VERBS)
    assert all(isinstance(record.load(), click.Command) for record in lazy.commands.values())


@pytest.mark.parametrize(
    "place",
    [
        "site/some_plugin-1.0.dist-info",
        "site/some_plugin.egg-info",
        "site/Some.EGG-INFO",
        "some_plugin-1.0.egg/EGG-INFO",
    ],
)
def test_a_plugin_on_the_path_is_found(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose package is incomplete; importlib then says what it is."""
    info = tmp_path / place
    info.mkdir(parents=True)
    (info / ("METADATA" if place.endswith("dist-info") else "PKG-INFO")).write_text("Name: some-plugin\n")
    monkeypatch.setattr("sys.path", [str(info.parent), str(tmp_path / "nowhere")])
    assert not may_have_plugins()
    (info / "entry_points.txt").write_text("[console_scripts]\nembedsurgery = x:y\n")
    assert not may_have_plugins()
    (info / "entry_points.txt").write_text("[embedsurgery]\nx = some_plugin\n")
    assert may_have_plugins()
    assert [point.name for point in entry_points(group="embedsurgery")] == ["x"]
    (info / "entry_points.txt").unlink()
    monkeypatch.setattr("sys.meta_path", [*sys.meta_path, FindsPackages()])
    assert may_have_plugins()


class FindsPackages:
    """A finder that may know packages that no directory shows."""

    def find_distributions(self, context: object) -> list[object]:
        return []

    def find_spec(self, *_: object) -> None:
        return None


def test_every_hook_has_a_kind_and_a_one_line_docstring(install: Install) -> None:
    hooks = [name for name in vars(Hooks) if name.startswith("embedsurgery_")]
    assert hooks == [kind.name for kind in KINDS]
    for name in hooks:
        assert (getattr(Hooks, name).__doc__ or "").count("\n") == 0
        assert name.removeprefix("embedsurgery_") in vars(Registry())
