"""Plans and undos: lists of edits, and their file format.

An edit is a frozen dataclass that describes one change, what it affects and how it is serialised: see `Edit` in
``edit.py``. The edits are in ``row_edits.py``, ``vocabulary_edits.py``, ``token_edits.py`` and ``file_edits.py``;
``plan.py`` has `Plan` and `Undo`. A new edit is a class in one of those files, listed in ``plan.KINDS``. ``stores/``
applies edits.
"""

from __future__ import annotations

from embedsurgery.plan.blocks import Blocks
from embedsurgery.plan.edit import Edit
from embedsurgery.plan.file_edits import PatchFile
from embedsurgery.plan.plan import Plan, Undo
from embedsurgery.plan.row_edits import SetBlocks, SetEntries, SetRows
from embedsurgery.plan.token_edits import AddTokens, Suppress
from embedsurgery.plan.tokens import Prefix, Token
from embedsurgery.plan.vocabulary_edits import Grow, Untie

__all__ = [
    "AddTokens",
    "Blocks",
    "Edit",
    "Grow",
    "PatchFile",
    "Plan",
    "Prefix",
    "SetBlocks",
    "SetEntries",
    "SetRows",
    "Suppress",
    "Token",
    "Undo",
    "Untie",
]
