"""JSON patched in place: the result is what json.dumps would have written in the same style, and back again."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedsurgery.errors import CheckpointError
from embedsurgery.files.json_patching import patch_json
from tests.support.errors import raises

PATH = Path("a.json")
STYLES: dict[str, dict[str, Any]] = {
    "two": {"indent": 2},
    "four": {"indent": 4, "ensure_ascii": False},
    "tab": {"indent": "\t"},
    "lines": {"indent": 0},
    "spaced": {},
    "compact": {"separators": (",", ":"), "ensure_ascii": False},
    "compact-ascii": {"separators": (",", ":")},
}


def content(rng: random.Random) -> dict[str, Any]:
    """Content as in a tokenizer's files."""
    entries = [{"id": n, "content": f"é<{n}>\u2581", "special": bool(n % 2)} for n in range(rng.randrange(4))]
    return {
        "version": "1.0",
        "added": entries,
        "decoder": {str(n): {"content": f"<{n}>"} for n in range(rng.randrange(4))},
        "model": {"vocab": {f'k{n}€"\\': n for n in range(rng.randrange(6))}, "merges": [["a", "b"]]},
        "texts": ["a", "b", "ü", 'c"'][: rng.randrange(5)],
        "pieces": [["a", 0.5], ["b", -1e-7], ["é", 2]],
        "last": None,
    }


def changed(before: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The content with some items removed, some renamed and some added."""
    after = copy.deepcopy(before)
    added = [e for e in after["added"] if rng.random() > 0.25]
    for entry in added:
        entry["content"] += "!" * rng.randrange(2)
    added += [
        {"id": n, "content": f"neu ö{n}"} for n in rng.sample(range(-3, 20), rng.randrange(3)) if n not in (0, 1, 2, 3)
    ]
    after["added"] = sorted(added, key=lambda e: e["id"])
    after["decoder"] = {k: v for k, v in after["decoder"].items() if rng.random() > 0.25}
    after["decoder"].update({str(n): {"content": "x", "flags": [True]} for n in range(9, 9 + rng.randrange(3))})
    vocab = after["model"]["vocab"].items()
    after["model"]["vocab"] = {("ß" + k if rng.random() < 0.2 else k): v for k, v in vocab}
    after["texts"] = [t for t in after["texts"] if rng.random() > 0.25] + ["neu"] * rng.randrange(2)
    after["pieces"] = [[("y" + p if rng.random() < 0.3 else p), s] for p, s in after["pieces"]]
    after["last"] = rng.choice([None, True, {"a": [1, {}]}])
    return after


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("style", list(STYLES))
def test_it_writes_what_the_same_style_would(style: str, end: str) -> None:
    rng = random.Random(7)
    for _ in range(80):
        before = content(rng)
        after = changed(before, rng)
        old, new = ((json.dumps(c, **STYLES[style]) + end).encode() for c in (before, after))
        assert patch_json(old, before, after, PATH) == new
        assert patch_json(new, after, before, PATH) == old


def test_unchanged_items_keep_their_spelling() -> None:
    old = (
        b'{ "a" : 1e2 ,\r\n\t"b":[ {"id" :1,"content": "\\u00e9\\/"} ,{"id":3 , "content":"x"}],  "c" : "\\u0041" }\n\n'
    )
    before = json.loads(old)
    after = {**before, "b": [before["b"][0], {"id": 2, "content": "ü"}, {"id": 3, "content": "y"}]}
    new = patch_json(old, before, after, PATH)
    assert new == old.replace(
        b'{"id":3 , "content":"x"}', b'{"id" : 2, "content" : "\\u00fc"}, {"id":3 , "content":"y"}'
    )
    assert json.loads(new) == after


def test_a_byte_order_mark_and_windows_lines_stay() -> None:
    old = b'\xef\xbb\xbf{\r\n  "a": [],\r\n  "b": {\r\n    "c": 1\r\n  }\r\n}\r\n'
    before = json.loads(old.decode("utf-8-sig"))
    new = patch_json(old, before, {"a": ["x"], "b": {"c": 1, "d": 2}}, PATH)
    assert new == old.replace(b"[]", b'[\r\n    "x"\r\n  ]').replace(b'"c": 1', b'"c": 1,\r\n    "d": 2')


@pytest.mark.parametrize("old", [b'{"a": 1, "a": 2}', b'{"b": {"a": [1], "a": [1]}, "a": 2}'])
def test_a_duplicate_key_is_refused(old: bytes) -> None:
    before = json.loads(old)
    with raises(CheckpointError, where=PATH, hint="json.dump"):
        patch_json(old, before, {**before, "b": {"a": [2]}, "a": 3}, PATH)


def test_another_order_is_refused() -> None:
    with raises(CheckpointError, where=PATH, found="'y'", hint="json.dump"):
        patch_json(b'{"a": ["x", "y", "z"]}', {"a": ["x", "y", "z"]}, {"a": ["y", "x", "w", "q"]}, PATH)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=5)


@settings(max_examples=200, deadline=None)
@given(OBJECTS, OBJECTS, st.sampled_from(list(STYLES.values())))
def test_anything_becomes_anything_or_is_refused(before: Any, after: Any, style: dict[str, Any]) -> None:
    old = json.dumps(before, **style).encode()
    try:
        new = patch_json(old, before, after, PATH)
    except CheckpointError:
        return
    assert json.loads(new) == after
    assert new != old or before == after
