"""Computes the initial rows of new tokens. Plugins register initialisers with the hook that the built-in ones use.

``initializer.py`` has the contract, ``methods.py`` the built-in initialisers, and ``initial_rows.py`` what callers use.
All of it is numpy over a store's tables, a block of rows at a time. Nothing here imports torch or a tokenizer.
"""

from __future__ import annotations

from embedsurgery.initializers.initial_rows import add_parts, compute_initial_rows, find_initializer, parse_init
from embedsurgery.initializers.initializer import Ask, Initializer, InitializerRecord, NewToken, TableView
from embedsurgery.initializers.methods import BUILT_IN

__all__ = [
    "BUILT_IN",
    "Ask",
    "Initializer",
    "InitializerRecord",
    "NewToken",
    "TableView",
    "add_parts",
    "compute_initial_rows",
    "find_initializer",
    "parse_init",
]
