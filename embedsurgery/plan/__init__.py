"""Plans: the edits, their undos, and how both are written to a file.

An edit is a frozen dataclass in ``edits.py`` (``file_edits.py`` for edits of raw file bytes, which a journal is made
of). ``plan.py`` has `Plan` and `Undo`, and reads and writes them. A new edit starts in ``edits.py``; doing it belongs to
``stores/``.
"""

from __future__ import annotations

from embedsurgery.plan.edits import (
    AddTokens,
    Blocks,
    Edit,
    Front,
    Grow,
    PatchFile,
    SetBlocks,
    SetEntries,
    SetRows,
    Suppress,
    Token,
    Untie,
)
from embedsurgery.plan.plan import Plan, Undo

__all__ = [
    "AddTokens",
    "Blocks",
    "Edit",
    "Front",
    "Grow",
    "PatchFile",
    "Plan",
    "SetBlocks",
    "SetEntries",
    "SetRows",
    "Suppress",
    "Token",
    "Undo",
    "Untie",
]
