"""Mutations of valid files: of their JSON, of lengths and offsets, of single bytes."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from embedsurgery.plan.plan import SEAL

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    4,
    13,
    14,
    15,
    255,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.5,
    1e308,
    -0.0,
    "",
    "a",
    "0",
    "-1",
    "F32",
    "BF16",
    "F64",
    "I64",
    "U8",
    "F8_E4M3",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    ".",
    "..",
    ".embedsurgery/merges/0001.safetensors",
    "model.py",
    "x.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors",
    "\ud800",
    "\u202e",
    "x" * 300,
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "cls.predictions.bias",
    "<new0>",
    "<unk>",
    "t3",
    "SetRows",
    "SetBlocks",
    "Grow",
    "AddTokens",
    "PatchFile",
    "SetEntries",
    "SetBytes",
    "PutFile",
    "trainable_tokens",
    [],
    {},
    [0],
    [1, 2],
    [-1],
    [0, 0],
    [14, 4],
    [[]],
    [None],
    ["x"],
    [2**63, 2],
    {"": None},
    {"a": {"a": {}}},
    {"content": "x"},
    {"vocab_size": 14},
    float("nan"),
    float("inf"),
]
"""Values that replace others."""

DEEP = ("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000)

Step = tuple[int, int, int]
"""(kind of mutation, place, value): numbers taken modulo the number of choices, so that all are drawn alike."""

steps = st.lists(
    st.tuples(st.integers(0, 11), st.integers(0, 1 << 16), st.integers(0, 1 << 16)), min_size=1, max_size=4
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


def mutate_json(text: str, plan: Sequence[Step]) -> str:
    """Change some values, keys or items of a JSON text."""
    value = json.loads(text)
    raw: list[Callable[[str], str]] = []
    for kind, where, what in plan:
        places = _places(value)
        path = places[where % len(places)]
        odd = copy.deepcopy(ODD[what % len(ODD)])
        if not path:
            if kind == 0:
                value = odd
            elif kind == 1:
                raw.append(lambda t, what=what: t[: what % (len(t) + 1)])
            elif kind == 2:
                raw.append(lambda t, what=what: t.replace("1", DEEP[what % 2], 1))
            elif kind == 3:
                raw.append(lambda t, what=what: _flip(t.encode("utf-8", "surrogatepass"), what).decode("latin-1"))
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        if kind < 6:
            parent[key] = odd
        elif kind == 6:
            del parent[key]
        elif kind == 7 and isinstance(parent, dict):
            parent[odd if isinstance(odd, str) else str(odd)] = parent.pop(key)
        elif kind == 8 and isinstance(parent, dict):
            parent[odd if isinstance(odd, str) else str(odd)] = parent[key]
        elif kind == 8:
            parent.append(parent[key])
        elif kind == 9:
            other = places[what % len(places)]
            source = value
            for step in other:
                source = source[step]
            parent[key] = json.loads(json.dumps(source))
        elif kind == 10 and type(parent[key]) is int:
            parent[key] += what % 9 - 4
        elif kind == 11 and isinstance(parent, dict):
            name = json.dumps(key)
            raw.append(lambda t, name=name: t.replace(name + ":", f"{name}: 1, {name}:", 1))
        if not isinstance(value, (dict, list)):
            break
    result = json.dumps(value)
    for change in raw:
        result = change(result)
    return result


def _flip(data: bytes, what: int) -> bytes:
    if not data:
        return b"\xff"
    at = what % len(data)
    return data[:at] + bytes([data[at] ^ (1 << what % 8)]) + data[at + 1 :]


def mutate_bytes(data: bytes, plan: Sequence[Step]) -> bytes:
    """Flip, cut, double or insert bytes."""
    for kind, where, what in plan:
        at = where % (len(data) + 1)
        if kind < 5:
            data = _flip(data, where * 8 + what)
        elif kind < 7:
            data = data[:at]
        elif kind < 9:
            data = data[:at] + data[at : at + what % 64] + data[at:]
        else:
            data = data[:at] + what.to_bytes(4, "little") + data[at:]
    return data


def mutate_safetensors(data: bytes, plan: Sequence[Step], inner: str | None = None) -> bytes:
    """Change a safetensors file's header or data; ``inner`` names a JSON text in its metadata to change instead.

    The length before the header is corrected (unless it is what changes), and so is a checksum at the end: an attacker
    would correct it as well.
    """
    size = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + size].decode(), data[8 + size :]
    (first, where, what), *rest = plan
    if inner is not None and first < 9:
        header = json.loads(text)
        header["__metadata__"][inner] = mutate_json(header["__metadata__"][inner], plan)
        text = json.dumps(header)
    elif first == 11:
        return mutate_bytes(data, [(what % 12, where, what), *rest])
    elif first == 10:
        body = mutate_bytes(body, [(what % 12, where, what), *rest])
    else:
        text = mutate_json(text, plan)
    blob = text.encode("utf-8", "surrogatepass")
    blob += b" " * (-len(blob) % 8)
    head = len(blob).to_bytes(8, "little") + blob
    if SEAL in text and len(body) >= 32:
        return head + body[:-32] + hashlib.sha256(head + body[:-32]).digest()
    return head + body


def mutate(name: str, data: bytes, plan: Sequence[Step]) -> bytes:
    """Change a file according to its kind."""
    if name.endswith(".safetensors"):
        metadata = data[: 8 + int.from_bytes(data[:8], "little")]
        inner = next((key for key in ("embedsurgery.plan", "embedsurgery") if f'"{key}":'.encode() in metadata), None)
        return mutate_safetensors(data, plan, inner)
    if name.endswith(".json") and plan[0][0] < 11:
        return mutate_json(data.decode(), plan).encode("utf-8", "surrogatepass")
    return mutate_bytes(data, plan)
