"""Whether what a plugin brings is what the hooks ask for: records of the right kind, functions of the right signature.

Everything here is looked at when a plugin is registered, so that a fault is its plugin's and is said there, with both
signatures, and not a riddle in somebody's training. What the hooks are is ``hookspecs.py``'s.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedsurgery.errors import PluginError
from embedsurgery.graph.architectures import Layout
from embedsurgery.initializers import Initializer, InitializerRecord
from embedsurgery.plugins.hookspecs import (
    CONTRACT,
    PROJECT,
    CardSectionRecord,
    ClassifierRecord,
    CommandRecord,
    Hooks,
    LayoutRecord,
    StoreRecord,
)
from embedsurgery.surgeries.surgery import Surgery, SurgeryRecord


@dataclass(frozen=True)
class HookKind:
    """A hook, and what its records are.

    Attributes:
        name: The hook's name.
        what: What each record is, for messages.
        record: The records' class.
        fault: What is wrong with a record of that class; None where it is whole.
        unique: Attributes that no two records have the same: which is meant would depend on their order.
        functions: Gives a record's functions: where, found, expected.
    """

    name: str
    what: str
    record: type
    fault: Callable[[Any], str | None]
    unique: tuple[str, ...] = ("name",)
    functions: Callable[[Any], list[tuple[str, Any, Any]]] = lambda record: []


def _texts(record: Any, *names: str) -> str | None:
    """The first attribute that is no text."""
    return next((f"{name} is no text" for name in names if not _is_text(getattr(record, name))), None)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _first(*faults: tuple[bool, str]) -> str | None:
    return next((said for fault, said in faults if fault), None)


def _surgery_fault(value: SurgeryRecord) -> str | None:
    kind: Any = value.config_class
    surgery: object = value.surgery
    frozen = isinstance(kind, type) and getattr(getattr(kind, "__dataclass_params__", None), "frozen", False)
    sets = (value.shares_model_with, value.also_reads)
    return _texts(value, "name", "peft_type") or _first(
        (not frozen, f"config_class is no frozen dataclass: {_named(kind)}"),
        (not isinstance(surgery, Surgery), f"surgery is no instance of a Surgery: {_named(surgery)}"),
        (getattr(surgery, "name", None) != value.name, f"the surgery's own name is {getattr(surgery, 'name', None)!r}"),
        (not all(isinstance(part, frozenset) for part in sets), "shares_model_with or also_reads is no frozenset"),
    )


def _initializer_fault(value: InitializerRecord) -> str | None:
    made = value.initializer
    return _texts(value, "name") or _first(
        (any(c == ":" or c.isspace() for c in value.name), "a colon or a space in the name"),
        (value.argument is not None and not _is_text(value.argument), "argument is no text, nor None"),
        (not isinstance(made, Initializer), f"initializer is no instance of an Initializer: {_named(made)}"),
    )


def _function_fault(record: Any, *names: str) -> str | None:
    bad = (f"{name} is no function" for name in names if not callable(getattr(record, name)))
    return _texts(record, "name") or next(bad, None)


def _layout_fault(value: LayoutRecord) -> str | None:
    known = isinstance(value.layout, Layout)
    return _texts(value, "name") or _first((not known, f"layout is no Layout: {_named(value.layout)}"))


def _store_fault(value: StoreRecord) -> str | None:
    plain = isinstance(value.fallback, bool)
    return _function_fault(value, "recognises", "open") or _first((not plain, "fallback is no bool"))


def _command_fault(value: CommandRecord) -> str | None:
    verb = re.fullmatch(r"[a-z][a-z0-9-]*", str(value.name)) is not None
    return (
        _texts(value, "summary")
        or _function_fault(value, "load")
        or _first((not verb, "the name is no verb: lower-case letters, digits and hyphens"))
    )


def _named(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _methods(found: object, base: type) -> list[tuple[str, Any, Any]]:
    """The methods of a class that others call, as found and as the base class has them."""
    names = [name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")]
    return [
        (f"{type(found).__name__}.{name}", getattr(type(found), name), getattr(base, name))
        for name in names
        if getattr(type(found), name) is not getattr(base, name)
    ]


# what the functions of the records without a base class are to look like
def _classify(unknown: Any) -> Any: ...
def _recognises(directory: Any) -> Any: ...
def _open(directory: Any, architectures: Any) -> Any: ...
def _load() -> Any: ...
def _section(manifest: Any) -> Any: ...


KINDS = (
    HookKind(
        "embedsurgery_surgeries",
        "surgeries",
        SurgeryRecord,
        _surgery_fault,
        ("name", "config_class", "peft_type"),
        lambda r: _methods(r.surgery, Surgery),
    ),
    HookKind(
        "embedsurgery_initializers",
        "initialisers",
        InitializerRecord,
        _initializer_fault,
        functions=lambda r: _methods(r.initializer, Initializer),
    ),
    HookKind(
        "embedsurgery_classifiers",
        "classifiers",
        ClassifierRecord,
        lambda r: _function_fault(r, "classify"),
        functions=lambda r: [(f"{r.name}.classify", r.classify, _classify)],
    ),
    HookKind("embedsurgery_layouts", "layouts", LayoutRecord, _layout_fault),
    HookKind(
        "embedsurgery_stores",
        "stores",
        StoreRecord,
        _store_fault,
        functions=lambda r: [(f"{r.name}.recognises", r.recognises, _recognises), (f"{r.name}.open", r.open, _open)],
    ),
    HookKind(
        "embedsurgery_commands",
        "commands",
        CommandRecord,
        _command_fault,
        functions=lambda r: [(f"{r.name}.load", r.load, _load)],
    ),
    HookKind(
        "embedsurgery_card_sections",
        "card sections",
        CardSectionRecord,
        lambda r: _function_fault(r, "section"),
        functions=lambda r: [(f"{r.name}.section", r.section, _section)],
    ),
)
"""Every hook of the contract."""


def check_plugin(plugin: Any) -> None:
    """Refuse a plugin for another contract, and hooks that cannot be called as the contract calls them.

    Raises:
        PluginError: It says which, and shows both signatures.
    """
    version = getattr(plugin, f"{PROJECT}_contract", CONTRACT)
    if type(version) is not int or not 1 <= version <= CONTRACT:
        raise PluginError(
            "written for another contract",
            where=f"{PROJECT}_contract",
            expected=f"1 to {CONTRACT}",
            found=repr(version)[:40],
            hint=f"upgrade {PROJECT}, or the plugin",
        )
    for name, spec in vars(Hooks).items():
        found = getattr(plugin, name, None)
        if name.startswith(f"{PROJECT}_") and callable(found) and hasattr(found, f"{PROJECT}_impl"):
            _check_signature(name, found, _without_self(spec))


def check_answer(answer: Any, kind: HookKind) -> Sequence[Any]:
    """A hook's records; refuses what is none, and functions that cannot be called as the contract calls them.

    Raises:
        PluginError: It shows what was found, and of functions both signatures.
    """
    records = answer if isinstance(answer, Sequence) and not isinstance(answer, str) else None
    if records is None or not all(isinstance(record, kind.record) for record in records):
        raise PluginError(
            "a hook returned the wrong thing",
            where=kind.name,
            expected=f"a list of {kind.record.__name__}",
            found=_kinds(answer, kind),
        )
    for record in records:
        fault = kind.fault(record)
        if fault is not None:
            raise PluginError(
                "a record that is not whole",
                found=fault,
                where=f"{kind.name}: {kind.record.__name__} {record.name!r}"[:100],
            )
    for where, found, expected in (part for record in records for part in kind.functions(record)):
        _check_signature(where, found, inspect.signature(expected))
    return records


def _kinds(answer: object, kind: HookKind) -> str:
    if isinstance(answer, (list, tuple)):
        return ", ".join(repr(item)[:80] if isinstance(item, kind.record) else type(item).__name__ for item in answer)
    return type(answer).__name__


def refuse_clashes(known: Sequence[tuple[str, Any]], new: Sequence[Any], plugin: str, kind: HookKind) -> None:
    """Of two records that are the same in what should tell them apart, which is meant would depend on their order.

    Raises:
        PluginError: It names both plugins.
    """
    everything = [*known, *((plugin, record) for record in new)]
    for what in kind.unique:
        owners: dict[object, str] = {}
        for owner, record in everything:
            key = getattr(record, what)
            if key in owners:
                raise PluginError(
                    f"two {kind.what} have the {what} {getattr(key, '__name__', key)!r}",
                    where=" and ".join(dict.fromkeys((owners[key], owner))),
                    hint="uninstall one, or rename it",
                )
            owners[key] = owner


def _without_self(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _check_signature(where: str, found: Callable[..., Any], expected: inspect.Signature) -> None:
    """Whether a function takes as many arguments, by position, as it will be given."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of builtins there may be none, and a lazy object may not tell
        return
    try:
        signature.bind(*expected.parameters)
    except TypeError:
        name = where.rpartition(".")[2]
        raise PluginError(
            "a function of another signature",
            where=where,
            expected=f"{name}{_shown(expected)}",
            found=f"{name}{_shown(signature)}",
        ) from None


def _shown(signature: inspect.Signature) -> str:
    """A signature without annotations: names and defaults are what differs."""
    plain: Mapping[str, inspect.Parameter] = signature.parameters
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in plain.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
