"""How the rows of new tokens start: a registry of its own, with the built-in ways behind the same hook as a plugin's.

``base.py`` has the contract, ``methods.py`` the built-in initialisers, ``initial.py`` what callers use. All of it is
numpy over a store's tables, a block of rows at a time; nothing here imports torch or a tokenizer.
"""

from __future__ import annotations

from embedsurgery.initializers.initial_rows import find_initializer, initial_rows, parse_init, with_parts
from embedsurgery.initializers.initializer import Ask, Initializer, InitializerRecord, NewToken, TableView
from embedsurgery.initializers.methods import BUILT_IN

__all__ = [
    "BUILT_IN",
    "Ask",
    "Initializer",
    "InitializerRecord",
    "NewToken",
    "TableView",
    "find_initializer",
    "initial_rows",
    "parse_init",
    "with_parts",
]
