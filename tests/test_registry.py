"""Plugins that work and plugins that do not: each broken one is reported, and takes nothing else down."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import embedsurgery as es
from embedsurgery.errors import ConfigError, UnknownSurgeryError
from embedsurgery.registry import DISABLE, Registry, build, registry

GOOD = """
from dataclasses import dataclass
import embedsurgery as es
from embedsurgery.surgeries.base import SurgeryRecord
from embedsurgery.surgeries.trainable_tokens import TrainableTokens

@dataclass(frozen=True)
class Config:
    size: int = 1

class Mine(TrainableTokens):
    name = "NAME"

@es.hookimpl
def embedsurgery_surgeries():
    return [SurgeryRecord("NAME", Config, Mine(), "PEFT_NAME")]
"""
HOOK = "import embedsurgery as es\n@es.hookimpl\ndef embedsurgery_surgeries"
BROKEN: dict[str, tuple[str, str]] = {
    "no syntax": ("def (:", "SyntaxError"),
    "raises": ("raise RuntimeError('out of\\nluck')", "out of luck"),
    "no module": ("import a_module_that_nobody_has", "a_module_that_nobody_has"),
    "exits": ("raise SystemExit(3)", "SystemExit"),
    "an argument too many": (f"{HOOK}(model): return []", "model"),
    "an unknown hook": ("import embedsurgery as es\n@es.hookimpl\ndef embedsurgery_surgerys(): return []",
                        "embedsurgery_surgerys"),
    "the hook raises": (f"{HOOK}(): raise KeyError('x')", "x"),
    "a number": (f"{HOOK}(): return 3", "embedsurgery_surgeries"),
    "a list of numbers": (f"{HOOK}(): return [3]", "int"),
    "a string": (f"{HOOK}(): return 'abc'", "str"),
    "one name twice": (GOOD.replace("return [", "return 2 * [").replace("NAME", "double"), "double"),
    "a built-in name": (GOOD.replace("NAME", "trainable_tokens"), "trainable_tokens"),
    "a record of nothing": (GOOD.replace('SurgeryRecord("NAME", Config, Mine(), "PEFT_NAME")',
                                         'SurgeryRecord(None, None, None, None)'), "SurgeryRecord"),
}  # fmt: skip

Install = Callable[[str, str], EntryPoint]
_numbers = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that writes a module and returns the entry point of this name that leads to it."""
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
    known = build([install("good", GOOD)])
    assert state(known) == {"builtin": None, "good": None}
    assert known.plugins[1].hooks == ("embedsurgery_surgeries",)
    record = known.named("NAME")
    assert record is known.for_peft_type("PEFT_NAME")
    assert record is known.for_config(record.config_class())
    assert list(known.surgeries) == ["trainable_tokens", "NAME"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_work(name: str, install: Install) -> None:
    source, said = BROKEN[name]
    points = [
        install("a", GOOD.replace("NAME", "first")),
        install("b", source),
        install("c", GOOD.replace("NAME", "last")),
    ]
    known = build(points)
    assert list(known.surgeries) == ["trainable_tokens", "first", "last"]
    found = state(known)
    assert [plugin for plugin, error in found.items() if error is not None] == ["b"]
    assert said in str(found["b"])
    assert "\n" not in str(found["b"])
    assert known.plugins[2].hooks == ()


def test_one_surgery_from_two_plugins_names_both(install: Install) -> None:
    known = build([install("second", GOOD), install("first", GOOD)])
    found = state(known)
    assert found["first"] is None
    assert "NAME" in str(found["second"])
    assert "first" in str(found["second"])
    assert "second" in str(found["second"])
    assert type(known.named("NAME").surgery).__module__ == type(known.surgeries["NAME"].surgery).__module__


def test_two_plugins_of_one_name(install: Install) -> None:
    known = build([install("same", GOOD.replace("NAME", "x")), install("same", GOOD.replace("NAME", "y"))])
    assert [plugin.name for plugin in known.plugins] == ["builtin", "same", "same"]
    assert [plugin.error is None for plugin in known.plugins] == [True, True, False]
    assert "same" in str(known.plugins[2].error)
    assert list(known.surgeries) == ["trainable_tokens", "x"]


def test_one_module_under_two_names(install: Install) -> None:
    one = install("one", GOOD)
    known = build([one, EntryPoint("two", one.value, one.group)])
    assert [plugin.error is None for plugin in known.plugins] == [True, True, False]
    assert list(known.surgeries) == ["trainable_tokens", "NAME"]


@pytest.mark.parametrize("clash", ["peft_type", "config"])
def test_two_surgeries_that_cannot_be_told_apart(clash: str, install: Install) -> None:
    """Of two surgeries with one config class or one peft_type, which is meant would depend on their order."""
    if clash == "peft_type":
        sources = [GOOD.replace('"NAME"', f'"{name}"') for name in ("x", "y")]
    else:
        config = "from embedsurgery.surgeries.trainable_tokens import TrainableTokensConfig as Config\n"
        sources = [GOOD.replace("@dataclass(frozen=True)\nclass Config:\n    size: int = 1\n", config)]
    known = build([install(f"p{number}", source) for number, source in enumerate(sources)])
    assert known.plugins[-1].error is not None


def test_a_plugin_called_like_the_built_in_one(install: Install) -> None:
    known = build([install("builtin", GOOD)])
    assert [plugin.error is None for plugin in known.plugins] == [True, False]
    assert list(known.surgeries) == ["trainable_tokens"]


@pytest.mark.parametrize(("value", "left"), [
    ("", ["a", "b"]), ("1", []), ("a", ["b"]), (" b , c", ["a"]), ("a,b", []), ("builtin", ["a", "b"]),
])  # fmt: skip
def test_plugins_can_be_disabled(
    value: str, left: list[str], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [install("a", GOOD.replace("NAME", "a")), install("b", GOOD.replace("NAME", "b"))]
    monkeypatch.setenv(DISABLE, value)
    known = build(points)
    assert list(known.surgeries) == ["trainable_tokens", *left]
    assert all(DISABLE in str(error) for name, error in state(known).items() if error is not None)


def test_a_disabled_plugin_is_not_imported(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point = install("a", f"open({str(tmp_path / 'ran')!r}, 'x')")
    monkeypatch.setenv(DISABLE, "a")
    build([point])
    assert not (tmp_path / "ran").exists()


def test_what_nobody_brings(install: Install) -> None:
    known = build([install("good", GOOD)])
    for ask in (known.named, known.for_peft_type):
        with pytest.raises(UnknownSurgeryError, match="nothing"):
            ask("nothing")
    with pytest.raises(UnknownSurgeryError):
        known.for_peft_type(["x"])
    with pytest.raises(ConfigError, match=r"Config.*int|int.*Config"):
        known.for_config(3)
    with pytest.raises(UnknownSurgeryError) as caught:
        known.named("x" * 10_000)
    assert len(str(caught.value)) < 500


def test_the_process_has_one_registry() -> None:
    assert registry() is registry()
    assert registry().for_config(es.TrainableTokensConfig([1])).name == "trainable_tokens"
    assert registry().for_peft_type("TRAINABLE_TOKENS").name == "trainable_tokens"
