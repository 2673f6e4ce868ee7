"""Checks what a plugin returns from its hooks: records of the right type, functions of the right signature.

The checks run when a plugin is registered. So a fault is reported as the plugin's, with both signatures, and does not
come up in the middle of a training run. The hooks are defined in ``hookspecs.py``.
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
    """A hook, and how its records are checked.

    Attributes:
        name: The hook's name.
        what: What its records are called in messages, in the plural.
        record: The class of its records.
        fault: Returns what is wrong with a record, None if nothing is.
        unique: Attributes in which all records must differ; otherwise a lookup would depend on their order.
        functions: Returns a record's functions: name for messages, function, function with the right signature.
    """

    name: str
    what: str
    record: type
    fault: Callable[[Any], str | None]
    unique: tuple[str, ...] = ("name",)
    functions: Callable[[Any], list[tuple[str, Any, Any]]] = lambda record: []


def _text_fault(record: Any, *names: str) -> str | None:
    return next((f"{name} is not a non-empty string" for name in names if not _is_text(getattr(record, name))), None)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _first_fault(*faults: tuple[bool, str]) -> str | None:
    """Return the message of the first fault whose condition holds."""
    return next((message for is_fault, message in faults if is_fault), None)


def _surgery_fault(value: SurgeryRecord) -> str | None:
    kind: Any = value.config_class
    surgery: object = value.surgery
    frozen = isinstance(kind, type) and getattr(getattr(kind, "__dataclass_params__", None), "frozen", False)
    sets = (value.shares_model_with, value.also_reads)
    return _text_fault(value, "name", "peft_type") or _first_fault(
        (not frozen, f"config_class is not a frozen dataclass: {_type_name(kind)}"),
        (not isinstance(surgery, Surgery), f"surgery is not an instance of Surgery: {_type_name(surgery)}"),
        (getattr(surgery, "name", None) != value.name, f"surgery.name is {getattr(surgery, 'name', None)!r}"),
        (not all(isinstance(part, frozenset) for part in sets), "shares_model_with and also_reads must be frozensets"),
    )


def _initializer_fault(value: InitializerRecord) -> str | None:
    initializer = value.initializer
    return _text_fault(value, "name") or _first_fault(
        (any(c == ":" or c.isspace() for c in value.name), "name contains a colon or a space"),
        (
            value.argument is not None and not _is_text(value.argument),
            "argument is neither a non-empty string nor None",
        ),
        (
            not isinstance(initializer, Initializer),
            f"initializer is not an instance of Initializer: {_type_name(initializer)}",
        ),
    )


def _function_fault(record: Any, *names: str) -> str | None:
    faults = (f"{name} is not callable" for name in names if not callable(getattr(record, name)))
    return _text_fault(record, "name") or next(faults, None)


def _layout_fault(value: LayoutRecord) -> str | None:
    message = f"layout is not a Layout: {_type_name(value.layout)}"
    return _text_fault(value, "name") or _first_fault((not isinstance(value.layout, Layout), message))


def _store_fault(value: StoreRecord) -> str | None:
    message = "fallback is not a bool"
    return _function_fault(value, "recognises", "open") or _first_fault((type(value.fallback) is not bool, message))


def _command_fault(value: CommandRecord) -> str | None:
    valid = re.fullmatch(r"[a-z][a-z0-9-]*", str(value.name)) is not None
    return (
        _text_fault(value, "summary")
        or _function_fault(value, "load")
        or _first_fault((not valid, "name is not lower-case letters, digits and hyphens"))
    )


def _type_name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _methods(found: object, base: type) -> list[tuple[str, Any, Any]]:
    """Return the public methods that an object's class overrides, each with the base class's."""
    names = [name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")]
    return [
        (f"{type(found).__name__}.{name}", getattr(type(found), name), getattr(base, name))
        for name in names
        if getattr(type(found), name) is not getattr(base, name)
    ]


class _Signatures:
    """The signatures of functions in records that have no base class."""

    @staticmethod
    def classify(unknown: Any) -> Any: ...
    @staticmethod
    def recognises(directory: Any) -> Any: ...
    @staticmethod
    def open(directory: Any, architectures: Any) -> Any: ...
    @staticmethod
    def load() -> Any: ...
    @staticmethod
    def section(manifest: Any) -> Any: ...


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
        functions=lambda r: [(f"{r.name}.classify", r.classify, _Signatures.classify)],
    ),
    HookKind("embedsurgery_layouts", "layouts", LayoutRecord, _layout_fault),
    HookKind(
        "embedsurgery_stores",
        "stores",
        StoreRecord,
        _store_fault,
        functions=lambda r: [
            (f"{r.name}.recognises", r.recognises, _Signatures.recognises),
            (f"{r.name}.open", r.open, _Signatures.open),
        ],
    ),
    HookKind(
        "embedsurgery_commands",
        "commands",
        CommandRecord,
        _command_fault,
        functions=lambda r: [(f"{r.name}.load", r.load, _Signatures.load)],
    ),
    HookKind(
        "embedsurgery_card_sections",
        "card sections",
        CardSectionRecord,
        lambda r: _function_fault(r, "section"),
        functions=lambda r: [(f"{r.name}.section", r.section, _Signatures.section)],
    ),
)
"""All hooks of the contract."""


def check_plugin(plugin: Any) -> None:
    """Check a plugin's contract version, and that its hooks take the arguments that they are called with.

    Raises:
        PluginError: The plugin is for a newer contract, or a hook has another signature; the error shows both.
    """
    version = getattr(plugin, f"{PROJECT}_contract", CONTRACT)
    if type(version) is not int or not 1 <= version <= CONTRACT:
        raise PluginError(
            "the plugin is written for another contract",
            where=f"{PROJECT}_contract",
            expected=f"1 to {CONTRACT}",
            found=repr(version)[:40],
            hint=f"upgrade {PROJECT} or the plugin",
        )
    for name, spec in vars(Hooks).items():
        hook = getattr(plugin, name, None)
        if name.startswith(f"{PROJECT}_") and callable(hook) and hasattr(hook, f"{PROJECT}_impl"):
            _check_signature(name, hook, _without_self(spec))


def check_records(returned: Any, kind: HookKind) -> Sequence[Any]:
    """Check what a hook returned.

    Returns:
        Its records.

    Raises:
        PluginError: It is not a list of the hook's records, a record is invalid, or one of its functions does not take
            the arguments that it is called with; then the error shows both signatures.
    """
    records = returned if isinstance(returned, Sequence) and not isinstance(returned, str) else None
    if records is None or not all(isinstance(record, kind.record) for record in records):
        raise PluginError(
            "a hook returned the wrong type",
            where=kind.name,
            expected=f"a list of {kind.record.__name__}",
            found=_describe_types(returned, kind),
        )
    for record in records:
        fault = kind.fault(record)
        if fault is not None:
            raise PluginError(
                "invalid record",
                where=f"{kind.name}: {kind.record.__name__} {record.name!r}"[:100],
                found=fault,
            )
    for where, found, expected in (part for record in records for part in kind.functions(record)):
        _check_signature(where, found, inspect.signature(expected))
    return records


def _describe_types(returned: object, kind: HookKind) -> str:
    if not isinstance(returned, (list, tuple)):
        return type(returned).__name__
    return ", ".join(repr(item)[:80] if isinstance(item, kind.record) else type(item).__name__ for item in returned)


def refuse_clashes(known: Sequence[tuple[str, Any]], new: Sequence[Any], plugin: str, kind: HookKind) -> None:
    """Refuse records that have a `HookKind.unique` attribute in common with another record.

    Args:
        known: (plugin, record) of each record that is registered already.
        new: Records to register.
        plugin: The plugin that brings them.
        kind: Their hook.

    Raises:
        PluginError: Two records clash; the error names both plugins.
    """
    everything = [*known, *((plugin, record) for record in new)]
    for attribute in kind.unique:
        owners: dict[object, str] = {}
        for owner, record in everything:
            key = getattr(record, attribute)
            if key in owners:
                raise PluginError(
                    f"two {kind.what} have the same {attribute}",
                    where=" and ".join(dict.fromkeys((owners[key], owner))),
                    found=repr(getattr(key, "__name__", key)),
                    hint="uninstall one plugin, or rename its record",
                )
            owners[key] = owner


def _without_self(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _check_signature(where: str, found: Callable[..., Any], expected: inspect.Signature) -> None:
    """Refuse a function that does not take as many positional arguments as it is called with."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # builtins and lazy objects may have no signature
        return
    try:
        signature.bind(*expected.parameters)
    except TypeError:
        name = where.rpartition(".")[2]
        raise PluginError(
            "wrong signature",
            where=where,
            expected=f"{name}{_format_signature(expected)}",
            found=f"{name}{_format_signature(signature)}",
        ) from None


def _format_signature(signature: inspect.Signature) -> str:
    """Format a signature without annotations, which may differ."""
    parameters: Mapping[str, inspect.Parameter] = signature.parameters
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
